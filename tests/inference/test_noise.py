"""The noise of sampling against a second SplitMix64, its law, the law of what is drawn by it, and independence of its keys."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from prmd.inference import noise
from prmd.inference.cache import tokens_key
from prmd.inference.generation import Decoding, _processors
from prmd.inference.noise import KeyedGumbel, gumbel, sample_key, splitmix64

SEEDS = [0, 1, 1234567, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
"""Unsigned."""


def signed(numbers: list[int]) -> Tensor:
    return torch.tensor([n - 2**64 if n >= 2**63 else n for n in numbers])


def plain_splitmix64(seed: int, count: int) -> list[int]:
    """As its authors wrote it in C, in Python's integers."""
    state, found, most = seed, [], 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & most
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & most
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & most
        found.append(z ^ (z >> 31))
    return found


def keys_of(prompts: int, samples: int, seed: int = 5) -> Tensor:
    names = [tokens_key((7, i, 3)).hex() for i in range(prompts)]
    return torch.tensor([sample_key(seed, name, j) for name in names for j in range(samples)])


def drawn(keys: Tensor, logits: Tensor, position: int = 0, **decoding: float) -> np.ndarray:
    """One token for each key, by the processors of `generate`."""
    settings = {"temperature": 1.0, "top_p": 1.0} | decoding
    how = Decoding(samples_per_prompt=1, max_new_tokens=1, seed=0, stop=0, pad=0, **settings)
    scores = logits.float().expand(len(keys), -1)
    ids = torch.zeros(len(keys), 4 + position, dtype=torch.long)
    return _processors(how, keys, 4)(ids, scores).argmax(dim=-1).numpy()


def logits_of(tokens: int) -> Tensor:
    return torch.randn(tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2


# ------------------------------------------------------------------ the generator
def test_the_generator_is_splitmix64() -> None:
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert plain_splitmix64(1234567, 3) == first  # the published outputs
    found = splitmix64(signed(SEEDS), 50)
    for row, seed in zip(found.tolist(), SEEDS, strict=True):
        assert [number % 2**64 for number in row] == plain_splitmix64(seed, 50)
    assert torch.equal(splitmix64(signed(SEEDS), 20, start=30), found[:, 30:])


def test_noise_is_gumbel_distributed_and_uncorrelated() -> None:
    found = gumbel(keys_of(50, 8), 1000).double()
    assert stats.kstest(found.flatten().numpy(), "gumbel_r").pvalue > 1e-3
    uniform = torch.exp(-torch.exp(-found)).numpy()
    n = uniform.size
    for one, two in (
        (uniform[:, 1:], uniform[:, :-1]),  # neighboring tokens
        (uniform[1:], uniform[:-1]),  # neighboring samples
        (uniform[8:], uniform[:-8]),  # the same sample of neighboring prompts
    ):
        assert abs(np.corrcoef(one.ravel(), two.ravel())[0, 1]) < 4 / math.sqrt(n)
    keys = keys_of(50, 8)
    later = gumbel(splitmix64(keys, 1, start=1)[:, 0], 1000), gumbel(splitmix64(keys, 1, start=2)[:, 0], 1000)
    assert abs(np.corrcoef(*(values.flatten().numpy() for values in later))[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize(
    ("bits", "uniform"), [(0, 2.0**-64), (1, 2.0**-63), (2**10, 2.0**-53), (2**62, 0.5), (2**63 - 1, None)]
)
def test_ends_of_the_unit_interval(monkeypatch: pytest.MonkeyPatch, bits: int, uniform: float | None) -> None:
    monkeypatch.setattr(noise, "splitmix64", lambda seeds, count: torch.tensor([[bits]]))
    found = float(gumbel(torch.zeros(1, dtype=torch.long), 1))
    assert found == pytest.approx(-math.log(-math.log1p(-(uniform or 1 - 2.0**-24))), rel=1e-6)


# ------------------------------------------------------------------ what is drawn
@pytest.mark.parametrize(
    ("tokens", "temperature", "top_p"),
    [(5, 1.0, 1.0), (300, 1.0, 1.0), (300, 0.6, 1.0), (300, 1.7, 1.0), (300, 1.0, 0.7), (300, 0.8, 0.9)],
)
def test_tokens_are_drawn_from_the_warped_softmax(tokens: int, temperature: float, top_p: float) -> None:
    n, logits = 20000, logits_of(tokens)
    found = drawn(keys_of(n // 4, 4), logits, temperature=temperature, top_p=top_p)
    p = (logits / temperature).softmax(-1).numpy()
    order = np.argsort(-p)
    kept = order[: int((np.cumsum(p[order]) < top_p).sum()) + 1] if top_p < 1 else order
    expected = np.zeros(tokens)
    expected[kept] = p[kept] / p[kept].sum()
    counts = np.bincount(found, minlength=tokens)
    assert not counts[expected == 0].any()
    common = expected * n >= 5
    observed = np.append(counts[common], counts[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum()) * n
    some = wanted > 0  # all tokens of a small vocabulary are common
    assert common.sum() >= 5
    assert stats.chisquare(observed[some], wanted[some]).pvalue > 1e-3


@pytest.mark.parametrize("what", ["position", "sample", "prompt", "seed"])
def test_draws_are_independent(what: str) -> None:
    """Contingency of two draws that differ in one part of the key."""
    n, logits = 20000, logits_of(6)
    one = (keys_of(n, 2)[::2], 0)
    other = {
        "position": (one[0], 1),
        "sample": (keys_of(n, 2)[1::2], 0),
        "prompt": (one[0].roll(1), 0),
        "seed": (keys_of(n, 2, seed=6)[::2], 0),
    }[what]
    table = np.zeros((6, 6))
    np.add.at(table, tuple(drawn(keys, logits, position) for keys, position in (one, other)), 1)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    assert stats.chi2_contingency(table).pvalue > 1e-3


def test_no_two_keys_are_the_same() -> None:
    keys = torch.cat([keys_of(2000, 16), keys_of(2000, 16, seed=6)])
    assert len(set(keys.tolist())) == 64000
    positions = splitmix64(keys, 32)  # the seeds of two million tokens
    assert len(positions.unique()) == positions.numel()
    assert sample_key(1, "2-3", 4) != sample_key(1, "2", 3) != sample_key(12, "", 3)


def test_noise_of_a_token_depends_on_nothing_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, scores = keys_of(4, 3), torch.randn(12, 90, generator=torch.Generator().manual_seed(0))
    scores[:, 7] = -torch.inf
    ids = torch.zeros(12, 9, dtype=torch.long)
    whole = KeyedGumbel(keys, 4)(ids, scores)
    assert torch.isinf(whole[:, 7]).all() and torch.isfinite(whole).sum() == 12 * 89
    for rows in (slice(0, 1), slice(5, 12)):
        assert torch.equal(KeyedGumbel(keys[rows], 4)(ids[rows], scores[rows]), whole[rows])
    wider = KeyedGumbel(keys, 40)(
        torch.zeros(12, 45, dtype=torch.long), scores
    )  # the same position behind more padding
    assert torch.equal(wider, whole)
    assert torch.equal(KeyedGumbel(keys, 4)(ids, scores[:, :50]), whole[:, :50])
    monkeypatch.setitem(noise._BLOCK, "cpu", 200)
    assert torch.equal(KeyedGumbel(keys, 4)(ids, scores), whole)
    assert not torch.equal(KeyedGumbel(keys, 3)(ids, scores), whole)
