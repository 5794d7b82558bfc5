"""Sampling with vLLM on Linux, for `generation.generate` (`engine: vllm`); an optional package.

vLLM reads a folder or hub id itself: the base, the base with a policy's LoRA adapter, or a policy's full weights. Its noise
is its own and its kernels round unlike transformers', so the same seed gives other samples of the same distribution, and what
is cached is keyed by the engine. Every sample has a generator of its own, seeded by seed, prompt and number: what else is
asked, in which order, and what the cache lacks change no noise. Logits do depend on how vLLM batches, so a sample may differ
where two tokens were nearly even. Which engine `auto` takes is decided here; who is sampled is in `candidates` and `reference`.
"""

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prmd.artifacts import hub, io
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import ModelConfig, SamplingEngine
from prmd.errors import ConfigError, first_line
from prmd.inference.generation import Decoding
from prmd.models.loading import model_source
from prmd.models.tokenization import Tokens
from prmd.runtime import free_memory, get_device, get_runtime

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for; it takes no others."""


def require_vllm(key: str) -> None:
    """Refuse the engine where it cannot run, before any model is loaded.

    Args:
        key: the setting that asks for it.

    Raises:
        ConfigError: another system than Linux, several processes, or the package is missing.
    """
    if found := _obstacle():
        problem, remedy = found
        raise ConfigError(f"{key}: {problem}; {remedy}set {key}: transformers")


def _obstacle() -> tuple[str, str] | None:
    """Why vLLM cannot run here, and what beside the other engine would mend it; None where nothing is known."""
    if sys.platform != "linux":
        return f"vllm runs on Linux alone, this is {sys.platform}", ""
    if (processes := get_runtime().world_size) > 1:
        return (
            f"vllm starts processes of its own, got {processes} of a launcher",
            "start the script with plain python, or ",
        )
    if importlib.util.find_spec("vllm") is None:
        return "the package vllm is not installed", "pip install vllm, or "
    return None


@dataclass(frozen=True)
class ChosenEngine:
    """What samples.

    Attributes:
        name: `transformers` or `vllm`.
        reason: why `auto` took it; empty where it was set.
    """

    name: str
    reason: str = ""

    def tell(self, key: str) -> None:
        """Log the choice that `auto` left, when something is going to be sampled."""
        if self.reason:
            logger.info("%s: auto takes %s: %s", key, self.name, self.reason)


def choose_engine(setting: SamplingEngine, begun: Path) -> ChosenEngine:
    """The engine that is set; of `auto`, vLLM where it can run on a card, unless transformers has begun these samples.

    Args:
        begun: the table that transformers fills: what is finished, or half so, is not drawn again by another engine.
    """
    if setting != "auto":
        return ChosenEngine(setting)
    if any(begun.glob("shard-*")):
        return ChosenEngine("transformers", "it drew the samples that are kept")
    if found := _obstacle():
        return ChosenEngine("transformers", found[0])
    if get_device().type != "cuda":
        return ChosenEngine("transformers", "there is no GPU")
    return ChosenEngine("vllm", "it is installed and there is a GPU")


class VllmEngine:
    """A policy that vLLM serves.

    Args:
        policy: a policy's folder, with an adapter or with full weights; None for the base itself.
        model: which base model, in which precision.
        paths: below which `model_source` finds it.
        max_length: tokens of prompt and response together.
    """

    def __init__(
        self, policy: Path | None, model: ModelConfig, paths: ArtifactPaths, *, max_length: int
    ) -> None:
        try:
            import vllm  # absent on most machines, and slow to import
        except ImportError as error:
            raise ConfigError(
                f"the installed package vllm cannot be imported ({first_line(error)}); install it again, or set "
                "calibration.engine and generation.engine: transformers"
            ) from error

        free_memory()  # vLLM asks for most of the card at once
        self._vllm, self._request = vllm, None
        folder, adapter = model_source(model, paths), {}
        if policy is not None and (policy / ADAPTER_CONFIG).is_file():
            from vllm.lora.request import LoRARequest

            self._request = LoRARequest(policy.name, 1, str(policy))
            rank = io.read_json(policy / ADAPTER_CONFIG)["r"]
            adapter = {
                "enable_lora": True,
                "max_lora_rank": next((size for size in LORA_RANKS if size >= rank), rank),
            }
        elif policy is not None:
            folder = str(policy)
        self._llm = vllm.LLM(
            model=folder,
            revision=None if Path(folder).is_dir() else model.revision,
            download_dir=None if Path(folder).is_dir() else hub.cache_of(folder, model.revision),
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            max_model_len=max_length,
            skip_tokenizer_init=True,
            generation_config="vllm",  # the model's own settings are never used
            **adapter,
        )

    def sample(
        self, prompts: Sequence[Tokens], seeds: Sequence[int], decoding: Decoding
    ) -> list[list[list[int]]]:
        """As `generation.Engine`; sample i of a prompt has the prompt's seed plus i, by vLLM's own rule.

        Seeds of prompts are 56 digits of a hash, so that no two samples share one.
        """
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._parameters(seed, decoding) for seed in seeds],
            lora_request=self._request,
            use_tqdm=False,
        )
        return [[_tokens(answer, decoding.stop) for answer in output.outputs] for output in outputs]

    def _parameters(self, seed: int, decoding: Decoding) -> Any:
        return self._vllm.SamplingParams(
            n=decoding.samples_per_prompt,
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_tokens=decoding.max_new_tokens,
            seed=seed,
            stop_token_ids=[decoding.stop],
            ignore_eos=True,  # the end of turn alone ends a response, as with transformers
            detokenize=False,
        )

    def close(self) -> None:
        """Give the card's memory back; vLLM ends its processes with its last reference."""
        del self._llm
        free_memory()


def _tokens(answer: Any, stop: int) -> list[int]:
    """Tokens of one answer, behind which vLLM may leave out the token that it stopped at."""
    tokens = list(answer.token_ids)
    if answer.finish_reason == "stop" and tokens[-1:] != [stop]:
        tokens.append(stop)
    return tokens


@contextmanager
def vllm_engine(
    policy: Path | None, model: ModelConfig, paths: ArtifactPaths, *, max_length: int
) -> Iterator[VllmEngine]:
    """An engine for the time of a `with` block; arguments as of `VllmEngine`."""
    engine = VllmEngine(policy, model, paths, max_length=max_length)
    try:
        yield engine
    finally:
        engine.close()
