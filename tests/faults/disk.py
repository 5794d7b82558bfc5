"""A disk without room: one line, and the same command goes on when there is room.

On a file system of a few MB where one may be mounted (root), and by a limit on the size of a file everywhere else.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from faults import commands
from faults.rows import Row
from faults.small_project import ORDER, Project, seeded

MOUNTED, LIMITED = "file system full", "file may not grow"
PAGE = 4096


@dataclass(frozen=True)
class Short:
    """One stage without room.

    Attributes:
        share: of what the stage would add to the disk, or of its largest new file, that there is room for.
    """

    where: str
    stage: str
    share: float

    @property
    def name(self) -> str:
        """Which case it is."""
        return f"{self.stage}, room for {self.share:.3f}"


def disk_cases(number: int, seed: int) -> Iterator[Short]:
    """Both kinds in turn, over all stages."""
    chance = seeded(seed, "disk")
    stages = sorted(ORDER[1:], key=lambda stage: chance.random())
    for i in range(number):
        yield Short((MOUNTED, LIMITED)[i % 2], stages[i // 2 % len(stages)], chance.random())


def run_short(project: Project, short: Short) -> Row:
    """Run a stage without room, make room, run it again, compare."""
    if short.where == LIMITED:
        root = project.case(project.before(short.stage))
        largest = max(_sizes(project.after(short.stage), project.before(short.stage)), default=PAGE)
        first = project.run(short.stage, root, commands.largest_file(int(largest * short.share)))
        return _judged(project, short, root, first.status and first.fault())
    folder = project.folder / "small"
    folder.mkdir(exist_ok=True)
    if reason := commands.mount_small(folder, 1 << 30):
        return Row("disk", short.where, short.name, "skipped", reason)
    try:
        root = folder / "artifacts"
        shutil.copytree(project.before(short.stage), root)
        used = shutil.disk_usage(folder).used
        added = sum(
            -(-s // PAGE) * PAGE for s in _sizes(project.after(short.stage), project.before(short.stage))
        )
        commands.enlarge(folder, used + max(PAGE, int(added * short.share)))
        first = project.run(short.stage, root)
        commands.enlarge(folder, 1 << 30)
        return _judged(project, short, root, first.status and first.fault(), keep=True)
    finally:
        commands.unmount(folder)


def _sizes(after: Path, before: Path) -> list[int]:
    """Sizes of the files that are new."""
    return [
        path.stat().st_size
        for path in after.rglob("*")
        if path.is_file() and not (before / path.relative_to(after)).is_file()
    ]


def _judged(
    project: Project, short: Short, root: Path, fault: str | int | None, *, keep: bool = False
) -> Row:
    """Row of a stage that ran without room.

    Args:
        fault: what was wrong with its end; 0 where it ended well all the same; None: it said so in one line.
    """
    again = project.run(short.stage, root)
    difference = f"afterwards: {again.said}" if again.status else project.difference(root, short.stage)
    wrong = [text for text in (fault, difference) if text]
    outcome = "bad" if wrong else "identical" if fault == 0 else "said"
    return Row.of(
        "disk", short.where, short.name, outcome, "; ".join(map(str, wrong)), None if keep else root.parent
    )
