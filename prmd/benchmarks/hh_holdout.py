"""Held-out preference pairs: how often the implicit reward of a policy prefers the chosen response.

    r(x, y) = beta * [log pi(y|x) - log pi_ref(y|x)],   accuracy = share of pairs with r(x, y_w) > r(x, y_l)

beta > 0 changes no accuracy and is left out. `hh_holdout` is this on HH-RLHF's test pairs and nothing else; the same on the
test pairs of whatever approach is `heldout_pairs`, so that nobody takes one for the other. The reference's implicit reward is
0 for everything: what is reported of it is its own preference, log pi_ref alone, under a name of its own.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.benchmarks.base import BenchmarkResult, NotRunError, Task
from prmd.config.evaluation import EvaluationConfig
from prmd.inference.candidates import CandidateModels
from prmd.models.tokenization import TokenizedPairs, tokenize_pairs
from prmd.pairs import PreferencePair, hash_share, read_pairs
from prmd.statistics.intervals import accuracy_with_ties

HH_SOURCE = "hh_rlhf/"


def run_hh_holdout(config: EvaluationConfig, models: CandidateModels) -> BenchmarkResult:
    """Implicit-reward accuracy on HH-RLHF's test pairs, helpful and harmless."""
    if reason := no_hh_rows(config.shared.data.approach):
        raise NotRunError(reason)
    objectives, limit = ("helpful", "harmless"), config.benchmarks.hh_holdout.max_pairs
    pairs = held_out_pairs(config.paths, objectives, HH_SOURCE, limit)
    return _compare(models, pairs, objectives, HH_SOURCE, config.reward_model_config.training.max_length)


def no_hh_rows(approach: str) -> str | None:
    """Why an approach has none of HH-RLHF's test pairs; None where it has."""
    if approach == "hh_truthfulqa":
        return None
    return f"the approach {approach} holds no HH-RLHF rows; see heldout_pairs for its own"


def run_heldout_pairs(config: EvaluationConfig, models: CandidateModels) -> BenchmarkResult:
    """Implicit-reward accuracy on the approach's own test pairs, all objectives."""
    objectives, limit = config.paths.objectives, config.benchmarks.hh_holdout.max_pairs
    pairs = held_out_pairs(config.paths, objectives, "", limit)
    return _compare(models, pairs, objectives, "", config.reward_model_config.training.max_length)


def _compare(
    models: CandidateModels,
    pairs: Sequence[PreferencePair],
    objectives: Sequence[str],
    source: str,
    max_length: int,
) -> BenchmarkResult:
    """The chosen response of each pair against the rejected one."""
    if not pairs:
        raise NotRunError(f"no test pair of {' or '.join(objectives)} comes from {source.strip('/')}")
    tokenized = tokenize_pairs(
        pairs,
        models.tokenizer,
        max_length=max_length,
        over_length="truncate_prompt",
        keep_suffix=False,
        keep_ties=True,
    )
    logps = models.logps(tokenized.rows)
    reference = None if models.is_reference else models.reference_logps(tokenized.rows)
    items = _items(tokenized, logps, reference)
    return BenchmarkResult(
        metrics=_metrics(items, objectives),
        items=items,
        data_sha256=io.fingerprint([pair.to_row() for pair in pairs]),
    )


def held_out_pairs(
    paths: ArtifactPaths, objectives: Sequence[str], source: str, limit: int | None
) -> list[PreferencePair]:
    """At most `limit` test pairs of the source, an equal share of each objective, chosen by hash."""
    share = None if limit is None else -(-limit // len(objectives))
    pairs = []
    for objective in objectives:
        found = [p for p in read_pairs(paths, objective, "test") if p.source.startswith(source)]
        pairs += sorted(found, key=lambda p: hash_share("held-out pairs", p.id))[:share]
    return pairs[:limit]


def _items(
    tokenized: TokenizedPairs, logps: list[Tensor], reference: list[Tensor] | None
) -> list[dict[str, Any]]:
    """Margins chosen - rejected of each pair; the implicit one only where there is a reference to measure from."""
    items = []
    for index, (pair, row) in enumerate(zip(tokenized.pairs, tokenized.rows, strict=True)):
        own = logps[index].double()
        lengths = [len(response) for response in row.responses]
        average = own / own.new_tensor(lengths)
        item = {
            "id": pair.id,
            "objective": pair.objective,
            "logp_margin": float(own[0] - own[1]),
            "average_logp_margin": float(average[0] - average[1]),
            "length_margin": lengths[0] - lengths[1],
        }
        if reference is not None:
            ratios = own - reference[index].double()
            item["logratio_margin"] = float(ratios[0] - ratios[1])
        items.append(item)
    return items


def _metrics(items: list[dict[str, Any]], objectives: Sequence[str]) -> dict[str, dict[str, Any]]:
    def of(key: str, objective: str | None = None) -> dict[str, Any]:
        margins = np.array([i[key] for i in items if objective in (None, i["objective"])], dtype=float)
        return {**accuracy_with_ties(margins), "chance": 0.5}

    metrics = {}
    if "logratio_margin" in items[0]:
        metrics["implicit_reward_accuracy"] = of("logratio_margin")
        for objective in objectives:
            if any(item["objective"] == objective for item in items):
                metrics[f"implicit_reward_accuracy, {objective}"] = of("logratio_margin", objective)
    return {
        **metrics,
        "reference_free_accuracy": of("logp_margin"),
        "reference_free_accuracy, per token": of("average_logp_margin"),
        "longer_is_chosen": of("length_margin"),
    }


TASK = Task(run_hh_holdout, section="hh_holdout")
OWN_PAIRS = Task(run_heldout_pairs, section="hh_holdout")
