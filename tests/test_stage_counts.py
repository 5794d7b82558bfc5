"""What a stage reads: each weight file hashed, each reward model loaded and each text tokenized once, for all methods together."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_causal_lm
from tiny_tables import table_config, use_tables, with_calibration
from tiny_workspace import reward_model_config, write_prepared, write_reward_models, write_workspace
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.config.evaluation import EvaluationConfig
from prmd.config.policy import PairsConfig, PolicyConfig, PolicySection
from prmd.config.shared import (
    CalibrationConfig,
    EnsembleConfig,
    LoraConfig,
    RewardModelConfig,
    TrainingConfig,
    TuningConfig,
)
from prmd.evaluation import evaluate
from prmd.evaluation.evaluate import compute_metrics
from prmd.objectives import OBJECTIVES
from prmd.pairs import read_pairs
from prmd.policies.preview import gate_file
from prmd.policies.train import train_pessimistic
from prmd.report import figures, reward_figures
from prmd.rewards import reward_model, train
from prmd.rewards.train import train_reward_model
from prmd.training.checkpoints import PREFIX

pytestmark = pytest.mark.slow

TUNING = TuningConfig(method="lora", lora=LoraConfig(r=4, alpha=8, learning_rate=1e-2))
TRAINING = TrainingConfig(max_length=200, max_pairs=8, pairs_per_device=2, gradient_accumulation_steps=2)
SAMPLED = CalibrationConfig(source="reference_samples", samples_per_prompt=2, max_new_tokens=4, prompts=6)
ENSEMBLES = {f"{k}_rm/{name}.safetensors" for k in OBJECTIVES for name in ("ensemble", "model")}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these trainings and reads no model."""
    monkeypatch.setattr(figures, "plot_policy_training", lambda *arguments: [])
    monkeypatch.setattr(reward_figures, "plot_reward_model", lambda *arguments: [])
    monkeypatch.setattr("prmd.evaluation.evaluate.build_report", lambda paths: paths.report)


NOTES = ("start.json", "steps.json")
"""What a training notes for its resume; held to its digest until the artifact is published without it."""


def is_passing(path: Path) -> bool:
    """Whether a file is gone when readings are compared."""
    return PREFIX in path.parent.name or path.name in NOTES


@dataclass
class Reads:
    """What a stage has read so far.

    Attributes:
        hashed: how often each file was read for its sha256.
        size: bytes of all these readings together.
        opened: how often each reward model was loaded, which leaves its weights on the disk.
        loaded: how often its weights were loaded.
    """

    hashed: Counter[Path] = field(default_factory=Counter)
    size: int = 0
    opened: Counter[Path] = field(default_factory=Counter)
    loaded: Counter[Path] = field(default_factory=Counter)

    def weights(self, *written: Path) -> set[str]:
        """Folder and name of every weight file that was hashed, but for those that the stage wrote to `written`."""
        return {
            "/".join(path.parts[-2:])
            for path in self.hashed
            if path.suffix == ".safetensors" and not any(path.is_relative_to(folder) for folder in written)
        }

    def below(self, folder: Path) -> set[str]:
        """Every file below a finished folder that was hashed, but for what a running training keeps there."""
        here = (path for path in self.hashed if path.is_relative_to(place(folder)))
        names = {path.relative_to(place(folder)).as_posix() for path in here}
        return {name for name in names if PREFIX not in name}


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """Count from now on, in a process that knows no file yet."""
    reads, blocks = Reads(), io._blocks

    def counted_blocks(path: Path) -> Iterator[bytes]:
        reads.hashed[place(path)] += 1
        for block in blocks(path):
            reads.size += 0 if is_passing(path) else len(block)
            yield block

    monkeypatch.setattr(io, "_blocks", counted_blocks)
    monkeypatch.setattr(io, "_digests", {})
    load = counted(reward_model.load_reward_model, reads.opened)
    for module in (reward_model, evaluate, train):
        monkeypatch.setattr(module, "load_reward_model", load)
    monkeypatch.setattr(reward_model, "load_classifier", counted(reward_model.load_classifier, reads.loaded))
    return reads


def counted(load: Any, counter: Counter[Path]) -> Any:
    def load_and_count(directory: Path, *arguments: Any, **keywords: Any) -> Any:
        counter[place(directory)] += 1
        return load(directory, *arguments, **keywords)

    return load_and_count


def text_of(prompt: Any, response: str | None = None) -> str:
    """A conversation as one string."""
    turns = [*prompt, *([{"role": "assistant", "content": response}] if response is not None else [])]
    return "|".join(turn["content"] for turn in turns)


def count_rendered(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each conversation is tokenized from now on."""
    rendered: Counter[str] = Counter()
    render = PreTrainedTokenizerBase.apply_chat_template

    def counted_render(self: Any, conversation: Any, *arguments: Any, **keywords: Any) -> Any:
        rendered[text_of(conversation)] += 1
        return render(self, conversation, *arguments, **keywords)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", counted_render)
    return rendered


def place(path: Path) -> Path:
    """Where a file lies, or will lie when the folder it is built in is published."""
    return Path(*(part.removeprefix(".").removesuffix(".partial") for part in path.resolve().parts))


def sampled(config: RewardModelConfig) -> RewardModelConfig:
    return config.model_copy(update={"calibration": SAMPLED, "report_to": ()})


# ------------------------------------------------------------------ the stages
def test_methods_share_one_loading_and_one_hashing_of_the_reward_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = sampled(reward_model_config(tmp_path / "root", tiny_causal_lm(tmp_path / "base")))
    policy, pairs = PolicySection(methods=("hard_min", "cvar")), PairsConfig(reference_samples=3)
    config = PolicyConfig(
        reward_model_config=shared, policy=policy, pairs=pairs, tuning=TUNING, training=TRAINING
    )
    write_prepared(config.paths)
    write_reward_models(config)
    reads = count_reads(monkeypatch)
    train_pessimistic(config)
    folders = {place(config.paths.reward_model(objective)): 1 for objective in OBJECTIVES}
    assert reads.opened == folders and reads.loaded == folders
    policies = [place(config.paths.policy(method)) for method in ("hard_min", "cvar")]
    assert reads.weights(*policies) == ENSEMBLES | {"base/model.safetensors"}
    assert all(reads.below(folder) - notes(reads, folder) == files_of(folder) for folder in policies)
    splits = {place(config.paths.split(objective, s)) for objective in OBJECTIVES for s in ("train", "val")}
    assert splits < set(reads.hashed) and set(reads.hashed.values()) == {1}
    assert reads.size == sum(path.stat().st_size for path in reads.hashed if not is_passing(path))
    assert gate_file(config.paths).is_file()  # of the same models


def test_methods_reward_models_and_the_table_share_the_tokens_of_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods on other pairs, three reward models, centers of prompts, pairs of samples and the closed-form table."""
    base, policy = tiny_causal_lm(tmp_path / "base"), PolicySection(methods=("hard_min", "dpo_helpful"))
    config = with_calibration(
        table_config(tmp_path / "root", base, policy=policy), source="reference_samples"
    )
    write_prepared(config.paths)
    use_tables(monkeypatch)
    rendered = count_rendered(monkeypatch)
    train_pessimistic(config)
    assert gate_file(config.paths).is_file()
    watched_too = [(objective, split) for objective in OBJECTIVES for split in ("train", "val")]
    pairs = [pair for objective, split in watched_too for pair in read_pairs(config.paths, objective, split)]
    responses = {p.id: [rendered[text_of(p.prompt, y)] for y in (p.chosen, p.rejected)] for p in pairs}
    read = {pair.id for pair in pairs if responses[pair.id] != [0, 0]}
    assert len(read) > 12 + 3  # pairs of the larger training and those watched beside it
    assert all(responses[name] == [1, 1] for name in read)
    for pair in pairs:  # its own row takes a prompt three times; the table reads the others too
        assert rendered[text_of(pair.prompt)] == (4 if pair.id in read else 1)


def test_an_evaluation_hashes_policies_reward_models_and_judges_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _evaluation(tmp_path)
    reads = count_reads(monkeypatch)
    compute_metrics(config)
    policies = {
        "baseline_dpo/model.safetensors",
        "hard_min/adapter_model.safetensors",
        "base/model.safetensors",
    }
    judged = {f"{objective}/model.safetensors" for objective in OBJECTIVES}
    trained = place(config.paths.judge("honest"))
    read = ENSEMBLES | policies | judged - {"honest/model.safetensors"}
    assert reads.weights(trained) == read and set(reads.hashed.values()) == {1}
    assert reads.below(trained) - notes(reads, trained) == files_of(trained)
    assert reads.opened.pop(trained) == 2  # to be measured where it was built, and to judge
    assert len(reads.opened) == 5 and set(reads.opened.values()) == {1}


@pytest.mark.parametrize("kind", ["heads", "adapters"])
def test_a_training_hashes_what_it_wrote_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    ensemble = EnsembleConfig(kind=kind, members=2, fit_fraction=0.4)
    settings = {"training": TRAINING, "tuning": TUNING, "ensemble": ensemble}
    config = sampled(reward_model_config(tmp_path / "root", tiny_causal_lm(tmp_path / "base"), **settings))
    write_prepared(config.paths, pairs=12)
    reads = count_reads(monkeypatch)
    folder = train_reward_model(config, objective="helpful")
    kept = folder.glob("ensemble.safetensors" if kind == "heads" else "members/*/adapter/adapter_*")
    assert len(list(kept)) == (1 if kind == "heads" else 4)
    assert (
        reads.below(folder) - notes(reads, folder)
        == files_of(folder)
        > {"model.safetensors", "calibration.json"}
    )
    assert set(reads.hashed.values()) == {1}


def notes(reads: Reads, folder: Path) -> set[str]:
    """What a training notes for its resume, a few bytes held to their digest until the artifact is published without them."""
    return {name for name in reads.below(folder) if Path(name).name in NOTES}


def files_of(folder: Path) -> set[str]:
    """Every file of a finished folder but its record, checkpoints and copies of them: those were hashed when they were saved."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if name != "run.json" and not is_copied(folder, name)}


def is_copied(folder: Path, name: str) -> bool:
    """Whether a file was copied from a checkpoint: a policy is its last one, a member of a reward model its best one."""
    if name.startswith("members/"):
        return "/adapter/" in name and not name.endswith("adapter_config.json")  # written anew
    if name.startswith(tuple(f"checkpoints/{kept}/" for kept in ("33", "66", "end", "best"))):
        return True
    policy = not (folder / "backbone.json").is_file()
    return policy and (folder / "checkpoints" / "end" / name).is_file()


def _evaluation(root: Path) -> EvaluationConfig:
    """Two given judges and one to be trained, two policies, three reward models."""
    config = write_workspace(root)
    paths = {k: path for k, path in config.judges.paths.items() if k != "honest"}
    judging = config.judges.model_copy(update={"paths": paths, "tuning": TUNING, "training": TRAINING})
    config = config.model_copy(
        update={"judges": judging, "reward_model_config": sampled(config.reward_model_config)}
    )
    write_reward_models(config)
    return config
