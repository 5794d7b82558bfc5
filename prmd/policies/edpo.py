"""e-DPO: regress on the member of each objective that the policy is closest to on the whole effective batch.

    m*_k = argmin_m  mean_i w_i (Delta*_{k,m,i} - Delta_theta,i)^2 ,   i over all pairs of the optimiser step

A micro-batch knows its pairs alone, so before a step the pairs of all of them, of every process, are passed through the
policy without gradient (`trainer.BeforeStep`). The loss of a pair with the chosen members is in `pessimism.losses`.
"""

import os
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from prmd.config.policy import PolicySection
from prmd.errors import ConfigError
from prmd.models.prefix_rows import on_device
from prmd.models.sequence_models import SequenceLogps, supports_shared_prompts
from prmd.models.tokenization import PrefixRow
from prmd.pessimism.losses import edpo_loss, edpo_member_losses, edpo_select, implicit_margins
from prmd.policies.robust_reward import positive_weights
from prmd.training.trainer import PAIR_WEIGHT, BeforeStep, Columns, PairData, split_columns


def edpo_pair_loss(implicit: Tensor, columns: Columns, policy: PolicySection) -> Tensor:
    """Loss of each pair, [B], by the members `columns["selected"]` [K]; without them, by those closest on this very batch."""
    selected = columns.get("selected")
    return edpo_loss(
        implicit_margins=implicit,
        member_targets=columns["member_targets"].permute(1, 2, 0),
        selected=edpo_select(_member_losses(implicit.detach(), columns)) if selected is None else selected,
        weights=positive_weights(policy),
    )


def _member_losses(implicit: Tensor, columns: Columns) -> Tensor:
    return edpo_member_losses(
        implicit_margins=implicit,
        member_targets=columns["member_targets"].permute(1, 2, 0),
        pair_weights=columns.get(PAIR_WEIGHT),
    )


def check_launch() -> None:
    """Refuse, before anything is computed, to train e-DPO on weights that are spread over processes.

    Raises:
        ConfigError: launched by accelerate with FSDP or DeepSpeed: parts of the weights cannot be passed through beside the
            trainer.
    """
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise ConfigError(
                f"policy.methods: edpo does not run under {name}, whose processes hold parts of the weights; launch it on "
                "one GPU or with configs/accelerate/ddp.yaml"
            )


def choosing_members(data: PairData, *, beta: float, pad_id: int) -> BeforeStep:
    """What chooses the members of every optimiser step of a training.

    Args:
        data: its pairs, with the columns `ref_logps` [n, 2] and `member_targets` [n, K, M], and weights w [n] where they have any.
    """
    rows = [PrefixRow(row.prompt_ids, row.responses[:2]) for row in data.rows]  # no samples of the gamma term
    return partial(_selected, pairs=PairData(rows, data.columns), beta=beta, pad_id=pad_id)


@torch.no_grad()
def _selected(
    model: SequenceLogps, batches: Sequence[Sequence[int]], *, pairs: PairData, beta: float, pad_id: int
) -> Columns:
    """The column `selected`: m*_k of the step that is made of these micro-batches, LongTensor [K] on the model's device."""
    device, training = next(model.parameters()).device, model.training
    model.eval()  # dropout would choose by chance
    total, count = 0.0, 0
    for rows in batches:
        longest = max(pairs.rows[i].longest for i in rows)
        shared = supports_shared_prompts(model.unwrapped.config, longest)
        batch = on_device(pairs.batch(rows, pad_id=pad_id, share_prompt=shared), device)
        tensors, columns = split_columns(batch)
        logps, ref = model(**tensors).reshape(-1, 2), columns["ref_logps"]
        implicit = implicit_margins(
            policy_chosen_logps=logps[:, 0],
            policy_rejected_logps=logps[:, 1],
            ref_chosen_logps=ref[:, 0],
            ref_rejected_logps=ref[:, 1],
            beta=beta,
        )
        total, count = total + len(rows) * _member_losses(implicit, columns), count + len(rows)
    model.train(training)
    return {"selected": edpo_select(total / count)}
