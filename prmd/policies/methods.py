"""The methods of stage 3 as data: what each learns from, which settings it reads, what it needs.

Here: one row per name of `policy.methods`, and the checks of a configuration against them. Not here: how a row becomes
target margins (`targets`, to be read next) and how policies are trained (`train`). Every method sees the
same labelled pairs in the same order and the same trainer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from prmd.config.policy import OF_ONE_OBJECTIVE, PairsConfig, PolicySection
from prmd.config.shared import CalibrationConfig
from prmd.errors import ConfigError
from prmd.objectives import OBJECTIVES
from prmd.pessimism.aggregation import METHODS, Aggregation, Parameters, method_aggregation

BASELINE = "baseline_dpo"
SOUP = "soup"


@dataclass(frozen=True)
class Method:
    """What tells one method from another.

    Attributes:
        loss: key of `targets.LOSSES`; "trl" is trained by TRL and "soup" not at all.
        reward: the robust reward R. "distil" regresses on its margins; for "paper" and "edpo", whose targets are made
            from margins, it fixes the reward scale and ranks reference samples. None: R is not used.
        objective: train on the pairs labelled for this objective alone; None: on all.
    """

    loss: str
    reward: Aggregation | None = None
    objective: str | None = None

    @property
    def reads_rewards(self) -> bool:
        """Whether reward models are needed."""
        return self.reward is not None or self.loss == "modpo"


POLICY_METHODS: dict[str, Method] = {
    **{name: Method("distil", reward) for name, reward in METHODS.items()},
    "paper_eq5": Method("paper", Aggregation("mean", "mean")),
    "paper_eq6": Method("paper", Aggregation("min", "mean")),
    "paper_eq7": Method("paper", Aggregation("cvar", "mean")),
    "paper_eq9": Method("paper", Aggregation("min", "min")),
    "edpo": Method("edpo", Aggregation("mean", "mean")),
    "dpo": Method("dpo"),
    "rdpo": Method("rdpo"),
    "dpo_debiased": Method("dpo_debiased"),
    "ipo": Method("ipo"),
    "modpo": Method("modpo"),
    **{f"{OF_ONE_OBJECTIVE}{objective}": Method("dpo", objective=objective) for objective in OBJECTIVES},
    SOUP: Method("soup"),
    BASELINE: Method("trl"),
}


def method_of(name: str) -> Method:
    """The row of a method; that of `dpo_<objective>` for an objective of one's own too."""
    if name in POLICY_METHODS or not name.startswith(OF_ONE_OBJECTIVE):
        return POLICY_METHODS[name]
    return Method("dpo", objective=name.removeprefix(OF_ONE_OBJECTIVE))


def soup_members(objectives: Iterable[str]) -> tuple[str, ...]:
    """The per-objective policies that a soup averages."""
    return tuple(f"{OF_ONE_OBJECTIVE}{objective}" for objective in objectives)


_ALWAYS = ("beta", "weights")
_REGRESSION = (*_ALWAYS, "nll_weight", "gamma", "reward_scale", "margin_clip")
_READ = {
    "trl": _ALWAYS,
    "soup": ("weights",),
    "dpo": (*_ALWAYS, "nll_weight"),
    "rdpo": (*_ALWAYS, "nll_weight", "rdpo_alpha"),
    "dpo_debiased": (*_ALWAYS, "nll_weight"),
    "ipo": (*_ALWAYS, "nll_weight", "ipo_beta"),
    "modpo": (*_ALWAYS, "nll_weight"),
    "distil": (*_REGRESSION, "loss", "level", "constraints"),
    "paper": _REGRESSION,
    "edpo": _REGRESSION,
}


def aggregation(policy: PolicySection, method: str) -> Aggregation:
    """The operators of a method's R with the configured parameters.

    `within` and `across` replace the method's own where set; not those of the draft's equations, which are fixed, and
    not the sum across objectives of maxmin, whose weights are solved for.
    """
    parameters = Parameters(**{field.name: getattr(policy, field.name) for field in fields(Parameters)})
    known = POLICY_METHODS.get(method)
    if known is not None and known.loss != "distil" and known.reward is not None:
        return replace(known.reward, parameters=parameters)
    across = None if method == "maxmin" else policy.across
    return method_aggregation(method, within=policy.within, across=across, parameters=parameters)


def settings_read(policy: PolicySection, pairs: PairsConfig, method: str) -> dict[str, Any]:
    """The settings of `policy` and `pairs` that this method's targets and loss depend on; nothing it does not read."""
    kind = method_of(method).loss
    names = [n for n in _READ[kind] if n != "weights" or method_of(method).objective is None]
    values: dict[str, Any] = {}
    if method_of(method).reward is not None:
        chosen = aggregation(policy, method)
        values["reward"] = [chosen.within, chosen.across]
        names += chosen.reads
        if policy.reward_scale == "auto" or _needs_samples(policy, method):
            names.append("kl_target")
        if kind == "distil" and policy.loss == "huber":
            names.append("huber_delta")
        if pairs.reference_samples:
            values["pairs"] = pairs.model_dump(exclude={"max_repeats"})  # which is read where it binds
    elif kind == "modpo":
        values["reference_samples"] = pairs.reference_samples
    return values | {name: getattr(policy, name) for name in names}


def reward_keys(policy: PolicySection, method: str, models: Sequence[str]) -> list[list[str]]:
    """Keys of the reward models that a method's rewards come from, among those of all objectives.

    They are those of the objectives of positive weight, and of those it holds to a threshold. Earlier versions counted all;
    where a weight of 0 changed nothing else of R, their list is the second one, so that what is finished stays so.
    """
    held = policy.constraints if _is_distilled(method) else {}
    read = [k for k, (name, weight) in enumerate(policy.weights.items()) if weight > 0 or name in held]
    keys = [models[k] for k in read if models]
    if keys == [*models] or _reads_no_weights(policy, method):
        return [keys]
    return [keys, [*models]]


def _reads_no_weights(policy: PolicySection, method: str) -> bool:
    """Whether the weights say no more of R than which objectives are part of it: it is a minimum, or solves for its own."""
    if method_of(method).reward is None:
        return False
    return method == "maxmin" or aggregation(policy, method).across == "min"


_FORMULAS = 2
"""Raised where targets are made of the same settings by another formula: 2, reward_scale: auto is cross-fitted, calibration
prompts have 16 samples, and margin_clip: auto has taken the place of `_EARLIER_CLIP`."""
_EARLIER_CLIP = 5.0


def settings_keys(
    policy: PolicySection, pairs: PairsConfig, method: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What fingerprints are made of: today's `settings_read` with the formulas that read them, and those of earlier versions.

    A training that an earlier version finished stays finished; one that it began is not gone on with, as its targets would
    change on the way.
    """
    read = settings_read(policy, pairs, method)
    if method_of(method).reward is None:
        return read, read
    before = read | ({"margin_clip": _EARLIER_CLIP} if read.get("margin_clip") == "auto" else {})
    return read | {"formulas": _FORMULAS}, before


def unread_settings(policy: PolicySection, method: str) -> tuple[str, ...]:
    """The settings of what is optimised that were changed from their default and that this method does not read."""
    read = {*_READ[method_of(method).loss]}
    if method_of(method).loss == "distil":
        read |= {"within"} if method == "maxmin" else {"within", "across"}
    default = PolicySection()
    shaping = ("within", "across", "level", "loss", "gamma", "nll_weight", "constraints")
    return tuple(
        name for name in shaping if getattr(policy, name) != getattr(default, name) and name not in read
    )


def reference_sample_count(pairs: PairsConfig, calibration: CalibrationConfig) -> int:
    """Samples of pi_ref drawn for each prompt; 0 where the configuration draws none."""
    if pairs.reference_samples:
        return pairs.reference_samples
    return calibration.samples_per_prompt if calibration.source == "reference_samples" else 0


def uses_gamma(policy: PolicySection, method: str) -> bool:
    """Whether this method's loss has the forward-KL term on reference samples."""
    return policy.gamma > 0 and method_of(method).reward is not None


def check_methods(methods: Sequence[str], policy: PolicySection, *, samples: int) -> None:
    """Refuse, before anything is loaded, a method that the configuration cannot serve.

    Args:
        samples: samples of pi_ref for each prompt, from `reference_sample_count`.

    Raises:
        ConfigError: a method needs samples of the reference and none are configured, or an operator does not fit it.
    """
    for method in methods:
        needs = _needs_samples(policy, method)
        if needs and not samples:
            raise ConfigError(
                f"{needs}: {method} needs samples of the reference policy and there are none (calibration.source: "
                "validation_responses, pairs.reference_samples: 0); set pairs.reference_samples=16 or "
                "calibration.source=reference_samples"
            )
        if method == "maxmin" and policy.within == "none":
            raise ConfigError(
                "policy.within: none leaves maxmin no reward per objective; set mean, lcb or cvar, or null"
            )


def _needs_samples(policy: PolicySection, method: str) -> str:
    """The setting because of which a method needs samples of the reference; empty where it does not."""
    if method == "maxmin":
        return "policy.methods"
    if uses_gamma(policy, method):
        return "policy.gamma"
    return "policy.constraints" if policy.constraints and _is_distilled(method) else ""


def _is_distilled(method: str) -> bool:
    return method_of(method).loss == "distil"
