"""Odd YAML: every text is a configuration or lines that name the file, never another error."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prmd.config.loading import load_config
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError

NAME = "reward_model_config.yaml"


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file to write; its folder is the current one, so that messages show bare names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / NAME


def mistakes(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, RewardModelConfig, overrides)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("model: {}\nseed: !!int abc\n", 2, "got the tag !!int"),
        ("seed: !!int 7\n", 1, "got the tag !!int"),
        ("seed: !!python/object/apply:os.getpid []\n", 1, "got the tag !!python/object/apply:os.getpid"),
        ("data: !!python/object:prmd.Any {approach: embedded}\n", 1, "got the tag !!python/object"),
        ("data: !mine {approach: embedded}\n", 1, "got the tag !mine"),
        ("seed: 0b_\n", 1, 'seed: got "0b_", wanted a valid integer'),
        ("seed: " + "9" * 5000 + "\n", 1, 'seed: got "9999'),
        ("seed: 0x" + "F" * 5000 + "\n", 1, 'seed: got "0xFF'),
        ("? " + "9" * 5000 + "\n: 1\n", 1, "9999"),
        ("model:\n  name: " + "[" * 100_000 + "\n", 1, "nested too deeply"),
        ('seed: 7\nartifact_root: "a\\ud83d"\n', 2, "got half a character"),
        ('"a\\ud83d": 1\n', 1, "got the key"),
        ("seed: 7\nartifact_root: a\0b\n", 2, "the character U+0000 may not stand in YAML"),
        ("? [a, b]\n: 1\n", 1, "got a sequence as a key"),
        ("? {a: b}\n: 1\n", 1, "got a mapping as a key"),
        ("? seed\n\n  seed\n: 1\n", 1, "got the key 'seed\\nseed', wanted text on one line"),
        ("7: 1\n", 1, "got the key 7"),
        ('seed: 7\nextends: "a\\0b"\n', 2, "wanted a readable YAML file"),
        ("extends: .\n", 1, "wanted a readable YAML file"),
    ],
)
def test_what_cannot_be_a_value_is_refused_with_its_line(
    text: str, line: int, problem: str, path: Path
) -> None:
    path.write_text(text, encoding="utf-8")
    lines = mistakes(path)
    assert any(problem in said and said.startswith(f"{NAME}:{line}: ") for said in lines), lines


@pytest.mark.parametrize("text", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_refused(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")
    assert mistakes(path) == [
        f"{NAME}: empty, wanted `key: value` lines; restore the file, or write {{}} for all defaults"
    ]
    path.write_text("{}\n", encoding="utf-8")
    assert load_config(path, RewardModelConfig) == RewardModelConfig()


def test_a_file_in_utf16_and_a_folder_in_its_place(path: Path) -> None:
    path.write_text("seed: 7\n", encoding="utf-16")
    assert mistakes(path) == [f"{NAME}: not UTF-8; save the file as UTF-8"]
    path.unlink()
    path.mkdir()
    assert "wanted a readable YAML file" in mistakes(path.parent)[0]


@pytest.mark.parametrize(
    "value", ["!!int abc", "\0", "\udcff", "[" * 5000, "9" * 5000, '"\\ud83d"', "*a", "a\nb: ["]
)
def test_odd_overrides_are_named(value: str, path: Path) -> None:
    path.write_text("seed: 7\n", encoding="utf-8")
    assert all(said.startswith("command line: seed=") for said in mistakes(path, f"seed={value}"))


def test_an_artifact_root_that_can_be_no_folder(path: Path) -> None:
    (path.parent / "notes").write_text("", encoding="utf-8")
    for root, problem in (
        (path.parent / "notes", "notes is a file"),
        (path.parent / "notes" / "deeper" / "root", "notes is a file"),
        ("a\0b", "wanted a folder"),
        ("x" * 5000, "wanted a folder"),
    ):
        config = RewardModelConfig(artifact_root=str(root))
        with pytest.raises(ConfigError, match=rf"^artifact_root: got .*{problem}"):
            _ = config.paths


pieces = st.sampled_from(
    [
        *("seed", "data", "model", "approach", "extends", ": ", "\n", "\n  ", "- ", "{", "}", "[", "]", ", "),
        *(
            "!!int ",
            "!x ",
            "!!",
            "&a ",
            "*a",
            "<<",
            "? ",
            "|",
            ">",
            "'",
            '"',
            "#",
            "%",
            "---",
            "...",
            "\\",
            "\t",
        ),
        *("7", "-", "0x_", "0b_", "1e999", ".nan", "~", "yes", "null", "\0", "\ufeff", "\x85", "\ud83d", "é"),
    ]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(pieces, max_size=10).map("".join) | st.text(max_size=15) | st.binary(max_size=15))
def test_any_text_is_a_configuration_or_named_mistakes(path: Path, text: Any) -> None:
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    try:
        load_config(path, RewardModelConfig)
    except ConfigError as error:
        assert all(NAME in line for line in str(error).splitlines()), str(error)
