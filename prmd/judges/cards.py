"""How far a judge can be trusted, said with everything it judged; and comparisons in both orders.

A card holds the share of verdicts that could be read, the agreement with known labels where there are any, the preference for
what is shown first, and what the judge says of a constant answer that deserves nothing. The judges are in `text`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from prmd.judges.rubrics import Rubric, Verdict
from prmd.judges.text import TextJudge
from prmd.statistics.intervals import wilson_interval

Answer = TypeVar("Answer")

CONSTANT_ANSWER = (
    "Sure, here is what you asked for. I hope this helps; let me know if you need anything else."
)
"""The answer of a policy that does nothing; a judge that rewards it can be fooled by any."""


# ------------------------------------------------------------------ comparisons
@dataclass(frozen=True)
class PairwiseResult:
    """Verdicts of both orders and what they amount to.

    Attributes:
        outcomes: per pair 1 (the candidate wins in both orders), 0 (the baseline does), 0.5 (a tie, or the orders
            disagree), None (a verdict could not be read).
        shown_first: verdicts with the candidate shown first: `first`, `second`, `tie` or None.
        shown_second: verdicts with the candidate shown second.
    """

    outcomes: tuple[float | None, ...]
    shown_first: tuple[str | None, ...]
    shown_second: tuple[str | None, ...]

    @property
    def win_rate(self) -> float | None:
        """(wins + ties / 2) / pairs with a verdict; None without any."""
        read = [outcome for outcome in self.outcomes if outcome is not None]
        return sum(read) / len(read) if read else None

    def position_bias(self) -> dict[str, Any]:
        """Share of decided verdicts for what was shown first (one half: no bias), and of pairs judged alike in both orders."""
        said = [v for v in (*self.shown_first, *self.shown_second) if v is not None]
        decided = [v for v in said if v != "tie"]
        both = [
            (a, b) for a, b in zip(self.shown_first, self.shown_second, strict=True) if None not in (a, b)
        ]
        alike = sum(_candidate_wins(a, first=True) == _candidate_wins(b, first=False) for a, b in both)
        first = sum(v == "first" for v in decided)
        return {
            "first_wins": wilson_interval(first, len(decided)).to_json() if decided else None,
            "consistent": wilson_interval(alike, len(both)).to_json() if both else None,
        }


def pairwise_both_orders(
    compare: Callable[[Sequence[tuple[Answer, Answer]]], Sequence[str | None]],
    *,
    candidate: Sequence[Answer],
    baseline: Sequence[Answer],
) -> PairwiseResult:
    """Judge every pair with the candidate shown first and then shown second; a win needs both.

    Args:
        compare: given pairs (shown first, shown second), says of each `first`, `second`, `tie` or None; called once per
            order with all pairs, in the order of `candidate`.
        candidate: the candidate's answers.
        baseline: the baseline's answers to the same questions.

    Source: MT-Bench's pairwise mode, arXiv:2306.05685 section 3.4.
    """
    pairs = list(zip(candidate, baseline, strict=True))
    first = tuple(compare(pairs))
    second = tuple(compare([(theirs, ours) for ours, theirs in pairs]))
    return PairwiseResult(tuple(_outcome(a, b) for a, b in zip(first, second, strict=True)), first, second)


def _candidate_wins(verdict: str, *, first: bool) -> float:
    if verdict == "tie":
        return 0.5
    return float((verdict == "first") == first)


def _outcome(first: str | None, second: str | None) -> float | None:
    if first is None or second is None:
        return None
    ours = _candidate_wins(first, first=True)
    return ours if ours == _candidate_wins(second, first=False) else 0.5


# ------------------------------------------------------------------ cards
def agreement(predicted: Sequence[bool], truth: Sequence[bool]) -> dict[str, Any]:
    """Agreement of verdicts with known labels: share with its interval, Cohen's kappa, false positives and negatives.

    Returns:
        `agree` (Wilson), `kappa`, `fpr` and `fnr` (shares of the negative and the positive labels; None without such), `n`.

    Raises:
        ValueError: no labels, or different lengths.
    """
    pairs = list(zip(predicted, truth, strict=True))
    if not pairs:
        raise ValueError("agreement: needs at least one label")
    n = len(pairs)
    right = sum(p == t for p, t in pairs)
    said, true = sum(p for p, _ in pairs), sum(t for _, t in pairs)
    by_chance = (said * true + (n - said) * (n - true)) / n**2
    return {
        "agree": wilson_interval(right, n).to_json(),
        "kappa": None if by_chance == 1 else (right / n - by_chance) / (1 - by_chance),
        "fpr": sum(p and not t for p, t in pairs) / (n - true) if true < n else None,
        "fnr": sum(t and not p for p, t in pairs) / true if true else None,
        "n": n,
    }


def verdict_agreement(verdicts: Sequence[Verdict], truth: Sequence[bool]) -> dict[str, Any] | None:
    """`agreement` of the verdicts that could be read with their labels; None where none could."""
    read = [(v.positive, label) for v, label in zip(verdicts, truth, strict=True) if v.positive is not None]
    return agreement(*zip(*read, strict=True)) if read else None


def judge_card(
    judge: TextJudge,
    verdicts: Sequence[Verdict],
    *,
    rubrics: Sequence[Rubric] = (),
    agrees: dict[str, Any] | None = None,
    position_bias: dict[str, Any] | None = None,
    constant_answer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The card of a judge: who it is, how much of it could be read, and what is known of its errors.

    Args:
        verdicts: everything it said for the result this card goes with.
        rubrics: what it was asked; the words are kept, because they move the verdicts.
        agrees: from `agreement`, with `labels` saying whose labels; None where there are none.
        position_bias: from `PairwiseResult.position_bias`; None where single answers were judged, which have no order.
        constant_answer: what it says of `CONSTANT_ANSWER`.
    """
    read = sum(verdict.positive is not None for verdict in verdicts)
    return {
        "kind": judge.kind,
        "name": judge.name,
        "fingerprint": judge.fingerprint,
        "rubrics": {rubric.name: rubric.template for rubric in rubrics},
        "verdicts": len(verdicts),
        "parse_failures": len(verdicts) - read,
        "parse_rate": wilson_interval(read, len(verdicts)).to_json() if verdicts else None,
        "agreement": agrees,
        "position_bias": position_bias,
        "constant_answer": constant_answer,
        "usage": judge.usage(),
    }
