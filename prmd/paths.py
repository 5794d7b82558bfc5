"""Every directory and file name of the project, spelled once.

Artifacts live below one root (`artifact_root`, the project folder by default). `ArtifactPaths` refuses any name that would
leave it. What a file holds is described where it is written; reading and writing are in `io`.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from prmd.errors import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
CONFIG_DIR = PROJECT_ROOT / "configs"
EMBEDDED_DIR = PROJECT_ROOT / "1_data_preparation" / "embedded"

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+=-]*")


def safe_name(text: str) -> str:
    """Turn a hub id or free text into one portable path component (`Qwen/Qwen2.5-3B` -> `Qwen--Qwen2.5-3B`)."""
    return re.sub(r"[^A-Za-z0-9._@+=-]+", "--", text).strip("-.") or "unnamed"


def _component(name: str) -> str:
    if not _SAFE_NAME.fullmatch(name) or ".." in name:
        raise ConfigError(
            f"{name!r} cannot name an artifact: it must be letters, digits and . _ @ + = - (no slash, no '..'), "
            "so that no path leaves the artifact root; choose another name"
        )
    return name


@dataclass(frozen=True)
class ArtifactPaths:
    """Where everything of one approach is read and written, below `root`."""

    root: Path
    approach: str

    def __post_init__(self) -> None:
        _component(self.approach)

    # stage 1
    def raw(self, source: str) -> Path:
        return self.root / "data" / "raw" / _component(source)

    @property
    def processed(self) -> Path:
        return self.root / "data" / "processed" / self.approach

    def split(self, objective: str, split: str) -> Path:
        return self.processed / _component(objective) / f"{_component(split)}.jsonl"

    # models
    def base_model(self, name: str) -> Path:
        return self.root / "models" / "base" / safe_name(name)

    def reward_model(self, objective: str) -> Path:
        return self.root / "models" / "reward_models" / self.approach / f"{_component(objective)}_rm"

    @property
    def policies(self) -> Path:
        return self.root / "models" / "policy_models" / self.approach

    def policy(self, method: str, run_name: str | None = None) -> Path:
        return self.policies / _component(f"{method}-{run_name}" if run_name else method)

    def judge(self, objective: str) -> Path:
        return self.root / "models" / "judges" / self.approach / _component(objective)

    # caches and logs
    def cache(self, kind: str, key: str) -> Path:
        return self.root / "data" / "cache" / _component(f"{kind}-{key}")

    def logs(self, *parts: str) -> Path:
        """TensorBoard directory of one training, e.g. logs('reward_models', 'embedded', 'helpful')."""
        return self.root.joinpath("logs", *map(_component, parts))

    def runs(self, name: str) -> Path:
        """Directory of one pipeline run's record."""
        return self.root / "logs" / "runs" / _component(name)

    # outputs
    @property
    def outputs(self) -> Path:
        return self.root / "outputs"

    @property
    def step_results(self) -> Path:
        return self.outputs / "step_results"

    @property
    def visualizations(self) -> Path:
        return self.outputs / "visualizations" / self.approach

    @property
    def reward_analysis(self) -> Path:
        return self.outputs / "reward_analysis" / self.approach

    @property
    def metrics(self) -> Path:
        return self.outputs / "metrics" / self.approach

    def benchmark(self, name: str) -> Path:
        return self.outputs / "benchmarks" / _component(name) / self.approach

    @property
    def benchmark_comparison(self) -> Path:
        return self.outputs / "benchmarks" / f"paired_{self.approach}.json"

    @property
    def report(self) -> Path:
        return self.outputs / "report" / "index.html"


def resolve_artifact_root(text: str) -> Path:
    """`artifact_root` of the YAML as an absolute path; relative ones start at the project folder."""
    path = Path(text).expanduser()
    return path.resolve() if path.is_absolute() else (PROJECT_ROOT / path).resolve()
