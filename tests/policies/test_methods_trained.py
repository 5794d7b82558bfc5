"""Every method trained for a few steps on a tiny model, with reward models that are random tables."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipeline import logged, no_model_loads
from tiny_tables import Table, table_config, use_tables
from tiny_workspace import write_prepared
from torch import Tensor

from prmd.artifacts import io
from prmd.config.policy import PairsConfig, PolicyConfig, PolicySection
from prmd.errors import ConfigError, DataError
from prmd.models.tokenization import PrefixRow
from prmd.objectives import OBJECTIVES
from prmd.policies import edpo, preview, train
from prmd.policies import inputs as inputs_module
from prmd.policies.train import train_pessimistic
from prmd.rewards.debias import DEBIAS_FILE
from prmd.training.trainer import Columns

DISTILLED = ("mean", "maxmin", "edpo", "paper_eq5", "paper_eq9")
ALL = (*DISTILLED, "dpo", "rdpo", "ipo", "modpo", "dpo_helpful", "dpo_harmless", "dpo_honest", "soup")


@dataclass(frozen=True)
class Trained:
    """Every method, trained once; not to be changed.

    Attributes:
        log: what was logged.
        selections: rows on which e-DPO chose its members, each time.
    """

    config: PolicyConfig
    log: str
    selections: list[list[int]]


@pytest.fixture(scope="module")
def trained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    policy = PolicySection(methods=ALL, gamma=0.01)
    config = table_config(tmp_path_factory.mktemp("all"), tiny_base, policy=policy)
    write_prepared(config.paths, pairs=6)
    selections, select = [], edpo._selected

    def recorded(model: Any, batches: Any, **how: Any) -> Columns:
        selections.append([row for rows in batches for row in rows])
        return select(model, batches, **how)

    with pytest.MonkeyPatch.context() as patch, logged() as log:
        use_tables(patch)
        patch.setattr(edpo, "_selected", recorded)
        train_pessimistic(config)
    return Trained(config, log.getvalue(), selections)


def metrics_of(config: PolicyConfig, method: str) -> dict[str, Any]:
    return io.read_json(config.paths.policy(method, config.run_name) / "metrics.json")


def curve_of(config: PolicyConfig, method: str) -> list[dict[str, float]]:
    return [row for row in metrics_of(config, method)["curve"] if "loss" in row]


def adapter(config: PolicyConfig, method: str) -> dict[str, Tensor]:
    return load_file(config.paths.policy(method, config.run_name) / "adapter_model.safetensors")


@pytest.mark.parametrize("method", [method for method in ALL if method != "soup"])
def test_every_method_trains(trained: Trained, method: str) -> None:
    curve = curve_of(trained.config, method)
    # 12 labelled pairs, and as many of reference samples where rewards are distilled; 4 pairs a step
    assert curve[-1]["step"] == (6 if method in DISTILLED else 3)
    assert all(np.isfinite(row["loss"]) for row in curve)
    assert ("logps/reference_samples" in curve[0]) is (method in DISTILLED)
    weights = adapter(trained.config, method)
    assert any(v.abs().max() > 0 for k, v in weights.items() if "lora_B" in k)


def test_label_losses_start_where_policy_and_reference_are_equal(trained: Trained) -> None:
    assert curve_of(trained.config, "dpo")[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    # (1 / (2 * 0.1))^2 nats^2
    assert curve_of(trained.config, "ipo")[0]["loss"] == pytest.approx(25.0, abs=1e-2)


def test_edpo_chooses_its_members_once_per_optimiser_step(trained: Trained) -> None:
    assert [len(rows) for rows in trained.selections] == [4] * 6
    assert sorted(row for rows in trained.selections for row in rows) == list(range(24))


def test_edpo_goes_on_with_the_members_of_its_step(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found, select = [], [], edpo._selected
    stops = {4}

    def recorded(model: Any, batches: Any, **how: Any) -> Columns:
        asked.append(list(batches))
        if len(asked) - 1 in stops:
            raise RuntimeError("stopped")
        return select(model, batches, **how)

    use_tables(monkeypatch)
    monkeypatch.setattr(edpo, "_selected", recorded)
    for name in ("stopped", "whole"):
        config = table_config(tmp_path / name, tiny_base, policy=PolicySection(methods=("edpo",)))
        training = config.training.model_copy(update={"checkpoints": (0.5, 1.0)})
        config = config.model_copy(update={"training": training})
        write_prepared(config.paths, pairs=6)
        if name == "stopped":
            with pytest.raises(RuntimeError, match="stopped"):
                train_pessimistic(config)
            del asked[:]
        stops.clear()
        train_pessimistic(config)
        found.append((adapter(config, "edpo"), list(asked)))
        del asked[:]
    (stopped, last), (whole, steps) = found
    assert len(steps) == 6 and last == steps[3:]
    assert all(torch.equal(stopped[key], whole[key]) for key in whole)


def test_another_method_is_another_policy(trained: Trained) -> None:
    adapters = {method: adapter(trained.config, method) for method in ALL}
    weights = {m: torch.cat([v.flatten() for _, v in sorted(a.items())]) for m, a in adapters.items()}
    for i, a in enumerate(ALL):
        for b in ALL[i + 1 :]:
            apart = float((weights[a] - weights[b]).abs().max())
            same = {a, b} == {"mean", "paper_eq5"}  # nothing is clipped here
            assert (apart < 1e-5) is same, (a, b, apart)
    mean = sum(weights[f"dpo_{k}"].double() for k in OBJECTIVES) / 3
    assert torch.allclose(weights["soup"].double(), mean, atol=1e-6)


def test_notes_of_a_method_are_kept_and_said_before_the_first_training(trained: Trained) -> None:
    for method, note in (
        ("soup", "nothing was trained"),
        ("maxmin", "maxmin weights"),
        ("paper_eq9", "negative: against the label"),
    ):
        assert any(note in said for said in metrics_of(trained.config, method)["notes"]), method
    assert trained.log.index("policy maxmin: ") < trained.log.index("policy mean: 24 pairs")


def test_the_gate_is_computed_on_the_samples_of_training_prompts(trained: Trained) -> None:
    gate = io.read_json(preview.gate_file(trained.config.paths))
    assert gate["source"] == "reference samples of the training prompts" and gate["prompts"] == 12
    assert gate["kl"] == pytest.approx(np.log(6) / 4) and gate["kl_target"] == 4.0


def test_a_finished_method_is_reused_until_a_setting_that_it_reads_changes(
    trained: Trained,
    tables: dict[str, Table],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = trained.config
    caplog.set_level(logging.INFO, logger="prmd")
    no_model_loads(monkeypatch)
    train_pessimistic(config)
    assert caplog.text.count("finished before with the same settings") == len(ALL)

    def other(**settings: Any) -> PolicyConfig:
        return config.model_copy(update={"policy": config.policy.model_copy(update=settings)})

    train_pessimistic(other(methods=("ipo", "dpo"), gamma=0.5))  # neither reads gamma
    with pytest.raises(ConfigError, match=r"policy ipo: .*give --force"):
        train_pessimistic(other(methods=("dpo", "ipo"), ipo_beta=0.3))


def write_bias(config: PolicyConfig, objective: str, b: float | None) -> None:
    """A finished reward model's folder with b of refusals, or none, and nothing else."""
    folder = config.paths.reward_model(objective)
    ends = {"value": b, "low": b, "high": b}
    features = {"questions": {"rms": 1.0, "sign": ends, "size": ends, "share": None}} if b is not None else {}
    if features:
        io.write_json(folder / DEBIAS_FILE, {"objective": objective, "features": features, "left_out": {}})
    io.write_json(folder / "run.json", {"fingerprint": objective})


def test_dpo_takes_out_of_each_label_what_the_features_of_its_objective_predict(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = PolicySection(methods=("dpo_debiased",))
    config = table_config(tmp_path, tiny_base, policy=policy, pairs=PairsConfig())
    write_prepared(config.paths, pairs=6)
    for split in ("train", "val"):  # every second pair's chosen response asks twice
        path = config.paths.split("harmless", split)
        rows = io.read_jsonl(path)
        for row in rows[::2]:
            row["chosen"][0]["content"] += "??"
        io.write_jsonl(path, rows)
    with pytest.raises(DataError, match="the helpful reward model is missing"):
        train_pessimistic(config)
    for objective in OBJECTIVES:
        write_bias(config, objective, None)
    with pytest.raises(ConfigError, match=r"dpo_debiased takes out .* no reward model"):
        train_pessimistic(config)
    write_bias(config, "harmless", 0.4)
    seen: list[Any] = []
    original = train.method_inputs
    monkeypatch.setattr(
        train, "method_inputs", lambda *a, **k: seen.append((a[2], original(*a, **k))) or seen[-1][1]
    )
    train_pessimistic(config)
    prepared, inputs = seen[0]
    pairs = prepared.pairs.tokenized.pairs
    expected = [
        0.4 * (1 + 2) if p.objective == "harmless" and p.chosen.endswith("??") else 0.0 for p in pairs
    ]
    assert inputs.train.columns["offsets"].tolist() == pytest.approx(expected) and sum(expected) > 0
    assert metrics_of(config, "dpo_debiased")["debiased"] == {"harmless": ["questions"]}
    write_bias(config, "harmless", 0.5)
    with pytest.raises(ConfigError, match=r"policy dpo_debiased: .*give --force"):
        train_pessimistic(config)


def test_rdpo_reads_lengths_in_tokens(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [PrefixRow((1,), ((2,) * 7, (3,) * 4)), PrefixRow((1,), ((2,), (3,) * 4))]
    assert inputs_module._length_differences(rows).tolist() == [3.0, -3.0]
    first = curve_of(trained.config, "rdpo")[0]["loss"]
    assert first != pytest.approx(np.log(2), abs=1e-4)  # lengths of these pairs differ


def test_a_soup_without_its_policies_names_the_command(
    tmp_path: Path, tiny_base: Path, tables: dict[str, Table]
) -> None:
    config = table_config(tmp_path, tiny_base, policy=PolicySection(methods=("dpo_helpful", "soup")))
    write_prepared(config.paths, pairs=6)
    with pytest.raises(
        DataError, match=r"dpo_harmless is missing; train them with: .*policy\.methods=\[dpo_helpful, "
    ) as e:
        train_pessimistic(config)
    assert "\n" not in str(e.value) and not config.paths.policies.exists()


def test_a_method_without_its_samples_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_base: Path, tables: dict[str, Table]
) -> None:
    config = table_config(tmp_path, tiny_base, pairs=PairsConfig(), policy=PolicySection(methods=("maxmin",)))
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="maxmin needs samples of the reference policy"):
            train_pessimistic(config, dry_run=dry_run)
    assert not list(tmp_path.iterdir()) and not tables


def test_edpo_on_spread_weights_is_refused_before_anything_is_read(
    tmp_path: Path, tiny_base: Path, tables: dict[str, Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = table_config(
        tmp_path, tiny_base, pairs=PairsConfig(), policy=PolicySection(methods=("hard_min", "edpo"))
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=r"edpo does not run under FSDP.*ddp\.yaml"):
            train_pessimistic(config, dry_run=dry_run)
    assert not list(tmp_path.iterdir()) and not tables


def test_without_reference_samples_the_dry_run_says_so(
    tmp_path: Path, tiny_base: Path, tables: dict[str, Table], caplog: pytest.LogCaptureFixture
) -> None:
    config = table_config(
        tmp_path, tiny_base, pairs=PairsConfig(), policy=PolicySection(methods=("mean", "soup"))
    )
    write_prepared(config.paths, pairs=6)
    caplog.set_level(logging.INFO, logger="prmd")
    train_pessimistic(config, dry_run=True)
    assert "set pairs.reference_samples=16 or calibration.source=reference_samples" in caplog.text
    assert "would average dpo_helpful, dpo_harmless, dpo_honest" in caplog.text
    assert not (config.paths.root / "outputs").exists()
