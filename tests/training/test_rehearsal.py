"""The count of live tensor bytes, against sizes known beforehand."""

import torch

from prmd.training.rehearsal import peak_tensor_bytes


def test_count_follows_storages_not_views() -> None:
    old = torch.zeros(1000)
    with peak_tensor_bytes([old, old[:10]]) as count:
        assert count.current == 4000
        new = torch.ones(500, dtype=torch.float64)
        view = new[100:].reshape(20, 20).t()
        assert count.current == 8000
        del new
        assert count.current == 8000  # the view keeps the storage
        del view
        assert count.current == 4000
        assert count.reset_peak() == 8000 and count.peak == 4000
        (torch.ones(100) + 1.0).sum()
    assert count.peak == 4000 + 2 * 400


def test_count_sees_what_autograd_keeps() -> None:
    weight = torch.ones(100, 100, requires_grad=True)
    with peak_tensor_bytes([weight]) as count:
        hidden = (weight * 2.0).exp()  # exp keeps its result for the backward pass
        total = hidden.sum()
        del hidden
        assert count.current == 2 * 40_000 + 4
        total.backward()
        del total
        assert count.current == 2 * 40_000  # the weight and its gradient
