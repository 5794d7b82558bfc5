"""What the numbers of a model folder depend on is in its key, nothing else is, and earlier keys are kept while they hold."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEMPLATE, labelled, tiny_causal_lm, tiny_classifier
from tiny_workspace import evaluation_config, reward_model_config

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.artifacts.runs import finish_run, start_run
from prmd.config.shared import RewardModelConfig
from prmd.errors import ConfigError
from prmd.inference.candidates import policy_key
from prmd.inference.reference import reference_logps, samples_table
from prmd.judges.classifier import LabelClassifier
from prmd.judges.reward_model import RewardModelJudge, _fingerprint
from prmd.models.bases import base_record, check_base
from prmd.models.identity import model_files
from prmd.models.loading import base_model_key, load_tokenizer
from prmd.models.tokenization import PrefixRow
from prmd.rewards.reward_model import load_reward_model

ROWS = [PrefixRow((5, 6, 7, 8), ((9, 10, 11), (12, 13)))]


# ------------------------------------------------------------------ edits
def edit_json(name: str, **values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        path.write_text(json.dumps(found | values), encoding="utf-8")

    return edit


def edit_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None


YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "rope_theta": 10000.0,
}
CUT = {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0}
DECISIVE = {
    "yarn": edit_json("config.json", rope_parameters=YARN),
    "epsilon": edit_json("config.json", rms_norm_eps=1e-2),
    "chat_template.jinja": edit_text("chat_template.jinja", "{# other #}" + TEMPLATE),
    "tokenizer_config.json": edit_json("tokenizer_config.json", model_max_length=77),
    "tokenizer.json": edit_json("tokenizer.json", truncation=CUT),
    "adapter_config.json": edit_json("adapter_config.json", lora_alpha=3),
    "sentencepiece": edit_text("spm.model", "other pieces"),
    "code": edit_text("modeling_own.py", "x = 1"),
}
IDLE = {
    "readme": edit_text("README.md", "what it is"),
    "generation": edit_json("generation_config.json", temperature=0.3, top_k=2),
    "logging": edit_json("trainer_state.json", logging_steps=3),
    "arguments": edit_text("training_args.bin", "of a training"),
}


@pytest.fixture
def paths(tmp_path: Path) -> ArtifactPaths:
    return ArtifactPaths(tmp_path / "root", "embedded")


@pytest.fixture
def config(tmp_path: Path) -> RewardModelConfig:
    return reward_model_config(tmp_path / "root", tiny_causal_lm(tmp_path / "base"))


def only_pickled(folder: Path) -> Path:
    """The same weights as `pytorch_model.bin`."""
    weights = folder / "model.safetensors"
    torch.save(io.read_tensors(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


# ------------------------------------------------------------------ every kind of folder
@pytest.mark.parametrize("edit", DECISIVE.values(), ids=DECISIVE)
def test_what_decides_numbers_is_in_the_key_of_every_kind_of_folder(
    tmp_path: Path, paths: ArtifactPaths, config: RewardModelConfig, edit: Callable[[Path], None]
) -> None:
    base, folder = tmp_path / "base", tiny_classifier(tmp_path / "rm")
    judge = LabelClassifier(str(labelled(tmp_path / "guard", {0: "toxic"})), None, "text_judge", paths)

    def keys() -> list[str]:
        model = load_reward_model(folder, shared=config)
        own = RewardModelJudge("helpful", "rm", model, _fingerprint(model))
        guard = LabelClassifier(judge.source, None, "text_judge", paths)
        found = [base_model_key(config.model, paths), policy_key("reference", folder)]
        return [*found, model.fingerprint, model.backbone_fingerprint, own.fingerprint, guard.fingerprint]

    before = keys()
    for place in (base, folder, tmp_path / "guard"):
        edit(place)
    assert all(a != b for a, b in zip(before, keys(), strict=True))


@pytest.mark.parametrize("edit", IDLE.values(), ids=IDLE)
def test_what_decides_nothing_is_in_no_key(
    tmp_path: Path, paths: ArtifactPaths, config: RewardModelConfig, edit: Callable[[Path], None]
) -> None:
    folder, guard = tiny_classifier(tmp_path / "rm"), labelled(tmp_path / "guard", {0: "toxic"})

    def keys() -> list[str]:
        model = load_reward_model(folder, shared=config)
        found = [base_model_key(config.model, paths), policy_key("reference", folder), model.fingerprint]
        return [*found, LabelClassifier(str(guard), None, "text_judge", paths).fingerprint]

    before = keys()
    for place in (tmp_path / "base", folder, guard):
        edit(place)
    assert keys() == before
    assert not (paths.root / "data" / "first_seen").exists()  # nothing here is of an earlier version


def test_pickled_weights_count_by_content_and_every_shard_of_them(
    tmp_path: Path, paths: ArtifactPaths, config: RewardModelConfig
) -> None:
    base = only_pickled(tmp_path / "base")
    first = base_model_key(config.model, paths)
    moved = config.model.model_copy(update={"name": str(shutil.copytree(base, tmp_path / "moved"))})
    assert base_model_key(moved, paths) == first
    shutil.copytree(only_pickled(tiny_causal_lm(tmp_path / "other", seed=1)), base, dirs_exist_ok=True)
    assert base_model_key(config.model, paths) != first
    (base / "pytorch_model.bin").rename(base / "pytorch_model-00001-of-00002.bin")
    edit_json("pytorch_model.bin.index.json", weight_map={})(base)
    edit_text("pytorch_model-00002-of-00002.bin", "a")(base)
    sharded = base_model_key(config.model, paths)
    edit_text("pytorch_model-00002-of-00002.bin", "b")(base)
    assert base_model_key(config.model, paths) != sharded
    assert {name for name, _ in model_files(base)} >= {"config.json", "pytorch_model-00001-of-00002.bin"}


def test_weights_beside_safetensors_are_not_read_and_not_hashed(tmp_path: Path, paths: ArtifactPaths) -> None:
    base = tiny_causal_lm(tmp_path / "base")
    before = model_files(base, paths)
    edit_text("pytorch_model.bin", "left behind")(base)
    assert model_files(base, paths) == before


# ------------------------------------------------------------------ what is reused
def test_logps_after_an_edit_of_the_configuration_are_those_of_the_edited_model(
    tmp_path: Path, config: RewardModelConfig
) -> None:
    tokenizer = load_tokenizer(config.model, config.paths)
    first = reference_logps(config, tokenizer, ROWS)[0]
    IDLE["readme"](tmp_path / "base")
    reused = samples_table(config, tokenizer).directory
    DECISIVE["yarn"](tmp_path / "base")
    assert samples_table(config, tokenizer).directory != reused
    edited = reference_logps(config, tokenizer, ROWS)[0]
    assert (edited - first).abs().max() > 1e-3
    fresh = config.model_copy(update={"artifact_root": str(tmp_path / "fresh")})
    torch.testing.assert_close(edited, reference_logps(fresh, tokenizer, ROWS)[0])


def test_an_artifact_is_refused_on_a_base_that_was_edited(tmp_path: Path, config: RewardModelConfig) -> None:
    folder, paths = config.paths.policy("cvar"), config.paths
    inputs = {"base": base_record(config.model, paths)}
    finish_run(folder, config=config, inputs=inputs, fingerprint="abc", clock=start_run())
    IDLE["readme"](tmp_path / "base")
    check_base(folder, config.model, paths, what="policy cvar", command="python x")
    DECISIVE["yarn"](tmp_path / "base")
    with pytest.raises(ConfigError, match=r"base, whose weights, configuration or tokenizer have changed"):
        check_base(folder, config.model, paths, what="policy cvar", command="python x")


# ------------------------------------------------------------------ earlier versions
def earlier_key(folder: Path) -> str:
    """The key that earlier versions gave a folder: its weights alone."""
    files = sorted(folder.glob("*.safetensors"))
    return io.fingerprint([[file.name, io.file_sha256(file)] for file in files] or [str(folder)])


def finished_before(config: RewardModelConfig, folder: Path) -> None:
    """An artifact as an earlier version left it."""
    finish_run(folder, config=config, inputs={"policy": "abc"}, fingerprint="abc", clock=start_run())


@pytest.mark.parametrize("pickled", [False, True])
def test_beside_what_an_earlier_version_finished_its_keys_stay_until_an_edit(
    tmp_path: Path, config: RewardModelConfig, pickled: bool
) -> None:
    base, paths = tmp_path / "base", config.paths
    if pickled:
        only_pickled(base)
    whole, earlier = base_model_key(config.model, paths), earlier_key(base)
    assert whole != earlier  # nothing was finished yet
    finished_before(config, paths.policy("cvar"))
    assert base_model_key(config.model, paths) == earlier
    IDLE["generation"](base)
    assert base_model_key(config.model, paths) == earlier
    text = (base / "config.json").read_text(encoding="utf-8")
    DECISIVE["yarn"](base)
    assert base_model_key(config.model, paths) not in (earlier, whole)
    (base / "config.json").write_text(text, encoding="utf-8")
    assert base_model_key(config.model, paths) == earlier  # undone


def test_an_artifact_keeps_the_kind_of_key_it_was_finished_with(
    tmp_path: Path, config: RewardModelConfig
) -> None:
    old, new = (tiny_classifier(config.paths.judge(name)) for name in ("old", "new"))
    inputs = {"base": base_record(config.model, config.paths)}
    finish_run(new, config=config, inputs=inputs, fingerprint="abc", clock=start_run())
    whole = policy_key("", new)
    finished_before(config, old)
    checkpoint = shutil.copytree(old, old / "checkpoints" / "33", ignore=shutil.ignore_patterns("run.json"))
    assert policy_key("", old) == io.fingerprint(["", earlier_key(old)]) == policy_key("", checkpoint)
    assert policy_key("", new) == whole != policy_key("", old)


def test_a_base_of_a_new_artifact_stays_it_beside_a_copy_of_an_old_one(
    tmp_path: Path, config: RewardModelConfig
) -> None:
    inputs = {"base": base_record(config.model, config.paths)}
    new = config.paths.policy("cvar")
    finish_run(new, config=config, inputs=inputs, fingerprint="abc", clock=start_run())
    finished_before(config, config.paths.policy("copied"))
    assert base_model_key(config.model, config.paths) == inputs["base"]["key"]


def test_the_key_of_a_classifier_beside_old_artifacts_is_the_old_one(
    tmp_path: Path, config: RewardModelConfig
) -> None:
    finished_before(config, config.paths.policy("cvar"))
    folder = labelled(tmp_path / "guard", {0: "toxic"})
    edit_text("spm.model", "pieces")(folder)
    paths = evaluation_config(tmp_path / "root").paths

    def key() -> str:
        return LabelClassifier(str(folder), None, "text_judge", paths).fingerprint

    counted = sorted(p for p in folder.glob("*") if p.suffix in (".safetensors", ".json"))
    files = [[p.name, io.file_sha256(p)] for p in counted]
    assert key() == io.fingerprint(["classifier", files, None])
    edit_text("spm.model", "other pieces")(folder)
    assert key() != io.fingerprint(["classifier", files, None])
