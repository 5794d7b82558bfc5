"""A model whose log-probabilities or rewards would be computed wrongly is refused with the figure; all others pass."""

import copy
from typing import Any

import pytest
import torch
import transformers
from model_families import FAMILIES, VOCABULARY, causal_model, classifier, separate_logps, separate_rewards
from tiny_models import SMALL, SMALL_MAMBA
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    FalconH1Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from prmd.errors import ConfigError
from prmd.inference.cache import ScoreTable
from prmd.inference.scoring import score_logps
from prmd.models import agreement, sequence_models
from prmd.models.agreement import check_agreement
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps, SequenceRewards, supports_shared_prompts
from prmd.models.tokenization import PrefixRow

SIZES = SMALL | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "eos_token_id": 1, "num_labels": 1}
ROW = PrefixRow((5, 6, 7, 8, 9), ((20, 21, 22), (23, 24)))


@pytest.fixture(autouse=True)
def nothing_measured_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "_checked", {})
    monkeypatch.setattr(sequence_models, "_seen_apart", set())


def rope(kind: str, **values: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES, rope_parameters={"rope_type": kind, "rope_theta": 10000.0, **values})


def falcon_h1(**changes: float) -> FalconH1Config:
    return FalconH1Config(**SIZES, **SMALL_MAMBA, **changes)


def made(
    config: PreTrainedConfig, auto: type = AutoModelForCausalLM, dtype: torch.dtype = torch.float32
) -> Any:
    torch.manual_seed(4)
    return auto.from_config(config, dtype=dtype, trust_remote_code=False).eval()


def check(model: torch.nn.Module, longest: int = 10) -> None:
    check_agreement(model, SequenceLogps(model), longest=longest)


def ours(model: torch.nn.Module, *, share_prompt: bool) -> torch.Tensor:
    with torch.no_grad():
        return SequenceLogps(model)(**collate_rows([ROW], pad_id=0, share_prompt=share_prompt))


# ------------------------------------------------------------------ what passes
@pytest.mark.parametrize("family", FAMILIES)
def test_the_known_families_pass_and_go_on_sharing_prompts(family: str) -> None:
    model, scorer = causal_model(family), classifier(family)
    before = [supports_shared_prompts(m.config, 10) for m in (model, scorer)]
    check(model, longest=200)
    check_agreement(scorer, SequenceRewards(scorer), longest=200)
    assert [supports_shared_prompts(m.config, 10) for m in (model, scorer)] == before


@pytest.mark.parametrize(
    "config",
    [CohereConfig(**SIZES, logit_scale=0.06), GraniteConfig(**SIZES, logits_scaling=9.0)],
    ids=["cohere", "granite"],
)
def test_scales_that_are_known_pass_and_are_right(config: PreTrainedConfig) -> None:
    model = made(config)
    check(model)
    torch.testing.assert_close(
        ours(model, share_prompt=True), separate_logps(model, [ROW]), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_no_difference(dtype: torch.dtype) -> None:
    for family in ("llama", "gemma", "qwen3"):
        check(copy.deepcopy(causal_model(family)).to(dtype))
        scorer = copy.deepcopy(classifier(family)).to(dtype)
        check_agreement(scorer, SequenceRewards(scorer), longest=10)


@pytest.mark.parametrize("kind", ["default", "linear", "yarn"])
def test_rope_that_does_not_follow_lengths_passes(kind: str) -> None:
    scaled = {} if kind == "default" else {"factor": 4.0}
    if kind == "yarn":
        scaled["original_max_position_embeddings"] = 16
    check(made(rope(kind, **scaled)), longest=200)


# ------------------------------------------------------------------ what is refused
WRONG = {"multiplier outside the head": falcon_h1(lm_head_multiplier=0.3)}
if hasattr(transformers, "HyperCLOVAXConfig"):  # older releases do not know the family
    WRONG["multiplied"] = transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", WRONG.values(), ids=WRONG)
def test_logits_that_a_family_scales_elsewhere_are_refused_with_the_figure(
    config: PreTrainedConfig, dtype: torch.dtype
) -> None:
    model = made(config, dtype=dtype)
    wrong = (ours(model, share_prompt=False) - separate_logps(model, [ROW])).abs().max()
    assert wrong > 0.1  # what the refusal protects from
    with pytest.raises(
        ConfigError, match=r"log-probabilities are not computed here as by the model"
    ) as error:
        check(model)
    assert f"the {config.model_type} family" in str(error.value) and "\n" not in str(error.value)


def test_the_figure_is_the_difference_per_token(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(causal_model("llama"))
    plain = model.forward

    def shifted(*arguments: Any, **keywords: Any) -> Any:
        found = plain(*arguments, **keywords)
        found.logits[..., :] = found.logits * 2
        return found

    monkeypatch.setattr(model, "forward", shifted)
    scorer = SequenceLogps(model)
    differences: list[float] = []
    for row in agreement._rows(model.config):
        for response in row.responses:
            ids = torch.tensor([[*row.prompt_ids, *response]])
            with torch.no_grad():
                hidden = model.model(ids).last_hidden_state[0, len(row.prompt_ids) - 1 : -1]
                logits = model.lm_head(hidden)
            taken = torch.tensor(response)[:, None]
            once, twice = (x.log_softmax(-1).gather(1, taken).mean() for x in (logits, 2 * logits))
            differences.append(float((once - twice).abs()))
    with pytest.raises(ConfigError, match=f": {max(differences):.3g} nats a token apart on short rows"):
        check_agreement(model, scorer, longest=10)


def test_a_reward_read_otherwise_than_by_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(classifier("llama"))
    check_agreement(model, SequenceRewards(model), longest=10)
    monkeypatch.setattr(agreement, "_checked", {})
    plain = model.forward

    def halved(*arguments: Any, **keywords: Any) -> Any:
        found = plain(*arguments, **keywords)
        found.logits = found.logits / 2
        return found

    monkeypatch.setattr(model, "forward", halved)
    with pytest.raises(ConfigError, match="its rewards are not computed here as by the model itself"):
        check_agreement(model, SequenceRewards(model), longest=10)


@pytest.mark.parametrize("task", ["policy", "reward model"])
def test_rope_that_follows_the_longest_row_is_refused_where_rows_are_long_enough(task: str) -> None:
    config = rope("dynamic", factor=4.0)
    auto = AutoModelForCausalLM if task == "policy" else AutoModelForSequenceClassification
    model = made(config, auto)
    scorer = SequenceLogps(model) if task == "policy" else SequenceRewards(model)
    check_agreement(model, scorer, longest=64)  # as far as it was trained
    with pytest.raises(
        ConfigError, match=r"beside one of 200 tokens.*\(dynamic\).*max_length to at most 64,"
    ) as error:
        check_agreement(model, scorer, longest=200)
    assert "\n" not in str(error.value)


def test_what_that_refusal_protects_from() -> None:
    """By the model itself, a row beside a longer one is another row."""
    model, row = made(rope("dynamic", factor=4.0)), [5, 6, 7, 8, 9, 20, 21]
    long = [(i * 7) % 50 + 3 for i in range(200)]
    ids = torch.tensor([row + [0] * 193, long])
    mask = torch.tensor([[1] * 7 + [0] * 193, [1] * 200])
    with torch.no_grad():
        alone = model(torch.tensor([row])).logits[0].log_softmax(-1)
        beside = model(ids, attention_mask=mask).logits[0, :7].log_softmax(-1)
    assert (alone - beside).abs().max() > 0.01


# ------------------------------------------------------------------ prompts that cannot be shared
class AlsoAPlaceBefore(torch.nn.Module):
    """What a state or a convolution over places does: no mask of attention reaches it."""

    def __init__(self, norm: torch.nn.Module, places: int) -> None:
        super().__init__()
        self.norm, self.places = norm, places

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(hidden)
        before = torch.nn.functional.pad(hidden, (0, 0, self.places, 0))
        return hidden + 0.5 * before[:, : hidden.shape[1]]


def test_responses_that_see_each_other_get_rows_of_their_own() -> None:
    model = copy.deepcopy(causal_model("llama"))
    model.model.norm = AlsoAPlaceBefore(model.model.norm, 1)
    assert supports_shared_prompts(model.config, 10)
    expected = separate_logps(model, [ROW])
    assert (ours(model, share_prompt=True) - expected).abs().max() > 0.01
    check(model)
    assert not supports_shared_prompts(model.config, 10)
    torch.testing.assert_close(ours(model, share_prompt=False), expected, rtol=1e-5, atol=1e-4)


def test_the_same_for_rewards() -> None:
    model = copy.deepcopy(classifier("llama"))
    model.model.norm = AlsoAPlaceBefore(model.model.norm, 4)
    assert supports_shared_prompts(model.config, 10)
    check_agreement(model, SequenceRewards(model), longest=10)
    assert not supports_shared_prompts(model.config, 10)
    with torch.no_grad():
        found = SequenceRewards(model)(**collate_rows([ROW], pad_id=0, share_prompt=False))
    torch.testing.assert_close(found, separate_rewards(model, [ROW]), rtol=1e-5, atol=1e-4)


# ------------------------------------------------------------------ where and how often
def test_a_scoring_pass_checks_first_and_keeps_nothing_of_a_wrong_model(tmp_path: Any) -> None:
    model = made(WRONG["multiplier outside the head"])
    table = ScoreTable(tmp_path / "logps", 1)
    with pytest.raises(ConfigError, match="not computed here as by the model"):
        score_logps(model, [ROW], table=table, pad_id=0, tokens_per_batch=99, description="x")
    assert len(table) == 0 and not list(tmp_path.rglob("shard*"))


def test_a_model_is_measured_once_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = copy.deepcopy(causal_model("llama")), []
    model.model.layers[0].train()
    state = torch.get_rng_state()
    compare = agreement._compare
    monkeypatch.setattr(agreement, "_compare", lambda *a: calls.append(a[2]) or compare(*a))
    for longest in (10, 10, 7, 30, 30):
        check(model, longest)
    assert calls == [10, 30]
    assert [name for name, m in model.named_modules() if m.training] == [
        name for name, _ in model.named_modules() if name.startswith("model.layers.0")
    ]
    assert torch.equal(torch.get_rng_state(), state)
