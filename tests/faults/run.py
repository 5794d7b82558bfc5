"""Injects faults into a small project and writes what came of them into docs/reliability.md.

    python tests/faults/run.py           a small part, in a few minutes
    python tests/faults/run.py --all     everything; the page is written

Rows are written to --json as they are known; the same command goes on where it was stopped. On Linux alone: commands are forks.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["CUDA_VISIBLE_DEVICES"] = (
        "-1"  # as in every test: what comes of a fault is compared with runs on a CPU
    )
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults.rows import Row, Rows

KINDS = ("kills", "corruptions", "races", "disk", "fuzz")
SMALL = {"kills": 8, "corruptions": 16, "races": 2, "disk": 2, "examples": 1_000}
WHOLE = {"kills": 66, "corruptions": 260, "races": 16, "disk": 12, "examples": 100_000}
Case = tuple[tuple[str, str, str], Callable[[], Row]]


def arguments_of(words: list[str] | None = None) -> argparse.Namespace:
    """The command line, numbers filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="everything, and write the page")
    for name in SMALL:
        parser.add_argument(f"--{name}", type=int, metavar="N")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows, as they are known")
    found = parser.parse_args(words)
    for name, number in (WHOLE if found.all else SMALL).items():
        if getattr(found, name) is None:
            setattr(found, name, number)
    return found


def cases_of(folder: Path, given: argparse.Namespace) -> Iterator[Case]:
    """Every case with its key; the project is made when the first is asked for."""
    from faults import corruptions, disk, fuzz, kills, races
    from faults.small_project import make_project

    if "fuzz" in given.only:
        for name in fuzz.TARGETS:
            number = given.examples // len(fuzz.TARGETS)
            key = ("fuzz", name, f"{number} examples")
            yield key, lambda name=name, number=number: fuzz.run_fuzz(name, number, given.seed)
    if set(given.only) == {"fuzz"}:
        return
    project = make_project(folder)
    if "kills" in given.only:
        for kill in kills.kill_cases(project, given.kills, given.seed):
            key = ("kills", kill.stage, kill.name)
            yield key, lambda kill=kill: kills.run_kill(project, kill)
    if "corruptions" in given.only:
        for case in corruptions.corruption_cases(given.corruptions, given.seed):
            key = ("corruptions", case.target.name, case.name)
            yield key, lambda case=case: corruptions.run_corruption(project, case, given.seed)
    if "races" in given.only:
        for race in races.race_cases(project, given.races, given.seed):
            yield ("races", race.where, race.name), lambda race=race: races.run_race(project, race)
    if "disk" in given.only:
        for short in disk.disk_cases(given.disk, given.seed):
            yield ("disk", short.where, short.name), lambda short=short: disk.run_short(project, short)


def inject(given: argparse.Namespace) -> Rows:
    """Run every case that the file of rows does not hold."""
    from prmd.artifacts.runs import git_state

    head = {"seed": given.seed, "commit": git_state()["commit"], "all": given.all}
    file = given.json or Path(tempfile.gettempdir()) / f"faults-{os.getpid()}.jsonl"
    rows, folder = Rows(file, head), Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        for key, run in cases_of(folder, given):
            if key in rows.done:
                continue
            began = time.monotonic()
            row = run()
            rows.add(row)
            seconds = time.monotonic() - began
            print(f"{row.outcome:<9} {' | '.join(key)} ({seconds:.1f} s) {row.detail[:400]}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def main() -> int:
    """Inject, print the table, write the page; 1 where something was bad."""
    given = arguments_of()
    began = time.monotonic()
    rows = inject(given)
    from faults import page

    print(page.results(rows.rows, given.seed, time.monotonic() - began))
    if given.all:
        page.write(rows.rows, given.seed, time.monotonic() - began)
    return int(any(row.outcome == "bad" for row in rows.rows))


if __name__ == "__main__":
    sys.exit(main())
