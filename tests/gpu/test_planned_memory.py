"""The plan of a training's memory against the most bytes that the training held, inside `run_training`."""

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_tokenizer
from tiny_training import a_run, loss_of, train
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prmd.config.shared import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    RewardModelConfig,
    TrainingConfig,
    TuningConfig,
)
from prmd.models.loading import add_lora, load_model_config
from prmd.models.sequence_models import SequenceLogps, SequenceRewards
from prmd.models.tokenization import PrefixRow
from prmd.runtime import missing_compiler
from prmd.training.memory import device_memory, plan_memory
from prmd.training.rehearsal import TensorBytes
from prmd.training.run import choose_precision
from prmd.training.trainer import Columns, PairData, PairLoss

FULL = TuningConfig(optimizer="adamw_float32")
EIGHT_BIT = TuningConfig(optimizer="adamw_8bit_stochastic")
LORA = TuningConfig(method="lora", lora=LoraConfig(r=8))

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Size:
    """A model and its micro-batch.

    Attributes:
        changes: to `tiny_models.tiny_config`.
        prompt, response: tokens.
        pairs: per micro-batch.
    """

    changes: dict[str, int]
    prompt: int
    response: int
    pairs: int


SMALL = Size(
    {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 4_000}, 20, 50, 3
)
LARGE = Size(
    {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 16,
     "num_key_value_heads": 4, "vocab_size": 32_768}, 128, 192, 8,
)  # fmt: skip
"""2.3 to 7.7 GiB in training, so that 5 % are more than what is no tensor of it: cuBLAS's workspaces, up to 64 MiB on a Hopper.
Large tensors are whole multiples of the 2 MiB in which a card hands out memory."""


class _Peak:
    """The most bytes alive from the second optimizer step's first micro-batch to the third's, where the training ends."""

    def __init__(self, device: torch.device) -> None:
        self.count: TensorBytes | None = None if device.type == "cuda" else TensorBytes()
        self.calls, self.bytes, self.before = 0, 0, 0
        if self.count is None:
            self.before = _allocated_beforehand(device)

    def counting(self) -> AbstractContextManager[Any]:
        return self.count or nullcontext()

    def loss(self, logps: Tensor, columns: Columns) -> PairLoss:
        """The loss of a pair; stops the training where everything has been seen, before it writes a checkpoint."""
        self.calls += logps.requires_grad
        if self.calls == 3:
            self.count.reset_peak() if self.count else torch.cuda.reset_peak_memory_stats()
        if self.calls == 5:
            self.bytes = self.count.peak if self.count else torch.cuda.max_memory_allocated() - self.before
            raise KeyboardInterrupt
        return loss_of(logps, columns)


def _allocated_beforehand(device: torch.device) -> int:
    """What earlier tests hold, and the workspaces that cuBLAS keeps for this thread and that of backward passes."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.zeros(64, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
        functional.linear(*tensors, torch.zeros(64, device=device, dtype=dtype)).sum().backward()
        del tensors
    gc.collect()
    return torch.cuda.memory_allocated(device)


def _random_model(
    config: Any, task: str, tuning: TuningConfig, dtype: torch.dtype, device: torch.device
) -> Any:
    auto: Any = AutoModelForCausalLM
    if task == "reward_model":
        auto, config.num_labels = AutoModelForSequenceClassification, 1
    model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa").to(device)
    if tuning.method == "lora":
        model = add_lora(model, tuning.lora, task="SEQ_CLS" if task == "reward_model" else "CAUSAL_LM")
    return (SequenceRewards if task == "reward_model" else SequenceLogps)(model)


@pytest.mark.parametrize(
    ("task", "tuning", "checkpointing"),
    [
        ("policy", FULL, True),
        ("policy", FULL, False),
        ("reward_model", LORA, False),
        ("policy", EIGHT_BIT, True),
    ],
    ids=["layers-recomputed", "layers-kept", "lora-reward-model", "8-bit"],
)
def test_plan_is_what_a_training_held(
    device: torch.device, tmp_path: Path, task: str, tuning: TuningConfig, checkpointing: bool
) -> None:
    """Within 5 % of the peak. Weights of bfloat16 or float32 masters, each step of two micro-batches."""
    if tuning is EIGHT_BIT:
        _skip_where_not_counted(device)
    size = LARGE if device.type == "cuda" else SMALL
    tiny_config(initializer_range=0.02, **size.changes).save_pretrained(tmp_path / "base")
    model = ModelConfig(
        name=str(tiny_tokenizer(tmp_path / "base")), revision=None, dtype="bfloat16", attention="sdpa"
    )
    shared = RewardModelConfig(
        artifact_root=str(tmp_path / "root"), data=DataConfig(approach="embedded"), model=model
    )
    training = TrainingConfig(
        learning_rate=5e-7, pairs_per_device=size.pairs, gradient_accumulation_steps=2, max_length=512,
        gradient_checkpointing=checkpointing, checkpoints=(1.0,),
    )  # fmt: skip
    precision = choose_precision(model, shared.paths, tuning, training, task)
    row = PrefixRow((5,) * size.prompt, ((6,) * size.response, (7,) * size.response))
    plan = plan_memory(
        model_config=load_model_config(model, shared.paths), tuning=tuning, training=training, precision=precision,
        task=task, device_bytes=device_memory(), longest=row,
    )  # fmt: skip

    peak, pairs = _Peak(device), 6 * size.pairs
    run = a_run(
        *(shared, tmp_path / "run"),
        tuning=tuning,
        training=training,
        data=PairData([row] * pairs, {}),
        stream=list(range(pairs)),
        eval_data=None,
        loss_function=peak.loss,
        load_model=lambda master_weights: _random_model(
            load_model_config(model, shared.paths), task, tuning, precision.weights_dtype, device
        ),
        task=task,
    )
    with peak.counting(), pytest.raises(KeyboardInterrupt):
        train(run)
    assert plan.total == pytest.approx(peak.bytes, rel=0.05), "\n".join(plan.rows())


def _skip_where_not_counted(device: torch.device) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed (pip install torchao)")
    if missing := missing_compiler():
        pytest.skip(f"torch.compile lacks {missing}")
    if device.type == "cpu":
        pytest.skip("tensors are counted operator by operator, and this step is one compiled one")
