"""One evaluation: the same prompts, decoding and judges for every method and its checkpoints, and the files it writes.

What is measured here of a method is measured of its checkpoints in `evaluation/frontier.py`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.paths import REFERENCE, ArtifactPaths
from prmd.artifacts.runs import is_as_recorded
from prmd.config.evaluation import EvaluationConfig, GenerationConfig
from prmd.errors import NotFiniteError
from prmd.evaluation.metrics import (
    SampledMethod,
    judge_sanity_checks,
    method_metrics,
)
from prmd.evaluation.over_optimisation import best_of_n_curves
from prmd.evaluation.scores import MemberScores, ReferenceScores, proxy_metrics
from prmd.inference.candidates import (
    Candidate,
    CandidateModels,
    EvaluationPrompt,
    evaluation_engine,
)
from prmd.inference.generation import GeneratedResponse
from prmd.judges.cards import CONSTANT_ANSWER
from prmd.judges.reward_model import Conversation, RewardModelJudge, check_scores
from prmd.models.tokenization import tokenize_row
from prmd.rewards.brought import BroughtReward
from prmd.rewards.reward_model import Scorer
from prmd.runtime import free_memory
from prmd.statistics.resampling import Resampling

logger = logging.getLogger(__name__)

TEMPERATURE = 1.0
_FORMAT = 3
"""Of the method files; raised when they gain numbers, so that older ones are computed anew (from the cache)."""


@dataclass(frozen=True)
class Evaluation:
    """What all methods of one evaluation share.

    Attributes:
        reward_models: the ensembles that the approach's policies were trained on, for the proxies; none where they are not
            there, and then nothing is said of them.
    """

    config: EvaluationConfig
    tokenizer: PreTrainedTokenizerBase
    prompts: list[EvaluationPrompt]
    judges: list[RewardModelJudge]
    reference: Candidate
    reward_models: tuple[Scorer, ...] = ()

    @property
    def generation(self) -> GenerationConfig:
        """How many responses of which length are sampled."""
        return self.config.generation

    @property
    def paths(self) -> ArtifactPaths:
        """Those of the approach."""
        return self.config.paths

    @property
    def resampling(self) -> Resampling:
        """How every interval of this evaluation is made."""
        return Resampling(self.config.bootstrap_resamples, self.config.shared.seed)

    def load(self, candidate: Candidate) -> CandidateModels:
        """The models of a candidate."""
        return CandidateModels(
            *(self.config.shared, self.generation, candidate),
            reference=self.reference,
            tokenizer=self.tokenizer,
            max_length=self.config.reward_model_config.training.max_length,
        )

    @cached_property
    def engine(self) -> str:
        """What samples every candidate."""
        return evaluation_engine(self.generation, self.paths, self.reference, self.config.shared.seed).name

    @cached_property
    def compared_on(self) -> dict[str, str]:
        """Keys of prompts, decoding, reference and judges: only results that agree in all of them are compared."""
        generation, seed = self.generation, self.config.shared.seed
        decoding = [generation.samples_per_prompt, generation.max_new_tokens, TEMPERATURE, seed]
        decoding += [self.engine] if self.engine != "transformers" else []
        return {
            "prompts": io.fingerprint([list(prompt.token_ids) for prompt in self.prompts]),
            "decoding": io.fingerprint(decoding),
            "reference": self.reference.fingerprint,
            "judges": io.fingerprint({judge.objective: judge.fingerprint for judge in self.judges}),
        }

    @cached_property
    def fingerprint(self) -> str:
        """Key of everything above and of how numbers are made of it."""
        return io.fingerprint([self.compared_on, self.config.bootstrap_resamples, _FORMAT])

    def ensembles(self, candidate: Candidate) -> dict[str, str]:
        """Keys of the ensembles whose proxies are reported of a candidate: those its own approach trained on, or none."""
        if candidate.approach != self.paths.approach or candidate.foreign is not None:
            return {}
        objectives = (judge.objective for judge in self.judges)
        return {k: m.fingerprint for k, m in zip(objectives, self.reward_models, strict=False)}

    def describe(self, candidate: Candidate) -> dict[str, Any]:
        """The `evaluate` part of a method's file."""
        generation = self.generation
        return {
            "fingerprint": self.fingerprint,
            "compared_on": self.compared_on,
            "policy": candidate.fingerprint,
            "reward_models": self.ensembles(candidate),
            "prompts": len(self.prompts),
            "samples_per_prompt": generation.samples_per_prompt,
            "max_new_tokens": generation.max_new_tokens,
            "temperature": TEMPERATURE,
            "engine": self.engine,
            "judges": {judge.objective: judge.card() for judge in self.judges},
            **({"elsewhere": candidate.foreign.said()} if candidate.foreign else {}),
        }


@dataclass(frozen=True)
class Run:
    """One candidate's samples, [X][n], and what was measured of them without a judge."""

    candidate: Candidate
    responses: list[list[GeneratedResponse]]
    sampled: SampledMethod


@dataclass(frozen=True)
class Verdicts:
    """Scores of the judges.

    Attributes:
        raw: of all samples of all runs, [methods, K, X, n].
        constant: of the constant answer to every prompt, [K, X, 1].
    """

    raw: np.ndarray
    constant: np.ndarray


def is_finished(evaluation: Evaluation, candidate: Candidate) -> bool:
    """Whether the candidate's files are there, made of the same weights by the same evaluation."""
    folder = evaluation.paths.metrics
    path = folder / f"{candidate.method}.json"
    samples = f"samples/{candidate.method}.jsonl"
    if not (path.is_file() and (folder / samples).is_file() and is_as_recorded(folder, path.name, samples)):
        return False
    found, wanted = io.read_json(path).get("evaluation", {}), evaluation.describe(candidate)
    same = all(
        found.get(key) == wanted.get(key) for key in ("fingerprint", "policy", "reward_models", "elsewhere")
    )
    if same:
        logger.info(
            "%s: evaluated before on the same prompts by the same judges, reused: %s", candidate.method, path
        )
    return same


def evaluate_methods(
    evaluation: Evaluation, todo: Sequence[Candidate], *, policies: Sequence[str]
) -> dict[str, str]:
    """Write the files of `todo`; the reference is sampled (or read from the cache) in any case.

    Args:
        policies: all that take part in the comparison, those that were evaluated before included.

    Returns:
        What is left out, with the reason: policies whose weights or probabilities are not finite.

    Raises:
        NotFiniteError: those of the reference are not, or of no policy they are.
    """
    wanted = [evaluation.reference, *(c for c in todo if c.method != REFERENCE)]
    runs, unusable = sample_usable(evaluation, wanted)
    for method in unusable:
        _forget(evaluation, method)  # what was measured of other weights under its name
    if unusable and set(policies) <= set(unusable):
        raise NotFiniteError(f"no policy can be evaluated: {'; '.join(unusable.values())}")
    verdicts = judge_runs(evaluation, runs)
    own = [run for run in runs if evaluation.ensembles(run.candidate)]
    rewards = dict(zip((run.candidate.method for run in own), _member_rewards(evaluation, own), strict=True))
    for run, raw in zip(runs, verdicts.raw, strict=True):
        if run.candidate in todo:
            metrics, calibrated = measure(evaluation, run, raw, runs[0], verdicts)
            metrics |= _proxies(evaluation, run, rewards, metrics, calibrated)
            _write_method(evaluation, run, metrics, calibrated)
    return unusable


def sample_usable(
    evaluation: Evaluation, candidates: Sequence[Candidate]
) -> tuple[list[Run], dict[str, str]]:
    """Sample the reference and the policies that can be sampled; of each other one the reason, which a warning says.

    Raises:
        NotFiniteError: the reference itself is not finite.
    """
    runs, unusable = [], {}
    for candidate in candidates:
        try:
            runs.append(sample(evaluation, candidate))
        except NotFiniteError as error:
            if candidate.method == REFERENCE:
                raise
            unusable[candidate.method] = str(error)
            logger.warning("policy %s is left out, the others are evaluated: %s", candidate.method, error)
    return runs, unusable


def _forget(evaluation: Evaluation, method: str) -> None:
    folder = evaluation.paths.metrics
    for path in (folder / f"{method}.json", folder / "samples" / f"{method}.jsonl"):
        path.unlink(missing_ok=True)


def sample(evaluation: Evaluation, candidate: Candidate) -> Run:
    """The candidate's responses to every prompt (from the cache where they lie there) with their KL."""
    prompts = evaluation.prompts
    with evaluation.load(candidate) as models:
        responses = models.samples(prompts)
        shape = (len(prompts), evaluation.generation.samples_per_prompt)
        kls = (
            np.zeros((*shape, 3))
            if models.is_reference
            else np.stack([v.numpy() for v in models.kls(prompts, responses)])
        )
    lengths = np.array([[len(r.token_ids) for r in row] for row in responses], dtype=float)
    finished = np.array([[r.finished for r in row] for row in responses])
    logger.info(
        "%s: %d responses of %.1f tokens on average, %.0f %% of them ended before the limit",
        *(candidate.method, lengths.size, lengths.mean(), 100 * finished.mean()),
    )
    return Run(
        candidate, responses, SampledMethod(candidate.method, *np.moveaxis(kls, -1, 0), lengths, finished)
    )


def judge_runs(evaluation: Evaluation, runs: Sequence[Run]) -> Verdicts:
    """Every judge's scores of all samples of all runs, the reference first, and of the constant answer, in one pass each."""
    conversations = _conversations(evaluation, runs)
    constant = [Conversation(prompt.messages, (CONSTANT_ANSWER,)) for prompt in evaluation.prompts]
    raw, null = [], []
    for judge in evaluation.judges:
        scores = judge.scores([*conversations, *constant])
        found = np.stack(scores[: len(conversations)]).reshape(len(runs), len(evaluation.prompts), -1)
        check_scores(found[0], judge)
        raw.append(found)
        null.append(np.stack(scores[len(conversations) :]))
    return Verdicts(np.stack(raw, axis=1), np.stack(null))


def _conversations(evaluation: Evaluation, runs: Sequence[Run]) -> list[Conversation]:
    return [
        Conversation(prompt.messages, tuple(response.text for response in responses))
        for run in runs
        for prompt, responses in zip(evaluation.prompts, run.responses, strict=True)
    ]


def _member_rewards(evaluation: Evaluation, runs: Sequence[Run]) -> np.ndarray:
    """Raw rewards of all samples by every member of the training ensembles, [methods, K, M, X, n]."""
    conversations, found = _conversations(evaluation, runs), []
    for model, judge in zip(evaluation.reward_models if runs else (), evaluation.judges, strict=False):
        rows = [_row_of(model, one) for one in conversations]
        scorer = replace(model)  # a copy of its own, so that its weights leave memory with it
        values = scorer.rewards(rows, description=f"{judge.objective} ensemble")
        del scorer
        free_memory()
        table = torch.stack(values).numpy().reshape(len(runs), len(evaluation.prompts), -1, model.members)
        found.append(table.transpose(0, 3, 1, 2))
    return np.stack(found, axis=1) if found else np.empty((0,))


def _row_of(model: Scorer, one: Conversation) -> Any:
    """A conversation as these rewards are computed of it."""
    if isinstance(model, BroughtReward):
        return model.rows_of_texts(one.prompt, one.responses)
    return tokenize_row(model.tokenizer, one.prompt, one.responses, keep_suffix=True)


def measure(
    evaluation: Evaluation, run: Run, raw: np.ndarray, reference_run: Run, verdicts: Verdicts
) -> tuple[dict[str, Any], np.ndarray]:
    """What the judges say of one run, and its calibrated rewards [K, X, n]; of the reference also who judged."""
    names = [judge.objective for judge in evaluation.judges]
    reference, lengths = ReferenceScores.fit(names, verdicts.raw[0]), reference_run.sampled.lengths
    metrics = method_metrics(run.sampled, raw, reference, evaluation.resampling, reference_lengths=lengths)
    if run.sampled.is_reference:
        judging = judge_sanity_checks(reference, verdicts.constant, lengths, evaluation.resampling)
        metrics["judging"] = {"answer": CONSTANT_ANSWER, "objectives": judging}
    return metrics, reference.calibrated(raw)


def _proxies(
    evaluation: Evaluation,
    run: Run,
    rewards: dict[str, np.ndarray],
    metrics: dict[str, Any],
    calibrated: np.ndarray,
) -> dict[str, Any]:
    """The `proxy` part of a method and, of the reference, the best-of-n curves; empty without the ensembles."""
    raw, names = rewards.get(run.candidate.method), tuple(metrics["objectives"])
    if raw is None:
        return {}
    scale = np.stack([model.calibration.scale.numpy() for model in evaluation.reward_models])
    members = MemberScores(names, rewards[REFERENCE], scale)
    same = run.sampled.is_reference
    found = {"proxy": proxy_metrics(raw, members, evaluation.resampling, is_reference=same)}
    if same:
        gold = ReferenceScores.fit(names, calibrated).centred(calibrated, is_reference=True)
        found["best_of_n"] = best_of_n_curves(members.reference, gold, evaluation.resampling)
    return found


def _write_method(evaluation: Evaluation, run: Run, metrics: dict[str, Any], rewards: np.ndarray) -> None:
    folder, method = evaluation.paths.metrics, run.candidate.method
    names = list(metrics["objectives"])
    samples = f"samples/{method}.jsonl"
    rows = (
        _sample_row(prompt, responses, {k: rewards[i, x] for i, k in enumerate(names)})
        for x, (prompt, responses) in enumerate(zip(evaluation.prompts, run.responses, strict=True))
    )
    io.write_jsonl(folder / samples, rows)
    ids = {"ids": [p.id for p in evaluation.prompts], "objective": [p.objective for p in evaluation.prompts]}
    record = {
        "method": method,
        "approach": run.candidate.approach,
        "evaluation": evaluation.describe(run.candidate),
        **metrics,
        **debiased_rewards(run.candidate),
        "per_prompt": ids | metrics["per_prompt"],
        "samples": samples,
    }
    io.write_json(folder / f"{method}.json", record)


def debiased_rewards(candidate: Candidate) -> dict[str, Any]:
    """The features that debiased the reward models of a policy, by objective, under `debiased`; empty without any."""
    own = candidate.directory if candidate.foreign is None else None  # whose files are not this project's
    path = own / "metrics.json" if own else None
    found = io.read_json(path).get("debiased") if path and path.is_file() else None
    return {"debiased": found} if found else {}


def _sample_row(
    prompt: EvaluationPrompt, responses: Sequence[GeneratedResponse], rewards: dict[str, np.ndarray]
) -> dict[str, Any]:
    judged = [
        {
            "text": response.text,
            "tokens": len(response.token_ids),
            "finished": response.finished,
            "rewards": {k: float(values[i]) for k, values in rewards.items()},
        }
        for i, response in enumerate(responses)
    ]
    return {
        "prompt_id": prompt.id,
        "prompt": list(prompt.messages),
        "objective": prompt.objective,
        "responses": judged,
    }
