"""`report.measures`: one list, whose numbers are the same in every table and both CSV files."""

import csv
import io
from typing import Any

from prmd.report.measures import MEASURES, headline_csv, headline_table, measure_table, measured, measures_csv

OBJECTIVES = ("a.b", "polite")  # an objective of one's own may have a dot in its name


def rate(value: float, **more: Any) -> dict[str, Any]:
    return {"value": value, "low": value - 0.125, "high": value + 0.125, "n": 8, "chance": 0.5, **more}


def files() -> dict[str, dict[str, Any]]:
    outcomes = {"won": rate(0.25), "tied": rate(0.5), "lost": rate(0.75)}
    found = {
        "objectives": {
            k: {"win_rate": rate(0.75), "length_controlled": {"win_rate": rate(0.25)}, "outcomes": outcomes}
            for k in OBJECTIVES
        },
        "worst_objective": {"objective": "polite", "win_rate": rate(0.75)},
        "truncated_share": 0.0,
    }
    row = {"method": "cvar", "worst": rate(0.75), "worst_length_controlled": rate(0.375), "kl": None}
    row["win_rate"] = {k: one["win_rate"] for k, one in found["objectives"].items()}
    row["length_controlled"] = {k: rate(0.25) for k in OBJECTIVES}
    alone = {"method": "reference", "win_rate": {}, "length": rate(12.0)}
    return {"reference": {"row": alone, "mean_of_min": rate(-1.0)}, "cvar": found | {"row": row}}


def test_a_number_is_the_same_wherever_it_stands() -> None:
    rows = [found["row"] for found in files().values()]
    table = headline_table(rows, "", before={("cvar", "win rate, worst objective"): "polite"}, behind={})
    cells = dict(zip(table.columns, table.rows[1], strict=True))
    assert cells["a.b"] == "0.75 [0.62, 0.88] ↑"
    assert cells["worst objective"] == "polite 0.75 [0.62, 0.88] ↑"
    assert cells["KL, nats/response"] == "–" and table.rows[0][-1] == "12.0 [11.9, 12.1]"
    _, line = csv.DictReader(io.StringIO(headline_csv(rows)))
    assert line["win_rate_a.b_value"] == "0.75" and line["win_rate_at_equal_length_a.b_low"] == "0.125"
    assert line["worst_length_controlled_high"] == "0.5" and line["kl_value"] == "" and line["length_n"] == ""
    every = list(csv.DictReader(io.StringIO(measures_csv(measured(files()), 4))))
    by_name = {(one["measure"], one["method"]): one for one in every}
    assert len(by_name) == len(every)
    assert by_name["win rate, a.b", "cvar"] == {
        "measure": "win rate, a.b",
        "method": "cvar",
        "value": "0.75",
        "low": "0.625",
        "high": "0.875",
        "clusters": "8",
        "interval": "",
        "responses": "32",
        "chance": "0.5",
    }
    assert by_name["share cut at the token limit", "cvar"]["value"] == "0.0"
    assert by_name["win rate at equal length, worst objective", "cvar"]["value"] == "0.375"


def test_no_two_measures_have_one_name() -> None:
    names = [measure.name for group in MEASURES.values() for measure in group]
    assert len(names) == len(set(names))


def test_outcomes_stand_objective_by_objective_and_what_nobody_has_is_left_out() -> None:
    found = measured(files())
    names = [measure.name for measure in found["outcomes"]]
    assert names == [f"{k}: {said}" for k in OBJECTIVES for said in ("won", "tied", "lost")]
    assert found["proxies"] == {} and measure_table(found["proxies"], ["cvar"], "") is None
    table = measure_table(found["headline"], ["reference", "cvar"], "")
    rows = {row[0]: row[1:] for row in table.rows}
    assert "KL, nats per response" not in rows
    assert rows["win rate at equal length, polite"] == ("0.50", "8", "–", "0.25 [0.12, 0.38] ↓")
    assert rows["mean of minimum"] == ("0.50", "8", "−1.00 [−1.12, −0.88]", "–")
