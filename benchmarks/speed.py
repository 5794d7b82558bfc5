"""Speed and memory of the training engine, side by side with TRL on the same pairs.

    python benchmarks/speed.py [--quick] [--rows NAME ...] [--repeats N] [--json FILE] [--model FOLDER_OR_WHEEL] [--data FOLDER]

Measures DPO against TRL's DPOTrainer (references precomputed in both, only optimiser steps timed), reward models against
its RewardTrainer, distillation (TRL has none), scoring, peak memory at vocabulary 151,936, and each against the same
model on dense batches. On a GPU also the shape of Qwen2.5-3B within 32 GB.
`--quick` takes 16 pairs instead of 64, and fewer repeats.
Prints a Markdown table and writes JSON Lines, both row by row: a run that is cut keeps what it measured. Rows are added to
those that an earlier run left in the file.
"""

import os

# Read when the Hugging Face libraries are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

import torch
import transformers
import trl

from benchmarks.side_by_side.memory import MEMORY_VOCABULARY, memory_row
from benchmarks.side_by_side.row_file import RowFile
from benchmarks.side_by_side.rows import Row, policy_rows, reward_row
from benchmarks.side_by_side.setup import (
    MAX_LENGTH,
    Models,
    Workload,
    command_line,
    load_workload,
    model_config,
    saved_models,
)
from benchmarks.side_by_side.shape import cap_memory, qwen_3b_shape, shape_rows
from prmd.artifacts.paths import CONFIG_DIR
from prmd.config.loading import load_config
from prmd.config.shared import RewardModelConfig
from prmd.runtime import configure_logging, free_memory, get_device, hardware, set_seed
from utils import user_errors_exit

logger = logging.getLogger("prmd.speed")
SPEED_TARGETS = {"cpu": {"dpo": 3.5, "reward_model": 2.2}, "cuda": {"dpo": 2.0, "reward_model": 2.0}}
MEMORY_TARGET, PADDING_TARGET, LIMIT_TARGET = 0.6, 0.05, 0.85


@dataclass(frozen=True)
class Preset:
    """How much is measured.

    Attributes:
        pairs: pairs of a timed run.
        limits: by row, the repeats and the seconds after which no further repeat begins.
    """

    pairs: int
    limits: dict[str, tuple[int, float]]


FULL = Preset(
    64,
    {name: (repeats, math.inf) for name, repeats in (("dpo", 5), ("reward_model", 5), ("distillation", 3))}
    | {"scoring": (3, math.inf)},
)
ROWS = (*FULL.limits, "memory", "shape")
QUICK = Preset(
    16, {"dpo": (3, 540.0), "reward_model": (3, 420.0), "distillation": (2, 120.0), "scoring": (2, 120.0)}
)


def measure(
    model: str,
    data: str | None,
    preset: Preset,
    *,
    names: Sequence[str] = ROWS,
    vocabulary: int = MEMORY_VOCABULARY,
) -> Iterator[Row]:
    """The named rows as they are measured, with the hardware and versions they were and the targets they miss.

    Args:
        names: of `ROWS`; distillation and scoring are measured with dpo alone, `shape` (that of Qwen2.5-3B) on a GPU alone.
    """
    set_seed(0)
    paths = load_config(CONFIG_DIR / "reward_model_config.yaml", RewardModelConfig).paths
    base = model_config(model)
    workload = load_workload(base, data, preset.pairs, max_length=MAX_LENGTH)
    models = saved_models(base, paths, workload.tokenizer.pad_token_id)
    logger.info("%s, %s on %s", model, workload.source, get_device())
    device = describe_device()
    for row in _rows(models, workload, preset, names, vocabulary):
        yield row | {"model": row["model"] or model, "missed": misses(row)} | device


def _rows(
    models: Models, workload: Workload, preset: Preset, names: Sequence[str], vocabulary: int
) -> Iterator[Row]:
    if "dpo" in names:
        limits = {name: limit for name, limit in preset.limits.items() if name in names}
        yield from policy_rows(models, workload, limits)
    if "reward_model" in names:
        yield reward_row(models, workload, preset.limits["reward_model"])
    if "memory" in names:
        free_memory()  # on a card the peak counts whatever is still there
        yield memory_row(workload, vocabulary=vocabulary)
    if "shape" in names and get_device().type == "cuda":
        yield from _large_shape(workload, preset)


def _large_shape(workload: Workload, preset: Preset) -> Iterator[Row]:
    cap_memory()
    repeats = preset.limits["dpo"][0]
    return shape_rows(
        qwen_3b_shape(), workload, name="qwen2.5_3b_shape", dtype=torch.bfloat16, repeats=repeats
    )


def describe_device() -> dict[str, str]:
    """What the rows of this machine are named by."""
    facts = hardware()
    gpus = ", ".join(gpu["name"] for gpu in facts["gpus"])
    processor = f"{facts['cpu']}, {torch.get_num_threads()} threads, {facts['memory_gib']} GiB"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    return {"hardware": f"{gpus}; {processor}" if gpus else processor, "versions": versions}


def misses(row: Row) -> list[str]:
    """The targets a row does not reach, each with by how much; a figure that was not measured misses nothing."""
    kind = next((k for k in ("dpo", "reward_model") if row["name"].startswith(k)), "")
    checks = [
        ("speed_ratio", SPEED_TARGETS[get_device().type].get(kind), True),
        ("memory_ratio", MEMORY_TARGET if row["name"] == "memory" else None, False),
        ("padding_share", PADDING_TARGET, False),
        ("fraction_of_limit", LIMIT_TARGET, True),
    ]
    missed = []
    for key, target, at_least in checks:
        value = row[key]
        if target is None or value is None or (value >= target if at_least else value <= target):
            continue
        sign = "at least" if at_least else "at most"
        missed.append(f"{key} {value:.3g}, wanted {sign} {target:g}: off by {abs(value / target - 1):.0%}")
    return missed


COLUMNS = ("row", "unit", "ours", "TRL", "speed", "spread", "memory", "padding", "of limit", "tokens/pair")
HEAD = ("| " + " | ".join((*COLUMNS, "repeats")) + " |", "|---" * (len(COLUMNS) + 1) + "|")
"""The first two lines of the table."""


def table_line(row: Row) -> str:
    """A row as one line of the table."""
    spread = "–".join(f"{value:.2f}" for value in row["spread"]) if row["spread"] else "-"
    tokens = f"{_number(row['tokens_per_pair'])} / {_number(row['trl_tokens_per_pair'])}"
    cells = [row["name"], row["unit"], _number(row["ours"]), _number(row["trl"])]
    cells += [_number(row["speed_ratio"], "×"), spread, _number(row["memory_ratio"], "×")]
    cells += [_share(row["padding_share"]), _share(row["fraction_of_limit"]), tokens, str(row["repeats"])]
    return "| " + " | ".join(cells) + " |"


def below(rows: Sequence[Row]) -> str:
    """What stands below the table: model and machine, notes and missed targets."""
    first = rows[0]
    lines = ["", f"{first['model']} on {first['hardware']}; {first['versions']}."]
    lines += [f"* {row['name']}: {row['note']}." for row in rows if row["note"]]
    lines += [f"* {row['name']}: MFU {row['mfu']:.3f}." for row in rows if row["mfu"]]
    lines += [f"* MISSED, {row['name']}: {text}." for row in rows for text in row["missed"]]
    return "\n".join(lines)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}{unit}" if abs(value) >= 100 else f"{value:.3g}{unit}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; print and write each row as soon as there is one."""
    parser = command_line(__doc__)
    parser.add_argument("--quick", action="store_true", help="16 pairs and fewer repeats")
    parser.add_argument(
        "--data", help="folder in the hub's HH-RLHF layout; default: configured, else embedded"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=ROWS, metavar="NAME", help=f"of {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--repeats", type=int, metavar="N", help="of every timed row, where not given up for time"
    )
    options = parser.parse_args(arguments)
    if {"distillation", "scoring"} & set(options.rows) and "dpo" not in options.rows:
        parser.error("distillation and scoring are measured with dpo: name it too")
    configure_logging()
    preset = QUICK if options.quick else FULL
    if options.repeats:
        limits = {name: (options.repeats, seconds) for name, (_, seconds) in preset.limits.items()}
        preset = replace(preset, limits=limits)
    file, measured = RowFile(options.json), []
    print(*HEAD, sep="\n", flush=True)
    for row in measure(options.model, options.data, preset, names=options.rows):
        file.append(row)
        measured.append(row)
        print(table_line(row), flush=True)
    if measured:
        print(below(measured))


if __name__ == "__main__":
    with user_errors_exit():
        main()
