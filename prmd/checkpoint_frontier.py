"""The reward-KL frontier: where each policy stood at the checkpoints its training kept.

Methods that end at different KL are compared along their way there. Every checkpoint answers some of the prompts and is
judged as the policies are; `frontier.json` lies beside `comparison.json`. Off by default, because every checkpoint
costs as much sampling as a policy. What is measured is in `policy_metrics`; the figure is in `report.evaluation_figures`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prmd.artifacts import io
from prmd.inference.candidates import REFERENCE, Contender
from prmd.models.loading import weights_fingerprint
from prmd.policy_evaluation import Evaluation, judge_runs, measure, sample

logger = logging.getLogger(__name__)

FRONTIER_FILE = "frontier.json"


def write_frontier(evaluation: Evaluation, contenders: Sequence[Contender]) -> None:
    """Bring `frontier.json` up to date with the configuration: write it, keep it where it is current, or remove it."""
    path = evaluation.config.paths.metrics / FRONTIER_FILE
    wanted = evaluation.config.generation.checkpoints == "all"
    key = io.fingerprint([evaluation.fingerprint, [c.fingerprint for c in contenders]])
    current = path.is_file() and io.read_json(path)["fingerprint"] == key
    if wanted and not current:
        first = evaluation.prompts[: evaluation.config.generation.checkpoint_prompts]
        io.write_json(path, {"fingerprint": key, **_frontier(replace(evaluation, prompts=first), contenders)})
    elif not current:
        path.unlink(missing_ok=True)


def checkpoint_contenders(contender: Contender) -> list[Contender]:
    """The checkpoints between start and end of one policy's training, in order, then the policy itself.

    They are named by their share in percent; `start` is the reference, `end` the policy, `best` a copy of one of them.
    """
    if contender.directory is None:
        return []
    folders = (contender.directory / "checkpoints").glob("*")
    kept = sorted((f for f in folders if f.name.isdigit()), key=lambda folder: int(folder.name))
    between = [
        replace(
            contender,
            method=f"{contender.method}@{folder.name}",
            directory=folder,
            fingerprint=io.fingerprint([contender.fingerprint, weights_fingerprint(folder)]),
        )
        for folder in kept
    ]
    return [*between, contender]


def _frontier(evaluation: Evaluation, contenders: Sequence[Contender]) -> dict[str, Any]:
    """`prompts`, `reference` (its mean of the minimum) and `points`, one per policy and checkpoint."""
    stages = {c.method: checkpoint_contenders(c) for c in contenders if c.method != REFERENCE}
    several = [(method, stage) for method, found in stages.items() for stage in found]
    logger.info(
        "frontier: %d checkpoints of %d policies answer %d prompts each",
        *(len(several) - len(stages), len(stages), len(evaluation.prompts)),
    )
    runs = [sample(evaluation, contender) for contender in (evaluation.reference, *(s for _, s in several))]
    verdicts = judge_runs(evaluation, runs)
    measured = [
        measure(evaluation, run, raw, runs[0], verdicts)[0]
        for run, raw in zip(runs, verdicts.raw, strict=True)
    ]
    points = [
        _point(method, stage.method.removeprefix(method).removeprefix("@") or "end", found)
        for (method, stage), found in zip(several, measured[1:], strict=True)
    ]
    reference = {"mean_of_min": measured[0]["mean_of_min"]}
    return {"prompts": len(evaluation.prompts), "reference": reference, "points": points}


def _point(method: str, checkpoint: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "method": method,
        "checkpoint": checkpoint,
        "kl": metrics["kl"]["per_response"],
        "worst": metrics["worst_objective"]["win_rate"],
        "mean_of_min": metrics["mean_of_min"],
        "win_rate": {k: v["win_rate"] for k, v in metrics["objectives"].items()},
        "mean_reward": {k: v["mean_reward"] for k, v in metrics["objectives"].items()},
    }
