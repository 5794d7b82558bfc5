"""Weights that hold NaN or infinity are refused where they are loaded, whatever they are, by the name of the model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_causal_lm, tiny_classifier
from tiny_workspace import write_full_policy, write_lora_policy

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import ModelConfig
from prmd.errors import NotFiniteError, UserError
from prmd.models.loading import (
    load_adapted,
    load_base_classifier,
    load_causal_lm,
    load_classifier,
    load_labelled_classifier,
    load_policy,
    refuse_not_finite,
)

NAN, INF = float("nan"), float("inf")


def spoil(file: Path, value: float, *, tensor: int = 3) -> str:
    """Put one such number into one tensor of a file; returns the tensor's name."""
    table = load_file(file)
    name = sorted(table)[tensor]
    table[name].view(-1)[1] = value
    save_file(table, file, metadata={"format": "pt"})
    return name


def base_of(folder: Path, dtype: str = "float32") -> ModelConfig:
    return ModelConfig(name=str(folder), revision=None, dtype=dtype)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_model_is_refused_by_name_and_tensor(tmp_path: Path, value: float, dtype: str) -> None:
    folder, paths = tiny_causal_lm(tmp_path / "base"), ArtifactPaths(tmp_path / "root", "embedded")
    load_causal_lm(base_of(folder, dtype), paths)  # whole weights pass
    tensor = spoil(folder / "model.safetensors", value)
    with pytest.raises(UserError) as refusal:
        load_causal_lm(base_of(folder, dtype), paths)
    said = str(refusal.value)
    assert str(folder) in said and "its weights are not finite: 1 of" in said and tensor in said
    assert "\n" not in said
    with pytest.raises(NotFiniteError, match=r"model\.name"):
        load_base_classifier(base_of(folder, dtype), paths, pad_token_id=0)


def test_a_reward_model_and_a_judge_are_refused(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path / "helpful_rm", seed=1)
    spoil(folder / "model.safetensors", NAN)
    for load in (lambda: load_classifier(folder, "float32"), lambda: load_labelled_classifier(str(folder))):
        with pytest.raises(NotFiniteError, match="helpful_rm: its weights are not finite"):
            load()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_policy_is_refused_by_its_folder(tmp_path: Path, kind: str) -> None:
    base, paths = tiny_causal_lm(tmp_path / "base"), ArtifactPaths(tmp_path / "root", "embedded")
    folder = tmp_path / "hard_min"
    (write_lora_policy if kind == "lora" else write_full_policy)(folder, base)
    load_policy(folder, base_of(base), paths)
    spoil(folder / ("adapter_model.safetensors" if kind == "lora" else "model.safetensors"), NAN)
    with pytest.raises(NotFiniteError, match="hard_min: its weights are not finite") as refusal:
        load_policy(folder, base_of(base), paths)
    assert str(base) not in str(refusal.value)


def test_a_second_adapter_is_looked_at_and_the_first_is_not_blamed(tmp_path: Path) -> None:
    base, paths = tiny_causal_lm(tmp_path / "base"), ArtifactPaths(tmp_path / "root", "embedded")
    for name in ("one", "two"):
        write_lora_policy(tmp_path / name, base)
    spoil(tmp_path / "two" / "adapter_model.safetensors", INF)
    model = load_adapted(load_causal_lm(base_of(base), paths), tmp_path / "one", name="one")
    with pytest.raises(NotFiniteError, match="two: its weights are not finite"):
        load_adapted(model, tmp_path / "two", name="two")


def test_what_is_no_number_is_not_looked_at() -> None:
    model = torch.nn.Linear(3, 2)
    model.register_buffer("mask", torch.full((3,), -INF))
    model.empty = torch.nn.Parameter(torch.empty(0))  # of ZeRO-3, whose parts lie elsewhere
    model.unloaded = torch.nn.Parameter(torch.empty(4, device="meta"))
    refuse_not_finite(model, "model", "look again")
