"""The closed-form part of the real-text study over seeds and prompts, and its tables.

Seeds and prompts are crossed: every seed judges the same prompts. Intervals are a bootstrap that draws both anew, the pairs
of one (seed, prompt) staying together, so that a difference of two policies is paired in both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.gold.page import markdown
from benchmarks.real_text.closed_form import JUDGES, ClosedFormSizes, share_name
from prmd.objectives import OBJECTIVES
from prmd.statistics.intervals import wilson_interval

Row = dict[str, Any]
Table = Mapping[str, np.ndarray]
"""By measure, one policy's values by one judge: wins [S, K, X], least [S, X], length [S, X]."""
RESAMPLES = 1000
AGAINST = ("none", "dpo")


def closed_form_rows(seeds: Sequence[Mapping[str, np.ndarray]]) -> list[Row]:
    """One row for each (share, family, method, KL, judge).

    Args:
        seeds: tensors of the files of `closed_form.run_seed`.

    Returns:
        worst_win_rate (smallest over objectives of the mean over seeds and prompts), win_rate by objective, mean_of_min,
        length, each with `_ci`, and worst_less_dpo, min_less_dpo with theirs, None for dpo itself.
    """
    names = dict.fromkeys(name.rsplit("/", 1)[0] for name in seeds[0])
    tables = {name: _table(seeds, name) for name in names}
    draws = _draws(len(seeds), next(iter(tables.values()))["least"].shape[1])
    rows = []
    for name, table in tables.items():
        share, family, method, kl, judge = name.split("/")
        dpo = tables["/".join((share, *AGAINST, kl, judge))]
        head = {"share": share, "family": family, "method": method, "kl": float(kl), "judge": judge}
        rows.append(head | _row(table, None if (family, method) == AGAINST else dpo, draws))
    return rows


def _table(seeds: Sequence[Mapping[str, np.ndarray]], name: str) -> Table:
    return {
        m: np.stack([np.asarray(seed[f"{name}/{m}"]) for seed in seeds]) for m in ("wins", "least", "length")
    }


def _draws(seeds: int, prompts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Counts of each seed [S] and prompt [X] in every resample; the first is the data themselves."""
    rng = np.random.default_rng(23)
    drawn = [
        (
            rng.multinomial(seeds, np.full(seeds, 1 / seeds)),
            rng.multinomial(prompts, np.full(prompts, 1 / prompts)),
        )
        for _ in range(RESAMPLES)
    ]
    return [(np.ones(seeds), np.ones(prompts)), *drawn]


def _weighted(values: np.ndarray, draws: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Means over seeds (first axis) and prompts (last) in every resample: [R, ...]."""
    seeds = np.stack([s / s.sum() for s, _ in draws])
    prompts = np.stack([p / p.sum() for _, p in draws])
    return np.einsum("rs,s...x,rx->r...", seeds, values, prompts)


def _row(table: Table, dpo: Table | None, draws: Sequence[tuple[np.ndarray, np.ndarray]]) -> Row:
    wins, least = _weighted(table["wins"], draws), _weighted(table["least"], draws)
    row = _named("worst_win_rate", wins.min(axis=1)) | _named("mean_of_min", least)
    row |= _named("length", _weighted(table["length"], draws))
    row["win_rate"] = {k: float(v) for k, v in zip(OBJECTIVES, wins[0], strict=True)}
    if dpo is None:
        return row | dict.fromkeys(("worst_less_dpo", "worst_less_dpo_ci", "min_less_dpo", "min_less_dpo_ci"))
    worst = wins.min(axis=1) - _weighted(dpo["wins"], draws).min(axis=1)
    return (
        row | _named("worst_less_dpo", worst) | _named("min_less_dpo", least - _weighted(dpo["least"], draws))
    )


def _named(name: str, values: np.ndarray) -> Row:
    """The value of the data, first of `values`, with the middle 95 % of the resamples."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {name: float(values[0]), f"{name}_ci": [float(low), float(high)]}


def association_rows(shares: Mapping[str, tuple[int, int]]) -> list[Row]:
    """How often the longer response is the chosen one, by source.

    Args:
        shares: of each source, pairs with the longer one chosen, and pairs of unequal length.
    """
    rows = []
    for source, (longer, count) in shares.items():
        found = wilson_interval(longer, count)
        rows.append({"source": source, "n": count, "share": longer / count, "ci": [found.low, found.high]})
    return rows


# ------------------------------------------------------------------ tables
def closed_form_page(
    rows: Sequence[Row], natural: Sequence[Row], sources: Sequence[Row], sizes: ClosedFormSizes
) -> str:
    """Markdown: policies by both judges at each share and KL, natural labels, sources."""
    parts = ["## Closed form, on frozen features"]
    for share in map(share_name, sizes.shares):
        for kl in sizes.kls:
            own = [row for row in rows if row["share"] == share and row["kl"] == kl]
            parts += [f"### Longer chosen: {share}, {kl:g} nats", _policies(own)]
    parts += [
        "### Natural labels: accuracy out of fold, without and with debiasing for length",
        _natural(natural),
    ]
    parts += ["### How often the longer response is the chosen one", _sources(sources)]
    return "\n\n".join(parts) + "\n"


def _policies(rows: Sequence[Row]) -> str:
    head = ["family", "method"]
    head += [
        f"{what}, {judge}" for judge in JUDGES for what in ("worst objective", "less DPO", "E min less DPO")
    ]
    by_policy: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_policy.setdefault((row["family"], row["method"]), {})[row["judge"]] = row
    cells = []
    for (family, method), judged in by_policy.items():
        line = [family, method]
        for judge in JUDGES:
            row = judged[judge]
            line += [
                _shown(row, "worst_win_rate"),
                _shown(row, "worst_less_dpo"),
                _shown(row, "min_less_dpo"),
            ]
        cells.append([*line, f"{judged[JUDGES[0]]['length']:.1f}"])
    return markdown((*head, "tokens"), cells)


def _shown(row: Row, name: str) -> str:
    if row[name] is None:
        return "–"
    low, high = row[f"{name}_ci"]
    sign = "" if name == "worst_win_rate" else "+"
    return f"{row[name]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _natural(rows: Sequence[Row]) -> str:
    head = (
        "objective",
        "pairs",
        "longer chosen",
        "accuracy",
        "debiased",
        "length-balanced",
        "debiased",
        "difference",
    )
    cells = [
        [
            *(row["objective"], str(row["n"]), f"{row['longer_share']:.3f}"),
            *(f"{value:.3f}" for value in (*row["accuracy"], *row["balanced_accuracy"])),
            _shown(row, "difference"),
        ]
        for row in rows
    ]
    return markdown(head, cells)


def _sources(rows: Sequence[Row]) -> str:
    cells = [
        [row["source"], str(row["n"]), f"{row['share']:.3f} [{row['ci'][0]:.3f}, {row['ci'][1]:.3f}]"]
        for row in rows
    ]
    return markdown(("source", "pairs of unequal length", "longer chosen"), cells)
