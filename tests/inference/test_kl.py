"""KL estimators against full enumeration of a small autoregressive model."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from prmd.inference import kl

VOCABULARY, LENGTH = 4, 3


def toy_model(seed: int, sharpness: float) -> dict[tuple[int, ...], np.ndarray]:
    """Log-probabilities of the next token after every prefix, drawn at random."""
    rng = np.random.default_rng(seed)
    prefixes = [p for t in range(LENGTH) for p in itertools.product(range(VOCABULARY), repeat=t)]
    logits = {prefix: sharpness * rng.normal(size=VOCABULARY) for prefix in prefixes}
    return {prefix: row - logsumexp(row) for prefix, row in logits.items()}


def enumerated_kl(policy: dict, ref: dict) -> float:
    total = 0.0
    for response in itertools.product(range(VOCABULARY), repeat=LENGTH):
        policy_logp = sum(policy[response[:t]][response[t]] for t in range(LENGTH))
        ref_logp = sum(ref[response[:t]][response[t]] for t in range(LENGTH))
        total += math.exp(policy_logp) * (policy_logp - ref_logp)
    return total


@pytest.fixture(scope="module")
def sampled() -> dict:
    """20,000 responses of the policy with everything the estimators need."""
    policy, ref = toy_model(0, 1.0), toy_model(1, 1.0)
    rng = np.random.default_rng(2)
    rows = {"policy": [], "ref": [], "tokens": [], "sequence": []}
    for i in range(20_000):
        prefix: tuple[int, ...] = ()
        for _ in range(LENGTH):
            token = int(np.searchsorted(np.exp(policy[prefix]).cumsum(), rng.random()))
            token = min(token, VOCABULARY - 1)
            rows["policy"].append(policy[prefix])
            rows["ref"].append(ref[prefix])
            rows["tokens"].append(token)
            rows["sequence"].append(i)
            prefix += (token,)
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in rows.items()}
    return tensors | {"exact": enumerated_kl(policy, ref)}


def test_all_estimators_agree_with_enumeration(sampled):
    index = torch.arange(len(sampled["tokens"]))
    policy = sampled["policy"][index, sampled["tokens"]]
    ref = sampled["ref"][index, sampled["tokens"]]
    by_token = {
        "exact": kl.token_kl(sampled["policy"], sampled["ref"]),
        "k1": kl.k1(policy_logps=policy, ref_logps=ref),
        "k3": kl.k3_per_token(policy_token_logps=policy, ref_token_logps=ref),
    }
    sums = {name: values.double().reshape(-1, LENGTH).sum(1).numpy() for name, values in by_token.items()}
    errors = {name: values.std() / math.sqrt(len(values)) for name, values in sums.items()}
    assert sampled["exact"] > 0.5
    for name, values in sums.items():
        assert abs(values.mean() - sampled["exact"]) < 4 * errors[name], name
    assert errors["exact"] < errors["k1"] / 2


def test_rao_blackwell_expectation_is_exact():
    """Weighted by the probability of each prefix, the step KLs sum to the enumerated KL."""
    policy, ref = toy_model(3, 1.5), toy_model(4, 1.5)
    prefixes = list(policy)
    logits = [torch.from_numpy(np.array([model[p] for p in prefixes])) for model in (policy, ref)]
    steps = kl.token_kl(logits[0] + 3.0, logits[1] - 1.0)
    reach = [math.exp(sum(policy[p[:t]][p[t]] for t in range(len(p)))) for p in prefixes]
    assert float(steps.double() @ torch.tensor(reach, dtype=torch.float64)) == pytest.approx(
        enumerated_kl(policy, ref), rel=1e-5
    )


def test_token_kl_is_exactly_zero_for_equal_logits_and_chunks_agree(monkeypatch):
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    assert kl.token_kl(logits, logits).tolist() == [0.0] * 9
    other = logits.flip(0)
    whole = kl.token_kl(logits, other)
    monkeypatch.setattr(kl, "_CHUNK_ELEMENTS", 100)
    torch.testing.assert_close(kl.token_kl(logits, other), whole)
    assert whole.dtype == torch.float32


def test_token_kl_with_impossible_tokens():
    policy = torch.tensor([[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]])
    ref = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -math.inf]])
    divergence = kl.token_kl(policy, ref)
    assert divergence[0].item() == pytest.approx(math.log(1.5))
    assert divergence[1].item() == math.inf
    assert kl.token_kl(policy[:1], policy[:1]).item() == 0.0


def test_k1_and_k3_by_hand():
    policy, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0])
    assert kl.k1(policy_logps=policy, ref_logps=ref).tolist() == pytest.approx([0.5, 0.0])
    k3 = kl.k3_per_token(policy_token_logps=policy, ref_token_logps=ref)
    assert k3.tolist() == pytest.approx([math.exp(-0.5) - 1 + 0.5, 0.0], abs=1e-7)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[N, V\]"):
        kl.token_kl(torch.zeros(2, 3), torch.zeros(2, 4))
