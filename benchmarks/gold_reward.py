"""The gold-reward study: does pessimistic distillation do what it promises, where the true rewards are known?

    python benchmarks/gold_reward.py [--ablations | --closed-form] [--quick] [--workers 2] [--work FOLDER] [--output FILE]

World (`gold/world.py`): prompts and responses are strings of letters; the true rewards r*_k of helpful, harmless and honest
are counted in them, saturate, and conflict. A two-layer transformer fitted to a diverse prior is pi_ref. Preferences
(`gold/labels.py`) between samples of pi_ref are drawn with

    P(a preferred) = (1 - e) sigma(kappa (r*_k(a) - r*_k(b)) / s_k) + e / 2,   kappa = 1.5, e = .1,

and chosen by length with strength rho as in arXiv:2405.19316 (fully for helpful, by half for honest, not for harmless).
Reward models, ensembles, calibration, robust rewards, distillation, DPO, sampling and KL are the project's own code.

`--closed-form` trains no policy and no reward model: linear reward models on pi_ref's representations and the exact optimum of
their robust reward, 20 seeds, eleven ways in which labels are biased (`closed_form/scenarios.py`), families of members with and
without the bias told to them (`closed_form/families.py`). It adds the list `closed_form` to FILE and its tables to the page.

Trained, at equal KL from pi_ref, paired over seeds: DPO, length-regularised DPO (`rdpo`), and distillation from families of
reward models (`gold/ensembles.py`: on the labels as they are, told of length in full, told of it from not at all to in full) at
three biases; the declared tests are Holm-corrected; and the case that can show harm, length truly good and selected for.
`--ablations` adds over-optimisation, ensemble size, strengths, CVaR's alpha, beta, kl_target, calibration, rdpo_alpha and which
heads make a good ensemble (`gold/heads.py`). Writes FILE (default: benchmarks/results/gold_reward.json) with its tables as
Markdown and figures beside it; parts that are not run stay in FILE. Finished trainings are kept in FOLDER, so an interrupted
study goes on where it was. `--quick` runs two seeds at two biases and writes to FOLDER. CPU only, one thread a worker.
"""

import os

# Read when the libraries below are imported; worker processes import this file too.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # as in the tests: an empty value would unset it on Windows
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

from benchmarks.closed_form.letters_summary import closed_form_page
from benchmarks.gold.figures import plot_closed_form, plot_gold_reward
from benchmarks.gold.page import page
from benchmarks.gold.plan import FULL, QUICK
from benchmarks.gold.run import run_closed_forms, run_study
from benchmarks.sources import source_hashes
from prmd.artifacts import io
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.artifacts.runs import git_state
from prmd.runtime import configure_logging, hardware
from utils import user_errors_exit

logger = logging.getLogger("prmd.gold_reward")
CLOSED_FORM_SEEDS = tuple(range(20))
SETUPS = ("setup", "ablations_setup", "closed_form_setup")
WORK, RESULTS = PROJECT_ROOT / "outputs" / "gold_reward", PROJECT_ROOT / "benchmarks" / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, write the results, draw the figures, print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two seeds, two biases")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="worker processes (default 2)")
    parser.add_argument("--work", type=Path, default=WORK, metavar="FOLDER", help="finished trainings")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the results go, as JSON")
    parser.add_argument("--closed-form", action="store_true", help="linear reward models, no training")
    parser.add_argument("--ablations", action="store_true", help="train the ablations too")
    options = parser.parse_args(arguments)
    configure_logging()
    started = time.monotonic()
    default = options.work / "quick.json" if options.quick else RESULTS / "gold_reward.json"
    path, preset = options.output or default, QUICK if options.quick else FULL
    if options.closed_form:
        seeds = CLOSED_FORM_SEEDS[: 2 if options.quick else None]
        results = run_closed_forms(preset.sizes, seeds, options.work, workers=options.workers)
    else:
        preset = preset.with_ablations() if options.ablations else preset
        results = run_study(preset, options.work, workers=options.workers)
    how = {"hardware": hardware(), "minutes": round((time.monotonic() - started) / 60, 1), **git_state()}
    how["sources"] = source_hashes(Path(__file__))
    results |= {part: results[part] | how for part in SETUPS if part in results}
    results = kept_parts(path) | results
    io.write_json(path, results)
    text = whole_page(results, path.stem)
    print(text)
    drawn = plot_gold_reward(path) if "summary" in results else []
    drawn += plot_closed_form(path) if "closed_form" in results else []
    for figure in (path, io.write_text(path.with_suffix(".md"), text), *drawn):
        logger.info("written: %s", figure)


def kept_parts(path: Path) -> dict[str, Any]:
    """What finished results hold; of those from before there were families, the closed form alone."""
    found = io.read_json(path) if path.is_file() else {}
    if all("family" in row for row in found.get("summary", [])):
        return found
    return {part: value for part, value in found.items() if part.startswith("closed_form")}


def whole_page(results: dict[str, Any], name: str) -> str:
    """The tables of the parts that were run."""
    parts = [page(results, name)] if "summary" in results else ["# Gold-reward study\n"]
    if "closed_form" in results:
        parts.append(closed_form_page(results["closed_form"], results["closed_form_setup"], name))
    return "\n".join(parts)


if __name__ == "__main__":
    with user_errors_exit():
        main()
