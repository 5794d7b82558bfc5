"""Runs the gold-reward study: worlds, reward models, policies, heads, in worker processes, resumed where it stopped.

Every step writes its own file below `<work>/<key of the sizes>/seed-<n>/` and is skipped where that file is there; seeds are
part of the file names and of every random generator, so what is run twice is the same twice (on one machine). What is run
is in `gold/plan.py`, what comes of it in `gold/summary.py`; the command line is `gold_reward`.
"""

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.closed_form.letters import GATE_SAMPLES, MEMBERS, run_closed_form
from benchmarks.closed_form.letters_summary import closed_form_rows
from benchmarks.gold.ensembles import make_reward_model
from benchmarks.gold.heads import FIT_FRACTIONS, heads_rows, study_heads
from benchmarks.gold.labels import BIAS_SHARE, KAPPA, LABEL_NOISE
from benchmarks.gold.models import Sizes
from benchmarks.gold.plan import CHANGED, MATCHED_KL, METHODS, Preset, ablations, all_units, main_units
from benchmarks.gold.policies import Unit, run_unit
from benchmarks.gold.reference import World, build_world
from benchmarks.gold.summary import (
    ablation_row,
    curve_points,
    fall_rows,
    paired_rows,
    reward_model_rows,
    summary_row,
)
from prmd.artifacts import io
from prmd.objectives import OBJECTIVES
from prmd.runtime import configure_logging

logger = logging.getLogger("prmd.gold_reward")
UNBIASED = 0.5
Task = Callable[[], Path]


# ------------------------------------------------------------------ what one process does
@lru_cache(maxsize=1)
def _world(sizes: Sizes, seed: int, root: Path) -> World:
    return build_world(sizes, seed, root / f"seed-{seed}")


def world_task(sizes: Sizes, root: Path, seed: int) -> Path:
    """Make the world of a seed."""
    return _world(sizes, seed, root).directory


def reward_task(sizes: Sizes, root: Path, seed: int, objective: str, bias: float) -> Path:
    """Make one reward model."""
    return make_reward_model(_world(sizes, seed, root), objective, bias)


def heads_task(sizes: Sizes, root: Path, seed: int, bias: float, fit_fraction: float) -> Path:
    """Compare heads on one split of the pairs."""
    return study_heads(_world(sizes, seed, root), bias, fit_fraction)


def unit_task(sizes: Sizes, root: Path, unit: Unit) -> Path:
    """Train and evaluate one policy."""
    return run_unit(_world(sizes, unit.seed, root), unit, root)


def closed_form_task(sizes: Sizes, root: Path, seed: int) -> Path:
    """Every scenario of a seed, without a training."""
    return run_closed_form(_world(sizes, seed, root))


def _start_worker() -> None:
    torch.set_num_threads(1)
    configure_logging()


def _run(tasks: Sequence[Task], workers: int, what: str) -> list[Path]:
    """Results of all tasks, in their order."""
    started, results = time.monotonic(), {}
    for index, path in _finished(tasks, workers):
        results[index] = path
        spent = time.monotonic() - started
        left = spent / len(results) * (len(tasks) - len(results))
        logger.info("%s %d of %d, about %.0f min left", what, len(results), len(tasks), left / 60)
    return [results[index] for index in range(len(tasks))]


def _finished(tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, Path]]:
    if workers == 1:
        yield from ((index, task()) for index, task in enumerate(tasks))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
        running = {pool.submit(task): index for index, task in enumerate(tasks)}
        for future in as_completed(running):
            yield running[future], future.result()


# ------------------------------------------------------------------ the study
def run_study(preset: Preset, work: Path, *, workers: int) -> dict[str, Any]:
    """Run what is missing and put the results together: the contents of `gold_reward.json`."""
    root, sizes = work / preset.sizes.key, preset.sizes
    units = all_units(preset)
    worlds = [partial(world_task, sizes, root, seed) for seed in preset.seeds]
    keys = sorted(
        {
            (unit.seed, objective, unit.bias if BIAS_SHARE[objective] else UNBIASED)
            for unit in units
            for objective in OBJECTIVES
        }
    )
    _run(worlds, workers, "world")
    measured = _run([partial(reward_task, sizes, root, *key) for key in keys], workers, "reward model")
    paths = _run([partial(unit_task, sizes, root, unit) for unit in units], workers, "policy")
    heads = [
        partial(heads_task, sizes, root, seed, preset.ablation_bias, fraction)
        for seed in preset.seeds[: preset.ablation_seeds]
        for fraction in FIT_FRACTIONS
        if preset.heads
    ]
    compared = [io.read_json(path) for path in _run(heads, workers, "ensemble heads")]
    results = {unit: io.read_json(path) for unit, path in zip(units, paths, strict=True)}
    reward_models = [io.read_json(path) for path in measured]
    return assemble(preset, results, reward_models) | {"heads": heads_rows(compared)}


def run_closed_forms(sizes: Sizes, seeds: Sequence[int], work: Path, *, workers: int) -> dict[str, Any]:
    """The closed-form part: `closed_form`, rows of `letters_summary.closed_form_rows`, and `closed_form_setup`."""
    root = work / sizes.key
    paths = _run([partial(closed_form_task, sizes, root, seed) for seed in seeds], workers, "closed form")
    setup = {"seeds": list(seeds), "sizes": asdict(sizes), "members": MEMBERS, "samples": GATE_SAMPLES}
    found = [io.read_json(path) for path in paths]
    members = [{"seed": seed, **one["with_length"]} for seed, one in zip(seeds, found, strict=True)]
    rows = closed_form_rows([one["rows"] for one in found])
    return {"closed_form": rows, "closed_form_members": members, "closed_form_setup": setup}


def assemble(
    preset: Preset, results: dict[Unit, dict[str, Any]], reward_models: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The study's results from the files of its units.

    Returns:
        `summary`, one row per (method, bias); `paired` against dpo; `falls` with the bias; `evaluation.over_optimisation`, points over
        sqrt(KL); `ablations`, lists of rows; `rewards.reward_model`; and how it was run.
    """

    def runs(units: Sequence[Unit]) -> list[Any]:
        return [results[unit]["checkpoints"] for unit in units]

    groups = {
        (method, bias): runs([preset.unit(method, bias, seed) for seed in preset.seeds])
        for method in METHODS
        for bias in preset.biases
    }
    tables = ablations(preset)
    far = tables.pop("over_optimisation", [])
    kl = MATCHED_KL

    def ablation(label: str, units: Sequence[Unit]) -> dict[str, Any]:
        method, bias, found = units[0].method, units[0].bias, runs(units)
        shipped = runs([preset.unit(method, bias, unit.seed) for unit in units])
        return ablation_row(label, found, shipped, summary_row(method, bias, found, kl), kl)

    return {
        "summary": [summary_row(*key, found, kl) for key, found in groups.items()],
        "paired": paired_rows(groups, kl),
        "falls": fall_rows(groups, kl),
        "over_optimisation": [
            {"label": label, "method": units[0].method, "points": curve_points(runs(units))}
            for label, units in far
        ],
        "ablations": {name: [ablation(*row) for row in rows] for name, rows in tables.items()},
        "reward_models": reward_model_rows(reward_models),
        "setup": _setup(preset, results),
    }


def _setup(preset: Preset, results: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    """How the study was run."""
    return {
        "matched_kl": MATCHED_KL,
        "seeds": list(preset.seeds),
        "ablation_seeds": list(preset.seeds[: preset.ablation_seeds]),
        "ablation_bias": preset.ablation_bias,
        "bias_share": BIAS_SHARE,
        "bradley_terry_steepness": KAPPA,
        "label_noise": LABEL_NOISE,
        "changed_settings": {method: dict(settings) for method, settings in CHANGED.items()},
        "sizes": asdict(preset.sizes),
        "intervals": "Student t over seeds, each its own world; of the worst objective, the band of a minimum",
        "policies": len(results),
        "cpu_minutes_of_policies": round(sum(r["cpu_seconds"] for r in results.values()) / 60, 1),
        "reference_mean_of_min": _reference_minimum(preset, results),
    }


def _reference_minimum(preset: Preset, results: dict[Unit, dict[str, Any]]) -> float:
    """E[min_k] of pi_ref itself, mean over seeds, in its own standard deviations."""
    starts = {unit.seed: results[unit]["checkpoints"][0]["mean_of_min"] for unit in main_units(preset)}
    return sum(starts.values()) / len(starts)
