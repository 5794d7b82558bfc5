"""All stages on a tiny model, run once: every artifact and its contract. Running stages again is in `test_pipeline_again`."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipeline import MEMBERS, POLICIES, Pipeline, artifacts, events
from tiny_policies import tokens_of, trained_on, watched
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prmd.artifacts import io
from prmd.models.loading import load_policy, load_tokenizer
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import tokenize_pairs
from prmd.objectives import OBJECTIVES, SPLITS
from prmd.pairs import read_pairs
from prmd.policies.scores import pair_responses, score_pairs
from prmd.policies.targets import method_targets
from prmd.rewards.reward_model import RewardModel, load_reward_model, load_reward_models

pytestmark = pytest.mark.slow


def reward_model(pipeline: Pipeline, objective: str) -> RewardModel:
    config = pipeline.reward_models()
    return load_reward_model(config.paths.reward_model(objective), shared=config)


# ------------------------------------------------------------------ files of a whole run
def test_every_artifact_is_whole_and_its_record_came_last(pipeline: Pipeline) -> None:
    for directory in artifacts(pipeline):
        record = io.read_json(directory / "run.json")
        assert {"fingerprint", "inputs", "commit", "dirty", "versions", "device", "seed", "seconds"} <= set(
            record
        )
        stamp = (directory / "run.json").stat().st_mtime_ns
        drawn = (".png", ".svg")  # figures are drawn again by the page
        files = [p for p in directory.rglob("*") if p.is_file() and p.suffix not in drawn]
        assert all(p.stat().st_mtime_ns <= stamp for p in files), directory
        assert (directory / "config.yaml").is_file()
    left = [p for p in pipeline.root.rglob("*") if p.name.endswith((".partial", ".tmp", ".former"))]
    assert left == [] and not list(pipeline.root.rglob("*.pt")) and not list(pipeline.root.rglob("*.bin"))


def test_prepared_rows_are_messages_in_four_splits(pipeline: Pipeline) -> None:
    for objective in OBJECTIVES:
        for split in SPLITS:
            rows = io.read_jsonl(pipeline.paths.split(objective, split))
            assert rows and all(set(r) == {"id", "prompt", "chosen", "rejected", "source"} for r in rows)
            assert all([m["role"] for m in r["chosen"]] == ["assistant"] for r in rows)


def test_every_step_left_its_result(pipeline: Pipeline) -> None:
    steps = {re.sub(r"_\d{8}-\d{6}(-\d+)?$", "", p.stem) for p in pipeline.paths.step_results.glob("*.json")}
    trained = {f"train_{o}_rm" for o in OBJECTIVES} | {f"train_judge_{o}" for o in OBJECTIVES}
    policies = {f"train_{method}" for method in POLICIES}
    assert trained | policies | {"download_dataset", "split_objectives", "compute_metrics"} <= steps
    assert "benchmark_eval" in steps


def test_report_is_one_page_that_names_every_method(pipeline: Pipeline) -> None:
    page = pipeline.paths.report.read_text(encoding="utf-8")
    for word in (*POLICIES, *OBJECTIVES, "reference"):
        assert word in page
    assert not re.search(r"""(src|href)=["']https?:""", page) and "data:image/svg+xml;base64" in page


def test_comparison_has_every_method(pipeline: Pipeline) -> None:
    rows = io.read_json(pipeline.paths.metrics / "comparison.json")["rows"]
    assert {row["method"] for row in rows} == {"reference", *POLICIES}
    for row in rows:
        assert set(row["win_rate"]) == set(OBJECTIVES) and all(
            0 <= e["value"] <= 1 for e in row["win_rate"].values()
        )
    kl = {row["method"]: row["kl"]["value"] for row in rows}
    assert kl["reference"] == 0 and all(kl[method] > 0 for method in POLICIES)


# ------------------------------------------------------------------ reward models
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_five_checkpoints_and_the_best_is_the_model(pipeline: Pipeline, objective: str) -> None:
    folder = pipeline.paths.reward_model(objective)
    checkpoints = folder / "checkpoints"
    assert {p.name for p in checkpoints.iterdir()} == {"start", "33", "66", "end", "best"}
    metrics = io.read_json(folder / "metrics.json")
    trained = [row for row in metrics["curve"] if row["step"] > 0]
    best = max(trained, key=lambda row: (row["eval_accuracy"], -row["eval_loss"], row["step"]))
    names = dict(
        zip(sorted(row["step"] for row in metrics["curve"]), ("start", "33", "66", "end"), strict=True)
    )
    assert metrics["best"] == names[best["step"]]

    def weights(name: str) -> dict[str, Tensor]:
        return load_file(checkpoints / name / "adapter_model.safetensors")

    assert all(torch.equal(weights("best")[k], v) for k, v in weights(metrics["best"]).items())
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[k], v) for k, v in weights("best").items())
    # the folder itself is the base with that adapter: W + (alpha / r) B A
    merged = load_file(folder / "model.safetensors")
    base = load_file(Path(pipeline.reward_models().model.name) / "model.safetensors")
    name = "layers.1.mlp.down_proj"
    a, b = (adapter[f"base_model.model.model.{name}.lora_{x}.weight"] for x in "AB")
    assert torch.allclose(merged[f"model.{name}.weight"], base[f"model.{name}.weight"] + 2 * b @ a, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_saved_model_scores_as_a_plain_transformers_user_sees_it(pipeline: Pipeline, objective: str) -> None:
    folder, config = pipeline.paths.reward_model(objective), pipeline.reward_models()
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ours = reward_model(pipeline, objective)
    tokenized = tokenize_pairs(
        read_pairs(config.paths, objective, "test"), ours.tokenizer, max_length=240, over_length="truncate_prompt", keep_suffix=True
    )  # fmt: skip
    assert model.config.num_labels == 1
    found = torch.stack(ours.features(tokenized.rows, description="t"))[..., 0]
    for side, name in enumerate(("chosen", "rejected")):
        chats = [[*p.prompt, {"role": "assistant", "content": getattr(p, name)}] for p in tokenized.pairs]
        batch = tokenizer.apply_chat_template(chats, return_tensors="pt", return_dict=True, padding=True)
        with torch.no_grad():
            plain = model(**batch).logits[:, 0]
        assert torch.allclose(found[:, side], plain, atol=1e-5)
        reported = io.read_json(folder / "metrics.json")[f"rewards_{name}"]
        assert reported == pytest.approx(plain.tolist(), abs=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_calibration_is_that_of_the_held_out_responses(pipeline: Pipeline, objective: str) -> None:
    record = io.read_json(pipeline.paths.reward_model(objective) / "calibration.json")
    assert set(record) == {"reward_model", "template", "data", "source", "calibration"}
    model, config = reward_model(pipeline, objective), pipeline.reward_models()
    assert record["reward_model"] == model.fingerprint and record["source"] == "validation_responses"
    rewards = []
    for other in OBJECTIVES:  # the prompts of all objectives
        rows = tokenize_pairs(
            read_pairs(config.paths, other, "val"), model.tokenizer, max_length=240, over_length="truncate_prompt", keep_suffix=True
        ).rows  # fmt: skip
        rewards += [v.numpy() for v in model.rewards(rows, description="t")]
    values, fitted = np.array(rewards), record["calibration"]
    assert fitted["n_prompts"] == len(values) and fitted["n_responses"] == 2 * len(values)
    spread = values - values.mean(axis=1, keepdims=True)
    assert fitted["scale"] == pytest.approx(np.sqrt((spread**2).sum(axis=(0, 1)) / len(values)))
    assert fitted["offset"] == pytest.approx(values.mean(axis=(0, 1))) and len(fitted["offset"]) == MEMBERS


def test_ensembles_have_the_configured_members_and_differ(pipeline: Pipeline) -> None:
    for objective in OBJECTIVES:
        weights = load_file(pipeline.paths.reward_model(objective) / "ensemble.safetensors")
        assert weights["weight1"].shape == (MEMBERS, 32, 128)
        assert not torch.allclose(weights["weight3"][0], weights["weight3"][1])
        metrics = io.read_json(pipeline.paths.reward_model(objective) / "metrics.json")
        assert metrics["members"] == MEMBERS and metrics["sizes"]["fit"] >= 2


def test_analysis_has_figures_and_readable_examples(pipeline: Pipeline) -> None:
    folder = pipeline.paths.reward_analysis
    for objective in OBJECTIVES:
        analysis = io.read_json(folder / f"{objective}.json")
        assert analysis["top"] and analysis["bottom"] and len(list(folder.glob(f"{objective}*.png"))) >= 3
        text = (folder / f"{objective}_examples.txt").read_text(encoding="utf-8")
        assert analysis["top"][0]["chosen"] in text


# ------------------------------------------------------------------ policies
@pytest.mark.parametrize("method", POLICIES)
def test_a_policy_is_an_adapter_any_peft_user_can_load(pipeline: Pipeline, method: str) -> None:
    folder, config = pipeline.paths.policy(method), pipeline.policies()
    weights = load_file(folder / "adapter_model.safetensors")
    assert all(v.dtype == torch.float32 for v in weights.values())
    assert any(v.abs().max() > 0 for k, v in weights.items() if "lora_B" in k)
    policy = load_policy(folder, config.shared.model, config.paths)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    if method != "baseline_dpo":
        assert {p.name for p in (folder / "checkpoints").iterdir()} == {"33", "66", "end"}
        end = load_file(folder / "checkpoints" / "end" / "adapter_model.safetensors")
        assert all(torch.equal(weights[k], v) for k, v in end.items())
        # its last held-out margins are those of the saved weights
        row = [r for r in io.read_json(folder / "metrics.json")["curve"] if "eval_loss" in r][-1]
        tokenizer = load_tokenizer(config.shared.model, config.paths)
        held = watched(config, len(trained_on(config).tokenized.rows))
        with torch.no_grad():
            batch = collate_rows(held.rows, pad_id=tokenizer.pad_token_id, share_prompt=False)
            logps = SequenceLogps(policy)(**batch).reshape(-1, 2)
        assert row["eval_logps/chosen"] == pytest.approx(float(logps[:, 0].mean()), abs=1e-3)


def test_policies_differ_in_their_targets_alone(pipeline: Pipeline) -> None:
    """Recomputed from the reward models: the same pairs in the same order, other margins."""
    config = pipeline.policies()
    models, pairs = load_reward_models(config.shared), trained_on(config)
    [scores] = score_pairs(config.shared, models, tokens_of(config), [pairs.tokenized])
    scale = pair_responses(scores)
    ids = None
    for method in POLICIES[1:]:
        metrics = io.read_json(pipeline.paths.policy(method) / "metrics.json")
        targets = method_targets(config.policy, method, train=scores, held_out=scores, scale=scale)
        summary = metrics["target_margins"]
        assert summary["mean"] == pytest.approx(float(targets.train.mean()), abs=1e-6)
        assert summary["sd"] == pytest.approx(float(targets.train.std(correction=0)), abs=1e-6)
        assert sum(summary["histogram"]["counts"]) == len(pairs.tokenized.rows)
        assert metrics["reward_scale"] == pytest.approx(targets.reward_scale)
        first = next(row for row in metrics["curve"] if "loss" in row)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)  # ratios of one before the first step
        ids = ids or first["logps/chosen"]
        assert first["logps/chosen"] == pytest.approx(ids, abs=1e-4)
    baseline = io.read_json(pipeline.paths.policy("baseline_dpo") / "metrics.json")["curve"][0]
    assert baseline["loss"] == pytest.approx(np.log(2), abs=1e-5)
    means = [
        io.read_json(pipeline.paths.policy(m) / "metrics.json")["target_margins"]["mean"]
        for m in POLICIES[1:]
    ]
    assert len({round(m, 6) for m in means}) == len(means)


# ------------------------------------------------------------------ TensorBoard
COMMON = {
    "loss", "learning_rate", "grad_norm", "tokens_per_second",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
}  # fmt: skip
OF_POLICIES = {"logps/chosen", "logps/rejected", "logratios/chosen", "logratios/rejected"}
OF_TARGETS = {"margins/target", "margins/clipped"}


def test_tensorboard_shows_every_training(pipeline: Pipeline) -> None:
    logs = pipeline.root / "logs"
    for kind in ("reward_models", "judges"):
        for objective in OBJECTIVES:
            tags = set(events(logs / kind / "embedded" / objective).Tags()["scalars"])
            assert {f"reward_model_train/{name}" for name in COMMON} <= tags
            assert {"reward_model_eval/loss", "reward_model_eval/rewards/accuracies"} <= tags
    for method in POLICIES:
        accumulator = events(logs / "policies" / "embedded" / method)
        tags = set(accumulator.Tags()["scalars"])
        wanted = COMMON | OF_POLICIES | (OF_TARGETS if method != "baseline_dpo" else set())
        assert {f"policy_train/{name}" for name in wanted} <= tags, method
        assert "policy_eval/loss" in tags and not [tag for tag in tags if not tag.startswith("policy_")]
        curve = io.read_json(pipeline.paths.policy(method) / "metrics.json")["curve"]
        shown = {e.step: e.value for e in accumulator.Scalars("policy_train/loss")}
        assert shown == pytest.approx({r["step"]: r["loss"] for r in curve if "loss" in r}, rel=1e-5)
