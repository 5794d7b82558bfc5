"""A large shape at random weights on a GPU, within a memory cap: speed and peak memory beside TRL, and MFU.

Every training is made, run and dropped in turn, so that each has the whole cap to itself. Weights, gradients and AdamW
states are bfloat16 on both sides and layers are recomputed: the speed is that of a training, what it would learn is not
looked at. Rows for models that fit beside each other are in `side_by_side/rows.py`.
"""

import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Config

from benchmarks.side_by_side.limit import DenseBatch, alternate, dense_batches, dense_pass, planned_batches
from benchmarks.side_by_side.mfu import counted_parameters, mfu, own_card
from benchmarks.side_by_side.rows import POLICY, Row, make_row, policy_data, timed_values
from benchmarks.side_by_side.setup import (
    Models,
    Workload,
    processed_tokens,
    random_models,
    shares_prompts,
)
from benchmarks.side_by_side.trainings import (
    our_training,
    reward_objective,
    trl_dpo,
    trl_reward,
)
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.policies.targets import policy_loss
from prmd.runtime import get_device
from prmd.training.rehearsal import Task, meta_model
from prmd.training.trainer import PairData

CAP_BYTES = 32 * 10**9


def qwen_3b_shape() -> Qwen2Config:
    """The shape of Qwen2.5-3B: 3.09e9 weights, vocabulary 151,936."""
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        rope_theta=1e6,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )


def cap_memory(limit: int = CAP_BYTES) -> None:
    """Let this process allocate no more than a card of `limit` bytes would (the context takes about 0.5 GB of them)."""
    device = get_device()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (limit - 5e8) / total), device)


class IsolatedRun:
    """Make, run and drop one training at a time; NaN seconds where it does not fit.

    Attributes:
        peak: bytes allocated at once by the last run that fitted; NaN without a GPU.
        fits: whether the last run did.
    """

    def __init__(self, make: Callable[[], Callable[[], float]]) -> None:
        self.make, self.peak, self.fits = make, math.nan, True

    def __call__(self) -> float:
        try:
            run = self.make()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = run()
            if torch.cuda.is_available():
                self.peak = float(torch.cuda.max_memory_allocated())
            self.fits = True
        except torch.OutOfMemoryError:
            seconds, self.fits = math.nan, False
        run = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return seconds


def shape_rows(
    config: PreTrainedConfig, workload: Workload, *, name: str, dtype: torch.dtype, repeats: int
) -> Iterator[Row]:
    """The rows dpo_<name> and reward_model_<name>, as they are measured."""
    pad_id = workload.tokenizer.pad_token_id
    models = random_models(config, dtype=dtype, checkpointing=True, pad_token_id=pad_id)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        yield _shape_row(f"dpo_{name}", _dpo_runs(models, workload, root), config, workload, repeats)
        rewards = _reward_runs(models, workload, root)
        yield _shape_row(f"reward_model_{name}", rewards, config, workload, repeats)


def _our_dpo(models: Models, workload: Workload, root: Path) -> Callable[[], float]:
    rows, model = workload.policy_rows, models.policy()
    # references of zero: precomputed on both sides, they cost a training no time
    data = policy_data(rows, torch.zeros(len(rows), 2), targets=False)
    loss, policy = partial(policy_loss, policy=POLICY), SequenceLogps(model)
    return our_training(
        policy, data, loss, workload=workload, directory=root / "ours", checkpointing=True
    ).run


def _dpo_runs(models: Models, workload: Workload, root: Path) -> dict[str, IsolatedRun]:
    rows = workload.policy_rows
    return {
        "ours": IsolatedRun(partial(_our_dpo, models, workload, root)),
        "trl": IsolatedRun(lambda: trl_dpo(models.policy(), workload, root / "trl", checkpointing=True).run),
        "limit": IsolatedRun(lambda: _limit(models.policy(), dense_batches(rows, _batches(workload)))),
    }


def _reward_runs(models: Models, workload: Workload, root: Path) -> dict[str, IsolatedRun]:
    rows = workload.reward_rows

    def ours() -> Callable[[], float]:
        model, data = SequenceRewards(models.classifier()), PairData(rows, {})
        return our_training(
            model, data, reward_objective, workload=workload, directory=root / "ours", checkpointing=True
        ).run

    def limit() -> Callable[[], float]:
        return _limit(models.classifier(), dense_batches(rows, _batches(workload), rewards=True))

    return {
        "ours": IsolatedRun(ours),
        "trl": IsolatedRun(
            lambda: trl_reward(models.classifier(), workload, root / "trl", checkpointing=True).run
        ),
        "limit": IsolatedRun(limit),
    }


def _limit(model: PreTrainedModel, dense: Sequence[DenseBatch]) -> Callable[[], float]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return partial(dense_pass, model, dense)


def _batches(workload: Workload) -> list[tuple[int, ...]]:
    return planned_batches(workload.plan)


def _shape_row(
    name: str, runs: dict[str, IsolatedRun], config: PreTrainedConfig, workload: Workload, repeats: int
) -> Row:
    rewards = name.startswith("reward_model")
    rows = workload.reward_rows if rewards else workload.policy_rows
    dense = dense_batches(rows, _batches(workload), rewards=rewards)
    runs["ours"]()  # warms the kernels up, for all sides alike
    times = alternate(runs, repeats=repeats)
    distinct = sum(row.shared_length for row in rows)
    values = timed_values(times, amount=len(rows), distinct=distinct, dense=dense)
    tokens, padding = processed_tokens(rows, _batches(workload), share_prompt=shares_prompts(config, rows))
    seconds = statistics.median(times["ours"])
    return make_row(
        name,
        unit="pairs/s",
        **values,
        memory_ratio=runs["ours"].peak / runs["trl"].peak,
        padding_share=padding / tokens,
        tokens_per_pair=tokens / len(rows),
        mfu=_mfu(config, rewards=rewards, tokens=tokens - padding, seconds=seconds),
        note=_note(config, runs),
        model=type(config).__name__.removesuffix("Config"),
    )


def _mfu(config: PreTrainedConfig, *, rewards: bool, tokens: int, seconds: float) -> float | None:
    task: Task = "reward_model" if rewards else "policy"
    model = meta_model(config, task=task, dtype=torch.bfloat16, lora=None)
    return mfu(parameters=counted_parameters(model), tokens=tokens, seconds=seconds, card=own_card())


def _note(config: PreTrainedConfig, runs: dict[str, IsolatedRun]) -> str:
    def fits(side: str) -> str:
        return f"peaked at {runs[side].peak / 1e9:.1f} GB" if runs[side].fits else "did not fit"

    shape = f"random weights, hidden size {config.hidden_size}, {config.num_hidden_layers} layers"
    return f"{shape}; capped at {CAP_BYTES / 1e9:.0f} GB: ours {fits('ours')}, TRL {fits('trl')}"


# ------------------------------------------------------------------ arithmetic
def training_flops(config: PreTrainedConfig, dense: Sequence[DenseBatch], *, head: bool) -> float:
    """Operations of forward and backward: 6 per weight and token, without attention scores and recomputation.

    Args:
        dense: batches with the distinct tokens, and how many of them go through the head.
        head: whether the output projection runs (policies).
    """
    model = meta_model(config, task="policy", dtype=torch.bfloat16, lora=None)
    backbone = getattr(model, model.base_model_prefix)
    weights = sum(p.numel() for p in backbone.parameters()) - backbone.get_input_embeddings().weight.numel()
    projection = model.get_output_embeddings().weight.numel() if head else 0
    return 6.0 * sum(weights * batch.tokens + projection * batch.outputs for batch in dense)
