"""The draft's margin-level objectives by definition, and why they are not the default."""

import math

import numpy as np
import pytest
import torch

from prmd.pessimism.draft_equations import PAPER_METHODS, negative_target_share, paper_loss, paper_margins

UNEVEN = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def margins_of(seed: int, n: int = 8) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 20, n)))


def test_paper_margins_by_definition():
    d = margins_of(11)
    expected = {
        "paper_eq5": d.numpy().mean(axis=1),
        "paper_eq6": d.numpy().min(axis=1),
        "paper_eq7": np.sort(d.numpy(), axis=1)[:, :2].mean(axis=1),
        "paper_eq9": d.numpy().min(axis=(0, 1))[None],
    }
    assert tuple(expected) == PAPER_METHODS
    for method, margins in expected.items():
        np.testing.assert_allclose(paper_margins(d, method=method).numpy(), margins, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "antisymmetric"),
    [("paper_eq5", True), ("paper_eq6", False), ("paper_eq7", False), ("paper_eq9", False)],
)
def test_paper_margins_are_not_antisymmetric_except_the_weighted_sum(method, antisymmetric):
    d = margins_of(12)
    forward = paper_margins(d, method=method)
    backward = paper_margins(-d, method=method)
    assert torch.allclose(forward, -backward, atol=1e-12) == antisymmetric


def test_conflicting_models_give_both_orders_a_negative_target():
    d = torch.tensor([[[1.0]], [[-1.0]]], dtype=torch.float64)
    both = [paper_margins(sign * d, method="paper_eq9") for sign in (1, -1)]
    assert [target.item() for target in both] == [-1.0, -1.0]
    shares = paper_margins(margins_of(13, n=4000), method="paper_eq9")
    assert negative_target_share(shares) > 0.99
    assert negative_target_share(torch.tensor([-1.0, 0.0, 2.0, 3.0])) == 0.25


def test_paper_loss_has_the_gradient_of_the_weighted_mean_target():
    targets = margins_of(14)[:, 0]
    implicit = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    loss = paper_loss(implicit_margins=implicit, objective_targets=targets, weights=UNEVEN)
    np.testing.assert_allclose(loss.detach().numpy(), UNEVEN.numpy() @ targets.numpy() ** 2)
    loss.sum().backward()
    np.testing.assert_allclose(implicit.grad.numpy(), -2 * UNEVEN.numpy() @ targets.numpy())
    single = paper_loss(implicit_margins=implicit, objective_targets=targets[:1], weights=UNEVEN)
    np.testing.assert_allclose(single.detach().numpy(), targets[0].numpy() ** 2)


def test_bad_input_is_refused():
    margins = margins_of(0)
    with pytest.raises(ValueError, match="paper_eq5"):
        paper_margins(margins, method="paper_eq8")
    margins[2, 7, 3] = math.nan
    with pytest.raises(ValueError, match="finite margins"):
        paper_margins(margins, method="paper_eq6")
