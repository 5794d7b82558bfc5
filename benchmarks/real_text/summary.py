"""The numbers of the real-text study: KL matched between checkpoints, intervals over prompts and over seeds.

A measure is interpolated in sqrt(KL) between the checkpoints of one training by `gold.summary.at_kl`, prompt by prompt; a
training that never reaches the KL counts at its end, and `reached` says so. Two intervals stand beside every mean:
`prompts`, the bootstrap over the prompts of all seeds together (each seed has prompts of its own), for these trainings;
`seeds`, Student's t over the seeds' means, for trainings, biased pairs and prompts drawn anew. Neither holds the chance
in the judges, which are trained once. Where checkpoints come from is in `real_text/run.py`, the tables in `real_text/tables.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.gold.summary import at_kl, t_interval
from prmd.objectives import OBJECTIVES
from prmd.statistics.intervals import Estimate, minimum_band
from prmd.statistics.resampling import Resampling

Row = dict[str, Any]
Checkpoints = Sequence[Mapping[str, Any]]
BASELINE = "dpo"
RESAMPLING = Resampling(10_000, 0)
MEASURES = (*(f"win_rate/{k}" for k in OBJECTIVES), "mean_of_min", "length")
JOINT = 1 - 0.05 / len(OBJECTIVES)
"""Confidence of each objective's interval where all of them have to hold together."""


def checkpoint_row(metrics: dict[str, Any]) -> Row:
    """What is kept of one checkpoint: means in the form of the gold-reward study, and values of each prompt.

    Args:
        metrics: of `evaluation.held_out.measure`.
    """
    scores = metrics["per_prompt"]
    per_prompt = {f"win_rate/{k}": scores["win_rate"][k] for k in OBJECTIVES}
    return {
        "kl": metrics["kl"]["per_response"]["value"],
        "win_rate": {k: metrics["objectives"][k]["win_rate"]["value"] for k in OBJECTIVES},
        "mean_of_min": metrics["mean_of_min"]["value"],
        "length": metrics["length"]["value"],
        "per_prompt": per_prompt | {name: scores[name] for name in ("mean_of_min", "length")},
    }


def matched(checkpoints: Checkpoints, kl: float) -> tuple[dict[str, Any], bool]:
    """Measures of one training at a KL, those of every prompt (`per_prompt/<measure>`, arrays) among them.

    Args:
        checkpoints: rows of `checkpoint_row` in the order of training, the first of them pi_ref.
        kl: nats per response.

    Returns:
        The measures, and whether the training reached the KL.
    """
    rows = []
    for row in checkpoints:
        values = {name: np.asarray(found, dtype=np.float64) for name, found in row["per_prompt"].items()}
        rows.append({**row, "per_prompt": values})
    return at_kl(rows, kl)


def estimate(by_seed: Sequence[np.ndarray]) -> Row:
    """Mean with both intervals.

    Args:
        by_seed: values of each seed's prompts, [X] each.

    Returns:
        value, prompts [low, high], seeds [low, high] (None with one seed), by_seed (means).
    """
    prompts, seeds = _both(by_seed, 0.95)
    return _row(prompts, seeds, [float(values.mean()) for values in by_seed])


def _both(by_seed: Sequence[np.ndarray], confidence: float) -> tuple[Estimate, Estimate]:
    pooled = np.concatenate(by_seed)
    share = bool((pooled >= 0).all() and (pooled <= 1).all())
    over_prompts = (RESAMPLING.win_rate if share else RESAMPLING.mean)(pooled, confidence)
    return over_prompts, t_interval([float(values.mean()) for values in by_seed], confidence)


def _row(prompts: Estimate, seeds: Estimate, means: Sequence[float]) -> Row:
    ends = [seeds.low, seeds.high] if len(means) > 1 else None
    return {
        "value": prompts.value,
        "prompts": [prompts.low, prompts.high],
        "seeds": ends,
        "by_seed": list(means),
    }


def summary_row(method: str, runs: Mapping[int, Checkpoints], kl: float) -> Row:
    """One method over its seeds at the matched KL.

    Returns:
        method, seeds, kl and reached (by seed), win_rate by objective, worst_win_rate (the smallest of the mean win rates, in
        a band of joint intervals), mean_of_min (reference standard deviations), length (tokens), and at_end: KL, win rates
        and length by seed where the trainings end.
    """
    found = [matched(run, kl) for run in runs.values()]
    scores = {name: [m[f"per_prompt/{name}"] for m, _ in found] for name in MEASURES}
    joint = [_both(scores[f"win_rate/{k}"], JOINT) for k in OBJECTIVES]
    worst = [minimum_band([both[i] for both in joint]) for i in (0, 1)]
    ends = [run[-1] for run in runs.values()]
    return {
        "method": method,
        "seeds": list(runs),
        "kl": [m["kl"] for m, _ in found],
        "reached": [reached for _, reached in found],
        "win_rate": {k: estimate(scores[f"win_rate/{k}"]) for k in OBJECTIVES},
        "worst_win_rate": _row(*worst, [m["worst_per_world"] for m, _ in found]),
        "mean_of_min": estimate(scores["mean_of_min"]),
        "length": estimate(scores["length"]),
        "at_end": {name: [row[name] for row in ends] for name in ("kl", "win_rate", "mean_of_min", "length")},
    }


def paired_rows(runs: Mapping[str, Mapping[int, Checkpoints]], kl: float) -> list[Row]:
    """Every method less `dpo` on the same prompts of the seeds both have, at the matched KL."""
    rows = []
    for method, ours in runs.items():
        seeds = [seed for seed in ours if seed in runs[BASELINE]]
        if method == BASELINE or not seeds:
            continue
        pairs = [(matched(ours[seed], kl)[0], matched(runs[BASELINE][seed], kl)[0]) for seed in seeds]
        for name in MEASURES:
            differences = [a[f"per_prompt/{name}"] - b[f"per_prompt/{name}"] for a, b in pairs]
            names = {"method": method, "against": BASELINE, "measure": name, "seeds_compared": seeds}
            rows.append(names | estimate(differences))
    return rows


def study_results(
    seeds: Sequence[Mapping[str, Any]], judges: Sequence[Row], kl: float, setup: Mapping[str, Any]
) -> Row:
    """The contents of `real_text.json`.

    Args:
        seeds: of `real_text.run.run_seed`.
        judges: a row for each.
        kl: matched KL, nats per response.
        setup: how it was run.
    """
    runs: dict[str, dict[int, Checkpoints]] = {}
    for found in seeds:
        for method, checkpoints in found["methods"].items():
            runs.setdefault(method, {})[found["seed"]] = checkpoints
    starts = [run[0]["per_prompt"] for run in runs[BASELINE].values()]
    return {
        "summary": [summary_row(method, by_seed, kl) for method, by_seed in runs.items()],
        "paired": paired_rows(runs, kl),
        "reference": {
            name: estimate([np.asarray(start[name]) for start in starts])
            for name in ("mean_of_min", "length")
        },
        "judges": list(judges),
        "reward_models": [
            {"seed": s["seed"], **row, "longer_is_chosen": s["longer_is_chosen"][row["objective"]]}
            for s in seeds
            for row in s["reward_models"]
        ],
        "checkpoints": {
            method: {str(seed): [_without_prompts(row) for row in run] for seed, run in by_seed.items()}
            for method, by_seed in runs.items()
        },
        "setup": {"matched_kl": kl, **setup},
    }


def _without_prompts(row: Mapping[str, Any]) -> Row:
    return {name: value for name, value in row.items() if name != "per_prompt"}
