"""What was published, in the hands of others: an ensemble of adapters, TRL, a plain pipeline; and what its card knows."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from tiny_models import tiny_causal_lm
from tiny_workspace import write_prepared
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from trl import RewardConfig, RewardTrainer

from prmd.artifacts import io
from prmd.artifacts.paths import PROJECT_ROOT
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
from prmd.errors import DataError
from prmd.inference.candidates import policy_key
from prmd.models.tokenization import tokenize_row
from prmd.publishing import records
from prmd.publishing.publish import publish_model
from prmd.report import reward_figures
from prmd.rewards.reward_model import load_reward_model
from prmd.rewards.train import train_reward_model

FINISHED = PROJECT_ROOT / "tests/fixtures/finished/artifacts"
ASKED = [{"role": "user", "content": "why is it so?"}]
ANSWERS = ("I do not know", "It is a test", "no")
TALKS = [[*ASKED, {"role": "assistant", "content": answer}] for answer in ANSWERS]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object, **kwargs: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(records, "hf_hub_download", unreachable)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A copy of finished artifacts: models and results."""
    for name in ("models", "outputs"):
        shutil.copytree(FINISHED / name, tmp_path / "root" / name)
    return tmp_path / "root"


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModelConfig, Path]:
    """A reward model with two adapters for members, trained for an update each, and its configuration."""
    place = tmp_path_factory.mktemp("members")
    config = RewardModelConfig(
        artifact_root=str(place / "artifacts"),
        report_to=(),
        data=DataConfig(approach="embedded"),
        model=ModelConfig(name=str(tiny_causal_lm(place / "base")), revision=None, dtype="float32"),
        tuning=TuningConfig(method="lora", lora=LoraConfig(r=4, alpha=8, learning_rate=3e-2)),
        training=TrainingConfig(pairs_per_device=5, max_length=200, epochs=1.0, checkpoints=(1.0,)),
        ensemble=EnsembleConfig(kind="adapters", members=2),
        calibration=CalibrationConfig(source="validation_responses", prompts=12),
    )
    write_prepared(config.paths, pairs=10)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(reward_figures, "plot_reward_model", lambda *arguments: [])
        return config, train_reward_model(config, objective="helpful")


def published(artifact: Path, folder: Path) -> Path:
    publish_model(artifact, hub_id=None, folder=folder, license_=None)
    return folder


def card_of(artifact: Path, folder: Path) -> str:
    return (published(artifact, folder) / "README.md").read_text(encoding="utf-8")


def scorer_module(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("published_member_scorer", folder / "prmd_scorer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ adapters
def test_the_scorer_of_adapters_gives_the_projects_own_numbers(
    ensemble: tuple[RewardModelConfig, Path], tmp_path: Path
) -> None:
    config, folder = ensemble
    own = load_reward_model(folder, shared=config)
    [expected] = own.rewards(
        [tokenize_row(own.tokenizer, ASKED, ANSWERS, keep_suffix=True)], description="test"
    )
    assert expected.shape == (3, 2) and (expected[:, 0] - expected[:, 1]).abs().min() > 1e-3
    out = published(folder, tmp_path / "out")
    scorer = scorer_module(out).Scorer(str(out), base=config.model.name)
    torch.testing.assert_close(scorer.rewards(TALKS), expected, rtol=0, atol=1e-6)
    scale, offset = own.calibration.scale, own.calibration.offset
    slack = 1e-6 / float(scale.min())
    torch.testing.assert_close(scorer.calibrated(TALKS), (expected - offset) / scale, rtol=0, atol=slack)
    lowest = ((expected - offset) / scale).min(dim=1).values
    torch.testing.assert_close(scorer.pessimistic(TALKS), lowest, rtol=0, atol=slack)


def test_adapters_say_what_they_need(
    ensemble: tuple[RewardModelConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = published(ensemble[1], tmp_path / "out")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "torch, transformers and peft" in card and 'Scorer("FOLDER", base="FOLDER OF THE BASE")' in card
    module = scorer_module(out)
    with pytest.raises(ValueError, match="give its folder"):
        module.Scorer(str(out))
    scoring = io.read_json(out / "scoring.json")
    assert scoring["base"] is None and len(scoring["calibration"]["scale"]) == 2
    asked = {}

    def fetch(source: str, **arguments: object) -> None:
        asked.update({"source": source, **arguments})
        raise OSError("offline")

    io.write_json(out / "scoring.json", scoring | {"base": "org/base", "revision": "abc"})
    monkeypatch.setattr(module.AutoModelForSequenceClassification, "from_pretrained", fetch)
    with pytest.raises(OSError, match="offline"):
        module.Scorer(str(out))
    assert (asked["source"], asked["revision"], asked["num_labels"]) == ("org/base", "abc", 1)


# ------------------------------------------------------------------ what leaves
def test_nothing_of_this_machine_leaves(
    ensemble: tuple[RewardModelConfig, Path], root: Path, tmp_path: Path
) -> None:
    artifacts = [
        *(root / "models").glob("*/hh_truthfulqa/*"),
        ensemble[1],
    ]
    assert len(artifacts) >= 8
    data = {
        message["content"]
        for file in (
            *FINISHED.glob("data/processed/*/*/*.jsonl"),
            *ensemble[0].paths.processed.glob("*/*.jsonl"),
        )
        for row in io.read_jsonl(file)
        for part in ("prompt", "chosen", "rejected")
        for message in row[part]
    }
    places = [str(tmp_path), str(ensemble[0].artifact_root), str(PROJECT_ROOT), str(Path.home())]
    assert len(data) > 20
    for number, artifact in enumerate(artifacts):
        out = published(artifact, tmp_path / f"out-{number}")
        for file in (path for path in out.rglob("*") if path.is_file()):
            assert not any(
                word in file.name for word in ("optim", "sched", "rng", "trainer", "args", "jsonl", "run")
            )
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as weights:
                    assert set(weights.metadata() or {}) <= {"format"}
                    assert not any("optim" in name or "exp_avg" in name for name in set(weights.keys()))
                continue
            text = file.read_text(encoding="utf-8")
            assert not [place for place in places if place in text], file
            assert not [said for said in data if len(said) > 15 and said in text], file


@pytest.mark.parametrize("escaped", [False, True])
def test_a_path_of_this_machine_is_refused_where_it_stands(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, escaped: bool
) -> None:
    artifact = root / "models/reward_models/hh_truthfulqa/honest_rm"
    said = str(root / "x")
    if escaped:
        monkeypatch.setattr(Path, "home", lambda: Path("C:\\Users\\me"))
        said = "C:\\Users\\me\\x"
    config = io.read_json(artifact / "config.json")
    io.write_json(artifact / "config.json", config | {"note": said})
    run = io.read_json(artifact / "run.json")
    run.pop("files", None)
    io.write_json(artifact / "run.json", run)
    with pytest.raises(DataError, match=r"config\.json: names .* a folder of this machine"):
        published(artifact, tmp_path / "out")


# ------------------------------------------------------------------ what the card knows
def test_a_policys_card_has_the_numbers_of_these_weights_and_no_others(root: Path, tmp_path: Path) -> None:
    artifact = root / "models/policy_models/hh_truthfulqa/hard_min"
    results = root / "outputs/metrics/hh_truthfulqa"
    found = io.read_json(results / "hard_min.json")
    card = card_of(artifact, tmp_path / "one")
    worst, kl = found["worst_objective"]["win_rate"], found["kl"]["per_response"]
    for name, e in (("worst objective", worst), ("KL to the base, nats a response", kl)):
        assert f"| {name} | {e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}] | 4 | {e['method']} |" in card
    assert (
        "on 4 held-out prompts, 2 each" in card and "models/judges/hh_truthfulqa/honest, 0.80 (n = 5)" in card
    )
    for number, change in enumerate(({"policy": "other"}, None)):
        if change is None:
            (results / "hard_min.json").unlink()
        else:
            io.write_json(results / "hard_min.json", found | {"evaluation": found["evaluation"] | change})
            io.write_json(results / "run.json", {"fingerprint": "without a list of files"})
        other = card_of(artifact, tmp_path / f"other-{number}")
        assert "Not evaluated yet" in other and "worst objective" not in other


def test_the_newest_evaluation_of_a_policy_counts(root: Path, tmp_path: Path) -> None:
    artifact = root / "models/policy_models/hh_truthfulqa/hard_min"
    found = io.read_json(root / "outputs/metrics/hh_truthfulqa/hard_min.json")
    judges = {"honest": {"path": "/home/someone/judge", "accuracy": None}}
    evaluation = found["evaluation"] | {
        "judges": judges,
        "policy": policy_key("behind", artifact),
        "compared_on": {"reference": "behind"},
        "prompts": 99,
    }
    later = root / "outputs/metrics/pku_safe"
    io.write_json(later / "hh_truthfulqa@hard_min.json", found | {"evaluation": evaluation})
    io.write_json(later / "run.json", {"fingerprint": "x", "started": "2999-01-01T00:00:00+00:00"})
    card = card_of(artifact, tmp_path / "out")
    assert "on 99 held-out prompts" in card and "honest: judge, not measured" in card


@pytest.mark.parametrize(
    ("front", "said"),
    [
        ("license: apache-2.0", "apache-2.0, by its own card"),
        ("license: other\nlicense_name: qwen-research", "other (qwen-research), by its own card"),
        ("tags: [x]", "no card of it states a license here"),
        (None, "no card of it states a license here"),
    ],
)
def test_the_license_of_the_base_is_what_its_card_says(
    ensemble: tuple[RewardModelConfig, Path], tmp_path: Path, front: str | None, said: str
) -> None:
    config, folder = ensemble
    card = Path(config.model.name) / "README.md"
    if front is not None:
        card.write_text(f"---\n{front}\n---\n# Base\n", encoding="utf-8")
    try:
        assert f"- base model base: {said}" in card_of(folder, tmp_path / "out")
    finally:
        card.unlink(missing_ok=True)


def test_the_card_of_a_hub_base_is_fetched_at_its_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    asked = []

    def fetch(name: str, file: str, *, revision: str | None, cache_dir: str | None) -> str:
        asked.append((name, file, revision))
        return str(tmp_path / "README.md")

    monkeypatch.setattr(records, "hf_hub_download", fetch)
    model = {"source": "hub", "name": "org/base", "revision": "abc"}
    assert records.base_license(model) == ["mit"] and asked == [("org/base", "README.md", "abc")]
    assert records.base_license({"source": "pypi_wheel", "name": "org/base"}) == []


# ------------------------------------------------------------------ other programs
def test_a_plain_pipeline_scores_chat_strings_as_rewardbench_does(root: Path, tmp_path: Path) -> None:
    out = published(root / "models/reward_models/hh_truthfulqa/honest_rm", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALKS]
    settings = {"batch_size": 3, "truncation": True, "padding": True, "max_length": 2048}
    found = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(
        texts, function_to_apply="none", return_token_type_ids=False, **settings
    )
    for text, score in zip(texts, found, strict=True):
        with torch.no_grad():
            alone = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]
        assert score["score"] == pytest.approx(float(alone), abs=1e-5)


def test_trl_trains_what_was_published(root: Path, tmp_path: Path) -> None:
    out = published(root / "models/reward_models/hh_truthfulqa/honest_rm", tmp_path / "out")
    rows = [
        {"chosen": TALKS[i], "rejected": [*ASKED, {"role": "assistant", "content": "bad"}]} for i in range(3)
    ]
    before = AutoModelForSequenceClassification.from_pretrained(out).score.weight.detach().clone()
    trainer = RewardTrainer(
        model=str(out),
        args=RewardConfig(
            str(tmp_path / "trl"),
            max_steps=1,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
        ),
        train_dataset=Dataset.from_list(rows),
    )
    assert trainer.model.score.weight.shape == before.shape
    torch.testing.assert_close(
        trainer.model.score.weight.detach().float().cpu(), before.float(), rtol=0, atol=0
    )
    result = trainer.train()
    assert result.global_step == 1 and result.training_loss > 0
    assert not torch.equal(trainer.model.score.weight.detach().float().cpu(), before.float())


def test_the_scorer_needs_nothing_of_the_project(root: Path, tmp_path: Path) -> None:
    out = published(root / "models/reward_models/hh_truthfulqa/honest_rm", tmp_path / "out")
    text = (out / "prmd_scorer.py").read_text(encoding="utf-8")
    imported = {
        line.split()[1].split(".")[0]
        for line in text.splitlines()
        if line.strip().startswith(("import ", "from "))
    }
    assert imported - set(sys.stdlib_module_names) == {
        "torch",
        "safetensors",
        "transformers",
        "peft",
        "prmd_scorer",
    }
    assert json.loads((out / "scoring.json").read_text(encoding="utf-8"))["dtype"] == "float32"
