"""One small LoRA training of twelve pairs, as a stage would describe it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from prmd.config.shared import LoraConfig, RewardModelConfig, TrainingConfig, TuningConfig
from prmd.models.loading import add_lora, load_causal_lm, load_tokenizer
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow
from prmd.pessimism.losses import dpo_loss
from prmd.runtime import set_seed
from prmd.training.run import TrainingRun, run_training
from prmd.training.trainer import Columns, PairData, PairLoss

LORA = TuningConfig(method="lora", lora=LoraConfig(r=4, alpha=8, learning_rate=1e-2))
TRAINING = TrainingConfig(
    pairs_per_device=2,
    gradient_accumulation_steps=2,
    logging_steps=1,
    max_length=64,
    checkpoints=(0.0, 0.34, 0.66, 1.0),
    lr_scheduler="linear",
)
ROWS = [PrefixRow((1, 50 + i, 60), ((*range(70 + i, 73 + 2 * i), 2), (90 + i, 2))) for i in range(12)]


def loss_of(logps: Tensor, columns: Columns) -> PairLoss:
    margins = 0.1 * (logps[:, 0] - logps[:, 1])
    detached = margins.detach()
    return PairLoss(
        dpo_loss(implicit_margins=margins),
        {"rewards/margins": detached, "rewards/accuracies": (detached > 0).float()},
    )


def a_run(shared: RewardModelConfig, directory: Path, **changes: Any) -> TrainingRun:
    def load(master_weights: bool) -> SequenceLogps:
        set_seed(0)
        model = load_causal_lm(shared.model, shared.paths, master_weights=master_weights)
        return SequenceLogps(add_lora(model, LORA.lora, task="CAUSAL_LM"))

    run = TrainingRun(
        name="test",
        directory=directory,
        shared=shared,
        tuning=LORA,
        training=TRAINING,
        data=PairData(ROWS, {}),
        stream=list(range(12)),
        eval_data=PairData(ROWS[:3], {}),
        loss_function=loss_of,
        load_model=load,
        log_directory=directory / "logs",
        task="policy",
    )
    return replace(run, **changes)


def train(run: TrainingRun) -> tuple[list[dict[str, float]], dict[int, str]]:
    return run_training(run, load_tokenizer(run.shared.model, run.shared.paths))


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")
