"""The ensemble of a reward model: M small anchored heads on the frozen features of r_0.

    r_m(x, y) = r_0(x, y) + f_m(h(x, y)),   f_m = linear . ReLU . linear . ReLU . linear

Every head is fit on its own Poisson bootstrap and pulled towards its own random initialisation: members agree where the
data speaks and keep disagreeing where it does not. Features come from `reward_model`; pessimism over the members is in
`pessimism.aggregation`.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from prmd.artifacts import io
from prmd.config.shared import EnsembleConfig
from prmd.pessimism.losses import bradley_terry_loss

HIDDEN = 128
FIT_STEPS = 400
FIT_PAIRS_AT_ONCE = 2048
FIT_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Ensemble:
    """Fitted heads.

    Attributes:
        weights: float32 tensors `weight1` [M, d, 128], `bias1` [M, 128], `weight2` [M, 128, 128], `bias2` [M, 128],
            `weight3` [M, 128, 1], `bias3` [M, 1], and `mean`, `std` [d] that standardise the features.
    """

    weights: dict[str, Tensor]

    @property
    def members(self) -> int:
        return self.weights["weight1"].shape[0]

    def rewards(self, features: Tensor, base_rewards: Tensor) -> Tensor:
        """r_m [S, M] float32 from features [S, d] and r_0 [S]."""
        weights = {name: tensor.to(features.device) for name, tensor in self.weights.items()}
        standardised = (features.float() - weights["mean"]) / weights["std"]
        return base_rewards.float()[:, None] + head_outputs(standardised, weights).T

    def save(self, path: Path) -> None:
        io.write_tensors(path, self.weights)

    @classmethod
    def load(cls, path: Path) -> "Ensemble":
        return cls(io.read_tensors(path))


def head_outputs(features: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """f_m of all members: [M, S] from standardised features [S, d]."""
    hidden = torch.einsum("sd,mdh->msh", features, weights["weight1"]) + weights["bias1"][:, None]
    hidden = torch.baddbmm(weights["bias2"][:, None], functional.relu(hidden), weights["weight2"])
    return torch.baddbmm(weights["bias3"][:, None], functional.relu(hidden), weights["weight3"]).squeeze(-1)


def bootstrap_weights(pair_ids: Sequence[str], members: int, seed: int) -> Tensor:
    """w_{m,i} ~ Poisson(1) from a hash of (seed, member, pair id): [M, n], the same on every machine."""
    uniform = torch.tensor(
        [[_hash_uniform(f"{seed}|{m}|{pair}") for pair in pair_ids] for m in range(members)]
    )
    counts = torch.zeros_like(uniform)
    cumulative, term = torch.zeros(()), math.exp(-1.0)
    for k in range(1, 12):
        cumulative = cumulative + term
        counts += (uniform >= cumulative).float()
        term /= k
    return counts


def _hash_uniform(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:7], "little") / 2**56


def initial_heads(width: int, members: int, seed: int) -> dict[str, Tensor]:
    """theta_m^0: He-initialised weights and zero biases, each member from its own generator."""
    shapes = {"1": (width, HIDDEN), "2": (HIDDEN, HIDDEN), "3": (HIDDEN, 1)}
    weights: dict[str, Tensor] = {}
    for layer, (inputs, outputs) in shapes.items():
        drawn = []
        for m in range(members):
            generator = torch.Generator().manual_seed(int(_hash_uniform(f"{seed}|{m}|{layer}") * 2**53))
            drawn.append(torch.randn(inputs, outputs, generator=generator) * math.sqrt(2.0 / inputs))
        weights[f"weight{layer}"] = torch.stack(drawn)
        weights[f"bias{layer}"] = torch.zeros(members, outputs)
    return weights


def fit_ensemble(
    *,
    chosen_features: Tensor,
    rejected_features: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    pair_ids: Sequence[str],
    config: EnsembleConfig,
    seed: int,
    offsets: Tensor | None = None,
    pair_weights: Tensor | None = None,
) -> Ensemble:
    """Fit M heads on pairs that the backbone never saw.

        L_m = (1/n) sum_i w_{m,i} w_i [-log sigma(r_m(y_w) - r_m(y_l) + s_m a_i)] + (anchor/n) ||theta_m - theta_m^0||^2

    Args:
        chosen_features, rejected_features: [n, d] float32.
        chosen_rewards, rejected_rewards: r_0, [n].
        config: members, anchor, and prior_scale (sd of f_m's margin at theta^0 over sd of r_0's margin).
        offsets: s_m a_i of each member and pair (`debias.Debiasing`), [M, n]; None: 0.
        pair_weights: w_i, which multiplies the bootstrap's w_{m,i}, [n]; None: 1.

    Returns:
        The fitted heads. Sources: arXiv:2402.00396 (epistemic heads), arXiv:1805.07805 (anchored ensembles).
    """
    both = torch.cat([chosen_features, rejected_features]).float()
    mean, std = both.mean(0), both.std(0).clamp_min(1e-6)
    chosen, rejected = (chosen_features.float() - mean) / std, (rejected_features.float() - mean) / std
    weights = {k: v.to(both.device) for k, v in initial_heads(both.shape[1], config.members, seed).items()}
    prior = (head_outputs(chosen, weights) - head_outputs(rejected, weights)).std(dim=1)
    wanted = config.prior_scale * (chosen_rewards - rejected_rewards).float().std()
    weights["weight3"] = weights["weight3"] * (wanted / prior.clamp_min(1e-12))[:, None, None]
    counts = bootstrap_weights(pair_ids, config.members, seed).to(both.device)
    if pair_weights is not None:
        counts = counts * pair_weights.to(counts)
    margins = (chosen_rewards - rejected_rewards).float()
    shifts = None if offsets is None else offsets.float().to(both.device)
    fitted = _minimise(weights, chosen, rejected, margins, counts, config.anchor, seed, shifts)
    return Ensemble(
        {**{k: v.detach().cpu() for k, v in fitted.items()}, "mean": mean.cpu(), "std": std.cpu()}
    )


def _minimise(
    start: dict[str, Tensor],
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor,
    counts: Tensor,
    anchor: float,
    seed: int,
    offsets: Tensor | None,
) -> dict[str, Tensor]:
    """Adam on all members at once; their losses share no parameter, so each is minimised on its own."""
    n = len(margins)
    weights = {k: v.clone().requires_grad_() for k, v in start.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=FIT_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, FIT_STEPS)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(FIT_STEPS):
        index = torch.randperm(n, generator=generator)[:FIT_PAIRS_AT_ONCE].to(chosen.device)
        difference = (
            head_outputs(chosen[index], weights) - head_outputs(rejected[index], weights) + margins[index]
        )
        losses = bradley_terry_loss(
            chosen_rewards=difference,
            rejected_rewards=torch.zeros_like(difference),
            centering_coefficient=0.0,
            offsets=None if offsets is None else offsets[:, index],
        )
        penalty = sum((weights[k] - start[k]).square().sum() for k in weights)
        loss = (counts[:, index] * losses).mean(dim=1).sum() + anchor / n * penalty
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weights
