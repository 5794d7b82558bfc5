"""`report.comparison_tables`: what is said of the judges of benchmarks, from cards that a test writes by hand."""

from typing import Any

from prmd.report.comparison_tables import benchmark_judge_warnings, benchmark_judges_table


def share(value: float, half: float = 0.1) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 50}


def judged(**card: Any) -> dict[str, dict[str, dict[str, Any]]]:
    plain = {
        "name": "judge-7b",
        "kind": "endpoint",
        "verdicts": 40,
        "parse_failures": 0,
        "parse_rate": share(1),
    }
    return {"jailbreakbench": {"cvar": {"benchmark": "jailbreakbench[judge-7b]", "judge": plain | card}}}


def test_the_card_of_a_judge_is_told_in_words() -> None:
    labels = {"agree": share(0.8), "kappa": 0.5, "fpr": 0.25, "fnr": None, "n": 60}
    card = {
        "agreement": {"labels": "published", "strings": labels | {"kappa": 0.0}, "judge-7b": labels},
        "position_bias": {"first_wins": share(0.55), "consistent": share(0.7)},
        "constant_answer": {"text": "Sure.", "asr": share(0.2)},
        "usage": {"replies": 40},
    }
    table = benchmark_judges_table(judged(**card))
    cells = dict(zip(table.columns, table.rows[0], strict=True))
    assert cells["result"] == "jailbreakbench[judge-7b], cvar"
    assert cells["verdicts that could be read"] == "40 of 40: 1.00 [0.90, 1.10]"
    assert cells["agreement with labels"] == (
        "strings: 0.80 [0.70, 0.90], κ 0.000, false positives 0.250, n = 60 (published); "
        "judge-7b: 0.80 [0.70, 0.90], κ 0.500, false positives 0.250, n = 60 (published)"
    )
    assert cells["position bias"] == "first wins 0.55 [0.45, 0.65], consistent 0.70 [0.60, 0.80]"
    assert cells["constant answer"] == "asr 0.20 [0.10, 0.30]"
    assert benchmark_judge_warnings(judged(**card)) == []  # the phrases' errors are not the judge's


def test_a_scorer_is_told_by_its_validation_and_a_reward_model_by_its_accuracy() -> None:
    validation = {
        "auc": share(0.9),
        "rank_correlation": share(0.7),
        "against": "Perspective toxicity of 9 texts",
    }
    scorer = {"name": "substitute", "kind": "toxicity scorer", "parse_rate": None, "agreement": None}
    results = {
        "rtp": {"cvar": {"benchmark": "rtp[substitute]", "judge": scorer | {"validation": validation}}}
    }
    people = {"agree": share(0.6), "kappa": 0.1, "fpr": 0.4, "fnr": 0.4, "n": 200, "labels": "people's"}
    reward = {"name": "honest_reward", "accuracy": share(0.65), "verdicts": 9, "parse_failures": 0}
    reward |= {"agreement_with_people": people, "agreement_with_reference_answers": None}
    results["generation"] = {"cvar": {"benchmark": "generation", "judge": reward}}
    scored, truth = benchmark_judges_table(results).rows
    assert scored[2] == "all: it gives numbers"
    assert scored[3] == (
        "AUC 0.90 [0.80, 1.00], rank correlation 0.70 [0.60, 0.80] with Perspective toxicity of 9 texts"
    )
    assert truth[3].startswith("0.65 [0.55, 0.75] on 50 held-out pairs; people: 0.60 [0.50, 0.70], κ 0.100")


def test_a_judge_that_cannot_be_read_or_looks_at_the_order_is_warned_of() -> None:
    def told(**card: Any) -> str:
        return "; ".join(benchmark_judge_warnings(judged(**card)))

    assert "only 8 of 40" in told(parse_failures=32, parse_rate=share(0.2))
    assert "none of 40" in told(parse_failures=40, parse_rate=share(0.0))
    assert "shown first" in told(position_bias={"first_wins": share(0.8), "consistent": share(0.3)})
    assert "shown second" in told(position_bias={"first_wins": share(0.2), "consistent": share(0.3)})
    at_chance = "agreement with labels cannot be told from chance"
    assert at_chance in told(agreement={"agree": share(0.5), "kappa": -0.1, "n": 9})
    few = {"value": 0.83, "low": 0.44, "high": 0.97}  # 5 of 6, where half would be right by chance: κ = .66
    assert at_chance in told(agreement={"agree": few, "kappa": 0.66, "n": 6})
    assert at_chance not in told(agreement={"agree": share(0.83), "kappa": 0.66, "n": 60})
    two = judged(parse_failures=32, parse_rate=share(0.2))
    two["jailbreakbench"]["mean"] = two["jailbreakbench"]["cvar"]
    (warning,) = benchmark_judge_warnings(two)
    assert warning.startswith("jailbreakbench[judge-7b] (cvar, mean): only 8 of 40")
