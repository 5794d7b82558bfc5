"""The candidates of an evaluation, the reference and every finished policy: found, loaded one at a time, sampled, scored.

Samples, log-probabilities and KL of a candidate are cached by content, and its weights are loaded only for what the cache
lacks. A LoRA policy and the reference are one model in memory (its adapters are switched off); a policy with full weights
needs the reference beside it. What the numbers say is in `evaluation.metrics`, to be read next; judging is in `judges`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.manifest import EVERYTHING
from prmd.artifacts.paths import REFERENCE, ArtifactPaths, policy_command
from prmd.artifacts.runs import read_run, require_artifact
from prmd.config.evaluation import GenerationConfig
from prmd.config.shared import ModelConfig, SharedConfig
from prmd.errors import ConfigError, DataError
from prmd.inference.cache import JsonTable, ScoreTable
from prmd.inference.generation import Engine, GeneratedResponse, generate, sample_rows
from prmd.inference.kl import response_kls
from prmd.inference.reference import reference_key, reference_logps
from prmd.inference.scoring import lookup, score_logps, score_rows
from prmd.inference.vllm_engine import ChosenEngine, choose_engine, require_vllm, vllm_engine
from prmd.models.agreement import check_agreement
from prmd.models.bases import check_base
from prmd.models.chat_templates import render
from prmd.models.foreign import ForeignPolicy, find_foreign, load_foreign
from prmd.models.identity import model_files
from prmd.models.loading import load_causal_lm, load_policy
from prmd.models.sequence_models import SequenceLogps, supports_shared_prompts
from prmd.models.tokenization import PrefixRow, Tokens, fit_messages
from prmd.pairs import Message, PreferencePair, hash_share, read_pairs
from prmd.runtime import free_memory, get_device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One row of the results.

    Attributes:
        method: name of the policy's folder, `<approach>@` in front of it for another approach's; or `reference`.
        directory: the policy's folder; None for the reference.
        fingerprint: key of its weights.
        approach: whose data it was trained on; of a policy from elsewhere, whose prompts it answers.
        foreign: what was found of a policy that was not trained here; else None.
    """

    method: str
    directory: Path | None
    fingerprint: str
    approach: str
    foreign: ForeignPolicy | None = None


@dataclass(frozen=True)
class EvaluationPrompt:
    """A held-out prompt, cut to the length policies see: its messages, and its tokens with the generation prompt."""

    id: str
    objective: str
    messages: tuple[Message, ...]
    token_ids: Tokens


# ------------------------------------------------------------------ who and on what
def policy_folders(paths: ArtifactPaths) -> list[Path]:
    """Every finished policy of the approach by name; an unfinished folder is left out with a warning."""
    folders = [folder for folder in sorted(paths.policies.glob("[!.]*")) if folder.is_dir()]
    finished = [folder for folder in folders if read_run(folder) is not None]
    for folder in folders:
        if folder not in finished:
            logger.warning("%s: no run.json, so it is not finished; left out", folder)
    return finished


def find_candidates(
    model: ModelConfig,
    paths: ArtifactPaths,
    tokenizer: PreTrainedTokenizerBase,
    *,
    other_approaches: Sequence[str],
    elsewhere: Mapping[str, str] | None = None,
) -> list[Candidate]:
    """The reference first, then every finished policy of the approach of `paths`, those of `other_approaches`, and `elsewhere`.

    Args:
        elsewhere: `generation.policies`, name to folder or hub id.

    Raises:
        DataError: a policy's file is lost or changed.
        ConfigError: a policy was trained from another base model; one from elsewhere does not fit, or is called as another.
    """
    own, key = paths.approach, reference_key(model, paths, tokenizer)
    found = [Candidate(REFERENCE, None, key, own)]
    for approach in (own, *(a for a in other_approaches if a != own)):
        trained = replace(paths, approach=approach)
        folders = policy_folders(trained)
        if not folders:
            alone = "; the reference is evaluated alone" if approach == own else ""
            logger.warning("%s: no finished policy%s", trained.policies, alone)
        for folder in folders:
            name = folder.name if approach == own else f"{approach}@{folder.name}"
            what, command = f"policy {name}", policy_command(folder.name)
            require_artifact(folder, what=what, command=command, read=EVERYTHING)
            check_base(folder, model, paths, what=what, command=command)
            found.append(Candidate(name, folder, policy_key(key, folder), approach))
    taken = {candidate.method.lower() for candidate in found}
    for name, source in (elsewhere or {}).items():
        if name.lower() in taken:
            raise ConfigError(
                f"generation.policies: got the name {name}, which a policy in {paths.policies} has; choose another"
            )
        foreign = find_foreign(name, source, model, paths, tokenizer)
        found.append(Candidate(name, foreign.folder, io.fingerprint([key, foreign.key]), own, foreign))
    return found


def policy_key(behind: str, folder: Path) -> str:
    """Key of a policy's folder or of a checkpoint in it.

    Args:
        behind: key of the reference, of which a policy may be an adapter; of a checkpoint, that of its policy.
    """
    return io.fingerprint([behind, io.fingerprint(model_files(folder))])


def evaluation_prompts(
    generation: GenerationConfig,
    paths: ArtifactPaths,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> list[EvaluationPrompt]:
    """`generation.prompts` distinct prompts of the test splits, the objectives taking turns, in the order of a hash.

    No two share their first human turn, so prompts are independent units for every interval.

    Args:
        max_length: `training.max_length`, which the prompts of policies are cut to.

    Raises:
        ConfigError: `generation.engine` cannot answer them here.
        DataError: the data is not prepared, a test split is empty, or a prompt cannot be cut to `training.max_length`.
    """
    if generation.engine == "vllm":
        require_vllm("generation.engine")
    wanted = generation.prompts
    tests = [read_pairs(paths, objective, "test") for objective in paths.objectives]
    queues = [iter(sorted(pairs, key=lambda p: hash_share("evaluation prompts", p.id))) for pairs in tests]
    chosen: dict[str, PreferencePair] = {}
    while queues and len(chosen) < wanted:
        for queue in list(queues):
            pair = next((p for p in queue if p.prompt_key not in chosen), None)
            if pair is None:
                queues.remove(queue)
            elif len(chosen) < wanted:
                chosen[pair.prompt_key] = pair
    if len(chosen) < wanted:
        logger.warning(
            "generation.prompts: wanted %d, the test splits hold %d distinct prompts", wanted, len(chosen)
        )
    return [_fitted(pair, tokenizer, max_length) for pair in chosen.values()]


def _fitted(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EvaluationPrompt:
    messages = fit_messages(tokenizer, pair.prompt, max_length)
    if messages is None:
        raise DataError(
            f"{pair.id}: its prompt cannot be cut to training.max_length={max_length} tokens; raise it"
        )
    tokens = tuple(render(tokenizer, messages, add_generation_prompt=True))
    return EvaluationPrompt(pair.id, pair.objective, messages, tokens)


def evaluation_engine(
    generation: GenerationConfig, paths: ArtifactPaths, reference: Candidate, seed: int
) -> ChosenEngine:
    """What samples every candidate of an evaluation: of `auto`, what the reference was sampled with if it was."""
    begun = _samples_place(generation, paths, reference, seed, "transformers")
    return choose_engine(generation.engine, begun)


def _samples_place(
    generation: GenerationConfig, paths: ArtifactPaths, candidate: Candidate, seed: int, engine: str
) -> Path:
    """The folder of a candidate's samples."""
    key = [candidate.fingerprint, generation.max_new_tokens, generation.samples_per_prompt, seed]
    key += [engine] if engine != "transformers" else []  # equal seeds, other samples
    return paths.cache("samples", io.fingerprint(key))


# ------------------------------------------------------------------ what a candidate computes
class CandidateModels(AbstractContextManager["CandidateModels"]):
    """A candidate's policy and the reference, loaded when first needed and let go by `close`.

    Args:
        candidate: whose samples and scores are wanted.
        reference: the reference itself, whose key is part of what is cached.
        max_length: tokens of the longest prompt, as of `evaluation_prompts`.
    """

    def __init__(
        self,
        shared: SharedConfig,
        generation: GenerationConfig,
        candidate: Candidate,
        *,
        reference: Candidate,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
    ) -> None:
        self.shared, self.generation, self.max_length = shared, generation, max_length
        self.candidate, self.reference, self.tokenizer = candidate, reference, tokenizer

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def is_reference(self) -> bool:
        return self.candidate.directory is None

    @cached_property
    def policy(self) -> nn.Module:
        """The policy in evaluation mode, loaded on first use."""
        shared = self.shared
        if self.candidate.directory is None:
            return load_causal_lm(shared.model, shared.paths).eval()
        if self.candidate.foreign is not None:
            return load_foreign(self.candidate.foreign, shared.model, shared.paths)
        return load_policy(self.candidate.directory, shared.model, shared.paths)

    @cached_property
    def _full_reference(self) -> nn.Module:
        return load_causal_lm(self.shared.model, self.shared.paths).eval()

    @cached_property
    def _engine(self) -> ChosenEngine:
        return evaluation_engine(self.generation, self.shared.paths, self.reference, self.shared.seed)

    @contextmanager
    def as_reference(self) -> Iterator[nn.Module]:
        """The reference: the policy's own weights without adapters where it has some, else a second model."""
        if self.is_reference:
            yield self.policy
        elif isinstance(self.policy, PeftModel):
            with self.policy.disable_adapter():
                yield self.policy
        else:
            yield self._full_reference

    def close(self) -> None:
        """Free the models' memory."""
        self.__dict__.pop("policy", None)
        self.__dict__.pop("_full_reference", None)
        free_memory()

    def samples(self, prompts: Sequence[EvaluationPrompt]) -> list[list[GeneratedResponse]]:
        """`generation.samples_per_prompt` responses to every prompt, at temperature 1 and top-p 1."""
        settings, seed, paths = self.generation, self.shared.seed, self.shared.paths
        table = JsonTable(_samples_place(settings, paths, self.candidate, seed, self._engine.name))
        tokens = [prompt.token_ids for prompt in prompts]
        with self._sampler(needed=not table.holds(tokens)) as sampler:
            return generate(
                sampler,
                self.tokenizer,
                tokens,
                samples_per_prompt=settings.samples_per_prompt,
                max_new_tokens=settings.max_new_tokens,
                # Every method has its own noise: equal noise would couple sample i of a policy with sample i of the
                # reference, and a win rate is over independent samples.
                seed=int(io.fingerprint([seed, self.candidate.method])[:8], 16),
                batch_size=settings.batch_size,
                description=f"{self.candidate.method}: sampling",
                table=table,
            )

    def _sampler(self, *, needed: bool) -> AbstractContextManager[nn.Module | Engine | None]:
        """The policy, or vLLM with its own copy of it, which is gone before anything is scored."""
        if not needed:
            return nullcontext(None)
        shared, settings = self.shared, self.generation
        self._engine.tell("generation.engine")
        if self._engine.name == "transformers":
            return nullcontext(self.policy)
        length = self.max_length + settings.max_new_tokens
        return vllm_engine(self.candidate.directory, shared.model, shared.paths, max_length=length)

    def logps(self, rows: Sequence[PrefixRow]) -> list[Tensor]:
        """log pi(y|x) of every response: one [n_responses] float32 tensor per row, nats."""
        place = self.shared.paths.cache("logps", self.candidate.fingerprint)
        table = ScoreTable(place, 1, model=self.candidate.method)
        return score_logps(
            None if table.holds(rows) else self.policy,
            rows,
            table=table,
            pad_id=self.tokenizer.pad_token_id,
            tokens_per_batch=self.shared.scoring_tokens,
            description=f"{self.candidate.method}: log-probabilities",
        )

    def reference_logps(self, rows: Sequence[PrefixRow]) -> list[Tensor]:
        """The same under the reference; nothing is computed where the reference was scored first."""
        return reference_logps(self.shared, self.tokenizer, rows)

    def kls(
        self, prompts: Sequence[EvaluationPrompt], responses: Sequence[Sequence[GeneratedResponse]]
    ) -> list[Tensor]:
        """(exact KL, k1, k3) of every sampled response: one [n_responses, 3] float32 tensor per prompt, nats."""
        rows = sample_rows([p.token_ids for p in prompts], responses, self.tokenizer, keep_suffix=False)
        key = io.fingerprint([self.candidate.fingerprint, self.reference.fingerprint, "k3"])
        table = ScoreTable(self.shared.paths.cache("kl", key), 3, model=self.candidate.method)
        if table.holds(rows):
            return [lookup(table, row) for row in rows]
        longest = max(row.longest for row in rows)
        share_prompt = self._share_prompts(self.policy, longest)
        with self.as_reference() as reference:  # of another architecture than a policy from elsewhere may be
            share_prompt &= self._share_prompts(reference, longest)
        return score_rows(
            rows,
            lambda batch: response_kls(self.policy, self.as_reference, batch),
            table=table,
            pad_id=self.tokenizer.pad_token_id,
            tokens_per_batch=self.shared.scoring_tokens,
            share_prompt=share_prompt,
            device=get_device(),
            description=f"{self.candidate.method}: KL",
        )

    @staticmethod
    def _share_prompts(model: nn.Module, longest: int) -> bool:
        scorer = SequenceLogps(model)
        check_agreement(model, scorer, longest=longest)
        return supports_shared_prompts(scorer.unwrapped.config, longest)
