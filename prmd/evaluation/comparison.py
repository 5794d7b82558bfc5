"""How methods compare: paired tests against the baseline, who beats whom, the front they span together.

Contents of the method files in, `comparison.json` out; what was not measured alike is refused. On the items of a benchmark
the tests are exact McNemar where outcomes are yes or no, else of the mean difference; they are corrected together and apart from the
headline family.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prmd.artifacts.paths import REFERENCE, stage_command
from prmd.errors import DataError
from prmd.evaluation.over_optimisation import policy_points
from prmd.statistics.intervals import minimum_band
from prmd.statistics.outcomes import pairwise_win_rate
from prmd.statistics.paired_tests import holm, mcnemar_exact, paired_mean_test, skewness_note
from prmd.statistics.resampling import Resampling, with_chance

BASELINES = ("baseline_dpo", "dpo", REFERENCE)
"""What methods are compared with: the first of these that was evaluated."""
MEAN_OF_MIN = "mean of minimum"
_MEAN_TEST = "the larger p of sign flips and of a studentized bootstrap"
MOST_SLICES = 200_000
"""Slices of a volume that are computed: about four seconds, three times (value and both ends)."""
SHARED_PARTS = ("prompts", "decoding", "reference", "judges")
"""What two results must have in common to stand in one table."""


def compare_methods(
    metrics: Sequence[dict[str, Any]], rewards: Mapping[str, np.ndarray], resampling: Resampling
) -> dict[str, Any]:
    """Rows of the headline table, paired tests of every policy against the baseline, and the win matrix.

    Args:
        metrics: contents of the method files, the reference first.
        rewards: judges' rewards of the samples of each method, [K, X, n].

    Returns:
        `rows`, `baseline`, `worst_objective` (what the verdict rests on), `paired`, `declared`, `win_matrix`, `hypervolume`,
        `over_optimisation`: the contents of `comparison.json`.

    Raises:
        DataError: they were not measured on the same prompts, with the same decoding, by the same judges.
    """
    check_comparable(metrics)
    by_method = {m["method"]: m for m in metrics}
    baseline = next(name for name in BASELINES if name in by_method)
    reference = by_method[REFERENCE]
    others = [m for name, m in by_method.items() if name not in (baseline, REFERENCE)]
    tests = [test for m in others for test in _paired(m, by_method[baseline], reference, resampling)]
    worst = [worst_objective_test(m, by_method[baseline], reference, resampling) for m in others]
    for family in (tests, worst):  # the verdict's one question is a family of its own
        _correct(family)
    policies = [m for m in metrics if m["method"] != REFERENCE]
    return {
        "rows": [_row(m, reference, resampling) for m in metrics],
        "baseline": baseline,
        "worst_objective": worst,
        "paired": tests,
        "declared": _declared(baseline, len(tests)),
        "win_matrix": win_matrix(
            rewards,
            list(metrics[0]["objectives"]),
            resampling,
            lengths={m["method"]: np.array(m["per_prompt"]["length"]) for m in metrics},
            debiased=[m["method"] for m in metrics if m.get("debiased")],
        ),
        **(_front(policies, resampling) if policies else {"hypervolume": None}),
        "over_optimisation": _over_optimisation(by_method, resampling),
    }


def _correct(family: Sequence[dict[str, Any]]) -> None:
    """Give each test of a family its p-value after Holm's correction."""
    for test, adjusted in zip(family, holm([t["p"] for t in family]), strict=True):
        test["p_holm"] = float(adjusted)


def check_comparable(metrics: Sequence[dict[str, Any]]) -> None:
    """Refuse to compare results with different prompts, decoding, reference or judges, naming what differs.

    Raises:
        DataError: see above.
    """
    first = metrics[0]
    for other in metrics[1:]:
        keys = [m["evaluation"]["compared_on"] for m in (first, other)]
        differing = [part for part in SHARED_PARTS if keys[0].get(part) != keys[1].get(part)]
        if not differing and first["per_prompt"]["ids"] != other["per_prompt"]["ids"]:
            differing = ["prompts"]
        if differing:
            raise DataError(
                f"{first['method']} and {other['method']} were evaluated with different {' and '.join(differing)}, so their "
                f"numbers cannot be compared; evaluate both anew with one configuration ({stage_command('compute_metrics')} --force)"
            )


def _declared(baseline: str, count: int) -> str:
    if not count:
        return f"no policy beside {baseline}, nothing to compare"
    return (
        f"each policy against {baseline}, win rate of every objective and mean of the minimum: {count} two-sided "
        f"tests over prompts ({_MEAN_TEST}), Holm-corrected together"
    )


def _row(metrics: dict[str, Any], reference: dict[str, Any], resampling: Resampling) -> dict[str, Any]:
    controlled = {k: (v["length_controlled"] or {}).get("win_rate") for k, v in metrics["objectives"].items()}
    same = metrics["method"] == REFERENCE
    return {
        "method": metrics["method"],
        "approach": metrics["approach"],
        "win_rate": {k: v["win_rate"] for k, v in metrics["objectives"].items()},
        "length_controlled": controlled,
        "worst": metrics["worst_objective"]["win_rate"],
        "worst_length_controlled": None if same else worst_at_equal_length(metrics, reference, resampling),
        "mean_of_min": metrics["mean_of_min"],
        "kl": metrics["kl"]["per_response"],
        "length": metrics["length"],
        **({"debiased": metrics["debiased"]} if metrics.get("debiased") else {}),
        **({"elsewhere": found} if (found := metrics.get("evaluation", {}).get("elsewhere")) else {}),
    }


def worst_at_equal_length(
    metrics: dict[str, Any], reference: dict[str, Any], resampling: Resampling
) -> dict[str, Any]:
    """The lowest win rate at the reference's length, in a band of intervals at confidence 1 - .05/K."""
    wins, longer = metrics["per_prompt"]["win_rate"].values(), _longer(metrics, reference)
    fits = [resampling.length_controlled(np.array(v), longer, 1 - 0.05 / len(wins)) for v in wins]
    return with_chance(minimum_band([fit.estimate for fit in fits]), 0.5)


def _longer(metrics: dict[str, Any], reference: dict[str, Any]) -> np.ndarray:
    """Mean length of the responses minus that of the reference's, per prompt [X]."""
    return np.subtract(*(np.array(m["per_prompt"]["length"]) for m in (metrics, reference)))


def _paired(
    ours: dict[str, Any], theirs: dict[str, Any], reference: dict[str, Any], resampling: Resampling
) -> list[dict[str, Any]]:
    """Tests of every measure; of win rates also the difference at equal length, with which a debiased one has to agree."""
    tests, longer = [], [_longer(m, reference) for m in (ours, theirs)]
    both = {"needs_both": True} if ours.get("debiased") or theirs.get("debiased") else {}
    for measure, values in _measures(ours).items():
        other = _measures(theirs)[measure]
        difference = resampling.difference(values, other)
        names = {"method": ours["method"], "against": theirs["method"], "measure": measure}
        found = {**names, "difference": difference.to_json()}
        if measure != MEAN_OF_MIN:
            sides = zip((values, other), longer, strict=True)
            found["difference_at_equal_length"] = resampling.length_controlled_difference(*sides).to_json()
            found |= both
        tests.append({**found, **_mean_test(values - other, resampling)})
    return tests


def worst_objective_test(
    ours: dict[str, Any], theirs: dict[str, Any], reference: dict[str, Any], resampling: Resampling
) -> dict[str, Any]:
    """Whether the lowest win rate of one method is above (or below) the lowest of another, objectives being unknown.

    min_k a_k > min_j b_j holds where every a_k exceeds some b_j, so p = max_k J min_j p(a_k > b_j) over the J different
    b_j: Bonferroni over which b_j it is, none over k, all of which have to hold. The other direction likewise; both use
    two-sided p-values, so that together they keep their level.

    Returns:
        `difference` of the two lowest win rates, `p`; where reward models were debiased, `needs_both`, and under `agrees`
        whether the differences that decide lie on the same side at equal length.
    """
    own, other = ({k: np.array(v) for k, v in m["per_prompt"]["win_rate"].items()} for m in (ours, theirs))
    table = {
        (k, j): (
            float((a - b).mean()),
            paired_mean_test(a - b, n_resamples=resampling.resamples, seed=resampling.seed),
        )
        for k, a in own.items()
        for j, b in other.items()
    }
    above = {pair: p if mean > 0 else 1.0 for pair, (mean, p) in table.items()}
    below = {(j, k): p if mean < 0 else 1.0 for (k, j), (mean, p) in table.items()}
    (p_above, up), (p_below, down) = (_each_above_some(p, by) for p, by in ((above, other), (below, own)))
    lowest = [min(float(v.mean()) for v in wins.values()) for wins in (own, other)]
    found = {
        "method": ours["method"],
        "against": theirs["method"],
        "difference": lowest[0] - lowest[1],
        "p": min(p_above, p_below),
    }
    if not (ours.get("debiased") or theirs.get("debiased")):
        return found
    longer = {True: _longer(ours, reference), False: _longer(theirs, reference)}
    is_up = p_above <= p_below
    pairs = up if is_up else down
    first, second = (own, other) if is_up else (other, own)
    ends = [
        resampling.length_controlled_difference((first[a], longer[is_up]), (second[b], longer[not is_up])).low
        for a, b in pairs
    ]
    return {**found, "needs_both": True, "agrees": min(ends) > 0}


def _each_above_some(
    p: Mapping[tuple[str, str], float], others: Mapping[str, np.ndarray]
) -> tuple[float, list[tuple[str, str]]]:
    """The p-value that every first of the pairs is above some second one, and which one that is."""
    different = len(np.unique(np.stack(list(others.values())), axis=0))
    chosen = [
        min((pair for pair in p if pair[0] == k), key=p.__getitem__) for k in dict.fromkeys(k for k, _ in p)
    ]
    return min(1.0, different * max(p[pair] for pair in chosen)), chosen


def _mean_test(differences: np.ndarray, resampling: Resampling) -> dict[str, Any]:
    """p-value of a mean difference, and a note where few differences are skewed."""
    p = paired_mean_test(differences, n_resamples=resampling.resamples, seed=resampling.seed)
    note = skewness_note(differences)
    return {"p": p} | ({"note": note} if note else {})


def _measures(metrics: dict[str, Any]) -> dict[str, np.ndarray]:
    scores = metrics["per_prompt"]
    wins = {f"win rate, {k}": np.array(v) for k, v in scores["win_rate"].items()}
    return {**wins, MEAN_OF_MIN: np.array(scores["mean_of_min"])}


def win_matrix(
    rewards: Mapping[str, np.ndarray],
    objectives: Sequence[str],
    resampling: Resampling,
    *,
    lengths: Mapping[str, np.ndarray],
    debiased: Sequence[str] = (),
) -> dict[str, list[dict[str, Any]]]:
    """Win rate of every method over every later one, per objective, as it is and at equal length; the other order is one minus it.

    Args:
        lengths: mean length of each method's samples, per prompt [X].
        debiased: methods whose reward models were debiased.
    """
    names = list(rewards)

    def duel(k: int, ours: str, theirs: str) -> dict[str, Any]:
        wins = pairwise_win_rate(rewards[ours][k], rewards[theirs][k])
        controlled = resampling.length_controlled(wins, lengths[ours] - lengths[theirs]).estimate
        return {
            "method": ours,
            "against": theirs,
            "win_rate": with_chance(resampling.win_rate(wins), 0.5),
            "length_controlled": with_chance(controlled, 0.5),
            **({"needs_both": True} if {ours, theirs} & set(debiased) else {}),
        }

    return {
        objective: [duel(k, ours, theirs) for i, ours in enumerate(names) for theirs in names[i + 1 :]]
        for k, objective in enumerate(objectives)
    }


def _front(policies: Sequence[dict[str, Any]], resampling: Resampling) -> dict[str, Any]:
    """`hypervolume`, the volume above the reference that all policies dominate together, or why it is left out."""
    points = np.array([list(m["per_prompt"]["mean_reward"].values()) for m in policies])
    count, k = points.shape[:2]
    slices = math.comb(
        count + k - 2, k - 1
    )  # at most: i points stand above the i-th highest level of an axis
    if slices > MOST_SLICES:  # beforehand and not by the clock, so that every machine leaves out the same
        reason = (
            f"not computed: the exact volume of {count} policies on {k} objectives takes {slices:,} slices"
        )
        return {"hypervolume": None, "hypervolume_left_out": reason}
    return {"hypervolume": with_chance(resampling.volume(points), 0.0)}


def _over_optimisation(by_method: dict[str, dict[str, Any]], resampling: Resampling) -> dict[str, Any] | None:
    curves = by_method[REFERENCE].get("best_of_n")
    if curves is None:
        return None
    scored = [m for name, m in by_method.items() if name != REFERENCE and m.get("proxy")]
    return {"curves": curves, "policies": policy_points(scored, curves, resampling)}


Items = Sequence[Mapping[str, Any]]

_OUTCOME = re.compile(r"mc[123]|true|emt\d+|tp\d+|rating_\d")
"""Fields of an item that are its outcome, beside those it lists under `statistics.outcomes`; what else is there describes the item."""
IMPLICIT_ACCURACY = "implicit_accuracy"


def item_outcomes(item: Mapping[str, Any]) -> dict[str, float]:
    """The outcomes of one benchmark item by name; a pair is right where the policy raised chosen more than rejected."""
    found = {
        key: float(value)
        for key, value in item.items()
        if _OUTCOME.fullmatch(key) and isinstance(value, (bool, int, float))
    }
    found |= item.get("outcomes") or {}
    if "logratio_margin" in item:
        found[IMPLICIT_ACCURACY] = float(np.sign(item["logratio_margin"]) + 1) / 2
    return found


def compare_benchmarks(results: Mapping[str, Mapping[str, Items]], resampling: Resampling) -> dict[str, Any]:
    """Every policy against the baseline on every benchmark both finished.

    Args:
        results: benchmark -> method -> its items.

    Returns:
        `paired` (one entry per benchmark, outcome and policy, with `difference`, `test`, `p`, `p_holm`) and `declared`.
    """
    tests = [
        {"benchmark": benchmark, **test}
        for benchmark, by_method in results.items()
        for test in _benchmark_tests(by_method, resampling)
    ]
    _correct(tests)
    declared = (
        "each policy against the baseline on every outcome of every benchmark, items paired: exact McNemar for yes and no, "
        f"else {_MEAN_TEST}; {len(tests)} tests, Holm-corrected together and apart from those of the headline"
    )
    return {"paired": tests, "declared": declared}


def _benchmark_tests(by_method: Mapping[str, Items], resampling: Resampling) -> list[dict[str, Any]]:
    baseline = next((name for name in BASELINES if name in by_method), None)
    if baseline is None:
        return []
    outcomes = {
        method: {str(item["id"]): item_outcomes(item) for item in items}
        for method, items in by_method.items()
    }
    tests = []
    for method in (name for name in by_method if name not in (baseline, REFERENCE)):
        ours, theirs = outcomes[method], outcomes[baseline]
        shared = [key for key in ours if key in theirs]
        for name in dict.fromkeys(name for key in shared for name in ours[key]):
            pairs = [
                (ours[key][name], theirs[key][name])
                for key in shared
                if name in ours[key] and name in theirs[key]
            ]
            if pairs:
                named = {"outcome": name, "method": method, "against": baseline}
                tests.append({**named, **_test(np.array(pairs), resampling)})
    return tests


def _test(pairs: np.ndarray, resampling: Resampling) -> dict[str, Any]:
    """Difference, test and p-value of paired outcomes [n, 2]."""
    ours, theirs = pairs.T
    difference = resampling.difference(ours, theirs).to_json()
    if np.isin(pairs, (0.0, 1.0)).all():
        only_ours, only_theirs = int((ours > theirs).sum()), int((theirs > ours).sum())
        test = f"McNemar, {only_ours} against {only_theirs} of {len(pairs)}"
        return {"difference": difference, "test": test, "p": mcnemar_exact(only_ours, only_theirs)}
    test = f"mean difference, n = {len(pairs)}"
    return {"difference": difference, "test": test, **_mean_test(ours - theirs, resampling)}
