"""The reward-KL frontier: policies compared along their way, at every kept checkpoint.

Methods that end at different KL are compared along their way there: every kept checkpoint may answer some of the prompts
(`generation.checkpoints`), judged as the policies are. Off by default, because every checkpoint costs as much sampling as a
policy.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import REFERENCE, policy_command
from prmd.artifacts.runs import is_as_recorded, require_artifact
from prmd.evaluation.comparison import worst_at_equal_length
from prmd.evaluation.held_out import Evaluation, debiased_rewards, judge_runs, measure, sample_usable
from prmd.inference.candidates import Candidate, policy_key

logger = logging.getLogger(__name__)

FRONTIER_FILE = "frontier.json"


def write_frontier(evaluation: Evaluation, candidates: Sequence[Candidate]) -> None:
    """Bring `frontier.json` up to date with the configuration: write it, keep it where it is current, or remove it."""
    path = evaluation.paths.metrics / FRONTIER_FILE
    wanted = evaluation.generation.checkpoints == "all"
    key = io.fingerprint([evaluation.fingerprint, [c.fingerprint for c in candidates]])
    current = (
        path.is_file()
        and is_as_recorded(path.parent, path.name)
        and io.read_json(path).get("fingerprint") == key
    )
    if wanted and not current:
        first = evaluation.prompts[: evaluation.generation.checkpoint_prompts]
        io.write_json(path, {"fingerprint": key, **_frontier(replace(evaluation, prompts=first), candidates)})
    elif not current:
        path.unlink(missing_ok=True)


def checkpoint_candidates(candidate: Candidate) -> list[Candidate]:
    """The checkpoints between start and end of one policy's training, in order, then the policy itself.

    They are named by their share in percent; `start` is the reference, `end` the policy, `best` a copy of one of them. Of a
    policy from elsewhere its end alone is known.
    """
    if candidate.directory is None:
        return []
    if candidate.foreign is not None:
        return [candidate]
    folders = (candidate.directory / "checkpoints").glob("*")
    kept = sorted((f for f in folders if f.name.isdigit()), key=lambda folder: int(folder.name))
    between = [
        replace(
            candidate,
            method=f"{candidate.method}@{folder.name}",
            directory=folder,
            fingerprint=policy_key(candidate.fingerprint, folder),
        )
        for folder in kept
    ]
    return [*between, candidate]


def _frontier(evaluation: Evaluation, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """`prompts`, `reference` (its mean of the minimum) and `points`, one per policy and checkpoint."""
    for policy in (c for c in candidates if c.directory is not None and c.foreign is None):
        what, command = f"policy {policy.method}", policy_command(policy.directory.name)
        require_artifact(policy.directory, what=what, command=command, read=["checkpoints/[0-9]*"])
    stages = {c.method: checkpoint_candidates(c) for c in candidates if c.method != REFERENCE}
    parents = {c.method: c.directory for c in candidates}
    several = [(method, stage) for method, found in stages.items() for stage in found]
    logger.info(
        "frontier: %d checkpoints of %d policies answer %d prompts each",
        *(len(several) - len(stages), len(stages), len(evaluation.prompts)),
    )
    runs, unusable = sample_usable(evaluation, [evaluation.reference, *(stage for _, stage in several)])
    several = [(method, stage) for method, stage in several if stage.method not in unusable]
    verdicts = judge_runs(evaluation, runs)
    measured = [
        measure(evaluation, run, raw, runs[0], verdicts)[0]
        for run, raw in zip(runs, verdicts.raw, strict=True)
    ]
    points = [
        _point(method, stage.method.removeprefix(method).removeprefix("@") or "end", found)
        | {"worst_length_controlled": worst_at_equal_length(found, measured[0], evaluation.resampling)}
        | debiased_rewards(replace(stage, directory=parents[method]))
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
