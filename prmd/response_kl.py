"""KL of a policy from the reference on the responses it sampled, one batch of rows at a time.

The formulas are in `kl`; which models, prompts and responses are meant, and the cache, is in `contenders`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from prmd.kl import k1, k3_per_token, token_kl
from prmd.models.sequence_models import LOGITS_AT_ONCE, SequenceLogps


def response_kls(
    policy: nn.Module, as_reference: Callable[[], AbstractContextManager[nn.Module]], batch: dict[str, Tensor]
) -> Tensor:
    """Rao-Blackwellised KL(policy || reference), log-ratio k1 and summed k3 of every response in a batch.

    ``sum_t KL(pi(.|x, y_<t) || ref(.|x, y_<t))`` over the sampled tokens; logits exist for a block of tokens at a time.

    Args:
        policy: the causal model the responses were sampled from.
        as_reference: opens the reference; it may be the same weights with adapters switched off.
        batch: as `models.prefix_rows.collate_rows` returns it.

    Returns:
        [S, 3] float32 nats: exact KL, k1, k3 summed over tokens.

    Source: arXiv:2504.10637.
    """
    inputs = [batch[name] for name in ("input_ids", "position_ids", "segment_ids")]
    predict, targets = batch["predict_index"], batch["target_ids"]
    ours = SequenceLogps(policy)
    hidden = ours.hidden_states(*inputs)[predict]
    with as_reference() as reference:
        theirs = SequenceLogps(reference)
        ref_hidden = theirs.hidden_states(*inputs)[predict]
    step = max(1, LOGITS_AT_ONCE // ours.unwrapped.get_output_embeddings().weight.shape[0])
    sums = torch.zeros(3, len(batch["last_index"]), dtype=torch.float64, device=hidden.device)
    for start in range(0, len(predict), step):
        span = slice(start, start + step)
        logits = ours.logits(hidden[span])
        with as_reference():
            ref_logits = theirs.logits(ref_hidden[span])
        ours_chosen, ref_chosen = (_chosen_logps(values, targets[span]) for values in (logits, ref_logits))
        values = (
            token_kl(policy_logits=logits, ref_logits=ref_logits),
            k1(policy_logps=ours_chosen, ref_logps=ref_chosen),
            k3_per_token(policy_token_logps=ours_chosen, ref_token_logps=ref_chosen),
        )
        sums.index_add_(1, batch["sequence_index"][span], torch.stack(values).double())
    return sums.T.float()


def _chosen_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
