"""One training from plan to named checkpoints: steps, accumulation, resume, refusal; on a tiny model."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_families import family_config
from tiny_models import VOCABULARY, tiny_causal_lm, tiny_config, tiny_tokenizer
from tiny_pipeline import no_model_loads
from tiny_training import LORA, ROWS, TRAINING, a_run, adapter, loss_of, train
from torch import Tensor
from transformers import LlamaForCausalLM, MistralForCausalLM

from prmd import runtime
from prmd.artifacts import io
from prmd.artifacts.runs import partial_path
from prmd.config.shared import (
    DataConfig,
    ModelConfig,
    RewardModelConfig,
    TrainingConfig,
    TuningConfig,
)
from prmd.errors import ConfigError, NotFiniteError
from prmd.models.loading import load_causal_lm
from prmd.models.tokenization import PrefixRow
from prmd.training.checkpoints import checkpoint_steps, name_checkpoints
from prmd.training.run import check_training, choose_precision
from prmd.training.trainer import Columns, PairData, PairLoss


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("training") / "base")


@pytest.fixture
def shared(base: Path, tmp_path: Path) -> RewardModelConfig:
    return RewardModelConfig(
        artifact_root=str(tmp_path / "root"),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(base), revision=None, dtype="float32"),
    )


def test_checkpoints_curve_and_schedule(
    shared: RewardModelConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="prmd")
    check_training(shared.model, shared.paths, LORA, TRAINING, task="policy", directory=tmp_path)
    history, steps = train(a_run(shared, tmp_path / "run"))
    assert caplog.text.count("of float32's progress") == 1, "the probe before the model is loaded is silent"
    assert steps == {0: "start", 1: "34", 2: "66", 3: "end"}  # 12 pairs in steps of 2 x 2
    held_out = [row for row in history if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [0, 1, 2, 3]
    logged = [row for row in history if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3]
    # a linear schedule of three steps with ceil(0.1 x 3) = 1 of warm-up: 0, peak, half of the peak
    assert [row["learning_rate"] for row in logged] == pytest.approx([0.0, 1e-2, 0.5e-2])
    assert all(row["tokens_per_second"] > 0 and 0 <= row["padding_share"] < 1 for row in logged)
    name_checkpoints(tmp_path / "run", steps, best=2)
    named = tmp_path / "run" / "checkpoints"
    assert {p.name for p in named.iterdir()} == {"start", "34", "66", "end", "best"}
    for folder in named.iterdir():
        left = {p.name for p in folder.iterdir()}
        assert "adapter_model.safetensors" in left and not left & {
            "optimizer.pt",
            "trainer_state.json",
            "COMPLETE",
        }
    assert all(map(torch.equal, adapter(named / "best").values(), adapter(named / "66").values()))
    start, end = adapter(named / "start"), adapter(named / "end")
    assert all(not value.any() for key, value in start.items() if "lora_B" in key)
    assert any(not torch.equal(start[key], end[key]) for key in start)


def test_few_steps_never_call_the_untrained_model_by_a_later_name() -> None:
    shares = (0.0, 0.33, 0.66, 1.0)
    assert checkpoint_steps(shares, 1) == {0: "start", 1: "end"}
    assert checkpoint_steps(shares, 2) == {0: "start", 1: "33", 2: "end"}
    assert checkpoint_steps(shares[1:], 1) == {1: "end"}
    assert checkpoint_steps(shares, 100) == {0: "start", 33: "33", 66: "66", 100: "end"}


def test_four_pairs_at_once_are_one_pair_four_times(shared: RewardModelConfig, tmp_path: Path) -> None:
    results = []
    for name, pairs, accumulation in (("at_once", 4, 1), ("accumulated", 1, 4)):
        training = TRAINING.model_copy(
            update={
                "pairs_per_device": pairs,
                "gradient_accumulation_steps": accumulation,
                "checkpoints": (1.0,),
            }
        )
        run = a_run(shared, tmp_path / name, training=training, stream=list(range(4)), eval_data=None)
        history, steps = train(run)
        name_checkpoints(tmp_path / name, steps)
        results.append(next(row for row in history if "loss" in row))
    first, second = results
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
    assert first["rewards/margins"] == pytest.approx(second["rewards/margins"], rel=1e-4)


def test_the_device_decides_no_step(shared: RewardModelConfig, tmp_path: Path) -> None:
    """10 pairs in steps of 4, with a short last one: 4 x 1, 3 x 2, 1 x 4 learn the same."""
    curves = []
    for pairs in (4, 3, 1):
        training = TrainingConfig(
            **{**TRAINING.model_dump(exclude={"gradient_accumulation_steps"}), "pairs_per_device": pairs},
        ).model_copy(update={"pairs_per_step": 4})
        run = a_run(shared, tmp_path / str(pairs), training=training, stream=list(range(10)))
        curves.append(train(run)[0])
    for name in ("loss", "grad_norm", "eval_loss"):
        first, *others = [[row[name] for row in curve if name in row] for curve in curves]
        assert len(first) == (4 if name == "eval_loss" else 3) and len(set(first)) > 1
        for other in others:
            assert other == pytest.approx(first, rel=2e-4)


def test_a_short_last_step_weighs_its_pairs_alike(shared: RewardModelConfig, tmp_path: Path) -> None:
    """Three pairs in micro-batches of two are cut 1 + 2: the gradient must be that of the three at once."""
    results = []
    for name, pairs, accumulation in (("split", 2, 2), ("together", 3, 1)):
        training = TRAINING.model_copy(
            update={
                "pairs_per_device": pairs,
                "gradient_accumulation_steps": accumulation,
                "checkpoints": (1.0,),
            }
        )
        run = a_run(shared, tmp_path / name, training=training, stream=[0, 5, 11], eval_data=None)
        results.append(next(row for row in train(run)[0] if "loss" in row))
    assert results[0]["grad_norm"] == pytest.approx(results[1]["grad_norm"], rel=1e-4)
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)


def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(
    shared: RewardModelConfig, tmp_path: Path
) -> None:
    _, steps = train(a_run(shared, tmp_path / "whole"))
    name_checkpoints(tmp_path / "whole", steps)
    calls = 0

    def breaks(logps: Tensor, columns: Columns) -> PairLoss:
        nonlocal calls
        calls += logps.requires_grad
        if calls > 5:  # in the third step, behind the checkpoint of the second
            raise KeyboardInterrupt
        return loss_of(logps, columns)

    with pytest.raises(KeyboardInterrupt):
        train(a_run(shared, tmp_path / "broken", loss_function=breaks))
    trained = 0

    def counts(logps: Tensor, columns: Columns) -> PairLoss:
        nonlocal trained
        trained += logps.requires_grad
        return loss_of(logps, columns)

    history, steps = train(a_run(shared, tmp_path / "broken", loss_function=counts))
    assert trained == 2  # the two micro-batches of the third step alone
    assert [row["step"] for row in history if "eval_loss" in row] == [0, 1, 2, 3]
    name_checkpoints(tmp_path / "broken", steps)
    for name in ("start", "34", "66", "end"):
        whole, resumed = (adapter(tmp_path / run / "checkpoints" / name) for run in ("whole", "broken"))
        assert all(torch.allclose(whole[key], resumed[key], atol=1e-6) for key in whole), name


def test_a_torn_checkpoint_is_not_resumed_from(shared: RewardModelConfig, tmp_path: Path) -> None:
    torn = tmp_path / "run" / "checkpoint-2"
    io.write_text(torn / "trainer_state.json", "{")
    history, _ = train(a_run(shared, tmp_path / "run"))
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3]


def test_other_steps_than_it_began_with_do_not_continue_a_training(
    shared: RewardModelConfig, tmp_path: Path
) -> None:
    train(a_run(shared, tmp_path / "run"))
    halved = TRAINING.model_copy(update={"gradient_accumulation_steps": 1})
    with pytest.raises(
        ConfigError, match=r"are of a training with steps .* \(now .*continue with that, or give --force"
    ):
        train(a_run(shared, tmp_path / "run", training=halved))
    at_once = TRAINING.model_copy(update={"gradient_accumulation_steps": 1, "pairs_per_device": 4})
    _, steps = train(a_run(shared, tmp_path / "run", training=at_once))  # finished, and so it stays
    name_checkpoints(tmp_path / "run", steps)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        ".digests.json",
        "checkpoints",
        "logs",
    ]


def test_held_out_rows_longer_than_the_attention_window_are_not_shared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = family_config("mistral", vocab_size=VOCABULARY, sliding_window=16, eos_token_id=2)
    MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    base = tiny_tokenizer(tmp_path / "base")
    shared = RewardModelConfig(
        artifact_root=str(tmp_path / "root"),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(base), revision=None, dtype="float32"),
    )
    rows = [row for row in ROWS if row.longest <= 16]
    longer = [PrefixRow((1, 50, 60), (tuple(range(70, 90)), (90, 2)))]
    run = a_run(shared, tmp_path / "run", data=PairData(rows, {}), stream=list(range(len(rows))))
    history, _ = train(replace(run, eval_data=PairData(longer, {})))
    model = load_causal_lm(shared.model, shared.paths)
    with torch.no_grad():
        apart = [
            model(torch.tensor([[*longer[0].prompt_ids, *y]])).logits[0].log_softmax(-1)
            for y in longer[0].responses
        ]
    logps = [
        sum(float(values[2 + i, token]) for i, token in enumerate(y))
        for values, y in zip(apart, longer[0].responses, strict=True)
    ]
    assert history[0]["eval_rewards/margins"] == pytest.approx(0.1 * (logps[0] - logps[1]), abs=1e-4)


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(
    shared: RewardModelConfig, tmp_path: Path
) -> None:
    def bad(logps: Tensor, columns: Columns) -> PairLoss:
        result = loss_of(logps, columns)
        return replace(result, loss=result.loss / 0 * (logps[:, 0] < 0))

    with pytest.raises(NotFiniteError, match=r"step 1 for training pairs \[\d+, \d+\]"):
        train(a_run(shared, tmp_path / "run", loss_function=bad, eval_data=None, training=TRAINING.model_copy(
            update={"checkpoints": (1.0,)}
        )))  # fmt: skip


# ------------------------------------------------------------------ refused before a model is loaded
def test_disk_is_asked_for_what_the_training_writes(
    shared: RewardModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_model_loads(monkeypatch)
    all_weights = sum(p.numel() for p in LlamaForCausalLM(tiny_config()).parameters()) * 4
    free = 0
    monkeypatch.setattr(runtime, "free_disk_bytes", lambda path: free)
    full = TrainingConfig(learning_rate=1e-3, checkpoints=(0.5, 1.0))
    tensors = len(list(LlamaForCausalLM(tiny_config()).parameters()))
    # 2 checkpoints + 2 of weights, 3 of them with two moments and a count of steps each, + the finished folder
    free = all_weights * (4 + 3 * 2 + 1) + 3 * 4 * tensors - 1
    with pytest.raises(ConfigError, match=r"free disk.*make room, or set artifact_root"):
        check_training(
            shared.model, shared.paths, TuningConfig(), full, task="policy", directory=tmp_path / "new"
        )
    free += 1
    check_training(
        shared.model, shared.paths, TuningConfig(), full, task="policy", directory=tmp_path / "new"
    )
    assert not (tmp_path / "new").exists()
    io.write_text(partial_path(tmp_path / "new") / "checkpoint-1" / "model", "x" * 1000)
    free -= 1000  # what an interrupted training has written is not asked for again
    check_training(
        shared.model, shared.paths, TuningConfig(), full, task="policy", directory=tmp_path / "new"
    )
    free -= 1
    with pytest.raises(ConfigError, match="free disk"):
        check_training(
            shared.model, shared.paths, TuningConfig(), full, task="policy", directory=tmp_path / "new"
        )
    free += 1001
    (partial_path(tmp_path / "new") / "checkpoint-1" / "model").unlink()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    copy = sum(t.numel() for t in LlamaForCausalLM(tiny_config()).state_dict().values()) * 4
    free += 3 * copy - 1  # one of all weights in each of the three that keep their state
    with pytest.raises(ConfigError, match="free disk"):
        check_training(
            shared.model, shared.paths, TuningConfig(), full, task="policy", directory=tmp_path / "new"
        )
    free += 1
    check_training(
        shared.model, shared.paths, TuningConfig(), full, task="policy", directory=tmp_path / "new"
    )


def test_several_trainings_are_asked_for_together(
    shared: RewardModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("prmd.training.run.require_disk", lambda path, size: asked.append(size))
    weights = sum(p.numel() for p in LlamaForCausalLM(tiny_config()).parameters()) * 4
    full = TrainingConfig(learning_rate=1e-3, checkpoints=(0.5, 1.0))
    for trainings in (1, 4):
        check_training(
            *(shared.model, shared.paths, TuningConfig(), full),
            task="policy",
            directory=tmp_path,
            trainings=trainings,
        )
    one, four = asked
    assert four - one == 3 * 3 * weights  # of each finished one: half-way, the end, and the end again


def test_adapters_need_less_disk_than_all_weights(
    shared: RewardModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr("prmd.training.run.require_disk", lambda path, size: asked.append(size))
    for tuning in (LORA, TuningConfig()):
        for task in ("policy", "reward_model"):
            check_training(shared.model, shared.paths, tuning, TRAINING, task=task, directory=tmp_path)
    lora_policy, lora_reward, full_policy, full_reward = asked
    assert lora_policy < full_policy / 2 and lora_reward < full_reward / 2
    assert math.isfinite(sum(asked)) and min(asked) > 0


def test_rate_that_bfloat16_cannot_follow_gets_master_weights(shared: RewardModelConfig) -> None:
    half = shared.model_copy(update={"model": shared.model.model_copy(update={"dtype": "bfloat16"})})
    precision = choose_precision(
        half.model, half.paths, TuningConfig(), TrainingConfig(learning_rate=5e-7), "policy"
    )
    assert precision.master_weights and precision.autocast and precision.optimizer == "adamw_float32"
