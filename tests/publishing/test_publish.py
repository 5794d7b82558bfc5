"""What leaves the machine: complete, scored by a stranger as the project scores it, and nothing else."""

import importlib.util
import re
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.rewardbench import RewardBenchPair, evaluate_rewardbench
from prmd.artifacts.io import read_json, write_json
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.config.shared import ModelConfig, RewardModelConfig
from prmd.errors import ConfigError, DataError
from prmd.models.tokenization import tokenize_row
from prmd.pairs import PreferencePair
from prmd.publishing import publish as publishing
from prmd.publishing import records
from prmd.publishing.publish import publish_model, write_published
from prmd.rewards.reward_model import load_reward_model

MODELS = PROJECT_ROOT / "tests/fixtures/finished/artifacts/models"
ASKED = [{"role": "user", "content": "why is it so?"}]
ANSWERS = ("I do not know", "It is a test", "no")
TALKS = [[*ASKED, {"role": "assistant", "content": answer}] for answer in ANSWERS]


@pytest.fixture
def models(tmp_path):
    return shutil.copytree(MODELS, tmp_path / "root" / "models")


@pytest.fixture
def honest(models):
    return models / "reward_models" / "hh_truthfulqa" / "honest_rm"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("offline")

    monkeypatch.setattr(records, "hf_hub_download", unreachable)


def published(artifact, tmp_path):
    publish_model(artifact, hub_id=None, folder=tmp_path / "out", license_=None)
    return tmp_path / "out"


def config_at(root):
    model = ModelConfig(name="unused", revision=None, dtype="float32")
    return RewardModelConfig(artifact_root=str(root), model=model)


def scorer_of(folder):
    spec = importlib.util.spec_from_file_location("published_scorer", folder / "prmd_scorer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Scorer(str(folder))


def test_a_reward_model_leaves_whole_and_alone(honest, tmp_path):
    out = published(honest, tmp_path)
    assert {path.name for path in out.rglob("*")} == {
        *("README.md", "chat_template.jinja", "config.json", "ensemble.safetensors", "model.safetensors"),
        *("prmd_scorer.py", "scoring.json", "tokenizer.json", "tokenizer_config.json"),
    }
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "| accuracy | 0.800 [0.376, 0.964] | 5 | Wilson 0.95 |" in card
    assert "TruthfulQA" in card and "Apache-2.0" in card and "HH-RLHF" not in card
    assert "1cff2968b1af1b8bb224c4c190ac0c429dcea67d" in card and "train_honest_rm.py" in card
    texts = [p.read_text(encoding="utf-8") for p in out.iterdir() if p.suffix != ".safetensors"]
    assert not [text for text in texts if str(tmp_path) in text or str(PROJECT_ROOT) in text]


def test_the_scorer_gives_the_projects_own_numbers(honest, tmp_path):
    own = load_reward_model(honest, shared=config_at(tmp_path / "root"))
    row = tokenize_row(own.tokenizer, ASKED, ANSWERS, keep_suffix=True)
    [expected] = own.rewards([row], description="test")
    [features] = own.features([row], description="test")
    kept = read_json(honest / "calibration.json")["calibration"]
    offset, scale = (torch.tensor(kept[k], dtype=torch.float64) for k in ("offset", "scale"))
    out = published(honest, tmp_path)
    scorer = scorer_of(out)
    torch.testing.assert_close(scorer.rewards(TALKS), expected, rtol=0, atol=1e-6)
    calibrated = (expected - offset) / scale
    torch.testing.assert_close(scorer.calibrated(TALKS), calibrated, rtol=0, atol=1e-6 / float(scale.min()))
    lowest = torch.minimum(*calibrated.T)
    torch.testing.assert_close(scorer.pessimistic(TALKS), lowest, rtol=0, atol=1e-6 / float(scale.min()))
    model, tokenizer = (
        kind.from_pretrained(out) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    for talk, reward in zip(TALKS, features[:, 0], strict=True):
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        with torch.no_grad():
            found = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, 0]
        torch.testing.assert_close(found, reward, rtol=0, atol=1e-6)


def test_rewardbench_takes_what_was_published(honest, tmp_path):
    pair = PreferencePair(
        id="1", prompt=tuple(ASKED), chosen="yes", rejected="no", source="x:1", objective="rewardbench"
    )
    args = ([RewardBenchPair(pair, "alpacaeval-easy")],)
    results = [
        evaluate_rewardbench(folder, *args, name="m", config=config_at(tmp_path / "root"))[0]
        for folder in (honest, published(honest, tmp_path))
    ]
    assert results[0] == results[1]


def test_a_policy_loads_with_four_lines(models, tmp_path):
    artifact = models / "policy_models" / "hh_truthfulqa" / "hard_min"
    out = published(artifact, tmp_path)
    base = PROJECT_ROOT / "tests/fixtures/finished/base"
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out)
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), artifact)
    ids = AutoTokenizer.from_pretrained(out)("why?", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(policy(ids).logits, own(ids).logits, rtol=0, atol=0)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "of its author's machine, not on the hub" in card and "HH-RLHF" in card and "TruthfulQA" in card
    assert not (out / "checkpoints").exists() and not (out / "prmd_scorer.py").exists()


def test_an_adapter_names_its_base_by_hub_id(models, tmp_path):
    artifact = models / "policy_models" / "hh_truthfulqa" / "hard_min"
    config = artifact / "config.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("tests/fixtures/finished/base", "Qwen/Qwen3-0.6B"), encoding="utf-8")
    out = published(artifact, tmp_path)
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == "Qwen/Qwen3-0.6B"
    assert "\nbase_model: Qwen/Qwen3-0.6B\n" in (out / "README.md").read_text(encoding="utf-8")


def test_what_is_changed_or_unfinished_is_refused_in_a_line(honest, tmp_path):
    published(honest, tmp_path)  # lists its files
    kept = (honest / "chat_template.jinja").read_text(encoding="utf-8")
    (honest / "chat_template.jinja").write_text(kept.replace("user", "abcd").swapcase(), encoding="utf-8")
    with pytest.raises(DataError, match=r"chat_template\.jinja was changed") as found:
        write_published(honest, tmp_path / "new", here="x", license_=None)
    assert "\n" not in str(found.value) and not (tmp_path / "new").exists()
    (honest / "run.json").unlink()
    with pytest.raises(DataError, match="half-written"):
        write_published(honest, tmp_path / "new", here="x", license_=None)
    with pytest.raises(ConfigError, match="not an empty or new folder"):
        published(honest, tmp_path)


@pytest.mark.parametrize(
    ("approach", "license_", "card_license"),
    [("pku_safe", None, "cc-by-nc-4.0"), ("own_pairs", "cc-by-4.0", "cc-by-4.0"), ("own_pairs", None, None)],
)
def test_the_data_mark_the_license(honest, tmp_path, approach, license_, card_license):
    write_json(honest / "metrics.json", read_json(honest / "metrics.json") | {"approach": approach})
    if card_license is None:
        with pytest.raises(ConfigError, match="--license: got none"):
            write_published(honest, tmp_path / "new", here="x", license_=license_)
        return
    write_published(honest, tmp_path / "new", here="x", license_=license_)
    text = (tmp_path / "new" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^license: (\S+)$", text, re.MULTILINE)[1] == card_license


def test_the_hub_gets_the_same_folder(honest, tmp_path, monkeypatch):
    pushed = {}

    class Hub:
        def create_repo(self, hub_id, *, exist_ok):
            pushed["id"] = hub_id

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            pushed["files"] = {p.name: p.read_bytes() for p in folder_path.iterdir()}
            return "https://hub/me/out"

    monkeypatch.setattr(publishing, "HfApi", Hub)
    assert publish_model(honest, hub_id="out", folder=None, license_=None) == "https://hub/me/out"
    out = published(honest, tmp_path)
    assert pushed == {"id": "out", "files": {p.name: p.read_bytes() for p in out.iterdir()}}
