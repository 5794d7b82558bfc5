"""The sweep over the heads' settings: what it holds out, what it compares with, and its table."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_causal_lm, tiny_classifier
from tiny_workspace import write_prepared

from benchmarks import ensemble_choice
from prmd.artifacts import io
from prmd.artifacts.runs import dump_yaml
from prmd.config.shared import DataConfig, EnsembleConfig, ModelConfig, RewardModelConfig, TrainingConfig
from prmd.pairs import read_pairs


def made_up_pairs(n: int = 60, width: int = 5, trained: int = 60) -> ensemble_choice.UnseenPairs:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, 2, width, generator=generator)
    features[:, 0, 0] += 1.0  # a signal that r_0 lacks
    rewards = torch.randn(n, 2, generator=generator)
    return ensemble_choice.UnseenPairs("made up", [f"p{i}" for i in range(n)], rewards, features, trained)


@pytest.fixture(autouse=True)
def quick_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmd.rewards.heads.FIT_STEPS", 20)


def test_heads_are_measured_on_the_pairs_they_were_not_fit_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, fitted = made_up_pairs(), {}
    original = ensemble_choice.fit_ensemble

    def spy(**arguments):
        fitted.update(arguments)
        return original(**arguments)

    monkeypatch.setattr(ensemble_choice, "fit_ensemble", spy)
    settings = EnsembleConfig(members=3, fit_fraction=0.25)
    found = ensemble_choice.measure_heads(pairs, settings, repeat=0)
    used = [int(name[1:]) for name in fitted["pair_ids"]]
    assert len(used) == 20 == found["fit_pairs"] and found["held_out_pairs"] == 40  # .25 / .75 of 60
    assert torch.equal(fitted["chosen_features"], pairs.features[used, 0])
    assert torch.equal(fitted["rejected_rewards"], pairs.rewards[used, 1])
    rest = [i for i in range(60) if i not in used]
    ensemble = original(**fitted)
    chosen, rejected = (ensemble.rewards(pairs.features[rest, s], pairs.rewards[rest, s]) for s in (0, 1))
    mean = (chosen - rejected).mean(dim=1).double().numpy()
    single = (pairs.rewards[rest, 0] - pairs.rewards[rest, 1]).double().numpy()
    assert found["accuracy"] == pytest.approx((mean > 0).mean())
    assert found["accuracy_gain"] == pytest.approx((mean > 0).mean() - (single > 0).mean())
    assert found["nll"] == pytest.approx(np.log1p(np.exp(-mean)).mean(), rel=1e-5)
    assert found["nll_gain"] == pytest.approx(np.log1p(np.exp(-single)).mean() - found["nll"], rel=1e-4)
    other = ensemble_choice.measure_heads(pairs, settings, repeat=1)
    assert set(fitted["pair_ids"]) != {f"p{i}" for i in used} and other["accuracy"] != found["accuracy"]


def test_the_table_has_a_row_for_every_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a finished folder: the unseen pairs are those of train that the backbone did not get, of test and of judge."""
    for name, values in (("ANCHORS", (1.0, 100.0)), ("PRIOR_SCALES", (0.5,)), ("FIT_FRACTIONS", (0.5,))):
        monkeypatch.setattr(ensemble_choice, name, values)
    config = RewardModelConfig(
        artifact_root="elsewhere",
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(tiny_causal_lm(tmp_path / "base")), revision=None, dtype="float32"),
        training=TrainingConfig(max_length=200, max_pairs=8),
        ensemble=EnsembleConfig(members=3, fit_fraction=0.4),
    )
    there = config.model_copy(update={"artifact_root": str(tmp_path)})
    write_prepared(there.paths, pairs=12)
    folder = tiny_classifier(there.paths.reward_model("helpful"))
    io.write_text(folder / "config.yaml", dump_yaml(config))
    io.write_json(folder / "metrics.json", {"objective": "helpful"})
    pairs = ensemble_choice.unseen_pairs(folder, tmp_path)
    everything = {
        pair.id for split in ("train", "test", "judge") for pair in read_pairs(there.paths, "helpful", split)
    }
    assert len(pairs.ids) == 36 - pairs.trained and set(pairs.ids) < everything and pairs.trained < 8
    rows_file = tmp_path / "rows.json"
    ensemble_choice.main(
        [str(folder), "--root", str(tmp_path), "--members", "2", "--repeats", "1", "--json", str(rows_file)]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("| 0.5 | ") for line in lines[2:4]] == [True, True]
    assert lines[-1].startswith("Means over helpful (embedded), 1 divisions each")
    rows = json.loads(rows_file.read_text(encoding="utf-8"))
    assert [row["anchor"] for row in rows] == [1.0, 100.0]
    assert rows[0]["accuracy"] == rows[0]["runs"][0]["accuracy"]
