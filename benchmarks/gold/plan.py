"""Which policies the gold-reward study trains: the main comparison and its ablations, at full and at quick size.

Everything is data here: a `Preset` says how much is run, `main_units` and `ablations` list the units (`gold_policies.Unit`).
A unit that several tables show is trained once. Files are in `gold/run.py`, numbers in `gold/summary.py`.
"""

from dataclasses import dataclass, replace

from benchmarks.gold.models import Sizes
from benchmarks.gold.policies import Unit
from prmd.config.policy import PolicySection

Setting = tuple[tuple[str, float], ...]
METHODS = ("dpo", "ipo", "mean", "hard_min", "cvar", "hierarchical", "maxmin")
MATCHED_KL = 0.75
"""Nats per response at which methods are compared: low enough that every method's training passes it at every bias."""
CHANGED: dict[str, Setting] = {"ipo": (("ipo_beta", 0.05),)}
"""Settings of the main comparison that are not the shipped ones: the shipped `ipo_beta` ends before the matched KL."""
FAR_KL_TARGET = 64.0
"""Budget of the over-optimisation curves, sixteen times the shipped one."""


@dataclass(frozen=True)
class Preset:
    """How much of the study is run.

    Attributes:
        seeds: of the main comparison; the first `ablation_seeds` of them run everything else.
        biases: rho of the main comparison.
        ablation_bias: rho of everything else; one of `biases`.
        ablations: names of the ablations to run, of `ablations`.
        heads: also compare settings of the ensembles' heads (`gold/heads.py`).
    """

    sizes: Sizes
    seeds: tuple[int, ...]
    biases: tuple[float, ...]
    ablation_bias: float
    ablation_seeds: int
    ablations: tuple[str, ...]
    heads: bool

    def unit(self, method: str, bias: float, seed: int) -> Unit:
        """A method of the main comparison."""
        return Unit(method, bias, seed, CHANGED.get(method, ()), self.sizes.members)


EVERY_ABLATION = ("over_optimisation", "calibration", "members", "alpha", "beta", "kl_target")
FULL = Preset(Sizes(), (0, 1, 2, 3, 4), (0.5, 0.65, 0.8, 0.9), 0.8, 3, EVERY_ABLATION, heads=True)
QUICK = Preset(Sizes(), (0, 1), (0.5, 0.8), 0.8, 1, EVERY_ABLATION, heads=False)


def main_units(preset: Preset) -> list[Unit]:
    """Every method at every bias and seed, one seed after the other."""
    return [
        preset.unit(method, bias, seed)
        for seed in preset.seeds
        for bias in preset.biases
        for method in METHODS
    ]


def ablations(preset: Preset) -> dict[str, list[tuple[str, list[Unit]]]]:
    """By ablation, its rows: the varied value in words and the units of all seeds.

    over_optimisation: curves to a KL far beyond the shipped target, with what the reward models think.
    calibration: minima and mean over uncalibrated rewards, beside calibrated ones.
    members: ensemble size; one member is r_0 alone, for which every within-objective operator is the same.
    alpha: tail share of CVaR. beta: of DPO, and of distillation, whose automatic reward scale cancels it.
    kl_target: budget that fixes the reward scale.
    """
    bias, seeds = preset.ablation_bias, preset.seeds[: preset.ablation_seeds]
    largest = preset.sizes.members

    def over_seeds(method: str, **changes: object) -> list[Unit]:
        return [replace(preset.unit(method, bias, seed), **changes) for seed in seeds]

    def row(label: str, method: str, settings: Setting = (), **changes: object) -> tuple[str, list[Unit]]:
        return label, over_seeds(method, settings=settings, **changes)

    far = {"settings": (("kl_target", FAR_KL_TARGET),), "proxy": True}
    sizes = sorted({1, 3, 5, largest})
    tables = {
        "over_optimisation": [
            row("single reward model", "mean", members=1, **far),
            *(row(f"{m}, M = {largest}", m, **far) for m in ("mean", "hard_min", "hierarchical")),
        ],
        "calibration": [
            row(f"{m}, {'raw' if raw else 'calibrated'}", m, raw=raw)
            for m in ("mean", "hard_min", "hierarchical")
            for raw in (True, False)
        ],
        "members": [
            *(row(f"hierarchical, M = {m}", "hierarchical", members=m) for m in sizes),
            *(row(f"hard_min, M = {m}", "hard_min", members=m) for m in sizes[1:]),
        ],
        "alpha": [
            row(f"{method}, alpha = {alpha:g}", method, _changed("alpha", alpha))
            for method in ("hierarchical", "cvar")
            for alpha in (0.05, 0.1, 0.2, 0.5)
        ],
        "beta": [
            row(f"{method}, beta = {beta:g}", method, _changed("beta", beta))
            for method in ("dpo", "hierarchical")
            for beta in (0.03, 0.1, 0.3)
        ],
        "kl_target": [
            row(f"hierarchical, kl_target = {target:g}", "hierarchical", _changed("kl_target", target))
            for target in (1.0, 4.0, 16.0)
        ],
    }
    return {name: tables[name] for name in preset.ablations}


def _changed(name: str, value: float) -> Setting:
    """No change where the value is the shipped one, so that the unit of the main comparison is used."""
    return () if value == getattr(PolicySection(), name) else ((name, value),)


def all_units(preset: Preset) -> list[Unit]:
    """Every unit once, in the order it should run."""
    extra = [unit for rows in ablations(preset).values() for _, units in rows for unit in units]
    return list(dict.fromkeys([*main_units(preset), *sorted(extra, key=lambda unit: unit.seed)]))
