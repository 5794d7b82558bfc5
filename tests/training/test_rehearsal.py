"""The count of live tensor bytes, against sizes known beforehand, and layers recomputed or kept."""

from typing import Any

import pytest
import torch
from model_families import family_config
from tiny_models import VOCABULARY, tiny_config
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prmd.config.shared import LoraConfig
from prmd.models.loading import add_lora
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow
from prmd.training.rehearsal import TensorBytes, enable_gradient_checkpointing, separate_layers


def test_count_follows_storages_not_views() -> None:
    old = torch.zeros(1000)
    with TensorBytes([old, old[:10]]) as count:
        assert count.current == 4000
        new = torch.ones(500, dtype=torch.float64)
        view = new[100:].reshape(20, 20).t()
        assert count.current == 8000
        del new
        assert count.current == 8000  # the view keeps the storage
        del view
        assert count.current == 4000
        assert count.reset_peak() == 8000 and count.peak == 4000
        (torch.ones(100) + 1.0).sum()
    assert count.peak == 4000 + 2 * 400


def test_count_sees_what_autograd_keeps() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    with TensorBytes([weight]) as count:
        hidden = (weight * 2.0).exp()  # exp keeps its result for the backward pass
        total = hidden.sum()
        del hidden
        assert count.current == 2 * 40_000 + 4
        total.backward()
        del total
        assert count.current == 2 * 40_000  # the weight and its gradient


# ------------------------------------------------------------------ layers recomputed or kept
def _loss_and_gradients(
    lora: bool, recomputed: int | None
) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    """Of four layers in float32; besides, how often the forward pass of each was run."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(tiny_config(num_hidden_layers=4))
    if lora:
        model = add_lora(model, LoraConfig(r=4, alpha=8), task="CAUSAL_LM")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)  # else the gradients of lora_A are zero
    scorer = SequenceLogps(model).train()
    enable_gradient_checkpointing(scorer.unwrapped, recomputed)
    runs = [0, 0, 0, 0]

    def counting(layer: int) -> Any:
        def count(module: nn.Module, inputs: Any) -> None:
            runs[layer] += 1

        return count

    for number, layer in enumerate(scorer.unwrapped.model.layers):
        layer.mlp.register_forward_pre_hook(counting(number))
    rows = [PrefixRow((1, 5 + i), ((6, 7 + i, 2), (8, 2))) for i in range(3)]
    loss = scorer(**collate_rows(rows, pad_id=0)).square().sum()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss.backward()
    return loss.item(), {name: p.grad for name, p in trained.items()}, runs


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_recomputed_changes_no_bit(lora: bool) -> None:
    loss, found, runs = _loss_and_gradients(lora, 0)
    assert runs == [1, 1, 1, 1] and all(gradient.any() for gradient in found.values())
    for recomputed in (1, 3, 4, None):
        again, others, runs = _loss_and_gradients(lora, recomputed)
        first = 4 if recomputed is None else recomputed
        assert runs == [2] * first + [1] * (4 - first), "the first layers are run twice"
        assert again == loss and others.keys() == found.keys()
        assert all(torch.equal(others[name], found[name]) for name in found)


def test_layers_are_found_in_every_family_and_below_adapters() -> None:
    for name in ("gemma2", "mistral", "gemma"):
        model = AutoModelForCausalLM.from_config(family_config(name, vocab_size=VOCABULARY))
        layers = list(model.model.layers)
        assert separate_layers(model) == layers
        assert separate_layers(add_lora(model, LoraConfig(r=2), task="CAUSAL_LM")) == layers


def test_a_model_whose_layers_are_not_known_recomputes_all_or_none() -> None:
    model = LlamaForCausalLM(tiny_config())
    model.config.num_hidden_layers = 3  # as in a family with layers inside layers, or beside them
    assert separate_layers(model) == []
    enable_gradient_checkpointing(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
