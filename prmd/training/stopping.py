"""Ctrl-C and SIGTERM while training: the step is finished and saved, and the same command goes on from it."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prmd.errors import StoppedError
from prmd.runtime import get_device

logger = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        if dist.is_initialized():  # one process is asked first, and all have to stop at the same step
            asked = torch.tensor(self.signal, device=get_device())
            dist.all_reduce(asked, op=dist.ReduceOp.MAX)
            self.signal = int(asked)
        if self.signal:
            control.should_log = control.should_save = control.should_training_stop = True
        return control
