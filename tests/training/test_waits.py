"""When a training waits for the device: once for the losses of a step, once for its gradient, and to log; never in a micro-batch."""

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, tiny_config, tiny_tokenizer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from transformers.training_args import OptimizerNames

from prmd.config.policy import PolicySection
from prmd.config.shared import TrainingConfig
from prmd.errors import NotFiniteError
from prmd.models.loading import load_tokenizer_from
from prmd.models.prefix_rows import on_device
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.models.tokenization import PrefixRow
from prmd.policies.targets import LOSSES, policy_loss
from prmd.rewards.backbone import reward_loss
from prmd.training.arguments import training_arguments
from prmd.training.batches import plan_training
from prmd.training.stopping import RefuseNotFinite
from prmd.training.trainer import PAIR_WEIGHT, PairData, PairLoss, PairTrainer

PAIRS = 16
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "item"}
"""Operators that hand a number, or a shape that only the numbers tell, to Python."""
METHODS = {"tolist", "cpu", "numpy"}
"""The same in one call that is no operator on a CPU."""
POLICY = PolicySection(nll_weight=0.1, gamma=0.1)
META = torch.device("meta")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return load_tokenizer_from(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


class Waits(TorchDispatchMode):
    """Counts what makes Python wait for a device.

    Attributes:
        found: readings of its tensors, by name.
        copies: from elsewhere to it that would wait for what it was given to do before.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.found: Counter[str] = Counter()
        self.copies: list[str] = []
        self.methods = Methods(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        picked = args[1] if name in ("index", "index_put_") else ()
        by_truth = any(t is not None and t.dtype == torch.bool for t in picked)
        here = bool(args) and isinstance(args[0], Tensor) and args[0].device == self.device
        if here and (name in READS or by_truth):
            self.found[name] += 1
        if not here and kwargs.get("device") == self.device and not kwargs.get("non_blocking"):
            self.copies += [name] if args and isinstance(args[0], Tensor) else []
        return func(*args, **kwargs)

    def __enter__(self) -> "Waits":
        super().__enter__()
        self.methods.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.methods.__exit__(*exception)
        super().__exit__(*exception)


class Methods(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in METHODS and args[0].device == self.waits.device:
            self.waits.found[name] += 1
        return func(*args, **(kwargs or {}))


def rows(*, samples: int = 0) -> list[PrefixRow]:
    generator = torch.Generator().manual_seed(0)

    def tokens(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (), generator=generator))
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    return [PrefixRow(tokens(12), tuple(tokens(9) for _ in range(2 + samples))) for _ in range(PAIRS)]


def causal() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config())


def trainer_of(
    model: nn.Module,
    data: PairData,
    loss: Any,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    accumulation: int = 2,
    logging_steps: int = 10**6,
    steps: int = PAIRS,
    callbacks: Any = (),
) -> PairTrainer:
    training = TrainingConfig(
        pairs_per_device=2,
        gradient_accumulation_steps=accumulation,
        logging_steps=logging_steps,
        warmup_ratio=0.0,
        learning_rate=0.05,
    )
    stream = range(min(PAIRS, 2 * accumulation * steps))
    plan = plan_training([row.shared_length for row in data.rows], stream, training, seed=1, processes=1)
    arguments = training_arguments(
        training,
        directory=directory,
        learning_rate=0.05,
        optimizer="adamw_float32",
        bf16=False,
        seed=0,
        steps=plan.steps,
        accumulation=plan.size.accumulation,
    )
    arguments.optim = OptimizerNames.SGD
    guard = RefuseNotFinite("test", [[str(i) for i in step] for step in plan.pairs])
    return PairTrainer(
        model,
        arguments,
        data=data,
        plan=plan.batches,
        eval_data=None,
        loss_function=loss,
        tokenizer=tokenizer,
        callbacks=[guard, *callbacks],
    )


def columns() -> dict[str, Any]:
    """Every column of pairs that a loss reads, as `policies.targets` makes them."""
    one = torch.linspace(-1, 1, PAIRS)
    return {
        "ref_logps": torch.stack([one - 30, one - 31], dim=1),
        "chosen_length": torch.full((PAIRS,), 5.0),
        "target_margins": one,
        "objective_targets": torch.stack([one, one + 1, one - 1], dim=1),
        "member_targets": torch.randn(PAIRS, 3, 4),
        "length_difference": one,
        "offsets": one,
        "other_margins": one,
        "label_weight": torch.full((PAIRS,), 0.5),
        PAIR_WEIGHT: torch.ones(PAIRS),
    }


@pytest.mark.parametrize("kind", [*LOSSES, "reward_model"])
def test_a_micro_batch_waits_for_nothing(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """On the meta device no number can be read: whatever waits for one raises."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())  # unknown there

    def loss(outputs: Tensor, found: Any) -> PairLoss:
        if kind == "reward_model":
            return reward_loss(outputs, 0.01, found["offsets"])
        return policy_loss(outputs, found, POLICY, kind=kind)

    def wrapped() -> nn.Module:
        if kind == "reward_model":
            return SequenceRewards(LlamaForSequenceClassification(tiny_config(num_labels=1)))
        return SequenceLogps(causal())

    data = PairData(rows(samples=0 if kind == "reward_model" else 2), columns())
    trainer = trainer_of(wrapped(), data, loss, tokenizer, tmp_path)
    trainer.accelerator.gradient_state._set_sync_gradients(False)
    model, batch = wrapped().to(META), trainer.train_dataset[0]
    assert {"weight", "pair_index", "padding"} <= {k for k, v in batch.items() if not isinstance(v, Tensor)}
    batch = on_device(batch, META)
    with Waits("meta") as waits:
        trainer.compute_loss(model, batch).backward()
    assert not waits.found and not waits.copies
    assert all(p.grad is not None and p.grad.device == META for p in model.parameters())
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the last one of a step reads its losses
        trainer.compute_loss(model, batch)


def dpo(logps: Tensor, found: Any) -> PairLoss:
    return policy_loss(logps, found, PolicySection(), kind="dpo")


def waits_of(trainer: PairTrainer, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], list[int]]:
    """What a training waited for, batches being made aside, and how often in each of its micro-batches."""
    waits, each, step = Waits("cpu"), [], trainer.training_step
    make = type(trainer.train_dataset).__getitem__

    def counted_step(*arguments: Any) -> Tensor:
        before = waits.found.total()
        loss = step(*arguments)
        each.append(waits.found.total() - before)
        return loss

    def uncounted(self: Any, index: int) -> Any:
        before = Counter(waits.found)
        batch = make(self, index)
        waits.found = before
        return batch

    trainer.training_step = counted_step  # type: ignore[method-assign]
    monkeypatch.setattr(type(trainer.train_dataset), "__getitem__", uncounted)
    with waits:
        trainer.train()
    return waits.found, each


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_waits_for_its_losses_and_its_gradient(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    data, totals = PairData(rows(), columns()), []
    for steps in (1, 2):
        with monkeypatch.context() as patch:
            trainer = trainer_of(
                SequenceLogps(causal()),
                data,
                dpo,
                tokenizer,
                tmp_path / str(steps),
                accumulation=accumulation,
                steps=steps,
            )
            found, each = waits_of(trainer, patch)
        assert each == ([0] * (accumulation - 1) + [1]) * steps
        totals.append(found.total())
    assert totals[1] - totals[0] == 2, "the losses of all its micro-batches, and its gradient"


def test_a_log_waits_for_loss_norm_and_means_alone(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, totals = PairData(rows(), columns()), []
    for logging_steps in (1, 4):  # of four steps the first is logged in any case
        with monkeypatch.context() as patch:
            trainer = trainer_of(
                SequenceLogps(causal()),
                data,
                dpo,
                tokenizer,
                tmp_path / str(logging_steps),
                logging_steps=logging_steps,
            )
            totals.append(waits_of(trainer, patch)[0])
            assert len([r for r in trainer.state.log_history if "loss" in r]) == (
                4 if logging_steps == 1 else 2
            )
    assert {k: v / 2 for k, v in (totals[0] - totals[1]).items()} == {
        "_local_scalar_dense": 2,
        "tolist": 1,
    }


class Kept(TrainerCallback):
    """The weights behind the last whole step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = [p.detach().clone() for p in kwargs["model"].parameters()]


@pytest.mark.parametrize("bad", range(0, PAIRS, 3))
def test_a_loss_that_is_not_finite_stops_behind_its_step_before_a_weight_moves(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, bad: int
) -> None:
    def loss(logps: Tensor, found: Any) -> PairLoss:
        return PairLoss(logps.sum(dim=1) + found["bad"], {"x": logps[:, 0].detach()})

    marked = torch.zeros(PAIRS).index_fill(0, torch.tensor([bad]), float("nan"))
    kept, model = Kept(), SequenceLogps(causal())
    before = [p.detach().clone() for p in model.parameters()]
    trainer = trainer_of(
        model, PairData(rows(), {"bad": marked}), loss, tokenizer, tmp_path, accumulation=4, callbacks=[kept]
    )
    place = next(i for i, micro in enumerate(trainer.plan) if bad in micro.rows)
    batch = ", ".join(str(i) for i in trainer.plan[place].rows)
    with pytest.raises(NotFiniteError) as stop:
        trainer.train()
    step = place // 4
    assert str(stop.value).startswith(
        f"loss is not finite at step {step + 1} for training pairs [{bad}] (batch of pairs [{batch}]); pair {bad} reads"
    )
    assert trainer.state.global_step == step
    expected = kept.weights or before
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected, strict=True))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_on_device_moves_tensors_and_nothing_else() -> None:
    batch = {"a": torch.arange(3), "rows": (1, 2), "weight": 0.5}
    moved = on_device(batch, META)
    assert moved["a"].device == META and moved["rows"] == (1, 2) and moved["weight"] == 0.5
    same = on_device(batch, torch.device("cpu"))
    assert torch.equal(same["a"], batch["a"])
    cuda, copies = torch.device("cuda", 0), []
    pinned = SimpleNamespace(to=lambda device, **how: copies.append((device, how)))
    host = torch.arange(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "pin_memory", lambda self: pinned)
        on_device({"a": host}, cuda)
    assert copies == [(cuda, {"non_blocking": True})]
