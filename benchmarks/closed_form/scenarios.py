"""The scenarios of the closed-form study: what labels are biased by, how, and whether length is truly good.

Nine are about length; in the last two labels follow a count of filler letters, which is named in one of them and not in the
other. All use the responses of one world (`gold/reference.py`); labels are drawn by `gold/labels.py`.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.gold.labels import RATERS, SELECTION, LabelledPairs, label_pairs
from benchmarks.gold.models import Samples
from benchmarks.gold.reference import World, with_length_cost
from benchmarks.gold.world import FILLER, LENGTH_COST, decode
from prmd.objectives import OBJECTIVES

LONGER, SHORTER, FILLERS = "longer", "shorter", "filler"


@dataclass(frozen=True)
class Scenario:
    """One way in which labels are made.

    Attributes:
        title: in words, for tables.
        bias: rho.
        by: what labels favor beside the true reward.
        kind: of the bias, see `gold/labels.py`.
        length_cost: of the true reward; below 0 length is truly good.
        named: features that the reward models are told of.
    """

    title: str
    bias: float
    by: str = LONGER
    kind: str = SELECTION
    length_cost: float = LENGTH_COST
    named: tuple[str, ...] = ("length",)


SCENARIOS = {
    "L50": Scenario("no bias", 0.5),
    "L65": Scenario("longer favored, .65", 0.65),
    "L80": Scenario("longer favored, .8", 0.8),
    "L90": Scenario("longer favored, .9", 0.9),
    "L95": Scenario("longer favored, .95", 0.95),
    "S90": Scenario("shorter favored, .9", 0.9, by=SHORTER),
    "A90": Scenario("raters favor length, .9", 0.9, kind=RATERS),
    "G50": Scenario("length truly good, no bias", 0.5, length_cost=-LENGTH_COST),
    "G90": Scenario("length truly good, longer favored, .9", 0.9, length_cost=-LENGTH_COST),
    "F90": Scenario("filler favored, .9, not named", 0.9, by=FILLERS),
    "N90": Scenario("filler favored, .9, named", 0.9, by=FILLERS, named=("length", "filler")),
}
ABOUT_LENGTH = tuple(name for name, scenario in SCENARIOS.items() if scenario.by != FILLERS)
UNBIASED = {LENGTH_COST: "L50", -LENGTH_COST: "G50"}
"""The scenario whose labels are the ceiling of all others of the same true rewards."""


def feature_of(name: str, samples: Samples) -> np.ndarray:
    """A named feature of samples, [X, n]: `length` in tokens or `filler` letters."""
    if name == "length":
        return np.array([[len(r.token_ids) for r in group] for group in samples], dtype=np.float64)
    counts = [[sum(map(decode(r.token_ids).count, FILLER)) for r in group] for group in samples]
    return np.array(counts, dtype=np.float64)


def scenario_pairs(world: World, scenario: Scenario, objective: str) -> LabelledPairs:
    """The labelled pairs of an objective; scenarios differ in labels and in what is kept, never in the order of draws."""
    k = OBJECTIVES.index(objective)
    by = feature_of("filler" if scenario.by == FILLERS else "length", world.samples)
    return label_pairs(
        np.random.default_rng([world.seed, 3, k]),
        rewards=with_length_cost(world, scenario.length_cost).rewards[k],
        lengths=-by if scenario.by == SHORTER else by,
        objective=objective,
        bias=scenario.bias,
        count=world.sizes.pairs,
        kind=scenario.kind,
    )
