"""`generation.policies`: policies trained elsewhere in the comparison, its numbers, the report and the benchmarks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from tiny_models import direct_kl, tiny_config, tiny_tokenizer
from tiny_workspace import candidate, candidates_of, prompts_of, write_reward_models, write_workspace
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR
from prmd.config.evaluation import BenchmarksConfig, EvaluationConfig, GenerationConfig
from prmd.config.loading import load_config
from prmd.errors import ConfigError
from prmd.evaluation.evaluate import benchmark_eval, compute_metrics
from prmd.evaluation.held_out import debiased_rewards

METHODS = ["reference", "baseline_dpo", "hard_min", "theirs", "other-shape"]


def with_policies(config: EvaluationConfig, **policies: str) -> EvaluationConfig:
    changes = {"policies": policies, "checkpoints": "all", "checkpoint_prompts": 4}
    return config.model_copy(update={"generation": config.generation.model_copy(update=changes)})


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of somebody else's: no run.json, and a metrics.json and checkpoints of other makes."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, elsewhere: Path) -> EvaluationConfig:
    root = tmp_path_factory.mktemp("foreign")
    config = write_workspace(root)
    write_reward_models(config)
    torch.manual_seed(8)
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base"), lora).save_pretrained(
        elsewhere / "lora"
    )
    io.write_json(elsewhere / "lora" / "metrics.json", [{"debiased": "a log of theirs"}])
    LlamaForCausalLM(tiny_config(num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        elsewhere / "full"
    )
    tiny_tokenizer(elsewhere / "full")
    (elsewhere / "full" / "checkpoints" / "100").mkdir(parents=True)
    return with_policies(config, theirs=str(elsewhere / "lora"), **{"other-shape": str(elsewhere / "full")})


@pytest.fixture(scope="module")
def evaluated(config: EvaluationConfig) -> EvaluationConfig:
    compute_metrics(config)
    return config


def metrics_of(config: EvaluationConfig, method: str) -> dict[str, Any]:
    return io.read_json(config.paths.metrics / f"{method}.json")


def test_they_are_rows_of_the_comparison_with_all_a_policy_has(
    evaluated: EvaluationConfig, elsewhere: Path
) -> None:
    comparison = io.read_json(evaluated.paths.metrics / "comparison.json")
    rows = {row["method"]: row for row in comparison["rows"]}
    assert list(rows) == METHODS
    assert [name for name, row in rows.items() if "elsewhere" in row] == METHODS[3:]
    said = rows["theirs"]["elsewhere"]
    assert said["source"] == str(elsewhere / "lora") and said["adapter"] == "LoRA of rank 2"
    assert {t["method"] for t in comparison["paired"]} == set(METHODS[2:])
    assert set(metrics_of(evaluated, "theirs")["objectives"]) == set(evaluated.paths.objectives)
    assert "proxy" in metrics_of(evaluated, "hard_min") and "proxy" not in metrics_of(evaluated, "theirs")
    points = io.read_json(evaluated.paths.metrics / "frontier.json")["points"]
    assert [p["checkpoint"] for p in points if p["method"] in METHODS[3:]] == ["end", "end"]


@pytest.mark.parametrize(("method", "place"), [("theirs", "lora"), ("other-shape", "full")])
def test_their_kl_is_the_full_softmax_sum_along_their_samples(
    evaluated: EvaluationConfig, elsewhere: Path, method: str, place: str
) -> None:
    def base() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(evaluated.shared.model.name)

    folder = elsewhere / place
    policy = (
        PeftModel.from_pretrained(base(), folder)
        if place == "lora"
        else AutoModelForCausalLM.from_pretrained(folder)
    )
    reference, prompts = base(), prompts_of(evaluated)
    with candidate(evaluated, method) as models:
        samples = models.samples(prompts)
    expected = [
        np.mean([direct_kl(policy, reference, prompt.token_ids, r.token_ids)[0] for r in responses])
        for prompt, responses in zip(prompts, samples, strict=True)
    ]
    found = metrics_of(evaluated, method)["per_prompt"]["kl"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4) and min(expected) > 0.01


def test_the_page_and_its_tables_name_them_and_say_where_they_are_from(
    evaluated: EvaluationConfig, elsewhere: Path
) -> None:
    page = evaluated.paths.report.read_text(encoding="utf-8")
    assert "Not trained here: theirs and other-shape, see the notes." in page
    assert (
        f"theirs: not trained here: source {elsewhere / 'lora'}, base {evaluated.shared.model.name}" in page
    )
    assert "adapter LoRA of rank 2" in page and "adapter none, full weights" in page
    table = (evaluated.paths.metrics / "comparison.md").read_text(encoding="utf-8")
    assert "| theirs |" in table and "| other-shape |" in table and "Not trained here" in table


def test_what_is_evaluated_is_reused_until_its_content_changes(
    evaluated: EvaluationConfig, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prmd.evaluation.evaluate.build_report", lambda paths: paths.report)
    path = evaluated.paths.metrics / "theirs.json"
    before, kept = path.stat().st_mtime_ns, {c.method: c.fingerprint for c in candidates_of(evaluated)}
    compute_metrics(evaluated)
    assert path.stat().st_mtime_ns == before
    settings = io.read_json(elsewhere / "lora" / "adapter_config.json")
    io.write_json(elsewhere / "lora" / "adapter_config.json", settings | {"lora_alpha": 99})
    now = {c.method: c.fingerprint for c in candidates_of(evaluated)}
    assert {method for method in METHODS if now[method] != kept[method]} == {"theirs"}
    io.write_json(elsewhere / "lora" / "adapter_config.json", settings)


def test_benchmarks_run_on_them(evaluated: EvaluationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prmd.evaluation.evaluate.build_report", lambda paths: paths.report)
    benchmark_eval(evaluated.model_copy(update={"benchmarks": BenchmarksConfig(run=("hh_holdout",))}))
    for method in METHODS[3:]:
        result = io.read_json(evaluated.paths.benchmark("heldout_pairs") / f"{method}.json")
        assert result["status"] == "done" and result["metrics"]["implicit_reward_accuracy"]["n"] == 18


def test_nothing_of_their_folder_is_taken_for_the_projects_own(evaluated: EvaluationConfig) -> None:
    theirs = next(c for c in candidates_of(evaluated) if c.method == "theirs")
    assert debiased_rewards(theirs) == {}


def test_a_name_that_a_policy_has_is_refused(config: EvaluationConfig, elsewhere: Path) -> None:
    config.paths.policy("ours").mkdir(parents=True)
    io.write_json(config.paths.policy("ours") / "run.json", {"fingerprint": "ours"})
    (config.paths.policy("ours") / "model.safetensors").write_bytes(b"1")
    try:
        with pytest.raises(ConfigError, match=r"got the name Ours, which a policy in .* has; choose another"):
            candidates_of(with_policies(config, Ours=str(elsewhere / "lora")))
    finally:
        for file in config.paths.policy("ours").iterdir():
            file.unlink()
        config.paths.policy("ours").rmdir()


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        ({"reference": "a/b"}, "got the name reference"),
        ({"CVaR": "a/b"}, "got the name CVaR"),
        ({"cvar-seed2": "a/b"}, "got the name cvar-seed2"),
        ({"dpo_polite": "a/b"}, "got the name dpo_polite"),
        ({"comparison": "a/b"}, "got the name comparison"),
        ({"a@b": "a/b"}, "wanted letters, digits"),
        ({"con": "a/b"}, "wanted letters, digits"),
        ({"theirs": " "}, "theirs: got no source"),
        ({"x": "a/b", "X": "a/c"}, "differ in case alone"),
    ],
)
def test_names_of_the_projects_own_results_are_refused(policies: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GenerationConfig(policies=policies)
    assert GenerationConfig(policies={"modpo_theirs": "a/b"}).policies == {"modpo_theirs": "a/b"}


def test_they_are_named_on_the_command_line() -> None:
    given = "generation.policies={theirs: org/name@revision, mine: /models/merged}"
    config = load_config(CONFIG_DIR / "evaluation_config.yaml", EvaluationConfig, [given])
    assert config.generation.policies == {"theirs": "org/name@revision", "mine": "/models/merged"}
    with pytest.raises(ConfigError, match="got the name cvar") as error:
        load_config(
            CONFIG_DIR / "evaluation_config.yaml", EvaluationConfig, ["generation.policies={cvar: a/b}"]
        )
    assert "\n" not in str(error.value)
