"""`models.foreign`: which policies from elsewhere fit the reference, and the one line of each that does not."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import TEMPLATE, tiny_causal_lm, tiny_classifier, tiny_config, tiny_tokenizer
from tiny_workspace import reward_model_config
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError, DataError, NotFiniteError, UserError
from prmd.models.foreign import ForeignPolicy, find_foreign, load_foreign
from prmd.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("reference") / "base")


def adapter(folder: Path, base: Path, **changes: object) -> Path:
    """A LoRA adapter as plain peft saves it: no tokenizer, no record."""
    torch.manual_seed(1)
    values = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": False}
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(values | changes))
    ).save_pretrained(folder)
    return folder


def full(folder: Path, template: str | None = TEMPLATE, **changes: object) -> Path:
    """A model of its own with the tokenizer of the reference."""
    torch.manual_seed(4)
    LlamaForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    return tiny_tokenizer(folder, template=template)


def shared(base: Path) -> RewardModelConfig:
    return reward_model_config(base.parent / "root", base)


def found(source: Path | str, base: Path) -> ForeignPolicy:
    settings = shared(base)
    tokenizer = load_tokenizer(settings.model, settings.paths)
    return find_foreign("theirs", str(source), settings.model, settings.paths, tokenizer)


def refusal(source: Path | str, base: Path) -> str:
    with pytest.raises(UserError) as error:
        found(source, base)
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


# ------------------------------------------------------------------ what joins
def test_a_plain_adapter_fits_and_is_described(tmp_path: Path, base: Path) -> None:
    policy = found(adapter(tmp_path / "lora", base), base)
    assert policy.said() == {
        "source": str(tmp_path / "lora"),
        "base": f"{base}, the same weights as model.name",
        "template": "the reference's, for there is none beside the adapter",
        "adapter": "LoRA of rank 4",
    }


def test_the_key_is_of_the_content_and_not_of_the_place(tmp_path: Path, base: Path) -> None:
    first = found(adapter(tmp_path / "one", base), base)
    same = found(adapter(tmp_path / "two", base), base)
    other = found(adapter(tmp_path / "three", base, r=2), base)
    assert first.key == same.key != other.key


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_computes_what_plain_peft_computes(
    tmp_path: Path, base: Path, changes: dict[str, object]
) -> None:
    folder, settings = adapter(tmp_path / "lora", base, **changes), shared(base)
    ours = load_foreign(found(folder, base), settings.model, settings.paths)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    ids = torch.tensor([[5, 9, 17, 40]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
        with ours.disable_adapter():
            plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
            assert torch.equal(ours(ids).logits, plain)
            assert not torch.equal(plain, theirs(ids).logits)


def test_a_full_model_of_another_shape_fits_by_its_tokenizer(tmp_path: Path, base: Path) -> None:
    folder, settings = full(tmp_path / "theirs", num_hidden_layers=1, tie_word_embeddings=True), shared(base)
    policy = found(folder, base)
    assert policy.base == "none, LlamaForCausalLM of its own" and policy.adapter == "none, full weights"
    assert policy.template == "its own, which writes what the reference's writes"
    assert load_foreign(policy, settings.model, settings.paths).config.num_hidden_layers == 1


def test_a_template_in_other_words_that_writes_the_same_fits(tmp_path: Path, base: Path) -> None:
    found(full(tmp_path / "theirs", template=f"{{# as trained #}}{TEMPLATE}"), base)


# ------------------------------------------------------------------ what does not
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, base: Path) -> None:
    other = tiny_causal_lm(tmp_path / "other", seed=7)
    said = refusal(adapter(tmp_path / "lora", other), base)
    assert said.startswith(
        f"generation.policies.theirs: the adapter was trained from {other}, model.name is {base}"
    )


@pytest.mark.parametrize(
    ("named", "fits"),
    [("base", True), ("/gone/with/them/base", True), ("org/base", True), ("/gone/other", False), ("", False)],
)
def test_a_base_that_is_not_here_is_known_by_its_name(
    tmp_path: Path, base: Path, named: str, *, fits: bool
) -> None:
    folder = adapter(tmp_path / "lora", base)
    edit(folder / "adapter_config.json", base_model_name_or_path=named)
    if fits:
        assert found(folder, base).base == f"{named}, known by its name alone"
    else:
        assert "adapter_config.json" in refusal(folder, base)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"num_hidden_layers": 3}, r"14 tensors of .* the first is .*layers\.2\."),
        ({"intermediate_size": 96}, r"do not fit \(base, known by its name alone\)"),
    ],
)
def test_an_adapter_with_the_right_name_and_another_shape_is_refused_in_a_line(
    tmp_path: Path, base: Path, other: dict[str, int], said: str
) -> None:
    folder, settings = adapter(tmp_path / "lora", full(tmp_path / "other" / "base", **other)), shared(base)
    edit(folder / "adapter_config.json", base_model_name_or_path="base")
    policy = found(folder, base)
    with pytest.raises(ConfigError, match=said) as error:
        load_foreign(policy, settings.model, settings.paths)
    assert "\n" not in str(error.value)


def test_an_adapter_with_embeddings_of_its_own_is_refused(tmp_path: Path, base: Path) -> None:
    """peft would load them into the base itself, so that switching the adapter off would not give the reference."""
    settings = shared(base)
    folder = adapter(tmp_path / "lora", base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match=r"1 tensors of .* the first is .*lm_head.* merge it"):
        load_foreign(found(folder, base), settings.model, settings.paths)


def test_a_half_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    folder, settings = adapter(tmp_path / "lora", base), shared(base)
    weights = load_file(folder / "adapter_model.safetensors")
    lost = sorted(weights)[3]
    save_file({k: v for k, v in weights.items() if k != lost}, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="1 tensors of ") as error:
        load_foreign(found(folder, base), settings.model, settings.paths)
    assert lost in str(error.value)


def test_a_full_model_with_a_lost_tensor_is_refused(tmp_path: Path, base: Path) -> None:
    folder, settings = full(tmp_path / "theirs"), shared(base)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"no model\.layers\.1\.mlp\.up_proj\.weight"):
        load_foreign(found(folder, base), settings.model, settings.paths)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_weights_that_are_not_finite_are_said_with_what_to_do(tmp_path: Path, base: Path, kind: str) -> None:
    settings = shared(base)
    folder = adapter(tmp_path / "x", base) if kind == "adapter" else full(tmp_path / "x")
    file = folder / ("adapter_model.safetensors" if kind == "adapter" else "model.safetensors")
    weights = load_file(file)
    next(iter(weights.values())).view(-1)[3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"1 of .* tensors hold NaN") as error:
        load_foreign(found(folder, base), settings.model, settings.paths)
    said = str(error.value)
    assert said.startswith("generation.policies.theirs: ") and said.endswith(
        "take another copy, or leave it out"
    )
    assert "--force" not in said and "\n" not in said


def test_adapters_that_cannot_be_switched_off_are_refused(tmp_path: Path, base: Path) -> None:
    assert "bias: lora_only" in refusal(adapter(tmp_path / "bias", base, bias="lora_only"), base)
    rewards = adapter(tmp_path / "rewards", base)
    edit(rewards / "adapter_config.json", task_type="SEQ_CLS")
    assert "a LORA adapter for SEQ_CLS, wanted LORA for CAUSAL_LM" in refusal(rewards, base)
    prompts = adapter(tmp_path / "prompts", base)
    edit(prompts / "adapter_config.json", peft_type="PROMPT_TUNING")
    assert "a PROMPT_TUNING adapter" in refusal(prompts, base)


def test_another_tokenizer_template_or_vocabulary_is_refused(tmp_path: Path, base: Path) -> None:
    spoken = full(tmp_path / "spoken", template=TEMPLATE.replace("\n", " "))
    assert "the chat template in" in refusal(spoken, base)
    swapped = full(tmp_path / "swapped")
    text = json.loads((swapped / "tokenizer.json").read_text(encoding="utf-8"))
    text["model"]["merges"] = text["model"]["merges"][::-1]
    (swapped / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    assert "is another than that of the reference" in refusal(swapped, base)
    assert "logits of 320 tokens, the reference" in refusal(full(tmp_path / "wide", vocab_size=320), base)
    mute = full(tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (mute / name).unlink()
    assert "has no tokenizer" in refusal(mute, base)


def test_a_reward_model_and_what_is_not_there_are_refused(tmp_path: Path, base: Path) -> None:
    assert "a LlamaForSequenceClassification, wanted a causal" in refusal(
        tiny_classifier(tmp_path / "rm"), base
    )
    (tmp_path / "empty").mkdir()
    assert "no .safetensors weights" in refusal(tmp_path / "empty", base)
    said = refusal("nobody/nothing-at-all@main", base)
    assert said.startswith("generation.policies.theirs: 'nobody/nothing-at-all@main' is no folder")


def test_a_hub_id_is_fetched_at_its_revision(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def fetch(name: str, **arguments: object) -> str:
        asked.update({"name": name, **arguments})
        return str(adapter(tmp_path / "0123abc", base))

    monkeypatch.setattr("prmd.models.foreign.snapshot_download", fetch)
    assert found("org/theirs@v1", base).source == "org/theirs@0123abc"
    assert asked["name"] == "org/theirs" and asked["revision"] == "v1" and asked["ignore_patterns"] == ["*/*"]
