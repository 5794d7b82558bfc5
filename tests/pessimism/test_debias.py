"""The maths of a suspected bias against scipy's own minimiser, and on simulated labels whose bias is known (property 18)."""

import numpy as np
import pytest
from scipy.optimize import minimize

from prmd.pessimism.debias import (
    CLIP,
    bias_columns,
    bias_offsets,
    fit_log_odds,
    log_odds_with_intervals,
    margin_slope,
    member_strengths,
    predicted_share,
    reached_strength,
    root_mean_square,
)

C = 2.2
"""Log-odds of the simulated biases: chosen has more of the feature nine times of ten."""


def test_columns_by_hand_and_antisymmetric() -> None:
    d = np.array([[4.0, 0.0], [-1.0, 2.0], [0.0, -2.0], [80.0, 0.0]])
    rms = np.array([2.0, 1.0])
    z = bias_columns(d, rms)
    assert z.tolist() == [[1, 2, 0, 0], [-1, -0.5, 1, 2], [0, 0, -1, -2], [1, 3, 0, 0]]
    assert (bias_columns(-d, rms) == -z).all()
    assert root_mean_square(d)[1] == pytest.approx(np.sqrt(2.0))
    with pytest.raises(ValueError, match="rms"):
        bias_columns(d, np.array([1.0, 0.0]))


def test_log_odds_are_those_of_a_general_minimiser() -> None:
    rng = np.random.default_rng(0)
    z = bias_columns(rng.normal([0.4, -0.2, 0.0], 1.0, (300, 3)), np.ones(3))
    found = minimize(lambda b: np.log1p(np.exp(-z @ b)).sum() + 0.005 * (b**2).sum(), np.zeros(6), tol=1e-12)
    assert np.abs(fit_log_odds(z) - found.x).max() < 1e-4
    same = np.ones((50, 1))  # separated: the ridge alone keeps it finite
    b = fit_log_odds(same)[0]
    assert 50 / (1 + np.exp(b)) == pytest.approx(0.01 * b)


def test_sign_alone_is_the_log_odds_of_its_share() -> None:
    d = np.repeat([1.0, -1.0, 0.0], [90, 10, 30])[:, None]
    b = fit_log_odds(np.sign(d), ridge=1e-9)
    assert b[0] == pytest.approx(np.log(9.0), rel=1e-6)
    assert predicted_share(d[:, 0]) == pytest.approx((90 + 15) / 130)
    assert predicted_share(-d[:, 0]) == pytest.approx((90 + 15) / 130)
    assert predicted_share(np.zeros(4)) == 0.5


def test_offsets_are_clipped_and_change_sign_with_the_pair() -> None:
    z, b = np.array([[1.0, 2.0], [1.0, 0.1], [0.0, 0.0]]), np.array([1.0, 2.0])
    assert bias_offsets(z, b) == pytest.approx([CLIP, 1.2, 0.0])
    assert (bias_offsets(-z, b) == -bias_offsets(z, b)).all()


def test_strengths_of_members() -> None:
    assert member_strengths((0.0, 1.0), 5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert member_strengths((1.0, 1.0), 3) == [1.0, 1.0, 1.0]


def test_intervals_cover_and_pairs_of_one_prompt_count_once() -> None:
    rng, inside = np.random.default_rng(1), 0
    for _ in range(300):
        z = np.where(rng.random(200) < 1 / (1 + np.exp(-0.8)), 1.0, -1.0)[:, None]
        found = log_odds_with_intervals(z, np.arange(200))
        inside += found.low[0] <= 0.8 <= found.high[0]
    assert 0.92 <= inside / 300 <= 0.98
    once = log_odds_with_intervals(z, np.arange(200))
    repeated = log_odds_with_intervals(np.tile(z, (4, 1)), np.tile(np.arange(200), 4))
    assert repeated.values == pytest.approx(once.values, rel=1e-3)
    assert repeated.high - repeated.low == pytest.approx(once.high - once.low, rel=0.01)


# ------------------------------------------------------------------ property 18
def bradley_terry(features: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of a linear reward trained with these offsets, and their standard errors, by scipy."""

    def loss(w: np.ndarray) -> float:
        return np.logaddexp(0, -(features @ w + offsets)).sum()

    def gradient(w: np.ndarray) -> np.ndarray:
        return -features.T @ (1 / (1 + np.exp(features @ w + offsets)))

    w = minimize(loss, np.zeros(features.shape[1]), jac=gradient, tol=1e-12).x
    p = 1 / (1 + np.exp(features @ w + offsets))
    return w, np.sqrt(np.diag(np.linalg.inv((features * (p * (1 - p))[:, None]).T @ features)))


def drawn(n: int, seed: int, *, selected: bool) -> tuple[np.ndarray, np.ndarray]:
    """Differences (chosen - rejected) of what is truly good and of a feature that is independent of it.

    Selected: labelled by r* alone, then kept so that the chosen response has more of the feature with log-odds C.
    Raters: C for more of the feature is added to the log-odds of the label.
    """
    rng = np.random.default_rng(seed)
    good, feature = 1.5 * rng.normal(size=n), rng.normal(size=n)
    bias = 0.0 if selected else C * np.sign(feature)
    side = np.where(rng.random(n) < 1 / (1 + np.exp(-good - bias)), 1.0, -1.0)
    good, feature = side * good, side * feature
    if selected:
        kept = rng.random(n) < 1 / (1 + np.exp(-C * np.sign(feature)))
        good, feature = good[kept], feature[kept]
    return good, feature


@pytest.mark.parametrize("selected", [True, False])
def test_what_debiasing_leaves_of_a_known_bias(selected: bool) -> None:
    good, feature = drawn(16_000, 3, selected=selected)
    d = feature[:, None]
    z = bias_columns(d, root_mean_square(d))
    b = log_odds_with_intervals(np.sign(d), np.arange(len(d)))
    error = (b.high[0] - b.low[0]) / 2
    a = bias_offsets(np.sign(d), b.values)
    design = np.stack([good, np.sign(feature)], axis=1)
    plain, _ = bradley_terry(design, np.zeros(len(a)))
    debiased, errors = bradley_terry(design, a)
    assert plain[0] == pytest.approx(1.0, abs=0.1)
    if selected:
        assert abs(b.values[0] - C) < error  # 2 s.e.
        assert abs(debiased[1]) < 2 * errors[1] and abs(plain[1] - C) < 4 * errors[1]
        assert debiased[0] == pytest.approx(1.0, abs=0.06)
    else:  # a bias of the raters is attenuated, so that s = 1 leaves some of it
        assert b.values[0] + error < C
        assert 2 * errors[1] < debiased[1] < plain[1] - 2 * errors[1]
        assert debiased[1] / C == pytest.approx(0.27, abs=0.05)
    both = bias_offsets(z, fit_log_odds(z))
    assert np.corrcoef(a, both)[0, 1] > 0.98  # the size column adds nothing here


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_strength_reached_is_the_one_asked_for(strength: float) -> None:
    good, feature = drawn(16_000, 5, selected=True)
    x = np.sign(feature)
    b = fit_log_odds(x[:, None])
    a = bias_offsets(x[:, None], b)
    w, _ = bradley_terry(np.stack([good, x], axis=1), strength * a)
    margins = w[0] * good + w[1] * x
    for unit in (1.0, 7.0):  # whatever the unit of the reward
        found = reached_strength(unit * margins, a, np.arange(len(a)))
        assert found.values == pytest.approx([strength], abs=1e-3)
        assert 0.05 < found.high[0] - found.low[0] < 0.2
    slope = margin_slope(margins, x)
    assert slope == pytest.approx((1 - strength) * C, abs=0.12)


def test_undefined_measures_are_none() -> None:
    some = np.linspace(-1, 1, 30)
    for margins, offsets in ((some, 0 * some), (1 + 0 * some, some), (some + 2, 1 + 0.1 * some)):
        assert reached_strength(margins, offsets, np.arange(30)) is None
    assert margin_slope(some, np.ones(30)) is None
    assert margin_slope(2 * some + 5, some) == pytest.approx(2.0)
