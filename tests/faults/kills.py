"""SIGKILL at a random moment of a stage, then the same command again: its artifacts have to be those of an undisturbed run.

Half of the moments are shares of the stage's time, half are "before its n-th change of a file", which finds the seams between
two writes. Every fourth case is killed twice.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults import commands
from faults.rows import Row
from faults.small_project import ORDER, Project, seeded, shares


@dataclass(frozen=True)
class Kill:
    """One case.

    Attributes:
        share: of the stage's time or changes, in 0..1.
        by: `time` or `change`.
        again: the share of a second kill, during the continuation.
    """

    stage: str
    share: float
    by: str
    again: float | None

    @property
    def name(self) -> str:
        """Which case it is."""
        twice = "" if self.again is None else f" and {self.again:.3f}"
        return f"{self.stage}, {self.by} {self.share:.3f}{twice}"


def kill_cases(project: Project, number: int, seed: int) -> Iterator[Kill]:
    """Moments spread evenly over all stages, longer ones getting more, jittered by the seed."""
    weights = {stage: 1.0 + project.seconds[stage] for stage in ORDER}
    for stage, cases in shares(number, weights):
        for i in range(cases):
            random = seeded(seed, "kill", stage, i)
            share = (i + random.random()) / cases
            yield Kill(stage, share, ("change", "time")[i % 2], random.random() if i % 4 == 3 else None)


def run_kill(project: Project, kill: Kill) -> Row:
    """Kill, run again, compare."""
    root = project.case(project.before(kill.stage))
    for share in (kill.share, *([] if kill.again is None else [kill.again])):
        _killed(project, kill.stage, root, share, kill.by)
    ended = project.run(kill.stage, root)
    if ended.status:
        fault = ended.fault()
        return Row.of("kills", kill.stage, kill.name, "said" if fault is None else "bad", fault or ended.said)
    difference = project.difference(root, kill.stage)
    outcome = "identical" if difference is None else "bad"
    return Row.of("kills", kill.stage, kill.name, outcome, difference or "", root.parent)


def _killed(project: Project, stage: str, root: Path, share: float, by: str) -> None:
    """Run a stage until it is killed; a continuation that is done before its moment is left as it is."""
    if by == "change":
        operation = 1 + int(share * len(project.changes[stage]))
        project.run(stage, root, commands.die_before(root, operation))
        return
    running = project.start(stage, root)
    time.sleep(share * project.seconds[stage])
    if running.kill():
        running.end()
