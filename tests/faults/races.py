"""Two commands at once on one artifact root: the end is that of one after the other, and whoever is refused says so in a line."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from faults import commands
from faults.commands import Ended
from faults.rows import Row
from faults.small_project import ORDER, Project, alike, contents, seeded, unvouched

TOGETHER = (
    ("2 helpful, heads", "2 harmless, adapters", "2 honest, heads"),
    ("3 baseline, TRL", "3 hard_min, adapter", "3 cvar, edpo, dpo_helpful", "3 hierarchical"),
    ("4 metrics", "4 benchmarks"),
)
"""Stages that a user may well start at once."""
PIPELINES = "two pipelines"


@dataclass(frozen=True)
class Race:
    """Stages started one behind the other.

    Attributes:
        share: of the first one's time, by which each further one comes later.
    """

    where: str
    stages: tuple[str, ...]
    share: float

    @property
    def name(self) -> str:
        """Which case it is."""
        return f"{', '.join(self.stages)}, offset {self.share:.3f}"


def race_cases(project: Project, number: int, seed: int) -> Iterator[Race]:
    """Of ten cases seven are one stage twice, two are several stages, one is two pipelines."""
    chance = seeded(seed, "races")
    stages = sorted(ORDER, key=lambda stage: chance.random())
    for i in range(number):
        share = chance.random()
        if i % 5 == 4:
            together = TOGETHER[i // 5 % len(TOGETHER)]
            yield Race("different stages at once", together, share * 0.3)
        elif i % 10 == 8:
            yield Race(PIPELINES, ("run_pipeline.py",) * 2, share)
        else:
            yield Race("the same stage twice", (stages[i % len(stages)],) * 2, share)


def run_race(project: Project, race: Race) -> Row:
    """Start all, wait, give each command once more, compare."""
    if race.where == PIPELINES:
        return _two_pipelines(project, race)
    first, last = race.stages[0], race.stages[-1]
    root = project.case(project.before(first))
    running = []
    for stage in race.stages:
        running.append(project.start(stage, root))
        if stage is not race.stages[-1] or len(running) == 1:
            time.sleep(race.share * project.seconds[first])
    ends = [one.end() for one in running]
    ends += [project.run(stage, root) for stage in dict.fromkeys(race.stages)]
    shared = first != last  # both score with the same judges, each what the other has not scored yet
    difference = project.difference(root, last, rounding=shared)
    return _judged(race, ends, len(race.stages), difference, root)


def _judged(race: Race, ends: list[Ended], at_once: int, difference: str | None, root: Path) -> Row:
    faults = [fault for end in ends[:at_once] if end.status and (fault := end.fault())]
    faults += [f"afterwards: {end.fault() or end.said}" for end in ends[at_once:] if end.status]
    refused = [end.said for end in ends[:at_once] if end.status]
    outcome = "bad" if faults or difference else "said" if refused else "identical"
    detail = "; ".join([*faults, *([difference] if difference else [])]) or "; ".join(refused)
    return Row.of("races", race.where, race.name, outcome, detail, root.parent)


def _two_pipelines(project: Project, race: Race) -> Row:
    """The pipeline from the prepared data on, once alone and then twice at once."""
    alone, root = (project.case(project.after("1b split")) for _ in range(2))

    def start(where: Path) -> commands.Running:
        arguments = ["--config", str(project.folder / "configs"), f"artifact_root={where.as_posix()}"]
        arguments += ["benchmarks.run=[hh_holdout]"]
        arguments += ["tuning.method=lora", "reward_model_config.tuning.method=lora"]
        arguments += ["ensemble.kind=adapters"]  # heads would have too few harmless pairs
        project._cases += 1
        return commands.start("run_pipeline.py", arguments, project.folder / "said" / str(project._cases))

    wanted_end = start(alone).end()
    first = start(root)
    time.sleep(1 + race.share * wanted_end.seconds / 2)
    ends = [one.end() for one in (first, start(root))]
    ends.append(start(root).end())
    ends = [replace(end, said=_without_bars(end.said)) for end in ends]
    wanted, found = contents(alone, None), contents(root, None)
    other = next((name for name in wanted if not alike(found.get(name), wanted[name])), None)
    difference = f"{other} differs" if other else wanted_end.said if wanted_end.status else unvouched(root)
    return _judged(race, ends, 2, difference, root)


def _without_bars(said: str) -> str:
    """What a pipeline said, without the progress of TRL in an earlier step and the word that finished stages are kept."""
    return "\n".join(line for line in commands.messages(said) if not line.startswith("Stopped. "))
