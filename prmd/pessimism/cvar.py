"""Lower tail: CVaR of weighted atoms, and the checks of its inputs.

Here: one operator over the first axis of a tensor. Not here: which atoms go into it (`aggregation.py`, to be read
next), the lower tail over prompts in an evaluation (`statistics/outcomes.py`).
"""

import math

import torch
from scipy.stats import norm
from torch import Tensor

CVAR_ESTIMATORS = ("empirical", "gaussian")


def cvar(
    values: Tensor, *, alpha: float, weights: Tensor | None = None, estimator: str = "empirical"
) -> Tensor:
    """Conditional value at risk of the lower tail over dim 0: mean of the worst share `alpha`.

    Empirical: sort the atoms and take weight from the lowest until alpha is used up, the last atom in part. With n
    equal atoms and ``alpha * n = j + f``: ``(sum_{i<=j} x_(i) + f * x_(j+1)) / (alpha * n)``; alpha = 1 is the mean and
    alpha * n <= 1 the minimum. Gaussian: ``mean - phi(Phi^-1(alpha)) / alpha * sd``, sd with divisor n.

    Args:
        values: [n, ...].
        alpha: tail share, in (0, 1].
        weights: weight of each atom, [n], >= 0, sum 1; None for equal ones. Atoms of weight zero never count.
        estimator: one of `CVAR_ESTIMATORS`.

    Returns:
        [...], in the dtype of `values`, computed in float64.

    Raises:
        ValueError: alpha outside (0, 1], unknown estimator, weights that do not fit.

    Source: Rockafellar and Uryasev 2000 (the maximum of ``nu - E[(nu - X)_+] / alpha``).
    """
    check_alpha(alpha)
    if estimator not in CVAR_ESTIMATORS:
        raise ValueError(f"cvar: estimator must be one of {', '.join(CVAR_ESTIMATORS)}, got {estimator!r}")
    n = values.shape[0]
    equal = torch.full((n,), 1.0 / n, dtype=torch.float64, device=values.device)
    shares = equal if weights is None else check_weights(weights, n, values.device)
    columns = weight_columns(shares, values)
    atoms = values.double()
    if estimator == "gaussian":
        mean = (columns * atoms).sum(dim=0)
        factor = 0.0 if alpha == 1 else norm.pdf(norm.ppf(alpha)) / alpha
        return (mean - factor * weighted_standard_deviation(atoms, mean, columns)).to(values.dtype)
    ordered, order = atoms.sort(dim=0)
    sorted_weights = columns.expand_as(atoms).gather(0, order)
    # Weight still to be taken before each atom. Sums such as 0.1 + 0.2 miss alpha by 1e-17; without the snap that
    # crumb would be an atom of its own.
    remaining = alpha - (sorted_weights.cumsum(dim=0) - sorted_weights)
    remaining = torch.where(remaining.abs() < 1e-12 * alpha, 0.0, remaining).clamp_min(0.0)
    taken = torch.minimum(sorted_weights, remaining)
    return ((taken * ordered).sum(dim=0) / taken.sum(dim=0)).to(values.dtype)


def cvar_effective_atoms(*, alpha: float, weights: Tensor) -> float:
    """Number of equally weighted atoms the CVaR tail averages: ``alpha / sum(w**2)``, alpha n of n equal weights.

    Args:
        alpha: tail share, in (0, 1].
        weights: atom weights, [n], sum 1.

    Returns:
        Effective atoms; of equal weights, at most 1 means that CVaR is the minimum.

    Raises:
        ValueError: alpha outside (0, 1].
    """
    check_alpha(alpha)
    return alpha / float(weights.double().square().sum())


def check_alpha(alpha: float) -> None:
    """Refuse a tail share outside (0, 1] with a ValueError."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha}")


def check_weights(weights: Tensor, n: int, device: torch.device) -> Tensor:
    """Weights as float64 [n] on `device`, summing to one exactly; a ValueError where they are no weights."""
    # looked at where they are, not on `device`: a GPU would have to be waited for
    shares = torch.as_tensor(weights, dtype=torch.float64)
    if shares.shape != (n,):
        raise ValueError(f"weights must be [{n}], one for each objective or atom, got {list(shares.shape)}")
    total = float(shares.sum())
    if not bool((shares >= 0).all()) or not math.isclose(total, 1.0, abs_tol=1e-6):
        raise ValueError(f"weights must be >= 0 and sum to one, got {shares.tolist()} (sum {total:.6g})")
    return (shares / total).to(device, non_blocking=True)


def weight_columns(weights: Tensor, values: Tensor) -> Tensor:
    """Weights [n] in a shape that broadcasts against values [n, ...]."""
    return weights.reshape(-1, *[1] * (values.ndim - 1))


def weighted_standard_deviation(values: Tensor, mean: Tensor, columns: Tensor) -> Tensor:
    """Standard deviation over dim 0 about `mean`, with atom weights in `columns` that broadcast."""
    # Divisor n, not n - 1: one member has no spread, rather than an undefined one.
    return (columns * (values - mean).square()).sum(dim=0).sqrt()
