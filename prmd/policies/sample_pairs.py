"""Pairs of reference samples beside the labelled ones, and reference samples behind a pair for the gamma term.

The reward models score every sample, so a pair of samples needs no label: best against worst by R, and random ones. Which
prompts are paired, and where in the training they come, is drawn from the seed alone and is the same for every method;
which sample is the best is the method's own R. Sampling and scoring are in `scores`, to be read next.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prmd.errors import ConfigError
from prmd.models.tokenization import PrefixRow
from prmd.policies.pairs import PairScores, ReferenceSamples, ScaleResponses

GAMMA_SAMPLES = 2
"""Reference samples behind every pair for the gamma term; two, because a batch is read as pairs of responses."""


@dataclass(frozen=True)
class SamplePair:
    """Two samples of one prompt; `sides` None: best against worst by R."""

    prompt: int
    sides: tuple[int, int] | None


def added_pairs(labelled: int, share: float) -> int:
    """Pairs of samples that make up `share` of a training with this many labelled ones."""
    return round(labelled * share / (1 - share))


def draw_sample_pairs(
    samples: ReferenceSamples, count: int, *, max_length: int, seed: int
) -> list[SamplePair]:
    """Best-against-worst and random pairs in equal numbers, prompts in random order, repeated only when all had a turn.

    Args:
        max_length: prompts whose samples are longer, in tokens of prompt and response together, are left out.

    Raises:
        ConfigError: no prompt is left.
    """
    eligible = [i for i, row in enumerate(samples.rows) if row.longest <= max_length]
    if count and not eligible:
        raise ConfigError(
            f"pairs.reference_samples: the samples of all {len(samples.rows)} prompts are longer than "
            f"training.max_length={max_length} tokens; raise it or lower calibration.max_new_tokens"
        )
    n, drawn, rng = samples.logps.shape[1], [], random.Random(f"{seed}-sample-pairs")
    while len(drawn) < count:
        turn = [SamplePair(i, None) for i in eligible]
        turn += [SamplePair(i, tuple(rng.sample(range(n), 2))) for i in eligible]
        rng.shuffle(turn)
        drawn += turn
    return drawn[:count]


def merge_streams(labelled: Sequence[int], added: Sequence[int], seed: int) -> list[int]:
    """Both streams in their own order, mixed at random."""
    turns = [0] * len(labelled) + [1] * len(added)
    random.Random(f"{seed}-merge").shuffle(turns)
    streams = (iter(labelled), iter(added))
    return [next(streams[turn]) for turn in turns]


def sides_by_reward(drawn: Sequence[SamplePair], robust: Tensor) -> Tensor:
    """(chosen, rejected) sample of each pair, the one with the higher R chosen.

    Args:
        robust: R of the samples, [X, n].

    Returns:
        LongTensor [A, 2]; two different samples, however equal their R.
    """
    best, worst = robust.argmax(dim=1), robust.argmin(dim=1)
    worst = torch.where(best == worst, (worst + 1) % robust.shape[1], worst)  # all equal: any other one
    sides = []
    for pair in drawn:
        a, b = pair.sides or (int(best[pair.prompt]), int(worst[pair.prompt]))
        sides.append((a, b) if robust[pair.prompt, a] >= robust[pair.prompt, b] else (b, a))
    return torch.tensor(sides, dtype=torch.long).reshape(-1, 2)


def with_sample_pairs(
    rows: Sequence[PrefixRow],
    scores: PairScores,
    *,
    drawn: Sequence[SamplePair],
    sides: Tensor,
    samples: ReferenceSamples,
    scale: ScaleResponses,
) -> tuple[list[PrefixRow], PairScores]:
    """Rows and scores of the labelled pairs with those of the drawn ones behind.

    Args:
        sides: from `sides_by_reward`.
        scale: rewards of the samples.
    """
    prompts = torch.tensor([pair.prompt for pair in drawn], dtype=torch.long)[:, None]
    rewards = scale.by_prompt()[:, :, prompts, sides]
    added = [
        PrefixRow(samples.rows[p].prompt_ids, tuple(samples.rows[p].responses[j] for j in pair))
        for p, pair in zip(prompts[:, 0].tolist(), sides.tolist(), strict=True)
    ]
    together = torch.cat([scores.rewards, rewards], dim=2)
    logps = torch.cat([scores.ref_logps, samples.logps[prompts, sides]])
    return [*rows, *added], PairScores(together, logps)


def with_gamma_samples(
    rows: Sequence[PrefixRow], prompts: Sequence[int], samples: ReferenceSamples
) -> list[PrefixRow]:
    """Every row with the first `GAMMA_SAMPLES` samples of its prompt behind its own responses.

    Args:
        prompts: index into `samples` of each row.
    """
    return [_extended(row, samples.rows[i]) for row, i in zip(rows, prompts, strict=True)]


def _extended(row: PrefixRow, sampled: PrefixRow) -> PrefixRow:
    """A sampled row's prompt may be longer: where the template merges tokens, a pair's shared prefix ends earlier."""
    shared = len(row.prompt_ids)
    if sampled.prompt_ids[:shared] != row.prompt_ids:
        raise ValueError("a reference sample belongs to another prompt than its pair")
    rest = sampled.prompt_ids[shared:]
    responses = tuple((*rest, *response) for response in sampled.responses[:GAMMA_SAMPLES])
    return PrefixRow(row.prompt_ids, (*row.responses, *responses))
