"""Checkpoints at shares of a training, which one counts, and that a resumed run is the run that was not interrupted."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCABULARY, tiny_causal_lm, tiny_classifier
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

from prmd.artifacts import locks
from prmd.artifacts.io import read_json
from prmd.artifacts.manifest import refuse_changed, remember
from prmd.artifacts.runs import partial_directory, publish
from prmd.config.shared import LoraConfig, ModelConfig, RewardModelConfig, TrainingConfig, TuningConfig
from prmd.errors import DataError
from prmd.models.loading import add_lora, load_base_classifier, load_causal_lm, load_tokenizer
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.models.tokenization import PrefixRow
from prmd.pessimism.losses import bradley_terry_loss
from prmd.runtime import set_seed
from prmd.training.checkpoints import (
    ShareCheckpoints,
    best_step,
    checkpoint_steps,
    mark_complete,
    mean_loss,
    name_checkpoints,
    newest_complete,
    trained_once,
)
from prmd.training.run import TrainingRun, run_training
from prmd.training.trainer import PAIR_WEIGHT, PairData, PairLoss

PAIRS, STEPS = 22, 6  # 4 pairs a step; the last one has 2


# ------------------------------------------------------------------ which and when
def test_shares_become_steps_with_names():
    assert checkpoint_steps((0.0, 0.33, 0.66, 1.0), 100) == {0: "start", 33: "33", 66: "66", 100: "end"}
    assert checkpoint_steps((0.5,), 10) == {5: "50", 10: "end"}
    assert checkpoint_steps((0.0, 0.33, 0.66, 1.0), 1)[1] == "end"  # a training of one step


def test_a_checkpoint_is_logged_evaluated_and_saved_at_its_step_alone():
    callback = ShareCheckpoints({3: "33", 9: "end"})
    for step in range(1, 10):
        control = callback.on_step_end(None, TrainerState(global_step=step), TrainerControl())
        flags = (control.should_log, control.should_evaluate, control.should_save)
        assert flags == ((True,) * 3 if step in (3, 9) else (False,) * 3)


def a_checkpoint(directory: Path, step: int, *, marked: bool = True) -> Path:
    folder = directory / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"):
        (folder / name).write_text(f"{name} of {step}", encoding="utf-8")
    if marked:
        mark_complete(folder)
    return folder


def test_the_newest_whole_checkpoint_counts(tmp_path, caplog):
    assert newest_complete(tmp_path) is None
    for step in (2, 10, 9):
        a_checkpoint(tmp_path, step, marked=step != 10)
    (tmp_path / "checkpoint-0").mkdir()  # a model alone, as is an older one whose state was dropped
    (tmp_path / "checkpoint-11").mkdir()  # killed before there was any state
    assert newest_complete(tmp_path).name == "checkpoint-9"
    assert caplog.messages == [
        f"{tmp_path / 'checkpoint-10'} is not resumed from: it was not finished; it is deleted"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-0",
        "checkpoint-2",
        "checkpoint-9",
    ]
    a_checkpoint(tmp_path, 10)
    assert newest_complete(tmp_path).name == "checkpoint-10"


def test_where_none_is_whole_all_are_made_again_with_their_digests(tmp_path):
    callback = ShareCheckpoints({2: "33", 9: "end"})
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    for step in (2, 3, 4, 9):
        a_checkpoint(tmp_path, step, marked=False)
        callback.on_save(args, TrainerState(global_step=step), TrainerControl())
    remember(tmp_path, [tmp_path / "checkpoint-2" / "model.safetensors"])
    (tmp_path / "training.json").write_text("{}", encoding="utf-8")
    remember(tmp_path, [tmp_path / "training.json"])
    for step in (4, 9):
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").unlink()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").mkdir()
    assert newest_complete(tmp_path) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".digests.json", "training.json"]
    model = a_checkpoint(tmp_path, 2) / "model.safetensors"
    model.write_text("the same on another card", encoding="utf-8")
    refuse_changed(tmp_path)  # is a new file, none that was changed
    assert list(read_json(tmp_path / ".digests.json")) == ["training.json"]


def as_folder(file: Path) -> None:
    file.unlink()
    (file / "inside").mkdir(parents=True)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda folder: (folder / "optimizer.pt").write_bytes(b""),
            "its optimizer.pt has 0 bytes, wanted 17",
        ),
        (lambda folder: (folder / "scheduler.pt").unlink(), "its scheduler.pt is missing"),
        (
            lambda folder: (folder / "rng_state.pth").write_text("rng_state.pth of 7"),
            "its rng_state.pth is not",
        ),
        (
            lambda folder: (folder / "COMPLETE").write_bytes(b""),
            "its COMPLETE is not readable, or of an earlier",
        ),
        (lambda folder: as_folder(folder / "optimizer.pt"), "its optimizer.pt is missing"),
        (lambda folder: as_folder(folder / "COMPLETE"), "it was not finished"),
    ],
)
def test_a_torn_checkpoint_is_skipped_with_a_line(tmp_path, caplog, damage, said):
    a_checkpoint(tmp_path, 4)
    torn = a_checkpoint(tmp_path, 9)
    damage(torn)
    assert newest_complete(tmp_path).name == "checkpoint-4"
    assert len(caplog.messages) == 1 and said in caplog.text and str(torn) in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_the_two_newest_keep_their_state_and_only_planned_ones_their_model(tmp_path):
    callback = ShareCheckpoints({2: "33", 9: "end"})
    args = SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    for step in (2, 3, 4, 9):
        a_checkpoint(tmp_path, step, marked=False)
        callback.on_save(args, TrainerState(global_step=step), TrainerControl())
    assert {p.name: (p / "optimizer.pt").exists() for p in tmp_path.iterdir()} == {
        "checkpoint-2": False,
        "checkpoint-4": True,
        "checkpoint-9": True,
        ".digests.json": False,
    }
    assert [p.name for p in (tmp_path / "checkpoint-2").iterdir()] == ["model.safetensors"]
    name_checkpoints(tmp_path, {2: "33", 9: "end"})
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoints", ".digests.json"}
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"33", "end"}


def test_mean_loss_is_that_of_every_step():
    history = [{"step": 1, "loss": 4.0}, {"step": 2, "eval_loss": 9.0}, {"step": 4, "loss": 1.0}]
    assert mean_loss(history) == pytest.approx((4.0 + 3 * 1.0) / 4)


def test_best_is_highest_accuracy_then_lowest_loss_then_latest():
    curve = [
        {"step": 0, "eval_accuracy": 0.5, "eval_loss": 0.69},
        {"step": 3, "eval_accuracy": 0.7, "eval_loss": 0.60},
        {"step": 6, "eval_accuracy": 0.7, "eval_loss": 0.55},
        {"step": 9, "eval_accuracy": 0.6, "eval_loss": 0.50},
    ]
    assert best_step(curve) == 6
    assert best_step([curve[1], {**curve[1], "step": 7}]) == 7
    untrained = {"step": 0, "eval_accuracy": 1.0, "eval_loss": 0.0}
    assert best_step([untrained, *curve]) == best_step(curve) and best_step([untrained]) == 0


def test_named_checkpoints_hold_the_model_and_nothing_of_the_trainer(tmp_path):
    leftovers = (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "rng_state_1.pth",
        "trainer_state.json",
        "COMPLETE",
    )
    for step in (0, 3, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("model.safetensors", *leftovers):
            (folder / name).write_text(f"{name} {step}", encoding="utf-8")
    steps = {0: "start", 3: "33", 9: "end"}
    name_checkpoints(tmp_path, steps, best=3)
    name_checkpoints(tmp_path, steps, best=3)  # after an interruption in between
    assert not list(tmp_path.glob("checkpoint-*"))
    for name, step in {"start": 0, "33": 3, "end": 9, "best": 3}.items():
        [file] = (tmp_path / "checkpoints" / name).iterdir()
        assert file.read_text(encoding="utf-8") == f"model.safetensors {step}"


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("model.safetensors of 3")])
def test_a_model_that_is_not_what_was_saved_is_not_named(tmp_path, damage):
    for step in (2, 9):
        a_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-9" / "optimizer.pt").write_text("changed", encoding="utf-8")  # goes in any case
    damage(tmp_path / "checkpoint-2" / "model.safetensors")
    with pytest.raises(DataError, match=r"checkpoint-2: its model\.safetensors is .*--force"):
        name_checkpoints(tmp_path, {2: "33", 9: "end"})
    assert (tmp_path / "checkpoint-9" / "model.safetensors").is_file()
    name_checkpoints(tmp_path, {9: "end"})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["end"]


# ------------------------------------------------------------------ resuming
def random_data(n: int, seed: int) -> PairData:
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (), generator=generator))
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    rows = [PrefixRow(tokens(12), (tokens(9), tokens(9))) for _ in range(n)]
    offset = torch.randn(n, generator=generator)
    return PairData(rows, {"offset": offset, PAIR_WEIGHT: 2 * torch.rand(n, generator=generator)})


class Interrupted:
    """Bradley-Terry that raises at its n-th call with gradients (never for None)."""

    def __init__(self, at: int | None) -> None:
        self.at, self.calls = at, 0

    def __call__(self, values: torch.Tensor, columns: dict[str, torch.Tensor]) -> PairLoss:
        self.calls += values.requires_grad
        if self.calls == self.at:
            raise KeyboardInterrupt
        chosen, rejected = 0.1 * values[:, 0] + columns["offset"], 0.1 * values[:, 1]
        margins = (chosen - rejected).detach()
        loss = bradley_terry_loss(chosen_rewards=chosen, rejected_rewards=rejected)
        return PairLoss(loss, {"rewards/margins": margins})


def training_run(
    root: Path, base: Path, *, method: str, task: str, interrupt: int | None
) -> tuple[TrainingRun, object]:
    tuning = TuningConfig(method=method, lora=LoraConfig(r=4, alpha=8, dropout=0.1, learning_rate=1e-2))
    training = TrainingConfig(
        learning_rate=1e-2,
        pairs_per_device=2,
        gradient_accumulation_steps=2,
        logging_steps=4,  # not a divisor of the steps at which checkpoints are made
        epochs=1.0,
    )
    config = RewardModelConfig(
        artifact_root=str(root),
        report_to=(),
        model=ModelConfig(name=str(base), revision=None, dtype="float32"),
        tuning=tuning,
        training=training,
    )
    tokenizer = load_tokenizer(config.model, config.paths)

    def load(master_weights: bool) -> SequenceRewards | SequenceLogps:
        set_seed(3)
        if task == "policy":
            model = load_causal_lm(config.model, config.paths, master_weights=master_weights)
        else:
            model = load_base_classifier(
                config.model, config.paths, pad_token_id=0, master_weights=master_weights
            )
        if method == "lora":
            model = add_lora(model, tuning.lora, task="CAUSAL_LM" if task == "policy" else "SEQ_CLS")
        return SequenceLogps(model) if task == "policy" else SequenceRewards(model)

    run = TrainingRun(
        name="test",
        directory=root / "work",
        shared=config,
        tuning=tuning,
        training=training,
        data=random_data(PAIRS, 0),
        stream=list(range(PAIRS)),
        eval_data=random_data(5, 1),
        loss_function=Interrupted(interrupt),
        load_model=load,
        log_directory=root / "logs",
        task=task,
    )
    return run, tokenizer


TIMES = (
    "tokens_per_second",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
    "total_flos",
)


def what_was_logged(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows without what depends on the clock, and without the summary of the call that finished."""
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in history]
    return [row for row in rows if "train_loss" not in row]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    [file] = directory.glob("*.safetensors")
    return load_file(file)


def train(root, base, **options):
    run, tokenizer = training_run(root, base, **options)
    history, steps = run_training(run, tokenizer)
    return run, what_was_logged(history), steps


@pytest.mark.slow
@pytest.mark.parametrize(("task", "method"), [("policy", "full"), ("reward_model", "lora")])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, task, method):
    base = (tiny_causal_lm if task == "policy" else tiny_classifier)(tmp_path / "base")
    options = {"task": task, "method": method}
    whole, expected, steps = train(tmp_path / "whole", base, interrupt=None, **options)
    assert steps == {0: "start", 2: "33", 4: "66", 6: "end"}
    assert [row["step"] for row in expected if "loss" in row] == [1, 2, 4, 6]
    assert [row["step"] for row in expected if "eval_loss" in row] == [0, 2, 4, 6]

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "torn", base, interrupt=10, **options)  # in step 5, behind the checkpoint of step 4
    torn = tmp_path / "torn" / "work"
    assert newest_complete(torn).name == "checkpoint-4"
    again, found, _ = train(tmp_path / "torn", base, interrupt=None, **options)
    assert again.loss_function.calls == 3  # the two steps that were left, of 2 and 1 micro-batches
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-7)
    for step in (4, 6):
        resumed = weights_of(torn / f"checkpoint-{step}")
        for name, tensor in weights_of(whole.directory / f"checkpoint-{step}").items():
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_torn_checkpoint_is_ignored(tmp_path):
    base = tiny_causal_lm(tmp_path / "base")
    options = {"task": "policy", "method": "full"}
    whole, expected, _ = train(tmp_path / "whole", base, interrupt=None, **options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "torn", base, interrupt=10, **options)
    torn = tmp_path / "torn" / "work"
    for name in ("model.safetensors", "optimizer.pt", "tokenizer.json"):
        as_folder(torn / "checkpoint-4" / name)
    again, found, _ = train(tmp_path / "torn", base, interrupt=None, **options)
    assert again.loss_function.calls == 7  # steps 3 to 6
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    resumed = weights_of(torn / "checkpoint-6")
    for name, tensor in weights_of(whole.directory / "checkpoint-6").items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)
    AutoModelForCausalLM.from_pretrained(torn / "checkpoint-4")  # written anew


def test_what_is_edited_between_the_last_step_and_publication_is_refused(tmp_path):
    final = tmp_path / "policy"
    folder = partial_directory(final, "key", force=False)
    callback = ShareCheckpoints({2: "33", 9: "end"})
    args = SimpleNamespace(output_dir=str(folder), should_save=True)
    for step in (2, 3, 4, 9):
        a_checkpoint(folder, step, marked=False)
        callback.on_save(args, TrainerState(global_step=step), TrainerControl())
    older = folder / "checkpoint-2" / "model.safetensors"  # its marker went with its state
    _edited_is_refused(final, older)
    rows, steps = [{"step": 9, "loss": 0.5}], {2: "33", 9: "end"}
    assert trained_once(folder, lambda: (rows, steps)) == (rows, steps)
    _edited_is_refused(final, folder / "training.json")
    name_checkpoints(folder, steps, best=9)
    for name in ("33", "end", "best"):
        _edited_is_refused(final, folder / "checkpoints" / name / "model.safetensors")
    (folder / "checkpoints" / "33" / "model.safetensors").unlink()  # to make room
    assert partial_directory(final, "key", force=False) == folder
    publish(folder, final)
    assert sorted(path.name for path in final.iterdir()) == [
        "checkpoints",
        "fingerprint.json",
        "training.json",
    ]


def _edited_is_refused(final, file):
    locks.let_go(final)
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DataError, match=rf"\.digests\.json: .*{file.name} was changed.*--force"):
        partial_directory(final, "key", force=False)
    file.write_bytes(content)
    assert partial_directory(final, "key", force=False).is_dir()
    locks.let_go(final)


@pytest.mark.parametrize("text", ["", "[]", '{"training.json": 3}', '{"training.json": {"size": 1}}'])
def test_a_damaged_list_of_what_is_done_is_one_line(tmp_path, text):
    final = tmp_path / "policy"
    folder = partial_directory(final, "key", force=False)
    trained_once(folder, lambda: ([], {}))
    locks.let_go(final)
    (folder / ".digests.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"\.digests\.json: "):
        partial_directory(final, "key", force=False)
