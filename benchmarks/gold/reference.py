"""The world of one seed of the gold-reward study: the reference policy, its samples, their true rewards.

pi_ref is fitted by maximum likelihood to the prior of `gold/world.py`; its samples make the preference data, calibrate the
reward models and are what policies are compared with. Everything is made once and kept in the seed's folder. How models
are trained and sampled is in `gold/models.py`, preferences are in `gold/labels.py`, reward models in `gold/ensembles.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.gold.models import Samples, Sizes, fit, model_config, sample, score
from benchmarks.gold.world import (
    END,
    LENGTH_COST,
    draw_prompts,
    draw_response,
    encode,
    gold_table,
    make_tokenizer,
    prompt_tokens,
)
from prmd.artifacts import io
from prmd.evaluation.scores import ReferenceScores
from prmd.inference.generation import GeneratedResponse, sample_rows
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow
from prmd.objectives import OBJECTIVES
from prmd.runtime import get_device, set_seed
from prmd.training.trainer import PairData, PairLoss

DISTINCT_PROMPTS = 1680


@dataclass(frozen=True)
class World:
    """What all units of a seed share.

    Attributes:
        prompts, samples: of the preference data.
        test_prompts, test_samples: of the evaluation, twice as many samples as a policy gets.
        rewards: true rewards of `samples` in reference standard deviations, [K, X, n].
        ref_logps: log pi_ref of `samples`, float32 [X, n], nats.
        truth: true rewards of `test_samples` with the units they define.
        directory: where this seed's tables are kept.
        length_cost: of the true rewards; below 0 length is truly good (`with_length_cost`).
    """

    sizes: Sizes
    seed: int
    tokenizer: PreTrainedTokenizerBase
    reference: LlamaForCausalLM
    prompts: list[str]
    samples: Samples
    test_prompts: list[str]
    test_samples: Samples
    rewards: np.ndarray
    ref_logps: Tensor
    truth: ReferenceScores
    directory: Path
    length_cost: float = LENGTH_COST

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of `samples`, [X, n]."""
        return np.array([[len(response.token_ids) for response in group] for group in self.samples])

    def rows(self, *, test: bool, rewards: bool) -> list[PrefixRow]:
        """One row per prompt with all its samples, closed by an end of turn where reward models read them."""
        prompts, samples = (self.test_prompts, self.test_samples) if test else (self.prompts, self.samples)
        return sample_rows([prompt_tokens(p) for p in prompts], samples, self.tokenizer, keep_suffix=rewards)


def truth_of(prompts: Sequence[str], samples: Samples, *, length_cost: float = LENGTH_COST) -> np.ndarray:
    """True rewards [K, X, n], raw."""
    tokens = [[response.token_ids for response in group] for group in samples]
    return gold_table(prompts, tokens, length_cost=length_cost)


def with_length_cost(world: World, length_cost: float) -> World:
    """The same prompts, samples and pi_ref under other true rewards, with the units that these define."""
    if length_cost == world.length_cost:
        return world
    truth = ReferenceScores.fit(
        OBJECTIVES, truth_of(world.test_prompts, world.test_samples, length_cost=length_cost)
    )
    raw = truth_of(world.prompts, world.samples, length_cost=length_cost)
    rewards = raw / truth.scale[:, None, None]
    return replace(world, rewards=rewards, truth=truth, length_cost=length_cost)


def build_world(sizes: Sizes, seed: int, directory: Path) -> World:
    """The world of a seed: read from `directory`, or pi_ref trained, sampled and written there."""
    rng = np.random.default_rng([seed, 1])
    test_prompts = draw_prompts(rng, sizes.test_prompts)
    prompts = draw_prompts(rng, sizes.prompts, without=frozenset(test_prompts))
    tokenizer, weights = make_tokenizer(), directory / "reference.safetensors"
    torch.manual_seed(seed)
    reference = LlamaForCausalLM(model_config(sizes.hidden)).to(get_device())
    if weights.is_file():
        reference.load_state_dict(io.read_tensors(weights))
    else:
        _fit_reference(reference, sizes, seed, tokenizer, directory)
        io.write_tensors(weights, {k: v.contiguous() for k, v in reference.state_dict().items()})
    reference.eval()

    def kept(name: str, prompts: Sequence[str], count: int) -> Samples:
        return _kept_samples(directory / name, reference, tokenizer, prompts, count=count, seed=seed)

    samples = kept("samples.json", prompts, sizes.samples)
    test_samples = kept("test_samples.json", test_prompts, 2 * sizes.test_samples)
    truth = ReferenceScores.fit(OBJECTIVES, truth_of(test_prompts, test_samples))
    return World(
        sizes=sizes,
        seed=seed,
        tokenizer=tokenizer,
        reference=reference,
        prompts=prompts,
        samples=samples,
        test_prompts=test_prompts,
        test_samples=test_samples,
        rewards=truth_of(prompts, samples) / truth.scale[:, None, None],
        ref_logps=_kept_logps(
            directory / "reference_logps.safetensors", reference, tokenizer, prompts, samples
        ),
        truth=truth,
        directory=directory,
    )


def _fit_reference(
    reference: nn.Module, sizes: Sizes, seed: int, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> None:
    rng = np.random.default_rng([seed, 2])
    pool = draw_prompts(rng, min(DISTINCT_PROMPTS, sizes.prior_pairs))
    rows = []
    for _ in range(sizes.prior_pairs):
        prompt = pool[rng.integers(len(pool))]
        responses = tuple((*encode(draw_response(rng, prompt)), END) for _ in range(2))
        rows.append(PrefixRow(prompt_tokens(prompt), responses))
    tokens = torch.tensor([float(sum(map(len, row.responses))) for row in rows])

    def likelihood(logps: Tensor, columns: Any) -> PairLoss:
        loss = -logps.sum(dim=1) / columns["tokens"]
        return PairLoss(loss, {"nats_per_token": loss.detach()})

    set_seed(seed)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(sizes.prior_epochs)])
    fit(
        SequenceLogps(reference),
        PairData(rows, {"tokens": tokens}),
        stream=order.tolist(),
        batch=sizes.batch,
        learning_rate=2e-3,
        loss=likelihood,
        seed=seed,
        tokenizer=tokenizer,
        directory=directory,
    )


def _kept_samples(
    path: Path,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    count: int,
    seed: int,
) -> Samples:
    """Samples of pi_ref, drawn once."""
    if not path.is_file():
        drawn = sample(reference, tokenizer, prompts, count=count, seed=seed)
        io.write_json(path, [[list(response.token_ids) for response in group] for group in drawn])
    return [
        [GeneratedResponse("", tuple(tokens), tokens[-1] == END) for tokens in group]
        for group in io.read_json(path)
    ]


def _kept_logps(
    path: Path,
    reference: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    samples: Samples,
) -> Tensor:
    """log pi_ref of its samples [X, n], computed once."""
    if not path.is_file():
        scorer = SequenceLogps(reference).eval()
        rows = sample_rows([prompt_tokens(p) for p in prompts], samples, tokenizer, keep_suffix=False)
        values = score(rows, lambda batch: scorer(**batch)[:, None], width=1)
        io.write_tensors(path, {"logps": values[..., 0].contiguous()})
    return io.read_tensors(path)["logps"]
