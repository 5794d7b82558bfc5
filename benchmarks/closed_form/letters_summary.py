"""The closed-form study over seeds: every scenario and family, less DPO on the same labels, and the worst of the nine.

`worst_per_world` is each seed's own smallest win rate over objectives; the worst of the nine is each seed's smallest of that
over the scenarios about length. Intervals are Student's t over seeds (`gold/summary.py`). Markdown tables of the rows are here
too, as nothing else reads them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.closed_form.scenarios import ABOUT_LENGTH, SCENARIOS
from benchmarks.gold.page import markdown
from benchmarks.gold.summary import t_interval

Row = dict[str, Any]
Key = tuple[str, str, float]
"""family, method, KL"""
WORST_OF_NINE = "worst of nine"
_MEASURES = {"worst_win_rate": "worst_per_world", "mean_of_min": "mean_of_min", "length": "length"}


def closed_form_rows(seeds: Sequence[Sequence[Mapping[str, Any]]]) -> list[Row]:
    """One row for each (scenario, family, method, KL) over seeds.

    Args:
        seeds: contents of the files of `letters.run_closed_form`.

    Returns:
        scenario, family, method, kl, seeds; worst_per_world, mean_of_min and length, each with its `_ci`; and
        worst_less_dpo, min_less_dpo with theirs, within seeds, None for dpo itself. Behind the scenarios, rows of
        `WORST_OF_NINE`, which have worst_per_world and worst_less_dpo alone.
    """
    tables = [{_place(row): row for row in rows} for rows in seeds]
    keys = list(dict.fromkeys(place for table in tables for place in table))
    found = [
        _row(place, [table[place] for table in tables], [table[_dpo(place)] for table in tables])
        for place in keys
    ]
    families = dict.fromkeys((family, method, kl) for _, family, method, kl in keys)
    return [*found, *(_worst_row(key, tables) for key in families)]


def _place(row: Mapping[str, Any]) -> tuple[str, str, str, float]:
    return row["scenario"], row["family"], row["method"], row["kl"]


def _dpo(place: tuple[str, str, str, float]) -> tuple[str, str, str, float]:
    return place[0], "none", "dpo", place[3]


def _row(
    place: tuple[str, str, str, float], ours: Sequence[Mapping[str, Any]], dpo: Sequence[Mapping[str, Any]]
) -> Row:
    scenario, family, method, kl = place
    row: Row = {"scenario": scenario, "family": family, "method": method, "kl": kl, "seeds": len(ours)}
    for name, shown in _MEASURES.items():
        row |= _interval(shown, [one[name] for one in ours])
    for name, shown in (("worst_win_rate", "worst_less_dpo"), ("mean_of_min", "min_less_dpo")):
        less = [one[name] - other[name] for one, other in zip(ours, dpo, strict=True)]
        row |= {shown: None, f"{shown}_ci": None} if method == "dpo" else _interval(shown, less)
    return row


def _worst_row(key: Key, tables: Sequence[Mapping[Any, Mapping[str, Any]]]) -> Row:
    family, method, kl = key

    def worst(family: str, method: str) -> list[float]:
        return [min(t[name, family, method, kl]["worst_win_rate"] for name in ABOUT_LENGTH) for t in tables]

    ours, dpo = worst(family, method), worst("none", "dpo")
    row: Row = {"scenario": WORST_OF_NINE, "family": family, "method": method, "kl": kl, "seeds": len(ours)}
    less = [a - b for a, b in zip(ours, dpo, strict=True)]
    shown = {"worst_less_dpo": None, "worst_less_dpo_ci": None}
    return (
        row
        | _interval("worst_per_world", ours)
        | (shown if method == "dpo" else _interval("worst_less_dpo", less))
    )


def _interval(name: str, values: Sequence[float]) -> Row:
    found = t_interval(values)
    return {name: found.value, f"{name}_ci": [found.low, found.high]}


# ------------------------------------------------------------------ tables
def closed_form_page(rows: Sequence[Row], setup: Row, name: str) -> str:
    """Markdown: at each KL, scenarios by row and families by column, of every method beside DPO.

    Args:
        setup: `closed_form_setup` of the results.
        name: of the results' file, after which the figure is named.
    """
    parts = [
        "## Closed form",
        _about(setup),
        f"Figures: [over length bias]({name}_closed_form.png), [members and length]({name}_members.png).",
    ]
    for method in dict.fromkeys(row["method"] for row in rows if row["family"] != "none"):
        parts += _method_tables(rows, method)
    return "\n\n".join(parts) + "\n"


def _about(setup: Row) -> str:
    return (
        f"Linear reward models on pi_ref's representations ({setup['members']} members), exact optima on {setup['samples']} "
        f"samples of each held-out prompt, {len(setup['seeds'])} worlds (seeds), commit {str(setup['commit'])[:7]}. Columns: DPO, "
        "DPO debiased, then families of members: on the labels as they are (bootstrap), told of the bias in full (debiased), "
        "from not at all to in full (strengths), with their residuals (twins), and on unbiased labels, the ceiling. The named "
        "feature is length, but where filler is. Student t intervals over seeds."
    )


def _method_tables(rows: Sequence[Row], method: str) -> list[str]:
    parts = []
    for kl in dict.fromkeys(row["kl"] for row in rows):
        own = [row for row in rows if row["kl"] == kl]
        parts += [f"### {method}, {kl:g} nats: worst objective of each world", _table(own, method)]
        parts += ["Less DPO on the same labels:", _table(own, method, "worst_less_dpo")]
    return parts


def _table(rows: Sequence[Row], method: str, value: str = "worst_per_world") -> str:
    wanted = (
        [("none", "dpo"), ("none", "dpo_debiased")]
        if value == "worst_per_world"
        else [("none", "dpo_debiased")]
    )
    wanted += [
        (row["family"], method) for row in rows if row["method"] == method and row["scenario"] == "L50"
    ]
    by_place = {(row["scenario"], row["family"], row["method"]): row for row in rows}
    cells = []
    for scenario in (*SCENARIOS, WORST_OF_NINE):
        title = SCENARIOS[scenario].title if scenario in SCENARIOS else WORST_OF_NINE
        cells.append([title, *(_cell(by_place[scenario, *key], value) for key in wanted)])
    head = [method_ if family == "none" else family for family, method_ in wanted]
    return markdown(("labels", *head), cells)


def _cell(row: Row, value: str) -> str:
    low, high = row[f"{value}_ci"]
    if value == "worst_per_world":
        return f"{row[value]:.3f} [{low:.3f}, {high:.3f}]"
    return f"{row[value]:+.3f} [{low:+.3f}, {high:+.3f}]"
