"""Stage 1 at size: rows per second and peak memory of `data.approach: own_pairs` on generated rows.

    python benchmarks/stage1_size.py [--rows N ...] [--json FILE] [--work FOLDER] [--keep]

Of every size, rows of seeded words are written as two objectives' JSON Lines, and `download_dataset.py` and
`split_objectives.py` run on them by their command lines, each in a process of its own. One row in a hundred is there twice, one
has a prompt that nearly repeats another's, and one in 250 cannot be a pair; what `stats.json` counts is held against
what was made. Memory is the resident set of the process, sampled 20 times a second, and CPU time that of its one process.

Writes   FILE (default: benchmarks/results/stage1_size.json) after every size, and a table beside it as Markdown. Sizes that
         were measured by the same code before stay in it, so that one that takes long can be measured later.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

import numpy as np
import psutil

from benchmarks.sources import source_hashes
from prmd.artifacts import io
from prmd.artifacts.paths import PROJECT_ROOT, ArtifactPaths, stage_command
from prmd.artifacts.runs import git_state, versions
from prmd.config.shared import SplitsConfig
from prmd.data import prepare
from prmd.errors import DataError
from prmd.runtime import configure_logging, hardware
from utils import user_errors_exit

logger = logging.getLogger("prmd.stage1_size")
SIZES = (10_000, 30_000, 100_000, 1_000_000)
SCRIPTS = ("download_dataset", "split_objectives")
OBJECTIVES = ("clear", "kind")
WORK = PROJECT_ROOT / "outputs" / "stage1_size"
RESULTS = PROJECT_ROOT / "benchmarks" / "results" / "stage1_size.json"
BLOCK = 1000
"""Rows among which copies are made and which are shuffled."""
WORDS = {"prompt": 40, "response": 60}
"""Mean words of a text; lengths are normal with three tenths of it as standard deviation, within a third and three times."""
VOCABULARY = 30_000
SAMPLES_PER_SECOND = 20
ODD = ("empty_response", "identical_responses", "broken_text", "tools")
Row = dict[str, Any]


# ------------------------------------------------------------------ rows
class Texts:
    """Texts of made-up words whose frequencies fall as 1 / rank, as those of a language do.

    Args:
        seed: the same seed gives the same texts.
    """

    def __init__(self, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        parts = [c + v for c in "bdfghklmnprstvwz" for v in "aeiou"]
        drawn = self.draw.integers(0, len(parts), (2 * VOCABULARY, 4))
        sizes = self.draw.integers(1, 5, 2 * VOCABULARY)
        made = ("".join(parts[i] for i in row[:size]) for row, size in zip(drawn, sizes, strict=True))
        self.words = np.array(list(dict.fromkeys(made))[:VOCABULARY], dtype=object)
        self.until = np.cumsum(1 / np.arange(3, 3 + len(self.words)))

    def make(self, kind: str, count: int) -> list[str]:
        """So many texts of the mean length of a kind."""
        mean = WORDS[kind]
        lengths = np.clip(self.draw.normal(mean, 0.3 * mean, count), mean / 3, 3 * mean).astype(int)
        ranks = np.searchsorted(self.until, self.draw.random(lengths.sum()) * self.until[-1])
        words, ends = self.words[ranks], np.cumsum(lengths)
        return [" ".join(words[end - n : end]) for end, n in zip(ends, lengths, strict=True)]


def generated_rows(count: int, seed: int, made: Counter[str]) -> Iterator[Row]:
    """Rows in blocks, each with its copies and odd rows.

    Args:
        made: to which is added how many copies, near copies and odd rows of each kind there are.
    """
    texts = Texts(seed)
    for start in range(0, count, BLOCK):
        yield from _block(texts, min(BLOCK, count - start), made)


def _block(texts: Texts, size: int, made: Counter[str]) -> list[Row]:
    copies, odd = max(1, size // 100), ODD if size >= BLOCK // 10 else ()
    columns = zip(
        texts.make("prompt", size), texts.make("response", size), texts.make("response", size), strict=True
    )
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in columns]
    for k in range(copies):  # the first rows are copied as they are, the next ones nearly
        rows[-1 - k] = dict(rows[k])
        prompt = rows[copies + k]["prompt"]
        _, _, rest = prompt.partition(" ")
        rows[-1 - copies - k]["prompt"] = f"indeed {rest}" if k % 2 else f"{prompt} indeed"
    changed = (
        {"chosen": ""},
        {"chosen": rows[-2 * copies - 2]["rejected"]},
        {"chosen": "\ud83d"},
        {"tools": [{"name": "f"}]},
    )
    for k, reason in enumerate(odd):
        rows[-2 * copies - 1 - k] |= changed[k]
        made[reason] += 1
    made.update(rows=size, copies=copies, near_copies=copies)
    texts.draw.shuffle(rows)
    return rows


# ------------------------------------------------------------------ runs
def measure(count: int, work: Path) -> Row:
    """One size: generate, run both scripts, hold the counts against what was made.

    Raises:
        DataError: a script failed; names its output.
    """
    folder, made = work / f"rows-{count}", Counter[str]()
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    for k, objective in enumerate(OBJECTIVES):
        own = (count + k) // len(OBJECTIVES)
        io.write_jsonl(folder / f"{objective}.jsonl", generated_rows(own, seed=k, made=made))
    size = sum((folder / f"{objective}.jsonl").stat().st_size for objective in OBJECTIVES)
    logger.info("%s rows, %.0f MB, generated in %.0f s", f"{count:,}", size / 1e6, time.monotonic() - began)
    row: Row = {"rows": count, "megabytes": round(size / 1e6, 1)}
    for script in SCRIPTS:
        row[script] = _run(script, folder)
        logger.info("%s rows, %s: %s", f"{count:,}", script, row[script])
    seconds = {unit: sum(row[script][unit] for script in SCRIPTS) for unit in ("seconds", "cpu_seconds")}
    row |= {f"rows_per_{unit[:-1]}": round(count / value, 1) for unit, value in seconds.items()}
    row["peak_mib"] = max(row[script]["peak_mib"] for script in SCRIPTS)
    stats = io.read_json(ArtifactPaths(root=folder, approach="own_pairs").processed / "stats.json")
    return row | {"made": dict(made), **_counted(stats)}


def _run(script: str, folder: Path) -> dict[str, float]:
    """Run a script of stage 1 by its command line; seconds, CPU seconds and peak MiB of its process."""
    named = {o: {"path": (folder / f"{o}.jsonl").as_posix()} for o in OBJECTIVES}
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / stage_command(script).split()[1]),
        f"artifact_root={folder.as_posix()}",
    ]
    command += ["data.approach=own_pairs", f"data.own_pairs.objectives={json.dumps(named)}"]
    log, began = folder / f"{script}.log", time.monotonic()
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w", encoding="utf-8") as stream:
        process = psutil.Popen(command, stdout=stream, stderr=stream, env=offline)
        peak, cpu = 0, 0.0
        while process.poll() is None:
            try:
                peak, times = max(peak, process.memory_info().rss), process.cpu_times()
                cpu = times.user + times.system
            except psutil.Error:  # it has just ended
                continue
            time.sleep(1 / SAMPLES_PER_SECOND)
    if process.returncode:
        last = (io.read_utf8(log).strip().splitlines() or ["no output"])[-1]
        raise DataError(f"{log}: {script} ended with status {process.returncode}: {last}")
    seconds = time.monotonic() - began
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_mib": round(peak / 2**20)}


def _counted(stats: dict[str, Any]) -> dict[str, Any]:
    near = sum(n for reason, n in stats["dropped"].items() if reason.startswith("near_duplicate"))
    return {
        "kept": sum(sum(splits.values()) for splits in stats["sizes"].values()),
        "repeated": stats["dropped"].get("repeated_pair", 0),
        "near": near,
        "refused": stats["quarantined"],
    }


def share_of_near_copies() -> float:
    """The share of near copies of which one must go: two prompts in train and a held-out split, or in judge and test or val."""
    splits = SplitsConfig()
    held_out = splits.test_fraction + splits.val_fraction
    train = 1 - held_out - splits.judge_fraction
    return 2 * train * (held_out + splits.judge_fraction) + 2 * splits.judge_fraction * held_out


# ------------------------------------------------------------------ results
def table(results: dict[str, Any]) -> str:
    """The rows as a page of Markdown."""
    rows, setup = results["rows"], results["setup"]
    head = ("rows", "MB", "download s (CPU)", "split s (CPU)", "rows per second", "per CPU second")
    head += ("peak MiB, download", "peak MiB, split", "pairs kept", "near copies dropped")
    lines = ["# Stage 1 at size", "", *(part.replace("\n", " ") for part in _explained()), ""]
    lines += ["| " + " | ".join(head) + " |", "|---:" * len(head) + "|"]
    for row in rows:
        both = [f"{row[script]['seconds']:,.0f} ({row[script]['cpu_seconds']:,.0f})" for script in SCRIPTS]
        peaks = [f"{row[script]['peak_mib']:,}" for script in SCRIPTS]
        speeds = [f"{row[key]:,.0f}" for key in ("rows_per_second", "rows_per_cpu_second")]
        near = f"{row['near']:,} of {row['made']['near_copies']:,}"
        cells = [
            f"{row['rows']:,}",
            f"{row['megabytes']:,.0f}",
            *both,
            *speeds,
            *peaks,
            f"{row['kept']:,}",
            near,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    facts, used = setup["hardware"], setup["versions"]
    lines += ["", *(f"* {note}" for note in notes(rows)), ""]
    lines.append(
        f"{facts['cpu']}, one thread, {facts['memory_gib']} GiB; Python {used['python']}, numpy {used['numpy']}, datasketch "
        f"{setup['datasketch']}. Where seconds exceed CPU seconds, other programs had the processor."
    )
    return "\n".join(lines) + "\n"


def _explained() -> tuple[str, str]:
    """What is measured: the first line of this module's docstring, and its paragraph on the rows."""
    title, _, about, *_ = (__doc__ or "").split("\n\n")
    return f"{title}\n", about


def notes(rows: Sequence[Row]) -> list[str]:
    """What the rows say in words: growth between sizes, and whether everything was counted as it was made."""
    said = []
    for before, row in pairwise(rows):
        seconds = [sum(r[script]["cpu_seconds"] for script in SCRIPTS) for r in (before, row)]
        more = row["rows"] - before["rows"]
        kib = 1024 * (row["peak_mib"] - before["peak_mib"]) / more
        said.append(
            f"From {before['rows']:,} to {row['rows']:,} rows: {row['rows'] / before['rows']:.3g}× the rows, "
            f"{seconds[1] / seconds[0]:.3g}× the CPU time; {1000 * (seconds[1] - seconds[0]) / more:.2f} ms and {kib:.1f} KiB of "
            "peak memory for each further row."
        )
    for row in rows:
        made = row["made"]
        odd = {reason: made[reason] for reason in ODD if made.get(reason)}
        right = row["repeated"] == made["copies"] and row["refused"] == odd
        said.append(
            f"{row['rows']:,} rows: {row['kept']:,} pairs kept; exact copies and odd rows "
            f"{'counted as they were made' if right else 'NOT counted as they were made'}; near copies dropped "
            f"{row['near'] / (share_of_near_copies() * made['near_copies']):.0%} of those expected to fall into splits that must not share them."
        )
    return said


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every size, write the results after each, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, metavar="N", help=f"default: {SIZES}")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="where the results go")
    parser.add_argument("--work", type=Path, default=WORK, metavar="FOLDER", help="of what is generated")
    parser.add_argument("--keep", action="store_true", help="keep what was generated and made of it")
    options = parser.parse_args(arguments)
    configure_logging()
    sources = source_hashes(Path(__file__)) | source_hashes(Path(prepare.__file__))
    setup = {"hardware": hardware(), "versions": versions(), "sources": sources, **git_state()}
    setup["datasketch"] = metadata.version("datasketch")
    former = (
        io.read_json(options.json) if options.json.is_file() else {"rows": [], "setup": {"sources": None}}
    )
    rows = former["rows"] if former["setup"]["sources"] == sources else []
    for count in options.rows:
        row = measure(count, options.work)
        rows = sorted([r for r in rows if r["rows"] != count] + [row], key=lambda r: r["rows"])
        results = {"rows": rows, "setup": setup}
        io.write_json(options.json, results)
        io.write_text(options.json.with_suffix(".md"), table(results))
        if not options.keep:
            shutil.rmtree(options.work / f"rows-{count}")
    print(table({"rows": rows, "setup": setup}))


if __name__ == "__main__":
    with user_errors_exit():
        main()
