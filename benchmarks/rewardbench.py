"""A reward model on RewardBench, scored here and written in its result format.

    python benchmarks/rewardbench.py --model models/reward_models/<approach>/helpful_rm --data reward-bench/ --json out.json

`--data` is a file or folder with rows of `prompt`, `chosen`, `rejected`, `subset`, `id` (a download of allenai/reward-bench, or
any pairs in that form). Writes out.json (accuracy per subset, as in allenai/reward-bench-results) and out.details.json
(sections, intervals, ties), and prints the sections.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR, resolve_user_path
from prmd.config.loading import load_config
from prmd.config.shared import RewardModelConfig
from prmd.rewardbench import evaluate_rewardbench, read_rewardbench
from prmd.runtime import configure_logging
from utils import user_errors_exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Score, write both files, print the sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a reward model")
    parser.add_argument("--data", type=Path, required=True, help="file or folder in RewardBench's layout")
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="where the result is written"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=CONFIG_DIR,
        help="configuration: number format and cache; default configs",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as model.dtype=float32")
    options = parser.parse_intermixed_args(arguments)
    configure_logging()
    config = load_config(options.config, RewardModelConfig, options.overrides)
    model = resolve_user_path(options.model, "--model", "the folder of a trained reward model", "folder")
    data = resolve_user_path(options.data, "--data", "RewardBench's rows or their folder")
    row, details = evaluate_rewardbench(model, read_rewardbench(data), name=str(options.model), config=config)
    io.write_json(options.json, row)
    io.write_json(options.json.with_suffix(".details.json"), details)
    for name, score in [*details["sections"].items(), ("overall", details["overall"])]:
        print(f"{name:<10} {'-' if score is None else format(score, '.4f')}")
    for subset, found in details["subsets"].items():
        share = found["accuracy"]
        print(
            f"  {subset:<24} {share['value']:.4f} [{share['low']:.4f}, {share['high']:.4f}] of {share['n']}"
        )


if __name__ == "__main__":
    with user_errors_exit():
        main()
