"""What the real-text study runs: its sizes and the configurations of its judges and of its seeds.

Everything is the quickstart's configuration with overrides, so the stages are those of the project. One artifact root
holds the unbiased data and the judges, one more each seed's biased pairs, reward models and policies. How pairs are
chosen is in `real_text/data.py`, what is done with all this in `real_text/run.py`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR
from prmd.config.evaluation import EvaluationConfig
from prmd.config.loading import load_config
from prmd.config.policy import PolicyConfig
from prmd.config.shared import RewardModelConfig

METHODS = ("dpo", "mean", "hard_min", "hierarchical", "maxmin")
LONGER_SHARE = 0.8
"""Share of the training pairs of each objective whose longer response is the chosen one."""
MATCHED_KL = 0.5
"""Nats per response at which methods are compared."""


@dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
        seeds: each has its own biased pairs, reward models, policies, test prompts and samples.
        baseline_seeds: those of them on which TRL's DPO is trained too.
        pool: pairs per objective and over all splits, before the biased ones are chosen.
        pairs: biased training pairs per objective.
        policy_pairs: of these, pairs that policies are trained on, over all objectives.
        judge_pairs: unbiased pairs per objective that a judge is trained on, at most.
        calibration_prompts: validation prompts whose reference samples give the rewards' scale.
        prompts: held-out prompts of a seed, a multiple of the number of objectives.
        samples: responses per prompt and policy.
        tokens: at which every sampled response is cut.
        length: tokens of prompt and response together.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    baseline_seeds: tuple[int, ...] = (0,)
    pool: int = 900
    pairs: int = 100
    policy_pairs: int = 60
    judge_pairs: int = 240
    calibration_prompts: int = 24
    prompts: int = 18
    samples: int = 2
    tokens: int = 48
    length: int = 384


FULL = Sizes()
QUICK = Sizes(
    seeds=(0,),
    pool=240,
    pairs=20,
    policy_pairs=12,
    judge_pairs=12,
    calibration_prompts=3,
    prompts=3,
    tokens=12,
    length=192,
)

_SHARED = (
    "data.approach=hh_truthfulqa",
    "data.hh_rlhf.helpful_subsets=[helpful-base]",
    "data.hh_rlhf.harmless_subsets=[harmless-base]",
    "data.splits.val_fraction=0.05",
    "data.splits.test_fraction=0.15",
    "data.splits.judge_fraction=0.3",
    "training.max_pairs=null",
    "training.checkpoints=[1.0]",
    "tuning.lora.learning_rate=5e-4",
    "calibration.source=reference_samples",
)
_POLICY = (
    f"policy.methods=[{', '.join(METHODS)}]",
    "tuning.lora.learning_rate=5e-4",
    "training.gradient_accumulation_steps=1",
    "training.checkpoints=[0.33, 0.66, 1.0]",
)
_EVALUATION = ("judges.tuning.lora.learning_rate=5e-4", "bootstrap_resamples=100")


@dataclass(frozen=True)
class Study:
    """The sizes, where finished parts are kept, and what the command line said of data and model.

    Attributes:
        overrides: `data.*` and `model.*` for every configuration.
    """

    sizes: Sizes
    work: Path
    overrides: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        """Folder of everything of these settings: other settings never meet its files."""
        rules = [_SHARED, _POLICY, _EVALUATION, LONGER_SHARE, self.overrides]
        sizes = {name: value for name, value in asdict(self.sizes).items() if "seeds" not in name}
        return self.work / io.fingerprint([sizes, rules])[:8]

    def shared(self, seed: int | None = None, model: Sequence[str] = ()) -> RewardModelConfig:
        """Data and reward models of a seed; of the unbiased data and the judges without one.

        Args:
            model: overrides that name the base model where it was already converted.
        """
        return load_config(CONFIG_DIR / "quickstart", RewardModelConfig, self._shared(seed, model))

    def policies(self, seed: int, model: Sequence[str] = ()) -> PolicyConfig:
        """Policies of a seed."""
        own = (
            *_POLICY,
            f"training.max_pairs={self.sizes.policy_pairs}",
            f"training.max_length={self.sizes.length}",
        )
        return load_config(CONFIG_DIR / "quickstart", PolicyConfig, [*self._referred(seed, model), *own])

    def evaluation(self, seed: int | None = None, model: Sequence[str] = ()) -> EvaluationConfig:
        """Sampling of a seed; the judges' training without one."""
        sizes = self.sizes
        own = (
            *_EVALUATION,
            f"judges.training.max_pairs={sizes.judge_pairs}",
            f"judges.training.max_length={sizes.length}",
            f"generation.prompts={sizes.prompts * (1 + max(sizes.seeds))}",
            f"generation.samples_per_prompt={sizes.samples}",
            f"generation.max_new_tokens={sizes.tokens}",
        )
        return load_config(CONFIG_DIR / "quickstart", EvaluationConfig, [*self._referred(seed, model), *own])

    def _shared(self, seed: int | None, model: Sequence[str]) -> list[str]:
        sizes = self.sizes
        folder = self.root / ("judges" if seed is None else f"seed-{seed}")
        own = (
            f"artifact_root={json.dumps(str(folder.resolve()))}",
            f"seed={0 if seed is None else seed}",
            f"data.max_pairs_per_objective={sizes.pool}",
            f"training.max_length={sizes.length}",
            f"calibration.prompts={sizes.calibration_prompts}",
            f"calibration.max_new_tokens={sizes.tokens}",
        )
        return [*_SHARED, *own, *self.overrides, *model]

    def _referred(self, seed: int | None, model: Sequence[str]) -> list[str]:
        return [f"reward_model_config.{override}" for override in self._shared(seed, model)]
