"""An ensemble of adapters: what each member is trained on, how it is scored, what is trained again and what is refused."""

import hashlib
import logging
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import separate_rewards
from peft import PeftModel
from tiny_models import tiny_causal_lm
from tiny_pipeline import no_model_loads
from tiny_workspace import write_prepared
from transformers import AutoModelForSequenceClassification

from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR
from prmd.config.evaluation import EvaluationConfig
from prmd.config.loading import load_config
from prmd.config.shared import (
    CalibrationConfig,
    DataConfig,
    EnsembleConfig,
    LoraConfig,
    ModelConfig,
    RewardModelConfig,
    TrainingConfig,
    TuningConfig,
)
from prmd.errors import ConfigError, DataError
from prmd.models.tokenization import PrefixRow, tokenize_row
from prmd.pairs import read_pairs
from prmd.report import reward_figures
from prmd.rewards import backbone
from prmd.rewards.adapters import member_seed, resampled
from prmd.rewards.reward_model import RewardModel, load_reward_model
from prmd.rewards.task import RewardTask, read_reward_pairs
from prmd.rewards.train import train_judge, train_reward_model

MEMBERS, PAIRS, SEED = 2, 10, 7


def config_at(root: Path) -> RewardModelConfig:
    """A base, ten pairs a split, and two adapters; the base lies at an absolute path, as local folders do."""
    base = root / "base"
    return RewardModelConfig(
        artifact_root=str(root / "artifacts"),
        seed=SEED,
        report_to=(),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(base), revision=None, dtype="float32"),
        tuning=TuningConfig(method="lora", lora=LoraConfig(r=4, alpha=8, learning_rate=3e-2)),
        training=TrainingConfig(
            pairs_per_device=5, gradient_accumulation_steps=1, epochs=1.0, max_length=200, checkpoints=(1.0,)
        ),
        ensemble=EnsembleConfig(kind="adapters", members=MEMBERS),
        calibration=CalibrationConfig(source="validation_responses", prompts=12),
    )


class TrainedOn:
    """Calls through to the training, noting the pairs and seed that each was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails_at: int | None = None) -> None:
        self.pairs: dict[int | None, list[str]] = {}
        self.seeds: dict[int | None, int] = {}
        original = backbone._train

        def train(task: RewardTask, data: Any, *rest: Any) -> Any:
            if fails_at is not None and task.member == fails_at:
                raise KeyboardInterrupt
            self.pairs[task.member] = [pair.id for pair in data.train]
            self.seeds[task.member] = task.config.seed
            return original(task, data, *rest)

        monkeypatch.setattr(backbone, "_train", train)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RewardModelConfig, Path, TrainedOn, TrainedOn]:
    """The reward model of one objective, interrupted before its second member and then finished."""
    root = tmp_path_factory.mktemp("adapters")
    config = config_at(root)
    tiny_causal_lm(root / "base")
    write_prepared(config.paths, pairs=PAIRS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(reward_figures, "plot_reward_model", lambda *arguments: [])
        first = TrainedOn(monkeypatch, fails_at=1)
        with pytest.raises(KeyboardInterrupt):
            train_reward_model(config, objective="helpful")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(reward_figures, "plot_reward_model", lambda *arguments: [])
        second = TrainedOn(monkeypatch)
        folder = train_reward_model(config, objective="helpful")
    return config, folder, first, second


def rows_of(model: RewardModel) -> list[PrefixRow]:
    asked = (("why?", ("I do not know", "no")), ("what is it?", ("It is a test", "yes")))
    return [
        tokenize_row(model.tokenizer, [{"role": "user", "content": q}], answers, keep_suffix=True)
        for q, answers in asked
    ]


def poisson_count(member: int, pair: str) -> int:
    """Quantile of Poisson(1) at the uniform number of sha256(seed|member|pair)."""
    digest = hashlib.sha256(f"{SEED}|{member}|{pair}".encode()).digest()
    uniform, cumulative, k = int.from_bytes(digest[:7], "little") / 2**56, 0.0, 0
    while uniform >= (cumulative := cumulative + math.exp(-1) / math.factorial(k)):
        k += 1
    return k


# ------------------------------------------------------------------ training
def test_every_member_is_trained_on_its_own_resample_and_r_0_on_all_pairs(finished: Any) -> None:
    config, _, first, second = finished
    ids = [pair.id for pair in read_pairs(config.paths, "helpful", "train")]
    trained = first.pairs | second.pairs
    assert sorted(trained[None]) == sorted(ids)
    for member in range(MEMBERS):
        wanted = {pair: count for pair in ids if (count := poisson_count(member, pair))}
        assert Counter(trained[member]) == wanted
    assert Counter(trained[0]) != Counter(trained[1])
    seeds = first.seeds | second.seeds
    assert len(set(seeds.values())) == MEMBERS + 1 and seeds[None] == SEED


def test_what_is_finished_is_not_trained_again(finished: Any) -> None:
    _, _, first, second = finished
    assert set(first.pairs) == {None, 0}
    assert set(second.pairs) == {1}


def test_the_folder_holds_a_plain_classifier_and_adapters_without_checkpoints(finished: Any) -> None:
    _, folder, _, _ = finished
    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1
    assert not (folder / "ensemble.safetensors").exists()
    for member in range(MEMBERS):
        own = folder / "members" / str(member)
        assert {path.name for path in own.iterdir()} == {"adapter", "training.json"}
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {
            p.name for p in (own / "adapter").iterdir()
        }
        base = io.read_json(own / "adapter" / "adapter_config.json")["base_model_name_or_path"]
        assert base == "base"  # no path of this machine
    metrics = io.read_json(folder / "metrics.json")
    assert metrics["members"] == MEMBERS == len(metrics["member_accuracies"])
    assert metrics["sizes"] == {"train": PAIRS, "fit": 0, "val": PAIRS, "test": PAIRS}
    assert len(io.read_json(folder / "calibration.json")["calibration"]["scale"]) == MEMBERS


def test_members_score_as_their_adapters_alone_on_the_base(finished: Any, tmp_path: Path) -> None:
    config, folder, _, _ = finished
    model = load_reward_model(folder, shared=config.model_copy(update={"artifact_root": str(tmp_path)}))
    rows = rows_of(model)
    found = torch.cat(model.rewards(rows, description="t"))
    assert model.members == MEMBERS and found.shape == (4, MEMBERS) and found.dtype == torch.float64
    for member in range(MEMBERS):
        base = AutoModelForSequenceClassification.from_pretrained(
            config.model.name, num_labels=1, pad_token_id=model.tokenizer.pad_token_id
        )
        alone = PeftModel.from_pretrained(base, folder / "members" / str(member) / "adapter").eval()
        with torch.no_grad():
            expected = separate_rewards(alone, rows).double()
        torch.testing.assert_close(found[:, member], expected, rtol=0, atol=1e-4)
    plain = torch.cat(model.features(rows, description="t"))[:, 0].double()
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-2
    assert (found - plain[:, None]).abs().amax(dim=0).min() > 1e-2
    no_load = pytest.MonkeyPatch()
    no_model_loads(no_load)
    again = load_reward_model(folder, shared=config.model_copy(update={"artifact_root": str(tmp_path)}))
    assert torch.equal(torch.cat(again.rewards(rows, description="t")), found)  # from the cache
    no_load.undo()


# ------------------------------------------------------------------ what belongs together
@pytest.mark.parametrize("change", ["weights", "scaling", "one fewer"])
def test_other_adapters_are_another_reward_model(finished: Any, tmp_path: Path, change: str) -> None:
    config, folder, _, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = load_reward_model(copy, shared=config)
    assert before.calibration is not None
    adapter = copy / "members" / "1" / "adapter"
    if change == "weights":
        path = adapter / "adapter_model.safetensors"
        io.write_tensors(path, {k: v + 0.01 for k, v in io.read_tensors(path).items()}, {"format": "pt"})
    elif change == "scaling":
        path = adapter / "adapter_config.json"
        io.write_json(path, io.read_json(path) | {"lora_alpha": 16})
    else:
        shutil.rmtree(copy / "members" / "1")
    with pytest.raises(DataError, match=r"calibration\.json: belongs to reward model .*--force"):
        load_reward_model(copy, shared=config)
    (copy / "calibration.json").unlink()
    after = load_reward_model(copy, shared=config)
    assert (
        after.fingerprint != before.fingerprint and after.backbone_fingerprint == before.backbone_fingerprint
    )


def test_the_kind_is_part_of_the_fingerprint_and_the_base_of_the_members(
    finished: Any, tmp_path: Path
) -> None:
    config, folder, _, _ = finished
    tokenizer = load_reward_model(folder, shared=config).tokenizer
    heads = config.model_copy(update={"ensemble": EnsembleConfig(members=MEMBERS)})
    keys = [RewardTask(c, "helpful", "train", folder, ()).fingerprints(tokenizer)[0] for c in (config, heads)]
    assert keys[0] != keys[1]
    other = config.model.model_copy(update={"name": str(tiny_causal_lm(tmp_path / "other", seed=5))})
    with pytest.raises(DataError, match="belongs to reward model"):
        load_reward_model(folder, shared=config.model_copy(update={"model": other}))


def test_member_seeds_are_far_from_those_of_other_runs() -> None:
    seeds = [member_seed(seed, member) for seed in (41, 42, 43) for member in range(5)]
    assert len(set(seeds)) == 15 and min(seeds) > 1000 and max(seeds) < 2**31
    assert member_seed(42, 3) == seeds[5 + 3]


# ------------------------------------------------------------------ refused, or said, before anything is loaded
def test_adapters_need_lora(tmp_path: Path) -> None:
    overrides = ["ensemble.kind=adapters", "tuning.method=full"]
    with pytest.raises(ConfigError, match=r"ensemble\.kind is adapters.*needs tuning\.method: lora") as error:
        load_config(CONFIG_DIR / "reward_model_config.yaml", RewardModelConfig, overrides)
    assert len(str(error.value).strip().splitlines()) == 1
    alone = load_config(
        CONFIG_DIR / "reward_model_config.yaml", RewardModelConfig, [*overrides, "ensemble.members=1"]
    )
    assert alone.ensemble.members == 1


def test_a_member_without_pairs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_at(tmp_path)
    write_prepared(config.paths, pairs=1)
    many = config.model_copy(update={"ensemble": EnsembleConfig(kind="adapters", members=30)})
    no_model_loads(monkeypatch)
    (pair,) = read_pairs(config.paths, "helpful", "train")
    empty = next(m for m in range(30) if poisson_count(m, pair.id) == 0)
    assert resampled([pair], members=30, seed=SEED)[empty] == []
    task = RewardTask(many, "helpful", "train", tmp_path / "rm", ())
    with pytest.raises(
        ConfigError, match=rf"ensemble\.members: the resample of member {empty} draws none of the 1"
    ):
        read_reward_pairs(task)


def test_a_dry_run_counts_the_trainings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_at(tmp_path)
    tiny_causal_lm(tmp_path / "base")
    write_prepared(config.paths, pairs=PAIRS)
    no_model_loads(monkeypatch)
    caplog.set_level(logging.INFO, logger="prmd")
    train_reward_model(config, objective="helpful", dry_run=True)
    assert (
        "would train 2 members more, each on its own resample of these pairs: 3 trainings in all"
        in caplog.text
    )
    caplog.clear()
    evaluation = EvaluationConfig(reward_model_config=config)
    train_judge(evaluation, objective="helpful", dry_run=True)
    assert "members more" not in caplog.text  # a judge has one member
    task = replace(RewardTask(config, "helpful", "train", tmp_path, ()), member=3)
    assert task.name == "helpful reward model, member 3"
