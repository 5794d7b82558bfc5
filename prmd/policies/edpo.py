"""e-DPO's choice of members: for each objective the one that the policy is closest to on the whole effective batch.

    m*_k = argmin_m  mean_i w_i (Delta*_{k,m,i} - Delta_theta,i)^2 ,   i over all pairs of the optimiser step

A micro-batch knows its pairs alone, so at the first one of a step the pairs of all of them, of every process, are passed
through the policy without gradient. The loss with the chosen members is in `pessimism.losses` and `targets`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from prmd.config.policy import PolicySection
from prmd.config.shared import TrainingConfig
from prmd.errors import ConfigError
from prmd.models.prefix_rows import collate_rows, on_device
from prmd.models.sequence_models import SequenceLogps, supports_shared_prompts
from prmd.models.tokenization import PrefixRow
from prmd.pessimism.losses import edpo_member_losses, edpo_select, implicit_margins
from prmd.policies.inputs import MethodInputs
from prmd.policies.targets import policy_loss
from prmd.training.batches import MicroBatch, plan_run
from prmd.training.trainer import PAIR_WEIGHT, Columns, LossFunction, PairData, PairLoss

HELD_OUT = -1
"""Column `position` of pairs that are not trained on."""


def choosing_members(
    inputs: MethodInputs,
    model: Callable[[], SequenceLogps],
    *,
    policy: PolicySection,
    training: TrainingConfig,
    seed: int,
    pad_id: int,
) -> tuple[MethodInputs, LossFunction]:
    """A training in which every position of the stream is a row of its own, and the loss that chooses by it.

    The loss looks at the whole optimizer step, so it needs the plan of batches and the policy.

    Args:
        model: gives the policy once it is loaded.

    Raises:
        ConfigError: as `refuse_sharded`.
    """
    refuse_sharded()
    inputs = _by_position(inputs)
    plan = plan_run(inputs.train.rows, inputs.stream, training, seed=seed)  # the one `run_training` makes
    selection = MemberSelection(
        [_without_samples(row) for row in inputs.train.rows],
        inputs.train.columns,
        plan.batches,
        batches_per_step=plan.size.batches,
        policy=policy,
        pad_id=pad_id,
    )
    return inputs, selection.loss_function(model)


def _by_position(inputs: MethodInputs) -> MethodInputs:
    """The same training with columns that say where in the stream a row stands, and so to which step it belongs."""
    index = torch.tensor(list(inputs.stream))
    columns = {name: values[index] for name, values in inputs.train.columns.items()}
    columns["position"] = range(len(index))
    names = [inputs.train.name(i) for i in inputs.stream]
    held = {**inputs.held_out.columns, "position": [HELD_OUT] * len(inputs.held_out.rows)}
    return replace(
        inputs,
        train=PairData([inputs.train.rows[i] for i in inputs.stream], columns, names),
        held_out=replace(inputs.held_out, columns=held),
        stream=range(len(index)),
    )


def _without_samples(row: PrefixRow) -> PrefixRow:
    """(chosen, rejected) without the samples of the gamma term."""
    return PrefixRow(row.prompt_ids, row.responses[:2])


def refuse_sharded() -> None:
    """Refuse a run whose processes hold parts of the weights: they cannot be passed through beside the trainer.

    Raises:
        ConfigError: launched by accelerate with FSDP or DeepSpeed.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ConfigError(
                f"policy.methods: edpo does not run under {name}, whose processes hold parts of the weights; launch it on "
                "one GPU or with configs/accelerate/ddp.yaml"
            )


class MemberSelection:
    """The loss of e-DPO for a training in which every position of the stream is a row of its own.

    Args:
        rows: (chosen, rejected) of each position.
        columns: `ref_logps` [n, 2] and `member_targets` [n, K, M] of each position, and weights w [n] where pairs have them.
        plan: the training's micro-batches over positions.
        batches_per_step: micro-batches of an optimiser step over all processes.
    """

    def __init__(
        self,
        rows: Sequence[PrefixRow],
        columns: Columns,
        plan: Sequence[MicroBatch],
        *,
        batches_per_step: int,
        policy: PolicySection,
        pad_id: int,
    ) -> None:
        self.rows, self.columns, self.policy, self.pad_id = rows, columns, policy, pad_id
        self.steps = [plan[i : i + batches_per_step] for i in range(0, len(plan), batches_per_step)]
        self.step_of = {
            row: step for step, batches in enumerate(self.steps) for micro in batches for row in micro.rows
        }
        self.longest = max(row.longest for row in rows)
        self.current, self.selected = HELD_OUT, torch.empty(0)

    def loss_function(self, model: Callable[[], SequenceLogps]) -> LossFunction:
        """What the trainer calls; held-out pairs get the members closest on each batch itself."""

        def loss(logps: Tensor, columns: Columns) -> PairLoss:
            position = int(columns["position"][0])
            if position != HELD_OUT:
                step = self.step_of[position]
                if step != self.current:
                    self.current, self.selected = step, self.select(model(), step)
                columns = {**columns, "selected": self.selected}
            return policy_loss(logps, columns, self.policy, kind="edpo")

        return loss

    @torch.no_grad()
    def select(self, model: SequenceLogps, step: int) -> Tensor:
        """m*_k of an optimiser step, LongTensor [K] on the model's device."""
        device, training = next(model.parameters()).device, model.training
        model.eval()  # dropout would choose by chance
        total, count = torch.zeros(()), 0
        for micro in (micro for micro in self.steps[step] if micro.weight):
            losses = self._member_losses(model, micro.rows, device)
            total, count = total.to(device) + len(micro.rows) * losses, count + len(micro.rows)
        model.train(training)
        return edpo_select(total / count)

    def _member_losses(self, model: SequenceLogps, positions: Sequence[int], device: torch.device) -> Tensor:
        rows, index = [self.rows[i] for i in positions], torch.tensor(list(positions))
        shared = supports_shared_prompts(model.unwrapped.config, self.longest)
        batch = collate_rows(rows, pad_id=self.pad_id, share_prompt=shared)
        read = ("ref_logps", "member_targets", PAIR_WEIGHT)
        columns = on_device({k: self.columns[k][index] for k in read if k in self.columns}, device)
        logps = model(**on_device(batch, device)).reshape(-1, 2)
        ref = columns["ref_logps"]
        implicit = implicit_margins(
            policy_chosen_logps=logps[:, 0],
            policy_rejected_logps=logps[:, 1],
            ref_chosen_logps=ref[:, 0],
            ref_rejected_logps=ref[:, 1],
            beta=self.policy.beta,
        )
        return edpo_member_losses(
            implicit_margins=implicit,
            member_targets=columns["member_targets"].permute(1, 2, 0),
            pair_weights=columns.get(PAIR_WEIGHT),
        )
