"""KL(policy || reference) along responses sampled from the policy.

The exact full-vocabulary KL of each step (Rao-Blackwellised when summed over a sampled response), the plain log-ratio k1
and the per-token k3. All of these are unbiased only for samples at temperature 1 and top-p 1, end-of-turn token included.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from prmd.models.prefix_rows import is_shared
from prmd.models.sequence_models import LOGITS_AT_ONCE, SequenceLogps

_CHUNK_ELEMENTS = 2**23  # one float32 block of 32 MiB; three such blocks live at a time


def token_kl(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL between the two next-token distributions at every position.

    ``sum_v pi(v) * [log pi(v) - log ref(v)]``, computed in float32 in blocks of positions, so that no float32 copy
    of all logits exists.

    Args:
        policy_logits: [N, V], any floating dtype; entries of -inf are tokens of probability zero.
        ref_logits: [N, V].

    Returns:
        KL of each position in nats, float32 [N], >= 0; +inf where the policy uses a token the reference cannot.

    Raises:
        ValueError: different shapes.

    Source: the Rao-Blackwellised estimator of arXiv:2504.10637.
    """
    if policy_logits.shape != ref_logits.shape or policy_logits.ndim != 2:
        raise ValueError(
            f"token_kl: both logits must be [N, V], got {list(policy_logits.shape)} and {list(ref_logits.shape)}"
        )
    rows = max(1, _CHUNK_ELEMENTS // max(1, policy_logits.shape[1]))
    blocks = zip(policy_logits.split(rows), ref_logits.split(rows), strict=True)
    return torch.cat([_block_kl(policy, ref) for policy, ref in blocks])


def _block_kl(policy_logits: Tensor, ref_logits: Tensor) -> Tensor:
    policy_logps = policy_logits.float().log_softmax(dim=-1)
    ref_logps = ref_logits.float().log_softmax(dim=-1)
    probabilities = policy_logps.exp()
    # 0 * (-inf) must be 0: a token the policy never uses costs nothing, whatever the reference thinks of it.
    terms = torch.where(probabilities > 0, probabilities * (policy_logps - ref_logps), 0.0)
    return terms.sum(dim=-1).clamp_min(0.0)


def k1(*, policy_logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Log-ratio ``log pi(y) - log ref(y)``: unbiased for the KL of a response, negative about half the time.

    Args:
        policy_logps: summed over response tokens, nats, [B].
        ref_logps: [B].

    Returns:
        [B], nats.

    Source: http://joschu.net/blog/kl-approx.html
    """
    return policy_logps - ref_logps


def k3_per_token(*, policy_token_logps: Tensor, ref_token_logps: Tensor) -> Tensor:
    """Non-negative per-token estimator ``r - 1 - log r`` with ``r = ref / pi`` of the sampled token.

    Unbiased for the step KL given the prefix. It must not be applied to whole responses, where r underflows and
    single samples dominate.

    Args:
        policy_token_logps: log-probability of each sampled token, [N].
        ref_token_logps: [N].

    Returns:
        [N], nats, >= 0.

    Source: http://joschu.net/blog/kl-approx.html
    """
    log_ratio = ref_token_logps - policy_token_logps
    return torch.expm1(log_ratio) - log_ratio


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
    shared = is_shared(input_ids=batch["input_ids"], last_index=batch["last_index"])
    ours = SequenceLogps(policy)
    hidden = ours.hidden_states(*inputs, shared=shared)[predict]
    with as_reference() as reference:
        theirs = SequenceLogps(reference)
        ref_hidden = theirs.hidden_states(*inputs, shared=shared)[predict]
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
