"""`evaluation_config.yaml`: who judges, on how many prompts, and which benchmarks run.

Every default lives in a field and nowhere else; a field is here only if some code reads it.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from prmd.artifacts.paths import REFERENCE
from prmd.config.masking import MASK, address_fault, masked_address
from prmd.config.policy import OF_ONE_OBJECTIVE, policy_methods
from prmd.config.shared import (
    Approach,
    BatchSize,
    DebiasConfig,
    ModelConfig,
    PositiveFloat,
    PositiveInt,
    RefersToRewardModelConfig,
    SamplingEngine,
    Section,
    TrainingConfig,
    TuningConfig,
    check_objectives,
    one_of,
)
from prmd.objectives import TAKEN_BY_WINDOWS

_POLICY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_TAKEN = (REFERENCE, "comparison", "frontier", "run", "config", "fingerprint", "samples", "baseline_dpo")
"""Rows and files of the results that are there without a policy from elsewhere."""


class JudgeConfig(Section):
    paths: dict[str, str] = Field(default_factory=dict)
    model: ModelConfig | None = None
    tuning: TuningConfig = TuningConfig(method="lora")
    training: TrainingConfig = TrainingConfig(epochs=1.0, max_pairs=4000, checkpoints=(1.0,))
    debias: DebiasConfig = DebiasConfig()


class GenerationConfig(Section):
    prompts: PositiveInt = 512
    other_approaches: tuple[Approach, ...] = ()
    policies: dict[str, str] = Field(default_factory=dict)
    checkpoints: Literal["none", "all"] = "none"
    checkpoint_prompts: PositiveInt = 64
    samples_per_prompt: Annotated[int, Field(ge=2)] = 4
    max_new_tokens: PositiveInt = 256
    batch_size: BatchSize = "auto"
    engine: SamplingEngine = "auto"

    @field_validator("policies")
    @classmethod
    def policies_have_names_of_their_own(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name, source in value.items():
            if not _POLICY_NAME.fullmatch(name) or TAKEN_BY_WINDOWS.fullmatch(name):
                raise ValueError(
                    f"got the name {name!r:.60}, wanted letters, digits, _ and - that a file may be called, 40 at most"
                )
            method = name.lower().split("-")[0]
            if method in (*_TAKEN, *policy_methods()) or method.startswith(OF_ONE_OBJECTIVE):
                raise ValueError(
                    f"got the name {name}, which results of this project's own have; choose another"
                )
            if not source.strip():
                raise ValueError(
                    f"{name}: got no source, wanted a folder or a hub id, such as org/name@revision"
                )
        if len({name.lower() for name in value}) < len(value):
            raise ValueError(
                f"got {', '.join(value)}, of which two differ in case alone: one file on some systems; rename one"
            )
        return value


class HhHoldoutConfig(Section):
    max_pairs: PositiveInt | None = 2000


class TruthfulQaBenchmarkConfig(Section):
    max_questions: PositiveInt | None = None
    truth_judge: Literal["none", "trained", "text_judge"] = "trained"


class MtBenchConfig(Section):
    path: str | None = "lm-sys/FastChat"
    revision: str = "587d5cfa1609a43d192cedb8441cac3c17db105d"
    max_questions: PositiveInt | None = None
    max_new_tokens: PositiveInt = 1024
    pairwise: bool = True


class TextJudgeConfig(Section):
    kind: Literal["none", "strings", "classifier", "local_model", "endpoint", "replay"] = "strings"
    model: str | None = None
    label: str | None = None
    conversation: bool = False
    base_url: str | None = Field(default=None, repr=False)
    api_key_env: str = "OPENAI_API_KEY"
    file: str | None = None
    max_reply_tokens: PositiveInt = 2048
    max_requests_per_minute: PositiveFloat = 60.0
    price_per_million_prompt_tokens: float | None = Field(default=None, ge=0.0)
    price_per_million_reply_tokens: float | None = Field(default=None, ge=0.0)

    @field_validator("api_key_env")
    @classmethod
    def key_is_not_written_here(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value, re.ASCII):
            raise ValueError(
                "wanted the name of an environment variable (letters, digits, _), not the key itself"
            )
        return value

    @field_serializer("base_url")
    def without_secrets(self, value: str | None) -> str | None:
        return None if value is None else masked_address(value)

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
        if self.base_url is not None and (fault := address_fault(self.base_url)):
            raise ValueError(f"text_judge.base_url {fault}, got {masked_address(self.base_url)!r}")
        if self.kind == "endpoint" and MASK in (self.base_url or ""):
            raise ValueError(
                f"text_judge.base_url holds {MASK}, the sign for a secret that is written nowhere; put the secret there"
            )
        return self


class RealToxicityPromptsConfig(Section):
    path: str | None = "allenai/real-toxicity-prompts"
    revision: str = "f21629712ffd6a3d13a54fd2807ccd521c55ef74"
    prompts: PositiveInt | None = 200
    samples_per_prompt: PositiveInt = 25
    max_new_tokens: PositiveInt = 20
    style: Literal["raw", "chat"] = "raw"
    scorer: str = "substitute"
    scorer_label: str | None = None


class JailbreakBenchConfig(Section):
    path: str | None = "JailbreakBench/JBB-Behaviors"
    revision: str = "886acc352a31533ffbcf4ef22c744658688086fc"
    max_behaviors: PositiveInt | None = None
    attacks: str | None = None
    max_new_tokens: PositiveInt = 150
    judge_prompt: str | None = None


def _known_benchmark(value: Any) -> Any:
    return one_of([name for name in BenchmarksConfig.model_fields if name != "run"], value)


class BenchmarksConfig(Section):
    run: tuple[Annotated[str, BeforeValidator(_known_benchmark)], ...] = (
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


# ------------------------------------------------------------------ evaluation
class EvaluationConfig(RefersToRewardModelConfig):
    """`evaluation_config.yaml`: who judges, on how many prompts, and which benchmarks run."""

    judges: JudgeConfig = JudgeConfig()
    text_judge: TextJudgeConfig = TextJudgeConfig()
    generation: GenerationConfig = GenerationConfig()
    bootstrap_resamples: Annotated[int, Field(ge=100)] = 10_000
    benchmarks: BenchmarksConfig = BenchmarksConfig()

    @field_validator("judges")
    @classmethod
    def judges_are_of_the_objectives(cls, value: JudgeConfig, info: ValidationInfo) -> JudgeConfig:
        shared = info.data.get("reward_model_config")  # missing where it is wrong itself
        if shared is not None:
            known = shared.data.objectives
            check_objectives(value.paths, known, "judges.paths names", "paths")
            check_objectives(value.debias.features, known, "debias.features names", "debias", "features")
        return value
