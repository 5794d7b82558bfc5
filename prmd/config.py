"""What can be configured: frozen models of the three YAML files; every default lives here and nowhere else.

`config_file` reads the YAML and turns mistakes into file:line messages; nothing here reads a file. A field is here only
if some code reads it. `RewardModelConfig` also holds what all stages share (`data`, `model`, `artifact_root`, `seed`);
the policy and evaluation files refer to it, so that the approach is written once.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from prmd.objectives import OBJECTIVES
from prmd.paths import ArtifactPaths, resolve_artifact_root

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
Approach = Literal["hh_truthfulqa", "pku_safe", "embedded"]
PositiveFloat = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# ------------------------------------------------------------------ data
class HhRlhfConfig(Section):
    path: str = "Anthropic/hh-rlhf"
    revision: str = "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa"
    helpful_subsets: tuple[str, ...] = ("helpful-base", "helpful-online", "helpful-rejection-sampled")
    harmless_subsets: tuple[str, ...] = ("harmless-base",)


class TruthfulQaConfig(Section):
    path: str = "truthfulqa/truthful_qa"
    revision: str = "741b8276f2d1982aa3d5b832d3ee81ed3b896490"
    pairs_per_question: PositiveInt = 3
    benchmark_fraction: Fraction = 0.5


class PkuSafeRlhfConfig(Section):
    path: str = "PKU-Alignment/PKU-SafeRLHF"
    revision: str = "9421ffafec3fa40a1f1a7d567b4d525079477ecb"
    honest: Literal["deception_categories", "better_response", "truthfulqa"] = "deception_categories"


class SplitsConfig(Section):
    val_fraction: Fraction = 0.05
    test_fraction: Fraction = 0.1
    judge_fraction: Fraction = 0.1
    near_duplicate_threshold: Fraction = 0.8

    @model_validator(mode="after")
    def leave_some_for_training(self) -> "SplitsConfig":
        total = self.val_fraction + self.test_fraction + self.judge_fraction
        if total >= 1.0:
            raise ValueError(
                f"val, test and judge fractions sum to {total:g}; they must leave some pairs to train on"
            )
        return self


class DataConfig(Section):
    approach: Approach = "hh_truthfulqa"
    hh_rlhf: HhRlhfConfig = HhRlhfConfig()
    truthfulqa: TruthfulQaConfig = TruthfulQaConfig()
    pku_safe_rlhf: PkuSafeRlhfConfig = PkuSafeRlhfConfig()
    splits: SplitsConfig = SplitsConfig()
    max_pairs_per_objective: PositiveInt | None = None


# ------------------------------------------------------------------ models and training
class ModelConfig(Section):
    source: Literal["hub", "pypi_wheel"] = "hub"
    name: str = "Qwen/Qwen2.5-3B-Instruct"
    revision: str | None = "aa8e72537993ba99e69dfaafa59ed015b17504d1"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "sdpa", "flex_attention"] = "auto"
    trust_remote_code: bool = False


class LoraConfig(Section):
    r: PositiveInt = 64
    alpha: PositiveInt = 128
    dropout: Fraction = 0.0
    learning_rate: PositiveFloat = 1e-4


class TuningConfig(Section):
    method: Literal["full", "lora"] = "full"
    optimizer: Literal["auto", "adamw_float32", "adamw_8bit_stochastic"] = "auto"
    lora: LoraConfig = LoraConfig()


class TrainingConfig(Section):
    learning_rate: PositiveFloat = 1e-5
    pairs_per_device: PositiveInt = 4
    gradient_accumulation_steps: PositiveInt = 8
    epochs: PositiveFloat = 3.0
    max_pairs: PositiveInt | None = None
    max_length: PositiveInt = 512
    over_length: Literal["drop", "truncate_prompt"] = "truncate_prompt"
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: Fraction = 0.1
    weight_decay: float = Field(default=0.0, ge=0.0)
    max_grad_norm: PositiveFloat = 1.0
    gradient_checkpointing: Literal["auto"] | bool = "auto"
    logging_steps: PositiveInt = 10
    checkpoints: tuple[Fraction, ...] = (0.0, 0.33, 0.66, 1.0)

    @field_validator("checkpoints")
    @classmethod
    def end_is_kept(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if 1.0 not in value or list(value) != sorted(set(value)):
            raise ValueError(
                f"checkpoints {list(value)} must be increasing shares of training that end at 1.0"
            )
        return value


class EnsembleConfig(Section):
    kind: Literal["heads", "adapters"] = "heads"
    members: PositiveInt = 20
    fit_fraction: Fraction = 0.1
    # A weaker anchor lets heads fit on few pairs pull their mean below r_0: benchmarks/ensemble_choice.py.
    anchor: float = Field(default=100.0, ge=0.0)
    prior_scale: PositiveFloat = 0.5


class CalibrationConfig(Section):
    source: Literal["reference_samples", "validation_responses"] = "reference_samples"
    samples_per_prompt: Annotated[int, Field(ge=2)] = 4
    prompts: PositiveInt = 256
    max_new_tokens: PositiveInt = 256


class RewardModelConfig(Section):
    """`reward_model_config.yaml`: what all stages share, and how reward models are trained."""

    artifact_root: str = "."
    seed: Annotated[int, Field(ge=0)] = 42
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    tuning: TuningConfig = TuningConfig()
    training: TrainingConfig = TrainingConfig()
    centering_coefficient: float = Field(default=0.01, ge=0.0)
    scoring_tokens: PositiveInt = 8192
    ensemble: EnsembleConfig = EnsembleConfig()
    calibration: CalibrationConfig = CalibrationConfig()

    @model_validator(mode="after")
    def adapters_need_lora(self) -> "RewardModelConfig":
        ensemble = self.ensemble
        if ensemble.kind == "adapters" and ensemble.members > 1 and self.tuning.method != "lora":
            raise ValueError(
                f"ensemble.kind is adapters, which needs tuning.method: lora, got {self.tuning.method}; set it, or "
                "ensemble.kind: heads"
            )
        return self

    @property
    def paths(self) -> ArtifactPaths:
        return ArtifactPaths(resolve_artifact_root(self.artifact_root), self.data.approach)

    @property
    def shared(self) -> "RewardModelConfig":
        return self


class _RefersToRewardModelConfig(Section):
    """A file that follows `reward_model_config.yaml` for data, model, seed and paths."""

    reward_model_config: RewardModelConfig = RewardModelConfig()

    @property
    def shared(self) -> RewardModelConfig:
        return self.reward_model_config

    @property
    def paths(self) -> ArtifactPaths:
        return self.reward_model_config.paths


# ------------------------------------------------------------------ policies
DistilledMethod = Literal["mean", "hard_min", "cvar", "hierarchical", "lcb", "softmin", "maxmin", "edpo"]
PaperMethod = Literal["paper_eq5", "paper_eq6", "paper_eq7", "paper_eq9"]
LabelMethod = Literal["dpo", "ipo", "modpo", "dpo_helpful", "dpo_harmless", "dpo_honest", "soup"]
PolicyMethod = Literal[DistilledMethod, PaperMethod, LabelMethod]
"""What `policy.methods` may name; `policy_methods` says what each is."""


class PolicySection(Section):
    methods: tuple[PolicyMethod, ...] = ("hard_min", "cvar")
    beta: PositiveFloat = 0.1
    loss: Literal["squared", "huber", "bce"] = "squared"
    huber_delta: PositiveFloat = 1.0
    reward_scale: Literal["auto"] | PositiveFloat = "auto"
    kl_target: PositiveFloat = 4.0
    margin_clip: PositiveFloat = 5.0
    level: Literal["response", "margin"] = "response"
    nll_weight: float = Field(default=0.0, ge=0.0)
    gamma: float = Field(default=0.0, ge=0.0)
    ipo_beta: PositiveFloat = 0.1
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
        if unknown := sorted(set(value) - set(OBJECTIVES)):
            raise ValueError(f"constraints name {unknown}; known objectives are {', '.join(OBJECTIVES)}")
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


class PolicyConfig(_RefersToRewardModelConfig):
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


# ------------------------------------------------------------------ evaluation
class JudgeConfig(Section):
    paths: dict[str, str] = Field(default_factory=dict)
    model: ModelConfig | None = None
    tuning: TuningConfig = TuningConfig(method="lora")
    training: TrainingConfig = TrainingConfig(epochs=1.0, max_pairs=4000, checkpoints=(1.0,))

    @field_validator("paths")
    @classmethod
    def paths_name_objectives(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(set(value) - set(OBJECTIVES)):
            raise ValueError(f"judges.paths names {unknown}; known objectives are {', '.join(OBJECTIVES)}")
        return value


class GenerationConfig(Section):
    prompts: PositiveInt = 512
    other_approaches: tuple[Approach, ...] = ()
    checkpoints: Literal["none", "all"] = "none"
    checkpoint_prompts: PositiveInt = 64
    samples_per_prompt: Annotated[int, Field(ge=2)] = 4
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 32
    engine: Literal["transformers", "vllm"] = "transformers"


class HhHoldoutConfig(Section):
    max_pairs: PositiveInt | None = 2000


class TruthfulQaBenchmarkConfig(Section):
    max_questions: PositiveInt | None = None
    truth_judge: Literal["none", "trained", "text_judge"] = "trained"


class MtBenchConfig(Section):
    path: str | None = None
    max_questions: PositiveInt | None = None
    max_new_tokens: PositiveInt = 1024
    pairwise: bool = True


class TextJudgeConfig(Section):
    kind: Literal["none", "strings", "classifier", "local_model", "endpoint", "replay"] = "strings"
    model: str | None = None
    label: str | None = None
    conversation: bool = False
    base_url: str | None = None
    api_key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "OPENAI_API_KEY"
    file: str | None = None
    max_requests_per_minute: PositiveFloat = 60.0
    price_per_million_prompt_tokens: float | None = Field(default=None, ge=0.0)
    price_per_million_reply_tokens: float | None = Field(default=None, ge=0.0)

    @model_validator(mode="after")
    def kind_has_what_it_reads(self) -> "TextJudgeConfig":
        needs = {
            "classifier": ("model",),
            "local_model": ("model",),
            "endpoint": ("model", "base_url"),
            "replay": ("file",),
        }
        if missing := [key for key in needs.get(self.kind, ()) if getattr(self, key) is None]:
            raise ValueError(
                f"text_judge.kind is {self.kind}, which needs text_judge.{' and '.join(missing)}"
            )
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"text_judge.base_url must start with http:// or https://, got {self.base_url!r}"
            )
        return self


class RealToxicityPromptsConfig(Section):
    path: str | None = None
    revision: str = "main"
    prompts: PositiveInt | None = 1000
    samples_per_prompt: PositiveInt = 25
    max_new_tokens: PositiveInt = 20
    style: Literal["raw", "chat"] = "raw"
    scorer: str = "substitute"
    scorer_label: str | None = None


class JailbreakBenchConfig(Section):
    path: str | None = None
    revision: str = "main"
    max_behaviors: PositiveInt | None = None
    attacks: str | None = None
    max_new_tokens: PositiveInt = 150
    judge_prompt: str | None = None


class BenchmarksConfig(Section):
    run: tuple[
        Literal["hh_holdout", "truthfulqa", "realtoxicityprompts", "jailbreakbench", "mt_bench"], ...
    ] = (
        "hh_holdout",
        "truthfulqa",
        "realtoxicityprompts",
        "jailbreakbench",
        "mt_bench",
    )
    hh_holdout: HhHoldoutConfig = HhHoldoutConfig()
    truthfulqa: TruthfulQaBenchmarkConfig = TruthfulQaBenchmarkConfig()
    realtoxicityprompts: RealToxicityPromptsConfig = RealToxicityPromptsConfig()
    jailbreakbench: JailbreakBenchConfig = JailbreakBenchConfig()
    mt_bench: MtBenchConfig = MtBenchConfig()


class EvaluationConfig(_RefersToRewardModelConfig):
    """`evaluation_config.yaml`: who judges, on how many prompts, and which benchmarks run."""

    judges: JudgeConfig = JudgeConfig()
    text_judge: TextJudgeConfig = TextJudgeConfig()
    generation: GenerationConfig = GenerationConfig()
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 10_000
    benchmarks: BenchmarksConfig = BenchmarksConfig()


AnyConfig = RewardModelConfig | PolicyConfig | EvaluationConfig

CONFIG_FILES: dict[str, type[Section]] = {
    "reward_model_config.yaml": RewardModelConfig,
    "policy_config.yaml": PolicyConfig,
    "evaluation_config.yaml": EvaluationConfig,
}


def config_directory(path: Path) -> Path:
    """The directory that holds the three files, given it or one of them."""
    return path if path.is_dir() else path.parent
