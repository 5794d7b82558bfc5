"""Which prompts are sampled at once: of like length, as many as asked for or as fit the card, and fewer where they do not.

How a batch is sampled is in `generation`.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prmd.config.shared import BatchSize
from prmd.errors import ConfigError
from prmd.inference.scoring import gather
from prmd.models.card import MOST_SEQUENCES, USABLE, prompts_at_once, sampling_bytes
from prmd.models.tokenization import Tokens
from prmd.runtime import free_memory

logger = logging.getLogger(__name__)

Batch = Sequence[tuple[str, Tokens]]
Sampled = tuple[str, list[list[int]]]


def free_on_card(model: nn.Module) -> int | None:
    """Bytes of the usable share of the model's card that nothing holds yet; None on a CPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
        device
    )  # by torch, for its next tensors
    return int(free + kept - (1 - USABLE) * total)


@dataclass(frozen=True)
class BatchPlan:
    """How many prompts are sampled at once.

    Attributes:
        samples, new_tokens: of each prompt, and at most of each sample.
        batch_size: responses at once; `auto` fills what `free_on_card` tells, takes `SEQUENCES_WITHOUT_CARD` on a CPU, and
            `MOST_SEQUENCES` for an engine, which makes batches of its own.
    """

    samples: int
    new_tokens: int
    batch_size: BatchSize

    def batches(self, model: object, missing: dict[str, Tokens]) -> list[Batch]:
        """(key, prompt) in batches of like length, the longest first: what does not fit the memory fails at once.

        Every process makes the same ones: the card with the least free memory decides.
        """
        todo, batches = sorted(missing.items(), key=lambda item: -len(item[1])), list[Batch]()
        prompts_at_once = self._prompts_at_once(model)
        while todo:
            count = prompts_at_once(len(todo[0][1]))
            batches.append(todo[:count])
            todo = todo[count:]
        return batches

    def _prompts_at_once(self, model: object) -> Callable[[int], int]:
        """Prompts of a batch by the tokens of its longest."""
        batch_size, sizes, free = self.batch_size, None, []
        if batch_size == "auto" and not isinstance(model, nn.Module):
            batch_size = MOST_SEQUENCES
        elif batch_size == "auto":
            free = [size for size in gather([free_on_card(model)]) if size is not None]
            sizes = sampling_bytes(model.config, next(model.parameters()).dtype)
        of_prompt = {"samples": self.samples, "new_tokens": self.new_tokens}
        return prompts_at_once(batch_size, sizes, min(free, default=None), **of_prompt)


class Halving:
    """Has batches sampled, from the first that does not fit the memory on in halves, quarters and so on.

    Args:
        sample: samples the prompts it is given.
        plan: for its error, what one prompt asks for.
        description: of the sampling.
    """

    def __init__(self, sample: Callable[[Batch], list[Sampled]], plan: BatchPlan, description: str) -> None:
        self._sample, self._plan, self._description = sample, plan, description
        self._parts = 1

    def __call__(self, batch: Batch) -> list[Sampled]:
        """What was sampled of a batch; a part that is done is not sampled again when a later one does not fit.

        Raises:
            ConfigError: not even one prompt fits.
        """
        done: list[Sampled] = []
        while len(done) < len(batch):
            part = batch[len(done) :][: -(-len(batch) // self._parts)]
            found = self._attempt(part)
            if found is None:
                self._cut(len(batch), part)
            else:
                done += found
        return done

    def _attempt(self, part: Batch) -> list[Sampled] | None:
        """None where memory ran out; all that the attempt held is gone with its traceback."""
        try:
            return self._sample(part)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        return None

    def _cut(self, whole: int, part: Batch) -> None:
        free_memory()
        samples, longest = self._plan.samples, len(part[0][1])
        if len(part) == 1:
            raise ConfigError(
                f"out of memory for one prompt of {longest} tokens with {samples} responses of at most "
                f"{self._plan.new_tokens} tokens; set a smaller max_new_tokens or samples_per_prompt, or another model.name"
            )
        self._parts = -(-whole // (len(part) // 2))
        logger.warning(
            "%s: out of memory with %d responses at once, prompts of up to %d tokens; sampled in batches of %d and fewer "
            "from here on, nothing that is sampled is lost",
            *(self._description, len(part) * samples, longest, -(-whole // self._parts) * samples),
        )


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether a card's memory ran out, or the CPU's, of which torch has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
