"""Every directory, file name and command of the project, spelled once, and what a path given by a user means.

Artifacts live below one root (`artifact_root`, the project folder by default). `ArtifactPaths` refuses any name that would
leave it. Whatever else a user names is read, and found by `resolve_user_path`. What a file holds is described where it is
written; reading and writing are in `io`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prmd.errors import ConfigError
from prmd.objectives import OBJECTIVES

PROJECT_ROOT = Path(__file__).resolve().parents[2]
CONFIG_DIR = PROJECT_ROOT / "configs"
EMBEDDED_DIR = PROJECT_ROOT / "1_data_preparation" / "embedded"

REFERENCE = "reference"
"""What the untrained policy is called where policies are: in rows, files and settings."""

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+=-]*")


def safe_name(text: str) -> str:
    """Turn a hub id or free text into one portable path component (`Qwen/Qwen2.5-3B` -> `Qwen--Qwen2.5-3B`)."""
    return re.sub(r"[^A-Za-z0-9._@+=-]+", "--", text).strip("-.") or "unnamed"


def is_safe_name(name: str) -> bool:
    """Whether an artifact can be called so: one portable path component that leads nowhere else."""
    return bool(_SAFE_NAME.fullmatch(name)) and ".." not in name


def _component(name: str) -> str:
    if not is_safe_name(name):
        raise ConfigError(
            f"{name!r} cannot name an artifact: it must be letters, digits and . _ @ + = - (no slash, no '..'), "
            "so that no path leaves the artifact root; choose another name"
        )
    return name


@dataclass(frozen=True)
class ArtifactPaths:
    """Where everything of one approach is read and written, below `root`.

    Attributes:
        objectives: what the approach aligns, one folder each, in the order of every `[K, ...]` tensor.
    """

    root: Path
    approach: str
    objectives: tuple[str, ...] = OBJECTIVES

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
    def reward_model_commands(self) -> str:
        """The commands that train the reward models of all objectives, as one pattern."""
        if set(self.objectives) <= set(OBJECTIVES):
            return reward_model_command("*")
        return f"{TRAIN_COMMAND} objective=<{' | '.join(self.objectives)}>"

    @property
    def policies(self) -> Path:
        return self.root / "models" / "policy_models" / self.approach

    def policy(self, method: str, run_name: str | None = None) -> Path:
        return self.policies / _component(f"{method}-{run_name}" if run_name else method)

    def judge(self, objective: str) -> Path:
        return self.root / "models" / "judges" / self.approach / _component(objective)

    def finished_models(self) -> list[Path]:
        """Folders of finished reward models, policies and judges, of every approach."""
        return [record.parent for record in sorted(self.root.glob("models/*/*/*/run.json"))]

    def first_seen(self, key: str) -> Path:
        """The note of what a model folder held that keeps the key of an earlier version."""
        return self.root / "data" / "first_seen" / f"{_component(key)}.json"

    # caches and logs
    def cache(self, kind: str, key: str) -> Path:
        return self.root / "data" / "cache" / _component(f"{kind}-{key}")

    @property
    def hub_cache(self) -> Path:
        """Where the hub's client keeps what it downloads, in a layout of its own (`hub.use_project_cache`)."""
        return self.root / "data" / "cache" / "huggingface"

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
    """`artifact_root` of the YAML as an absolute path; relative ones start at the project folder.

    Raises:
        ConfigError: it is a file or below one, or no path at all; names both.
    """
    try:
        root = beside(PROJECT_ROOT, text).resolve()
        blocking = next((place for place in (root, *root.parents) if place.exists()), root)
        problem = None if blocking.is_dir() or not blocking.exists() else f"{blocking} is a file"
    except (OSError, ValueError) as error:  # longer than a name can be; NUL in it
        raise ConfigError(f"artifact_root: got {text!r:.80}, wanted a folder ({error})") from error
    if problem:
        raise ConfigError(
            f"artifact_root: got {text}, wanted a folder, which is made where it is missing; {problem}; correct the path"
        )
    return root


# ------------------------------------------------------------------ commands, for messages
_FOLDERS_OF_STAGES = {
    "download_dataset": "1_data_preparation",
    "split_objectives": "1_data_preparation",
    "baseline_dpo": "3_policy_training",
    "pessimistic_dpo": "3_policy_training",
    "hierarchical_dpo": "3_policy_training",
    "compute_metrics": "4_evaluation",
    "benchmark_eval": "4_evaluation",
}


TRAIN_COMMAND = "python 2_reward_modeling/train_rm.py"
"""The command that trains the reward model of any objective, which is named behind it."""


def stage_command(stage: str) -> str:
    """The command that runs a stage; for reward models see `reward_model_command`."""
    return f"python {_FOLDERS_OF_STAGES[stage]}/{stage}.py"


def reward_model_command(objective: str) -> str:
    """The command that trains the reward model of an objective; `*` stands for any."""
    if objective in (*OBJECTIVES, "*"):
        return f"python 2_reward_modeling/train_{objective}_rm.py"
    return f"{TRAIN_COMMAND} objective={objective}"


def policy_command(name: str) -> str:
    """The command that trains the policy in a folder of this name (`<method>` or `<method>-<run_name>`)."""
    own = ("baseline_dpo", "hierarchical")
    stage = next((method for method in own if name.split("-")[0] == method), "pessimistic")
    return stage_command(f"{stage.removesuffix('_dpo')}_dpo")


_COMMAND = re.compile(r"python (?P<stage>[1-4])_\w+/[\w*]+\.py")
_QUOTES = "\"'"
_options: dict[str, tuple[str, ...]] = {}
"""What a command of each stage, 1 to 4, has to repeat of the one that this process was started with; nothing in a library."""


def remember_options(options: Mapping[str, Sequence[str]]) -> None:
    """Keep what `with_options` puts behind the commands of stages 1 to 4, each word as a shell reads it."""
    _options.clear()
    _options.update({stage: tuple(words) for stage, words in options.items()})


def with_options(text: str) -> str:
    """A message whose commands are of the configuration of this process: for the console alone, never for a file.

    An override that the message gives itself is left to it.
    """

    def complete(found: re.Match[str]) -> str:
        rest = text[found.end() :].partition("`")[0]
        words = _options.get(found["stage"], ())
        given = (word for word in words if f"{word.strip(_QUOTES).partition('=')[0]}=" not in rest)
        return " ".join([found[0], *given])

    return _COMMAND.sub(complete, text)


# ------------------------------------------------------------------ what users name
Kind = Literal["file", "folder", "file or folder"]


def resolve_user_path(text: str | Path, key: str, wanted: str, kind: Kind = "file or folder") -> Path:
    """The file or folder that a user names, wherever the command was given.

    An absolute path, or one from `~`, means itself. A relative one starts at the working folder, as in the shell; what is
    not there is looked for in the project folder.

    Args:
        text: as the user wrote it.
        key: where: `text_judge.file`, `--config`.
        wanted: what should be there, in words.

    Returns:
        An absolute path. A link in it keeps its name, by which results may be called.

    Raises:
        ConfigError: it is in none of these places; names key and places.
    """
    if found := find_user_path(text, kind):
        return found
    raise ConfigError(
        f"{key}: got {text or 'no name'}, wanted {wanted}; {places_tried(text)}; correct the path"
    )


def find_user_path(text: str | Path, kind: Kind = "file or folder") -> Path | None:
    """As `resolve_user_path`, but None where nothing is there, because the text may be a hub id."""
    return next((place for place in _places(text) if _is(kind, place)), None)


def places_tried(text: str | Path) -> str:
    """`/work/x is not there, /project/x is a file`: where a path was looked for in vain."""
    return ", ".join(f"{place} is {_state(place)}" for place in _places(text)) or "no place is named"


def beside(folder: Path, text: str) -> Path:
    """A path that starts at `folder` unless it is absolute or from `~`."""
    try:
        return folder / Path(text).expanduser()
    except RuntimeError:  # `~nobody`: a name like any other, as in the shell
        return folder / text


def _places(text: str | Path) -> list[Path]:
    return list(dict.fromkeys(beside(folder, text) for folder in (Path.cwd(), PROJECT_ROOT) if text))


def _state(place: Path) -> str:
    return "a folder" if _is("folder", place) else "a file" if _is("file", place) else "not there"


def _is(kind: Kind, place: Path) -> bool:
    try:
        return place.exists() and kind in ("file or folder", "folder" if place.is_dir() else "file")
    except (OSError, ValueError):  # longer than a name can be, in a folder that may not be read; NUL in it
        return False
