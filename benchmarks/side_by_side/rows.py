"""The rows of the speed comparison: what is run against what, and what is made of the times.

Every row has the same keys (`ROW_KEYS`); a number that was not measured is None. Ratios are taken within a repeat, whose
runs follow one another, and their median is reported. How things are timed is in `side_by_side/trainings.py`, memory in `side_by_side/memory.py`.
"""

import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.side_by_side.limit import DenseBatch, alternate, dense_batches, dense_pass, planned_batches
from benchmarks.side_by_side.setup import (
    Models,
    Workload,
    processed_tokens,
    shares_prompts,
)
from benchmarks.side_by_side.trainings import (
    BETA,
    SCORING_TOKENS,
    TimedTraining,
    our_scoring,
    our_training,
    reward_objective,
    trl_dpo,
    trl_reward,
    trl_scoring,
)
from prmd.config.policy import PolicySection
from prmd.models.prefix_rows import plan_scoring
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.models.tokenization import PrefixRow
from prmd.policies.targets import policy_loss
from prmd.training.trainer import PairData

ROW_KEYS = (
    "name",
    "unit",
    "ours",
    "trl",
    "speed_ratio",
    "memory_ratio",
    "padding_share",
    "fraction_of_limit",
    "repeats",
    "spread",
    "tokens_per_pair",
    "trl_tokens_per_pair",
    "mfu",
    "model",
    "note",
)
Row = dict[str, Any]
Times = Mapping[str, Sequence[float]]
POLICY = PolicySection(beta=BETA)


def make_row(name: str, **values: Any) -> Row:
    """A row with None for what is not given, and for numbers that are not finite."""
    row = dict.fromkeys(ROW_KEYS) | {"name": name} | values
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, list[float] | None]:
    """Median over repeats of numerator / denominator, and the least and greatest; NaN and None without a finite one."""
    values = [a / b for a, b in zip(numerator, denominator, strict=True)]
    finite = [value for value in values if math.isfinite(value)]
    return (statistics.median(finite), [min(finite), max(finite)]) if finite else (math.nan, None)


def timed_values(times: Times, *, amount: float, distinct: int, dense: Sequence[DenseBatch]) -> Row:
    """Speeds and ratios of a row from the seconds of `ours`, `limit` and, where it exists, `trl`.

    Args:
        amount: what a run gets through, in the row's unit times seconds.
        distinct: tokens of our rows, each prompt once.
        dense: the batches of the limit.
    """
    dense_tokens = sum(batch.tokens for batch in dense)
    slowness, _ = ratio(times["limit"], times["ours"])
    values: Row = {
        "ours": amount / statistics.median(times["ours"]),
        "fraction_of_limit": slowness * distinct / dense_tokens,
        "repeats": len(times["ours"]),
    }
    if "trl" in times:
        speed, spread = ratio(times["trl"], times["ours"])
        trl = statistics.median(times["trl"])
        values |= {"trl": amount / trl, "speed_ratio": speed, "spread": spread}
    return values


def _token_values(rows: Sequence[PrefixRow], batches: Sequence[Sequence[int]], *, shared: bool) -> Row:
    tokens, padding = processed_tokens(rows, batches, share_prompt=shared)
    return {"padding_share": padding / tokens, "tokens_per_pair": tokens / len(rows)}


def _batching_note(rows: Sequence[PrefixRow], batches: Sequence[Sequence[int]]) -> str:
    padded = sum(2 * len(batch) * max(rows[i].longest for i in batch) for batch in batches)
    return f"TRL batches them at random, its default; in our batches it would process {padded / len(rows):.0f} tokens a pair"


def _distinct(rows: Sequence[PrefixRow]) -> int:
    return sum(row.shared_length for row in rows)


# ------------------------------------------------------------------ policies
def policy_data(rows: Sequence[PrefixRow], ref_logps: torch.Tensor, *, targets: bool) -> PairData:
    """Columns of `policy_loss`; with `targets`, standard normal margins to distil."""
    columns = {
        "ref_logps": ref_logps,
        "chosen_length": torch.tensor([float(len(row.responses[0])) for row in rows]),
    }
    if targets:
        columns["target_margins"] = torch.randn(len(rows), generator=torch.Generator().manual_seed(0))
    return PairData(rows, columns)


def policy_rows(models: Models, workload: Workload, limits: Mapping[str, tuple[int, float]]) -> Iterator[Row]:
    """The rows dpo, scoring and distillation, as they are measured, or those that have limits; the first is always measured.

    Args:
        limits: by row, the repeats and the seconds after which no further one begins.
    """
    rows, plan = workload.policy_rows, planned_batches(workload.plan)
    policy = SequenceLogps(models.policy())
    shared = shares_prompts(policy.unwrapped.config, rows)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        _, logps = our_scoring(policy.model, workload, root / "references")
        train = partial(
            our_training,
            policy,
            loss_function=partial(policy_loss, policy=POLICY),
            workload=workload,
            directory=root / "ours",
            checkpointing=models.checkpointing,
        )
        ref_logps = torch.stack(logps)
        trl = trl_dpo(models.policy(), workload, root / "trl", checkpointing=models.checkpointing)
        dense = dense_batches(rows, plan)
        ours = train(data=policy_data(rows, ref_logps, targets=False))
        runs = {"ours": ours.run, "trl": trl.run, "limit": partial(dense_pass, policy.model, dense)}
        _warm((policy.model, trl.trainer.model), dense)
        dpo_times = _alternate(runs, limits["dpo"])
        trl_tokens = trl.trainer.data_collator.tokens / len(dpo_times["trl"]) / len(rows)
        common = {"unit": "pairs/s", **_token_values(rows, plan, shared=shared)}
        facts = {"amount": len(rows), "distinct": _distinct(rows), "dense": dense}
        note = f"{workload.source}; {_batching_note(rows, plan)}"
        dpo = timed_values(dpo_times, **facts) | {"trl_tokens_per_pair": trl_tokens, "note": note}
        yield make_row("dpo", **common, **dpo)
        if "scoring" in limits:
            yield _scoring_row(policy.model, trl, workload, root, limits["scoring"], shared)
        del trl, runs, ours
        gc.collect()
        if "distillation" in limits:
            distilled = train(data=policy_data(rows, ref_logps, targets=True))
            runs = {"ours": distilled.run, "limit": partial(dense_pass, policy.model, dense)}
            values = timed_values(_alternate(runs, limits["distillation"]), **facts)
            yield make_row("distillation", **common, **values, note="TRL has no reward-model distillation")


def _warm(models: Sequence[PreTrainedModel], dense: Sequence[DenseBatch]) -> None:
    """Pass a batch through each model: the first run that touches its weights takes a sixth longer than the next."""
    for model in models:
        dense_pass(model, dense[:1])


def _alternate(runs: Mapping[str, Callable[[], float]], limit: tuple[int, float]) -> dict[str, list[float]]:
    return alternate(runs, repeats=limit[0], seconds=limit[1])


def _scoring_row(
    model: PreTrainedModel,
    trl: TimedTraining,
    workload: Workload,
    root: Path,
    limit: tuple[int, float],
    shared: bool,
) -> Row:
    rows = workload.policy_rows
    groups = plan_scoring(rows, tokens_per_batch=SCORING_TOKENS, share_prompt=shared)
    dense = dense_batches(rows, groups)

    def ours() -> float:
        # a fresh table, or nothing would be computed
        return our_scoring(model, workload, Path(tempfile.mkdtemp(dir=root)))[0]

    runs = {
        "ours": ours,
        "trl": partial(trl_scoring, trl),
        "limit": partial(dense_pass, model, dense, train=False),
    }
    times = _alternate(runs, limit)
    responses = sum(len(response) for row in rows for response in row.responses)
    values = timed_values(times, amount=responses, distinct=_distinct(rows), dense=dense)
    note = "log-probabilities of both responses, once; TRL: compute_ref_log_probs on batches of 4 pairs"
    tokens = _token_values(rows, groups, shared=shared)
    return make_row("scoring", unit="response tokens/s", **values, **tokens, note=note)


# ------------------------------------------------------------------ reward models
def reward_row(models: Models, workload: Workload, limit: tuple[int, float]) -> Row:
    """The row reward_model."""
    rows, plan = workload.reward_rows, planned_batches(workload.plan)
    classifier = models.classifier()
    shared = shares_prompts(classifier.config, rows)
    dense = dense_batches(rows, plan, rewards=True)
    with tempfile.TemporaryDirectory() as folder:
        ours = our_training(
            SequenceRewards(classifier),
            PairData(rows, {}),
            reward_objective,
            workload=workload,
            directory=Path(folder) / "ours",
            checkpointing=models.checkpointing,
        )
        other = models.classifier()
        trl = trl_reward(other, workload, Path(folder) / "trl", checkpointing=models.checkpointing)
        runs = {"ours": ours.run, "trl": trl.run, "limit": partial(dense_pass, classifier, dense)}
        _warm((classifier, other), dense)
        times = _alternate(runs, limit)
    trl_tokens = trl.trainer.data_collator.tokens / len(times["trl"]) / len(rows)
    values = timed_values(times, amount=len(rows), distinct=_distinct(rows), dense=dense)
    tokens = _token_values(rows, plan, shared=shared) | {"trl_tokens_per_pair": trl_tokens}
    return make_row("reward_model", unit="pairs/s", **values, **tokens, note=workload.source)
