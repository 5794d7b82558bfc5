"""Estimators of KL(policy || reference) along responses sampled from the policy.

Here: the exact full-vocabulary KL of each step (Rao-Blackwellised when summed over a sampled response), the
plain log-ratio k1 and the per-token k3. Not here: sampling and forward passes (`generation.py`, `response_kl.py`) and
intervals over prompts (`statistics/intervals.py`, fed with the per-response sums). All of these are unbiased only for
samples at temperature 1 and top-p 1, end-of-turn token included. Read `statistics/intervals.py` next.
"""

import torch
from torch import Tensor

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
