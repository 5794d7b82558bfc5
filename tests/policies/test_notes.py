"""Which methods coincide on an ensemble, and the reason that is given."""

import torch

from prmd.pessimism.aggregation import METHODS
from prmd.policies.notes import coincidence_notes, coinciding_methods

UNEVEN = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def test_none_coincide_on_the_shipped_ensemble_size():
    assert coinciding_methods(3, 20, aggregations=METHODS, weights=torch.full((3,), 1 / 3)) == {}


def test_one_member_is_reported_as_coinciding():
    same = coinciding_methods(3, 1, aggregations=METHODS, weights=UNEVEN)
    assert set(same["hierarchical"]) == {"hard_min", "cvar"}
    assert set(same["lcb"]) == {"mean"}
    assert "maxmin" not in same
    notes = coincidence_notes(3, 1, aggregations=METHODS, weights=UNEVEN)
    assert "hierarchical = hard_min, cvar: one member per objective" in notes


def test_too_few_members_for_alpha_is_reported_with_the_reason():
    methods = {name: METHODS[name] for name in ("mean", "hard_min", "hierarchical", "cvar")}
    same = coinciding_methods(3, 5, aggregations=methods, weights=torch.full((3,), 1 / 3))
    assert same == {"hard_min": ["hierarchical"], "hierarchical": ["hard_min"]}
    notes = coincidence_notes(3, 5, aggregations=methods, weights=torch.full((3,), 1 / 3))
    assert "hierarchical = hard_min: its CVaR averages 0.5 <= 1 members" in notes


def test_one_objective_is_reported():
    notes = coincidence_notes(1, 20, aggregations=METHODS, weights=torch.ones(1))
    assert "hierarchical = cvar: one objective" in notes
    assert "maxmin = mean: one objective" in notes
