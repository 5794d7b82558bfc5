"""Runs the real-text study with the project's own stages: judges once, then every seed from data to judged samples.

Every part lies in an artifact root of its own and is skipped where it is finished, so an interrupted study goes on where
it stopped; the samples, log-probabilities and rewards of an unfinished part are in that root's cache. What is run is in
`real_text/plan.py`, what comes of it in `real_text/summary.py`; the command line is `real_text`.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from benchmarks.real_text.data import longer_is_chosen, longer_share, prepare_biased
from benchmarks.real_text.plan import LONGER_SHARE, METHODS, Study
from benchmarks.real_text.summary import checkpoint_row
from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.artifacts.runs import read_run
from prmd.config.evaluation import EvaluationConfig
from prmd.config.shared import RewardModelConfig
from prmd.data.prepare import download_dataset, split_objectives
from prmd.errors import DataError
from prmd.evaluation.frontier import checkpoint_candidates
from prmd.evaluation.held_out import Evaluation, judge_runs, measure, sample
from prmd.inference.candidates import (
    REFERENCE,
    Candidate,
    EvaluationPrompt,
    evaluation_prompts,
    find_candidates,
)
from prmd.judges.reward_model import RewardModelJudge, trained_judge
from prmd.models.loading import load_tokenizer, model_source
from prmd.objectives import OBJECTIVES
from prmd.pairs import read_pairs
from prmd.policies.methods import BASELINE
from prmd.policies.train import train_baseline_dpo, train_pessimistic
from prmd.rewards.reward_model import load_reward_model
from prmd.rewards.train import train_judge, train_reward_model

logger = logging.getLogger("prmd.real_text")
Row = dict[str, Any]


def run_seeds(study: Study) -> tuple[list[Row], list[Row]]:
    """Run what is missing.

    Returns:
        The results of every seed (`run_seed`), and a row for each judge.
    """
    base = study.shared()
    download_dataset(base)
    split_objectives(base)
    model = _converted_model(base)
    config = study.evaluation(model=model)
    folders = {k: train_judge(config, objective=k) for k in OBJECTIVES}
    judges = [trained_judge(k, load_reward_model(f, shared=config.shared)) for k, f in folders.items()]
    return [run_seed(study, seed, judges, model) for seed in study.sizes.seeds], _judge_rows(config)


def _converted_model(base: RewardModelConfig) -> tuple[str, ...]:
    """Overrides that take the base model from where it was converted, so that no seed converts it again."""
    source = model_source(base.model, base.paths)
    return ("model.source=hub", f"model.name={json.dumps(source)}") if base.model.source != "hub" else ()


def run_seed(study: Study, seed: int, judges: Sequence[RewardModelJudge], model: Sequence[str] = ()) -> Row:
    """One seed from its biased pairs to its results.

    Returns:
        `methods`: the checkpoints of every training from pi_ref on, as `real_text/summary.py` reads them; `rewards.reward_model`;
        `longer_is_chosen` of the data.
    """
    shared, sizes = study.shared(seed, model), study.sizes
    prepare_biased(study.shared(), shared, share=LONGER_SHARE, count=sizes.pairs)
    for objective in OBJECTIVES:
        train_reward_model(shared, objective=objective)
    policies = study.policies(seed, model)
    train_pessimistic(policies)
    if seed in sizes.baseline_seeds:
        train_baseline_dpo(policies)
    return {
        "seed": seed,
        "methods": _evaluate(study, seed, judges, study.evaluation(seed, model)),
        "reward_models": [_reward_model_row(shared, objective) for objective in OBJECTIVES],
        "longer_is_chosen": read_run(shared.paths.processed)["longer_is_chosen"],
    }


# ------------------------------------------------------------------ evaluation
def _evaluate(
    study: Study, seed: int, judges: Sequence[RewardModelJudge], config: EvaluationConfig
) -> dict[str, list[Row]]:
    """By method, its checkpoints in the order of training, the first of them pi_ref; kept in a file of the seed."""
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    candidates = find_candidates(
        config.shared.model, config.paths, tokenizer, other_approaches=config.generation.other_approaches
    )
    stages = {c.method: checkpoint_candidates(c) for c in _wanted(study, seed, candidates)}
    here = [_below(judge, config.paths) for judge in judges]
    prompts = seed_prompts(config, tokenizer, seed, study.sizes.prompts)
    evaluation = Evaluation(config, tokenizer, prompts, here, candidates[0])
    several = [stage for found in stages.values() for stage in found]
    path = study.root / f"seed-{seed}.json"
    key = io.fingerprint([evaluation.fingerprint, [stage.fingerprint for stage in several]])
    if path.is_file() and (kept := io.read_json(path))["fingerprint"] == key:
        logger.info("seed %d: evaluated before, reused: %s", seed, path)
        return kept["methods"]
    runs = [sample(evaluation, candidate) for candidate in (candidates[0], *several)]
    verdicts = judge_runs(evaluation, runs)
    rows = [
        checkpoint_row(measure(evaluation, run, raw, runs[0], verdicts)[0])
        for run, raw in zip(runs, verdicts.raw, strict=True)
    ]
    by_name = dict(zip([run.candidate.method for run in runs], rows, strict=True))
    methods = {m: [by_name[REFERENCE], *(by_name[s.method] for s in found)] for m, found in stages.items()}
    io.write_json(path, {"fingerprint": key, "methods": methods})
    return methods


def _below(judge: RewardModelJudge, paths: ArtifactPaths) -> RewardModelJudge:
    """The judge with its rewards cached below the seed's own root."""
    return replace(judge, reward_model=replace(judge.reward_model, paths=paths))


def _wanted(study: Study, seed: int, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The policies of this study in its order; what else lies in the root is not compared."""
    names = (*METHODS, *((BASELINE,) if seed in study.sizes.baseline_seeds else ()))
    found = {candidate.method: candidate for candidate in candidates}
    return [found[name] for name in names]


def seed_prompts(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase, seed: int, count: int
) -> list[EvaluationPrompt]:
    """The seed's own test prompts: no prompt is in two seeds, so that seeds are independent of one another.

    Raises:
        DataError: the test splits hold too few.
    """
    max_length = config.reward_model_config.training.max_length
    prompts = evaluation_prompts(config.generation, config.paths, tokenizer, max_length=max_length)
    prompts = prompts[seed * count : (seed + 1) * count]
    if len(prompts) < count:
        raise DataError(
            f"seed {seed}: {len(prompts)} test prompts of its own, wanted {count}; give more data"
        )
    return prompts


# ------------------------------------------------------------------ reward models and judges
def _judge_rows(config: EvaluationConfig) -> list[Row]:
    """Size and held-out accuracy of every judge, and of preferring the longer response."""
    rows = []
    for objective in OBJECTIVES:
        metrics = io.read_json(config.paths.judge(objective) / "metrics.json")
        names = ("accuracy", "length_only_accuracy")
        pairs = metrics["sizes"]["train"]
        judged = read_pairs(config.paths, objective, "judge")
        measured = {name: metrics[name] for name in names} | _longer_preferred(
            config.shared, objective, metrics
        )
        rows.append({"objective": objective, "pairs": pairs, "longer_share": longer_share(judged)} | measured)
    return rows


def _reward_model_row(config: RewardModelConfig, objective: str) -> Row:
    """Held-out accuracy of a reward model on unbiased pairs, and how often it prefers the longer response."""
    metrics = io.read_json(config.paths.reward_model(objective) / "metrics.json")
    names = ("accuracy", "mean_member_accuracy", "member_correlation")
    return (
        {"objective": objective}
        | {n: metrics[n] for n in names}
        | _longer_preferred(config, objective, metrics)
    )


def _longer_preferred(config: RewardModelConfig, objective: str, metrics: Row) -> Row:
    """Share of test pairs of unequal length whose longer response gets the higher reward; None where pairs were dropped."""
    pairs, margins = read_pairs(config.paths, objective, "test"), metrics["margins"]
    if len(pairs) != len(margins):
        return {"prefers_longer": None}
    told = [(longer_is_chosen(pair), margin) for pair, margin in zip(pairs, margins, strict=True)]
    agreed = [(margin > 0) == longer for longer, margin in told if longer is not None]
    return {"prefers_longer": sum(agreed) / len(agreed) if agreed else None}
