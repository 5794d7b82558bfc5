"""The reference policy pi_ref: its samples and its log-probabilities, computed once and kept by content.

The same sample set calibrates every reward model; the same log-probabilities serve every method, beta and loss. Both
are cached in `data/cache` under the key of the base model, never of a training argument.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from prmd.artifacts import io
from prmd.config.shared import RewardModelConfig
from prmd.inference.cache import JsonTable, ScoreTable
from prmd.inference.generation import Engine, GeneratedResponse, generate
from prmd.inference.scoring import score_logps
from prmd.inference.vllm_engine import require_vllm, vllm_engine
from prmd.models.loading import base_model_key, load_causal_lm
from prmd.models.tokenization import PrefixRow, Tokens, template_fingerprint


def reference_key(config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Key of the reference policy: its weights, template and precision."""
    return io.fingerprint(
        [base_model_key(config.model, config.paths), template_fingerprint(tokenizer), config.model.dtype]
    )


def samples_table(config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase) -> JsonTable:
    """Where `reference_samples` keeps what it draws: a table of the base model and the settings of sampling."""
    settings: dict[str, Any] = _sampling(config)
    if config.calibration.engine != "transformers":  # equal seeds, other samples
        settings["engine"] = config.calibration.engine
    key = io.fingerprint([reference_key(config, tokenizer), settings])
    return JsonTable(config.paths.cache("samples", key))


def _sampling(config: RewardModelConfig) -> dict[str, int]:
    return {
        "samples_per_prompt": config.calibration.samples_per_prompt,
        "max_new_tokens": config.calibration.max_new_tokens,
        "seed": config.seed,
    }


def check_engine(config: RewardModelConfig) -> None:
    """Refuse, before anything is trained, an engine that cannot sample here.

    Raises:
        ConfigError: `calibration.engine: vllm` where vLLM cannot run.
    """
    if config.calibration.engine == "vllm":
        require_vllm("calibration.engine")


def reference_samples(
    config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Tokens]
) -> list[list[GeneratedResponse]]:
    """`calibration.samples_per_prompt` samples of pi_ref at temperature 1 for every prompt, from the cache or new.

    Args:
        prompts: rendered prompts with the generation prompt.
    """
    table = samples_table(config, tokenizer)
    with _sampler(config, [] if table.holds(prompts) else prompts) as model:
        return generate(
            model,
            tokenizer,
            prompts,
            **_sampling(config),
            batch_size=config.calibration.batch_size,
            description="reference samples",
            table=table,
        )


def _sampler(
    config: RewardModelConfig, prompts: Sequence[Tokens]
) -> AbstractContextManager[nn.Module | Engine | None]:
    """What samples these prompts: pi_ref, or vLLM with its own copy of it; nothing is loaded where there are none."""
    if not prompts:
        return nullcontext(None)
    if config.calibration.engine == "transformers":
        return nullcontext(load_causal_lm(config.model, config.paths).eval())
    length = max(map(len, prompts)) + config.calibration.max_new_tokens
    return vllm_engine(None, config, max_length=length)


def reference_logps(
    config: RewardModelConfig, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PrefixRow]
) -> list[Tensor]:
    """log pi_ref(y|x) of every response: one [n_responses] float32 tensor of nats per row.

    Args:
        rows: tokenised for policies (`keep_suffix=False`).
    """
    table = ScoreTable(config.paths.cache("logps", reference_key(config, tokenizer)), width=1)
    model = None if table.holds(rows) else load_causal_lm(config.model, config.paths).eval()
    return score_logps(
        model,
        rows,
        table=table,
        pad_id=tokenizer.pad_token_id,
        tokens_per_batch=config.scoring_tokens,
        description="reference log-probabilities",
    )
