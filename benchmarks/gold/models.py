"""How anything in the gold-reward study is trained, sampled and scored, and how large everything is.

Every training is `PairTrainer` on `SequenceLogps` or `SequenceRewards`, every sample `inference.generation.generate`, every score
`inference.scoring.score_rows`: nothing of the method is written again here. The models are Llamas of two layers made from a
configuration, in float32. The reference policy is in `gold/reference.py`, to be read next.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedTokenizerBase, TrainerCallback

from benchmarks.gold.world import END, PAD, VOCABULARY, prompt_tokens
from prmd.artifacts import io
from prmd.config.shared import EnsembleConfig, TrainingConfig
from prmd.inference.cache import ScoreTable
from prmd.inference.generation import GeneratedResponse, generate
from prmd.inference.scoring import score_rows
from prmd.models.tokenization import PrefixRow
from prmd.runtime import get_device
from prmd.training.arguments import training_arguments
from prmd.training.batches import plan_training
from prmd.training.trainer import LossFunction, PairData, PairTrainer

MAX_NEW_TOKENS = 24
"""Ten letters more than the prior's longest response: a policy that grows longer is seen to."""
GENERATED_TOGETHER, SCORED_TOKENS = 512, 16384
Samples = list[list[GeneratedResponse]]


@dataclass(frozen=True)
class Sizes:
    """How large a world is and how long its models train; part of the key of every finished unit.

    Attributes:
        hidden: width of the models.
        prior_pairs: pairs of prior responses that pi_ref is trained on, for `prior_epochs`.
        prompts, samples: prompts of the preference data and samples of pi_ref for each; pairs are made of them, and they
            calibrate the reward models.
        pairs: labelled pairs of each objective.
        reward_epochs: of the reward models; `reward_rate` their peak learning rate.
        members: heads of an ensemble; the other `rewards.heads` settings are the shipped defaults.
        policy_steps: optimiser steps of a policy at `policy_rate`; `training.checkpoints` are the steps at which it is evaluated.
        test_prompts, test_samples: held-out prompts, and samples of a policy for each; the reference has twice as many.
        batch: pairs of an optimiser step.
    """

    hidden: int = 64
    prior_pairs: int = 12800
    prior_epochs: int = 3
    prompts: int = 384
    samples: int = 12
    pairs: int = 1500
    reward_epochs: int = 5
    reward_rate: float = 1e-3
    members: int = 20
    policy_steps: int = 300
    policy_rate: float = 3e-4
    checkpoints: tuple[int, ...] = (10, 20, 30, 45, 65, 100, 150, 220, 300)
    test_prompts: int = 96
    test_samples: int = 8
    batch: int = 64

    @property
    def key(self) -> str:
        """Names the folder of results made with these sizes and the shipped settings of the ensembles."""
        return io.fingerprint([asdict(self), EnsembleConfig().model_dump()])[:8]


def model_config(hidden: int, **changes: Any) -> LlamaConfig:
    """The shape of every model of the study."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        **changes,
    )


def fit(
    model: nn.Module,
    data: PairData,
    *,
    stream: Sequence[int],
    batch: int,
    learning_rate: float,
    loss: LossFunction,
    seed: int,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """One training at a constant learning rate after warm-up, so that all checkpoints of a run are comparable."""
    training = TrainingConfig(
        pairs_per_device=batch,
        gradient_accumulation_steps=1,
        lr_scheduler="constant_with_warmup",
        warmup_ratio=0.05,
        logging_steps=10**6,
    )
    plan = plan_training([row.shared_length for row in data.rows], stream, training, seed=seed, processes=1)
    arguments = training_arguments(
        training,
        directory=directory,
        learning_rate=learning_rate,
        optimizer="adamw_float32",
        bf16=False,
        seed=seed,
        steps=plan.steps,
        accumulation=plan.size.accumulation,
    )
    trainer = PairTrainer(
        model,
        arguments,
        data=data,
        plan=plan.batches,
        eval_data=None,
        loss_function=loss,
        tokenizer=tokenizer,
        callbacks=callbacks,
    )
    trainer.train()


def score(rows: Sequence[PrefixRow], compute: Callable[[dict[str, Tensor]], Tensor], *, width: int) -> Tensor:
    """Values of every response of rows with equally many responses: [X, n, width] float32.

    The table that `score_rows` fills is thrown away: no model of the study scores the same samples twice.
    """
    with tempfile.TemporaryDirectory() as scratch:
        values = score_rows(
            rows,
            compute,
            table=ScoreTable(Path(scratch), width),
            pad_id=PAD,
            tokens_per_batch=SCORED_TOKENS,
            share_prompt=True,
            device=get_device(),
            description="scoring",
        )
    return torch.stack(values)


def sample(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, count: int, seed: int
) -> Samples:
    """`count` responses to each prompt at temperature 1 and top-p 1."""
    return generate(
        policy,
        tokenizer,
        [prompt_tokens(prompt) for prompt in prompts],
        samples_per_prompt=count,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
        batch_size=GENERATED_TOGETHER,
        description="sampling",
    )
