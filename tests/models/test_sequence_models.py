"""Prefix-shared rows against separate unpadded forward passes: log-probabilities, rewards, gradients, windows, memory."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import (
    SHARED,
    VOCABULARY,
    assert_same_gradients,
    causal_model,
    classifier,
    family_config,
    gradients,
    rows_of,
    separate_logps,
    separate_rewards,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma3Config

from prmd.models import sequence_models
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps, SequenceRewards, supports_shared_prompts
from prmd.models.tokenization import PrefixRow
from prmd.training.rehearsal import TensorBytes

WINDOWED = ("mistral", "gemma3", "gemma2")
ROWS = [
    PrefixRow((5, 6, 7, 8, 9, 10, 11), ((20, 21, 22), (23,), (24, 25, 26, 27, 28))),
    PrefixRow((12,), ((30, 31), (32, 33, 34))),
]
LONGEST = 12


def weighted(values: Tensor) -> Tensor:
    """A scalar in which every response has its own coefficient, some of them negative."""
    return (values * (torch.arange(len(values)) * 1.7 - 1.3).cos()).sum()


def check_logps(model: torch.nn.Module, rows: list[PrefixRow], *, share_prompt: bool) -> None:
    batch = collate_rows(rows, pad_id=0, share_prompt=share_prompt)
    ours, expected = SequenceLogps(model)(**batch), separate_logps(model, rows)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradients(model, weighted(ours)), gradients(model, weighted(expected)))


def check_rewards(model: torch.nn.Module, rows: list[PrefixRow], *, share_prompt: bool) -> None:
    batch = collate_rows(rows, pad_id=0, share_prompt=share_prompt)
    expected = separate_rewards(model, rows)
    scorer = SequenceRewards(model)
    ours = scorer(**batch)
    features, again = scorer.features_and_rewards(**batch)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(again, ours)
    by_hand = features @ model.score.weight.float()[0]
    torch.testing.assert_close(by_hand, expected, rtol=1e-5, atol=1e-4)
    assert_same_gradients(gradients(model, weighted(ours)), gradients(model, weighted(expected)))


# ------------------------------------------------------------------ exactness
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("family", SHARED)
@settings(max_examples=8, deadline=None)
@given(rows=rows_of())
def test_logps_equal_separate_passes(family, share_prompt, rows):
    check_logps(causal_model(family), rows, share_prompt=share_prompt)


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("family", SHARED)
@settings(max_examples=8, deadline=None)
@given(rows=rows_of())
def test_rewards_equal_separate_passes(family, share_prompt, rows):
    check_rewards(classifier(family), rows, share_prompt=share_prompt)


@settings(max_examples=6, deadline=None)
@given(rows=rows_of(), scale=st.sampled_from([0.3, 1.0]))
def test_adapters_are_part_of_what_is_computed(rows, scale):
    torch.manual_seed(3)
    plain = causal_model("llama")
    model = get_peft_model(copy.deepcopy(plain), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale)
    check_logps(model.eval(), rows, share_prompt=True)
    batch = collate_rows(rows, pad_id=0)
    assert not torch.allclose(SequenceLogps(model)(**batch), separate_logps(plain, rows), atol=1e-3)


# ------------------------------------------------------------------ attention windows
@pytest.mark.parametrize("family", WINDOWED)
def test_a_window_shorter_than_the_conversation_is_not_shared_and_still_exact(family):
    model, scorer = causal_model(family, 4), classifier(family, 4)
    assert not supports_shared_prompts(model.config, LONGEST)
    assert not supports_shared_prompts(scorer.config, LONGEST)
    check_logps(model, ROWS, share_prompt=False)
    check_rewards(scorer, ROWS, share_prompt=False)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_sharing_is_allowed_up_to_the_window_and_wrong_beyond_it(family):
    fits, short = causal_model(family, LONGEST), causal_model(family, 4)
    assert supports_shared_prompts(fits.config, LONGEST)
    assert not supports_shared_prompts(fits.config, LONGEST + 1)
    check_logps(fits, ROWS, share_prompt=True)
    shared = SequenceLogps(short)(**collate_rows(ROWS, pad_id=0))
    assert (shared - separate_logps(short, ROWS)).abs().max() > 1e-2  # what the refusal protects from


def test_gemma2_runs_eagerly_without_sharing():
    model = causal_model("gemma2")
    assert model.config._attn_implementation == "eager"
    assert not supports_shared_prompts(model.config, 3)
    check_logps(model, ROWS, share_prompt=False)
    check_rewards(classifier("gemma2"), ROWS, share_prompt=False)


def test_soft_capped_logits_are_capped():
    model = causal_model("gemma2")
    capped = SequenceLogps(model).logits(
        1000 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    )
    assert capped.abs().max() <= model.config.final_logit_softcapping
    assert capped.abs().max() > 0.9 * model.config.final_logit_softcapping


def test_window_of_a_multimodal_configuration_is_that_of_its_language_part():
    text = family_config("gemma3", sliding_window=16).to_dict()
    config = Gemma3Config(text_config=text)
    config._attn_implementation = "sdpa"
    assert supports_shared_prompts(config, 16)
    assert not supports_shared_prompts(config, 17)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma"])
def test_full_attention_is_shared_at_any_length(family):
    assert supports_shared_prompts(causal_model(family).config, 100_000)


def test_linear_attention_is_not_shared():
    config = family_config("qwen3", layer_types=["full_attention", "full_attention"])
    config._attn_implementation = "sdpa"
    assert supports_shared_prompts(config, 10)
    config.layer_types = ["linear_attention", "full_attention"]
    assert not supports_shared_prompts(config, 10)


# ------------------------------------------------------------------ number formats
def test_the_head_of_a_bfloat16_classifier_runs_in_float32():
    model = copy.deepcopy(classifier("llama")).to(torch.bfloat16)
    batch = collate_rows(ROWS, pad_id=0)
    features, rewards = SequenceRewards(model).features_and_rewards(**batch)
    assert rewards.dtype == features.dtype == torch.float32
    by_hand = features.double() @ model.score.weight[0].double()
    torch.testing.assert_close(rewards.double(), by_hand, rtol=1e-5, atol=1e-6)
    assert not torch.equal(rewards, rewards.bfloat16().float())  # not rounded to bfloat16, where rewards tie
    rewards.sum().backward()
    assert model.score.weight.grad is not None


def test_logps_of_a_bfloat16_model_are_summed_in_float32():
    model = copy.deepcopy(causal_model("llama")).to(torch.bfloat16)
    row = PrefixRow((5, 6), (tuple(range(2, 60)) * 3,))
    ours = SequenceLogps(model)(**collate_rows([row], pad_id=0))
    expected = separate_logps(model, [row])
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)  # bfloat16 sums near -700 step by 4


# ------------------------------------------------------------------ memory
class _LargestLogits(TorchDispatchMode):
    """Rows of the largest tensor whose last dimension is the vocabulary, the head's own weights aside."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if not isinstance(leaf, Tensor) or leaf.shape == (32, VOCABULARY):
                continue
            if leaf.ndim and leaf.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, leaf.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("block", [1, 5, 64])
def test_no_tensor_of_all_tokens_by_vocabulary_exists(monkeypatch, block):
    monkeypatch.setattr(sequence_models, "LOGITS_AT_ONCE", block * VOCABULARY)
    model = causal_model("llama")
    scorer = SequenceLogps(model)
    hidden = torch.randn(64, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.arange(64) % VOCABULARY
    expected = model.lm_head(hidden).log_softmax(-1)[torch.arange(64), targets]
    coefficients = torch.linspace(-1, 1, 64)
    (expected_gradient,) = torch.autograd.grad((expected * coefficients).sum(), hidden)
    with _LargestLogits() as seen:
        ours = scorer.token_logps(hidden, targets)
        (gradient,) = torch.autograd.grad((ours * coefficients).sum(), hidden)
    assert seen.rows == block
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(monkeypatch):
    vocabulary, block = 4096, 8
    monkeypatch.setattr(sequence_models, "LOGITS_AT_ONCE", block * vocabulary)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, vocabulary, bias=False)
    head.weight.requires_grad_(False)
    scorer = SequenceLogps(causal_model("llama"))
    monkeypatch.setattr(type(scorer.unwrapped), "get_output_embeddings", lambda self: head)

    def peak(tokens: int) -> int:
        hidden = torch.randn(tokens, 16, requires_grad=True)
        targets = torch.zeros(tokens, dtype=torch.long)
        with TensorBytes([hidden, head.weight, targets]) as count:
            scorer.token_logps(hidden, targets).sum().backward()
        return count.peak

    growth = peak(128) - peak(32)
    one_row_of_logits = 4 * vocabulary
    assert growth < 96 * one_row_of_logits / 20
    assert peak(32) < head.weight.numel() * 4 + 5 * block * one_row_of_logits


def test_under_zero3_every_process_calls_the_head_equally_often(monkeypatch):
    model = causal_model("llama")
    scorer, hidden = SequenceLogps(model), torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(5)
    expected = scorer.token_logps(hidden, targets)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda most, op: most.fill_(7)
    )  # another has 7 blocks
    assert scorer._block_count(hidden) == 1  # weights that are whole need no agreement
    model.get_output_embeddings().weight.ds_id = 0
    calls = []

    def counted(*arguments: Tensor) -> Tensor:
        calls.append(arguments[0].shape[0])
        return SequenceLogps._block_logps(scorer, *arguments)

    monkeypatch.setattr(scorer, "_block_logps", counted)
    torch.testing.assert_close(scorer.token_logps(hidden, targets), expected)
    assert calls == [1, 1, 1, 1, 1, 0, 0]
