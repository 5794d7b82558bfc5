"""One policy of the gold-reward study: trained once, evaluated by the true rewards at checkpoints on the way.

A unit is a method at a bias and a seed with its settings; its file holds one row per checkpoint (KL from pi_ref, true win
rates and rewards, length) and is written last, so a unit is finished or absent. KL is matched between checkpoints in
`gold/summary.py`. Which units the study has is in `gold/plan.py`.
"""

import contextlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.gold.ensembles import BOOTSTRAP, NONE, RewardScorer, load_scorer, load_scores
from benchmarks.gold.models import Samples, fit, model_config, sample, score
from benchmarks.gold.reference import World, truth_of, with_length_cost
from benchmarks.gold.targets import (
    Distilled,
    calibrated_like,
    choose_members,
    distilled,
    pooled,
    training_data,
)
from benchmarks.gold.world import LENGTH_COST, prompt_tokens
from prmd.artifacts import io
from prmd.config.policy import PairsConfig, PolicySection
from prmd.inference.generation import sample_rows
from prmd.inference.kl import response_kls
from prmd.models.sequence_models import SequenceLogps
from prmd.objectives import OBJECTIVES
from prmd.policies.methods import POLICY_METHODS, settings_read
from prmd.policies.targets import policy_loss
from prmd.runtime import get_device, set_seed
from prmd.statistics.outcomes import pairwise_win_rate


@dataclass(frozen=True)
class Unit:
    """One training.

    Attributes:
        method: of `policy.methods`.
        settings: changed `policy` settings, as (name, value) pairs.
        members: heads of each ensemble; 1 is r_0 alone.
        raw: rewards are left uncalibrated.
        proxy: also measure what the method's own reward models think of its samples.
        family: of the reward models' heads (`gold/ensembles.py`); `NONE` for a method that learns from the labels.
        length_cost: of the true rewards; below 0 length is truly good.
    """

    method: str
    bias: float
    seed: int
    settings: tuple[tuple[str, float], ...] = ()
    members: int = 20
    raw: bool = False
    proxy: bool = False
    family: str = BOOTSTRAP
    length_cost: float = LENGTH_COST

    @property
    def policy(self) -> PolicySection:
        """The `policy` section of this unit: shipped values where nothing is changed."""
        return PolicySection(**dict(self.settings))

    @property
    def facts(self) -> dict[str, Any]:
        """What its keys are made of; a family that follows from the method and the usual true rewards are left out."""
        found = asdict(self)
        if self.family in (NONE, BOOTSTRAP):
            del found["family"]
        if self.length_cost == LENGTH_COST:
            del found["length_cost"]
        return found

    def path(self, root: Path) -> Path:
        """Its file below the folder of results; another one where a shipped value that it reads has changed."""
        values = settings_read(self.policy, PairsConfig(), self.method)
        key = io.fingerprint([self.facts, values])[:10]
        return root / f"seed-{self.seed}" / "units" / f"{self.method}-{key}.json"


@dataclass
class _Checkpoints(TrainerCallback):
    """Evaluates the policy at given optimiser steps."""

    steps: tuple[int, ...]
    world: World
    policy: LlamaForCausalLM
    unit: Unit
    proxy: "_Proxy | None"
    rows: list[dict[str, Any]] = field(default_factory=list)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step in self.steps:
            self.policy.eval()
            key = io.fingerprint([self.unit.facts, state.global_step])
            row = evaluate(self.world, self.policy, seed=int(key[:8], 16), proxy=self.proxy)
            self.rows.append({"step": state.global_step, **row})
            self.policy.train()


def run_unit(world: World, unit: Unit, root: Path) -> Path:
    """Train and evaluate one unit; what is finished is left alone."""
    path, started = unit.path(root), time.process_time()
    if path.is_file():
        return path
    world = with_length_cost(world, unit.length_cost)
    pairs, settings, kind = pooled(world, unit.bias), unit.policy, POLICY_METHODS[unit.method].loss
    target = None
    if POLICY_METHODS[unit.method].reads_rewards:
        options = {"bias": unit.bias, "family": unit.family, "members": unit.members, "raw": unit.raw}
        target = distilled(world, settings, unit.method, pairs=pairs, **options)
    policy = LlamaForCausalLM(model_config(world.sizes.hidden)).to(get_device())
    policy.load_state_dict(world.reference.state_dict())
    proxy = _Proxy.of(world, unit, target) if unit.proxy and target else None
    checkpoints = _Checkpoints(world.sizes.checkpoints, world, policy, unit, proxy, [_start(world, proxy)])
    set_seed(unit.seed)
    fit(
        SequenceLogps(policy),
        training_data(pairs, target.targets if target else None),
        stream=pairs.stream,
        batch=world.sizes.batch,
        learning_rate=world.sizes.policy_rate,
        loss=lambda logps, columns: policy_loss(logps, columns, settings, kind=kind),
        seed=unit.seed,
        tokenizer=world.tokenizer,
        directory=path.parent,
        callbacks=[checkpoints],
    )
    facts = {"reward_scale": target.reward.reward_scale, "notes": target.targets.notes} if target else {}
    seconds = round(time.process_time() - started, 1)
    return io.write_json(
        path, asdict(unit) | facts | {"checkpoints": checkpoints.rows, "cpu_seconds": seconds}
    )


# ------------------------------------------------------------------ evaluation
def _start(world: World, proxy: "_Proxy | None") -> dict[str, Any]:
    """The row of pi_ref itself, by definition where nothing has to be measured."""
    truth = world.truth
    row = {
        "step": 0,
        "kl": 0.0,
        "k1": 0.0,
        "length": float(np.mean([len(r.token_ids) for group in world.test_samples for r in group])),
        "win_rate": dict.fromkeys(OBJECTIVES, 0.5),
        "mean_reward": dict.fromkeys(OBJECTIVES, 0.0),
        "mean_of_min": float(truth.mean_of_min(truth.raw, is_reference=True).mean()),
    }
    return row | ({"proxy": 0.0, "proxy_robust": 0.0} if proxy else {})


def evaluate(
    world: World, policy: LlamaForCausalLM, *, seed: int, proxy: "_Proxy | None" = None
) -> dict[str, Any]:
    """What a policy's own samples on held-out prompts are truly worth.

    Returns:
        kl and k1 (nats per response), length (tokens), win_rate and mean_reward by objective (against pi_ref; reference
        standard deviations), mean_of_min, and with `proxy` the gains its own reward models see.
    """
    samples = sample(policy, world.tokenizer, world.test_prompts, count=world.sizes.test_samples, seed=seed)
    kl = _kl(world, policy, samples).mean(dim=(0, 1))
    truth = world.truth
    raw = truth_of(world.test_prompts, samples, length_cost=world.length_cost)
    wins = [float(pairwise_win_rate(raw[k], truth.raw[k]).mean()) for k in range(len(OBJECTIVES))]
    means = truth.calibrated(raw).mean(axis=(1, 2)).tolist()
    row = {
        "kl": float(kl[0]),
        "k1": float(kl[1]),
        "length": float(np.mean([len(r.token_ids) for group in samples for r in group])),
        "win_rate": dict(zip(OBJECTIVES, wins, strict=True)),
        "mean_reward": dict(zip(OBJECTIVES, means, strict=True)),
        "mean_of_min": float(truth.mean_of_min(raw, is_reference=False).mean()),
    }
    return row | (proxy.gains(world, samples) if proxy else {})


def _kl(world: World, policy: LlamaForCausalLM, samples: Samples) -> Tensor:
    """(Rao-Blackwellised KL, log-ratio, k3) of every sample: [X, n, 3] nats."""
    rows = sample_rows(
        [prompt_tokens(p) for p in world.test_prompts], samples, world.tokenizer, keep_suffix=False
    )
    return score(
        rows,
        lambda batch: response_kls(policy, lambda: contextlib.nullcontext(world.reference), batch),
        width=3,
    )


@dataclass(frozen=True)
class _Proxy:
    """The reward models a policy was trained on, as judges of its samples."""

    scorers: list[RewardScorer]
    reference: Tensor
    target: Distilled
    unit: Unit

    @classmethod
    def of(cls, world: World, unit: Unit, target: Distilled) -> "_Proxy":
        """Reward models of a unit's bias, with their scores of the held-out samples of pi_ref."""
        scorers = [load_scorer(world, objective, unit.bias, unit.family) for objective in OBJECTIVES]
        scores = load_scores(world, unit.bias, unit.family, test=True)
        reference = choose_members(scores, unit.members, unit.family)
        return cls(scorers, reference, target, unit)

    def gains(self, world: World, samples: Samples) -> dict[str, float]:
        """Gains over pi_ref in calibrated units: `proxy` of the mean over objectives and members, `proxy_robust` of R."""
        rows = sample_rows(
            [prompt_tokens(p) for p in world.test_prompts], samples, world.tokenizer, keep_suffix=True
        )
        found = torch.stack([scorer.rewards(rows) for scorer in self.scorers])
        scores = choose_members(found.permute(0, 3, 1, 2), self.unit.members, self.unit.family)
        ours, theirs = (
            calibrated_like(values, self.reference, raw=False) for values in (scores, self.reference)
        )
        reward = self.target.reward
        return {
            "proxy": float(ours.mean() - theirs.mean()),
            "proxy_robust": float(reward(ours).mean() - reward(theirs).mean()),
        }
