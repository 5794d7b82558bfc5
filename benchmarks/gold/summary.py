"""The numbers of the gold-reward study: KL matched between checkpoints, rows with intervals over seeds, paired differences.

A measure is interpolated linearly in sqrt(KL) between the checkpoints of ONE training, at the first crossing of the
matched KL; policies start at KL 0 with a win rate of one half. A run that never gets there counts at its last checkpoint,
its own KL is what the row shows, and `reached` says how many got there. Intervals are Student's t over seeds, each seed a
world of its own (reference, prompts, labels); the interval of a minimum over objectives is `statistics.intervals.minimum_band`.
Two worst objectives: `worst_win_rate` is the smallest of the mean win rates; `worst_per_world`, the mean of every world's own
smallest win rate, is a number of each world and so what can be paired. Which units there are is in `gold/plan.py`; figures of these numbers are in `benchmarks.gold.figures`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from prmd.objectives import OBJECTIVES
from prmd.statistics.intervals import Estimate, minimum_band
from prmd.statistics.paired_tests import holm

Checkpoints = Sequence[Mapping[str, Any]]
Row = dict[str, Any]
Compared = tuple[str, str]
"""method and family"""
Key = tuple[str, str, float]
"""method, family, bias"""
DPO, TODAY, OURS = ("dpo", "none"), ("hard_min", "bootstrap"), ("hard_min", "strengths")
"""What is declared to be compared: OURS with both others."""
DECLARED = ("worst_per_world", "mean_of_min")
"""Measures whose tests are declared."""
_REWARD_MODEL = ("objective", "bias", "length_cost", "family")
PAIRED = (*DECLARED, "length")
"""Measures whose differences within worlds are shown."""


def at_kl(checkpoints: Checkpoints, kl: float) -> tuple[dict[str, float], bool]:
    """Measures of one training at a KL, and whether it got there.

    Args:
        checkpoints: rows in the order of training, the first of them pi_ref at KL 0.
        kl: nats.

    Returns:
        Measures by name (`win_rate/helpful`, ...), `inference.kl` among them; those of the last row where `inference.kl` is out of reach.
    """
    rows = [_flat(row) for row in checkpoints]
    for before, after in itertools.pairwise(rows):
        if before["kl"] <= kl <= after["kl"] and before["kl"] < after["kl"]:
            left, right = (math.sqrt(max(row["kl"], 0.0)) for row in (before, after))
            share = (math.sqrt(kl) - left) / (right - left)
            mixed = {name: (1 - share) * before[name] + share * after[name] for name in before}
            return _with_derived(mixed | {"kl": kl}), True
    return _with_derived(rows[-1]), False


def _flat(row: Mapping[str, Any]) -> dict[str, float]:
    """One level of names."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        flat |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _with_derived(row: dict[str, float]) -> dict[str, float]:
    """With the measures that follow from the win rates of one training at one KL."""
    wins = [row[f"win_rate/{objective}"] for objective in OBJECTIVES]
    return row | {"worst_per_world": min(wins), "imbalance": max(wins) - min(wins)}


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean over seeds with Student's t interval; that value alone for one seed."""
    array = np.asarray(values, dtype=np.float64)
    mean, n = float(array.mean()), len(array)
    if n == 1:
        return Estimate(mean, mean, mean, 1, "single seed, no interval")
    half = stats.t.ppf(0.5 + confidence / 2, n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half, n, f"Student t over seeds {confidence:.4g}")


def _ends(estimate: Estimate) -> list[float]:
    return [estimate.low, estimate.high]


def summary_row(key: Key, runs: Sequence[Checkpoints], kl: float) -> Row:
    """One (method, family, bias) over seeds at the matched KL.

    Returns:
        method, family, bias, kl, worst_win_rate (the smallest of the mean win rates) with ci, worst_per_world (the mean of
        every world's smallest) with worst_per_world_ci, win_rate by objective with win_rate_ci, mean_of_min with
        mean_of_min_ci, mean_reward by objective, imbalance (largest less smallest win rate), length, reached, seeds.
    """
    method, family, bias = key
    found = [at_kl(run, kl) for run in runs]
    measures = [measure for measure, _ in found]

    def over_seeds(name: str, confidence: float = 0.95) -> Estimate:
        return t_interval([measure[name] for measure in measures], confidence)

    joint = 1 - 0.05 / len(OBJECTIVES)
    wins = {k: over_seeds(f"win_rate/{k}") for k in OBJECTIVES}
    worst = minimum_band([over_seeds(f"win_rate/{k}", joint) for k in OBJECTIVES])
    minimum, imbalance = over_seeds("mean_of_min"), over_seeds("imbalance")
    own_worst = over_seeds("worst_per_world")
    return {
        "method": method,
        "family": family,
        "bias": bias,
        "kl": over_seeds("kl").value,
        "worst_win_rate": worst.value,
        "ci": _ends(worst),
        "worst_per_world": own_worst.value,
        "worst_per_world_ci": _ends(own_worst),
        "win_rate": {k: estimate.value for k, estimate in wins.items()},
        "win_rate_ci": {k: _ends(estimate) for k, estimate in wins.items()},
        "mean_of_min": minimum.value,
        "mean_of_min_ci": _ends(minimum),
        "mean_reward": {k: over_seeds(f"mean_reward/{k}").value for k in OBJECTIVES},
        "imbalance": imbalance.value,
        "imbalance_ci": _ends(imbalance),
        "length": over_seeds("length").value,
        "reached": sum(reached for _, reached in found),
        "seeds": len(runs),
    }


def ablation_row(
    label: str, runs: Sequence[Checkpoints], shipped: Sequence[Checkpoints], row: Row, kl: float
) -> Row:
    """A `summary_row` with the varied value in words, where its trainings end, and less the shipped value.

    Args:
        runs: checkpoints of all seeds.
        shipped: those of the same method with the shipped settings; `runs` itself where nothing was changed.
        row: the `summary_row` of `runs`.
    """
    last = [_flat(run[-1]) for run in runs]
    end = {name: float(np.mean([row[name] for row in last])) for name in ("kl", "mean_of_min")}
    end["worst_win_rate"] = min(float(np.mean([row[f"win_rate/{k}"] for row in last])) for k in OBJECTIVES)
    less = {} if runs == shipped else differences(runs, shipped, kl)
    return {"label": label, **row, "at_end": end, "against_shipped": {m: _less(d) for m, d in less.items()}}


def differences(
    ours: Sequence[Checkpoints], theirs: Sequence[Checkpoints], kl: float
) -> dict[str, np.ndarray]:
    """Differences of `PAIRED` measures of each world; where one training ends before `kl`, at its last KL in both."""
    pairs = [_at_common_kl(a, b, kl) for a, b in zip(ours, theirs, strict=True)]
    return {measure: np.array([a[measure] - b[measure] for a, b in pairs]) for measure in PAIRED}


def _at_common_kl(a: Checkpoints, b: Checkpoints, kl: float) -> tuple[dict[str, float], dict[str, float]]:
    common = min(at_kl(run, kl)[0]["kl"] for run in (a, b))
    return at_kl(a, common)[0], at_kl(b, common)[0]


def _less(values: np.ndarray) -> Row:
    found = t_interval(values.tolist())
    return {"difference": found.value, "ci": _ends(found)}


def _p_value(values: np.ndarray) -> float:
    """Two-sided p of Student's paired t test; 1 for a single world, which tells nothing."""
    if len(values) == 1 or not values.any():
        return 1.0
    if np.ptp(values) == 0:
        return 0.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def paired_rows(runs: Mapping[Key, Sequence[Checkpoints]], kl: float) -> list[Row]:
    """Every method less DPO, and the family less today's heads, on the same seeds and labels at the matched KL.

    The declared tests, of `DECLARED` measures of hard_min on the family against both, are Holm-corrected together.

    Args:
        runs: checkpoints of all seeds by (method, family, bias), the seeds in the same order.

    Returns:
        method, family, against, bias, measure, difference with ci, seeds; p and p_holm of what is declared, else None.
    """
    rows = []
    for (method, family, bias), ours in runs.items():
        own = (method, family)
        for against in (DPO, TODAY) if own == OURS else (DPO,) if own != DPO else ():
            for measure, values in differences(ours, runs[*against, bias], kl).items():
                names = {"method": method, "family": family, "against": "/".join(against), "bias": bias}
                p = _p_value(values) if own == OURS and measure in DECLARED else None
                rows.append({**names, "measure": measure, **_less(values), "p": p, "seeds": len(ours)})
    declared = [row for row in rows if row["p"] is not None]
    corrected = holm([row["p"] for row in declared]).tolist()
    return [row | {"p_holm": None if row["p"] is None else corrected.pop(0)} for row in rows]


def fall_rows(runs: Mapping[Key, Sequence[Checkpoints]], kl: float) -> list[Row]:
    """How much every method loses from the smallest to the largest bias, and how much more than DPO, within worlds.

    Returns:
        One row per method, family and measure: fall with fall_ci (positive: it loses), more_than_dpo with
        more_than_dpo_ci (None for dpo itself); empty where there is one bias.
    """
    biases = sorted({bias for *_, bias in runs})
    if len(biases) == 1:
        return []

    def falls(own: Compared, measure: str) -> np.ndarray:
        low, high = (
            np.array([at_kl(run, kl)[0][measure] for run in runs[*own, bias]])
            for bias in (biases[0], biases[-1])
        )
        return low - high

    rows = []
    for own in dict.fromkeys((method, family) for method, family, _ in runs):
        for measure in DECLARED:
            values = falls(own, measure)
            fall, more = t_interval(values), t_interval(values - falls(DPO, measure))
            row = {
                "method": own[0],
                "family": own[1],
                "measure": measure,
                "from": biases[0],
                "to": biases[-1],
            }
            row |= {"fall": fall.value, "fall_ci": _ends(fall), "seeds": len(values)}
            row |= {"more_than_dpo": None if own == DPO else more.value}
            rows.append(row | {"more_than_dpo_ci": None if own == DPO else _ends(more)})
    return rows


def harm_rows(runs: Mapping[Compared, Sequence[Checkpoints]], bias: float, kl: float) -> list[Row]:
    """A `summary_row` of each method where length is truly good, with `less_dpo`, its differences from DPO within worlds."""
    rows = []
    for own, found in runs.items():
        less = {m: _less(v) for m, v in differences(found, runs[DPO], kl).items()} if own != DPO else {}
        rows.append({**summary_row((*own, bias), found, kl), "less_dpo": less})
    return rows


def curve_points(runs: Sequence[Checkpoints]) -> list[Row]:
    """Means over seeds at each checkpoint of what is true and what the method's own reward models think, over sqrt(KL).

    Returns:
        One row per checkpoint: step, kl, distance (sqrt KL); gains over the reference in its standard deviations, each with
        its `_ci`: gold (mean over objectives), gold_min (E min_k), proxy (mean over objectives and members), proxy_robust
        (of the method's R).
    """
    points = []
    for index, first in enumerate(runs[0]):
        rows = [_flat(run[index]) for run in runs]
        starts = [run[0]["mean_of_min"] for run in runs]
        gains = {
            "gold": [float(np.mean([row[f"mean_reward/{k}"] for k in OBJECTIVES])) for row in rows],
            "gold_min": [row["mean_of_min"] - start for row, start in zip(rows, starts, strict=True)],
            "proxy": [row["proxy"] for row in rows],
            "proxy_robust": [row["proxy_robust"] for row in rows],
        }
        kl = float(np.mean([row["kl"] for row in rows]))
        point = {"step": first["step"], "kl": kl, "distance": math.sqrt(max(kl, 0.0))}
        for name, values in gains.items():
            found = t_interval(values)
            point |= {name: found.value, f"{name}_ci": _ends(found)}
        points.append(point)
    return points


def reward_model_rows(metrics: Sequence[Mapping[str, Any]]) -> list[Row]:
    """How good the reward models are: means over seeds of `gold.ensembles.measure`.

    Args:
        metrics: of each one, with what `_REWARD_MODEL` names.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in metrics:
        groups.setdefault(tuple(entry[name] for name in _REWARD_MODEL), []).append(entry)
    rows = []
    for key, entries in sorted(groups.items(), key=lambda g: (OBJECTIVES.index(g[0][0]), *g[0][1:])):
        names = [name for name in entries[0] if name not in (*_REWARD_MODEL, "seed")]
        means = {name: float(np.mean([entry[name] for entry in entries])) for name in names}
        rows.append({**dict(zip(_REWARD_MODEL, key, strict=True)), **means, "seeds": len(entries)})
    return rows
