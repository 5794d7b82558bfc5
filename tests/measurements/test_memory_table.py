"""Peak memory of a training step as a function of vocabulary and length, and the benchmark that tabulates it."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_tokenizer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from benchmarks import memory_table
from prmd.models import sequence_models
from prmd.models.loading import load_tokenizer_from
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow
from prmd.training.rehearsal import TensorBytes

BLOCK_ELEMENTS = 2**17


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_models, "LOGITS_AT_ONCE", BLOCK_ELEMENTS)


def model_of(vocabulary: int) -> SequenceLogps:
    torch.manual_seed(0)
    return SequenceLogps(LlamaForCausalLM(tiny_config(vocab_size=vocabulary, tie_word_embeddings=True)))


def step(model: nn.Module, length: int) -> None:
    row = PrefixRow((1,) * 4, ((5,) * length, (6,) * length))
    model(**collate_rows([row], pad_id=0)).sum().backward()


def peak(vocabulary: int, length: int) -> int:
    """Bytes of one step's tensors beside the weights and their gradients."""
    model = model_of(vocabulary)
    with TensorBytes(model.parameters()) as count:
        step(model, length)
    return count.peak - 2 * sum(p.numel() * p.element_size() for p in model.parameters())


@pytest.mark.parametrize("vocabulary", [1024, 4096])
def test_peak_of_the_log_probabilities_grows_by_hidden_states_alone(vocabulary: int) -> None:
    """For each token more: its hidden state's gradient, a target's log-probability; never its 4 V bytes of logits."""
    model = model_of(vocabulary)
    peaks = []
    for tokens in (256, 512, 768):
        hidden = torch.randn(tokens, 32, requires_grad=True)
        with TensorBytes([*model.parameters(), hidden]) as count:
            model.token_logps(hidden, torch.zeros(tokens, dtype=torch.long)).sum().backward()
        peaks.append(count.peak)
    slopes = [(b - a) / 256 for a, b in pairwise(peaks)]
    assert slopes[1] == pytest.approx(slopes[0], rel=0.05)
    hidden_bytes = 4 * 32
    assert 0 < slopes[0] < 5 * hidden_bytes < 4 * vocabulary


def test_a_larger_vocabulary_costs_the_same_at_every_length() -> None:
    """Beyond one block of logits, which has as many elements whatever the vocabulary."""
    more = [peak(4096, length) - peak(1024, length) for length in (128, 256, 512)]
    assert max(more) - min(more) < 0.02 * peak(1024, 512)
    logits_of_all = 4 * 2 * 512 * (4096 - 1024)
    assert max(more) < logits_of_all / 4


class _Widest(TorchDispatchMode):
    """Most rows of any tensor that is as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, leaf.numel() // self.vocabulary)
        return result


def test_logits_of_all_tokens_never_exist() -> None:
    model = model_of(2048)
    with _Widest(2048) as widest:
        step(model, 200)
    assert 0 < widest.rows <= BLOCK_ELEMENTS // 2048 == 64


# ------------------------------------------------------------------ the table
def test_table_is_measured_on_both_sides(tmp_path: Any) -> None:
    tokenizer = load_tokenizer_from(tiny_tokenizer(tmp_path / "tokenizer"))
    rows = [memory_table.measure(tokenizer, 4096, length, trl=length == 64) for length in (64, 128)]
    for row, length in zip(rows, (64, 128), strict=True):
        assert row["tokens"] > length / 2 and row["ours"] > row["states"] > 0
    assert rows[1]["ours"] > rows[0]["ours"] and rows[0]["states"] == rows[1]["states"]
    assert rows[0]["trl"] > rows[0]["states"] and rows[1]["trl"] is None
    lines = memory_table.table(rows).splitlines()
    assert len(lines) == 4 and f"| {rows[0]['ours'] / rows[0]['trl']:.2f} |" in lines[2]
    assert lines[3].startswith(
        f"| 4,096 | {rows[1]['tokens']} | {rows[1]['ours'] / 2**20:,.0f} MiB | - | - |"
    )
