"""Damaged artifacts, and the commands that read them next: the same artifacts again, or one line that names the file."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults import commands, damage
from faults.rows import Row
from faults.small_project import OF, ORDER, POLICIES, REWARD_MODELS, STAGES, Project, seeded, shares

HIERARCHICAL, METRICS, BENCHMARKS = "3 hierarchical", "4 metrics", "4 benchmarks"
HELPFUL, HARMLESS = "2 helpful, heads", "2 harmless, adapters"
RECORDS = ("run.json", "config.yaml")


@dataclass(frozen=True)
class Target:
    """A kind of artifact and who reads it.

    Attributes:
        name: in the table.
        pattern: its files below the artifact root.
        readers: the commands that are given in this order; the first that reads the file has to notice.
        state: the stage after which the file is damaged.
        removed: what is deleted beside, so that the readers have work to do.
        weight: how many cases it gets, against the others.
        stopped: stage whose interruption leaves the files: it is killed before the first change whose path ends so.
    """

    name: str
    pattern: str
    readers: tuple[str, ...]
    state: str
    removed: tuple[str, ...] = ()
    weight: float = 1.0
    stopped: tuple[str, str] | None = None
    choose: Callable[[Path], bool] = lambda path: True


def _no_record(path: Path) -> bool:
    return path.name not in RECORDS


TRAINED = "3 cvar, edpo, dpo_helpful"
SCORES = ("data/cache/rewards-*", "data/cache/features-*")
TARGETS = (
    Target("raw rows", "data/raw/*/*.jsonl", ("1b split",), "1a download"),
    Target("raw rows, fetched again", "data/raw/*/*.jsonl", ("1a download", "1b split"), "1a download"),
    Target("raw manifest", "data/raw/*/manifest.json", ("1b split",), "1a download"),
    Target(
        "raw manifest, fetched again", "data/raw/*/manifest.json", ("1a download", "1b split"), "1a download"
    ),
    Target(
        "prepared rows, for rewards", "data/processed/*/helpful/*.jsonl", (HELPFUL,), "1b split", weight=2
    ),
    Target("prepared rows, for policies", "data/processed/*/*/*.jsonl", (HIERARCHICAL,), TRAINED, weight=2),
    Target("prepared rows, for metrics", "data/processed/*/*/test.jsonl", (METRICS,), HIERARCHICAL),
    Target("prepared questions", "data/processed/*/truthfulqa*.json", (BENCHMARKS,), METRICS),
    Target("record of prepared data", "data/processed/*/run.json", ("1b split", HELPFUL), "1b split"),
    Target(
        "reward model weights", f"{REWARD_MODELS}/*/model.safetensors", (HIERARCHICAL,), TRAINED, weight=2
    ),
    Target(
        "reward model weights, not scored",
        f"{REWARD_MODELS}/*/model.safetensors",
        (HIERARCHICAL,),
        TRAINED,
        SCORES,
    ),
    Target(
        "reward model weights, own command",
        f"{REWARD_MODELS}/helpful_rm/model.safetensors",
        (HELPFUL, HIERARCHICAL),
        TRAINED,
    ),
    Target(
        "member adapters", f"{REWARD_MODELS}/*/members/**/*.safetensors", (HIERARCHICAL,), TRAINED, weight=2
    ),
    Target("heads", f"{REWARD_MODELS}/*/ensemble.safetensors", (HIERARCHICAL,), TRAINED, weight=2),
    Target("calibration", f"{REWARD_MODELS}/*/calibration.json", (HIERARCHICAL,), TRAINED, weight=2),
    Target(
        "calibration, own command",
        f"{REWARD_MODELS}/helpful_rm/calibration.json",
        (HELPFUL, HIERARCHICAL),
        TRAINED,
    ),
    Target(
        "reward model's other files",
        f"{REWARD_MODELS}/*/*.json*",
        (HIERARCHICAL,),
        TRAINED,
        SCORES,
        choose=_no_record,
    ),
    Target("record of a reward model", f"{REWARD_MODELS}/*/run.json", (HIERARCHICAL,), TRAINED),
    Target("policy weights", f"{POLICIES}/*/*.safetensors", (METRICS,), HIERARCHICAL, weight=1.5),
    Target(
        "policy weights, own command",
        f"{POLICIES}/hierarchical/*.safetensors",
        (HIERARCHICAL, METRICS),
        HIERARCHICAL,
        weight=0.5,
    ),
    Target("policy's other files", f"{POLICIES}/*/*.json*", (METRICS,), HIERARCHICAL, choose=_no_record),
    Target("record of a policy", f"{POLICIES}/*/run.json", (METRICS,), HIERARCHICAL),
    Target("kept checkpoints", f"{POLICIES}/*/checkpoints/*/*.safetensors", (METRICS,), HIERARCHICAL),
    Target("policies, for benchmarks", f"{POLICIES}/*/*.safetensors", (BENCHMARKS,), METRICS, weight=0.5),
    Target("judges", f"models/judges/{OF}/*/**/*.safetensors", (METRICS,), METRICS, ("outputs/metrics",)),
    Target("judges' other files", f"models/judges/{OF}/*/*.json*", (METRICS,), METRICS, ("outputs/metrics",)),
    Target(
        "cached features", "data/cache/features-*/*", (HELPFUL,), HELPFUL, (f"{REWARD_MODELS}/helpful_rm",)
    ),
    Target("cached rewards", "data/cache/rewards-*/*", (HIERARCHICAL,), TRAINED, weight=2),
    Target("cached log-probabilities", "data/cache/logps-*/*", (HIERARCHICAL,), TRAINED, weight=2),
    Target("cached samples", "data/cache/samples-*/*", (HIERARCHICAL,), TRAINED, weight=2),
    Target("judged rewards", "data/cache/rewards-*/*", (METRICS,), METRICS, ("outputs/metrics",)),
    Target("cached KL", "data/cache/kl-*/*", (METRICS,), METRICS, ("outputs/metrics",)),
    Target(
        "judge's replies",
        "data/cache/judge-*/*",
        (BENCHMARKS,),
        BENCHMARKS,
        ("outputs/benchmarks",),
        weight=0.7,
    ),
    Target("metrics", "outputs/metrics/*/*.json", (METRICS,), METRICS, weight=1.5),
    Target("metrics' samples", "outputs/metrics/*/samples/*", (METRICS,), METRICS),
    Target("benchmark results", "outputs/benchmarks/*/*/*.json*", (BENCHMARKS,), BENCHMARKS, weight=1.5),
    *(
        Target(
            f"{what} of an interrupted training",
            pattern,
            (stage,),
            stage,
            stopped=(stage, ending),
            weight=weight,
        )
        for what, pattern, stage, ending, weight in (
            ("optimizer state", f"{POLICIES}/.*/checkpoint-*/optimizer.pt", HIERARCHICAL, "training.json", 1),
            ("schedule", f"{POLICIES}/.*/checkpoint-*/scheduler.pt", HIERARCHICAL, "training.json", 1),
            ("random numbers", f"{POLICIES}/.*/checkpoint-*/rng_state.pth", HIERARCHICAL, "training.json", 1),
            (
                "trainer state",
                f"{POLICIES}/.*/checkpoint-*/trainer_state.json",
                HIERARCHICAL,
                "training.json",
                1,
            ),
            ("weights", f"{POLICIES}/.*/checkpoint-*/model.safetensors", HIERARCHICAL, "training.json", 1),
            ("markers", f"{POLICIES}/.*/checkpoint-*/COMPLETE", HIERARCHICAL, "training.json", 1),
            ("notes", f"{REWARD_MODELS}/.helpful_rm.partial/*.json", HELPFUL, "backbone.json", 2),
            (
                "adapters",
                f"{POLICIES}/.*/checkpoint-*/adapter_model.safetensors",
                "3 hard_min, adapter",
                "training.json",
                1,
            ),
            ("checkpoints (TRL)", f"{POLICIES}/.*/checkpoint-*/*", "3 baseline, TRL", "training.json", 2),
            ("members", f"{REWARD_MODELS}/.*/members/**/*", HARMLESS, "members/1/training.json", 1),
        )
    ),
    *(
        Target(f"{what} before publication", pattern, (stage,), stage, stopped=(stage, "run.json"), weight=2)
        for what, pattern, stage in (
            ("policy", f"{POLICIES}/.hierarchical.partial/*", HIERARCHICAL),
            ("reward model", f"{REWARD_MODELS}/.helpful_rm.partial/*", HELPFUL),
            ("prepared data", "data/processed/.*/*/*.jsonl", "1b split"),
        )
    ),
)


@dataclass(frozen=True)
class Corruption:
    """One damaged file."""

    target: Target
    damage: str
    number: int

    @property
    def name(self) -> str:
        """Which case it is."""
        return f"{self.damage} {self.number}"


def corruption_cases(number: int, seed: int) -> Iterator[Corruption]:
    """Every target with one damage after another, each beginning at another one."""
    weights = {target.name: target.weight for target in TARGETS}
    by_name = {target.name: target for target in TARGETS}
    for name, cases in shares(number, weights):
        order = list(damage.EVERY)
        seeded(seed, "damage", name).shuffle(order)
        for i in range(cases):
            yield Corruption(by_name[name], order[i % len(order)], i)


def run_corruption(project: Project, case: Corruption, seed: int) -> Row:
    """Damage a file, give the commands that read it, compare."""
    target = case.target
    root = project.case(_state(project, target))
    chance = seeded(seed, "corruption", target.name, case.number)
    files = [p for p in sorted(root.glob(target.pattern)) if p.is_file() and target.choose(p)]
    kind = case.damage
    fitting = [p for p in files if damage.fits(kind, p, files)]
    if not fitting:  # a number in weights, a sibling of a single file
        kind = "byte flipped"
        fitting = [p for p in files if p.stat().st_size > 1]
    if not fitting:
        raise LookupError(f"{target.name}: no file of {target.pattern} below {root}")
    for pattern in target.removed:
        for path in list(root.glob(pattern)):
            shutil.rmtree(path)
    chosen = chance.choice(fitting)
    hit = damage.do(kind, chosen, files, chance)
    outcome, detail = _read(project, target, root, hit)
    shown = f"{chosen.relative_to(root).as_posix()} {kind}"
    return Row.of("corruptions", target.name, case.name, outcome, f"{shown}: {detail}", root.parent)


def _read(project: Project, target: Target, root: Path, hit: list[Path]) -> tuple[str, str]:
    names = [path.relative_to(root).as_posix() for path in hit]
    said_by = {piece for path in hit for piece in (path.name, *_folders_of(path))}
    for reader in target.readers:
        ended = project.run(reader, root)
        if ended.status:
            fault = ended.fault(*said_by)
            return ("said", ended.said) if fault is None else ("bad", f"{reader}: {fault}")
    last, cache = _last(target), not target.removed
    rounding = any(name.startswith("data/cache/rewards-") for name in names)  # scored in other batches now
    if project.difference(root, last, cache=cache, rounding=rounding) is None:
        return "identical", ""
    left = project.difference(root, last, without=names, cache=cache, rounding=rounding)
    if left is not None:
        return "bad", left
    own = [name for name in names if name.startswith(STAGES[target.readers[-1]].writes)]
    return ("bad", f"{own[0]} is kept as it is") if own else ("untouched", "")


def _folders_of(path: Path) -> list[str]:
    """Names that say as much as the file's own where the record of an artifact or a checkpoint is hit."""
    return (
        [path.parent.name]
        if path.name in ("run.json", "COMPLETE", "fingerprint.json", "manifest.json")
        else []
    )


def _last(target: Target) -> str:
    """The later of the state and the last reader: whose artifacts are compared."""
    return max((target.state, *target.readers), key=ORDER.index)


def _state(project: Project, target: Target) -> Path:
    """The artifacts to be damaged; those of an interrupted stage are made once."""
    if target.stopped is None:
        return project.after(target.state)
    stage, ending = target.stopped
    kept = project.folder / "interrupted" / f"{stage} {ending}".replace("/", "-").replace(" ", "_")
    if not kept.is_dir():
        root = project.case(project.before(stage))
        name = ending.rsplit("/", 1)[-1]

        def wanted(event: str, path: Path) -> bool:
            inside = any(piece.endswith(".partial") for piece in path.parts)
            return event == "os.rename" and inside and path.name == name and str(path).endswith(ending)

        ended = project.run(stage, root, commands.die_when(root, wanted))
        if ended.status != -9:
            raise LookupError(f"{stage} never wrote {ending}: {ended}")
        shutil.move(root, kept)
    return kept
