"""What the report says of the policies: targets, what the training came to, how far targets and KL were reached.

What lives here: `metrics.json` and `run.json` of every policy in, text and tables for the template out; `training_outcome`,
which is also what a step result keeps. What does not: how good the policies are (`evaluation_sections`).
"""

from collections.abc import Mapping
from typing import Any

from prmd.artifacts.paths import ArtifactPaths, stage_command
from prmd.pessimism.losses import UNDER_TRAINED
from prmd.report.artifact_sections import Section, folders, load, missing
from prmd.report.tables import NOTHING, Table, format_estimate, format_number, format_seconds, listed


def policy_metrics(paths: ArtifactPaths) -> dict[str, dict[str, Any]]:
    """`metrics.json` of every finished policy of the approach, by its name."""
    found = {folder.name: load(folder / "metrics.json") for folder in folders(paths.policies)}
    return {name: metrics for name, metrics in found.items() if metrics}


def training_outcome(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """What a training came to: the last of each of its logged numbers; without those that it has none of.

    Returns:
        `steps`, `train_loss` (mean over the training), `eval_loss`, `eval_accuracy`, `margin` and `target_margin` (means over
        held-out pairs, or training pairs where none were held out), `sd_ratio`, `kl_target`, `kl_expected` (kl_target times
        the squared ratio, in nats per response).
    """
    curve = metrics.get("curve") or []

    def last(*names: str) -> float | None:
        return next(
            (row[name] for name in names for row in reversed(curve) if row.get(name) is not None), None
        )

    ratio, aimed = (metrics.get("held_out_learning") or {}).get("sd_ratio"), metrics.get("kl_target")
    found = {
        "steps": last("step"),
        "train_loss": last("train_loss", "loss"),
        "eval_loss": last("eval_loss"),
        "eval_accuracy": last("eval_rewards/accuracies"),
        "margin": last("eval_rewards/margins", "rewards/margins"),
        "target_margin": last("eval_margins/target", "margins/target"),
        "sd_ratio": ratio,
        "kl_target": aimed,
        "kl_expected": None if ratio is None or aimed is None else aimed * ratio**2,
    }
    return {name: value for name, value in found.items() if value is not None}


def under_trained(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence on policies that reached less than half of their target margins; empty without any."""
    ratios = {name: training_outcome(metrics).get("sd_ratio") for name, metrics in policies.items()}
    short = {name: ratio for name, ratio in ratios.items() if ratio is not None and ratio < UNDER_TRAINED}
    if not short:
        return ""
    reached = listed([f"{name} reached {ratio:.0%}" for name, ratio in short.items()])
    return f"Under-trained: {reached} of the spread of {'its' if len(short) == 1 else 'their'} target margins, less than half."


def policies_section(paths: ArtifactPaths) -> Section:
    """Reward scale, clipped targets, training and notes of every policy."""
    policies = policy_metrics(paths)
    if not policies:
        return {"missing": missing(paths, stage_command("pessimistic_dpo"))}
    rows = []
    for name, metrics in policies.items():
        targets = metrics.get("target_margins") or {}
        share = targets.get("clipped_share")
        scale = format_number(metrics.get("reward_scale"), 3)
        spread = tuple(format_number(targets.get(key)) for key in ("mean", "sd"))
        clipped = NOTHING if share is None else f"{share:.1%}"
        rows.append((name, scale, *spread, clipped, _draws(metrics.get("draws") or {})))
    spread_columns = ("target margin, mean", "sd", "clipped targets")
    columns = ("method", "reward scale", *spread_columns, "draws (passes)")
    notes = [f"{name}: {note}" for name, m in policies.items() for note in m.get("notes") or []]
    caption = (
        "Targets are what each policy's implicit margins were pulled to; DPO has none. Draws: share of an objective's labelled "
        "pairs in all that are drawn, and how often the training passes over them."
    )
    table = Table(columns, tuple(rows), caption)
    return {
        "missing": None,
        "table": table,
        "training": _training(paths, policies),
        "learning": _learning(paths, policies),
        "under_trained": under_trained(policies),
        "notes": notes,
    }


def _training(paths: ArtifactPaths, policies: dict[str, dict[str, Any]]) -> Table:
    """What every training came to, and what it took."""
    rows = []
    for name, metrics in policies.items():
        found, run = training_outcome(metrics), load(paths.policies / name / "run.json") or {}
        losses = (format_number(found.get(key), 3) for key in ("train_loss", "eval_loss"))
        margins = (format_number(found.get(key)) for key in ("margin", "target_margin", "eval_accuracy"))
        memory = run.get("peak_memory_bytes")
        took = (format_seconds(run.get("seconds")), f"{memory / 2**30:.1f} GiB" if memory else NOTHING)
        rows.append((name, format_number(found.get("steps"), 0), *losses, *margins, *took))
    columns = (
        *("method", "steps", "training loss", "held-out loss", "margin reached", "target margin"),
        *("held-out accuracy", "time", "peak memory"),
    )
    caption = (
        "At the end of training. Losses of different methods are different functions. Margins and accuracy: means over held-out "
        "pairs, accuracy of the implicit reward against the labels."
    )
    return Table(columns, tuple(rows), caption)


def _learning(paths: ArtifactPaths, policies: dict[str, dict[str, Any]]) -> Table | None:
    """How far held-out margins came to their targets, beside the KL aimed at and reached."""
    rows = []
    for name, metrics in policies.items():
        if not (found := metrics.get("held_out_learning")):
            continue
        reached = ((load(paths.metrics / f"{name}.json") or {}).get("kl") or {}).get("per_response")
        expected, short = training_outcome(metrics).get("kl_expected"), found["sd_ratio"] < UNDER_TRAINED
        numbers = (found["sd_ratio"], found["slope"], found["explained"], metrics.get("kl_target"), expected)
        called = "under-trained" if short else "spread reached"
        rows.append((name, called, *(format_number(value) for value in numbers), format_estimate(reached)))
    if not rows:
        return None
    columns = (
        "method",
        "targets",
        "sd ratio",
        "slope",
        "explained",
        "kl_target, nats",
        "× sd ratio²",
        "KL reached",
    )
    caption = (
        "Held-out pairs at the end of training: spread of implicit margins in that of their targets, slope of the former on the "
        "latter, 1 − squared error / mean squared target. All are 0 before training; under-trained: a sd ratio below 0.5, less than "
        "half of the targets' spread. A low slope beside a high ratio: margins moved, but not towards the targets of pairs that were "
        "not trained on. For Gaussian margins the KL is about kl_target times the squared ratio."
    )
    return Table(columns, tuple(rows), caption)


def _draws(draws: dict[str, Any]) -> str:
    parts = (f"{k} {row['share']:.0%} ({format_number(row['passes'])})" for k, row in draws.items())
    return ", ".join(parts) or NOTHING
