"""The table of methods: what each reads, needs and refuses, and that no two are the same on the shipped configuration."""

from itertools import combinations
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tiny_scores import K, M, N, random_scores, reference

from prmd.config.policy import PairsConfig, PolicyConfig, PolicySection, policy_methods
from prmd.config.shared import CalibrationConfig
from prmd.errors import ConfigError
from prmd.objectives import OBJECTIVES
from prmd.policies.methods import (
    BASELINE,
    POLICY_METHODS,
    SOUP,
    check_methods,
    reference_sample_count,
    settings_read,
)
from prmd.policies.notes import method_notes
from prmd.policies.pairs import PairScores, ScaleResponses
from prmd.policies.targets import Targets, method_targets, policy_loss

SHIPPED = PolicyConfig()
NAMES = tuple(method for method in POLICY_METHODS if method not in (BASELINE, SOUP))


def read_by(method: str, policy: dict[str, Any] | None = None, pairs: int = 0) -> dict[str, Any]:
    return settings_read(PolicySection(**(policy or {})), PairsConfig(reference_samples=pairs), method)


def check(method: str, policy: dict[str, Any], pairs: int = 0, source: str = "validation_responses") -> None:
    samples = reference_sample_count(PairsConfig(reference_samples=pairs), CalibrationConfig(source=source))
    check_methods((method,), PolicySection(**policy), samples=samples)


def test_the_configuration_names_exactly_the_methods_there_are() -> None:
    assert set(policy_methods()) == set(POLICY_METHODS) - {BASELINE}


# ------------------------------------------------------------------ all differ
def gradient_of(method: str, scores: PairScores, scale: ScaleResponses) -> torch.Tensor:
    """d loss / d implicit margin of every pair: what tells one training from another."""
    policy, columns = SHIPPED.policy, {}
    if POLICY_METHODS[method].reads_rewards:
        found = method_targets(policy, method, train=scores, held_out=scores, scale=scale)
        columns = {name: values.float() for name, values in found.columns[0].items()}
    generator = torch.Generator().manual_seed(3)
    logps = (scores.ref_logps + 4 * torch.randn(N, 2, generator=generator)).requires_grad_()
    columns |= {"ref_logps": scores.ref_logps, "chosen_length": torch.ones(N)}
    columns |= {name: 9 * torch.randn(N, generator=generator) for name in ("length_difference", "offsets")}
    policy_loss(logps, columns, policy, kind=POLICY_METHODS[method].loss).loss.sum().backward()
    return logps.grad


def test_all_named_methods_differ_on_the_shipped_configuration() -> None:
    assert SHIPPED.policy.alpha == 0.1 and SHIPPED.shared.ensemble.members == M
    scores, scale = random_scores(seed=6), reference()
    scores = PairScores(scores.rewards, scores.ref_logps, torch.arange(N) % K)
    trained = [name for name in NAMES if POLICY_METHODS[name].objective is None]
    found = {name: gradient_of(name, scores, scale) for name in trained}
    for a, b in combinations(found, 2):
        differ = ((found[a] - found[b]).abs() > 1e-6).any(dim=1).float().mean()
        assert differ > 0.8 or {a, b} == {"mean", "paper_eq5"}, (a, b, differ)
    # the weighted sum of squares has other targets than mean, and its gradient where none is clipped: it says so
    rows = method_targets(SHIPPED.policy, "paper_eq5", train=scores, held_out=scores, scale=scale)
    mean = method_targets(SHIPPED.policy, "mean", train=scores, held_out=scores, scale=scale).train
    apart = (rows.columns[0]["objective_targets"] - mean[:, None]).abs() > 1e-6
    assert apart.float().mean() > 0.9 and any("its gradient is that of mean" in note for note in rows.notes)
    assert {POLICY_METHODS[f"dpo_{k}"].objective for k in OBJECTIVES} == set(OBJECTIVES)


def test_nothing_coincides_on_the_shipped_ensemble() -> None:
    scores = random_scores(seed=6)
    for method in NAMES:
        notes = method_notes(SHIPPED.policy, method, scores, torch.ones(N))
        assert not [note for note in notes if " = " in note], (method, notes)


# ------------------------------------------------------------------ coincidences
def notes_of(method: str, scores: PairScores, **policy: Any) -> str:
    return "\n".join(method_notes(PolicySection(**policy), method, scores, torch.ones(N)))


def test_one_member_and_small_alpha_are_said() -> None:
    alone, three = random_scores(m=1), random_scores(m=3)
    assert "paper_eq6 = edpo, paper_eq5, paper_eq7: one member per objective" in notes_of("paper_eq6", alone)
    assert "edpo = paper_eq5, paper_eq6, paper_eq7: one member" in notes_of("edpo", alone)
    assert "paper_eq7 = paper_eq6: CVaR averages 0.3 <= 1 members" in notes_of("paper_eq7", three)
    assert "paper_eq7 = " not in notes_of("paper_eq7", three, alpha=0.5)
    assert "hierarchical = cvar, hard_min: its CVaR averages 0.3 <= 1 members" in notes_of(
        "hierarchical", three
    )


def test_the_margin_level_of_hard_min_is_equation_nine() -> None:
    scores = random_scores()
    assert "hard_min = paper_eq9: the same worst case" in notes_of("hard_min", scores, level="margin")
    assert "paper_eq9 = hard_min" in notes_of("paper_eq9", scores, level="margin", methods=["hard_min"])
    assert " = " not in notes_of("hard_min", scores, level="margin", loss="bce")  # P9 is squared


def test_members_that_are_one_model_are_said() -> None:
    scores = random_scores()
    same = scores.rewards.clone()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(M, N, 2, generator=generator, dtype=torch.float64)
    same[1] = same[1, :1] + 0.01 * noise
    said = notes_of("hard_min", PairScores(same, scores.ref_logps))
    assert "members of harmless correlate 0.99" in said or "members of harmless correlate 1.0" in said
    assert "helpful correlate" not in said
    assert "correlate" not in notes_of("mean", PairScores(same, scores.ref_logps))
    assert "correlate" in notes_of("edpo", PairScores(same, scores.ref_logps))


# ------------------------------------------------------------------ fingerprints
READ = {
    "mean": {
        "loss",
        "level",
        "reward_scale",
        "kl_target",
        "gamma",
        "nll_weight",
        "beta",
        "weights",
        "margin_clip",
    },
    "cvar": {"alpha", "cvar_estimator", "kl_target"},
    "lcb": {"kappa"},
    "softmin": {"eta"},
    "paper_eq7": {"alpha", "gamma", "margin_clip"},
    "edpo": {"gamma", "margin_clip", "kl_target"},
    "ipo": {"ipo_beta", "beta", "nll_weight"},
    "dpo": {"beta", "nll_weight", "weights"},
    "rdpo": {"beta", "nll_weight", "weights", "rdpo_alpha"},
    "dpo_debiased": {"beta", "nll_weight", "weights"},
    "modpo": {"weights", "beta"},
    BASELINE: {"beta", "weights"},
}
NOT_READ = {
    "mean": {"alpha", "kappa", "eta", "huber_delta", "ipo_beta"},
    "hard_min": {"alpha", "cvar_estimator", "kappa", "eta"},
    "paper_eq6": {"alpha", "loss", "level", "huber_delta"},
    "edpo": {"alpha", "loss", "level"},
    "dpo": {"kl_target", "gamma", "alpha", "ipo_beta", "loss", "margin_clip", "rdpo_alpha"},
    "dpo_honest": {"weights", "kl_target"},
    BASELINE: {"nll_weight", "gamma", "kl_target"},
}
CHANGED: dict[str, Any] = {
    "loss": "bce", "level": "margin", "reward_scale": 2.0, "kl_target": 1.0, "gamma": 0.1, "nll_weight": 0.2, "beta": 0.3,
    "weights": {"helpful": 0.5, "harmless": 0.25, "honest": 0.25}, "margin_clip": 3.0, "alpha": 0.4, "kappa": 3.0, "eta": 5.0,
    "cvar_estimator": "gaussian", "ipo_beta": 0.5, "rdpo_alpha": 0.5, "huber_delta": 0.3,
}  # fmt: skip


@pytest.mark.parametrize(("table", "changes"), [(READ, True), (NOT_READ, False)], ids=["read", "not read"])
def test_a_fingerprint_changes_with_what_is_read_and_with_nothing_else(
    table: dict[str, set[str]], changes: bool
) -> None:
    for method, names in table.items():
        before = read_by(method)
        for name in names:
            after = read_by(method, {name: CHANGED[name]})
            assert (before != after) is changes, (method, name)


def test_pairs_of_reference_samples_are_part_of_distilled_methods_alone() -> None:
    for method, changes in (
        ("mean", True),
        ("edpo", True),
        ("dpo", False),
        ("ipo", False),
        (BASELINE, False),
    ):
        assert (read_by(method) != read_by(method, pairs=4)) is changes


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("method", "policy", "named"),
    [
        ("maxmin", {}, "policy.methods"),
        ("mean", {"gamma": 0.1}, "policy.gamma"),
        ("edpo", {"gamma": 0.1}, "policy.gamma"),
        ("cvar", {"constraints": {"honest": 0.1}}, "policy.constraints"),
    ],
)
def test_methods_that_need_reference_samples_need_some(
    method: str, policy: dict[str, Any], named: str
) -> None:
    with pytest.raises(
        ConfigError, match=rf"{named}: {method} needs samples .*pairs\.reference_samples=16"
    ) as refusal:
        check(method, policy)
    assert "\n" not in str(refusal.value)
    check(method, policy, pairs=2)
    check(method, policy, source="reference_samples")
    check("dpo", policy)


def test_samples_are_those_of_the_pairs_or_of_the_calibration() -> None:
    own, none = PairsConfig(reference_samples=6), PairsConfig()
    held, drawn = (
        CalibrationConfig(source=source) for source in ("validation_responses", "reference_samples")
    )
    assert [reference_sample_count(none, held), reference_sample_count(own, held)] == [0, 6]
    assert [reference_sample_count(none, drawn), reference_sample_count(own, drawn)] == [4, 6]


def test_maxmin_needs_one_reward_per_objective() -> None:
    with pytest.raises(ConfigError, match="within: none leaves maxmin no reward per objective"):
        check("maxmin", {"within": "none"}, pairs=4)


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        (PolicySection, {"alpha": 0.0}, "greater than 0"),
        (PolicySection, {"alpha": 1.01}, "less than or equal to 1"),
        (PolicySection, {"weights": {"helpful": 0.5, "harmless": 0.5, "honest": 0.5}}, "sum to 1"),
        (PolicyConfig, {"policy": {"weights": {"helpful": 0.5, "harmless": 0.5}}}, "missing .'honest'"),
        (
            PolicyConfig,
            {"policy": {"weights": {"helpful": 0.5, "harmless": 0.3, "honest": 0.2, "kind": 0.0}}},
            "unknown .'kind'",
        ),
        (PolicySection, {"weights": {"helpful": 1.5, "harmless": -0.5, "honest": 0.0}}, "at least 0"),
        (
            PolicyConfig,
            {"policy": {"constraints": {"kind": 0.1}}},
            "constraints name .'kind'.*known objectives are helpful",
        ),
        (PolicySection, {"methods": ["meen"]}, "meen|Input should be"),
        (
            PolicyConfig,
            {"policy": {"methods": ["dpo_kind"]}},
            "methods name .'kind'.*known objectives are helpful",
        ),
        (PolicySection, {"gamma": -1.0}, "greater than or equal to 0"),
        (PairsConfig, {"reference_samples": 1}, "at least 2: one response makes no pair"),
        (PairsConfig, {"share": 1.0}, "less than 1"),
    ],
)
def test_values_that_cannot_be(section: type, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        section(**values)


def test_targets_hold_nothing_for_the_loss_by_default() -> None:
    assert Targets(torch.ones(1), torch.ones(1), 1.0, ()).columns == ({}, {})
