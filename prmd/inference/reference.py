"""The reference policy pi_ref: its samples and its log-probabilities, computed once and kept by content.

The same sample set calibrates every reward model; the same log-probabilities serve every method, beta and loss. Both
are cached in `data/cache` under the key of the base model, never of a training argument.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import CalibrationConfig, ModelConfig, SharedConfig
from prmd.inference.cache import JsonTable, ScoreTable
from prmd.inference.generation import Engine, GeneratedResponse, generate
from prmd.inference.scoring import score_logps
from prmd.inference.vllm_engine import ChosenEngine, choose_engine, require_vllm, vllm_engine
from prmd.models.chat_templates import template_fingerprint
from prmd.models.loading import base_model_key, load_causal_lm
from prmd.models.tokenization import PrefixRow, Tokens


def reference_key(model: ModelConfig, paths: ArtifactPaths, tokenizer: PreTrainedTokenizerBase) -> str:
    """Key of the reference policy: its weights, template and precision."""
    return io.fingerprint([base_model_key(model, paths), template_fingerprint(tokenizer), model.dtype])


CALIBRATION_SAMPLES = 16
"""Samples at least of each prompt that a reward model is calibrated on: they are few, and the scale is of every reward."""


def with_sample_count(shared: SharedConfig, count: int) -> SharedConfig:
    """The shared settings with this number of samples of each prompt."""
    calibration = shared.calibration.model_copy(update={"samples_per_prompt": count})
    return shared.model_copy(update={"calibration": calibration})


def calibration_sampling(shared: SharedConfig) -> SharedConfig:
    """The shared settings with the number of samples of each prompt that stage 2 calibrates on."""
    return with_sample_count(shared, max(CALIBRATION_SAMPLES, shared.calibration.samples_per_prompt))


def samples_table(shared: SharedConfig, tokenizer: PreTrainedTokenizerBase) -> JsonTable:
    """Where `reference_samples` keeps what it draws: a table of the base model, the settings of sampling and the engine."""
    return _table(shared, tokenizer)[0]


def _table(shared: SharedConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[JsonTable, ChosenEngine]:
    key = reference_key(shared.model, shared.paths, tokenizer)

    def place(engine: str) -> Path:
        settings: dict[str, Any] = _sampling(shared.calibration, shared.seed)
        if engine != "transformers":  # equal seeds, other samples
            settings["engine"] = engine
        return shared.paths.cache("samples", io.fingerprint([key, settings]))

    engine = choose_engine(shared.calibration.engine, begun=place("transformers"))
    return JsonTable(place(engine.name)), engine


def _sampling(calibration: CalibrationConfig, seed: int) -> dict[str, int]:
    return {
        "samples_per_prompt": calibration.samples_per_prompt,
        "max_new_tokens": calibration.max_new_tokens,
        "seed": seed,
    }


def check_engine(calibration: CalibrationConfig) -> None:
    """Refuse, before anything is trained, an engine that cannot sample here.

    Raises:
        ConfigError: `calibration.engine: vllm` where vLLM cannot run.
    """
    if calibration.engine == "vllm":
        require_vllm("calibration.engine")


def reference_samples(
    shared: SharedConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tokens]
) -> list[list[GeneratedResponse]]:
    """`calibration.samples_per_prompt` samples of pi_ref at temperature 1 for every prompt, from the cache or new.

    Args:
        prompts: rendered prompts with the generation prompt.
    """
    table, engine = _table(shared, tokenizer)
    with _sampler(shared, engine, [] if table.holds(prompts) else prompts) as model:
        return generate(
            model,
            tokenizer,
            prompts,
            **_sampling(shared.calibration, shared.seed),
            batch_size=shared.calibration.batch_size,
            description="reference samples",
            table=table,
        )


def _sampler(
    shared: SharedConfig, engine: ChosenEngine, prompts: Sequence[Tokens]
) -> AbstractContextManager[nn.Module | Engine | None]:
    """What samples these prompts: pi_ref, or vLLM with its own copy of it; nothing is loaded where there are none."""
    if not prompts:
        return nullcontext(None)
    engine.tell("calibration.engine")
    if engine.name == "transformers":
        return nullcontext(load_causal_lm(shared.model, shared.paths).eval())
    length = max(map(len, prompts)) + shared.calibration.max_new_tokens
    return vllm_engine(None, shared.model, shared.paths, max_length=length)


def reference_logps(
    shared: SharedConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PrefixRow]
) -> list[Tensor]:
    """log pi_ref(y|x) of every response: one [n_responses] float32 tensor of nats per row.

    Args:
        rows: tokenised for policies (`keep_suffix=False`).
    """
    model, paths = shared.model, shared.paths
    place = paths.cache("logps", reference_key(model, paths, tokenizer))
    table = ScoreTable(place, width=1, model=f"model.name: {model.name}")
    return score_logps(
        None if table.holds(rows) else load_causal_lm(model, paths).eval(),
        rows,
        table=table,
        pad_id=tokenizer.pad_token_id,
        tokens_per_batch=shared.scoring_tokens,
        description="reference log-probabilities",
    )
