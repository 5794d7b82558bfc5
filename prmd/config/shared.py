"""What all stages share, and how reward models are trained: the sections and keys of `reward_model_config.yaml`.

Every default lives in a field and nowhere else; a field is here only if some code reads it.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from prmd.artifacts.paths import ArtifactPaths, resolve_artifact_root
from prmd.config import brought
from prmd.features import MEANINGS
from prmd.objectives import OBJECTIVES, names_problem

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
BatchSize = Literal["auto"] | PositiveInt
SamplingEngine = Literal["auto", "transformers", "vllm"]
Approach = Literal["hh_truthfulqa", "pku_safe", "embedded", "own_pairs"]
PositiveFloat = Annotated[float, Field(gt=0.0)]


def one_of(names: Sequence[str], value: Any) -> Any:
    """The value, or the complaint of a `Literal` of these names."""
    if value in names:
        return value
    expected = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})


class Section(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class MisplacedError(ValueError):
    """A mistake that a section finds in one of its own keys; `keys` lead from the section to the place.

    Which objectives there are is known only where all of a file has been read.
    """

    def __init__(self, message: str, *keys: str) -> None:
        super().__init__(message)
        self.keys = keys


def check_objectives(names: Iterable[str], known: Sequence[str], said: str, *keys: str) -> None:
    """Refuse a name that is no objective.

    Args:
        keys: of the names, from the section that is validated.

    Raises:
        MisplacedError: begins with `said`.
    """
    if unknown := sorted(set(names) - set(known)):
        raise MisplacedError(f"{said} {unknown}; known objectives are {', '.join(known)}", *keys)


Checked = TypeVar("Checked", bound=Section)


def checked(section: Checked, problem: tuple[str, ...] | None) -> Checked:
    """The section, or its problem (what is wrong and the keys to it) as a `MisplacedError`."""
    if problem:
        raise MisplacedError(*problem)
    return section


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


class OwnSource(Section):
    """Where pairs or scored responses of one's own lie."""

    path: str
    revision: str | None = None
    name: str | None = None
    split: str = "train"
    columns: dict[str, str | None] = Field(default_factory=dict)

    @property
    def kept_columns(self) -> dict[str, Any]:
        """What else decides which rows are kept of the file."""
        where = {"path", "revision", "name", "split"}
        return self.model_dump(exclude=where | {"pairs_per_prompt", "least_difference"})

    @model_serializer(mode="wrap")
    def name_where_there_is_one(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The values as pydantic dumps them; without `name`, which is younger, where there is none."""
        return {key: value for key, value in dump(self).items() if key != "name" or value is not None}

    def _refuse_columns(self, *known: str) -> None:
        if unknown := sorted(set(self.columns) - set(known)):
            raise MisplacedError(f"columns name {unknown}; known are {', '.join(known)}", "columns")


class OwnFileConfig(OwnSource):
    @model_validator(mode="after")
    def columns_are_known(self) -> "OwnFileConfig":
        self._refuse_columns("prompt", "chosen", "rejected", "id", "source", "system", "tools", "weight")
        return self


class ScoredConfig(OwnSource):
    preset: Literal["ultrafeedback"] | None = None
    scores: dict[str, str] = Field(default_factory=dict)
    pairs_per_prompt: PositiveInt = 3
    least_difference: float = Field(default=0.0, ge=0.0)

    @model_validator(mode="before")
    @classmethod
    def preset_has_its_scores(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("preset") == "ultrafeedback" and not value.get("scores"):
            return value | {"scores": ULTRAFEEDBACK_SCORES}
        return value

    @model_validator(mode="after")
    def columns_are_known(self) -> "ScoredConfig":
        self._refuse_columns("prompt", "response")
        if self.preset and (
            unknown := sorted(set(self.scores.values()) - set(ULTRAFEEDBACK_SCORES.values()))
        ):
            known = ", ".join(ULTRAFEEDBACK_SCORES.values())
            raise MisplacedError(f"scores name {unknown}; UltraFeedback rates {known}", "scores")
        if not self.scores:
            raise MisplacedError("got none, wanted a column for each objective: {honest: honesty}", "scores")
        return self


ULTRAFEEDBACK_SCORES = {
    "helpful": "helpfulness",
    "honest": "honesty",
    "truthful": "truthfulness",
    "instruction_following": "instruction_following",
}
"""Objectives and the four aspects that UltraFeedback's completions are rated for."""


class BroughtConfig(Section):
    function: str | None = None
    column_chosen: str | None = None
    column_rejected: str | None = None

    @model_validator(mode="after")
    def source_is_one(self) -> "BroughtConfig":
        return checked(self, brought.source_problem(self.function, self.column_chosen, self.column_rejected))


class OwnPairsConfig(Section):
    objectives: dict[str, OwnFileConfig] = Field(default_factory=dict)
    scored: ScoredConfig | None = None
    rewards: dict[str, BroughtConfig] = Field(default_factory=dict)
    allow_code: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives, in the order of every `[K, ...]` tensor."""
        return (*self.objectives, *(self.scored.scores if self.scored else ()))

    @model_validator(mode="after")
    def names_are_file_names(self) -> "OwnPairsConfig":
        scored = tuple(self.scored.scores) if self.scored else ()
        if twice := sorted(set(self.objectives) & set(scored)):
            raise MisplacedError(
                f"got {twice[0]}, which has a file of its own in objectives; leave it out of one of them",
                "scored",
                "scores",
            )
        if problem := names_problem(self.names):
            raise MisplacedError(problem, *(("objectives",) if self.objectives else ("scored", "scores")))
        named = {objective: source.function for objective, source in self.rewards.items()}
        scoring = {"scored": self.scored is not None, "allow_code": self.allow_code}
        return checked(self, brought.rewards_problem(named, self.names, **scoring))

    @model_serializer(mode="wrap")
    def rewards_where_there_are_any(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The values as pydantic dumps them; without the keys that are younger, where they are at their default."""
        younger = ("rewards", "allow_code")
        return {key: value for key, value in dump(self).items() if value or key not in younger}


class DataConfig(Section):
    approach: Approach = "hh_truthfulqa"
    hh_rlhf: HhRlhfConfig = HhRlhfConfig()
    truthfulqa: TruthfulQaConfig = TruthfulQaConfig()
    pku_safe_rlhf: PkuSafeRlhfConfig = PkuSafeRlhfConfig()
    own_pairs: OwnPairsConfig = OwnPairsConfig()
    splits: SplitsConfig = SplitsConfig()
    max_pairs_per_objective: PositiveInt | None = None

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the approach aligns, in the order of every `[K, ...]` tensor."""
        return self.own_pairs.names if self.approach == "own_pairs" else OBJECTIVES

    @property
    def brought(self) -> dict[str, BroughtConfig]:
        """The objectives whose rewards the user brings."""
        return self.own_pairs.rewards if self.approach == "own_pairs" else {}

    @property
    def from_columns(self) -> tuple[str, ...]:
        """Those of them whose rewards are columns, which know no samples."""
        return tuple(objective for objective, source in self.brought.items() if source.function is None)

    @model_validator(mode="after")
    def own_pairs_are_named(self) -> "DataConfig":
        if self.approach == "own_pairs" and not self.objectives:
            raise MisplacedError(
                "got none, wanted the file of each objective, such as {concise: {path: concise.jsonl}, polite: "
                "{path: polite.jsonl}}: data.approach is own_pairs",
                "own_pairs",
                "objectives",
            )
        return self

    @model_serializer(mode="wrap")
    def own_pairs_where_they_are_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The values as pydantic dumps them; without `own_pairs`, which is younger, where no stage reads it."""
        values = dump(self)
        if self.approach != "own_pairs":
            values.pop("own_pairs", None)
        return values


# ------------------------------------------------------------------ models and training
class ModelConfig(Section):
    source: Literal["hub", "pypi_wheel"] = "hub"
    name: str = "Qwen/Qwen2.5-3B-Instruct"
    revision: str | None = "aa8e72537993ba99e69dfaafa59ed015b17504d1"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Literal["auto", "sdpa", "flex_attention"] = "auto"
    trust_remote_code: bool = False
    enable_thinking: bool = False


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
    pairs_per_step: PositiveInt | None = None
    merge_micro_batches: bool = True
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


Feature = Annotated[str, BeforeValidator(lambda value: one_of(tuple(MEANINGS), value))]
"""What `debias.features` may name: a key of `features.MEANINGS`."""


class DebiasConfig(Section):
    features: dict[str, tuple[Feature, ...]] = Field(default_factory=dict)
    strength: Fraction = 1.0

    @field_validator("features")
    @classmethod
    def features_are_named_once(cls, value: dict[str, tuple[Feature, ...]]) -> dict[str, tuple[Feature, ...]]:
        for objective, features in value.items():
            if len(set(features)) < len(features):
                raise ValueError(f"features of {objective} must be named once each, got {list(features)}")
        return value

    def of(self, objective: str) -> tuple[Feature, ...]:
        """The features held to be a bias of this objective's labels; none: it is trained on the labels as they are."""
        return self.features.get(objective, ())


class EnsembleConfig(Section):
    kind: Literal["heads", "adapters"] = "heads"
    members: PositiveInt = 20
    fit_fraction: Fraction = 0.1
    # A weaker anchor lets heads fit on few pairs pull their mean below r_0: benchmarks/ensemble_choice.py.
    anchor: float = Field(default=100.0, ge=0.0)
    prior_scale: PositiveFloat = 0.5
    debias_strengths: tuple[Fraction, Fraction] = (0.0, 1.0)


class CalibrationConfig(Section):
    source: Literal["reference_samples", "validation_responses"] = "reference_samples"
    samples_per_prompt: Annotated[int, Field(ge=2)] = 4
    prompts: PositiveInt = 256
    max_new_tokens: PositiveInt = 256
    batch_size: BatchSize = "auto"
    engine: SamplingEngine = "auto"


# ------------------------------------------------------------------ what all stages share
class SharedConfig(Section):
    """What every stage follows: where artifacts lie, the seed, the data, the base model, how it is scored and sampled."""

    artifact_root: str = "."
    seed: Annotated[int, Field(ge=0)] = 42
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    scoring_tokens: PositiveInt = 8192
    calibration: CalibrationConfig = CalibrationConfig()

    @model_validator(mode="after")
    def columns_score_no_samples(self) -> "SharedConfig":
        return checked(self, brought.samples_problem(self.data.from_columns, self.calibration.source))

    @property
    def paths(self) -> ArtifactPaths:
        return ArtifactPaths(
            resolve_artifact_root(self.artifact_root), self.data.approach, self.data.objectives
        )


# ------------------------------------------------------------------ reward models
class RewardModelConfig(SharedConfig):
    """`reward_model_config.yaml`: what all stages share, and how reward models are trained."""

    tuning: TuningConfig = TuningConfig()
    training: TrainingConfig = TrainingConfig()
    centering_coefficient: float = Field(default=0.01, ge=0.0)
    debias: DebiasConfig = DebiasConfig()
    ensemble: EnsembleConfig = EnsembleConfig()

    @field_validator("debias")
    @classmethod
    def debias_is_of_the_objectives(cls, value: DebiasConfig, info: ValidationInfo) -> DebiasConfig:
        if (data := info.data.get("data")) is not None:  # missing where it is wrong itself
            check_objectives(value.features, data.objectives, "debias.features names", "features")
            return checked(value, brought.debias_problem(data.brought, value.features))
        return value

    @model_validator(mode="after")
    def adapters_need_lora(self) -> "RewardModelConfig":
        ensemble = self.ensemble
        if ensemble.kind == "adapters" and ensemble.members > 1 and self.tuning.method != "lora":
            raise ValueError(
                f"ensemble.kind is adapters, which needs tuning.method: lora, got {self.tuning.method}; set it, or "
                "ensemble.kind: heads"
            )
        return self

    @model_serializer(mode="wrap")
    def in_the_order_of_the_file(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """The values as pydantic dumps them, what is shared no longer in front of what is not."""
        values = dump(self)
        behind = {
            key: values.pop(key) for key in ("scoring_tokens", "ensemble", "calibration") if key in values
        }
        return values | behind


class RefersToRewardModelConfig(Section):
    """A file that follows `reward_model_config.yaml` for data, model, seed and paths."""

    reward_model_config: RewardModelConfig = RewardModelConfig()

    @property
    def shared(self) -> SharedConfig:
        return self.reward_model_config

    @property
    def seed(self) -> int:
        return self.reward_model_config.seed

    @property
    def paths(self) -> ArtifactPaths:
        return self.reward_model_config.paths
