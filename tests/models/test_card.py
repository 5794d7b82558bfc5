"""Weights that go straight to their device: the numbers of a model that is loaded on the host and moved, without its copies."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_families import FAMILIES, causal_model
from safetensors.torch import load_file
from tiny_models import tiny_causal_lm
from torch import Tensor, nn
from transformers import FalconH1Config, FalconH1ForCausalLM

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import ModelConfig
from prmd.models import card, loading
from prmd.models.loading import load_base_classifier, load_causal_lm, load_classifier, load_policy
from prmd.runtime import set_seed

CARD = torch.device("cuda", 0)


@pytest.fixture
def paths(tmp_path: Path) -> ArtifactPaths:
    return ArtifactPaths(tmp_path / "root", "embedded")


def model_at(path: Path, dtype: str = "bfloat16") -> ModelConfig:
    return ModelConfig(name=str(path), revision=None, dtype=dtype)


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Also buffers that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a CPU stand for a card from now on."""
    monkeypatch.setattr(card, "_goes_straight", lambda device: True)


def saved(family: str, folder: Path) -> Path:
    if family == "falcon_h1":
        config = FalconH1Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, pad_token_id=0,
            ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9], tie_word_embeddings=True,
        )  # fmt: skip
        torch.manual_seed(0)
        FalconH1ForCausalLM(config).save_pretrained(folder)
    else:
        causal_model(family).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [*FAMILIES, "falcon_h1"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_numbers_are_those_of_the_host(
    tmp_path: Path, paths: ArtifactPaths, monkeypatch: pytest.MonkeyPatch, family: str, dtype: str
) -> None:
    """Head, buffers and what is drawn behind them too."""
    model = model_at(saved(family, tmp_path / "base"), dtype)
    found: list[dict[str, Tensor]] = []
    for moved in (False, True):
        if moved:
            straight(monkeypatch)
        set_seed(7)
        classifier = load_base_classifier(model, paths, pad_token_id=0)
        causal = load_causal_lm(model, paths)
        found.append(
            {f"classifier.{k}": v for k, v in all_tensors(classifier).items()}
            | {f"causal.{k}": v for k, v in all_tensors(causal).items()}
            | {"next": torch.rand(3)}
        )
        assert not classifier.training and not hasattr(classifier, "hf_device_map")
    assert found[0].keys() == found[1].keys()
    assert any("score" in name for name in found[0]) and any("inv_freq" in name for name in found[0])
    for name, tensor in found[0].items():
        assert tensor.dtype == found[1][name].dtype and torch.equal(tensor, found[1][name]), name


def test_a_trained_model_has_its_own_head(
    tmp_path: Path, paths: ArtifactPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_at(tiny_causal_lm(tmp_path / "base"), "float32")
    load_base_classifier(base, paths, pad_token_id=0).save_pretrained(tmp_path / "rm")
    kept = load_file(tmp_path / "rm" / "model.safetensors")
    straight(monkeypatch)
    state = torch.get_rng_state()
    trained = load_classifier(tmp_path / "rm", "float32")
    assert torch.equal(trained.score.weight, kept["score.weight"])
    assert torch.equal(state, torch.get_rng_state()), "nothing is drawn"
    policy = load_policy(Path(base.name), base, paths)
    own = load_file(Path(base.name) / "model.safetensors")
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in own.items())


@pytest.mark.parametrize("family", [*FAMILIES, "falcon_h1"])
def test_weights_come_to_the_device_in_their_format_one_by_one(
    tmp_path: Path, paths: ArtifactPaths, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """On the meta device, which holds nothing; what no file holds is made beside it, on the host."""
    base = saved(family, tmp_path / "base")
    straight(monkeypatch)
    asked: list[dict[str, Any]] = []
    model_class = loading.AutoModelForCausalLM
    real = model_class.from_pretrained

    def recorded(*arguments: Any, **options: Any) -> Any:
        loaded, info = real(*arguments, **options)
        asked.append({"map": options["device_map"], "dtype": options["dtype"]})
        assert all(p.is_meta and p.dtype == torch.bfloat16 for p in loaded.parameters())
        return loaded, info

    monkeypatch.setattr(model_class, "from_pretrained", recorded)
    loaded = loading._load(
        model_class, model_at(base), paths, master_weights=False, device=torch.device("meta")
    )
    assert asked == [{"map": {"": torch.device("meta")}, "dtype": torch.bfloat16}]
    assert all(tensor.is_meta for tensor in all_tensors(loaded).values())


@pytest.mark.parametrize("library", [None, "FSDP", "DEEPSPEED"])
def test_a_card_is_named_where_no_library_spreads_the_weights(
    tmp_path: Path, paths: ArtifactPaths, monkeypatch: pytest.MonkeyPatch, library: str | None
) -> None:
    base = model_at(tiny_causal_lm(tmp_path / "base"))
    if library:
        monkeypatch.setenv(f"ACCELERATE_USE_{library}", "true")
    asked: list[dict[str, Any]] = []

    class Card(nn.Linear):
        def named_non_persistent_buffers(self) -> list[Any]:
            return []

        def initialize_weights(self) -> None:
            pass

        def to(self, device: torch.device) -> "Card":
            assert device == CARD
            return self

    def read(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return Card(2, 1), {"missing_keys": set()}

    forks = SimpleNamespace(seen=[])

    class Fork:
        def __init__(self, devices: list[torch.device]) -> None:
            forks.seen.append(devices)

        def __enter__(self) -> None: ...
        def __exit__(self, *exception: Any) -> None: ...

    monkeypatch.setattr(card.torch.random, "fork_rng", Fork)
    monkeypatch.setattr(loading, "get_device", lambda: CARD)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(loading, "attention_implementation", lambda asked, config: "sdpa")
    load_causal_lm(base, paths)
    assert forks.seen == ([] if library else [[CARD]]), "dropout goes on from where its generator stood"
    assert [options.get("device_map") for options in asked] == [None if library else {"": CARD}]
    load_causal_lm(base, paths, master_weights=True)
    assert [options["dtype"] for options in asked] == [torch.bfloat16, torch.float32]


def test_nothing_changes_on_a_cpu(
    tmp_path: Path, paths: ArtifactPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, asked = tiny_causal_lm(tmp_path / "base"), []
    real = loading.AutoModelForCausalLM.from_pretrained

    def recorded(*arguments: Any, **options: Any) -> Any:
        asked.append(options)
        return real(*arguments, **options)

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", recorded)
    load_causal_lm(model_at(base), paths)
    assert "device_map" not in asked[0] and asked[0]["dtype"] == torch.bfloat16
