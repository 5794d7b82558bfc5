"""`policy_config.yaml`: how the pessimistic reward is distilled into the policy.

Every default lives in a field and nowhere else; a field is here only if some code reads it.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from prmd.artifacts.paths import is_safe_name
from prmd.config import brought
from prmd.config.shared import (
    LoraConfig,
    MisplacedError,
    PositiveFloat,
    PositiveInt,
    RefersToRewardModelConfig,
    Section,
    TrainingConfig,
    TuningConfig,
    check_objectives,
    checked,
    one_of,
)
from prmd.objectives import METHOD_LIKE, OBJECTIVES

# ------------------------------------------------------------------ policies
OF_ONE_OBJECTIVE = "dpo_"
"""How a method begins that learns from the labels of one objective, whose name follows."""


# Names of operators and methods are the keys of the tables in `pessimism.aggregation`. It is imported where a name is checked:
# it brings torch, which takes seconds, and the other two files are read without.
def policy_methods() -> tuple[str, ...]:
    """What `policy.methods` may name; `policies.methods` says what each is."""
    from prmd.pessimism.aggregation import METHODS
    from prmd.pessimism.draft_equations import PAPER_METHODS

    of_labels = ("dpo", "rdpo", "dpo_debiased", "ipo", "modpo")
    of_one = (f"{OF_ONE_OBJECTIVE}{objective}" for objective in OBJECTIVES)
    return (*METHODS, "edpo", *PAPER_METHODS, *of_labels, *of_one, "soup")


def _known_method(value: Any) -> Any:
    """Any `dpo_<objective>` passes: which objectives there are is checked by `PolicyConfig`."""
    if isinstance(value, str) and value.startswith(OF_ONE_OBJECTIVE):
        return value
    if value == "baseline_dpo":  # a folder and a row of results like any method, so it is looked for here
        raise ValueError(
            f"got {value}, which 3_policy_training/{value}.py trains in any case; leave it out here"
        )
    return one_of(policy_methods(), value)


class PolicySection(Section):
    methods: tuple[Annotated[str, BeforeValidator(_known_method)], ...] = ("hard_min", "cvar")
    beta: PositiveFloat = 0.1
    loss: Literal["squared", "huber", "bce"] = "squared"
    huber_delta: PositiveFloat = 1.0
    reward_scale: Literal["auto"] | PositiveFloat = "auto"
    kl_target: PositiveFloat = 4.0
    margin_clip: Literal["auto"] | PositiveFloat = 5.0
    level: Literal["response", "margin"] = "response"
    nll_weight: float = Field(default=0.0, ge=0.0)
    gamma: float = Field(default=0.0, ge=0.0)
    ipo_beta: PositiveFloat = 0.1
    rdpo_alpha: float = Field(default=0.01, ge=0.0)
    within: str | None = None
    across: str | None = None
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    cvar_estimator: Literal["empirical", "gaussian"] = "empirical"
    kappa: float = Field(default=1.0, ge=0.0)
    eta: PositiveFloat = 2.0
    weights: dict[str, float] = Field(default_factory=lambda: {k: 1.0 / len(OBJECTIVES) for k in OBJECTIVES})
    constraints: dict[str, float] = Field(default_factory=dict)

    @field_validator("within", "across", mode="before")
    @classmethod
    def operators_are_known(cls, value: Any, info: ValidationInfo) -> Any:
        from prmd.pessimism.aggregation import ACROSS, WITHIN

        return None if value is None else one_of(WITHIN if info.field_name == "within" else ACROSS, value)

    @field_validator("weights")
    @classmethod
    def weights_sum_to_one(cls, value: dict[str, float]) -> dict[str, float]:
        total = sum(value.values())
        if value and (any(w < 0 for w in value.values()) or not math.isclose(total, 1.0, abs_tol=1e-3)):
            raise ValueError(f"weights must be at least 0 and sum to 1, got {value}")
        return {k: w / total for k, w in value.items()}

    def of(self, objectives: Sequence[str]) -> "PolicySection":
        """The same for these objectives: weights of each in their order, equal ones where none are given.

        Raises:
            MisplacedError: a weight, constraint or method of another objective, or a weight that is missing.
        """
        given = self.weights if "weights" in self.model_fields_set else {}
        weights = given or {k: 1.0 / len(objectives) for k in objectives}
        unknown, missing = sorted(set(weights) - set(objectives)), sorted(set(objectives) - set(weights))
        if unknown or missing:
            raise MisplacedError(
                f"weights must name each of {', '.join(objectives)} once; unknown {unknown}, missing {missing}",
                "weights",
            )
        check_objectives(self.constraints, objectives, "constraints name", "constraints")
        named = [
            m
            for m in self.methods
            if m.startswith(OF_ONE_OBJECTIVE) and m != f"{OF_ONE_OBJECTIVE}{METHOD_LIKE}"
        ]
        own = [m.removeprefix(OF_ONE_OBJECTIVE) for m in named]
        check_objectives(own, objectives, "methods name", "methods")
        return self.model_copy(update={"weights": {k: weights[k] for k in objectives}})


class PairsConfig(Section):
    reference_samples: Annotated[int, Field(ge=0)] = 0
    share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    max_repeats: PositiveInt | None = None

    @field_validator("reference_samples")
    @classmethod
    def one_sample_is_no_pair(cls, value: int) -> int:
        if value == 1:
            raise ValueError("reference_samples must be 0 (none) or at least 2: one response makes no pair")
        return value


class PolicyConfig(RefersToRewardModelConfig):
    """`policy_config.yaml`: how the pessimistic reward is distilled into the policy."""

    policy: PolicySection = Field(default=PolicySection(), validate_default=True)
    pairs: PairsConfig = PairsConfig()
    run_name: str | None = None
    tuning: TuningConfig = TuningConfig(lora=LoraConfig(learning_rate=5e-6))
    training: TrainingConfig = TrainingConfig(
        learning_rate=5e-7,
        pairs_per_device=2,
        gradient_accumulation_steps=16,
        epochs=1.0,
        checkpoints=(0.33, 0.66, 1.0),
    )

    @field_validator("run_name")
    @classmethod
    def run_name_ends_a_folder_name(cls, value: str | None) -> str | None:
        """Refused when the file is read: in a pipeline the first folder of this name is written hours later."""
        if value and not is_safe_name(f"dpo-{value}"):
            raise ValueError(
                f"got {value!r:.60}, wanted letters, digits and . _ @ + = - (no blank, no slash, no '..'): it ends the names of "
                "folders"
            )
        return value

    @field_validator("policy")
    @classmethod
    def policy_is_of_the_objectives(cls, value: PolicySection, info: ValidationInfo) -> PolicySection:
        shared = info.data.get("reward_model_config")  # missing where it is wrong itself
        if shared is None:
            return value
        needs = {"constraints": bool(value.constraints), "gamma": value.gamma}
        problem = brought.policy_problem(shared.data.from_columns, value.methods, **needs)
        return checked(value.of(shared.data.objectives), problem)

    @field_validator("pairs")
    @classmethod
    def columns_have_no_samples(cls, value: PairsConfig, info: ValidationInfo) -> PairsConfig:
        shared = info.data.get("reward_model_config")
        if shared is None:
            return value
        return checked(value, brought.pairs_problem(shared.data.from_columns, value.reference_samples))
