"""The numbers of the gold-reward study: KL matched between checkpoints, rows with intervals over seeds, paired differences.

A measure is interpolated linearly in sqrt(KL) between the checkpoints of ONE training, at the first crossing of the
matched KL; policies start at KL 0 with a win rate of one half. A run that never gets there counts at its last checkpoint,
its own KL is what the row shows, and `reached` says how many got there. Intervals are Student's t over seeds, each seed a
world of its own (reference, prompts, labels); the interval of a minimum over objectives is `intervals.minimum_band`.
Which units there are is in `gold_plan`; figures of these numbers are in `prmd.plotting_study`.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from prmd.intervals import Estimate, minimum_band
from prmd.objectives import OBJECTIVES

Checkpoints = Sequence[Mapping[str, Any]]
Row = dict[str, Any]


def at_kl(checkpoints: Checkpoints, kl: float) -> tuple[dict[str, float], bool]:
    """Measures of one training at a KL, and whether it got there.

    Args:
        checkpoints: rows in the order of training, the first of them pi_ref at KL 0.
        kl: nats.

    Returns:
        Measures by name (`win_rate/helpful`, ...), `kl` among them; those of the last row where `kl` is out of reach.
    """
    rows = [_flat(row) for row in checkpoints]
    for before, after in itertools.pairwise(rows):
        if before["kl"] <= kl <= after["kl"] and before["kl"] < after["kl"]:
            left, right = (math.sqrt(max(row["kl"], 0.0)) for row in (before, after))
            share = (math.sqrt(kl) - left) / (right - left)
            mixed = {name: (1 - share) * before[name] + share * after[name] for name in before}
            return mixed | {"kl": kl}, True
    return rows[-1], False


def _flat(row: Mapping[str, Any]) -> dict[str, float]:
    """One level of names, with the derived measures of a policy."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        flat |= {f"{name}/{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    wins = [flat[f"win_rate/{objective}"] for objective in OBJECTIVES]
    return flat | {"worst_win_rate": min(wins), "imbalance": max(wins) - min(wins)}


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


def summary_row(method: str, bias: float, runs: Sequence[Checkpoints], kl: float) -> Row:
    """One (method, bias) over seeds at the matched KL.

    Returns:
        method, bias, kl, worst_win_rate (the smallest of the mean win rates) with ci, win_rate by objective with
        win_rate_ci, mean_of_min with mean_of_min_ci, mean_reward by objective, imbalance (largest less smallest win
        rate), length, reached, seeds.
    """
    found = [at_kl(run, kl) for run in runs]
    measures = [measure for measure, _ in found]

    def over_seeds(name: str, confidence: float = 0.95) -> Estimate:
        return t_interval([measure[name] for measure in measures], confidence)

    joint = 1 - 0.05 / len(OBJECTIVES)
    wins = {k: over_seeds(f"win_rate/{k}") for k in OBJECTIVES}
    worst = minimum_band([over_seeds(f"win_rate/{k}", joint) for k in OBJECTIVES])
    minimum, imbalance = over_seeds("mean_of_min"), over_seeds("imbalance")
    return {
        "method": method,
        "bias": bias,
        "kl": over_seeds("kl").value,
        "worst_win_rate": worst.value,
        "ci": _ends(worst),
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


def ablation_row(label: str, method: str, bias: float, runs: Sequence[Checkpoints], kl: float) -> Row:
    """A `summary_row` with the varied value in words, and beside it where its trainings end."""
    last = [_flat(run[-1]) for run in runs]
    end = {
        name: t_interval([row[name] for row in last]).value
        for name in ("kl", "worst_win_rate", "mean_of_min")
    }
    return {"label": label, **summary_row(method, bias, runs, kl), "at_end": end}


def paired_rows(runs: Mapping[tuple[str, float], Sequence[Checkpoints]], kl: float) -> list[Row]:
    """Every method less `dpo` on the same seeds and labels, at the matched KL, with t intervals over seeds.

    Args:
        runs: checkpoints of all seeds by (method, bias), the seeds in the same order.
    """
    rows = []
    for (method, bias), ours in runs.items():
        if method == "dpo":
            continue
        pairs = [(at_kl(a, kl)[0], at_kl(b, kl)[0]) for a, b in zip(ours, runs["dpo", bias], strict=True)]
        for measure in ("worst_win_rate", "mean_of_min", "length"):
            difference = t_interval([a[measure] - b[measure] for a, b in pairs])
            names = {"method": method, "against": "dpo", "bias": bias, "measure": measure}
            rows.append(names | {"difference": difference.value, "ci": _ends(difference), "seeds": len(ours)})
    return rows


def curve_points(runs: Sequence[Checkpoints]) -> list[Row]:
    """Means over seeds at each checkpoint: true and proxy gains over sqrt(KL).

    Returns:
        One row per checkpoint: step, kl, distance (sqrt KL), gold (mean over objectives of the true gain), gold_ci,
        gold_min (gain of E min_k), and where they were measured proxy, proxy_ci, proxy_robust; reference standard
        deviations.
    """
    points = []
    for index, first in enumerate(runs[0]):
        rows = [_flat(run[index]) for run in runs]
        gold = t_interval([np.mean([row[f"mean_reward/{k}"] for k in OBJECTIVES]) for row in rows])
        kl = float(np.mean([row["kl"] for row in rows]))
        point = {"step": first["step"], "kl": kl, "distance": math.sqrt(max(kl, 0.0))}
        point |= {"gold": gold.value, "gold_ci": _ends(gold)}
        starts = [run[0]["mean_of_min"] for run in runs]
        gains = [row["mean_of_min"] - start for row, start in zip(rows, starts, strict=True)]
        point["gold_min"] = float(np.mean(gains))
        if "proxy" in first:
            proxy = t_interval([row["proxy"] for row in rows])
            robust = float(np.mean([row["proxy_robust"] for row in rows]))
            point |= {"proxy": proxy.value, "proxy_ci": _ends(proxy), "proxy_robust": robust}
        points.append(point)
    return points


def reward_model_rows(metrics: Sequence[Mapping[str, Any]]) -> list[Row]:
    """How good the reward models are, by objective and bias: means over seeds of `gold_ensembles.measure`."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for entry in metrics:
        groups.setdefault((entry["objective"], entry["bias"]), []).append(entry)
    rows = []
    for (objective, bias), entries in sorted(
        groups.items(), key=lambda g: (OBJECTIVES.index(g[0][0]), g[0][1])
    ):
        names = [name for name in entries[0] if name not in ("objective", "bias", "seed")]
        means = {name: float(np.mean([entry[name] for entry in entries])) for name in names}
        rows.append({"objective": objective, "bias": bias, **means, "seeds": len(entries)})
    return rows
