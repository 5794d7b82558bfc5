"""The one trainer: reward models, distillation and our DPO all train on prefix-shared pairs through it.

`PairTrainer` is a `transformers.Trainer` over planned micro-batches (`batches.plan_training`). What differs between
trainings is data: the wrapped model's output (rewards or log-probabilities), columns per pair, and a loss function.
Checkpoint names are in `checkpoints`; the losses themselves in `pessimism.losses`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prmd.errors import DataError, NotFiniteError
from prmd.models.prefix_rows import collate_rows, on_device, padding_share, plan_scoring
from prmd.models.tokenization import PrefixRow
from prmd.pairs import PreferencePair
from prmd.pessimism.losses import learning_measures
from prmd.runtime import get_device, progress, said_if_slow
from prmd.training.batches import MicroBatch
from prmd.training.sharding import RefuseUnsharded, in_step, prepare_fsdp
from prmd.training.stopping import named_rows

Columns = Mapping[str, Tensor]
"""What a loss reads of a batch beside the model's outputs: [B, ...] by name, and what `BeforeStep` found of the whole step."""

PAIR_WEIGHT = "pair_weight"
"""Column of training pairs by which the trainer multiplies the whole loss of each; held-out pairs have none."""


def weight_column(pairs: Sequence[PreferencePair], added: int = 0) -> dict[str, Tensor]:
    """The column `PAIR_WEIGHT` of training pairs, float32 [n + added]; nothing where none has a weight.

    Args:
        added: rows behind these that no label is of; they weigh 1.
    """
    if all(pair.weight is None for pair in pairs):
        return {}
    weights = [1.0 if pair.weight is None else pair.weight for pair in pairs]
    return {PAIR_WEIGHT: torch.tensor(weights + [1.0] * added)}


@dataclass(frozen=True)
class PairLoss:
    """Loss of each pair and what is logged about it, every tensor [B]."""

    loss: Tensor
    metrics: dict[str, Tensor]


LossFunction = Callable[[Tensor, Columns], PairLoss]
"""([B, 2] rewards or logps of (chosen, rejected), columns of the batch) -> `PairLoss`."""

BeforeStep = Callable[[nn.Module, Sequence[Sequence[int]]], Columns]
"""(model, rows of each micro-batch of an optimizer step, of all processes) -> further columns of all these batches."""


@dataclass(frozen=True)
class PairData:
    """Tokenised pairs with one tensor [n_pairs, ...] per column the loss needs, and `PAIR_WEIGHT` where pairs have weights.

    Attributes:
        ids: of the pairs, for people; without any, a pair is called by its index.
    """

    rows: Sequence[PrefixRow]
    columns: Columns
    ids: Sequence[str] = ()

    def name(self, index: int) -> str:
        """What a message calls a pair."""
        return self.ids[index] if self.ids else str(index)

    def batch(self, indices: Sequence[int], *, pad_id: int, share_prompt: bool) -> dict[str, Any]:
        """Collated tensors of these pairs; columns are named `column/<name>`."""
        tensors = collate_rows([self.rows[i] for i in indices], pad_id=pad_id, share_prompt=share_prompt)
        index = torch.tensor(list(indices))
        return tensors | {f"column/{name}": values[index] for name, values in self.columns.items()}


def split_columns(batch: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What of `PairData.batch` a model takes, and the columns by their names."""
    columns = {k.removeprefix("column/"): v for k, v in batch.items() if k.startswith("column/")}
    return {k: v for k, v in batch.items() if not k.startswith("column/") and k not in HOST_FACTS}, columns


HOST_FACTS = ("weight", "pair_index", "padding")
"""What of a micro-batch are plain numbers: read from a device, each would wait for all that it was given to do."""


class _PlannedBatches(Dataset):
    """Item i is the i-th micro-batch of the plan, collated, with its `HOST_FACTS`."""

    def __init__(
        self, data: PairData, plan: Sequence[MicroBatch], *, pad_id: int, share_prompt: bool
    ) -> None:
        self.data, self.plan, self.pad_id, self.share_prompt = data, plan, pad_id, share_prompt

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> dict[str, Any]:
        micro = self.plan[index]
        batch = self.data.batch(micro.rows, pad_id=self.pad_id, share_prompt=self.share_prompt)
        _, padding = padding_share(batch)
        return batch | {"weight": micro.weight, "pair_index": micro.rows, "padding": int(padding)}


class _Unread:
    """Losses that were computed and not yet looked at: one look at all of them waits for the device once."""

    def __init__(self) -> None:
        self.losses: list[tuple[Tensor, Sequence[int]]] = []

    def add(self, loss: Tensor, pairs: Sequence[int]) -> None:
        """Add losses [B] of these pairs."""
        self.losses.append((loss.detach(), pairs))

    def first_bad(self) -> tuple[list[int], Sequence[int]] | None:
        """Pairs of the first batch whose losses are NaN or infinite, and all pairs of that batch; forgets what was added."""
        added, self.losses = self.losses, []
        if not added or bool(torch.cat([loss for loss, _ in added]).isfinite().all()):
            return None
        for loss, pairs in added:
            fine = loss.isfinite().tolist()
            if not all(fine):
                return [pair for pair, good in zip(pairs, fine, strict=True) if not good], pairs
        return None


class _Means:
    """Sums of logged values over pairs since the last log, so that every mean weighs pairs alike."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add values of each pair, [B]; they stay on the device until `drain`."""
        for name, values in metrics.items():
            total = values.detach().double().sum()
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.count += len(next(iter(metrics.values())))

    def drain(self) -> dict[str, float]:
        """Means over all processes; empty when nothing was added."""
        names = sorted(self.sums)
        count = torch.tensor(float(self.count), dtype=torch.float64, device=get_device())
        totals = torch.stack([*(self.sums[name] for name in names), count])
        if dist.is_initialized():
            dist.all_reduce(totals)
        *sums, pairs = totals.tolist()
        self.sums, self.count = {}, 0
        return {name: value / pairs for name, value in zip(names, sums, strict=True)} if pairs else {}


class PairTrainer(Trainer):
    """`transformers.Trainer` over planned pair batches.

    Args:
        model: `SequenceRewards` or `SequenceLogps`; its wrapped model is what is saved.
        args: from `training_arguments`.
        data, plan: training pairs and their micro-batches.
        eval_data: held-out pairs, or None.
        loss_function: see `LossFunction`.
        before_step: see `BeforeStep`; None where the loss of a batch needs its own pairs alone.
        tokenizer: saved with every checkpoint.
        share_prompt: see `models.sequence_models.supports_shared_prompts`.
        eval_tokens: tokens per batch of the held-out pairs.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        data: PairData,
        plan: Sequence[MicroBatch],
        eval_data: PairData | None,
        loss_function: LossFunction,
        tokenizer: PreTrainedTokenizerBase,
        before_step: BeforeStep | None = None,
        share_prompt: bool = True,
        eval_tokens: int = 8192,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.pad_id, self.share_prompt = tokenizer.pad_token_id, share_prompt
        dataset = _PlannedBatches(data, plan, pad_id=self.pad_id, share_prompt=share_prompt)
        super().__init__(model=model, args=args, train_dataset=dataset, callbacks=list(callbacks))
        self.model_accepts_loss_kwargs = False  # our loss is a mean, to be divided by the accumulation steps
        self.loss_is_scaled_for_ga = False
        prepare_fsdp(self.accelerator, model)
        self.add_callback(RefuseUnsharded)
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.plan, self.tokenizer, self.loss_function = plan, tokenizer, loss_function
        self.before_step, self._step, self._found = before_step, -1, {}
        self.eval_data, self.eval_tokens = eval_data, eval_tokens
        self._means, self._unread = _Means(), _Unread()
        self._tokens, self._padding, self._clock = 0, 0, time.monotonic()

    # -------------------------------------------------------------- batches and loss
    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            batch_size=1,
            shuffle=False,
            collate_fn=itemgetter(0),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and get_device().type == "cuda",
        )
        return self.accelerator.prepare(loader)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device; transformers' own waits for it, and under DeepSpeed rounds reference log-probabilities to bfloat16."""
        return on_device(inputs, self.args.device)

    def pair_loss(self, model: nn.Module, inputs: Mapping[str, Any]) -> PairLoss:
        """Forward one batch and apply the loss function."""
        tensors, columns = split_columns(inputs)
        with self.accelerator.autocast():  # FSDP2 brings none of its own
            outputs = model(**tensors)
        return self.loss_function(outputs.reshape(-1, 2), columns)

    def _of_step(self) -> dict[str, Tensor]:
        """What `before_step` finds of the optimizer step, named as columns of a batch; asked once for all its micro-batches."""
        if self.before_step is not None and self._step != self.state.global_step:
            self._step = self.state.global_step
            size = self.args.gradient_accumulation_steps * self.args.world_size
            batches = self.plan[self._step * size : (self._step + 1) * size]
            found = self.before_step(self.model, [micro.rows for micro in batches if micro.weight])
            self._found = {f"column/{name}": values for name, values in found.items()}
        return self._found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Mean loss of the micro-batch, weighted so that the step's gradient is the mean over its pairs.

        A pair's own weight w_i multiplies its loss: the step minimizes (1/B) sum_i w_i loss_i, which is not divided by
        sum_i w_i, so that a step of light pairs moves the model less. Nothing but the last micro-batch of a step reads from
        the device, so that the next one is prepared while it computes.

        Raises:
            NotFiniteError: a loss of this step is not finite, said at its last micro-batch, before ZeRO or an optimizer
                moves a weight; the message names the pairs.
        """
        result = self.pair_loss(model, inputs | self._of_step())
        self._unread.add(result.loss, inputs["pair_index"])
        if self.accelerator.sync_gradients:
            self._refuse_not_finite(self._unread, self.train_dataset.data)
        if inputs["weight"] > 0:  # else its pairs count elsewhere
            self._means.add(result.metrics)
        self._tokens += inputs["segment_ids"].numel()
        self._padding += inputs["padding"]
        loss, own = result.loss, inputs.get(f"column/{PAIR_WEIGHT}")
        return (loss if own is None else loss * own.to(loss.dtype)).mean() * inputs["weight"]

    def _refuse_not_finite(self, unread: _Unread, data: PairData) -> None:
        """Stop where a loss is NaN or infinite, naming the pairs of the first batch that holds one."""
        if (found := unread.first_bad()) is None:
            return
        bad, pairs = found
        row, first = data.rows[bad[0]], data.name(bad[0])
        text = self.tokenizer.decode(row.prompt_ids[-24:] + row.responses[0][:24])
        training = data is not self.eval_data
        step = f"step {self.state.global_step + int(training)}"
        raise NotFiniteError(
            f"loss is not finite at {step} for {'training' if training else 'held-out'} pairs "
            f"{named_rows([data.name(pair) for pair in bad])} (batch of pairs {named_rows([data.name(p) for p in pairs])}); "
            f"pair {first} reads ...{text!r}...; inspect these pairs or lower the learning rate"
        )

    # -------------------------------------------------------------- logging and evaluation
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add pair-weighted means, tokens per second (this process) and the share of padding to a training log."""
        if "loss" in logs:
            seconds = max(time.monotonic() - self._clock, 1e-9)
            logs = logs | learning_measures(self._means.drain())
            logs["tokens_per_second"] = (self._tokens - self._padding) / seconds
            logs["padding_share"] = self._padding / max(self._tokens, 1)
            self._tokens, self._padding, self._clock = 0, 0, time.monotonic()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Pair-weighted means of loss and metrics on the held-out pairs, named with `eval_` in front."""
        if self.eval_data is None:
            return {}
        started = time.monotonic()
        rows = self.eval_data.rows
        groups = plan_scoring(rows, tokens_per_batch=self.eval_tokens, share_prompt=self.share_prompt)
        means, unread = _Means(), _Unread()
        self.model.eval()
        own = in_step(groups, rank=self.args.process_index, processes=self.args.world_size)
        for group, counts in progress(own, len(own), "held-out pairs"):
            batch = self.eval_data.batch(group, pad_id=self.pad_id, share_prompt=self.share_prompt)
            with torch.no_grad():
                result = self.pair_loss(self.model, self._prepare_inputs(batch))
            unread.add(result.loss, group)
            if counts:
                means.add({"loss": result.loss, **result.metrics})
        self._refuse_not_finite(unread, self.eval_data)
        metrics = {
            f"{metric_key_prefix}_{name}": value for name, value in learning_measures(means.drain()).items()
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._clock += time.monotonic() - started  # held-out passes are no part of the training speed
        return metrics

    # -------------------------------------------------------------- saving and resuming
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with said_if_slow(f"saving {PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"):
            super()._save_checkpoint(model, trial)

    def save_start(self, directory: Path) -> None:
        """Save the model before `train` has prepared it: every process still holds all of it, nothing is gathered."""
        self._save(str(directory))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the wrapped model as transformers or PEFT would, and no pickled arguments."""
        if not self.args.should_save:
            return
        directory = output_dir or self.args.output_dir
        if state_dict is not None:
            state_dict = {name.removeprefix("model."): value for name, value in state_dict.items()}
        self.model.model.save_pretrained(directory, state_dict=state_dict)
        self.tokenizer.save_pretrained(directory)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = model if self.is_fsdp_enabled else self.model.model
        super()._load_from_checkpoint(resume_from_checkpoint, target)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Tied weights are saved under one of their names; anything else that is missing is a broken checkpoint."""
        missing = set(load_result.missing_keys) - set(self.model.unwrapped._tied_weights_keys or ())
        if missing or load_result.unexpected_keys:
            raise DataError(
                f"{self.args.output_dir}: the checkpoint to resume from lacks {sorted(missing)} and has besides "
                f"{load_result.unexpected_keys}; delete it, and start again"
            )
