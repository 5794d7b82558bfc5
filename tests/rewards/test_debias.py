"""Debiased reward models: what is fitted, left out and refused, one small stage with heads and one with adapters, the scan."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from tiny_models import tiny_causal_lm, tiny_tokenizer
from tiny_workspace import write_prepared

from prmd.artifacts import io
from prmd.config.evaluation import EvaluationConfig, JudgeConfig
from prmd.config.shared import (
    CalibrationConfig,
    DataConfig,
    DebiasConfig,
    EnsembleConfig,
    LoraConfig,
    ModelConfig,
    RewardModelConfig,
    TrainingConfig,
    TuningConfig,
)
from prmd.errors import DataError
from prmd.models.chat_templates import encode_text
from prmd.models.loading import load_tokenizer, load_tokenizer_from
from prmd.models.tokenization import tokenize_row
from prmd.objectives import SPLITS
from prmd.pairs import PreferencePair, make_pair, read_pairs
from prmd.pessimism.losses import bradley_terry_loss
from prmd.report import reward_figures
from prmd.report.artifact_sections import reward_models_section
from prmd.rewards import train as stage
from prmd.rewards.backbone import reward_loss
from prmd.rewards.debias import (
    DEBIAS_FILE,
    FittedBias,
    fit_bias,
    is_strong,
    read_bias,
    scan_features,
    scan_notes,
)
from prmd.rewards.metrics import balanced_accuracy
from prmd.rewards.reward_model import load_reward_model
from prmd.rewards.task import RewardTask
from prmd.rewards.train import train_judge, train_reward_model

LONG, SHORT = "I do not know, but number {} is a good question.", "No {}."


def biased(n: int, share: float, *, split: str = "train", objective: str = "helpful") -> list[PreferencePair]:
    """Pairs in which the chosen response is the longer one in this share."""
    found = []
    for i in range(n):
        chosen, rejected = (LONG, SHORT) if i % 20 < 20 * share else (SHORT, LONG)
        prompt = [{"role": "user", "content": f"{objective} {split} question {i}: why is the sky blue?"}]
        said = {"chosen": chosen.format(i), "rejected": rejected.format(i)}
        found.append(make_pair(prompt=prompt, source="s", objective=objective, **said))
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer_from(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


# ------------------------------------------------------------------ what is fitted
def test_b_is_the_minimum_of_its_loss_and_survives_its_file(tokenizer: Any, tmp_path: Path) -> None:
    pairs = biased(60, 0.75)
    bias = fit_bias(["length", "questions"], pairs, tokenizer, objective="helpful")
    assert bias.names == ("length",) and bias.record["left_out"] == {"questions": 0}
    d = np.array(
        [len(encode_text(tokenizer, p.chosen)) - len(encode_text(tokenizer, p.rejected)) for p in pairs]
    )
    rms = math.sqrt((d**2).mean())
    z = np.stack([np.sign(d), np.clip(d / rms, -3, 3)], axis=1)
    found = minimize(lambda b: np.log1p(np.exp(-z @ b)).sum() + 0.005 * (b @ b), np.zeros(2), tol=1e-10)
    assert bias.rms == pytest.approx([rms])
    assert bias.values == pytest.approx(found.x, abs=1e-3)
    length = bias.record["features"]["length"]
    assert (length["share"]["value"], length["share"]["n"], length["share"]["equal"]) == (0.75, 60, 0)
    assert length["sign"]["low"] < length["sign"]["value"] < length["sign"]["high"]
    a = bias.offsets(pairs, tokenizer)
    assert a == pytest.approx(np.clip(z @ found.x, -3, 3), abs=2e-3)
    assert a.mean() == pytest.approx(
        0.5 * math.log(3), abs=0.05
    )  # log-odds of 3 : 1, for three of four pairs
    again = read_bias(io.write_json(tmp_path / DEBIAS_FILE, bias.record).parent)
    assert (again.offsets(pairs, tokenizer) == a).all()
    swapped = [PreferencePair(p.id, p.prompt, p.rejected, p.chosen, p.source, p.objective) for p in pairs]
    assert (bias.offsets(swapped, tokenizer) == -a).all()


def test_a_feature_that_is_the_label_stops_with_one_line(tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"debias.features of helpful: length alone predicts 95\.0% .* 40 pairs"
    ) as caught:
        fit_bias(["length"], biased(40, 0.95), tokenizer, objective="helpful")
    assert "\n" not in str(caught.value)
    assert fit_bias(["length"], biased(40, 0.9), tokenizer, objective="helpful").names == ("length",)
    few = fit_bias(["length"], biased(19, 1.0), tokenizer, objective="helpful")
    assert few.names == () and few.record["left_out"] == {"length": 19}
    assert few.offsets(biased(3, 1.0), tokenizer).tolist() == [0.0] * 3
    assert FittedBias.from_json(json.loads(json.dumps(few.record))).names == ()


def test_loss_with_an_offset_and_without() -> None:
    rewards, a = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([0.5, -3.0])
    expected = torch.log1p(torch.exp(-torch.tensor([2.0, -5.0]))) + 0.01 * torch.tensor([6.25, 0.0])
    result = reward_loss(rewards, 0.01, a)
    torch.testing.assert_close(result.loss, expected)
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, 0.0]  # by the margin alone
    flipped = reward_loss(rewards, 0.01, torch.tensor([-2.0, 3.0]))
    assert flipped.metrics["rewards/accuracies_with_offset"].tolist() == [0.0, 1.0]
    plain, zero = (reward_loss(rewards, 0.01, o) for o in (None, torch.zeros(2)))
    assert torch.equal(plain.loss, zero.loss) and "rewards/accuracies_with_offset" not in plain.metrics
    sides = {"chosen_rewards": rewards[:, 0], "rejected_rewards": rewards[:, 1]}
    shifted = bradley_terry_loss(**sides, centering_coefficient=0.0, offsets=-(rewards[:, 0] - rewards[:, 1]))
    torch.testing.assert_close(shifted, torch.full((2,), math.log(2.0)))


def test_balanced_accuracy_by_hand() -> None:
    feature = np.array([1.0] * 6 + [-1.0] * 2 + [0.0] * 4)
    assert balanced_accuracy(feature, feature)["value"] == pytest.approx((4 + 0 + 4 * 0.5) / 12)
    margins = np.array([1.0] * 3 + [-1.0] * 3 + [1.0, 0.0] + [1.0] * 4)
    found = balanced_accuracy(margins, feature)
    assert found["value"] == pytest.approx((4 * 0.5 + 4 * 0.75 + 4) / 12) and found["n"] == 12
    effective = 12**2 / (6 * (4 / 6) ** 2 + 2 * 2**2 + 4)
    assert effective == pytest.approx(9.818, abs=1e-3) and found["low"] < found["value"] < found["high"]
    assert balanced_accuracy(margins, np.abs(feature)) is None


# ------------------------------------------------------------------ scan
def test_scan_counts_and_points_out(tokenizer: Any) -> None:
    pairs = biased(100, 0.75)
    scan = scan_features(pairs, tokenizer)
    assert len(scan) == 9 and scan["emoji"] is None
    length = scan["length"]
    assert (length["value"], length["n"], length["equal"]) == (0.75, 100, 0)
    tail = sum(math.comb(100, k) for k in range(75, 101)) / 2**100
    assert length["p"] == pytest.approx(2 * tail)
    present = [s for s in scan.values() if s]
    assert length["p_holm"] >= length["p"] and max(s["p_holm"] for s in present) <= 1
    [note] = [n for n in scan_notes(scan, "helpful", ()) if "tokens" in n]
    assert "more tokens in 75% " in note and note.endswith("debias: {features: {helpful: [length]}}")
    assert all("tokens" not in n for n in scan_notes(scan, "helpful", ("length",)))
    fewer = scan_notes(scan_features(biased(100, 0.25), tokenizer), "helpful", ("emoji",))
    assert any("fewer tokens in 75% " in n and n.endswith("[emoji, length]}}") for n in fewer)


@pytest.mark.parametrize(
    ("share", "strong"),
    [
        (None, False),
        ({"value": 0.61, "p_holm": 0.01}, True),
        ({"value": 0.39, "p_holm": 0.01}, True),
        ({"value": 0.6, "p_holm": 0.01}, False),
        ({"value": 0.9, "p_holm": 0.05}, False),
    ],
)
def test_what_is_strong(share: dict[str, float] | None, strong: bool) -> None:
    assert is_strong(share) is strong


# ------------------------------------------------------------------ whole stages
def config_at(root: Path, kind: str, features: dict[str, Any], **changes: Any) -> RewardModelConfig:
    values = {
        "seed": 7,
        "report_to": (),
        "data": DataConfig(approach="embedded"),
        "model": ModelConfig(name=str(root / "base"), revision=None, dtype="float32"),
        "tuning": TuningConfig(method="lora", lora=LoraConfig(r=4, alpha=8, learning_rate=3e-2)),
        "training": TrainingConfig(
            pairs_per_device=8, gradient_accumulation_steps=1, epochs=1.0, max_length=200, checkpoints=(1.0,)
        ),
        "ensemble": EnsembleConfig(kind=kind, members=3 if kind == "heads" else 2, fit_fraction=0.4),
        "calibration": CalibrationConfig(source="validation_responses", prompts=12),
        "debias": DebiasConfig(features=features),
    }
    return RewardModelConfig(artifact_root=str(root / "artifacts"), **(values | changes))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(reward_figures, "plot_reward_model", lambda *arguments: [])
    tiny_causal_lm(tmp_path / "base")
    paths = config_at(tmp_path, "heads", {}).paths
    write_prepared(paths, pairs=8)
    for split in SPLITS:
        io.write_jsonl(paths.split("helpful", split), [p.to_row() for p in biased(60, 0.75, split=split)])
    return tmp_path


def weights_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*.safetensors")
        if "checkpoints" not in p.parts
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["heads", "adapters"])
def test_strength_zero_is_the_undebiased_model_to_the_last_digit(
    root: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="prmd")
    off = config_at(root, kind, {})
    folder = train_reward_model(off, objective="helpful")
    plain, metrics = weights_of(folder), io.read_json(folder / "metrics.json")
    assert (
        not (folder / DEBIAS_FILE).exists() and "debias" not in metrics and metrics["feature_scan"]["length"]
    )
    assert "debias: {features: {helpful: [length]}}" in caplog.text
    named = {"features": {"helpful": ("length",)}}
    zero = off.model_copy(
        update={
            "debias": DebiasConfig(**named, strength=0.0),
            "ensemble": off.ensemble.model_copy(update={"debias_strengths": (0.0, 0.0)}),
        }
    )
    again = weights_of(train_reward_model(zero, objective="helpful", force=True))
    assert again == plain
    caplog.clear()
    full = off.model_copy(update={"debias": DebiasConfig(**named)})
    folder = train_reward_model(full, objective="helpful", force=True)
    debiased = weights_of(folder)
    assert debiased.keys() == plain.keys() and debiased["model.safetensors"] != plain["model.safetensors"]
    if (
        kind == "adapters"
    ):  # member 0 is trained with s = 0, its own seed and its own resample: as without debiasing
        same = [name for name in plain if debiased[name] == plain[name]]
        assert same == [name for name in plain if name.startswith("members/0/")]
    check_finished(full, folder)
    assert "debiased at strength 1, " in caplog.text
    assert (
        "name it: debias: {features: {helpful: [length, first_person]}}" in caplog.text
    )  # "I" is in the long ones
    assert "{helpful: [length]}" not in caplog.text
    caplog.clear()
    assert train_reward_model(full, objective="helpful") == folder and "reused" in caplog.text


def check_finished(config: RewardModelConfig, folder: Path) -> None:
    """What is written of a debiased reward model, its held-out loss computed anew from scores and b."""
    record, metrics = io.read_json(folder / DEBIAS_FILE), io.read_json(folder / "metrics.json")
    assert DEBIAS_FILE in io.read_json(folder / "run.json")["files"]
    found = metrics["debias"]
    asked = [0.0, 0.5, 1.0] if config.ensemble.kind == "heads" else [0.0, 1.0]
    assert found["member_strengths"] == asked and found["strength"] == 1.0
    several = (found["member_strengths_reached"], found["features"]["length"]["member_slopes"])
    assert [len(values) for values in several] == [len(asked)] * 2
    assert found["features"]["length"]["sign"] == record["features"]["length"]["sign"]
    assert found["features"]["length"]["balanced_accuracy"]["n"] == 60
    model = load_reward_model(folder, shared=config)
    bias, pairs = read_bias(folder), read_pairs(config.paths, "helpful", "val")
    rows = [tokenize_row(model.tokenizer, p.prompt, (p.chosen, p.rejected), keep_suffix=True) for p in pairs]
    base = torch.stack(model.features(rows, description="t"))[..., 0].double()
    a = torch.tensor(bias.offsets(pairs, model.tokenizer))
    losses = torch.nn.functional.softplus(-(base[:, 0] - base[:, 1] + a)) + 0.01 * base.sum(dim=1) ** 2
    facts = io.read_json(folder / "backbone.json")
    assert facts["curve"][-1]["eval_loss"] == pytest.approx(float(losses.mean()), abs=2e-5)
    right = float(((base[:, 0] - base[:, 1] + a) > 0).double().mean())
    assert facts["curve"][-1]["eval_accuracy_with_offset"] == pytest.approx(right)
    table = reward_models_section(config.paths)
    said = json.dumps([table["debias"].rows, table["scan"].rows])
    assert "length" in said and f"{found['features']['length']['share']['value']:.2f}" in said


def test_an_objective_that_is_not_named_and_a_judge_are_untouched(root: Path) -> None:
    off, on = config_at(root, "heads", {}), config_at(root, "heads", {"helpful": ("length",)})
    tokenizer = load_tokenizer(off.model, off.paths)

    def keys(config: RewardModelConfig, objective: str) -> tuple[str, ...]:
        return RewardTask(config, objective, "train", root, ("t",)).fingerprints(tokenizer)

    assert keys(off, "harmless") == keys(on, "harmless") and keys(off, "helpful") != keys(on, "helpful")
    other = {"debias_strengths": (1.0, 1.0)}
    changed = [c.model_copy(update={"ensemble": c.ensemble.model_copy(update=other)}) for c in (off, on)]
    assert keys(changed[0], "helpful") == keys(off, "helpful")
    assert keys(changed[1], "helpful") != keys(on, "helpful")


@pytest.mark.parametrize("named", [{}, {"helpful": ("length",)}])
def test_judges_follow_their_own_section_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, Any]
) -> None:
    tasks: list[RewardTask] = []
    monkeypatch.setattr(stage, "_run", lambda task, *rest: tasks.append(task) or root)
    shared = config_at(root, "heads", {"helpful": ("length",), "harmless": ("refusal",)})
    judges = JudgeConfig(debias=DebiasConfig(features=named))
    train_judge(EvaluationConfig(reward_model_config=shared, judges=judges), objective="helpful")
    assert tasks[0].config.debias.features == named


def test_a_broken_label_stops_the_stage_before_anything_is_written(root: Path) -> None:
    config = config_at(root, "heads", {"helpful": ("length",)})
    path = config.paths.split("helpful", "train")
    io.write_jsonl(path, [p.to_row() for p in biased(100, 1.0)])
    with pytest.raises(DataError, match=r"length alone predicts 100\.0% of the labels"):
        train_reward_model(config, objective="helpful")
    assert not config.paths.reward_model("helpful").parent.exists()
