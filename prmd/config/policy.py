"""`policy_config.yaml`: how the pessimistic reward is distilled into the policy.

Every default lives in a field and nowhere else; a field is here only if some code reads it.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator

from prmd.config.shared import (
    LoraConfig,
    PositiveFloat,
    RefersToRewardModelConfig,
    Section,
    TrainingConfig,
    TuningConfig,
    check_objectives,
)
from prmd.objectives import OBJECTIVES

# ------------------------------------------------------------------ policies
DistilledMethod = Literal["mean", "hard_min", "cvar", "hierarchical", "lcb", "softmin", "maxmin", "edpo"]
PaperMethod = Literal["paper_eq5", "paper_eq6", "paper_eq7", "paper_eq9"]
LabelMethod = Literal[
    "dpo", "rdpo", "dpo_debiased", "ipo", "modpo", "dpo_helpful", "dpo_harmless", "dpo_honest", "soup"
]
PolicyMethod = Literal[DistilledMethod, PaperMethod, LabelMethod]
"""What `policy.methods` may name; `policies.methods` says what each is."""


class PolicySection(Section):
    methods: tuple[PolicyMethod, ...] = ("hard_min", "cvar")
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
    within: Literal["mean", "min", "cvar", "lcb", "softmin", "none"] | None = None
    across: Literal["mean", "min", "cvar", "softmin"] | None = None
    alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    cvar_estimator: Literal["empirical", "gaussian"] = "empirical"
    kappa: float = Field(default=1.0, ge=0.0)
    eta: PositiveFloat = 2.0
    weights: dict[str, float] = Field(default_factory=lambda: {k: 1.0 / len(OBJECTIVES) for k in OBJECTIVES})
    constraints: dict[str, float] = Field(default_factory=dict)

    @field_validator("constraints")
    @classmethod
    def constraints_name_objectives(cls, value: dict[str, float]) -> dict[str, float]:
        check_objectives(value, "constraints name")
        return value

    @field_validator("weights")
    @classmethod
    def weights_sum_to_one(cls, value: dict[str, float]) -> dict[str, float]:
        unknown = sorted(set(value) - set(OBJECTIVES))
        missing = sorted(set(OBJECTIVES) - set(value))
        if unknown or missing:
            raise ValueError(
                f"weights must name each of {', '.join(OBJECTIVES)} once; unknown {unknown}, missing {missing}"
            )
        if any(w < 0 for w in value.values()) or not math.isclose(sum(value.values()), 1.0, abs_tol=1e-3):
            raise ValueError(f"weights must be at least 0 and sum to 1, got {value}")
        return {k: value[k] / sum(value.values()) for k in OBJECTIVES}


class PairsConfig(Section):
    reference_samples: Annotated[int, Field(ge=0)] = 0
    share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5

    @field_validator("reference_samples")
    @classmethod
    def one_sample_is_no_pair(cls, value: int) -> int:
        if value == 1:
            raise ValueError("reference_samples must be 0 (none) or at least 2: one response makes no pair")
        return value


class PolicyConfig(RefersToRewardModelConfig):
    """`policy_config.yaml`: how the pessimistic reward is distilled into the policy."""

    policy: PolicySection = PolicySection()
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
