"""Policies that were trained elsewhere: found by folder or hub id, checked against the reference, loaded whole.

Prompts, samples and KL are token ids of the reference, so a policy from elsewhere has to read and write the same ones: its
tokenizer, its chat template and the width of its logits are compared before anything is sampled. An adapter has to be one of the
configured base model. No record of this project is needed beside it.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prmd.artifacts import hub, io
from prmd.artifacts.paths import ArtifactPaths, find_user_path, places_tried
from prmd.config.shared import ModelConfig
from prmd.errors import ConfigError, NotFiniteError, first_line
from prmd.models.bases import adapter_base
from prmd.models.chat_templates import ANSWER, NEXT, QUESTION, SYSTEM, render, set_thinking, stop_token
from prmd.models.identity import content_key, weight_files
from prmd.models.loading import load_folder_config, load_model_config, load_policy, load_tokenizer_from

logger = logging.getLogger(__name__)

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
POLICY_REMEDY = "give the folder of a policy saved by save_pretrained"
_FETCHED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class ForeignPolicy:
    """A policy trained elsewhere that passed every check, and what is said of it.

    Attributes:
        name: how the configuration calls it.
        folder: where it lies here.
        source: as configured, the hub's commit behind `@`.
        base: what it is an adapter of and how that was found, or its own architecture.
        template: by whose chat template it is asked.
        adapter: kind and rank, or that it has full weights.
        key: of what its folder holds.
    """

    name: str
    folder: Path
    source: str
    base: str
    template: str
    adapter: str
    key: str

    def said(self) -> dict[str, str]:
        """`source`, `base`, `template` and `adapter`, for results."""
        return {name: asdict(self)[name] for name in ("source", "base", "template", "adapter")}


def find_foreign(
    name: str, source: str, model: ModelConfig, paths: ArtifactPaths, tokenizer: PreTrainedTokenizerBase
) -> ForeignPolicy:
    """The policy that `generation.policies` names, checked; no weights are loaded.

    Args:
        tokenizer: of the reference.

    Raises:
        ConfigError: it cannot be found, is no causal model or LoRA adapter, or does not fit the reference in base, tokenizer,
            chat template or width of its logits.
        DataError: there are no weights in its folder.
    """
    key = f"generation.policies.{name}"
    folder, shown = model_folder(source, key, POLICY_REMEDY, trust=model.trust_remote_code, ignored=["*/*"])
    weight_files(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        adapter, base = _check_adapter(folder, key), adapter_base(folder, model, paths, what=key)
    else:
        adapter, base = "none, full weights", _check_full(folder, key, model, paths)
    template = _check_tokenizer(folder, key, model, tokenizer)
    found = ForeignPolicy(name, folder, shown, base, template, adapter, content_key(folder))
    logger.info(
        "policy %s was not trained here: %s; base: %s; template: %s; adapter: %s",
        *(name, shown, base, template, adapter),
    )
    return found


def model_folder(
    source: str, key: str, remedy: str, *, trust: bool = False, ignored: Sequence[str] = ()
) -> tuple[Path, str]:
    """The local folder of a policy or judge (fetched into the hub's own cache), and how results call it.

    Args:
        source: a folder or hub id, `@revision` behind it.
        key, remedy: where it is configured and what to do without it, for messages.
        trust: whether its Python code may be fetched.
        ignored: patterns of files that are not.

    Raises:
        ConfigError: it is neither an existing folder nor a hub id that can be reached.
    """
    if folder := local_folder(source, key, remedy):
        return folder, source
    hub_id, _, revision = source.partition("@")
    patterns = [*_FETCHED, *(["*.py"] if trust else [])]
    try:
        folder = Path(
            snapshot_download(
                hub_id,
                revision=revision or None,
                allow_patterns=patterns,
                ignore_patterns=list(ignored),
                cache_dir=hub.cache_of(hub_id, revision or None),
            )
        )
    except (OSError, ValueError) as error:  # unreachable, unknown or offline
        raise ConfigError(_nowhere(source, key, first_line(error), remedy)) from error
    return folder, f"{hub_id}@{folder.name}"


def local_folder(source: str, key: str, remedy: str) -> Path | None:
    """The local folder that a source names; None where it may be on the hub, which is not asked.

    Raises:
        ConfigError: it is neither an existing folder nor what the hub could have.
    """
    if folder := find_user_path(source, "folder"):
        return folder.resolve()
    if problem := hub.id_problem(source.partition("@")[0]):
        raise ConfigError(_nowhere(source, key, problem, remedy))
    return None


def _nowhere(source: str, key: str, detail: str, remedy: str) -> str:
    return f"{key}: {source!r} is no folder ({places_tried(source)}) and cannot be fetched from the hub ({detail}); {remedy}"


# ------------------------------------------------------------------ checks
def _check_adapter(folder: Path, key: str) -> str:
    """What kind of adapter it is; one that cannot be switched off, or is none of a causal model, is refused."""
    config = io.read_json(folder / ADAPTER_CONFIG)
    kind, task, bias = config.get("peft_type"), config.get("task_type"), config.get("bias", "none")
    merge = "merge it into its base (merge_and_unload) and name that folder"
    if kind != "LORA" or task not in ("CAUSAL_LM", None):
        raise ConfigError(
            f"{key}: {folder} holds a {kind} adapter for {task}, wanted LORA for CAUSAL_LM; {merge}"
        )
    if bias != "none":
        raise ConfigError(
            f"{key}: {folder} is an adapter with trained biases (bias: {bias}), so switching it off does not give its base "
            f"again; {merge}"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(
            f"{key}: {folder} has no {ADAPTER_WEIGHTS}; save the adapter again by save_pretrained"
        )
    modules = config.get("modules_to_save")
    whole = f", and whole {', '.join(modules)}" if modules else ""
    return f"{'DoRA' if config.get('use_dora') else 'LoRA'} of rank {config.get('r')}{whole}"


def _check_full(folder: Path, key: str, model: ModelConfig, paths: ArtifactPaths) -> str:
    try:
        config = load_folder_config(folder, trust=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: {folder} is no model folder ({first_line(error)}); give one saved by save_pretrained"
        ) from error
    names = list(config.architectures or [])
    if odd := [name for name in names if "Classification" in name or "Reward" in name]:
        raise ConfigError(
            f"{key}: {folder} holds a {odd[0]}, wanted a causal language model; a reward model may judge, in judges.paths"
        )
    rows, wanted = (c.get_text_config().vocab_size for c in (config, load_model_config(model, paths)))
    if rows != wanted:
        raise ConfigError(
            f"{key}: {folder} gives logits of {rows} tokens, the reference {model.name} of {wanted}, so its KL is not defined; "
            "compare it in an evaluation of its own base (model.name)"
        )
    return f"none, {names[0] if names else config.model_type} of its own"


def _check_tokenizer(folder: Path, key: str, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """By whose template it is asked; a tokenizer or template that writes other tokens is refused."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        if (folder / ADAPTER_CONFIG).is_file():
            return "the reference's, for there is none beside the adapter"
        raise ConfigError(
            f"{key}: {folder} has no tokenizer, so nobody knows what its tokens mean; save the tokenizer beside it"
        )
    own = load_tokenizer_from(folder, trust=model.trust_remote_code)
    set_thinking(own, model.enable_thinking)
    remedy = "compare it in an evaluation of its own base (model.name)"
    if _vocabulary(own) != _vocabulary(tokenizer):
        raise ConfigError(
            f"{key}: the tokenizer in {folder} is another than that of the reference {model.name}, and prompts, samples and KL "
            f"are token ids of the reference; {remedy}"
        )
    if _rendered(own) != _rendered(tokenizer):
        raise ConfigError(
            f"{key}: the chat template in {folder} writes a conversation otherwise than that of the reference {model.name}, and "
            f"both are asked by the same tokens; {remedy}, or put the template it was trained by there if this one is not it"
        )
    return "its own, which writes what the reference's writes"


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kept = json.loads(backend.to_str()) if backend is not None else {}
    return [tokenizer.get_vocab(), *(kept.get(part) for part in ("normalizer", "pre_tokenizer", "model"))]


def _rendered(tokenizer: PreTrainedTokenizerBase) -> list[Any]:
    """What its template writes around turns: the token that ends one, and conversations with and without a system turn."""
    turns = [
        {"role": role, "content": text}
        for role, text in (("system", SYSTEM), ("user", QUESTION), ("assistant", ANSWER), ("user", NEXT))
    ]
    parts = (turns[:2], turns, turns[1:2], turns[1:])
    asked = [render(tokenizer, part, add_generation_prompt=True) for part in parts]
    answered = [render(tokenizer, part, add_generation_prompt=False) for part in (turns[:3], turns[1:3])]
    return [stop_token(tokenizer), *map(list, (*asked, *answered))]


# ------------------------------------------------------------------ loading
def load_foreign(
    policy: ForeignPolicy, model: ModelConfig, paths: ArtifactPaths
) -> PreTrainedModel | PeftModel:
    """Its model in evaluation mode, every tensor of an adapter at its place.

    Raises:
        ConfigError: its weights do not fit the base, or its own architecture.
        DataError: a tensor is missing.
        NotFiniteError: as `load_policy`.
    """
    key = f"generation.policies.{policy.name}"
    try:
        loaded = load_policy(policy.folder, model, paths)
    except torch.OutOfMemoryError:
        raise
    except NotFiniteError as error:  # whose remedy is for what was trained here
        found = str(error).rpartition("; ")[0]
        raise NotFiniteError(f"{key}: {found}; take another copy, or leave it out") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{key}: the weights in {policy.folder} do not fit ({policy.base}): {first_line(error)}; take another copy, or set "
            "model.name to the base it was trained from"
        ) from error
    if isinstance(loaded, PeftModel):
        _require_every_tensor(loaded, policy.folder, key)
    return loaded


def _require_every_tensor(model: PeftModel, folder: Path, key: str) -> None:
    """peft passes over tensors that have no place in the base, and leaves untrained what it does not find."""
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        kept = set(file.keys())
    placed = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if odd := sorted(kept ^ placed):
        raise ConfigError(
            f"{key}: {len(odd)} tensors of {folder / ADAPTER_WEIGHTS} and the base do not answer each other, the first is "
            f"{odd[0]}; set model.name to the base it was trained from, or merge it into that (merge_and_unload) and name the folder"
        )
