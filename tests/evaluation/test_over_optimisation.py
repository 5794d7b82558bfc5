"""`evaluation.over_optimisation`: best of n against enumeration, a known optimum, and policies in the same units."""

import itertools
import math

import numpy as np
import pytest

from prmd.evaluation.over_optimisation import best_of_n_curves, policy_points
from prmd.statistics.resampling import Resampling

RESAMPLING = Resampling(200, 0)


def test_gains_are_the_mean_over_all_subsets_of_the_samples() -> None:
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(3, 2, 5, 4)), rng.normal(size=(3, 5, 4))
    found = best_of_n_curves(proxy, gold, RESAMPLING)
    scores = {"mean": (proxy.mean((0, 1)), gold.mean(0)), "hard_min": (proxy.min((0, 1)), gold.min(0))}
    for chooser, (by, counted) in scores.items():
        units = {"proxy": by, "gold": counted}
        for n, point in enumerate(found[chooser]["points"], start=1):
            subsets = [list(s) for s in itertools.combinations(range(4), n)]
            for name, values in units.items():
                best = [values[x, s][by[x, s].argmax()] for s in subsets for x in range(5)]
                sd = math.sqrt(values.var(axis=1, ddof=1).mean())
                assert found[chooser]["units"][name] == pytest.approx(sd)
                assert point[name]["value"] == pytest.approx((np.mean(best) - values.mean()) / sd)
            assert point["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
            assert point["distance"] == pytest.approx(math.sqrt(point["kl"]))


def test_a_proxy_that_knows_nothing_gains_alone() -> None:
    rng = np.random.default_rng(1)
    proxy, gold = rng.normal(size=(3, 2, 400, 4)), rng.normal(size=(3, 400, 4))
    last = best_of_n_curves(proxy, gold, RESAMPLING)["mean"]["points"][-1]
    assert last["proxy"]["low"] > 0.8  # the mean of the largest of four normals is 1.03
    assert last["gold"]["low"] < 0 < last["gold"]["high"]


def test_the_fit_finds_the_curve_it_was_made_from() -> None:
    """Judges that gain d (alpha - beta d): built by choosing the gold score of each rank."""
    alpha, beta, m, prompts = 1.5, 0.6, 8, 50
    distance = np.sqrt([math.log(n) - (n - 1) / n for n in range(1, m + 1)])
    wanted = distance * (alpha - beta * distance)
    weights = np.array(
        [[math.comb(i - 1, n - 1) / math.comb(m, n) for i in range(1, m + 1)] for n in range(1, m + 1)]
    )
    by_rank = np.linalg.solve(weights, wanted)  # scores whose best-of-n expectation is `wanted`
    ranks = np.tile(np.arange(m, dtype=float), (prompts, 1))
    found = best_of_n_curves(ranks[None, None], np.tile(by_rank, (prompts, 1))[None], RESAMPLING)["mean"]
    unit = found["units"]["gold"]
    assert found["fit"]["alpha"]["value"] * unit == pytest.approx(alpha, rel=1e-6)
    assert found["fit"]["beta"]["value"] * unit == pytest.approx(beta, rel=1e-6)
    assert found["fit"]["peak_distance"] == pytest.approx(alpha / (2 * beta), rel=1e-6)


def test_two_samples_fix_no_curve() -> None:
    rng = np.random.default_rng(2)
    found = best_of_n_curves(rng.normal(size=(3, 2, 9, 2)), rng.normal(size=(3, 9, 2)), RESAMPLING)
    assert found["mean"]["fit"] is None and len(found["mean"]["points"]) == 2
    assert found["mean"]["points"][0]["gold"]["value"] == 0.0


def test_policies_are_measured_in_the_units_of_the_curve() -> None:
    curves = {"mean": {"units": {"proxy": 2.0, "gold": 0.5}}}
    rewards = {k: [v, v + 2] for k, v in (("helpful", 1.0), ("harmless", 2.0), ("honest", 3.0))}
    metrics = {
        "method": "cvar",
        "kl": {"per_response": {"value": 4.0}},
        "per_prompt": {"mean_reward": rewards},
        "proxy": {"per_prompt": {"mean_reward": rewards}},
    }
    (point,) = policy_points([metrics], curves, RESAMPLING)
    assert point["distance"] == 2.0 and point["method"] == "cvar"
    assert point["gold"]["value"] == pytest.approx(3.0 / 0.5) and point["gold"]["n"] == 2
    assert point["proxy"]["value"] == pytest.approx(3.0 / 2.0)
