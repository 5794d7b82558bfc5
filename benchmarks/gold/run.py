"""Runs the gold-reward study: worlds, reward models, policies, heads, in worker processes, resumed where it stopped.

Every step writes its own file below `<work>/<key of the sizes>/seed-<n>/` and is skipped where that file is there; seeds are
part of the file names and of every random generator, so what is run twice is the same twice (on one machine). What is run
is in `gold/plan.py`, what comes of it in `gold/summary.py`; the command line is `gold_reward`.
"""

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.closed_form.letters import GATE_SAMPLES, MEMBERS, run_closed_form
from benchmarks.closed_form.letters_summary import closed_form_rows
from benchmarks.gold.ensembles import NONE, BackboneKey, make_reward_models
from benchmarks.gold.heads import FIT_FRACTIONS, heads_rows, study_heads
from benchmarks.gold.labels import BIAS_SHARE, KAPPA, LABEL_NOISE
from benchmarks.gold.models import Sizes
from benchmarks.gold.plan import (
    CHANGED,
    COMPARED,
    HARM_BIAS,
    HARM_COST,
    MATCHED_KL,
    Preset,
    ablations,
    all_units,
    harm_units,
    main_units,
    shipped,
)
from benchmarks.gold.policies import Unit, run_unit
from benchmarks.gold.reference import World, build_world, with_length_cost
from benchmarks.gold.summary import (
    ablation_row,
    curve_points,
    fall_rows,
    harm_rows,
    paired_rows,
    reward_model_rows,
    summary_row,
)
from prmd.artifacts import io
from prmd.objectives import OBJECTIVES
from prmd.runtime import configure_logging

logger = logging.getLogger("prmd.gold_reward")
Task = Callable[[], Any]


# ------------------------------------------------------------------ what one process does
@lru_cache(maxsize=1)
def _world(sizes: Sizes, seed: int, root: Path) -> World:
    return build_world(sizes, seed, root / f"seed-{seed}")


def world_task(sizes: Sizes, root: Path, seed: int) -> Path:
    """Make the world of a seed."""
    return _world(sizes, seed, root).directory


def reward_task(
    sizes: Sizes, root: Path, seed: int, key: BackboneKey, families: tuple[str, ...]
) -> list[Path]:
    """Make one backbone and the families of heads on it."""
    world = with_length_cost(_world(sizes, seed, root), key.length_cost)
    return make_reward_models(world, key, families)


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


def _run(tasks: Sequence[Task], workers: int, what: str) -> list[Any]:
    """Results of all tasks, in their order."""
    started, results = time.monotonic(), {}
    for index, path in _finished(tasks, workers):
        results[index] = path
        spent = time.monotonic() - started
        left = spent / len(results) * (len(tasks) - len(results))
        logger.info("%s %d of %d, about %.0f min left", what, len(results), len(tasks), left / 60)
    return [results[index] for index in range(len(tasks))]


def _finished(tasks: Sequence[Task], workers: int) -> Iterator[tuple[int, Any]]:
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
    _run([partial(world_task, sizes, root, seed) for seed in preset.seeds], workers, "world")
    wanted = reward_models(units)
    made = _run([partial(reward_task, sizes, root, *one) for one in wanted], workers, "reward model")
    compared = {family for _, family in COMPARED}
    measured = [
        {"family": family, "length_cost": key.length_cost, **io.read_json(path)}
        for (_, key, families), paths in zip(wanted, made, strict=True)
        for family, path in zip(families, paths, strict=True)
        if family in compared  # the same rows with ablations and without
    ]
    paths = _run([partial(unit_task, sizes, root, unit) for unit in units], workers, "policy")
    results = {unit: io.read_json(path) for unit, path in zip(units, paths, strict=True)}
    found = assemble(preset, results) | {"reward_models": reward_model_rows(measured)}
    if not preset.ablations:
        return found
    heads = [
        partial(heads_task, sizes, root, seed, preset.ablation_bias, fraction)
        for seed in preset.seeds[: preset.ablation_seeds]
        for fraction in FIT_FRACTIONS
    ]
    files = [io.read_json(path) for path in _run(heads, workers, "ensemble heads")]
    return found | assemble_ablations(preset, results) | {"heads": heads_rows(files)}


def reward_models(units: Sequence[Unit]) -> list[tuple[int, BackboneKey, tuple[str, ...]]]:
    """The backbones that units need, each once: seed, which, and the families of heads on it."""
    wanted: dict[tuple[int, BackboneKey], dict[str, None]] = {}
    for unit in units:
        for objective in OBJECTIVES if unit.family != NONE else ():
            key = BackboneKey.of(objective, unit.bias, unit.length_cost, unit.family)
            wanted.setdefault((unit.seed, key), {})[unit.family] = None
    return [(*key, tuple(sorted(families))) for key, families in sorted(wanted.items(), key=str)]


def run_closed_forms(sizes: Sizes, seeds: Sequence[int], work: Path, *, workers: int) -> dict[str, Any]:
    """The closed-form part: `closed_form`, rows of `letters_summary.closed_form_rows`, and `closed_form_setup`."""
    root = work / sizes.key
    paths = _run([partial(closed_form_task, sizes, root, seed) for seed in seeds], workers, "closed form")
    setup = {"seeds": list(seeds), "sizes": asdict(sizes), "members": MEMBERS, "samples": GATE_SAMPLES}
    found = [io.read_json(path) for path in paths]
    members = [{"seed": seed, **one["with_length"]} for seed, one in zip(seeds, found, strict=True)]
    rows = closed_form_rows([one["rows"] for one in found])
    return {"closed_form": rows, "closed_form_members": members, "closed_form_setup": setup}


def assemble(preset: Preset, results: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    """The main comparison and the case of harm from the files of their units.

    Returns:
        `summary`, one row per (method, bias, family); `paired` differences; `falls` with the bias; `harm`, rows of where
        length is truly good; and how it was run.
    """
    kl = MATCHED_KL
    groups = {
        (*compared, bias): _runs(results, [preset.unit(compared, bias, seed) for seed in preset.seeds])
        for compared in COMPARED
        for bias in preset.biases
    }
    harm = {compared: _runs(results, units) for compared, units in harm_units(preset).items()}
    return {
        "summary": [summary_row(key, found, kl) for key, found in groups.items()],
        "paired": paired_rows(groups, kl),
        "falls": fall_rows(groups, kl),
        "harm": harm_rows(harm, HARM_BIAS, kl),
        "setup": _setup(preset, results),
    }


def _runs(results: Mapping[Unit, dict[str, Any]], units: Sequence[Unit]) -> list[Any]:
    return [results[unit]["checkpoints"] for unit in units]


def assemble_ablations(preset: Preset, results: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    """`ablations`, rows that name their `ablation`; `over_optimisation`, points over sqrt(KL); and how they were run."""
    tables = ablations(preset)
    far = tables.pop("over_optimisation", [])

    def row(label: str, units: Sequence[Unit]) -> dict[str, Any]:
        found, key = _runs(results, units), (units[0].method, units[0].family, units[0].bias)
        against = _runs(results, [shipped(preset, unit) for unit in units])
        return ablation_row(label, found, against, summary_row(key, found, MATCHED_KL), MATCHED_KL)

    curves = [
        {
            "label": label,
            "method": units[0].method,
            "family": units[0].family,
            "points": curve_points(_runs(results, units)),
        }
        for label, units in far
    ]
    return {
        "over_optimisation": curves,
        "ablations": [{"ablation": name, **row(*one)} for name, rows in tables.items() for one in rows],
        "ablations_setup": {
            "seeds": list(preset.seeds[: preset.ablation_seeds]),
            "bias": preset.ablation_bias,
            "matched_kl": MATCHED_KL,
            "policies": len(results) - _main_policies(preset),
        },
    }


def _main_policies(preset: Preset) -> int:
    return len(all_units(replace(preset, ablations=())))


def _setup(preset: Preset, results: dict[Unit, dict[str, Any]]) -> dict[str, Any]:
    """How the main comparison and the case of harm were run."""
    units = all_units(replace(preset, ablations=()))
    return {
        "matched_kl": MATCHED_KL,
        "seeds": list(preset.seeds),
        "harm_seeds": list(preset.seeds[: preset.harm_seeds]),
        "harm": {"bias": HARM_BIAS, "length_cost": HARM_COST},
        "bias_share": BIAS_SHARE,
        "bradley_terry_steepness": KAPPA,
        "label_noise": LABEL_NOISE,
        "changed_settings": {method: dict(settings) for method, settings in CHANGED.items()},
        "sizes": asdict(preset.sizes),
        "intervals": "Student t over seeds, each its own world; of the worst objective, the band of a minimum",
        "policies": len(units),
        "cpu_minutes_of_policies": round(sum(results[unit]["cpu_seconds"] for unit in units) / 60, 1),
        "reference_mean_of_min": _reference_minimum(preset, results),
    }


def _reference_minimum(preset: Preset, results: dict[Unit, dict[str, Any]]) -> float:
    """E[min_k] of pi_ref itself, mean over seeds, in its own standard deviations."""
    starts = {unit.seed: results[unit]["checkpoints"][0]["mean_of_min"] for unit in main_units(preset)}
    return sum(starts.values()) / len(starts)
