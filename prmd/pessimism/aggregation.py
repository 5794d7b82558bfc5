"""Pessimism: from the rewards of K objectives x M members to one robust reward.

Here: the operators that combine members of one objective (`within`) and objectives (`across`), and the named methods
as data. Not here: calibration of the rewards (`calibration.py`; every function below expects calibrated units), CVaR itself
(`cvar.py`), margin-level forms (`draft_equations.py`), objective weights that are solved for (`maxmin.py`), and what a policy
learns from R (`policies/targets.py`, to be read next).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prmd.pessimism.cvar import (
    CVAR_ESTIMATORS,
    check_alpha,
    check_weights,
    cvar,
    cvar_effective_atoms,
    weight_columns,
    weighted_standard_deviation,
)


@dataclass(frozen=True)
class Parameters:
    """Numbers that operators read, by the names of `policy`.

    Attributes:
        alpha: tail share of CVaR, in (0, 1].
        cvar_estimator: "empirical" or "gaussian".
        kappa: standard deviations that "lcb" subtracts, >= 0.
        eta: sharpness of "softmin", > 0; zero would be the mean, infinity the minimum.
    """

    alpha: float = 0.1
    cvar_estimator: str = "empirical"
    kappa: float = 1.0
    eta: float = 2.0

    def __post_init__(self) -> None:
        """Refuse, with a ValueError, what no operator could mean."""
        check_alpha(self.alpha)
        if self.cvar_estimator not in CVAR_ESTIMATORS:
            raise ValueError(
                f"cvar_estimator must be one of {', '.join(CVAR_ESTIMATORS)}, got {self.cvar_estimator!r}"
            )
        if not self.kappa >= 0 or not self.eta > 0:
            raise ValueError(f"needs kappa >= 0 and eta > 0, got {self.kappa} and {self.eta}")


# ------------------------------------------------------------------ operators
# Each combines float64 values over dim 0, [n, ...] -> [...], with atom weights [n] that sum to one.
def _mean(values: Tensor, weights: Tensor, parameters: Parameters) -> Tensor:
    return (weight_columns(weights, values) * values).sum(dim=0)


def _min(values: Tensor, weights: Tensor, parameters: Parameters) -> Tensor:
    return values.amin(dim=0)


def _cvar(values: Tensor, weights: Tensor, parameters: Parameters) -> Tensor:
    return cvar(values, alpha=parameters.alpha, weights=weights, estimator=parameters.cvar_estimator)


def _lcb(values: Tensor, weights: Tensor, parameters: Parameters) -> Tensor:
    mean, columns = _mean(values, weights, parameters), weight_columns(weights, values)
    return mean - parameters.kappa * weighted_standard_deviation(values, mean, columns)


def _softmin(values: Tensor, weights: Tensor, parameters: Parameters) -> Tensor:
    shifted = weight_columns(weights, values).log() - parameters.eta * values
    return -torch.logsumexp(shifted, dim=0) / parameters.eta


@dataclass(frozen=True)
class Operator:
    """A way to combine rewards, and the fields of `Parameters` that it reads."""

    combine: Callable[[Tensor, Tensor, Parameters], Tensor]
    reads: tuple[str, ...] = ()


OPERATORS: dict[str, Operator] = {
    "mean": Operator(_mean),
    "min": Operator(_min),
    "cvar": Operator(_cvar, reads=("alpha", "cvar_estimator")),
    "lcb": Operator(_lcb, reads=("kappa",)),
    "softmin": Operator(_softmin, reads=("eta",)),
}
WITHIN = (*OPERATORS, "none")
ACROSS = tuple(name for name in OPERATORS if name != "lcb")  # objectives that differ are no uncertainty


@dataclass(frozen=True)
class Aggregation:
    """How K x M calibrated rewards become one robust reward.

    Attributes:
        within: operator over the members of one objective, one of `WITHIN`; "none" leaves every member an atom of
            the operator across.
        across: operator over objectives (or atoms), one of `ACROSS`; "mean", "cvar" and "softmin" weigh objective k
            by lambda_k, "min" does not; all of them leave out an objective of weight zero.
        parameters: what these operators read.
    """

    within: str
    across: str
    parameters: Parameters = Parameters()

    def __post_init__(self) -> None:
        """Refuse an unknown operator with a ValueError."""
        for field, value, allowed in (("within", self.within, WITHIN), ("across", self.across, ACROSS)):
            if value not in allowed:
                raise ValueError(f"Aggregation: {field} must be one of {', '.join(allowed)}, got {value!r}")

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields of `Parameters` that change this reward."""
        return tuple(
            name for key in (self.within, self.across) if key != "none" for name in OPERATORS[key].reads
        )


METHODS: dict[str, Aggregation] = {
    "mean": Aggregation(within="mean", across="mean"),
    "hard_min": Aggregation(within="min", across="min"),
    "cvar": Aggregation(within="none", across="cvar"),
    "hierarchical": Aggregation(within="cvar", across="min"),
    "lcb": Aggregation(within="lcb", across="mean"),
    "softmin": Aggregation(within="softmin", across="softmin"),
    # With the weights of `maxmin.solve_maxmin` in place of the configured ones.
    "maxmin": Aggregation(within="mean", across="mean"),
}


def method_aggregation(
    name: str,
    *,
    within: str | None = None,
    across: str | None = None,
    parameters: Parameters = Parameters(),
) -> Aggregation:
    """Aggregation of a named method, with its operators changed where given.

    Args:
        name: a key of `METHODS`.
        within: replaces the method's own operator within objectives; None keeps it.
        across: replaces the operator across objectives; None keeps it.
        parameters: what the operators read.

    Raises:
        ValueError: unknown method or operator.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    named = METHODS[name]
    return Aggregation(within or named.within, across or named.across, parameters)


def stack_objectives(rewards: Sequence[Tensor]) -> Tensor:
    """Stack the rewards of each objective's ensemble to [K, M, ...].

    Args:
        rewards: one tensor [M, ...] per objective.

    Returns:
        [K, M, ...].

    Raises:
        ValueError: ensembles of different size or different responses.
    """
    shapes = [list(objective.shape) for objective in rewards]
    if not shapes or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"every objective needs the same members and responses, got shapes {shapes}; score them all"
        )
    return torch.stack(list(rewards))


def robust_rewards(calibrated_rewards: Tensor, *, aggregation: Aggregation, weights: Tensor) -> Tensor:
    """Pessimistic aggregate of calibrated rewards over objectives and members.

    ``R = across_k( within_m( r[k, m] ) )``, for within = "none" ``R = across_{k,m}( r[k, m] )`` with atom weights
    lambda_k / M. Computed in float64 and label-free: the margin R(chosen) - R(rejected) is antisymmetric.

    Args:
        calibrated_rewards: [K, M, ...] in calibrated units.
        aggregation: operators and their parameters.
        weights: objective weights lambda, [K], >= 0, sum 1. An objective of weight zero is left out altogether, of a
            minimum too, whatever its rewards are.

    Returns:
        [...], in the dtype of `calibrated_rewards`.

    Raises:
        ValueError: weights that do not fit or do not sum to one, or rewards that are not finite.

    Source: Eqs. (P6)-(P9) of the AT-PRMD draft, lifted from margins to rewards so that the optimum is a policy.
    """
    _check_shape(calibrated_rewards)
    shares = check_weights(weights, calibrated_rewards.shape[0], calibrated_rewards.device)
    kept = shares > 0
    _check_finite(calibrated_rewards, kept)
    n_members = calibrated_rewards.shape[1]
    values = calibrated_rewards.double()
    if not bool(kept.all()):  # a minimum reads no weights, so what has none must not be there
        values, shares = values[kept], shares[kept]
    if aggregation.within == "none":
        atoms, atom_weights = values.flatten(0, 1), shares.repeat_interleave(n_members) / n_members
    else:
        members_first = values.transpose(0, 1)
        uniform = torch.full((n_members,), 1.0 / n_members, dtype=torch.float64, device=values.device)
        within = OPERATORS[aggregation.within].combine
        atoms, atom_weights = within(members_first, uniform, aggregation.parameters), shares
    across = OPERATORS[aggregation.across].combine
    return across(atoms, atom_weights, aggregation.parameters).to(calibrated_rewards.dtype)


def _check_shape(rewards: Tensor) -> None:
    if rewards.ndim < 2 or 0 in rewards.shape[:2]:
        raise ValueError(f"calibrated rewards must be [K, M, ...], got {list(rewards.shape)}")


def _check_finite(rewards: Tensor, kept: Tensor) -> None:
    """Raise a ValueError where a reward of an objective that is `kept`, [K], is not finite."""
    bad = ~torch.isfinite(rewards)
    bad[~kept] = False
    if bool(bad.any()):
        objective, member = (int(i) for i in bad.nonzero()[0, :2])
        raise ValueError(
            f"{int(bad.sum())} rewards are NaN or infinite, the first of objective {objective}, member {member}; "
            "score the pairs again"
        )


def effective_atoms(aggregation: Aggregation, *, n_members: int, weights: Tensor) -> float | None:
    """Number of equally weighted rewards that the CVaR of an aggregation averages; None where it has none.

    Args:
        n_members: M.
        weights: objective weights, [K].
    """
    if aggregation.within == "cvar":
        atoms = torch.full((n_members,), 1.0 / n_members, dtype=torch.float64)
    elif aggregation.across == "cvar":
        repeats = n_members if aggregation.within == "none" else 1
        atoms = weights.double().repeat_interleave(repeats) / repeats
    else:
        return None
    return cvar_effective_atoms(alpha=aggregation.parameters.alpha, weights=atoms)
