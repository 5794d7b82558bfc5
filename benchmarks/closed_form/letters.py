"""The closed-form part of the gold-reward study: every family of reward models in every scenario, without a training.

Reward models are linear on frozen representations of pi_ref (`benchmarks/closed_form/`), policies are the exact optimum of their
robust reward on fresh samples of pi_ref for held-out prompts, tilted to a KL. What is left out is what training adds:
optimization, and a policy that leaves the samples. Scenarios are in `closed_form/scenarios.py`; the numbers of many seeds are put
together in `closed_form/letters_summary.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.closed_form.families import STRENGTHS, TWINS, members_of, offsets_of, with_twins
from benchmarks.closed_form.fits import fit_linear
from benchmarks.closed_form.gates import in_reference_units, optimum, outcome
from benchmarks.closed_form.scenarios import SCENARIOS, UNBIASED, Scenario, feature_of, scenario_pairs
from benchmarks.gold.models import Samples, sample
from benchmarks.gold.reference import World, truth_of
from benchmarks.gold.world import END, prompt_tokens
from prmd.artifacts import io
from prmd.config.policy import PolicySection
from prmd.inference.generation import GeneratedResponse, sample_rows
from prmd.objectives import OBJECTIVES
from prmd.pessimism.aggregation import robust_rewards
from prmd.policies.methods import aggregation
from prmd.policies.robust_reward import objective_weights

MEMBERS = 10
GATE_SAMPLES = 48
KLS = (0.75, 2.0)
METHODS = ("mean", "hard_min", "hierarchical")
CEILING, TRUTH = "unbiased labels", "truth"
PICTURED = ("L90", "helpful")
"""Scenario and objective whose members are shown one by one."""
_CHUNK = 1024
Row = dict[str, Any]


def closed_form_path(world_directory: Path) -> Path:
    """The file of one seed."""
    return world_directory / "closed_form.json"


def run_closed_form(world: World) -> Path:
    """Every scenario of one seed; what is finished is left alone."""
    path = closed_form_path(world.directory)
    if path.is_file():
        return path
    study = _Study(world)
    rows = [row for name in SCENARIOS for row in study.rows(name)]
    return io.write_json(path, {"rows": rows, "with_length": study.with_length(*PICTURED)})


def representations(world: World, prompts: list[str], samples: Samples) -> np.ndarray:
    """Of every response: last state, and mean and sum over its tokens of the first and the last layer, [X * n, 5 d]."""
    rows = sample_rows([prompt_tokens(p) for p in prompts], samples, world.tokenizer, keep_suffix=True)
    whole = [(len(row.prompt_ids), (*row.prompt_ids, *r)) for row in rows for r in row.responses]
    found = [_represent(world, whole[i : i + _CHUNK]) for i in range(0, len(whole), _CHUNK)]
    return torch.cat(found).double().numpy()


@torch.no_grad()
def _represent(world: World, rows: list[tuple[int, tuple[int, ...]]]) -> torch.Tensor:
    widest = max(len(ids) for _, ids in rows)
    ids = torch.tensor([[*row, *[END] * (widest - len(row))] for _, row in rows])
    position = torch.arange(widest)[None]
    start, end = (torch.tensor(v)[:, None] for v in ([s for s, _ in rows], [len(r) for _, r in rows]))
    states = world.reference.model(
        input_ids=ids, attention_mask=(position < end).long(), output_hidden_states=True
    ).hidden_states
    inside = ((position >= start) & (position < end)).float()[..., None]
    parts = [states[-1][torch.arange(len(rows)), end[:, 0] - 1]]
    for layer in (states[-1], states[1]):
        total = (layer * inside).sum(dim=1)
        parts += [total / inside.sum(dim=1), total / 10]
    return torch.cat(parts, dim=1)


def within_prompts(rewards: np.ndarray, feature: np.ndarray) -> float:
    """Correlation of rewards [X, n] with a feature of the same samples, both less their mean in each prompt."""
    r, f = (values - values.mean(axis=1, keepdims=True) for values in (rewards, feature))
    return float((r * f).sum() / np.sqrt((r * r).sum() * (f * f).sum()))


class _Study:
    """One seed: features of its pairs' responses and of fresh samples, and the linear reward models fitted on them."""

    def __init__(self, world: World) -> None:
        self.world, self.policy = world, PolicySection()
        self.fresh = _fresh_samples(world)
        own = representations(world, world.prompts, world.samples)
        mean, spread = own.mean(axis=0), own.std(axis=0) + 1e-9
        self.own = (own - mean) / spread
        self.held_out = (representations(world, world.test_prompts, self.fresh) - mean) / spread
        self.kept: dict[tuple[str, str], dict[str, np.ndarray]] = {}

    def rows(self, name: str) -> list[Row]:
        """Results of one scenario: family, method and KL."""
        scenario = SCENARIOS[name]
        built = [self._scores(name, objective) for objective in OBJECTIVES]
        ceiling = [self._scores(UNBIASED[scenario.length_cost], objective) for objective in OBJECTIVES]
        families = {family: np.stack([one[family] for one in built]) for family in (*STRENGTHS, TWINS)}
        families[CEILING] = np.stack([one["bootstrap"] for one in ceiling])
        truth = truth_of(self.world.test_prompts, self.fresh, length_cost=scenario.length_cost)
        found = []
        for family, scores in families.items():
            for method in METHODS:
                found += self._gates(name, family, method, self._robust(scores, method), truth)
        for method, offset in (("dpo", False), ("dpo_debiased", True)):
            found += self._gates(name, "none", method, self._pooled(scenario, offset=offset), truth)
        return found

    def with_length(self, name: str, objective: str) -> dict[str, list[float]]:
        """Correlation with length within prompts of the true reward and of every member of every family."""
        length = feature_of("length", self.fresh)
        cost = SCENARIOS[name].length_cost
        truth = truth_of(self.world.test_prompts, self.fresh, length_cost=cost)[OBJECTIVES.index(objective)]
        scores = {TRUTH: truth[None], **self._scores(name, objective)}
        return {family: [within_prompts(r, length) for r in scores[family]] for family in (TRUTH, *STRENGTHS)}

    def _gates(
        self, name: str, family: str, method: str, robust: torch.Tensor, truth: np.ndarray
    ) -> list[Row]:
        length = feature_of("length", self.fresh)
        head = {"seed": self.world.seed, "scenario": name, "family": family, "method": method}
        found = []
        for kl in KLS:
            weights = optimum(robust, kl=kl, beta=self.policy.beta)
            found.append({**head, "kl": kl, **outcome(weights, truth, length).summary(OBJECTIVES)})
        return found

    def _robust(self, scores: np.ndarray, method: str) -> torch.Tensor:
        weights = objective_weights(self.policy)
        rewards = in_reference_units(scores)
        return robust_rewards(rewards, aggregation=aggregation(self.policy, method), weights=weights)

    def _pairs(self, scenario: Scenario, objective: str) -> tuple[np.ndarray, np.ndarray]:
        """Differences of features [n, d] and offsets a [n] of an objective's pairs."""
        pairs, count = scenario_pairs(self.world, scenario, objective), self.world.sizes.samples
        won, lost = pairs.prompt * count + pairs.chosen, pairs.prompt * count + pairs.rejected
        named = [feature_of(feature, self.world.samples).ravel() for feature in scenario.named]
        return self.own[won] - self.own[lost], offsets_of(np.stack([f[won] - f[lost] for f in named], axis=1))

    def _scores(self, name: str, objective: str) -> dict[str, np.ndarray]:
        """Rewards [M, X, n] of the fresh samples by every family, fitted once for a scenario and objective."""
        if (name, objective) not in self.kept:
            scenario = SCENARIOS[name]
            differences, offsets = self._pairs(scenario, objective)
            scores = {}
            for family in STRENGTHS:
                rng = np.random.default_rng([self.world.seed, 5, OBJECTIVES.index(objective)])
                theta = members_of(family, differences, offsets, members=MEMBERS, rng=rng)
                scores[family] = self._score(theta)
            named = np.stack([feature_of(feature, self.fresh) for feature in scenario.named])
            scores[TWINS] = with_twins(scores["bootstrap"], named)
            self.kept[name, objective] = scores
        return self.kept[name, objective]

    def _pooled(self, scenario: Scenario, *, offset: bool) -> torch.Tensor:
        """The implicit reward [X, n] of DPO on the pairs of all objectives."""
        found = [self._pairs(scenario, objective) for objective in OBJECTIVES]
        differences, offsets = (np.concatenate(part) for part in zip(*found, strict=True))
        theta = fit_linear(differences, offset=offsets if offset else None)
        return torch.from_numpy(self._score(theta[None])[0])

    def _score(self, theta: np.ndarray) -> np.ndarray:
        return (self.held_out @ theta.T).T.reshape(len(theta), -1, GATE_SAMPLES)


def _fresh_samples(world: World) -> Samples:
    """Samples of pi_ref for the held-out prompts that nothing else has seen, drawn once."""
    path = world.directory / "gate_samples.json"
    if not path.is_file():
        drawn = sample(
            world.reference,
            world.tokenizer,
            world.test_prompts,
            count=GATE_SAMPLES,
            seed=1000 + world.seed,
        )
        io.write_json(path, [[list(response.token_ids) for response in group] for group in drawn])
    return [
        [GeneratedResponse("", tuple(tokens), tokens[-1] == END) for tokens in group]
        for group in io.read_json(path)
    ]
