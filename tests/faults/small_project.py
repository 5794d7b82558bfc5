"""A whole small project: random model, data, configuration, its commands in order, and their artifacts after each of them.

Two layers of 8 dimensions, a handful of pairs, reward models of both kinds, policies of several methods and losses, the TRL
baseline, judges, metrics and benchmarks. `contents` says what may be compared of two artifact roots.
"""

import gc
import hashlib
import importlib.util
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from faults import commands
from faults.commands import Ended, Prepare, Running
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

from prmd.artifacts import io
from prmd.artifacts.manifest import damaged_files
from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT
from prmd.config.loading import as_dict, load_pipeline
from prmd.config.shared import RewardModelConfig
from prmd.errors import UserError

_spec = importlib.util.spec_from_file_location(
    "make_finished", PROJECT_ROOT / "tests/fixtures/make_finished.py"
)
make_finished = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_finished)

SETTINGS = (
    *make_finished.SETTINGS,
    "training.pairs_per_step=1",
    "judges.training.pairs_per_step=1",
    "reward_model_config.training.checkpoints=[0.0, 0.5, 1.0]",
    "benchmarks.run=[hh_holdout, truthfulqa, jailbreakbench]",
    "benchmarks.jailbreakbench.max_new_tokens=4",
    "text_judge.kind=local_model",
    "text_judge.max_reply_tokens=4",
)


@dataclass(frozen=True)
class Stage:
    """A command of the project.

    Attributes:
        name: in the table.
        script: its path.
        configs: folder of its configuration below `configs`.
        overrides: on its command line.
        writes: its artifacts, patterns below the artifact root; without the cache.
    """

    name: str
    script: str
    writes: tuple[str, ...]
    configs: str = "."
    overrides: tuple[str, ...] = ()


OF = "hh_truthfulqa"
REWARD_MODELS = f"models/reward_models/{OF}"
POLICIES = f"models/policy_models/{OF}"
MORE = ("cvar", "edpo", "dpo_helpful")
STAGES = {
    stage.name: stage
    for stage in (
        Stage("1a download", "1_data_preparation/download_dataset.py", ("data/raw",)),
        Stage("1b split", "1_data_preparation/split_objectives.py", ("data/processed",)),
        Stage("2 helpful, heads", "2_reward_modeling/train_helpful_rm.py", (f"{REWARD_MODELS}/helpful_rm",)),
        Stage(
            "2 harmless, adapters",
            "2_reward_modeling/train_harmless_rm.py",
            (f"{REWARD_MODELS}/harmless_rm",),
            "lora",
        ),
        Stage("2 honest, heads", "2_reward_modeling/train_honest_rm.py", (f"{REWARD_MODELS}/honest_rm",)),
        Stage("3 baseline, TRL", "3_policy_training/baseline_dpo.py", (f"{POLICIES}/baseline_dpo",)),
        Stage(
            "3 hard_min, adapter", "3_policy_training/pessimistic_dpo.py", (f"{POLICIES}/hard_min",), "lora"
        ),
        Stage(
            "3 cvar, edpo, dpo_helpful",
            "3_policy_training/pessimistic_dpo.py",
            tuple(f"{POLICIES}/{method}" for method in MORE),
            overrides=(f"policy.methods=[{','.join(MORE)}]",),
        ),
        Stage("3 hierarchical", "3_policy_training/hierarchical_dpo.py", (f"{POLICIES}/hierarchical",)),
        Stage(
            "4 metrics", "4_evaluation/compute_metrics.py", (f"outputs/metrics/{OF}", f"models/judges/{OF}")
        ),
        Stage("4 benchmarks", "4_evaluation/benchmark_eval.py", ("outputs/benchmarks",)),
    )
}
ORDER = tuple(STAGES)


@dataclass
class Project:
    """A folder with model, configuration and the artifacts after every stage of a run that nothing disturbed.

    Attributes:
        folder: `base`, `configs`, `after/<number>`, `cases`.
        seconds: of each stage.
        changes: the changes of files that each stage made, `operation path`.
    """

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)
    changes: dict[str, list[str]] = field(default_factory=dict)
    _cases: int = 0
    _contents: dict[tuple[str, tuple[str, ...]], dict[str, str]] = field(default_factory=dict)

    def after(self, stage: str | None) -> Path:
        """The undisturbed artifacts after a stage (None: before the first)."""
        return self.folder / "after" / str(0 if stage is None else 1 + ORDER.index(stage))

    def before(self, stage: str) -> Path:
        """The same before it."""
        return self.folder / "after" / str(ORDER.index(stage))

    def case(self, state: Path) -> Path:
        """A copy of artifacts to be damaged, at a place of its own."""
        self._cases += 1
        root = self.folder / "cases" / f"{self._cases:05d}" / "artifacts"
        root.parent.mkdir(parents=True)
        shutil.copytree(state, root)
        return root

    def start(self, stage: str, root: Path, *prepare: Prepare, overrides: Sequence[str] = ()) -> Running:
        """Start a stage on an artifact root."""
        found = STAGES[stage]
        self._cases += 1
        arguments = ["--config", str(self.folder / "configs" / found.configs)]
        arguments += [f"artifact_root={root.as_posix()}", *found.overrides, *overrides]
        return commands.start(found.script, arguments, self.folder / "said" / str(self._cases), prepare)

    def run(self, stage: str, root: Path, *prepare: Prepare, overrides: Sequence[str] = ()) -> Ended:
        """Run a stage on an artifact root."""
        return self.start(stage, root, *prepare, overrides=overrides).end()

    def wanted(self, stage: str, patterns: Sequence[str] | None = None) -> dict[str, str]:
        """`contents` of the undisturbed artifacts after a stage."""
        key = (stage, tuple(patterns or ()))
        if key not in self._contents:
            self._contents[key] = contents(self.after(stage), patterns)
        return self._contents[key]

    def difference(
        self,
        root: Path,
        stage: str,
        without: Sequence[str] = (),
        *,
        cache: bool = True,
        rounding: bool = False,
    ) -> str | None:
        """What of the artifacts after a stage is missing, different or half there below `root`, or None.

        Args:
            without: files that are not compared.
            cache: compare the cache too.
            rounding: as for `alike`.
        """
        wanted, found = self.wanted(stage), contents(root, None)
        tables = {name.rpartition("/")[0] for name in without}  # a row that nobody needs is not made again
        names = [
            n
            for n in wanted
            if n not in without
            and (cache or not n.startswith("data/cache/"))
            and (n in found or n.partition(":")[0] not in tables)
        ]
        wrong = [name for name in names if not alike(found.get(name), wanted[name], rounding=rounding)]
        if wrong:
            state = "differs" if wrong[0] in found else "is missing"
            others = [name for name in wrong[1:] if not name.startswith("data/cache/")]
            return f"{wrong[0]} {state}, and {len(wrong) - 1} more: {', '.join(others[:4])}"
        return unvouched(root, without)


# ------------------------------------------------------------------ making it
def make_project(folder: Path) -> Project:
    """Make model and configuration, and run every stage once in forks; then import what they imported."""
    datasets.load_dataset = make_finished.hub_rows
    Figure.savefig = _save_nothing
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    model = LlamaForCausalLM(tiny_config(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(folder / "base")
    tiny_tokenizer(folder / "base")
    _write_behaviors(folder / "behaviors")
    _write_configs(folder)
    project = Project(folder)
    project.after(None).mkdir(parents=True)
    _rehearse(project)
    root = project.case(project.after(None))
    for stage in ORDER:
        notes = folder / "changes"
        ended = project.run(stage, root, commands.note_changes(root, notes))
        if ended.status:
            raise SystemExit(f"the undisturbed {stage} failed: {ended}")
        project.seconds[stage] = ended.seconds
        project.changes[stage] = notes.read_text(encoding="utf-8").splitlines()
        notes.unlink()
        shutil.copytree(root, project.after(stage))
    shutil.rmtree(root.parent)
    return project


def _save_nothing(figure: Figure, path: Path, **settings: Any) -> None:
    """In the place of drawing pixels, which is half of a small stage's time: the file, empty."""
    Path(path).write_bytes(b"")


def _rehearse(project: Project) -> None:
    """Run everything once in forks that tell what they imported."""
    root = project.case(project.after(None))
    for stage in ORDER:
        names = project.folder / "modules"
        ended = project.run(stage, root, commands.note_modules(names))
        if ended.status:
            raise SystemExit(f"the undisturbed {stage} failed: {ended}")
        commands.import_what(names.read_text(encoding="utf-8").splitlines())
        gc.collect()
        gc.freeze()  # what is imported is garbage of no fork
    shutil.rmtree(root.parent)


def _write_configs(folder: Path) -> None:
    own = [
        f"model.name={(folder / 'base').as_posix()}",
        f"text_judge.model={(folder / 'base').as_posix()}",
        f"benchmarks.jailbreakbench.path={(folder / 'behaviors').as_posix()}",
        f"artifact_root={(folder / 'unused').as_posix()}",
    ]
    for kind, config in load_pipeline(CONFIG_DIR, [*SETTINGS, *own]).items():
        values = as_dict(config)
        if kind is not RewardModelConfig:
            values["reward_model_config"] = "reward_model_config.yaml"
        make_finished._write_yaml(folder / "configs" / make_finished.FILES[kind], values)
    for name, values in make_finished.ADAPTERS.items():
        make_finished._write_yaml(folder / "configs" / "lora" / name, values)


def _write_behaviors(folder: Path) -> None:
    folder.mkdir()
    for group, index, header in (("harmful", "", str.title), ("benign", "index", str)):
        lines = [",".join([index, *map(header, ("goal", "target", "behavior", "category", "source"))])]
        lines += [f"{i},{group} {i},Sure,b,category {i},Original" for i in range(2)]
        (folder / f"{group}-behaviors.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ------------------------------------------------------------------ comparing
KEPT = ("data/raw", "data/processed", "data/cache", "models", "outputs/metrics", "outputs/benchmarks")
OF_A_RUN = {
    *("seconds", "started", "written", "peak_memory_bytes", "artifact_root", "files", "hardware"),
    *(
        "tokens_per_second",
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "total_flos",
    ),
    *(
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
        "commit",
        "dirty",
        "eval_tokens_per_second",
    ),
}
"""Keys of JSON and YAML that say when, where and how fast; `files` is held against the disk by `unvouched`."""


def contents(root: Path, patterns: Sequence[str] | None) -> dict[str, str]:
    """A digest of everything finished below an artifact root, by name.

    Weights, adapters, heads and samples by their bytes; JSON and YAML without `OF_A_RUN`; a table of the cache row by row,
    because an interrupted run may have cut it into other shards. Figures, logs and the report are left out.
    """
    found: dict[str, str] = {}
    for part in patterns or KEPT:
        for path in sorted((root / part).rglob("*")):
            name = path.relative_to(root).as_posix()
            hidden = any(piece.startswith(".") for piece in path.relative_to(root).parts)
            if not path.is_file() or hidden or path.suffix in (".png", ".tex"):
                continue
            try:
                if name.startswith("data/cache/"):
                    found |= _rows_of(path, path.relative_to(root).parent.as_posix())
                else:
                    plain = _plain(path, root)
                    found[name] = (
                        _VALUES + plain.decode() if path.suffix in (".json", ".jsonl") else _digest(plain)
                    )
            except (UserError, SafetensorError, KeyError, TypeError, AttributeError):
                found[name] = "damaged"
    return found


def _plain(path: Path, root: Path) -> bytes:
    if path.suffix == ".json":
        value = _without_times(io.read_json(path))
        if "truthfulqa_generation" in path.parts:  # its key holds when the honest judge was trained
            value.pop("fingerprint")
        return json.dumps(value, sort_keys=True).replace(str(root), "").encode()
    if path.suffix == ".jsonl":
        rows = [_without_times(row) for row in io.read_jsonl(path)]
        return json.dumps(rows, sort_keys=True).replace(str(root), "").encode()
    content = path.read_bytes().replace(str(root).encode(), b"")
    return re.sub(rb"artifact_root: .*\n", b"", content) if path.suffix == ".yaml" else content


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_times(v) for k, v in value.items() if k not in OF_A_RUN}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def _rows_of(path: Path, table: str) -> dict[str, str]:
    """Rows of a shard that is as it was written; one that was damaged has none."""
    if not io.is_as_written(path):
        return {}
    if path.suffix == ".jsonl":
        return {
            f"{table}:{row['key']}": _digest(json.dumps(row["value"]).encode()) for row in io.read_jsonl(path)
        }
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        keys, values = tensors["keys"].numpy().tobytes(), tensors["values"].numpy()
        return {
            f"{table}:{keys[16 * i : 16 * i + 16].hex()}": _SCORES + v.tobytes().hex()
            for i, v in enumerate(values)
        }
    return {f"{table}/{path.name}": _digest(path.read_bytes())}


def alike(found: str | None, wanted: str, *, rounding: bool = False) -> bool:
    """Equal, or cached scores that were computed again in other batches: equal but for rounding.

    Args:
        rounding: of the numbers in JSON too, because they are of a training on such scores.
    """
    if found is None or found == wanted:
        return found == wanted
    if found.startswith(_SCORES) and wanted.startswith(_SCORES):
        ours, theirs = (
            np.frombuffer(bytes.fromhex(text.removeprefix(_SCORES)), "<f4") for text in (found, wanted)
        )
        return ours.shape == theirs.shape and bool(np.allclose(ours, theirs, rtol=1e-5, atol=1e-5))
    if rounding and found.startswith(_VALUES) and wanted.startswith(_VALUES):
        return _close(*(json.loads(text.removeprefix(_VALUES)) for text in (found, wanted)))
    return False


def _close(found: Any, wanted: Any) -> bool:
    """Whether two values of JSON are one but for the rounding of their numbers."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        return found.keys() == wanted.keys() and all(_close(found[k], wanted[k]) for k in wanted)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_close, found, wanted))
    if isinstance(found, float) and isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=1e-5, abs_tol=1e-6)
    return found == wanted


_SCORES, _VALUES = "scores ", "values "


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def unvouched(root: Path, without: Sequence[str] = ()) -> str | None:
    """A file that the record of its finished artifact does not describe as it is, or None."""
    for record in sorted(root.rglob("run.json")):
        folder = record.parent
        if any(piece.startswith(".") for piece in folder.relative_to(root).parts) or not record.is_file():
            continue
        name = record.relative_to(root).as_posix()
        if name in without:
            continue
        try:
            wrong = damaged_files(folder, io.read_json(record)["files"])
        except (UserError, KeyError, TypeError, AttributeError):
            return f"{name} is no record"
        places = {(folder / file).relative_to(root).as_posix() for file in wrong}
        if left := sorted(places - set(without)):
            return f"{left[0]} is not as {name} says"
    return None


def files_below(root: Path, pattern: str, choose: Callable[[Path], bool] = lambda path: True) -> list[str]:
    """Names of files below an artifact root."""
    return [p.relative_to(root).as_posix() for p in sorted(root.glob(pattern)) if p.is_file() and choose(p)]


def seeded(seed: int, *about: object) -> random.Random:
    """Random numbers of their own for a kind of fault, so that one kind's number changes no other's."""
    return random.Random(f"{seed} {about}")


def shares(total: int, among: Mapping[str, float]) -> Iterator[tuple[str, int]]:
    """Split a number among names by weight, at least one each while there are enough."""
    sum_of = sum(among.values())
    given = {name: max(1, int(total * weight / sum_of)) for name, weight in among.items()}
    names = sorted(among, key=lambda name: -among[name])
    while sum(given.values()) < total:
        for name in names:
            if sum(given.values()) < total:
                given[name] += 1
    while sum(given.values()) > max(total, 0):
        largest = max(given, key=lambda name: given[name])
        given[largest] -= 1
    yield from ((name, number) for name, number in given.items() if number)
