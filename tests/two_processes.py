"""One small training, evaluation and scoring pass, started by `test_two_processes` once alone and once under torchrun.

    python tests/two_processes.py DIRECTORY PAIRS_PER_STEP

Every process writes `rank-<r>.safetensors` (its final parameters) and `rank-<r>.json` (its logs and scores) itself;
a process beside the main one fails if anything of the project tries to write a file.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from gloo_processes import only_the_main_process_writes, own_rank, record_rank, world_size
from safetensors.torch import save_file
from tiny_models import VOCABULARY, tiny_config
from transformers import LlamaForCausalLM, TrainingArguments
from transformers.training_args import OptimizerNames

from prmd.config.shared import TrainingConfig
from prmd.inference import scoring
from prmd.inference.cache import ScoreTable
from prmd.inference.scoring import score_logps
from prmd.models.loading import load_tokenizer_from
from prmd.models.sequence_models import SequenceLogps
from prmd.models.tokenization import PrefixRow
from prmd.pessimism.losses import dpo_loss
from prmd.training.arguments import training_arguments
from prmd.training.batches import TrainingPlan, plan_training
from prmd.training.checkpoints import ShareCheckpoints, newest_complete
from prmd.training.trainer import PAIR_WEIGHT, Columns, PairData, PairLoss, PairTrainer

ROWS_PER_BATCH = 2
ASKED: list[list[int]] = []
"""The rows of every step, as this process was given them before it."""


def before_step(model: torch.nn.Module, batches: Sequence[Sequence[int]]) -> Columns:
    ASKED.append(sorted(row for rows in batches for row in rows))
    return {}


def random_rows(n: int, seed: int) -> list[PrefixRow]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (), generator=generator))
        return tuple(torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())

    return [PrefixRow(tokens(12), (tokens(9), tokens(9))) for _ in range(n)]


def loss(logps: torch.Tensor, columns: dict[str, torch.Tensor]) -> PairLoss:
    implicit = 0.1 * (logps[:, 0] - logps[:, 1]) + columns["offset"]
    return PairLoss(dpo_loss(implicit_margins=implicit), {"rewards/margins": implicit.detach()})


def training_arguments_of(
    directory: Path, training: TrainingConfig, plan: TrainingPlan, *, bf16: bool, optimizer: OptimizerNames
) -> TrainingArguments:
    arguments = training_arguments(
        training,
        directory=directory,
        learning_rate=0.05,
        optimizer="adamw_float32",
        bf16=bf16,
        seed=0,
        steps=plan.steps,
        accumulation=plan.size.accumulation,
    )
    arguments.optim = optimizer
    return arguments


def train(
    directory: Path,
    pairs_per_step: int,
    *,
    model: torch.nn.Module | None = None,
    bf16: bool = False,
    optimizer: OptimizerNames = OptimizerNames.SGD,
    resume: bool = False,
) -> PairTrainer:
    rows, held_out = random_rows(21, 0), random_rows(3, 1)
    weights = torch.linspace(2, 0, len(rows))
    training = TrainingConfig(
        pairs_per_device=ROWS_PER_BATCH, pairs_per_step=pairs_per_step, logging_steps=1, warmup_ratio=0.0
    )
    lengths = [row.shared_length for row in rows]
    plan = plan_training(lengths, list(range(len(rows))), training, seed=3, processes=world_size())
    torch.manual_seed(0)
    trainer = PairTrainer(
        model or SequenceLogps(LlamaForCausalLM(tiny_config())),
        training_arguments_of(directory, training, plan, bf16=bf16, optimizer=optimizer),
        data=PairData(rows, {"offset": torch.linspace(-1, 1, len(rows)), PAIR_WEIGHT: weights}),
        plan=plan.batches,
        eval_data=PairData(held_out, {"offset": torch.zeros(len(held_out))}),
        loss_function=loss,
        before_step=before_step,
        tokenizer=load_tokenizer_from(directory / "tokenizer"),
        eval_tokens=10_000,  # one group of held-out pairs, fewer than processes
        callbacks=[ShareCheckpoints({2: "66", plan.steps: "end"})],
    )
    trainer.train(resume_from_checkpoint=str(directory / "checkpoint-2") if resume else None)
    return trainer


def main(directory: Path, pairs_per_step: int) -> None:
    only_the_main_process_writes()
    trainer = train(directory, pairs_per_step)
    model = trainer.model.model.eval()
    rows, sizes = random_rows(30, 2), []
    real = scoring.collate_rows

    def counted(group, **arguments):
        sizes.append(len(group))
        return real(group, **arguments)

    scoring.collate_rows = counted
    scores = []
    for part in (rows[:25], rows):  # the second pass opens the table that the first one has just written
        found = score_logps(
            model,
            part,
            table=ScoreTable(directory / "scores", 1),
            pad_id=0,
            tokens_per_batch=60,
            description="test",
        )
        scores.append(torch.stack(found).tolist())
    record = {
        "logs": trainer.state.log_history,
        "scores": scores,
        "scored_rows": sum(sizes),
        "complete": newest_complete(directory).name,
        "asked": ASKED,
    }
    record_rank(directory, record)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(parameters, directory / f"rank-{own_rank()}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
