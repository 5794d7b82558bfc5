"""Memory plans against bytes that real steps of tiny models held, and against arithmetic done by hand."""

import copy
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from model_families import family_config
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from prmd.config.policy import PolicySection
from prmd.config.shared import LoraConfig, TrainingConfig, TuningConfig
from prmd.models import sequence_models
from prmd.models.card import USABLE, sampling_bytes
from prmd.models.loading import add_lora
from prmd.models.prefix_rows import collate_rows
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.models.tokenization import PrefixRow
from prmd.policies.pairs import ReferenceSamples
from prmd.policies.sample_pairs import GAMMA_SAMPLES, with_gamma_samples
from prmd.policies.targets import policy_loss
from prmd.training.memory import MemoryPlan, plan_memory, weight_bytes
from prmd.training.precision import Precision, eight_bit_precision, lora_precision
from prmd.training.rehearsal import TensorBytes, enable_gradient_checkpointing, meta_model

FLOAT32 = Precision("adamw_float32", True, False, 5e-7, "full")
MASTER = Precision("adamw_float32", True, True, 5e-7, "full")
EIGHT_BIT = eight_bit_precision(5e-7)
TUNING = TuningConfig(lora=LoraConfig(r=8))
LORA = lora_precision(TUNING, bfloat16=True)
ROW = PrefixRow((5,) * 20, ((6,) * 50, (7,) * 44))
PAIRS = 3

LLAMA = LlamaConfig(
    vocab_size=600, hidden_size=96, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip
QWEN2 = Qwen2Config(
    vocab_size=20_000, hidden_size=64, intermediate_size=176, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
QWEN3 = Qwen3Config(
    vocab_size=3_000, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, head_dim=32, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
QWEN_3B = Qwen2Config(
    vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36, num_attention_heads=16,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=32_768, pad_token_id=0,
)  # fmt: skip


def _plan(config: Any, precision: Precision, *, task: str = "policy", **changes: Any) -> MemoryPlan:
    training = TrainingConfig(
        max_length=changes.pop("max_length", 512),
        gradient_checkpointing=changes.pop("checkpointing", False),
        pairs_per_device=changes.pop("pairs_per_device", PAIRS),
    )
    arguments: dict[str, Any] = {
        "device_bytes": None,
        "longest": ROW,
        "tuning": TUNING,
    }
    arguments |= {"model_config": config, "precision": precision, "task": task, "training": training}
    return plan_memory(**(arguments | changes))


# ------------------------------------------------------------------ real steps
def _sequence_model(config: Any, precision: Precision, task: str, checkpointing: bool | int) -> nn.Module:
    config = copy.deepcopy(config)
    auto: Any = AutoModelForCausalLM
    if task == "reward_model":
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    model = auto.from_config(config, dtype=precision.weights_dtype, attn_implementation="sdpa")
    if precision.trained == "lora":
        model = add_lora(model, TUNING.lora, task="SEQ_CLS" if task == "reward_model" else "CAUSAL_LM")
    if checkpointing:
        enable_gradient_checkpointing(model, None if checkpointing is True else checkpointing)
    return (SequenceRewards if task == "reward_model" else SequenceLogps)(model).train()


def _eight_bit_states(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    """The states torchao makes at its first step, without compiling that step."""
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(parameters, lr=1e-3, bf16_stochastic_round=True)
    return [optimizer._new_buffer(p, signed) for p in parameters for signed in (True, False)]


def _measured(
    config: Any, precision: Precision, task: str, checkpointing: bool | int, row: PrefixRow = ROW
) -> int:
    """Peak bytes of two optimiser steps of two micro-batches each."""
    model = _sequence_model(config, precision, task, checkpointing)
    trained = [p for p in model.parameters() if p.requires_grad]
    existing = [*model.parameters(), *model.buffers()]
    eight_bit = precision.optimizer == "adamw_8bit_stochastic"
    if eight_bit:
        existing += _eight_bit_states(trained)
    optimizer = None if eight_bit else torch.optim.AdamW(trained, lr=1e-4, fused=True)
    with TensorBytes(existing) as count:
        _two_steps(model, precision, optimizer, row)
    return count.peak


def _two_steps(
    model: nn.Module,
    precision: Precision,
    optimizer: torch.optim.Optimizer | None,
    row: PrefixRow = ROW,
    begin: Callable[[], None] = lambda: None,
) -> None:
    for step in range(4):
        begin()
        batch = collate_rows([row] * PAIRS, pad_id=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision.autocast):
            loss = _loss(model(**batch))
        loss.backward()
        if step == 1:
            if optimizer is not None:
                optimizer.step()
            model.zero_grad(set_to_none=True)


def _loss(outputs: torch.Tensor) -> torch.Tensor:
    columns = {"ref_logps": torch.zeros(PAIRS, 2), "target_margins": torch.ones(PAIRS)}
    return policy_loss(outputs, columns, PolicySection(gamma=0.1)).loss.mean()


@pytest.mark.parametrize(
    ("config", "precision", "task", "checkpointing"),
    [
        (LLAMA, FLOAT32, "policy", False),
        (LLAMA, MASTER, "reward_model", True),
        (LLAMA, LORA, "policy", False),
        (QWEN2, MASTER, "policy", True),
        (QWEN2, MASTER, "policy", False),
        (QWEN2, LORA, "reward_model", True),
        (QWEN2, EIGHT_BIT, "policy", True),
        (QWEN3, FLOAT32, "policy", True),
    ],
    ids=lambda value: getattr(value, "model_type", None) or getattr(value, "trained", str(value)),
)
def test_plan_is_that_of_a_real_step(
    config: Any, precision: Precision, task: str, checkpointing: bool
) -> None:
    """The plan may be 15 % off; on a CPU the same operators run in both, so 3 % already means a mistake."""
    if precision is EIGHT_BIT and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed (pip install torchao)")
    plan = _plan(config, precision, task=task, checkpointing=checkpointing)
    assert plan.total == pytest.approx(_measured(config, precision, task, checkpointing), rel=0.03)


@pytest.mark.parametrize(
    ("config", "precision", "task", "checkpointing"),
    [(LLAMA, FLOAT32, "policy", False), (QWEN2, MASTER, "reward_model", True), (QWEN2, MASTER, "policy", 2)],
    ids=["float32", "masters", "some-layers"],
)
def test_torch_counts_the_planned_bytes(
    config: Any, precision: Precision, task: str, checkpointing: bool | int
) -> None:
    """The same steps counted by torch's own `MemTracker`, which shares no line with the plan or with `TensorBytes`."""
    model = _sequence_model(config, precision, task, checkpointing)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        _two_steps(model, precision, optimizer, begin=tracker.reset_mod_stats)
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    if checkpointing == 2:
        every, none = (_plan(config, precision, task=task, checkpointing=c).total for c in (True, False))
        assert every < counted < none
    else:
        assert _plan(config, precision, task=task, checkpointing=checkpointing).total == pytest.approx(
            counted, rel=0.03
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "precision", "task", "shares"),
    [
        (LLAMA, FLOAT32, "policy", (0.15, 0.5, 0.9)),
        (LLAMA, MASTER, "reward_model", (0.5,)),
        (LLAMA, LORA, "policy", (0.5,)),
        (QWEN2, MASTER, "policy", (0.5,)),
        (QWEN2, EIGHT_BIT, "policy", (0.5,)),
    ],
    ids=["float32", "masters", "lora", "tied", "8-bit"],
)
def test_plan_with_some_layers_recomputed_is_that_of_a_real_step(
    config: Any, precision: Precision, task: str, shares: tuple[float, ...]
) -> None:
    """On cards that hold so large a share of what lies between all layers recomputed and none."""
    if precision is EIGHT_BIT and importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed (pip install torchao)")
    none, every = (_plan(config, precision, task=task, checkpointing=c).total for c in (False, True))
    numbers = []
    for share in shares:
        card = _card_for(round(every + share * (none - every)))
        plan = _plan(config, precision, task=task, checkpointing="auto", device_bytes=card)
        numbers.append(plan.recomputed)
        assert plan.total == pytest.approx(_measured(config, precision, task, plan.recomputed), rel=0.03)
        assert every <= plan.total < none and plan.fits
    assert numbers == sorted(set(numbers), reverse=True)
    assert 0 < numbers[-1] <= numbers[0] < config.num_hidden_layers


@pytest.mark.parametrize(
    ("config", "precision", "checkpointing", "row"),
    [(QWEN2, FLOAT32, True, ROW), (LLAMA, LORA, False, PrefixRow(ROW.prompt_ids, ((8,) * 60, (9,) * 60)))],
    ids=["labelled", "of-samples"],
)
def test_samples_behind_a_pair_are_planned(
    config: Any, precision: Precision, checkpointing: bool, row: PrefixRow
) -> None:
    """The rows of the gamma term: behind a labelled pair, and behind a pair of samples, which may be longer."""
    own = PrefixRow(row.prompt_ids, tuple((8 + j,) * 60 for j in range(3)))
    [whole] = with_gamma_samples([row], [0], ReferenceSamples([own], torch.zeros(1, 3)))
    plan = _plan(config, precision, checkpointing=checkpointing, longest=row, sampled=(60,) * GAMMA_SAMPLES)
    measured = _measured(config, precision, "policy", checkpointing, whole)
    assert plan.total == pytest.approx(measured, rel=0.03)
    assert _plan(config, precision, checkpointing=checkpointing).total < 0.97 * measured, (
        "samples must matter"
    )


def test_small_blocks_of_logits_are_planned_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _plan(QWEN2, FLOAT32, checkpointing=True)
    monkeypatch.setattr(sequence_models, "LOGITS_AT_ONCE", 32 * QWEN2.vocab_size)
    blocks = _plan(QWEN2, FLOAT32, checkpointing=True)
    assert blocks.logits < whole.logits
    assert blocks.total == pytest.approx(_measured(QWEN2, FLOAT32, "policy", True), rel=0.03)


# ------------------------------------------------------------------ arithmetic by hand
def _qwen_3b_parameters() -> int:
    hidden, inner, key_value = 2048, 11_008, 2 * 128
    attention = 2 * hidden * hidden + 2 * hidden * key_value + hidden + 2 * key_value  # biases of q, k and v
    layer = attention + 3 * hidden * inner + 2 * hidden
    return 151_936 * hidden + 36 * layer + hidden


@pytest.mark.parametrize(
    ("precision", "gigabytes"),
    [(MASTER, 49.4), (EIGHT_BIT, 18.5), (LORA, 8.1)],
    ids=["float32", "8-bit", "lora"],
)
def test_states_of_a_3b_model(precision: Precision, gigabytes: float) -> None:
    tuning = TuningConfig(lora=LoraConfig(r=64))
    plan = _plan(QWEN_3B, precision, checkpointing=True, tuning=tuning)
    assert plan.states / 1e9 == pytest.approx(gigabytes, rel=0.01)
    hidden, inner, key_value = 2048, 11_008, 256
    adapters = 36 * 64 * (2 * (hidden + hidden) + 2 * (hidden + key_value) + 3 * (hidden + inner))
    lora = precision.trained == "lora"
    assert plan.trainable == (adapters if lora else _qwen_3b_parameters())
    assert plan.parameters == _qwen_3b_parameters() + (adapters if lora else 0)


def test_recomputed_layers_keep_their_input_alone() -> None:
    """Two more layers keep two more hidden states [B, L, d] in bfloat16, and all layers many times that."""
    kept = {}
    for checkpointing in (True, False):
        plans = []
        for layers in (10, 12):
            config = copy.deepcopy(QWEN_3B)
            config.num_hidden_layers, config.layer_types = layers, config.layer_types[:layers]
            plans.append(_plan(config, EIGHT_BIT, checkpointing=checkpointing))
        kept[checkpointing] = plans[1].activations - plans[0].activations
    hidden_states = 2 * PAIRS * ROW.shared_length * 2048 * 2
    assert kept[True] == hidden_states
    assert kept[False] > 15 * hidden_states


def test_eight_bit_step_holds_both_moments_of_the_embedding_in_float32() -> None:
    """With short rows the optimiser step, not the backward pass, is where the peak lies."""
    row = PrefixRow((1,), ((2, 3), (4, 5)))
    plan = _plan(QWEN_3B, EIGHT_BIT, task="reward_model", checkpointing=True, pairs_per_device=1, longest=row)
    assert plan.total - plan.states == 2 * 4 * 151_936 * 2048


def test_longest_rows_are_assumed_without_data() -> None:
    given = PrefixRow((0,), ((0,) * 255, (0,) * 255))
    assert _plan(LLAMA, FLOAT32, longest=None, max_length=256) == _plan(LLAMA, FLOAT32, longest=given)
    assert (
        _plan(LLAMA, FLOAT32, longest=None, max_length=128).total < _plan(LLAMA, FLOAT32, longest=given).total
    )


@pytest.mark.parametrize("task", ["policy", "reward_model"])
def test_a_model_without_sdpa_is_planned_with_a_row_for_each_response(task: Any) -> None:
    training = TrainingConfig(pairs_per_device=2, max_length=64)
    plans = {
        name: plan_memory(
            model_config=family_config(name, vocab_size=600),
            tuning=TUNING,
            training=training,
            precision=FLOAT32,
            task=task,
            device_bytes=None,
        )
        for name in ("gemma2", "gemma")
    }
    assert plans["gemma2"].mask < plans["gemma"].mask  # 4 rows of 64 tokens, 2 of 127: a mask of L x L each


def test_generation_holds_keys_and_values() -> None:
    sizes = sampling_bytes(QWEN_3B, torch.bfloat16)
    assert sizes.cached == 36 * 2 * (2 * 128) * 2
    model = meta_model(QWEN_3B, task="policy", dtype=torch.bfloat16, lora=None)
    assert weight_bytes(model) == pytest.approx(2 * _qwen_3b_parameters(), rel=1e-4)


def test_eight_bit_states_are_those_of_torchao() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed (pip install torchao)")
    model = _sequence_model(LLAMA, EIGHT_BIT, "policy", False)
    states = _eight_bit_states(list(model.parameters()))
    held = TensorBytes(states).current
    steps = 4 * len(list(model.parameters()))
    assert _plan(LLAMA, EIGHT_BIT).optimizer == held + steps


# ------------------------------------------------------------------ what to change
@pytest.mark.slow
def test_auto_recomputes_as_few_layers_as_a_card_allows() -> None:
    """The cards hold what no recomputation takes, a byte less, half of what it spares, and a byte less than with all of it."""
    assert _plan(LLAMA, FLOAT32, checkpointing="auto").recomputed == 0, "there is no card"
    none, every = (_plan(LLAMA, FLOAT32, checkpointing=all_layers).total for all_layers in (False, True))
    recomputed = []
    for total in (none, none - 1, (none + every) // 2, every - 1):
        plan = _plan(LLAMA, FLOAT32, checkpointing="auto", device_bytes=_card_for(total))
        recomputed.append(plan.recomputed)
        assert plan.fits == (total >= every)
        if 0 < plan.recomputed < 6:  # the layer more was needed
            less = _plan(LLAMA, FLOAT32, checkpointing="auto", device_bytes=_card_for(plan.total - 1))
            assert less.recomputed == plan.recomputed + 1
            assert f"activations ({plan.recomputed} of 6 layers recomputed)" in "\n".join(plan.rows())
    assert recomputed[0] == 0 and 1 <= recomputed[1] < recomputed[2] < recomputed[3] == 6


def test_first_change_is_the_first_that_fits() -> None:
    """On a card that just holds one remedy, that remedy is the advice; the ones before it leave too much."""
    common: dict[str, Any] = {"longest": None, "max_length": 512}
    assert _advice(_plan(QWEN3, MASTER, **common), checkpointing=False, **common) == ""
    recomputed = _plan(QWEN3, MASTER, checkpointing=True, **common)
    advice = _advice(recomputed, checkpointing=False, **common)
    assert advice.startswith("training.gradient_checkpointing: true")
    fewer = _plan(QWEN3, MASTER, checkpointing=True, pairs_per_device=1, **common)
    advice = _advice(fewer, checkpointing=True, **common)
    assert advice.startswith("training.pairs_per_device: 1 with training.gradient_accumulation_steps: 24")
    shorter = _plan(QWEN3, MASTER, checkpointing=True, pairs_per_device=1, longest=None, max_length=256)
    advice = _advice(shorter, checkpointing=True, pairs_per_device=1, **common)
    assert advice.startswith("training.max_length: 256")


def test_first_change_of_a_model_too_large_for_the_card() -> None:
    common: dict[str, Any] = {
        "checkpointing": True,
        "pairs_per_device": 1,
        "max_length": 256,
        "longest": None,
    }
    lora = _plan(QWEN3, LORA, **common)
    advice = _advice(_plan(QWEN3, EIGHT_BIT, **common), **common)
    assert advice.startswith("tuning.optimizer: adamw_8bit_stochastic")
    assert _advice(lora, **common).startswith("tuning.method: lora")
    hopeless = _plan(QWEN3, LORA, device_bytes=lora.weights // 2, **common)
    assert hopeless.first_change.startswith("a smaller model.name")


def _card_for(total: int) -> int:
    """Bytes of a card whose usable share just holds so many."""
    return math.ceil(total / USABLE)


def _advice(card: MemoryPlan, **changes: Any) -> str:
    """What is advised for float32 training of `QWEN3` on a card that just holds the plan `card`."""
    return _plan(QWEN3, MASTER, device_bytes=math.ceil(card.total / USABLE) + 1, **changes).first_change


def test_rows_add_up_and_give_the_verdict() -> None:
    plan = _plan(QWEN_3B, MASTER, checkpointing=True, device_bytes=32 * 2**30)
    lines = plan.rows()
    sizes = [float(line.split(" GiB")[0].split()[-1]) for line in lines[1:-1]]
    assert lines[0].startswith("3,085.9 million parameters")
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.05)
    assert sizes[-1] == pytest.approx(plan.total / 2**30, abs=0.005)
    assert plan.fits is False and "does not fit a card of 32.0 GiB" in lines[-2]
    assert lines[-1].startswith("first change: tuning.optimizer: adamw_8bit_stochastic")
