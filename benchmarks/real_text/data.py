"""A length-biased choice of training pairs, as prepared data of its own.

    P(the longer response is the chosen one) = rho

The bias is made as in arXiv:2405.19316, by choosing which labelled pairs are in the training set: no label is changed.
Validation, test and judge pairs are those of the unbiased data, file by file. Length is counted in characters, as a
rater sees it. Preparing the unbiased data is stage 1 (`data.prepare`).
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from prmd.artifacts import io
from prmd.artifacts.runs import (
    finish_run,
    is_current,
    partial_directory,
    publish,
    require_artifact,
    start_run,
)
from prmd.config.shared import RewardModelConfig
from prmd.errors import DataError
from prmd.objectives import OBJECTIVES, SPLITS
from prmd.pairs import BENCHMARK_QUESTIONS_FILE, PREPARE_COMMAND, PreferencePair, hash_share, read_pairs

logger = logging.getLogger("prmd.real_text")
TRAIN = "train"


def longer_is_chosen(pair: PreferencePair) -> bool | None:
    """Whether the chosen response is the longer one; None where both are equally long."""
    difference = len(pair.chosen) - len(pair.rejected)
    return None if difference == 0 else difference > 0


def longer_share(pairs: Sequence[PreferencePair]) -> float | None:
    """Share of pairs of unequal length whose longer response is the chosen one; None without any."""
    told = [longer for pair in pairs if (longer := longer_is_chosen(pair)) is not None]
    return sum(told) / len(told) if told else None


def biased_subsample(
    pairs: Sequence[PreferencePair], *, share: float, count: int, seed: int
) -> list[PreferencePair]:
    """Choose pairs so that of exactly round(share x count) the longer response is the chosen one, of the rest the shorter.

    Args:
        pairs: labelled pairs of one objective.
        share: rho in [0, 1].
        count: pairs wanted.
        seed: of the choice, which depends on nothing else.

    Returns:
        `count` of the given pairs, unchanged and in their order; pairs of equal length are left out.

    Raises:
        DataError: too few pairs prefer the longer, or the shorter, response.

    Source: the biased data sets of arXiv:2405.19316.
    """
    wanted = {True: round(share * count)}
    wanted[False] = count - wanted[True]
    kept: set[str] = set()
    for longer, number in wanted.items():
        found = [pair for pair in pairs if longer_is_chosen(pair) is longer]
        if len(found) < number:
            raise DataError(
                f"{len(found)} of {len(pairs)} pairs prefer the {'longer' if longer else 'shorter'} response, {number} "
                f"wanted for a share of {share:g} in {count}; give more data or fewer pairs"
            )
        found.sort(key=lambda pair: hash_share(f"length bias {seed}", pair.id))
        kept |= {pair.id for pair in found[:number]}
    return [pair for pair in pairs if pair.id in kept]


def prepare_biased(source: RewardModelConfig, target: RewardModelConfig, *, share: float, count: int) -> Path:
    """Write the prepared data of `target`: biased train pairs of `source`, its other splits copied as they are.

    Args:
        source: configuration whose prepared data are unbiased.
        target: configuration with an artifact root and a seed of its own.
        share: as in `biased_subsample`.
        count: training pairs per objective.

    Returns:
        `data/processed/<approach>` of `target`; reused where it is current.
    """
    given, made = source.paths, target.paths
    record = require_artifact(given.processed, what="the unbiased data", command=PREPARE_COMMAND)
    key = io.fingerprint([record["fingerprint"], share, count, target.seed])
    if is_current(made.processed, key):
        logger.info("%s is current; reused", made.processed)
        return made.processed
    clock, partial, shares = start_run(), partial_directory(made.processed, key, force=False), {}
    for objective in OBJECTIVES:
        pool = read_pairs(given, objective, TRAIN)
        kept = biased_subsample(pool, share=share, count=count, seed=target.seed)
        shares[objective] = {"before": longer_share(pool), "after": longer_share(kept), "pairs": len(kept)}
        io.write_jsonl(partial / objective / f"{TRAIN}.jsonl", (pair.to_row() for pair in kept))
        for split in SPLITS:
            if split != TRAIN:
                io.copy_file(given.split(objective, split), partial / objective / f"{split}.jsonl")
    io.copy_file(given.processed / BENCHMARK_QUESTIONS_FILE, partial / BENCHMARK_QUESTIONS_FILE)
    inputs = {"unbiased": record["fingerprint"]}
    extra = {"longer_is_chosen": shares}
    finish_run(partial, config=target, inputs=inputs, fingerprint=key, clock=clock, extra=extra)
    publish(partial, made.processed)
    return made.processed
