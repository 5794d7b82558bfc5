"""The ensemble's heads: bootstrap, initialisation, what fitting and anchoring do, and the stored file."""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from prmd.config.shared import EnsembleConfig
from prmd.rewards import heads
from prmd.rewards.heads import Ensemble, bootstrap_weights, fit_ensemble, head_outputs, initial_heads

IDS = [f"pair-{i}" for i in range(3000)]
N, WIDTH, MEMBERS = 160, 6, 4


def data(seed: int = 0, n: int = N, signal: float = 3.0) -> dict[str, Tensor]:
    """Pairs whose label is carried by one feature that r_0 does not use."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (3 + 2 * torch.randn(n, WIDTH, generator=generator) for _ in range(2))
    chosen[:, 0] += signal
    base = 0.3 * torch.randn(n, 2, generator=generator)
    return {
        "chosen_features": chosen,
        "rejected_features": rejected,
        "chosen_rewards": base[:, 0],
        "rejected_rewards": base[:, 1],
    }


_FITTED: dict[tuple[object, ...], Ensemble] = {}


def fit_anew(pairs: dict[str, Tensor], *, seed: int = 0, **changes: object) -> Ensemble:
    config = EnsembleConfig(**({"members": MEMBERS, "anchor": 1.0, "prior_scale": 1.0} | changes))
    ids = [f"p{i}" for i in range(len(pairs["chosen_rewards"]))]
    return fit_ensemble(**pairs, pair_ids=ids, config=config, seed=seed)


def fit(pairs: dict[str, Tensor], *, seed: int = 0, **changes: object) -> Ensemble:
    """`fit_anew`, each fit made once for all tests."""
    key = (*(float(v.double().sum()) for v in pairs.values()), seed, *sorted(changes.items()))
    if key not in _FITTED:
        _FITTED[key] = fit_anew(pairs, seed=seed, **changes)
    return _FITTED[key]


def margins(ensemble: Ensemble, pairs: dict[str, Tensor]) -> Tensor:
    """r_m(chosen) - r_m(rejected), [n, M]."""
    chosen = ensemble.rewards(pairs["chosen_features"], pairs["chosen_rewards"])
    return chosen - ensemble.rewards(pairs["rejected_features"], pairs["rejected_rewards"])


def base_margins(pairs: dict[str, Tensor]) -> Tensor:
    return pairs["chosen_rewards"] - pairs["rejected_rewards"]


# ------------------------------------------------------------------ bootstrap
def test_bootstrap_weights_are_poisson_one():
    counts = bootstrap_weights(IDS, 20, seed=1).double()
    n = counts.numel()
    assert counts.shape == (20, len(IDS))
    assert abs(counts.mean() - 1) < 4 / math.sqrt(n)
    assert abs(counts.var() - 1) < 4 * math.sqrt(3 / n)  # the fourth central moment of Poisson(1) is 4
    for k in range(5):
        p = math.exp(-1) / math.factorial(k)
        assert abs((counts == k).double().mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    correlation = torch.corrcoef(counts)[~torch.eye(20, dtype=torch.bool)]
    assert correlation.abs().max() < 5 / math.sqrt(len(IDS))


def test_a_bootstrap_weight_follows_from_seed_member_and_pair_alone():
    all_of_them = bootstrap_weights(IDS[:200], 6, seed=7)
    assert torch.equal(bootstrap_weights(IDS[100:200], 3, seed=7), all_of_them[:3, 100:])
    assert not torch.equal(bootstrap_weights(IDS[:200], 6, seed=8), all_of_them)
    for m, i in ((0, 0), (5, 199), (3, 42)):
        digest = hashlib.sha256(f"7|{m}|{IDS[i]}".encode()).digest()
        uniform = int.from_bytes(digest[:7], "little") / 2**56
        cumulative = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)])
        assert all_of_them[m, i] == np.searchsorted(cumulative, uniform, side="right")


# ------------------------------------------------------------------ initialisation
def test_a_member_starts_the_same_whatever_the_number_of_members():
    few, many = initial_heads(WIDTH, 3, seed=2), initial_heads(WIDTH, 9, seed=2)
    for name, tensor in few.items():
        assert torch.equal(tensor, many[name][:3])
    assert not torch.equal(few["weight1"][0], few["weight1"][1])
    assert not torch.equal(few["weight1"], initial_heads(WIDTH, 3, seed=3)["weight1"])


def test_heads_are_three_linear_layers_with_relu():
    weights = initial_heads(WIDTH, 2, seed=0)
    generator = torch.Generator().manual_seed(0)
    weights = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    features = torch.randn(5, WIDTH, generator=generator)
    found = head_outputs(features, weights)
    assert found.shape == (2, 5)
    for m in range(2):
        w = {k: v[m].numpy().astype(float) for k, v in weights.items()}
        hidden = np.maximum(features.numpy() @ w["weight1"] + w["bias1"], 0)
        hidden = np.maximum(hidden @ w["weight2"] + w["bias2"], 0)
        expected = (hidden @ w["weight3"] + w["bias3"])[:, 0]
        np.testing.assert_allclose(found[m].numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prior_scale", [0.5, 1.0, 3.0])
def test_prior_scale_is_the_spread_of_the_heads_margins_over_that_of_the_base(prior_scale, monkeypatch):
    monkeypatch.setattr("prmd.rewards.heads.FIT_STEPS", 150)
    pairs = data()
    anchored = fit(pairs, anchor=1e8, prior_scale=prior_scale)  # so stiff that it stays where it begins
    spread = (margins(anchored, pairs) - base_margins(pairs)[:, None]).std(dim=0)
    wanted = prior_scale * base_margins(pairs).std()
    torch.testing.assert_close(spread, wanted.expand(MEMBERS), rtol=0.02, atol=0.0)


# ------------------------------------------------------------------ fitting
def weighted_loss(ensemble: Ensemble, pairs: dict[str, Tensor]) -> Tensor:
    counts = bootstrap_weights([f"p{i}" for i in range(N)], MEMBERS, seed=0)
    return (counts * torch.log1p(torch.exp(-margins(ensemble, pairs))).T).mean(dim=1)


def test_fitting_reduces_every_members_own_loss_and_generalises():
    pairs, held_out = data(), data(seed=1)
    before, after = fit(pairs, anchor=1e8), fit(pairs)
    assert (weighted_loss(after, pairs) < 0.6 * weighted_loss(before, pairs)).all()
    accuracy = (margins(after, held_out) > 0).float().mean(dim=0)
    assert (accuracy > 0.65).all()
    assert (base_margins(held_out) > 0).float().mean() < 0.6


def test_without_anchor_separable_pairs_are_all_ordered():
    pairs = data(signal=40.0)
    assert (margins(fit(pairs, anchor=0.0), pairs) > 0).all()


def test_a_strong_anchor_keeps_the_disagreement_of_the_initialisation():
    pairs, far = data(), data(seed=5)
    far = {k: 4 * v if k.endswith("features") else v for k, v in far.items()}
    stiff, stiffer, loose = (fit(pairs, anchor=a) for a in (1e6, 1e8, 1.0))
    torch.testing.assert_close(margins(stiff, far), margins(stiffer, far), rtol=0.02, atol=0.02)
    assert (margins(loose, far) - margins(stiff, far)).abs().mean() > 0.2
    on_data = [margins(e, pairs).std(dim=1).mean() / margins(e, pairs).abs().mean() for e in (loose, stiff)]
    assert on_data[0] < on_data[1]  # members agree where the data speaks


def test_members_do_not_influence_each_other():
    pairs = data()
    few, many = fit(pairs, members=2), fit(pairs)
    torch.testing.assert_close(margins(few, pairs), margins(many, pairs)[:, :2], rtol=1e-3, atol=1e-3)


def test_a_member_learns_from_the_pairs_of_its_own_bootstrap_alone(monkeypatch):
    up, down = data(n=80), data(seed=4, n=80)
    swapped = dict(zip(down, [down[k] for k in ("rejected_features", "chosen_features")], strict=False))
    pairs = {k: torch.cat([up[k], (down | swapped)[k]]) for k in up}
    counts = torch.zeros(MEMBERS, N)
    counts[0, :80] = counts[1, 80:] = 1.0
    monkeypatch.setattr("prmd.rewards.heads.bootstrap_weights", lambda ids, members, seed: counts)
    found, start = margins(fit_anew(pairs), pairs), margins(fit_anew(pairs, anchor=1e8), pairs)
    right = (found > 0).float()
    assert right[:80, 0].mean() > 0.85 > 0.5 > right[80:, 0].mean()
    assert right[80:, 1].mean() > 0.85 > 0.5 > right[:80, 1].mean()
    torch.testing.assert_close(found[:, 2:], start[:, 2:], rtol=1e-3, atol=1e-3)  # no pair: as initialised


def test_each_member_has_its_own_offsets(monkeypatch):
    """A member without offsets is as it was; one whose offsets explain the labels learns less from them."""
    monkeypatch.setattr("prmd.rewards.heads.FIT_STEPS", 60)
    pairs = data(n=80)
    offsets = torch.tensor([0.0, 0.0, 4.0, -4.0])[:, None] * torch.ones(80)
    plain, shifted = fit_anew(pairs), fit_anew(pairs | {"offsets": offsets})
    before, after = margins(plain, pairs), margins(shifted, pairs)
    assert torch.equal(after[:, :2], before[:, :2])
    assert after[:, 2].mean() < before[:, 2].mean() < before[:, 2].mean() + 1 < after[:, 3].mean()


def test_weights_of_pairs_multiply_those_of_the_bootstrap(monkeypatch):
    pairs, generator = data(), torch.Generator().manual_seed(3)
    weights = 2 * torch.rand(N, generator=generator)
    bootstrap, met = bootstrap_weights([f"p{i}" for i in range(N)], MEMBERS, seed=0), []
    minimise = heads._minimise

    def caught(*arguments):
        met.append(arguments[4])
        return minimise(*arguments)

    monkeypatch.setattr(heads, "_minimise", caught)
    monkeypatch.setattr(heads, "FIT_STEPS", 40)
    plain, ones = fit_anew(pairs), fit_anew(pairs | {"pair_weights": torch.ones(N)})
    weighted = fit_anew(pairs | {"pair_weights": weights})
    assert torch.equal(met[0], bootstrap) and torch.equal(met[2], bootstrap * weights)
    assert all(torch.equal(plain.weights[k], ones.weights[k]) for k in plain.weights)
    assert not torch.equal(plain.weights["weight3"], weighted.weights["weight3"])


def test_fitting_is_reproducible(monkeypatch):
    monkeypatch.setattr("prmd.rewards.heads.FIT_STEPS", 40)
    pairs = data()
    first, again, other = fit_anew(pairs), fit_anew(pairs), fit_anew(pairs, seed=1)
    assert all(torch.equal(first.weights[k], again.weights[k]) for k in first.weights)
    assert not torch.equal(first.weights["weight1"], other.weights["weight1"])


def test_features_are_standardised_so_that_their_units_do_not_matter():
    pairs = data()
    scaled = {k: 1000 * v + 7 if k.endswith("features") else v for k, v in pairs.items()}
    difference = margins(fit(scaled), scaled) - margins(fit(pairs), pairs)
    assert difference.abs().mean() < 0.01 * margins(fit(pairs), pairs).std()


def test_a_constant_feature_is_harmless(monkeypatch):
    monkeypatch.setattr("prmd.rewards.heads.FIT_STEPS", 40)
    pairs = {k: v.clone() for k, v in data().items()}
    for side in ("chosen_features", "rejected_features"):
        pairs[side][:, 3] = 5.0
    assert torch.isfinite(margins(fit_anew(pairs), pairs)).all()


# ------------------------------------------------------------------ use
def test_rewards_add_the_base_reward():
    pairs, ensemble = data(), fit(data())
    features, base = pairs["chosen_features"], pairs["chosen_rewards"]
    shifted = ensemble.rewards(features, base + 5)
    torch.testing.assert_close(shifted, ensemble.rewards(features, base) + 5)
    assert shifted.dtype == torch.float32
    assert shifted.shape == (N, MEMBERS)
    assert ensemble.members == MEMBERS


def test_saved_heads_come_back_bit_for_bit(tmp_path):
    pairs, ensemble = data(), fit(data())
    ensemble.save(tmp_path / "ensemble.safetensors")
    again = Ensemble.load(tmp_path / "ensemble.safetensors")
    assert torch.equal(margins(again, pairs), margins(ensemble, pairs))
    assert again.weights.keys() == ensemble.weights.keys()
