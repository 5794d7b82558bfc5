"""Where the seconds of a stage go, seen from outside: the stages run as they are, and what they call is timed.

A stage's functions are found wherever the library has them by name and are replaced, for as long as a run lasts, by
themselves with a clock. Optimizer steps are timed by a callback that transformers gives to every trainer, ours and TRL's.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import trainer as transformers_trainer

from benchmarks.side_by_side.trainings import synchronize
from prmd.artifacts import io
from prmd.inference import generation, scoring
from prmd.inference.scoring import gather
from prmd.models import agreement, loading, tokenization
from prmd.models.prefix_rows import PADDING
from prmd.models.tokenization import PrefixRow
from prmd.training import checkpoints, memory, precision
from prmd.training.sharding import own_part

LEAST_SECONDS = 0.1
"""A call that takes less has no row of its own; it is in the row of the whole stage."""
WARM_STEPS = 2
"""Steps in which kernels and the 8-bit optimizer compile: the first, and the first that finds optimizer states."""
Say = Callable[..., None]
"""(phase, seconds, **facts): what is done with a phase that is over."""


def _watched() -> dict[str, list[Callable[..., Any]]]:
    """Functions of the library by the phase that they are."""
    return {
        "load": [loading.load_causal_lm, loading.load_base_classifier, loading.load_classifier],
        "check": [precision.refuse_if_stuck, agreement.check_agreement],
        "plan": [memory.plan_memory],
        "tokenize": [tokenization.tokenize_pairs],
        "score": [scoring.score_rows],
        "sample": [generation.generate],
        "hash": [io.files_sha256],
        "save": [checkpoints.copy_model, io.make_durable],
    }


_METHODS = {"save": [(PreTrainedModel, "save_pretrained"), (Trainer, "_save_checkpoint")]}


def _facts(phase: str, arguments: Sequence[Any], result: Any) -> dict[str, int]:
    """What a phase got through, of the calls that say it."""
    if phase == "sample":
        return {"tokens": sum(len(response.token_ids) for prompt in result for response in prompt)}
    if phase == "score":
        return {"tokens": sum(row.shared_length for row in arguments[0])}
    return {}


class Watch:
    """Seconds by phase; a call within another counts for the inner one alone.

    Args:
        say: is told of every call of at least `LEAST_SECONDS`.
    """

    def __init__(self, say: Say) -> None:
        self.say = say
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time what the library calls meanwhile."""
        timed = [(f, self._timed(phase, f)) for phase, functions in _watched().items() for f in functions]
        with ExitStack() as stack:
            for function, clocked in timed:
                stack.enter_context(replaced(function, clocked))
            for phase, methods in _METHODS.items():
                for owner, name in methods:
                    method = getattr(owner, name)
                    stack.callback(setattr, owner, name, method)
                    setattr(owner, name, self._timed(phase, method))
            yield

    def _timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            begin = time.perf_counter()
            self._inner.append(0.0)
            try:
                result = function(*arguments, **keywords)
                synchronize()
            finally:
                whole = time.perf_counter() - begin
                own = whole - self._inner.pop()
                self.seconds[phase] = self.seconds.get(phase, 0.0) + own
                if self._inner:
                    self._inner[-1] += whole
            if own >= LEAST_SECONDS:
                self.say(phase, own, **_facts(phase, arguments, result))
            return result

        return timed


@contextmanager
def replaced(function: Callable[..., Any], other: Callable[..., Any]) -> Iterator[None]:
    """Have the library call another function wherever it has this one by name."""
    places = [
        (module, name)
        for key, module in list(sys.modules.items())
        if key.partition(".")[0] == "prmd"
        for name, value in list(vars(module).items())
        if value is function
    ]
    for module, name in places:
        setattr(module, name, other)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, function)


class OutOfTimeError(Exception):
    """The minutes of a run are over in the middle of a training."""


@dataclass(frozen=True)
class LargestBatch:
    """The shape of the micro-batch of most tokens, padding included, that one of our trainings was given.

    Attributes:
        sequences, width: of its tokens.
        responses: how many it holds; more than sequences where prompts are shared.
        predicted: tokens of the responses.
    """

    sequences: int
    width: int
    responses: int
    predicted: int

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> "LargestBatch":
        """Of tensors as `collate_rows` gives them."""
        return cls(*batch["input_ids"].shape, len(batch["last_index"]), len(batch["target_ids"]))

    @property
    def tokens(self) -> int:
        return self.sequences * self.width

    @property
    def pairs(self) -> int:
        return self.responses // 2

    def row(self) -> PrefixRow:
        """A row of which `pairs` make a batch of this shape: what memory is planned by."""
        rows = self.sequences if self.responses > self.sequences else self.responses
        said = self.predicted // rows  # by each row
        prompt = (0,) * (self.width - said)
        if self.responses > self.sequences:
            return PrefixRow(prompt, ((0,) * (said - said // 2), (0,) * (said // 2)))
        return PrefixRow(prompt, ((0,) * said,) * 2)


class StepWatch(TrainerCallback):
    """Seconds, tokens and memory of the optimizer steps of one training.

    Args:
        say: is told of the first step and, at the end or when time is over, of all.
        facts: of the steps behind the first, from (their seconds, their tokens over all processes, how many they are, the
            largest micro-batch; None in TRL's trainings).
        over: whether time is over; asked after every step, of all processes alike.
    """

    def __init__(
        self,
        say: Say,
        facts: Callable[[float, float, int, LargestBatch | None], Mapping[str, Any]],
        over: Callable[[], bool],
    ) -> None:
        self.say, self.facts, self.over = say, facts, over
        self.seconds: list[float] = []
        self.tokens: list[float] = []
        self.parts: dict[str, float] = {}
        self.largest: LargestBatch | None = None
        self._count: torch.Tensor | float = 0.0
        self._mark = 0.0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: nn.Module, **_: Any
    ) -> None:
        parameters = list(model.parameters())
        whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
        held = gather([sum(own_part(p).numel() for p in parameters) / whole])
        self.say("held", 0.0, parameters=whole, share_of_each=[round(share, 4) for share in held])
        model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        self.seconds, self.tokens = [], []  # a training whose first step did not fit may begin again
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self._restart()

    def _count_tokens(self, model: nn.Module, arguments: Any, keywords: Mapping[str, Any]) -> None:
        if model.training:  # held-out passes are no part of a step
            own = keywords.get("segment_ids")
            mask = keywords["attention_mask"] if own is None else own != PADDING
            self._count = self._count + mask.sum()
            if own is not None:
                seen = LargestBatch.of(keywords)
                self.largest = max(self.largest or seen, seen, key=lambda batch: batch.tokens)

    def _restart(self, *_: Any, **__: Any) -> None:
        synchronize()
        self._mark, self._count = time.perf_counter(), 0.0

    on_evaluate = on_save = on_log = _restart  # which lie between steps

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self._mark)
        self.tokens.append(sum(gather([float(self._count)])))
        last = state.global_step == state.max_steps
        if len(self.seconds) == 1:
            self.say("first_step", self.seconds[0])
        if last or self.over():
            self._report()
            if not last:
                raise OutOfTimeError(f"stopped after step {state.global_step} of {state.max_steps}")
        self._restart()

    def _report(self) -> None:
        steady, tokens = self.seconds[WARM_STEPS:], self.tokens[WARM_STEPS:]
        if not steady:
            return
        one = statistics.median(steady)
        compiling = max(0.0, sum(self.seconds[:WARM_STEPS]) - WARM_STEPS * one)
        peaks = gather([torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0])
        facts = {"steps": len(steady), "fastest": min(steady), "slowest": max(steady)}
        facts |= {
            "peak_bytes": max(peaks) or None,
            **self.facts(sum(steady), sum(tokens), len(steady), self.largest),
        }
        self.parts = {"compile": compiling, "steps": sum(self.seconds) - compiling}
        self.say("compile", compiling, steps=WARM_STEPS)
        self.say("step", one, **facts)


@contextmanager
def every_trainer_has(callback: TrainerCallback) -> Iterator[None]:
    """Give a callback to each trainer that is made meanwhile, whoever makes it."""
    transformers_trainer.DEFAULT_CALLBACKS.append(callback)
    try:
        yield
    finally:
        transformers_trainer.DEFAULT_CALLBACKS.remove(callback)
