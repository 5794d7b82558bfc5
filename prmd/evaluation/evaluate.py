"""Stage 4: what the policies are worth, on held-out prompts by judges (`compute_metrics`) and on benchmarks (`benchmark_eval`).

The stages decide order, reuse and records: sampling and KL are in `inference.candidates`, judges in `judges`, one evaluation of all
methods in `held_out`, its numbers in `metrics`, their comparison in `comparison`, each benchmark in a module of `benchmarks`. One model is in memory at a time (two where a policy has full
weights and its KL is measured). What is finished with the same inputs is reused; what was interrupted goes on from
`data/cache`.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io, locks
from prmd.artifacts.paths import ArtifactPaths, stage_command
from prmd.artifacts.runs import (
    RUN_FILE,
    finish_run,
    read_run,
    require_artifact,
    start_run,
    write_step_result,
)
from prmd.benchmarks import benchmark_names
from prmd.benchmarks.costs import cost_of, why_not
from prmd.benchmarks.run import run_benchmarks
from prmd.benchmarks.truthfulqa import read_questions
from prmd.config.brought import no_samples
from prmd.config.evaluation import EvaluationConfig
from prmd.config.shared import SharedConfig
from prmd.errors import DataError, NotFiniteError, UserError
from prmd.evaluation.comparison import compare_benchmarks, compare_methods
from prmd.evaluation.frontier import write_frontier
from prmd.evaluation.held_out import Evaluation, evaluate_methods, is_finished
from prmd.inference.candidates import Candidate, evaluation_prompts, find_candidates, policy_folders
from prmd.judges.reward_model import JUDGE_REMEDY, RewardModelJudge, check_judge, given_judge, trained_judge
from prmd.models.foreign import POLICY_REMEDY, local_folder
from prmd.models.identity import require_weights
from prmd.models.loading import load_tokenizer
from prmd.pairs import PREPARE_COMMAND, read_pairs
from prmd.report.benchmark_sections import benchmark_results, benchmark_table
from prmd.report.evaluation_sections import headline_section
from prmd.report.page import build_report
from prmd.report.tables import Table, to_markdown
from prmd.rewards.reward_model import Scorer, load_reward_model, load_reward_models
from prmd.rewards.train import train_judge
from prmd.runtime import require_disk
from prmd.statistics.resampling import Resampling

logger = logging.getLogger(__name__)
_PAGES_BYTES = 32 * 2**20
"""What samples, results, figures and the report of an evaluation take at least."""


# ------------------------------------------------------------------ compute_metrics
def compute_metrics(config: EvaluationConfig, *, force: bool = False, dry_run: bool = False) -> Path:
    """Sample the reference, every finished policy and those of `generation.policies`, judge the samples, and compare.

    Args:
        force: compute finished methods anew (samples and scores of the same weights are still taken from the cache),
            and replace judges of other settings.
        dry_run: say what would be read, trained, sampled and written; load nothing, write nothing.

    Returns:
        `outputs/metrics/<approach>/comparison.json`, with one `<method>.json` and `samples/<method>.jsonl` a method.

    Raises:
        DataError: the data is not prepared, or a judge cannot tell the reference samples apart.
        ConfigError: a model or a judge cannot be loaded, or another run evaluates these policies.
        NotFiniteError: as `evaluate_methods`; a policy among others that are finite is left out and named.
    """
    target = config.paths.metrics / "comparison.json"
    if dry_run:
        _say_what_would_be_evaluated(config, target)
        return target
    require_artifact(config.paths.processed, what="the prepared data", command=PREPARE_COMMAND)
    with locks.held(target.parent):
        _evaluate(config, target, force=force)
    return target


def _evaluate(config: EvaluationConfig, target: Path, *, force: bool) -> None:
    clock = start_run()
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    candidates = _candidates(config, tokenizer)
    prompts = evaluation_prompts(
        config.generation, config.paths, tokenizer, max_length=config.reward_model_config.training.max_length
    )
    judges = _judges(config, force)
    reward_models = _reward_models(config.shared)
    evaluation = Evaluation(config, tokenizer, prompts, judges, candidates[0], reward_models)
    require_disk(config.paths.metrics, _PAGES_BYTES)  # before anything is sampled
    todo = [c for c in candidates if force or not is_finished(evaluation, c)]
    if todo:
        (config.paths.metrics / RUN_FILE).unlink(missing_ok=True)
    unusable = evaluate_methods(evaluation, todo, policies=[c.method for c in candidates[1:]]) if todo else {}
    candidates = [c for c in candidates if c.method not in unusable]
    write_frontier(evaluation, candidates)
    comparison, table = _compare(evaluation, candidates, target, unusable)
    inputs = {c.method: c.fingerprint for c in candidates}
    key = evaluation.fingerprint
    finish_run(target.parent, config=config, inputs=inputs, fingerprint=key, clock=clock)
    summary = {"rows": comparison["rows"], "missing": comparison["missing"]}
    summary["seconds"] = round(clock.seconds(), 1)
    summary["methods_reused"] = len(candidates) + len(unusable) - len(todo)
    write_step_result(config.paths, "compute_metrics", {"artifact": str(target), **summary})
    _log_table(table)
    build_report(config.paths)


def _candidates(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> list[Candidate]:
    others, elsewhere = config.generation.other_approaches, config.generation.policies
    settings = (config.shared.model, config.paths, tokenizer)
    return find_candidates(*settings, other_approaches=others, elsewhere=elsewhere)


def _judges(config: EvaluationConfig, force: bool) -> list[RewardModelJudge]:
    """One judge per objective: the one the configuration gives, else one trained on the judge split."""
    load = partial(load_reward_model, shared=config.shared)
    judges: list[RewardModelJudge] = []
    for objective in config.paths.objectives:
        if objective in config.judges.paths:
            judges.append(given_judge(objective, config.judges.paths[objective], load))
        else:
            folder = train_judge(config, objective=objective, force=force)
            check_judge(folder, what=f"the {objective} judge")
            judges.append(trained_judge(objective, load(folder)))
    return judges


def _reward_models(shared: SharedConfig) -> tuple[Scorer, ...]:
    """The ensembles that policies were trained on, or none: a plain DPO run has no need of them, columns score no sample."""
    if columns := shared.data.from_columns:
        logger.info("no proxies (violation rate, over-optimisation curve): %s", no_samples(columns))
        return ()
    try:
        return tuple(load_reward_models(shared))
    except DataError as error:
        there = any(shared.paths.reward_model(k).is_dir() for k in shared.paths.objectives)
        level = logging.WARNING if there else logging.INFO
        logger.log(level, "no proxies (violation rate, over-optimisation curve): %s", error)
        return ()


def _compare(
    evaluation: Evaluation, candidates: Sequence[Candidate], target: Path, unusable: dict[str, str]
) -> tuple[dict[str, Any], Table]:
    """Write the comparison and its tables; it, and the table of all methods.

    Args:
        unusable: policies that are left out, with the reason.
    """
    folder = target.parent
    metrics = [io.read_json(folder / f"{c.method}.json") for c in candidates]
    rewards = {m["method"]: _sample_rewards(folder / m["samples"], list(m["objectives"])) for m in metrics}
    comparison = compare_methods(metrics, rewards, evaluation.resampling)
    comparison["missing"] = [{"method": method, "reason": reason} for method, reason in unusable.items()]
    io.write_json(target, comparison)
    section = headline_section(evaluation.paths)
    table, tables = section["table"], [section["table"], *section["tables"].values()]
    io.write_text(folder / "comparison.md", "\n".join(to_markdown(t) for t in tables))
    return comparison, table


def _sample_rewards(path: Path, objectives: Sequence[str]) -> np.ndarray:
    """The judges' rewards of a method's samples, [K, X, n]."""
    rows = io.read_jsonl(path)
    values = [[[s["rewards"][k] for s in row["responses"]] for row in rows] for k in objectives]
    return np.array(values)


def _log_table(table: Table) -> None:
    cells = [table.columns, *table.rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
    for row in cells:
        logger.info(
            "%s", "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


# ------------------------------------------------------------------ benchmark_eval
def benchmark_eval(config: EvaluationConfig, *, force: bool = False, dry_run: bool = False) -> Path:
    """Run the benchmarks of `benchmarks.run` on the reference and every finished policy.

    What cannot run is written as "not run" with its reason; nothing is skipped silently. So is a policy whose numbers are
    not finite.

    Args:
        force: compute finished results anew (log-probabilities of the same weights are still taken from the cache).
        dry_run: say what would be read and written; load nothing, write nothing.

    Returns:
        `outputs/benchmarks`, with `<name>/<approach>/<method>.json` and `<method>.items.jsonl`.

    Raises:
        ConfigError: another run is at work on one of these benchmarks.
        NotFiniteError: the reference is not finite, or no policy is.
    """
    target = config.paths.outputs / "benchmarks"
    if dry_run:
        _say_what_would_be_benchmarked(config, target)
        return target
    require_artifact(config.paths.processed, what="the prepared data", command=PREPARE_COMMAND)
    with ExitStack() as held:
        for name in benchmark_names(config.benchmarks.run):  # others may run beside these
            held.enter_context(locks.held(config.paths.benchmark(name)))
        _benchmark(config, target, force=force)
    return target


def _benchmark(config: EvaluationConfig, target: Path, *, force: bool) -> None:
    clock = start_run()
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    candidates = _candidates(config, tokenizer)
    require_disk(target, _PAGES_BYTES)
    results = [
        result
        for candidate in candidates
        for result in run_benchmarks(
            config, candidate, reference=candidates[0], tokenizer=tokenizer, force=force
        )
    ]
    _refuse_if_none_is_usable(results, [c.method for c in candidates[1:]])
    inputs = {c.method: c.fingerprint for c in candidates}
    by_name = {
        name: {r["method"]: r for r in results if r["name"] == name}
        for name in benchmark_names(config.benchmarks.run)
    }
    for name, found in by_name.items():
        key = io.fingerprint([result["fingerprint"] for result in found.values()])
        finish_run(config.paths.benchmark(name), config=config, inputs=inputs, fingerprint=key, clock=clock)
    _log_table(benchmark_table(by_name, list(inputs)))
    not_run = dict.fromkeys((r["benchmark"], r["reason"]) for r in results if r["reason"])
    if not_run:
        logger.info("%s", "; ".join(f"{name}: not run: {reason}" for name, reason in not_run))
    with locks.held(config.paths.benchmark_comparison, wait=True):
        _compare_benchmarks(config.paths, Resampling(config.bootstrap_resamples, config.shared.seed))
    summary = {"results": results, "seconds": round(clock.seconds(), 1)}
    write_step_result(config.paths, "benchmark_eval", {"artifact": str(target), **summary})
    build_report(config.paths)


def _refuse_if_none_is_usable(results: Sequence[dict[str, Any]], policies: Sequence[str]) -> None:
    wrong = {r["method"]: r["reason"] for r in results if r["not_finite"]}
    done = {r["method"] for r in results if r["status"] == "done"}
    if wrong and set(policies) <= set(wrong) - done:
        raise NotFiniteError(f"no policy can be evaluated: {'; '.join(dict.fromkeys(wrong.values()))}")


def _compare_benchmarks(paths: ArtifactPaths, resampling: Resampling) -> None:
    """Write the paired tests between methods on all benchmarks that the report shows, those of earlier runs included."""
    items: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name, found in benchmark_results(paths).items():
        for method in (method for method, result in found.items() if result["status"] == "done"):
            path = paths.benchmark(name) / f"{method}.items.jsonl"
            if path.is_file():
                items.setdefault(name, {})[method] = io.read_jsonl(path)
    io.write_json(paths.benchmark_comparison, compare_benchmarks(items, resampling))


# ------------------------------------------------------------------ dry runs
def _say_what_would_be_evaluated(config: EvaluationConfig, target: Path) -> None:
    generation = config.generation
    _say_inputs(config)
    for objective in config.paths.objectives:
        folder = config.paths.judge(objective)
        if objective in config.judges.paths:
            source = config.judges.paths[objective]
            _say_source(
                f"{objective} judge",
                source,
                partial(local_folder, source, f"judges.paths.{objective}", JUDGE_REMEDY),
            )
        elif read_run(folder) is not None:
            logger.info("%s judge: %s, trained anew if its settings or data have changed", objective, folder)
        else:
            train_judge(config, objective=objective, dry_run=True)
    folders = policy_folders(config.paths)
    for approach in generation.other_approaches:
        folders += policy_folders(replace(config.paths, approach=approach))
    methods = 1 + len(folders) + len(generation.policies)
    responses = methods * generation.prompts * generation.samples_per_prompt
    logger.info(
        "would sample %d prompts x %d responses x %d methods = %d responses of at most %d tokens each, and judge each "
        "for %d objectives (what is cached is not sampled again)",
        *(
            generation.prompts,
            generation.samples_per_prompt,
            methods,
            responses,
            generation.max_new_tokens,
            len(config.paths.objectives),
        ),
    )
    if generation.checkpoints == "all":
        kept = sum(f.name.isdigit() for folder in folders for f in (folder / "checkpoints").glob("*"))
        logger.info("would sample %d checkpoints on %d prompts each", kept, generation.checkpoint_prompts)
    logger.info("would write %s, one <method>.json each beside it, and %s", target, config.paths.report)


def _say_what_would_be_benchmarked(config: EvaluationConfig, target: Path) -> None:
    _say_inputs(config)
    for name in benchmark_names(config.benchmarks.run):
        if reason := why_not(name, config):  # no warning, as in the run: most are configured so
            logger.info("%s: would not run: %s", name, reason)
            continue
        if name == "truthfulqa":
            _say_questions(config)
        folder = config.paths.benchmark(name)
        logger.info("%s: would write %s for the reference and every policy", name, folder)
        if cost := cost_of(name, config):
            logger.info("%s: costs each of them %s", name, cost)
    logger.info("results below %s", target)


def _say_questions(config: EvaluationConfig) -> None:
    """The questions of TruthfulQA, or the command that fetches them."""
    try:
        questions, sha256 = read_questions(config.shared.data, config.paths)
        logger.info("TruthfulQA: %d questions, sha256 %s", len(questions), sha256[:16])
    except UserError as error:
        logger.warning("TruthfulQA: %s", error)


def _say_inputs(config: EvaluationConfig) -> None:
    """Held-out pairs, models and memory, or the command that makes what is missing."""
    paths, model = config.paths, config.shared.model
    unread: list[str] = []
    for objective in paths.objectives:
        try:
            logger.info("%s: %d held-out test pairs", objective, len(read_pairs(paths, objective, "test")))
        except UserError as error:
            unread.append(str(error))
    for line in dict.fromkeys(unread):  # one for all, where nothing was prepared
        logger.warning("%s", line)
    folders = policy_folders(paths)
    for folder in folders:
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        logger.info("policy %s: %s, %.1f MB of weights", folder.name, folder, size / 1e6)
    for name, source in config.generation.policies.items():
        find = partial(local_folder, source, f"generation.policies.{name}", POLICY_REMEDY)
        _say_source(f"policy {name}, not trained here", source, find)
    if not folders:
        command = stage_command("baseline_dpo")
        logger.warning("%s: no finished policy; make some with: %s", paths.policies, command)
    logger.info(
        "reference: %s in %s; one model is in memory at a time, two for the KL of a policy with full weights",
        *(model.name, model.dtype),
    )


def _say_source(what: str, source: str, find: Callable[[], Path | None]) -> None:
    """From where a given model would be read, or the line that the run would stop with.

    Args:
        find: its local folder; None where it may be on the hub.
    """
    try:
        if (folder := find()) is not None:
            require_weights(folder)
        place = folder or f"the hub, as {source} is no folder here"
        logger.info("%s: would be read from %s", what, place)
    except UserError as error:
        logger.warning("%s: would stop the run: %s", what, error)
