"""How full a card is worked, on cards that a test makes up: what is merged and kept, and that the training stays the same."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_causal_lm, tiny_config
from tiny_training import LORA, TRAINING, a_run, adapter, loss_of, train
from torch import Tensor

from prmd.config.shared import DataConfig, ModelConfig, RewardModelConfig, TrainingConfig, TuningConfig
from prmd.errors import ConfigError
from prmd.models.card import USABLE
from prmd.models.tokenization import PrefixRow
from prmd.training import memory, merging
from prmd.training import run as training_run
from prmd.training.batches import TrainingPlan, plan_training
from prmd.training.checkpoints import name_checkpoints
from prmd.training.memory import MemoryPlan, plan_memory
from prmd.training.merging import Filling, fill_card
from prmd.training.precision import Precision, lora_precision
from prmd.training.rehearsal import BatchShape, rehearse_training
from prmd.training.run import TrainingRun
from prmd.training.trainer import Columns, PairData, PairLoss

ALIKE = [PrefixRow((1, 50 + i, 60), ((70 + i, 75, 76, 2), (90 + i, 2, 2))) for i in range(12)]
"""Of one length, so that any of them may share a micro-batch."""
SINGLE = TRAINING.model_copy(
    update={"pairs_per_device": 1, "gradient_accumulation_steps": 4, "checkpoints": (1.0,)}
)
CONFIG = tiny_config(num_hidden_layers=4)
PLANNED = partial(
    plan_memory, model_config=CONFIG, tuning=LORA, precision=lora_precision(LORA, bfloat16=False), task="policy",
)  # fmt: skip


def a_plan(rows: list[PrefixRow], training: TrainingConfig) -> TrainingPlan:
    lengths = [row.shared_length for row in rows]
    return plan_training(lengths, range(len(rows)), training, seed=0, processes=1)


def filled(rows: list[PrefixRow], card: int | None, **changes: Any) -> Filling:
    training = SINGLE.model_copy(update=changes)
    return fill_card(a_plan(rows, training), rows, training, planned=PLANNED, device_bytes=card)


def taken(pairs: int, recomputing: bool) -> MemoryPlan:
    """What so many pairs at once take."""
    training = SINGLE.model_copy(update={"gradient_checkpointing": recomputing})
    return PLANNED(training=training, device_bytes=None, rows=ALIKE[:pairs])


def card_for(total: int) -> int:
    return int(total / USABLE) + 1


@pytest.fixture(autouse=True, scope="module")
def rehearsed_once() -> Iterator[None]:
    """The same few micro-batches are planned again and again, for many cards."""
    known: dict[Any, Any] = {}

    def rehearse(model_config: Any, batch: BatchShape, **how: Any) -> Any:
        key = (model_config.num_hidden_layers, batch, str(how))
        if key not in known:
            known[key] = rehearse_training(model_config, batch, **how)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "rehearse_training", rehearse)
        yield


# ------------------------------------------------------------------ what is chosen
@pytest.mark.slow
def test_merging_comes_before_keeping_layers() -> None:
    every, none = taken(4, True).total, taken(4, False).total
    assert taken(2, True).total < taken(1, False).total < every < none
    four = filled(ALIKE, card_for(every))
    assert four.plan.size.accumulation == 1 and four.recomputed == 4 and four.merged and not four.keeps
    some = filled(ALIKE, card_for((every + none) // 2))
    assert some.plan.size.accumulation == 1 and 0 < some.recomputed < 4 and some.keeps
    assert filled(ALIKE, card_for(none)).recomputed == 0
    two = filled(ALIKE, card_for(every) - 8)
    assert two.plan.size.accumulation == 2 and two.memory.fits
    assert two.plan.tokens == 2 * ALIKE[0].shared_length


def test_a_card_that_holds_no_more_than_the_yaml_asks_merges_nothing() -> None:
    single = filled(ALIKE, card_for(taken(1, True).total))
    assert (single.plan.size.accumulation, single.recomputed, single.merged) == (4, 4, False)
    none_fits = filled(ALIKE, card_for(taken(1, True).total) - 8)
    assert none_fits.plan == single.plan and none_fits.recomputed == 4 and none_fits.memory.fits is False


def test_what_the_yaml_says_is_obeyed() -> None:
    large = card_for(taken(4, False).total)
    apart = filled(ALIKE, large, merge_micro_batches=False)
    assert apart.plan.size.accumulation == 4 and apart.recomputed == 0
    assert filled(ALIKE, large, gradient_checkpointing=True).recomputed == 4
    small = filled(ALIKE, card_for(taken(4, True).total), gradient_checkpointing=False)
    assert small.recomputed == 0 and small.plan.size.accumulation > 1 and small.memory.fits


def test_without_a_card_nothing_is_merged_and_nothing_recomputed() -> None:
    filling = filled(ALIKE, None)
    assert filling.plan == a_plan(ALIKE, SINGLE) and filling.recomputed == 0
    assert filled(ALIKE, None, gradient_checkpointing=True).recomputed is None, "all"
    assert filling.describe() == "4 pairs, in 4 micro-batches"


def test_what_was_done_is_said() -> None:
    every = taken(4, True)
    filling = filled(ALIKE, card_for(every.total))
    assert filling.describe() == (
        "4 pairs, in 1 micro-batches (4 of 1 pairs merged: 0.0 of 0.0 GiB, 4 of 4 layers recomputed)"
    )
    plan = replace(filling.memory, weights=17 * 2**30, device_bytes=32 * 2**30, recomputed=0)
    assert (
        "(4 of 1 pairs merged: 17.0 of 29.4 GiB, all layers kept)" in replace(filling, memory=plan).describe()
    )


def test_the_largest_micro_batch_of_all_steps_is_planned() -> None:
    """A pair much longer than the others takes more than three of them merged, and stays alone."""
    long = PrefixRow((1,) * 40, ((5,) * 30, (6,) * 30))
    rows = [*ALIKE, *ALIKE[:3], long]
    alone = PLANNED(training=SINGLE, device_bytes=None, rows=[long]).total
    filling = filled(rows, card_for(alone))
    assert filling.plan.size.accumulation == 2 and filling.plan.tokens == 3 * ALIKE[0].shared_length
    assert [micro.rows for micro in filling.plan.batches if 15 in micro.rows] == [(15,)]
    assert filling.memory.total == alone and filling.memory.fits and filling.recomputed == 0


def test_a_family_that_cannot_be_planned_trains_as_the_yaml_says() -> None:
    def unplanned(**keywords: Any) -> MemoryPlan:
        raise ConfigError("the memory of the new family cannot be planned")

    plan = a_plan(ALIKE, SINGLE)
    for chosen, recomputed in (("auto", None), (True, None), (False, 0)):
        training = SINGLE.model_copy(update={"gradient_checkpointing": chosen})
        filling = fill_card(plan, ALIKE, training, planned=unplanned, device_bytes=2**33)
        assert filling.plan == plan and filling.recomputed == recomputed and filling.memory is None


# ------------------------------------------------------------------ trainings on a card that is made up
@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("merging") / "base")


@pytest.fixture
def shared(base: Path, tmp_path: Path) -> RewardModelConfig:
    return RewardModelConfig(
        artifact_root=str(tmp_path / "root"),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(base), revision=None, dtype="float32"),
    )


def a_card(monkeypatch: pytest.MonkeyPatch, kept: float = 1.0) -> None:
    """One that holds four pairs, and so large a share of what its two layers would keep of them."""
    planned = partial(PLANNED, model_config=tiny_config(), device_bytes=None, rows=ALIKE[:4])
    every, none = (
        planned(training=SINGLE.model_copy(update={"gradient_checkpointing": c})).total for c in (True, False)
    )
    monkeypatch.setattr(merging, "device_memory", lambda: card_for(round(every + kept * (none - every))))


def alike(shared: RewardModelConfig, directory: Path, **changes: Any) -> TrainingRun:
    return a_run(
        shared, directory, **({"data": PairData(ALIKE, {}), "training": SINGLE, "eval_data": None} | changes)
    )


class Broken:
    """`loss_of` that runs out of memory at some of its calls, and notes the pairs of each."""

    def __init__(self, *at: int) -> None:
        self.at, self.pairs = at, []

    def __call__(self, logps: Tensor, columns: Columns) -> PairLoss:
        self.pairs.append(len(logps))
        if len(self.pairs) in self.at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return loss_of(logps, columns)


def outcome(run: TrainingRun) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, gradient norms and the adapters in the end."""
    history, steps = train(run)
    name_checkpoints(run.directory, steps)
    curves = [row[name] for name in ("loss", "grad_norm") for row in history if name in row]
    assert len(curves) == 6 and len(set(curves)) == 6
    return curves, adapter(run.directory / "checkpoints" / "end")


def assert_the_same(found: tuple[list[float], dict], expected: tuple[list[float], dict]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=2e-4)
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kept", "layers"), [(1.0, "all layers kept"), (0.6, "1 of 2 layers recomputed")])
def test_a_merged_training_learns_what_one_without_a_card_does(
    shared: RewardModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kept: float,
    layers: str,
) -> None:
    apart, together = Broken(), Broken()
    expected = outcome(alike(shared, tmp_path / "apart", loss_function=apart))
    a_card(monkeypatch, kept)
    caplog.set_level(logging.INFO, logger="prmd")
    found = outcome(alike(shared, tmp_path / "together", loss_function=together))
    assert apart.pairs == [1] * 12 and together.pairs == [4] * 3
    assert "3 optimizer steps of 4 pairs, in 1 micro-batches (4 of 1 pairs merged: " in caplog.text
    assert layers in caplog.text
    assert_the_same(found, expected)


@pytest.mark.slow
def test_a_first_step_that_does_not_fit_begins_again_with_half_as_much(
    shared: RewardModelConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = SINGLE.model_copy(update={"checkpoints": (0.0, 1.0)})
    run = partial(alike, shared, training=training, eval_data=PairData(ALIKE[:3], {}))
    expected = outcome(run(tmp_path / "whole"))
    a_card(monkeypatch)
    caplog.set_level(logging.INFO, logger="prmd")
    broken = Broken(2)  # the first call is the evaluation of the start
    found = outcome(run(tmp_path / "broken", loss_function=broken))
    assert broken.pairs[:4] == [3, 4, 2, 2] and broken.pairs.count(2) == 6
    assert broken.pairs.count(3) == 2, "the start is evaluated once"
    half = 2 * ALIKE[0].shared_length
    assert f"every layer recomputed and nothing merged beyond {half} tokens" in caplog.text
    assert caplog.text.count("the first step does not fit") == 1
    assert "in 2 micro-batches (4 of 1 pairs merged: 0.0 of 0.0 GiB, 2 of 2 layers recomputed)" in caplog.text
    assert_the_same(found, expected)


@pytest.mark.slow
def test_what_never_fits_ends_with_what_to_change(
    shared: RewardModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_card(monkeypatch)
    broken = Broken(*range(1, 100))
    with pytest.raises(
        ConfigError, match=r"the card's memory is full at step 1 \(CUDA out of memory.*; set a smaller"
    ):
        train(alike(shared, tmp_path / "run", loss_function=broken))
    assert broken.pairs == [4, 2, 1]


def test_a_later_step_that_does_not_fit_is_an_error_and_goes_on_with_another_cut(
    shared: RewardModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = SINGLE.model_copy(update={"checkpoints": (0.34, 1.0)})
    expected = outcome(alike(shared, tmp_path / "whole", training=training))
    a_card(monkeypatch)
    broken = Broken(2)
    message = (
        "full at step 2 .*; set training.merge_micro_batches: false and training.gradient_checkpointing: true"
    )
    with pytest.raises(ConfigError, match=message):
        train(alike(shared, tmp_path / "broken", training=training, loss_function=broken))
    assert broken.pairs == [4, 4]
    changed = training.model_copy(update={"merge_micro_batches": False, "gradient_checkpointing": True})
    resumed = Broken()
    found = outcome(alike(shared, tmp_path / "broken", training=changed, loss_function=resumed))
    assert resumed.pairs == [1] * 8, "the first step is not learnt again"
    assert_the_same(found, expected)


def test_several_processes_do_not_begin_again(
    shared: RewardModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one of them may have run out; the others would wait for it."""
    a_card(monkeypatch)
    real = training_run.get_runtime

    def breaks(logps: Tensor, columns: Columns) -> PairLoss:
        monkeypatch.setattr(training_run, "get_runtime", lambda: replace(real(), world_size=2))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(ConfigError, match=r"at step 1 .*; set training.merge_micro_batches: false and"):
        train(alike(shared, tmp_path / "run", loss_function=breaks))


def test_data_parallelism_is_planned_with_gradients_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = Precision("adamw_float32", True, False, 1e-5, "full")
    plan = partial(PLANNED, tuning=TuningConfig(), precision=precision, training=SINGLE, device_bytes=None)
    one = plan()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert plan().gradients == 2 * one.gradients > 0 and plan().weights == one.weights
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert plan().gradients == one.gradients
