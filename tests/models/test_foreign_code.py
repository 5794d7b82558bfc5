"""Python code that comes with a model, a tokenizer or a judge runs where `model.trust_remote_code` says so, and nowhere else."""

import builtins
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import labelled, tiny_causal_lm, tiny_classifier
from tiny_workspace import evaluation_config, reward_model_config

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import ModelConfig
from prmd.errors import ConfigError
from prmd.judges.classifier import LabelClassifier
from prmd.judges.text import make_text_judge
from prmd.models.loading import (
    load_base_classifier,
    load_causal_lm,
    load_model_config,
    load_policy,
    load_source_tokenizer,
)
from prmd.rewards.reward_model import load_reward_model

CONFIGURATION = """from pathlib import Path
from transformers import LlamaConfig
Path({mark!r}).write_text("ran", encoding="utf-8")
class OwnConfig(LlamaConfig):
    model_type = "own_{name}"
"""
MODELS = """import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, LlamaPreTrainedModel
from .configuration_own import OwnConfig
class OwnCausal(LlamaForCausalLM):
    config_class = OwnConfig
class OwnClassifier(LlamaForSequenceClassification):
    config_class = OwnConfig
    def __init__(self, config):
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = LlamaModel(config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
"""
TOKENIZER = """from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({mark!r}).write_text("ran", encoding="utf-8")
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
OF_MODEL = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForCausalLM": "modeling_own.OwnCausal",
    "AutoModelForSequenceClassification": "modeling_own.OwnClassifier",
}


@pytest.fixture(autouse=True)
def nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompt; code that runs is copied below the test's own folder."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("somebody was asked"))
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def change(path: Path, **values: object) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(found | values), encoding="utf-8")


def with_model_code(folder: Path) -> Path:
    """The model of a folder as one that only its own code can make; the code leaves `ran` behind."""
    text = CONFIGURATION.format(mark=str(folder / "ran"), name=folder.name)
    (folder / "configuration_own.py").write_text(text, encoding="utf-8")
    (folder / "modeling_own.py").write_text(MODELS, encoding="utf-8")
    change(folder / "config.json", model_type=f"own_{folder.name}", auto_map=OF_MODEL)
    return folder


def with_tokenizer_code(folder: Path) -> Path:
    text = TOKENIZER.format(mark=str(folder / "ran"))
    (folder / "tokenization_own.py").write_text(text, encoding="utf-8")
    own = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    change(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    return folder


def model_at(folder: Path, trust: bool) -> ModelConfig:
    return ModelConfig(name=str(folder), revision=None, dtype="float32", trust_remote_code=trust)


def refused(folder: Path, load: Callable[[], object]) -> None:
    with pytest.raises(ConfigError) as error:
        load()
    said = str(error.value)
    assert str(folder) in said and "model.trust_remote_code" in said and "\n" not in said
    assert not (folder / "ran").exists()


BASES: dict[str, Callable[[ModelConfig, ArtifactPaths], object]] = {
    "configuration": load_model_config,
    "policy to train": load_causal_lm,
    "reward model to train": lambda model, paths: load_base_classifier(model, paths, pad_token_id=0),
    "policy": lambda model, paths: load_policy(Path(model.name), model, paths),
}


@pytest.mark.parametrize("load", BASES.values(), ids=BASES)
def test_the_code_of_a_base_or_policy_runs_only_where_the_configuration_says_so(
    tmp_path: Path, load: Callable[[ModelConfig, ArtifactPaths], object]
) -> None:
    folder, paths = with_model_code(tiny_causal_lm(tmp_path / "base")), ArtifactPaths(tmp_path, "embedded")
    refused(folder, lambda: load(model_at(folder, False), paths))
    loaded = load(model_at(folder, True), paths)
    assert type(loaded).__name__.startswith("Own") and (folder / "ran").exists()


def test_the_code_of_a_tokenizer(tmp_path: Path) -> None:
    folder, paths = with_tokenizer_code(tiny_causal_lm(tmp_path / "base")), ArtifactPaths(tmp_path, "x")
    refused(folder, lambda: load_source_tokenizer(model_at(folder, False), paths))
    assert type(load_source_tokenizer(model_at(folder, True), paths)).__name__ == "OwnTokenizer"


@pytest.mark.parametrize("with_code", [with_model_code, with_tokenizer_code])
def test_the_code_of_a_reward_model_or_judge_by_folder(
    tmp_path: Path, with_code: Callable[[Path], Path]
) -> None:
    folder = with_code(tiny_classifier(tmp_path / "rm"))

    def load(trust: bool) -> object:
        config = reward_model_config(tmp_path / "root", tmp_path / "base", model=model_at(folder, trust))
        return load_reward_model(folder, shared=config).model

    refused(folder, lambda: load(False))
    load(True)
    assert (folder / "ran").exists()


def test_the_code_of_a_text_classifier(tmp_path: Path) -> None:
    folder = with_model_code(labelled(tmp_path / "guard", {0: "safe", 1: "unsafe"}))
    paths = ArtifactPaths(tmp_path / "root", "embedded")
    refused(folder, lambda: LabelClassifier(str(folder), None, "k", paths).probabilities(["a"]))
    assert LabelClassifier(str(folder), None, "k", paths, trust=True).probabilities(["a"]).shape == (1,)


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("kind", ["classifier", "local_model"])
def test_text_judges_follow_the_setting(tmp_path: Path, kind: str, trust: bool) -> None:
    config = evaluation_config(tmp_path, text_judge={"kind": kind, "model": "somewhere"})
    shared = config.reward_model_config.model_copy(update={"model": model_at(tmp_path, trust)})
    judge = make_text_judge(config.model_copy(update={"reward_model_config": shared}))
    found = judge.classifier.trust if kind == "classifier" else judge.chat.model.trust_remote_code
    assert found is trust
