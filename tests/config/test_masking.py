"""`config.masking`: what of an address is written and said; and the configuration that holds one."""

from pathlib import Path

import pytest
import yaml

from prmd.artifacts.paths import CONFIG_DIR
from prmd.artifacts.runs import dump_yaml
from prmd.config.evaluation import EvaluationConfig, TextJudgeConfig
from prmd.config.loading import load_config
from prmd.config.masking import masked, masked_address, secrets_in
from prmd.errors import ConfigError


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8000/v1", "https://h/v1/", "https://h/v1?", "https://h/@cf/v1", "http://[::1]:80/v1",
        "https://h/v1?api-version=2024-10&model=m", "https://h/v1?key=", "",
    ],
)  # fmt: skip
def test_an_address_without_secrets_stays_as_it_is(address: str) -> None:
    assert masked_address(address) == address and secrets_in(address) == []


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://h/v1?api-key=SECRET", "https://h/v1?api-key=***"),
        ("https://h/v1?x=1SECRET&API-Version=2&SECRET", "https://h/v1?x=***&API-Version=2&***"),
        ("https://h/v1?sig=SECRET==&=SECRET?2", "https://h/v1?sig=***&=***"),
        ("https://h/v1#SECRET", "https://h/v1#***"),
        ("https://me:SECRET@h:80/v1", "https://***@h:80/v1"),
        ("https://SECRET@h/v1", "https://***@h/v1"),
        ("https://me:SE@CRET@h/v1", "https://***@h/v1"),
        ("https://me:SE/CRET@h/v1?k=SECRET", "https://***@h/v1?k=***"),
        ("https://me:SE?CRET#@h/v1", "https://***@h/v1"),
        ("me:SECRET@h/v1", "***@h/v1"),
    ],
)
def test_secrets_are_masked_wherever_an_address_holds_them(address: str, shown: str) -> None:
    assert masked_address(address) == shown
    assert masked(f"{address} refused") == f"{shown} refused"


def test_secrets_are_known_in_the_forms_in_which_a_server_repeats_them() -> None:
    found = secrets_in("https://me:pass%2Fword@h/v1?key=a%2Fb%2Bc%3D%3D&model=llama-guard")
    wanted = {"pass%2Fword", "pass/word", "a%2Fb%2Bc%3D%3D", "a/b+c==", "bWU6cGFzcy93b3Jk"}
    assert wanted <= set(found) and "llama-guard" not in found and "me" not in found


def settings(url: str) -> TextJudgeConfig:
    return TextJudgeConfig(kind="endpoint", model="m", base_url=url)


def test_the_configuration_is_written_and_shown_without_secrets(tmp_path: Path) -> None:
    url = "https://me:SECRET1@h/v1?api-key=SECRET2"
    config = EvaluationConfig(text_judge=settings(url))
    assert config.text_judge.base_url == url
    assert yaml.safe_load(dump_yaml(config))["text_judge"]["base_url"] == "https://***@h/v1?api-key=***"
    assert "SECRET" not in f"{config!r} {config.model_dump()} {config.model_dump_json()}"
    (tmp_path / "evaluation_config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"base_url holds \*\*\*, the sign for a secret"):
        load_config(tmp_path, EvaluationConfig)
    assert settings("http://h/v1").model_dump()["base_url"] == "http://h/v1"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://me:SECRET@h/v1", "me:SECRET@h/v1", "http://me:SECRET@", "http://?api-key=SECRET",
        "http://h:port/v1?api-key=SECRET", "http://h:70000/v1?api-key=SECRET", "http://[h/v1?api-key=SECRET",
        "http://me:SE/CRET@h/v1", "http://h/v 1?api-key=SECRET", "http://h/v1?api-key=SECRET\n",
    ],
)  # fmt: skip
def test_an_address_that_cannot_work_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(ValueError, match=r"text_judge\.base_url must ") as caught:
        settings(url)
    assert "CRET" not in str(caught.value.errors()[0]["ctx"]["error"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["text_judge.base_ulr=http://h/v1?api-key=SECRET"],
        ["text_judge.base_url:http://h/v1?api-key=SECRET"],
        ["text_judge.base_url=me:SECRET@h/v1"],
        ["text_judge.base_url=[http://h/a-path-that-is-long-enough-to-be-cut/v1?api-key=SECRET]"],
        ["text_judge=http://me-with-a-name-that-is-long-enough-to-be-cut-off:SECRET@h/v1"],
        ["text_judge.base_url=http://me:SECRET@h/v1", "text_judge.kind=nothing"],
        ["text_judge.api_key_env=sk-SECRET"],
        ["text_judge=[{api_key_env: sk-SECRET}]"],
    ],
)
def test_no_complaint_about_a_configuration_holds_a_secret(overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(CONFIG_DIR, EvaluationConfig, overrides)
    assert "SECRET" not in str(caught.value)


def test_a_key_in_the_place_of_its_variable_is_told_by_file_and_key_alone(tmp_path: Path) -> None:
    text = "reward_model_config: reward_model_config.yaml\ntext_judge:\n  api_key_env: sk-SECRET\n"
    (tmp_path / "evaluation_config.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "reward_model_config.yaml").write_text("seed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"yaml:3: text_judge\.api_key_env: wanted the name") as caught:
        load_config(tmp_path, EvaluationConfig)
    assert "SECRET" not in str(caught.value)
