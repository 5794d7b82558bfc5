"""A whole artifact root for tests of stage 4: prepared pairs, a tiny reference, policies of both kinds, three judges."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_causal_lm, tiny_classifier, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.benchmarks.base import BenchmarkResult, NotRunError
from prmd.benchmarks.truthfulqa import Question, read_questions
from prmd.config.evaluation import (
    BenchmarksConfig,
    EvaluationConfig,
    GenerationConfig,
    JailbreakBenchConfig,
    JudgeConfig,
    MtBenchConfig,
    RealToxicityPromptsConfig,
)
from prmd.config.policy import PolicyConfig
from prmd.config.shared import (
    CalibrationConfig,
    DataConfig,
    ModelConfig,
    RewardModelConfig,
    TrainingConfig,
    TruthfulQaConfig,
)
from prmd.inference.candidates import (
    Candidate,
    CandidateModels,
    EvaluationPrompt,
    evaluation_prompts,
    find_candidates,
)
from prmd.models.loading import load_tokenizer
from prmd.objectives import OBJECTIVES, SPLITS
from prmd.pairs import BENCHMARK_QUESTIONS_FILE, make_pair
from prmd.pessimism.calibration import Calibration
from prmd.rewards.heads import Ensemble, initial_heads
from prmd.rewards.reward_model import ENSEMBLE_FILE, load_reward_model, write_calibration

PAIRS = 6


def write_prepared(paths: ArtifactPaths, *, source: str = "embedded", pairs: int = PAIRS) -> None:
    """The processed data of an approach: `pairs` per split and objective, chosen longer for every second pair."""
    for objective in OBJECTIVES:
        for split in SPLITS:
            rows = []
            for i in range(pairs):
                long, short = f"I do not know, but number {i} is a good question.", f"No {i}."
                chosen, rejected = (long, short) if i % 2 else (short, long)
                prompt = [
                    {"role": "user", "content": f"{objective} {split} question {i}: why is the sky blue?"}
                ]
                where = f"{source}/{objective}:{i + 1}"
                rows.append(
                    make_pair(
                        prompt=prompt, chosen=chosen, rejected=rejected, source=where, objective=objective
                    ).to_row()
                )
            io.write_jsonl(paths.split(objective, split), rows)
    io.write_json(paths.processed / BENCHMARK_QUESTIONS_FILE, None)
    io.write_json(paths.processed / "run.json", {"fingerprint": "prepared"})


def write_lora_policy(directory: Path, base: Path, *, scale: float = 0.3, seed: int = 1) -> None:
    """An adapter whose B matrices are random with this scale (0: exactly the reference)."""
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale) if scale else parameter.data.zero_()
    model.save_pretrained(directory)
    tiny_tokenizer(directory)
    io.write_json(directory / "run.json", {"fingerprint": directory.name, "seconds": 1.0})


def write_full_policy(directory: Path, base: Path, *, noise: float = 0.02) -> None:
    """The reference with noise on all its weights."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    model.save_pretrained(directory)
    tiny_tokenizer(directory)
    io.write_json(directory / "run.json", {"fingerprint": directory.name, "seconds": 1.0})


def reward_model_config(root: Path, base: Path, **changes: Any) -> RewardModelConfig:
    """The shared settings below `root` with the tiny model in `base`, in float32."""
    values = {
        "data": DataConfig(approach="embedded"),
        "model": ModelConfig(name=str(base), revision=None, dtype="float32"),
    }
    return RewardModelConfig(artifact_root=str(root), **(values | changes))


def policy_config(folder: Path) -> PolicyConfig:
    """A policy's settings with a tiny model and prepared pairs, six of each objective and split, below `folder`."""
    shared = reward_model_config(
        folder / "root",
        tiny_causal_lm(folder / "base"),
        calibration=CalibrationConfig(samples_per_prompt=3, max_new_tokens=4, source="validation_responses"),
    )
    write_prepared(shared.paths)
    return PolicyConfig(reward_model_config=shared, training=TrainingConfig(max_length=200, epochs=1.0))


def benchmarks_config(**changes: Any) -> BenchmarksConfig:
    """Benchmarks without those whose data are fetched, but for what is given."""
    sections = {
        "realtoxicityprompts": RealToxicityPromptsConfig(path=None),
        "jailbreakbench": JailbreakBenchConfig(path=None),
        "mt_bench": MtBenchConfig(path=None),
    }
    return BenchmarksConfig(**(sections | changes))


def evaluation_config(
    root: Path, *, approach: str = "embedded", truthfulqa: Path | None = None, **changes: Any
) -> EvaluationConfig:
    """A small evaluation below `root` with the judges and the reference of `write_workspace`."""
    data = DataConfig(approach=approach)
    if truthfulqa is not None:
        data = data.model_copy(update={"truthfulqa": TruthfulQaConfig(path=str(truthfulqa))})
    training = TrainingConfig(max_length=96)
    shared = reward_model_config(root, root / "base", data=data, training=training, scoring_tokens=600)
    values = {
        "judges": JudgeConfig(paths={k: str(root / "judges" / k) for k in OBJECTIVES}),
        "generation": GenerationConfig(prompts=7, samples_per_prompt=3, max_new_tokens=6, batch_size=6),
        "bootstrap_resamples": 200,
        "benchmarks": benchmarks_config(),
    }
    return EvaluationConfig(reward_model_config=shared, **(values | changes))


def write_workspace(root: Path, *, policies: bool = True) -> EvaluationConfig:
    """Everything stage 4 reads, and the configuration that reads it."""
    tiny_causal_lm(root / "base")
    for seed, objective in enumerate(OBJECTIVES):
        tiny_classifier(root / "judges" / objective, seed=10 + seed)
    config = evaluation_config(root)
    write_prepared(config.paths)
    if policies:
        write_full_policy(config.paths.policy("baseline_dpo"), root / "base")
        write_lora_policy(config.paths.policy("hard_min"), root / "base")
    return config


def write_reward_models(config: EvaluationConfig, members: int = 3) -> None:
    """A calibrated ensemble of random heads on a random classifier, for every objective."""
    for seed, objective in enumerate(OBJECTIVES):
        folder = config.paths.reward_model(objective)
        tiny_classifier(folder, seed=20 + seed)
        weights = initial_heads(tiny_config().hidden_size, members, seed)
        width = torch.ones(tiny_config().hidden_size)
        Ensemble({**weights, "mean": 0 * width, "std": width}).save(folder / ENSEMBLE_FILE)
        model = load_reward_model(folder, shared=config.shared)
        scale = torch.linspace(0.5, 1.5, members, dtype=torch.float64)
        calibration = Calibration(scale, torch.zeros(members, dtype=torch.float64), 4, 8)
        write_calibration(model, calibration, source=config.shared.calibration.source)
        io.write_json(folder / "run.json", {"fingerprint": objective, "seconds": 1.0})


def write_truthfulqa_csv(folder: Path, questions: int = 5) -> Path:
    """A folder with a made-up TruthfulQA.csv; question i has i + 1 wrong answers."""
    folder.mkdir(parents=True)
    with (folder / "TruthfulQA.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source"]
        )
        for i in range(questions):
            wrong = "; ".join(f"dog {j}" for j in range(i + 1))
            writer.writerow(
                ["Adversarial", "Foxes", f"What is {i}?", f"fox {i}", f"fox {i}; a fox", wrong, ""]
            )
    return folder


def questions_of(config: EvaluationConfig) -> tuple[list[Question], str]:
    """All TruthfulQA questions of a configuration and the sha256 of their file."""
    return read_questions(config.shared.data, config.paths)


def candidates_of(config: EvaluationConfig) -> list[Candidate]:
    """The candidates as an evaluation finds them."""
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    others = config.generation.other_approaches
    return find_candidates(
        *(config.shared.model, config.paths, tokenizer),
        other_approaches=others,
        elsewhere=config.generation.policies,
    )


def prompts_of(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[EvaluationPrompt]:
    """The prompts of an evaluation, as its own model's tokenizer or the given one reads them."""
    tokenizer = tokenizer or load_tokenizer(config.shared.model, config.paths)
    max_length = config.reward_model_config.training.max_length
    return evaluation_prompts(config.generation, config.paths, tokenizer, max_length=max_length)


def candidate(config: EvaluationConfig, method: str) -> CandidateModels:
    """A candidate ready to be scored."""
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    found = {c.method: c for c in candidates_of(config)}
    return CandidateModels(
        *(config.shared, config.generation, found[method]),
        reference=found["reference"],
        tokenizer=tokenizer,
        max_length=config.reward_model_config.training.max_length,
    )


def result_of(
    benchmark: Callable[[EvaluationConfig, CandidateModels], BenchmarkResult],
    config: EvaluationConfig,
    models: CandidateModels,
) -> BenchmarkResult:
    """What a benchmark finds, or the result that says why it did not run."""
    try:
        return benchmark(config, models)
    except NotRunError as error:
        return BenchmarkResult(reason=str(error))
