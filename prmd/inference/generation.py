"""Sampling responses from a policy: batched, sorted by length, from a recorded seed.

Every sample brings its own noise (`noise`), so batches are a matter of speed: which prompts a table lacks, their order, the
batch size and the number of processes change no sample but by the rounding of the model's logits. A prompt is read once for
all its samples, and samples that have ended leave their batch. The model's own generation settings are never used:
temperature, top-p and length are arguments, so that samples at temperature 1 and top-p 1 really come from the policy. Which
prompts share a batch is in `batching`, the optional engine in `vllm_engine`; judging and scoring of samples are elsewhere.
"""

import hashlib
import inspect
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prmd.config.shared import BatchSize
from prmd.errors import NotFiniteError, UserError
from prmd.inference.batching import Batch, BatchPlan, Halving, Sampled
from prmd.inference.cache import JsonTable, tokens_key
from prmd.inference.noise import KeyedGumbel, sample_key
from prmd.inference.scoring import gather, keep_in_turns, place_among_processes
from prmd.models.chat_templates import read_template, stop_token
from prmd.models.tokenization import PrefixRow, Tokens
from prmd.runtime import is_main_process, progress

logger = logging.getLogger(__name__)

TURNS_PER_SHARD = 8
"""In several processes a table is saved after this many turns (`scoring.keep_in_turns`)."""

ENDED_SHARE = 0.25
"""Samples leave their batch once so many of it have ended: each time what the others have cached is copied."""

_REPEATABLE = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers of a cache that holds nothing but keys and values, which samples of a prompt can begin with."""


@dataclass(frozen=True)
class GeneratedResponse:
    """One sampled response.

    Attributes:
        text: decoded without special tokens, stripped.
        token_ids: sampled tokens, the end-of-turn token included where `finished`.
        finished: whether the policy ended its turn before the token limit.
    """

    text: str
    token_ids: Tokens
    finished: bool


@dataclass(frozen=True)
class Decoding:
    """How responses are sampled.

    Attributes:
        seed: every sample has its own noise, made of this one, of its prompt and of its number (`noise.sample_key`).
        temperature: 0 decodes greedily.
        stop: token that ends a response.
        pad: token in front of the shorter prompts of a batch.
    """

    samples_per_prompt: int
    max_new_tokens: int
    seed: int
    temperature: float
    top_p: float
    stop: int
    pad: int

    def seed_of(self, key: str) -> int:
        """The seed of the prompt with this key for an engine, whoever samples it and whatever was sampled before."""
        digest = hashlib.sha256(f"{self.seed}-{key}".encode()).digest()
        return int.from_bytes(digest[:7], "little")

    def noise_keys(self, prompts: Sequence[Tokens]) -> list[int]:
        """The key of the noise of every sample of these prompts, those of a prompt together."""
        keys, numbers = [tokens_key(prompt).hex() for prompt in prompts], range(self.samples_per_prompt)
        return [sample_key(self.seed, key, number) for key in keys for number in numbers]


@dataclass(frozen=True)
class SamplingSpeed:
    """What a sampling took.

    Attributes:
        responses, tokens: newly sampled by all processes, ends of turns counted.
        seconds: of the sampling alone, without loading.
    """

    responses: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Engine(Protocol):
    """What samples in place of a transformers model (`vllm_engine`)."""

    def sample(
        self, prompts: Sequence[Tokens], seeds: Sequence[int], decoding: Decoding
    ) -> list[list[list[int]]]:
        """For each prompt the tokens of its responses, the stop token included where one was reached."""


def generate(
    model: nn.Module | Engine | None,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    seed: int,
    batch_size: BatchSize,
    description: str,
    temperature: float = 1.0,
    top_p: float = 1.0,
    table: JsonTable | None = None,
) -> list[list[GeneratedResponse]]:
    """Sample `samples_per_prompt` responses to each prompt.

    Under several processes each samples its share of the batches, the main one writes the table, and every process
    returns everything. A prompt's samples are the same whatever else is sampled: what a table lacks, in batches of any
    size, in any order and by any number of processes, up to the rounding of the logits, which batches of other shapes may
    change (visible in bfloat16, hardly in float32). What is in the table is returned as it is, by whichever version it was
    sampled: a table may hold prompts of an earlier version beside new ones.

    Args:
        model: the policy, or an engine that serves it; None where `table` already holds every prompt.
        prompts: rendered prompts with the generation prompt (`models.tokenization.tokenize_prompt`).
        batch_size: responses generated together; `auto` as of `batching.BatchPlan`. A batch that does not fit the memory is
            halved, and so are all that follow.
        temperature: 0 decodes greedily.
        table: finished prompts are read from it and new ones are added, so that an interruption costs little; its
            folder must be keyed by the model, by the engine and by the arguments above.

    Returns:
        For each prompt, in order, its responses. The log line of what was new carries a `SamplingSpeed` as `sampling`.

    Raises:
        NotFiniteError: the model's next-token probabilities are NaN.
        ConfigError: the samples of a single prompt do not fit the memory.
    """
    stop, pad = stop_token(tokenizer), tokenizer.pad_token_id
    decoding = Decoding(samples_per_prompt, max_new_tokens, seed, temperature, top_p, stop, pad)
    keys = [tokens_key(prompt).hex() for prompt in prompts]
    found = {key: table[key] for key in keys if table is not None and key in table}
    missing = {k: p for k, p in zip(keys, prompts, strict=True) if k not in found}
    plan = BatchPlan(samples_per_prompt, max_new_tokens, batch_size)
    batches, began = plan.batches(model, missing), time.monotonic()
    sample = Halving(lambda batch: _sample(model, batch, decoding), plan, description)
    turns = _sample_in_turns(sample, batches, description)
    keep_in_turns(turns, partial(_keep, found, table), every=TURNS_PER_SHARD)
    _tell_speed([found[key] for key in missing], began, batches, description)
    return [[_response(tokenizer, ids, stop) for ids in found[key]] for key in keys]


def _sample_in_turns(sample: Halving, batches: Sequence[Batch], description: str) -> Iterator[list[Sampled]]:
    """In every turn each process samples one batch; yields what all of them have, in the order of the batches."""
    rank, world = place_among_processes()
    for turn in progress(range(0, len(batches), world), -(-len(batches) // world), description):
        batch = batches[turn + rank] if turn + rank < len(batches) else []
        own: list[Sampled] = []
        wrong: list[UserError] = []
        try:
            own = sample(batch)
        except UserError as error:
            wrong.append(type(error)(f"{description}: {error}"))
        if said := gather(wrong):  # every process hears of it, and none waits for the others
            raise said[0]
        yield gather(own)


def _sample(model: nn.Module | Engine, batch: Batch, decoding: Decoding) -> list[Sampled]:
    keys, prompts = [key for key, _ in batch], [prompt for _, prompt in batch]
    if isinstance(model, nn.Module):
        tokens = _generate_batch(model, prompts, decoding)
    else:
        tokens = model.sample(prompts, [decoding.seed_of(key) for key in keys], decoding)
    return list(zip(keys, tokens, strict=True))


def _keep(found: dict[str, list[list[int]]], table: JsonTable | None, fresh: list[Sampled]) -> None:
    found.update(fresh)
    if table is not None:
        table.append(fresh, write=is_main_process())


def _tell_speed(
    samples: Sequence[Sequence[Sequence[int]]], began: float, batches: Sequence[Batch], description: str
) -> None:
    if not samples:
        return
    each, tokens = len(samples[0]), sum(len(ids) for group in samples for ids in group)
    at_once = each * max(map(len, batches))
    speed = SamplingSpeed(each * len(samples), tokens, max(time.monotonic() - began, 1e-9))
    logger.info(
        "%s: %s responses to %s prompts, %s tokens in %.1f s, %s tokens per second, up to %d responses at once",
        *(description, f"{speed.responses:,}", f"{len(samples):,}", f"{tokens:,}", speed.seconds),
        *(f"{speed.tokens_per_second:,.0f}", at_once),
        extra={"sampling": speed},
    )


class _RefuseNotFinite(LogitsProcessor):
    """Looks at the logits of every token: NaN would end a sampling with a library's error, and a greedy one silently."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        bad = ~torch.isfinite(scores.amax(dim=-1))  # -inf alone is a token that cannot be said
        if bool(bad.any()):
            raise NotFiniteError(
                f"the next-token logits of {int(bad.sum())} of {len(bad)} responses are not finite "
                f"behind {input_ids.shape[1]} tokens; train the policy again, or set another model.dtype"
            )
        return scores


class _ManyEnded(StoppingCriteria):
    """Pauses the decoding of a batch once `ENDED_SHARE` of it has ended."""

    def __init__(self, stop: int) -> None:
        self._stop, self._ended = stop, None

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **keywords: object) -> Tensor:
        """[R] equal booleans: whether to pause."""
        now = input_ids[:, -1] == self._stop
        self._ended = now if self._ended is None else self._ended | now
        return (self._ended.float().mean() >= ENDED_SHARE).expand(len(now))


@torch.inference_mode()
def _generate_batch(model: nn.Module, prompts: Sequence[Tokens], decoding: Decoding) -> list[list[list[int]]]:
    device, n = next(model.parameters()).device, decoding.samples_per_prompt
    width = max(map(len, prompts))
    input_ids = torch.tensor([[decoding.pad] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    noise_keys = torch.tensor(decoding.noise_keys(prompts), device=device)
    with _settings_of(model, decoding):
        cache, logits = _read_prompts(model, input_ids, mask, decoding)
        input_ids, mask = input_ids.repeat_interleave(n, dim=0), mask.repeat_interleave(n, dim=0)
        if cache is not None:
            cache.batch_repeat_interleave(n)
            scores = _processors(decoding, noise_keys, width)(input_ids, logits.repeat_interleave(n, dim=0))
            input_ids = torch.cat([input_ids, scores.argmax(dim=-1, keepdim=True)], dim=1)
        rows = _decode(model, input_ids, mask, cache, noise_keys, width, decoding)
    return [rows[i : i + n] for i in range(0, len(rows), n)]


@contextmanager
def _settings_of(model: nn.Module, decoding: Decoding) -> Iterator[None]:
    """For the time of a `with` block in place of the model's own settings, which would fill every unset field."""
    own = model.generation_config
    model.generation_config = _transformers_settings(decoding, decoding.max_new_tokens)
    try:
        yield
    finally:
        model.generation_config = own


def _read_prompts(
    model: nn.Module, input_ids: Tensor, mask: Tensor, decoding: Decoding
) -> tuple[DynamicCache | None, Tensor]:
    """Keys and values of each prompt, or None of a family that keeps something else; logits [B, V] of the first tokens.

    Args:
        input_ids, mask: [B, P], padded on the left.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = DynamicCache(config=base.config.get_text_config(decoder=True))
    if any(type(layer) not in _REPEATABLE for layer in cache.layers):
        return None, torch.empty(0)
    if "past_key_values" not in inspect.signature(base.forward).parameters:
        return None, torch.empty(0)
    settings = _transformers_settings(decoding, 1)
    settings.return_dict_in_generate = settings.output_logits = True
    output = model.generate(
        input_ids=input_ids, attention_mask=mask, past_key_values=cache, generation_config=settings
    )
    return (cache if cache.get_seq_length() == input_ids.shape[1] else None), output.logits[0]


def _decode(
    model: nn.Module,
    input_ids: Tensor,
    mask: Tensor,
    cache: DynamicCache | None,
    noise_keys: Tensor,
    width: int,
    decoding: Decoding,
) -> list[list[int]]:
    """The tokens of each row's response; rows that have ended leave the batch, where there is a cache to go on from.

    Args:
        input_ids: prompts padded on the left, and the first tokens behind them where there is a cache.
        mask: of the prompts, [R, P].
        noise_keys: int64 [R].
        width: P.
    """
    found, end = [list[int]() for _ in input_ids], width + decoding.max_new_tokens
    rows = torch.arange(len(found), device=input_ids.device)
    while True:
        sampled = input_ids[:, width:]
        ended = (sampled == decoding.stop).any(dim=1) | (input_ids.shape[1] == end)
        for row, tokens in zip(rows[ended].tolist(), sampled[ended].tolist(), strict=True):
            found[row] = _cut(tokens, decoding.stop)
        if bool(ended.any()):
            rows, input_ids, mask = rows[~ended], input_ids[~ended], mask[~ended]
            if cache is not None:
                cache.batch_select_indices((~ended).nonzero()[:, 0])
        if not len(rows):
            return found
        input_ids = model.generate(
            input_ids=input_ids,
            attention_mask=functional.pad(mask, (0, input_ids.shape[1] - width), value=1),
            past_key_values=cache,
            generation_config=_transformers_settings(decoding, end - input_ids.shape[1]),
            logits_processor=_processors(decoding, noise_keys[rows], width),
            stopping_criteria=StoppingCriteriaList([_ManyEnded(decoding.stop)] if cache is not None else []),
        )


def _transformers_settings(decoding: Decoding, max_new_tokens: int) -> GenerationConfig:
    """The argmax of what `_processors` return: with their noise a sample, without any the greedy choice."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        eos_token_id=[decoding.stop],
        pad_token_id=decoding.pad,
    )


def _processors(decoding: Decoding, noise_keys: torch.Tensor, prompt_width: int) -> LogitsProcessorList:
    """A look at the logits, then temperature, top-p and noise, none of these at temperature 0."""
    if decoding.temperature == 0:
        return LogitsProcessorList([_RefuseNotFinite()])
    warpers = [TemperatureLogitsWarper(decoding.temperature)] if decoding.temperature != 1 else []
    warpers += [TopPLogitsWarper(decoding.top_p)] if decoding.top_p < 1 else []
    return LogitsProcessorList([_RefuseNotFinite(), *warpers, KeyedGumbel(noise_keys, prompt_width)])


def _cut(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def _response(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop: int) -> GeneratedResponse:
    finished = bool(ids) and ids[-1] == stop
    text = tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True).strip()
    return GeneratedResponse(text, tuple(ids), finished)


def sample_rows(
    prompts: Sequence[Tokens],
    responses: Sequence[Sequence[GeneratedResponse]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep_suffix: bool,
) -> list[PrefixRow]:
    """Rows of a prompt and its samples, by the tokens that were sampled (for reward models: `rewards.reward_model.rows_of_samples`).

    Args:
        keep_suffix: put behind the end of turn what the template puts there, an unfinished response closed in the same way:
            as reward models read samples in earlier versions. Policies are scored on the sampled tokens alone.
    """
    closing = read_template(tokenizer).closing if keep_suffix else ()

    def tokens(sample: GeneratedResponse) -> Tokens:
        if not keep_suffix:
            return sample.token_ids
        said = sample.token_ids[:-1] if sample.finished else sample.token_ids
        return (*said, *closing) or sample.token_ids

    return [
        PrefixRow(p, tuple(tokens(s) for s in samples)) for p, samples in zip(prompts, responses, strict=True)
    ]
