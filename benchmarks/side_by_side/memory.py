"""Peak memory of DPO steps, ours beside TRL's, on a model so small that logits and not weights decide.

The row of the speed comparison is made here, and what `memory_table` tabulates; speeds are in `side_by_side/rows.py`.
"""

import gc
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedModel

from benchmarks.side_by_side.rows import POLICY, Row, make_row, policy_data
from benchmarks.side_by_side.setup import MAX_LENGTH, Workload, random_models
from benchmarks.side_by_side.trainings import TimedTraining, our_training, synchronize, trl_dpo
from prmd.models.sequence_models import SequenceLogps
from prmd.policies.targets import policy_loss
from prmd.runtime import get_device
from prmd.training.rehearsal import TensorBytes

MEMORY_VOCABULARY = 151_936
MEMORY_PAIRS = 8


def memory_row(workload: Workload, *, vocabulary: int = MEMORY_VOCABULARY) -> Row:
    """Peak bytes of two DPO steps of a small model with a large vocabulary, where logits take the most."""
    small = workload.first(MEMORY_PAIRS)
    peaks = dpo_peaks(small, vocabulary=vocabulary)
    note = (
        f"DPO, {len(small.pairs)} pairs in batches of 4, vocabulary {vocabulary}, hidden size 64; weights, gradients and "
        f"AdamW states are {peaks.states / 2**20:.0f} MiB of either figure"
    )
    values = {"ours": peaks.ours, "trl": peaks.trl, "repeats": 1, "note": note}
    return make_row("memory", unit="peak bytes", memory_ratio=peaks.ours / peaks.trl, **values)


@dataclass(frozen=True)
class Peaks:
    """Peak bytes of DPO steps on either side (`trl` None: not run), and the weights, gradients and moments in them."""

    ours: int
    trl: int | None
    states: int


def dpo_peaks(
    workload: Workload, *, vocabulary: int, max_length: int = MAX_LENGTH, trl: bool = True
) -> Peaks:
    """Peaks of training a model of two layers and hidden size 64, so that logits and not weights decide.

    Args:
        max_length: tokens of a conversation from which TRL drops it.
    """
    pad_id, other = workload.tokenizer.pad_token_id, None
    shape = _memory_shape(vocabulary)
    models = random_models(shape, dtype=torch.float32, checkpointing=False, pad_token_id=pad_id)
    with tempfile.TemporaryDirectory() as folder:
        root, model = Path(folder), models.policy()
        states = 4 * sum(p.numel() * p.element_size() for p in model.parameters())
        data = policy_data(workload.policy_rows, torch.zeros(len(workload.pairs), 2), targets=False)
        loss, policy = partial(policy_loss, policy=POLICY), SequenceLogps(model)
        training = our_training(policy, data, loss, workload=workload, directory=root, checkpointing=False)
        ours = peak_bytes(training, model)
        del training, policy, model
        gc.collect()
        if trl:
            model = models.policy()
            training = trl_dpo(model, workload, root, checkpointing=False, max_length=max_length)
            other = peak_bytes(training, model)
    return Peaks(ours, other, states)


def _memory_shape(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )


def peak_bytes(training: TimedTraining, model: PreTrainedModel) -> int:
    """Most bytes of tensors alive at once in a training; on a GPU, as its allocator counts them."""
    if get_device().type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        training.run()
        return torch.cuda.max_memory_allocated()
    with TensorBytes(model.parameters()) as count:
        training.run()
    return count.peak
