"""A training step run on tensors without storage, to learn the bytes it would hold.

A few layers of the configured model are run forward and backward through `models.sequence_models`, on fake tensors that have
shapes and no data, two and three of each kind (recomputed, kept), and the count is continued linearly to all layers. So attention masks, autocast copies,
recomputed layers, blocks of logits and gradients of tied embeddings are counted as they happen, whatever the family of
the model. `TensorBytes` counts live tensors while any code runs: a dispatch mode sees every tensor an operator returns
and forgets it when its storage is freed, so the count has no allocator's rounding in it; scratch space inside one operator
is not seen.
"""

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from prmd.config.shared import LoraConfig
from prmd.models.attention import or_eager, plain_attention
from prmd.models.classifiers import provide_classifier
from prmd.models.loading import add_lora
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.runtime import get_device


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is entered, on top of `existing` ones.

    Example:
        with TensorBytes(model.parameters()) as count:
            model(**batch).sum().backward()
        count.peak

    Args:
        existing: tensors made before, counted from the start (weights, optimiser states).

    Attributes:
        current: bytes alive now.
        peak: most bytes alive at once since entering or `reset_peak`.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.register(existing)

    def register(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made before (a storage shared by several counts once)."""
        for tensor in tensors:
            for part in _parts(tensor):
                self._count(part.untyped_storage())
        self.peak = max(self.peak, self.current)

    def reset_peak(self) -> int:
        """Return the peak so far and start a new one from what is alive."""
        peak, self.peak = self.peak, self.current
        return peak

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def freed(_: Any) -> None:
            self._alive.pop(key, None)
            self.current -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.current += size

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.register(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _parts(tensor: Tensor) -> Iterable[Tensor]:
    """The plain tensors inside a wrapper (8-bit optimiser states), else the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]


Task = Literal["reward_model", "policy"]

_FEW_LAYERS = 2
"""The first layer may save less than the others (nothing before it is trained), so two layers of a kind are the least."""


@dataclass(frozen=True)
class BatchShape:
    """Sizes of one micro-batch as `models.prefix_rows.collate_rows` makes it.

    Attributes:
        sequences: rows of the tensors.
        length: tokens of each row, padding included.
        responses: responses in all rows.
        predicted: response tokens in all rows.
    """

    sequences: int
    length: int
    responses: int
    predicted: int


@dataclass(frozen=True)
class StepBytes:
    """Bytes beside weights, gradients and optimiser states.

    A phase's peak grows by the same bytes with each layer, which the peak of all phases need not do.

    Attributes:
        mask: the attention mask and the batch.
        kept: what stays between the forward and the backward pass.
        forward: most at once in the layers' forward pass; autocast holds bfloat16 copies of master weights until its end.
        head: most at once from the last hidden states to the loss.
        head_backward: most at once from there to the gradient of the last hidden states.
        layers: most at once in the layers' backward pass.
        embedding: most at once behind it, while the embedding's gradient is made.
    """

    mask: int
    kept: int
    forward: int
    head: int
    head_backward: int = 0
    layers: int = 0
    embedding: int = 0

    @property
    def peak(self) -> int:
        return max(self.forward, self.head, self.head_backward, self.layers, self.embedding)


def meta_model(
    model_config: Any, *, task: Task, dtype: torch.dtype, lora: LoraConfig | None, layers: int | None = None
) -> nn.Module:
    """The model as a training would have it, on the meta device: shapes and dtypes, no storage.

    Args:
        model_config: a transformers configuration; it is not changed.
        lora: adapters on every linear layer but the head, or None.
        layers: keep only the first ones; None keeps all.
    """
    config = copy.deepcopy(model_config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    auto: Any = AutoModelForCausalLM
    if task == "reward_model":
        auto, config.num_labels = AutoModelForSequenceClassification, 1
        provide_classifier(config)
    remote = type(config).__module__.startswith("transformers_modules")  # code the configuration came with
    with torch.device("meta"):
        model = or_eager(
            lambda attention: auto.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=remote
            ),
            plain_attention(config),
        )
        return (
            add_lora(model, lora, task="SEQ_CLS" if task == "reward_model" else "CAUSAL_LM")
            if lora
            else model
        )


def separate_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model in their order, each of which can be recomputed or kept by itself; empty where none can.

    Families that decide it elsewhere than in their layers, or layers inside layers, recompute all or none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return layers if len(layers) == getattr(model.config, "num_hidden_layers", None) else []


def enable_gradient_checkpointing(model: nn.Module, recomputed: int | None = None) -> None:
    """Recompute layers in the backward pass; adapters, if any, are already in the model.

    Args:
        model: a transformers or PEFT model.
        recomputed: how many, the first ones: what the last ones keep is gone again when the first are recomputed, so that
            the layer that is recomputed adds nothing to the peak. None: all of them.
    """
    if recomputed == 0:
        return
    arguments = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:  # its name before transformers renamed it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if recomputed is not None:
        for layer in separate_layers(model)[recomputed:]:
            layer.gradient_checkpointing = False


def rehearse_training(
    model_config: Any,
    batch: BatchShape,
    *,
    task: Task,
    dtype: torch.dtype,
    lora: LoraConfig | None,
    autocast: bool,
) -> Callable[[int], StepBytes]:
    """Bytes of forward and backward of one micro-batch by the number of recomputed layers, gradients that are kept not included.

    Args:
        dtype: precision the model's weights are held in.
        autocast: forward passes compute in bfloat16.
    """

    @cache
    def run(recomputed: int, kept: int) -> StepBytes:
        model = meta_model(model_config, task=task, dtype=dtype, lora=lora, layers=recomputed + kept)
        with FakeTensorMode():
            _give_fake_storage(model)
            model.train()
            enable_gradient_checkpointing(model, recomputed if kept else None)
            return _step(_wrapped(model, task), batch, autocast=autocast)

    return lambda recomputed: _all_layers(run, recomputed, model_config.num_hidden_layers - recomputed)


def _all_layers(run: Callable[[int, int], StepBytes], recomputed: int, kept: int) -> StepBytes:
    """Continue the bytes of a few layers of both kinds to all; every field grows by the same amount with each of a kind."""
    counts = (recomputed, kept)
    few = tuple(min(_FEW_LAYERS, count) for count in counts)
    total = run(*few)
    bytes_of = {f.name: getattr(total, f.name) for f in fields(StepBytes)}
    for kind, count in enumerate(counts):
        if count > _FEW_LAYERS:
            more = run(*(n + (kind == i) for i, n in enumerate(few)))
            for name in bytes_of:
                grown = getattr(more, name) - getattr(total, name)
                bytes_of[name] += (count - _FEW_LAYERS) * grown
    return StepBytes(**bytes_of)


def _give_fake_storage(model: nn.Module) -> None:
    """Turn meta tensors into fake ones on the device; tied weights stay tied."""
    device, made = get_device(), {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if is_parameter else value
        return made[id(tensor)]

    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None:
                    own[name] = fake(tensor)


class _Phases:
    """The count, and its peaks in the phases of a step."""

    def __init__(self, count: TensorBytes) -> None:
        self.count, self.base = count, count.current
        self.mask = 0
        self.peaks: dict[str, int] = {}

    @property
    def alive(self) -> int:
        return self.count.current - self.base

    def end(self, phase: str) -> None:
        """Note the peak since the last phase ended."""
        peak = self.count.reset_peak() - self.base
        self.peaks[phase] = max(peak, self.peaks.get(phase, 0))


class _Rehearsed:
    """Mixed into a sequence model: a mask that no data decides, and marks where phases end."""

    phases: _Phases

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor, **_: Any) -> Tensor:
        phases, (sequences, length) = self.phases, input_ids.shape
        mask = torch.zeros(sequences, 1, length, length, dtype=torch.bool, device=input_ids.device)
        phases.mask = phases.alive
        self.unwrapped.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: _at_gradient(output, lambda: phases.end("layers"))
        )
        backbone = getattr(self.unwrapped, self.unwrapped.base_model_prefix)
        output = backbone(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
        )
        hidden = output.last_hidden_state.flatten(0, 1)
        del output
        phases.end("forward")
        _at_gradient(hidden, lambda: phases.end("head_backward"))
        return hidden


def _at_gradient(tensor: Tensor, action: Callable[[], None]) -> None:
    """Call `action` when the gradient of `tensor` has been computed."""
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: action())


class _RehearsedLogps(_Rehearsed, SequenceLogps):
    pass


class _RehearsedRewards(_Rehearsed, SequenceRewards):
    pass


def _wrapped(model: nn.Module, task: Task) -> nn.Module:
    return (_RehearsedRewards if task == "reward_model" else _RehearsedLogps)(model)


def _batch(shape: BatchShape) -> dict[str, Tensor]:
    tokens, flat = (shape.sequences, shape.length), shape.predicted
    sizes = {"input_ids": tokens, "position_ids": tokens, "segment_ids": tokens}
    sizes |= {"predict_index": (flat,), "target_ids": (flat,), "sequence_index": (flat,)}
    sizes |= {"last_index": (shape.responses,)}
    return {name: torch.zeros(size, dtype=torch.long, device=get_device()) for name, size in sizes.items()}


def _step(model: nn.Module, shape: BatchShape, *, autocast: bool) -> StepBytes:
    """Forward and backward; a gradient is let go once it is whole, for the plan counts gradients by itself."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with TensorBytes([*model.parameters(), *model.buffers()]) as count:
        phases = model.phases = _Phases(count)
        batch = _batch(shape)
        with torch.autocast(get_device().type, torch.bfloat16, enabled=autocast):
            loss = model(**batch).square().mean()
        phases.end("head")  # behind autocast, whose bfloat16 copies of weights are no part of what follows
        kept = phases.alive - phases.mask
        loss.backward()
        phases.end("embedding")
        return StepBytes(phases.mask, kept, **phases.peaks)
