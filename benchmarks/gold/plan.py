"""Which policies the gold-reward study trains: the main comparison, the case that can show harm, and ablations.

Everything is data here: a `Preset` says how much is run, `main_units`, `harm_units` and `ablations` list the units
(`gold_policies.Unit`). A unit that several tables show is trained once. Files are in `gold/run.py`, numbers in `gold/summary.py`.
"""

from dataclasses import dataclass, replace

from benchmarks.gold.ensembles import BOOTSTRAP, DEBIASED, FAMILY, NONE, STRENGTHS
from benchmarks.gold.models import Sizes
from benchmarks.gold.policies import Unit
from benchmarks.gold.summary import DPO, OURS, TODAY, Compared
from benchmarks.gold.world import LENGTH_COST
from prmd.config.policy import PolicySection

Setting = tuple[tuple[str, float], ...]
COMPARED: tuple[Compared, ...] = (
    DPO,
    ("rdpo", NONE),
    TODAY,
    ("hard_min", DEBIASED),
    OURS,
    ("hierarchical", FAMILY),
    ("mean", FAMILY),
)
HARM: tuple[Compared, ...] = (DPO, TODAY, OURS)
HARM_BIAS, HARM_COST = 0.9, -LENGTH_COST
"""Length is truly good and selection adds to it, as in scenario G90 of `closed_form/scenarios.py`."""
MATCHED_KL = 0.75
"""Nats per response at which methods are compared: low enough that every method's training passes it at every bias."""
CHANGED: dict[str, Setting] = {"rdpo": (("rdpo_alpha", 0.15),)}
"""Settings of the main comparison that are not the shipped ones. The shipped `rdpo_alpha` is for responses of hundreds of
tokens and would leave DPO as it is here. Log-odds of the pooled labels rise by .16 a letter at rho = .9, .10 at .8, 0 at .5."""
FAR_KL_TARGET = 64.0
"""Budget of the over-optimisation curves, sixteen times the shipped one."""


@dataclass(frozen=True)
class Preset:
    """How much of the study is run.

    Attributes:
        seeds: of the main comparison; the first `harm_seeds` of them run the case that can show harm, the first
            `ablation_seeds` the ablations.
        biases: rho of the main comparison.
        ablation_bias: rho of the ablations; one of `biases`.
        ablations: names of the ablations to run, of `ablations`; with any, settings of the ensembles' heads are compared
            too (`gold/heads.py`).
    """

    sizes: Sizes
    seeds: tuple[int, ...]
    biases: tuple[float, ...]
    harm_seeds: int
    ablation_bias: float
    ablation_seeds: int
    ablations: tuple[str, ...] = ()

    def unit(self, compared: Compared, bias: float, seed: int) -> Unit:
        """A method of the main comparison."""
        method, family = compared
        return Unit(method, bias, seed, CHANGED.get(method, ()), self.sizes.members, family=family)

    def ablation_row(
        self, label: str, compared: Compared, settings: Setting | None = None, **changes: object
    ) -> tuple[str, list[Unit]]:
        """A row of an ablation: the main comparison's units at its bias and seeds, changed."""
        if settings is not None:
            changes["settings"] = settings
        seeds = self.seeds[: self.ablation_seeds]
        return label, [replace(self.unit(compared, self.ablation_bias, seed), **changes) for seed in seeds]

    def with_ablations(self) -> "Preset":
        """The same with every ablation."""
        return replace(self, ablations=EVERY_ABLATION)


EVERY_ABLATION = (
    "over_optimisation",
    "members",
    "strengths",
    "alpha",
    "beta",
    "kl_target",
    "calibration",
    "rdpo_alpha",
)
FULL = Preset(Sizes(), (0, 1, 2, 3, 4, 5), (0.5, 0.8, 0.9), 3, 0.9, 3)
QUICK = Preset(Sizes(), (0, 1), (0.5, 0.9), 1, 0.9, 1)


def main_units(preset: Preset) -> list[Unit]:
    """Every method at every bias and seed, one seed after the other."""
    return [
        preset.unit(compared, bias, seed)
        for seed in preset.seeds
        for bias in preset.biases
        for compared in COMPARED
    ]


def harm_units(preset: Preset) -> dict[Compared, list[Unit]]:
    """The units of all seeds where length is truly good, by method and family."""
    return {
        compared: [
            replace(preset.unit(compared, HARM_BIAS, seed), length_cost=HARM_COST)
            for seed in preset.seeds[: preset.harm_seeds]
        ]
        for compared in HARM
    }


def ablations(preset: Preset) -> dict[str, list[tuple[str, list[Unit]]]]:
    """By ablation, its rows: the varied value in words and the units of all seeds.

    over_optimisation: curves to a KL far beyond the shipped target, with what the reward models think.
    members: ensemble size; one member is r_0 alone, for which every within-objective operator is the same.
    strengths: of the first and the last head on the debiased backbones.
    alpha: tail share of CVaR. beta: of DPO, and of distillation, whose automatic reward scale cancels it.
    kl_target: budget that fixes the reward scale. calibration: the minimum over uncalibrated rewards.
    rdpo_alpha: the shipped value of length-regularised DPO beside that of the main comparison.
    """
    row, largest = preset.ablation_row, preset.sizes.members
    far = {"settings": (("kl_target", FAR_KL_TARGET),), "proxy": True}
    sizes = sorted({1, 3, 5, largest})
    tables = {
        "over_optimisation": [
            row("mean, single reward model", ("mean", BOOTSTRAP), members=1, **far),
            row(f"mean, family, M = {largest}", ("mean", FAMILY), **far),
            row(f"hard_min, today's heads, M = {largest}", TODAY, **far),
            row(f"hard_min, family, M = {largest}", OURS, **far),
        ],
        "members": [row(f"hard_min, M = {m}", OURS, members=m) for m in sizes],
        "strengths": [
            row(f"hard_min, s from {low:g} to {high:g}", ("hard_min", family))
            for family, (low, high) in STRENGTHS.items()
        ],
        "alpha": [
            row(f"hierarchical, alpha = {alpha:g}", ("hierarchical", FAMILY), _changed("alpha", alpha))
            for alpha in (0.05, 0.1, 0.2, 0.5)
        ],
        "beta": [
            row(f"{compared[0]}, beta = {beta:g}", compared, _changed("beta", beta))
            for compared in (DPO, OURS)
            for beta in (0.03, 0.1, 0.3)
        ],
        "kl_target": [
            row(f"hard_min, kl_target = {target:g}", OURS, _changed("kl_target", target))
            for target in (1.0, 4.0, 16.0)
        ],
        "calibration": [
            row(f"hard_min, {'raw' if raw else 'calibrated'}", OURS, raw=raw) for raw in (True, False)
        ],
        "rdpo_alpha": [
            row(f"rdpo, rdpo_alpha = {alpha:g}", ("rdpo", NONE), (("rdpo_alpha", alpha),))
            for alpha in (PolicySection().rdpo_alpha, dict(CHANGED["rdpo"])["rdpo_alpha"])
        ],
    }
    return {name: tables[name] for name in preset.ablations}


def _changed(name: str, value: float) -> Setting:
    """No change where the value is the shipped one, so that the unit of the main comparison is used."""
    return () if value == getattr(PolicySection(), name) else ((name, value),)


def shipped(preset: Preset, unit: Unit) -> Unit:
    """The unit of the main comparison that an ablation's unit varies."""
    family = FAMILY if unit.family in STRENGTHS else unit.family
    return preset.unit((unit.method, family), unit.bias, unit.seed)


def all_units(preset: Preset) -> list[Unit]:
    """Every unit once, in the order it should run: the main comparison, the case of harm, ablations."""
    harm = [unit for units in harm_units(preset).values() for unit in units]
    extra = [unit for rows in ablations(preset).values() for _, units in rows for unit in units]
    return list(dict.fromkeys([*main_units(preset), *harm, *sorted(extra, key=lambda unit: unit.seed)]))
