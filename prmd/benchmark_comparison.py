"""Paired tests between methods on the same benchmark items: exact McNemar where outcomes are yes or no, else sign flips.

What lives here: which outcome of an item is compared, and the tests of every policy against the baseline over all
benchmarks, corrected together. What does not: benchmarks and their own numbers (`benchmarks`), the headline family
(`policy_comparison`), from whose correction this one is kept apart.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prmd.inference.candidates import REFERENCE
from prmd.policy_comparison import BASELINES
from prmd.statistics.paired_tests import holm, mcnemar_exact, sign_flip_test
from prmd.statistics.resampling import Resampling

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
    for test, adjusted in zip(tests, holm([t["p"] for t in tests]), strict=True):
        test["p_holm"] = float(adjusted)
    declared = (
        "each policy against the baseline on every outcome of every benchmark, items paired: exact McNemar for yes and no, "
        f"else sign flips; {len(tests)} tests, Holm-corrected together and apart from those of the headline"
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
    p = sign_flip_test(ours - theirs, n_resamples=resampling.resamples, seed=resampling.seed)
    return {"difference": difference, "test": f"sign flips, n = {len(pairs)}", "p": p}
