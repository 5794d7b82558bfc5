"""What ends a training early: Ctrl-C and SIGTERM, behind a step that is saved; a gradient that is not finite, before it."""

import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prmd.errors import NotFiniteError, StoppedError
from prmd.models.loading import refuse_not_finite
from prmd.runtime import of_all_processes
from prmd.training.sharding import own_part, requested_sharding

logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NAMED = 8
"""Rows that a message names; a step may have hundreds."""


class StopRequests(TrainerCallback):
    """Ends a training behind the step that is running, with a checkpoint, once its process was asked to stop.

    The second request stops at once, as if nobody listened. Its signal is that of any process of a distributed run.
    """

    def __init__(self) -> None:
        self.signal = 0

    @contextmanager
    def heard(self, name: str) -> Iterator[None]:
        """Listen inside the block.

        Raises:
            StoppedError: at its end, where a stop was asked for; the status is that of a process the signal ended.
        """
        self.step = 0
        former = {}
        if threading.current_thread() is threading.main_thread():  # others cannot listen
            former = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        if self.signal:
            raise StoppedError(
                f"{name}: stopped; the same command continues from step {self.step}", 128 + self.signal
            )

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logger.info("stopping when this step is done and saved; Ctrl-C again stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> TrainerControl:
        self.step = state.global_step
        # one process is asked first, and all have to stop at the same step
        self.signal = of_all_processes(self.signal, "MAX")
        if self.signal:
            control.should_log = control.should_save = control.should_training_stop = True
        return control


def named_rows(names: Sequence[str]) -> str:
    """The rows of a message: `[a, b]`, the first few where they are many."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"[{', '.join(names[:_NAMED])}{more}]"


class RefuseNotFinite(TrainerCallback):
    """Stops a training at the first step whose gradient is not finite, before the weights are changed by it.

    Transformers logs the mean of earlier losses in place of one that is NaN, and clips a gradient of NaN to NaN: without
    this a training goes on to its end on weights of NaN. Where weights are spread over processes each looks at its part, and
    all stop together. ZeRO keeps gradients to itself: there the norm that it logs is looked at, before anything is saved.

    Args:
        name: of the training, for people.
        steps: names of the pairs of every step.
    """

    def __init__(self, name: str, steps: Sequence[Sequence[str]]) -> None:
        self.name, self.steps = name, steps

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        gradients = [own_part(p.grad) for p in kwargs["model"].parameters() if p.grad is not None]
        largest = torch.nn.utils.get_total_norm([g for g in gradients if g.numel()], norm_type=float("inf"))
        if not _everywhere(bool(torch.isfinite(largest))):
            rows = named_rows(self.steps[state.global_step])
            raise NotFiniteError(
                f"{self.name}: the gradient is not finite at step {state.global_step + 1}, of the pairs {rows}; nothing of "
                "this step was learned; inspect these pairs or lower the learning rate"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        if requested_sharding() == "ZeRO-3" and not math.isfinite(logs.get("grad_norm", 0.0)):
            rows = named_rows(self.steps[state.global_step - 1])
            raise NotFiniteError(
                f"{self.name}: the gradient is not finite at step {state.global_step}, of the pairs {rows}; nothing of this "
                "step was saved; inspect these pairs or lower the learning rate"
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        remedy = "its last step overflowed; lower the learning rate"
        if not requested_sharding():
            refuse_not_finite(kwargs["model"], self.name, remedy)
        elif not _everywhere(all(bool(own_part(p).isfinite().all()) for p in kwargs["model"].parameters())):
            raise NotFiniteError(f"{self.name}: its weights are not finite; {remedy}")


def _everywhere(good: bool) -> bool:
    """Whether it is so in every process: all ask, and get one answer."""
    return bool(of_all_processes(int(good), "MIN"))
