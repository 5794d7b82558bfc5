"""An artifact is used on the base it was trained from: told by content, by name, by what an adapter says."""

import shutil
from pathlib import Path

import pytest
from tiny_models import tiny_causal_lm

from prmd.artifacts import runs
from prmd.artifacts.io import write_json
from prmd.artifacts.paths import ArtifactPaths, policy_command
from prmd.config.policy import PolicyConfig
from prmd.config.shared import ModelConfig, RewardModelConfig
from prmd.errors import ConfigError
from prmd.models.bases import base_record, check_base

HUB = "Qwen/Qwen2.5-0.5B-Instruct"


def model(name: str | Path, revision: str | None = None) -> ModelConfig:
    return ModelConfig(name=str(name), revision=revision, dtype="float32")


def finish(folder: Path, trained_from: ModelConfig, *, kept: bool, adapter: str | None = None) -> None:
    """An artifact of this base; `kept`: with its key, as `run.json` has it today."""
    inputs = {"base": base_record(trained_from, ArtifactPaths(folder, "embedded"))} if kept else {}
    config = PolicyConfig(reward_model_config=RewardModelConfig(model=trained_from))
    runs.finish_run(folder, config=config, inputs=inputs, fingerprint="abc", clock=runs.start_run())
    if adapter:
        write_json(folder / "adapter_config.json", {"base_model_name_or_path": adapter})


def check(folder: Path, now: ModelConfig) -> None:
    paths = ArtifactPaths(folder, "embedded")
    check_base(folder, now, paths, what="policy cvar", command=policy_command("cvar"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first`, `moved/first`, `renamed` (all one content), `second` and `moved/second` (another)."""
    folder = tmp_path_factory.mktemp("bases")
    tiny_causal_lm(folder / "first")
    for name in ("moved/first", "renamed"):
        shutil.copytree(folder / "first", folder / name)
    tiny_causal_lm(folder / "second", seed=5)
    return folder


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("now", ["first", "moved/first", "renamed"])
def test_equal_content_is_the_same_base_whatever_its_name(
    tmp_path: Path, bases: Path, kept: bool, now: str
) -> None:
    finish(tmp_path, model(bases / "first"), kept=kept, adapter=str(bases / "first"))
    check(tmp_path, model(bases / now))


@pytest.mark.parametrize("kept", [True, False])
def test_another_base_is_refused_and_both_are_named(tmp_path: Path, bases: Path, kept: bool) -> None:
    finish(tmp_path, model(bases / "first"), kept=kept)
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, model(bases / "second"))
    said = str(caught.value)
    assert f"policy cvar was trained from {bases / 'first'}, model.name is now {bases / 'second'}" in said
    assert said.endswith("pessimistic_dpo.py --force") and "\n" not in said


def test_hub_ids_are_told_by_name_and_revision(tmp_path: Path, bases: Path) -> None:
    for kept in (True, False):
        finish(tmp_path, model(HUB, "a1"), kept=kept)
        check(tmp_path, model(HUB, "a1"))
        check(tmp_path, model(bases / "Qwen2.5-0.5B-Instruct"))  # downloaded
        for other in (model(HUB, "b2"), model("Qwen/Qwen2.5-3B-Instruct", "a1"), model(bases / "second")):
            with pytest.raises(ConfigError, match=rf"trained from {HUB} \(revision a1\)"):
                check(tmp_path, other)


def test_a_base_that_is_gone_is_told_by_the_name_of_its_folder(tmp_path: Path, bases: Path) -> None:
    finish(tmp_path, model("/elsewhere/first"), kept=False)
    check(tmp_path, model(bases / "first"))
    with pytest.raises(ConfigError, match="trained from /elsewhere/first"):
        check(tmp_path, model(bases / "second"))


@pytest.mark.parametrize("kept", [True, False])
def test_an_adapter_that_names_another_base_is_refused(tmp_path: Path, bases: Path, kept: bool) -> None:
    finish(tmp_path, model(bases / "first"), kept=kept, adapter="someone/Another-7B-Instruct")
    with pytest.raises(ConfigError, match="trained from someone/Another-7B-Instruct"):
        check(tmp_path, model(bases / "first"))


def test_without_any_record_nothing_is_refused(tmp_path: Path, bases: Path) -> None:
    check(tmp_path, model(bases / "first"))
    write_json(tmp_path / "run.json", {"fingerprint": "abc"})
    check(tmp_path, model(bases / "first"))


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("baseline_dpo", "baseline_dpo"),
        ("hierarchical-b03", "hierarchical_dpo"),
        ("hard_min", "pessimistic_dpo"),
        ("dpo-again", "pessimistic_dpo"),
    ],
)
def test_the_command_of_a_policy(name: str, script: str) -> None:
    assert policy_command(name) == f"python 3_policy_training/{script}.py"
