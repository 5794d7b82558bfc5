"""The limit of a training's speed, the same model on dense batches, and runs in turn.

What is compared with it is in `side_by_side/trainings.py`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.side_by_side.setup import SEED
from benchmarks.side_by_side.trainings import LEARNING_RATE, synchronize
from prmd.models.tokenization import PrefixRow
from prmd.runtime import get_device
from prmd.training.batches import MicroBatch


@dataclass(frozen=True)
class DenseBatch:
    """A batch without padding, mask or shared prompts: `rows` sequences of `width` tokens, `outputs` of them read."""

    rows: int
    width: int
    outputs: int

    @property
    def tokens(self) -> int:
        return self.rows * self.width


def dense_batches(
    rows: Sequence[PrefixRow], batches: Sequence[Sequence[int]], *, rewards: bool = False
) -> list[DenseBatch]:
    """Dense batches with as many tokens, sequences and read positions as the distinct ones of ours."""
    result = []
    for batch in batches:
        tokens = sum(rows[i].shared_length for i in batch)
        responses = [response for i in batch for response in rows[i].responses]
        outputs = len(responses) if rewards else sum(map(len, responses))
        result.append(DenseBatch(len(batch), max(1, round(tokens / len(batch))), outputs))
    return result


def planned_batches(plan: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
    """Row indices of the batches of a plan."""
    return [micro.rows for micro in plan]


def dense_pass(model: PreTrainedModel, batches: Sequence[DenseBatch], *, train: bool = True) -> float:
    """Seconds of forward (with `train` also backward, clipping and AdamW) over dense batches of random tokens.

    The head runs once and on as many positions as ours reads, so nothing but the model's own work is left.
    """
    model.train(train)
    optimizer = (
        torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0, fused=True) if train else None
    )
    generator = torch.Generator().manual_seed(SEED)
    inputs = [
        torch.randint(0, model.config.vocab_size, (b.rows, b.width), generator=generator).to(get_device())
        for b in batches
    ]
    synchronize()
    begin = time.perf_counter()
    for batch, input_ids in zip(batches, inputs, strict=True):
        with nullcontext() if train else torch.inference_mode():
            loss = _dense_loss(model, input_ids, batch.outputs)
        if optimizer is not None:
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
    synchronize()
    return time.perf_counter() - begin


def _dense_loss(model: PreTrainedModel, input_ids: Tensor, outputs: int) -> Tensor:
    hidden = getattr(model, model.base_model_prefix)(input_ids=input_ids, use_cache=False).last_hidden_state
    hidden = hidden.flatten(0, 1)[:outputs]
    if hasattr(model, "score"):
        return model.score(hidden).float().square().mean()
    logits = model.get_output_embeddings()(hidden).float()
    return F.cross_entropy(logits, input_ids.flatten()[:outputs])


def alternate(
    runs: Mapping[str, Callable[[], float]], *, repeats: int, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Run everything in turn, the order reversed each time, so that a change of the machine's load meets all alike.

    Args:
        runs: by name, each gives its seconds.
        seconds: no repeat is begun that would pass this much time, by the last one's; one is always run.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for repeat in range(repeats):
        started = time.perf_counter()
        for name in list(runs) if repeat % 2 == 0 else list(reversed(runs)):
            times[name].append(runs[name]())
        now = time.perf_counter()
        if now - begin + (now - started) > seconds:
            break
    return times
