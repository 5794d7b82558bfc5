"""Precision: what is chosen, that it moves weights at 5e-7, and that the 8-bit state survives a resume."""

import importlib.util
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import Trainer

from prmd.config.shared import LoraConfig, ModelConfig, TrainingConfig, TuningConfig
from prmd.errors import ConfigError
from prmd.runtime import missing_compiler
from prmd.training import precision as module
from prmd.training.arguments import training_arguments
from prmd.training.precision import Precision, probe_progress, refuse_if_stuck, resolve_precision

RATE = 5e-7
FLOAT32 = Precision("adamw_float32", True, True, RATE, "full")
EIGHT_BIT = Precision("adamw_8bit_stochastic", False, False, RATE, "full")
PLAIN_BFLOAT16 = Precision("adamw_float32", False, False, RATE, "full")
BFLOAT16, FLOAT = ModelConfig(dtype="bfloat16"), ModelConfig(dtype="float32")

if importlib.util.find_spec("torchao") is None:
    _REASON = "torchao is not installed (pip install torchao)"
else:
    _REASON = f"torch.compile lacks {missing_compiler()}" if missing_compiler() else ""
needs_torchao = pytest.mark.skipif(bool(_REASON), reason=_REASON)


# ------------------------------------------------------------------ the choice
@pytest.mark.parametrize(("model", "autocast"), [(BFLOAT16, True), (FLOAT, False)])
def test_lora_has_its_own_rate_and_float32_adapters(model: ModelConfig, autocast: bool) -> None:
    tuning = TuningConfig(method="lora", lora=LoraConfig(learning_rate=3e-4))
    chosen = resolve_precision(tuning, learning_rate=RATE, model=model)
    assert chosen == Precision("adamw_float32", False, autocast, 3e-4, "lora")
    assert chosen.weights_dtype == getattr(torch, model.dtype)
    assert chosen.trained_dtype == torch.float32


@pytest.mark.parametrize(("model", "autocast"), [(BFLOAT16, True), (FLOAT, False)])
def test_full_float32_has_master_weights(model: ModelConfig, autocast: bool) -> None:
    chosen = resolve_precision(TuningConfig(optimizer="adamw_float32"), learning_rate=RATE, model=model)
    assert chosen == Precision("adamw_float32", True, autocast, RATE, "full")
    assert chosen.weights_dtype == chosen.trained_dtype == torch.float32


def test_auto_asks_the_memory_plan_and_takes_float32_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_require_8bit", lambda *, asked: None)
    asked: list[Precision] = []

    def never(precision: Precision) -> bool:
        asked.append(precision)
        return False

    assert resolve_precision(TuningConfig(), learning_rate=RATE, model=BFLOAT16) == FLOAT32
    assert (
        resolve_precision(TuningConfig(), learning_rate=RATE, model=BFLOAT16, plan_fits=lambda p: True)
        == FLOAT32
    )
    assert resolve_precision(TuningConfig(), learning_rate=RATE, model=BFLOAT16, plan_fits=never) == EIGHT_BIT
    assert asked == [FLOAT32]
    assert EIGHT_BIT.weights_dtype == EIGHT_BIT.trained_dtype == torch.bfloat16


def test_eight_bit_on_float32_weights_is_refused() -> None:
    tuning = TuningConfig(optimizer="adamw_8bit_stochastic")
    with pytest.raises(ConfigError, match=r"model\.dtype: bfloat16"):
        resolve_precision(tuning, learning_rate=RATE, model=FLOAT)


def test_missing_torchao_names_the_package_and_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tuning = TuningConfig(optimizer="adamw_8bit_stochastic")
    with pytest.raises(ConfigError, match=r"pip install torchao.*tuning\.method: lora"):
        resolve_precision(tuning, learning_rate=RATE, model=BFLOAT16)


def test_missing_compiler_names_it_and_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install torchao.*C\+\+ compiler.*tuning\.method: lora"):
        resolve_precision(TuningConfig(), learning_rate=RATE, model=BFLOAT16, plan_fits=lambda p: False)


# ------------------------------------------------------------------ progress
def test_float32_and_lora_make_all_the_progress() -> None:
    assert probe_progress(FLOAT32, steps=200) == pytest.approx(1.0, abs=1e-12)
    assert refuse_if_stuck(replace(FLOAT32, trained="lora", master_weights=False)) == pytest.approx(
        1.0, abs=1e-12
    )


def test_plain_bfloat16_is_stuck_as_rounding_predicts() -> None:
    """A constant gradient moves each weight by the rate a step; it lands only where half an ulp is below that."""
    measured = probe_progress(PLAIN_BFLOAT16, steps=200)
    weights = np.abs(np.random.default_rng(0).normal(0.0, 0.02, 400_000))
    half_ulp_below = 2.0 ** (np.floor(np.log2(weights)) - 8)
    predicted = np.mean(half_ulp_below <= RATE)
    assert 0.0 < measured < 0.03
    assert measured == pytest.approx(predicted, abs=0.015)


def test_stuck_is_refused_on_the_models_own_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 64))
    with pytest.raises(ConfigError, match=r"tuning\.optimizer: adamw_float32.*tuning\.method: lora"):
        refuse_if_stuck(PLAIN_BFLOAT16, model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-6)  # weights so small that bfloat16 resolves the rate
    assert refuse_if_stuck(PLAIN_BFLOAT16, model) > 0.9


def test_probe_leaves_model_and_random_state_alone() -> None:
    model = nn.Linear(64, 64)
    before, state = model.weight.detach().clone(), torch.get_rng_state()
    refuse_if_stuck(FLOAT32, model)
    assert torch.equal(model.weight, before) and model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_failed_compilation_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            raise BackendCompilerFailed(Failing, RuntimeError("no compiler"), None)

    monkeypatch.setattr(module, "_optimizer", lambda precision, weights: Failing(weights))
    with pytest.raises(ConfigError, match=r"does not compile here .*tuning\.method: lora"):
        probe_progress(EIGHT_BIT, steps=1)


def test_an_8_bit_optimiser_of_adapters_is_refused() -> None:
    tuning = TuningConfig(method="lora", optimizer="adamw_8bit_stochastic")
    with pytest.raises(ConfigError, match=r"with tuning\.method: lora.*set tuning\.optimizer: auto"):
        resolve_precision(tuning, learning_rate=RATE, model=BFLOAT16)


@needs_torchao
@pytest.mark.slow
def test_eight_bit_stochastic_rounding_makes_float32s_progress() -> None:
    assert probe_progress(EIGHT_BIT, steps=200) == pytest.approx(1.0, abs=0.1)


# ------------------------------------------------------------------ transformers' way to the 8-bit optimiser
class _Regression(nn.Module):
    """64 linear outputs without a bias, in bfloat16: one weight that is kept in 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
        nn.init.normal_(self.layer.weight, std=0.02, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(x.to(torch.bfloat16)).float() - 1.0).square().mean()}


def _trainer(directory: Path, steps: int = 4) -> Trainer:
    training = TrainingConfig(gradient_accumulation_steps=1, lr_scheduler="linear", warmup_ratio=0.0)
    arguments = training_arguments(
        training,
        directory=directory,
        learning_rate=1e-2,
        optimizer=EIGHT_BIT.optimizer,
        bf16=False,
        seed=1,
        steps=steps,
        accumulation=1,
    )
    arguments.save_strategy, arguments.save_steps, arguments.max_steps = "steps", 2, steps
    inputs = torch.randn(steps, 64, generator=torch.Generator().manual_seed(2))
    return Trainer(model=_Regression(), args=arguments, train_dataset=[{"x": row} for row in inputs])


@needs_torchao
def test_transformers_reaches_stochastic_rounding_in_every_parameter_group(tmp_path: Path) -> None:
    from torchao.optim import AdamW8bit

    optimizer = _trainer(tmp_path).create_optimizer()
    assert type(optimizer) is AdamW8bit
    assert optimizer.bf16_stochastic_round and optimizer.block_size == 256
    assert all(group["lr"] == pytest.approx(1e-2) for group in optimizer.param_groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert len({id(rate) for rate in rates}) == len(rates)  # a tensor each: a schedule sets them apart


@needs_torchao
@pytest.mark.slow
def test_resume_keeps_the_eight_bit_state(tmp_path: Path) -> None:
    """Four steps, and two steps resumed for two more, end in the same weights, states and learning rate."""
    from torchao.optim.subclass_8bit import OptimState8bit

    whole = _trainer(tmp_path)
    whole.train()
    resumed = _trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(whole.model.layer.weight, resumed.model.layer.weight)
    assert not torch.equal(whole.model.layer.weight, _Regression().layer.weight)
    expected, found = (next(iter(t.optimizer.state_dict()["state"].values())) for t in (whole, resumed))
    for name in ("exp_avg", "exp_avg_sq"):
        assert isinstance(found[name], OptimState8bit)
        assert torch.equal(found[name].codes, expected[name].codes)
        assert torch.equal(found[name].scale, expected[name].scale)
    assert found["step"] == 4
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


@needs_torchao
@pytest.mark.slow
def test_eight_bit_state_passes_the_weights_only_loader() -> None:
    from torchao.optim import AdamW8bit

    weight = nn.Parameter(0.02 * torch.randn(64, 64).bfloat16())
    optimizer = AdamW8bit([weight], lr=RATE, weight_decay=0.0, bf16_stochastic_round=True)
    weight.grad = torch.randn(64, 64).bfloat16()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True, map_location="cpu")
    fresh = AdamW8bit([weight], lr=1.0, weight_decay=0.0, bf16_stochastic_round=True)
    fresh.load_state_dict(loaded)
    for name in ("exp_avg", "exp_avg_sq"):
        state = fresh.state[weight][name]
        assert state.codes.dtype == torch.uint8 and state.codes.any()
        assert torch.equal(state.dequantize(), optimizer.state[weight][name].dequantize())
    assert fresh.param_groups[0]["lr"] == pytest.approx(RATE)
