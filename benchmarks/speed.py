"""Speed and memory of the training engine, side by side with TRL on the same pairs.

    python benchmarks/speed.py [--quick] [--rows NAME ...] [--repeats N] [--json FILE] [--model FOLDER_OR_WHEEL] [--data FOLDER]

Measures DPO against TRL's DPOTrainer (references precomputed in both, only optimiser steps timed), reward models against
its RewardTrainer, distillation (TRL has none), scoring, peak memory at vocabulary 151,936, and each against the same
model on dense batches. On a GPU also the shape of Qwen2.5-3B within 32 GB.
`--quick` takes 16 pairs instead of 64, and fewer repeats.
Prints a Markdown table, and writes one list of rows as JSON.
"""

import os

# Read when the Hugging Face libraries are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

import torch
import transformers
import trl

from benchmarks.side_by_side.memory import MEMORY_VOCABULARY, memory_row
from benchmarks.side_by_side.rows import Row, policy_rows, reward_row
from benchmarks.side_by_side.setup import (
    MAX_LENGTH,
    Workload,
    command_line,
    load_workload,
    model_config,
    publish,
    saved_models,
)
from benchmarks.side_by_side.shape import cap_memory, qwen_3b_shape, shape_rows
from prmd.artifacts.paths import CONFIG_DIR
from prmd.config.loading import load_config
from prmd.config.shared import RewardModelConfig
from prmd.runtime import configure_logging, get_device, hardware, set_seed
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
) -> list[Row]:
    """The named rows, with the hardware and versions they were measured on and the targets they miss.

    Args:
        names: of `ROWS`; distillation and scoring are measured with dpo alone, `shape` (that of Qwen2.5-3B) on a GPU alone.
    """
    set_seed(0)
    paths = load_config(CONFIG_DIR / "reward_model_config.yaml", RewardModelConfig).paths
    base = model_config(model)
    workload = load_workload(base, data, preset.pairs, max_length=MAX_LENGTH)
    models = saved_models(base, paths, workload.tokenizer.pad_token_id)
    logger.info("%s, %s on %s", model, workload.source, get_device())
    rows: list[Row] = []
    if "memory" in names:
        rows = [memory_row(workload, vocabulary=vocabulary)]
        logger.info("memory measured")
    if "reward_model" in names:
        rows.insert(0, reward_row(models, workload, preset.limits["reward_model"]))
        logger.info("reward models measured")
    if "dpo" in names:
        limits = {name: limit for name, limit in preset.limits.items() if name in names}
        rows = policy_rows(models, workload, limits) + rows
    if "shape" in names and get_device().type == "cuda":
        rows += _large_shape(workload, preset)
    device = describe_device()
    return [row | {"model": row["model"] or model, "missed": misses(row)} | device for row in rows]


def _large_shape(workload: Workload, preset: Preset) -> list[Row]:
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


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table, with the missed targets and notes below it."""
    head = (
        "row",
        "unit",
        "ours",
        "TRL",
        "speed",
        "spread",
        "memory",
        "padding",
        "of limit",
        "tokens/pair",
        "repeats",
    )
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        spread = "–".join(f"{value:.2f}" for value in row["spread"]) if row["spread"] else "-"
        tokens = f"{_number(row['tokens_per_pair'])} / {_number(row['trl_tokens_per_pair'])}"
        cells = [row["name"], row["unit"], _number(row["ours"]), _number(row["trl"])]
        cells += [_number(row["speed_ratio"], "×"), spread, _number(row["memory_ratio"], "×")]
        cells += [_share(row["padding_share"]), _share(row["fraction_of_limit"]), tokens, str(row["repeats"])]
        lines.append("| " + " | ".join(cells) + " |")
    first = rows[0]
    lines += ["", f"{first['model']} on {first['hardware']}; {first['versions']}."]
    lines += [f"* {row['name']}: {row['note']}." for row in rows if row["note"]]
    peaks = [(row["name"], row["fraction_of_peak"]) for row in rows if row["fraction_of_peak"]]
    lines += [f"* {name}: {share:.1%} of the card's peak bfloat16 FLOP/s." for name, share in peaks]
    lines += [f"* MISSED, {row['name']}: {text}." for row in rows for text in row["missed"]]
    return "\n".join(lines)


def _number(value: float | None, unit: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}{unit}" if abs(value) >= 100 else f"{value:.3g}{unit}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, write the rows."""
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
    rows = measure(options.model, options.data, preset, names=options.rows)
    publish(rows, table(rows), options.json)


if __name__ == "__main__":
    with user_errors_exit():
        main()
