"""The order in which a reward model sees its pairs, and its loss."""

import pytest
import torch

from prmd.errors import ConfigError
from prmd.rewards.backbone import epoch_stream, reward_loss


@pytest.mark.parametrize(("n", "epochs", "wanted"), [(10, 1.0, 10), (10, 2.5, 25), (7, 0.5, 4), (3, 1.34, 4)])
def test_stream_takes_every_pair_once_an_epoch(n: int, epochs: float, wanted: int) -> None:
    stream = epoch_stream(n, epochs, seed=1)
    assert len(stream) == wanted and stream == epoch_stream(n, epochs, seed=1)
    for start in range(0, wanted, n):
        part = stream[start : start + n]
        assert len(set(part)) == len(part) and set(part) <= set(range(n))
    if wanted > n:
        assert stream[:n] != stream[n : 2 * n]


def test_a_stream_of_no_pair_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"^training\.epochs: 0\.1 of 4 pairs come to none, wanted at least one"
    ):
        epoch_stream(4, 0.1, seed=1)


def test_loss_is_bradley_terry_with_centring() -> None:
    rewards = torch.tensor([[2.0, 0.5], [-1.0, 1.0], [0.0, 0.0]])
    result = reward_loss(rewards, 0.01)
    expected = torch.log1p(torch.exp(-torch.tensor([1.5, -2.0, 0.0]))) + 0.01 * torch.tensor([6.25, 0.0, 0.0])
    assert torch.allclose(result.loss, expected)
    assert result.metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.5]
    assert result.metrics["rewards/margins"].tolist() == [1.5, -2.0, 0.0]
