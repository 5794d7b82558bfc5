"""Random calibrated rewards and reference samples of K objectives x M members, and a tiny policy with rows to train it on."""

from pathlib import Path

import torch
from tiny_models import tiny_causal_lm
from torch import Tensor

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import ModelConfig
from prmd.models.loading import load_causal_lm
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow
from prmd.policies.pairs import PairScores, ScaleResponses

K, M, N = 3, 20, 40
ROWS = [
    PrefixRow((1, 50, 60, 70), ((80, 81, 82, 2), (90, 91, 2))),
    PrefixRow((1, 51), ((83, 2), (92, 93, 94, 2))),
    PrefixRow((1, 52, 53), ((84, 85, 2), (95, 2))),
]


def random_scores(seed: int = 0, k: int = K, m: int = M, n: int = N) -> PairScores:
    """Calibrated rewards with what members share, what objectives share, and noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rewards = normal(1, 1, n, 2) + normal(k, 1, n, 2) + 0.7 * normal(k, m, n, 2)
    return PairScores(rewards, -10 - 5 * normal(n, 2).abs().float())


def scale_of(scores: PairScores) -> ScaleResponses:
    n = scores.rewards.shape[2]
    return ScaleResponses(scores.rewards.flatten(2), torch.arange(n).repeat_interleave(2), "pairs")


def reference(k: int = K, m: int = M, prompts: int = 30, n: int = 24, seed: int = 9) -> ScaleResponses:
    """Scored reference samples whose objectives differ, so that maxmin does not weigh them alike."""
    generator = torch.Generator().manual_seed(seed)
    shape = (k, 1, prompts, n)
    shared = torch.randn(1, 1, prompts, n, generator=generator, dtype=torch.float64)
    own = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        * torch.tensor([1.0, 0.6, 0.8]).double()[:k, None, None, None]
    )
    members = 0.5 * torch.randn(k, m, prompts, n, generator=generator, dtype=torch.float64)
    rewards = (own + 0.4 * shared + members).flatten(2)
    return ScaleResponses(rewards, torch.arange(prompts).repeat_interleave(n), "samples", n)


def tiny_policy(folder: Path) -> SequenceLogps:
    """A policy with full weights, in float32."""
    model = ModelConfig(name=str(tiny_causal_lm(folder / "base")), revision=None, dtype="float32")
    return SequenceLogps(load_causal_lm(model, ArtifactPaths(folder, "embedded")))
