"""`judges.cards`: both orders, agreement and cards against tables written by hand."""

import itertools

import pytest

from prmd.judges.cards import agreement, judge_card, pairwise_both_orders
from prmd.judges.rubrics import REFUSAL, JudgeItem, Verdict
from prmd.judges.text import StringJudge

# candidate shown first, candidate shown second -> outcome for the candidate (FastChat's table)
TABLE = {
    ("first", "second"): 1.0,
    ("second", "first"): 0.0,
    ("first", "first"): 0.5,
    ("second", "second"): 0.5,
    ("tie", "tie"): 0.5,
    ("tie", "second"): 0.5,
    ("first", "tie"): 0.5,
    ("tie", "first"): 0.5,
    ("second", "tie"): 0.5,
}


def test_a_win_needs_both_orders() -> None:
    verdicts = list(itertools.product(["first", "second", "tie", None], repeat=2))
    shown: list[list[tuple[str, str]]] = []

    def compare(pairs: list[tuple[str, str]]) -> list[str | None]:
        shown.append(list(pairs))
        return [v[len(shown) - 1] for v in verdicts]

    ours, theirs = [f"ours {i}" for i in range(16)], [f"theirs {i}" for i in range(16)]
    result = pairwise_both_orders(compare, candidate=ours, baseline=theirs)
    assert shown[0][3] == ("ours 3", "theirs 3") and shown[1][3] == ("theirs 3", "ours 3")
    assert list(result.outcomes) == [TABLE.get(v) for v in verdicts]
    assert result.win_rate == (1 + 0 + 7 * 0.5) / 9
    assert sum(v is None for v in (*result.shown_first, *result.shown_second)) == 8


def test_a_judge_that_always_takes_the_first_is_seen() -> None:
    result = pairwise_both_orders(
        lambda pairs: ["first"] * len(pairs), candidate=list("abcd"), baseline=list("efgh")
    )
    assert result.outcomes == (0.5,) * 4
    bias = result.position_bias()
    assert bias["first_wins"]["value"] == 1.0 and bias["first_wins"]["n"] == 8
    assert bias["consistent"]["value"] == 0.0 and bias["consistent"]["n"] == 4


def test_a_judge_without_bias_is_seen_and_one_that_says_nothing_has_none() -> None:
    longer = pairwise_both_orders(
        lambda pairs: ["first" if len(a) > len(b) else "second" for a, b in pairs],
        candidate=["aaa", "b"],
        baseline=["c", "ddd"],
    )
    assert longer.outcomes == (1.0, 0.0)
    assert longer.position_bias()["first_wins"]["value"] == 0.5
    assert longer.position_bias()["consistent"]["value"] == 1.0
    silent = pairwise_both_orders(lambda pairs: [None] * len(pairs), candidate=["a"], baseline=["b"])
    assert silent.win_rate is None and silent.position_bias() == {"first_wins": None, "consistent": None}


def test_agreement_is_that_of_a_table_of_errors() -> None:
    # PAIR against vicuna by refusal phrases: tp 60, fp 8, fn 9, tn 5
    cells = [(True, True)] * 60 + [(True, False)] * 8 + [(False, True)] * 9 + [(False, False)] * 5
    found = agreement([p for p, _ in cells], [t for _, t in cells])
    assert found["agree"]["value"] == pytest.approx(65 / 82) and found["n"] == 82
    assert found["fpr"] == pytest.approx(8 / 13) and found["fnr"] == pytest.approx(9 / 69)
    expected = (68 * 69 + 14 * 13) / 82**2
    assert found["kappa"] == pytest.approx((65 / 82 - expected) / (1 - expected))
    assert sum(p for p, _ in cells) == 68
    unanimous = agreement([True, True], [True, True])
    assert (unanimous["kappa"], unanimous["fpr"], unanimous["fnr"]) == (None, None, 0.0)
    with pytest.raises(ValueError, match="at least one"):
        agreement([], [])


def test_a_card_counts_what_could_not_be_read() -> None:
    verdicts = [
        Verdict("a", True, None, "yes"),
        Verdict("b", None, None, "hm"),
        Verdict("c", False, None, "no"),
    ]
    card = judge_card(StringJudge(), verdicts, rubrics=[REFUSAL])
    assert (card["verdicts"], card["parse_failures"], card["parse_rate"]["value"]) == (
        3,
        1,
        pytest.approx(2 / 3),
    )
    assert card["rubrics"] == {"refusal": REFUSAL.template} and card["position_bias"] is None
    assert judge_card(StringJudge(), [])["parse_rate"] is None


def test_phrases_judge_refusals_alone() -> None:
    (verdict,) = StringJudge().judge([JudgeItem("Why?", "I'm sorry, I can't say.")], REFUSAL)
    assert verdict.positive is True and verdict.raw == "refused"
