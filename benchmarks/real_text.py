"""Length-biased preferences on real text: does distillation lose less than DPO to a judge that never saw the bias?

    python benchmarks/real_text.py [--quick] [--work FOLDER] [--output FILE] [key.sub=value ...]

SmolLM2-135M-Instruct with LoRA. Helpful and harmless pairs are helpful-base and harmless-base of HH-RLHF, honest ones
TruthfulQA: the reward models are three, so the third objective stays. In every objective the longer response is the
chosen one in 80 % of the training pairs, by choosing pairs (arXiv:2405.19316); validation, test and judge pairs are
unbiased. Three seeds, each with its own pairs, reward models, policies, test prompts and samples: our `dpo`, mean,
hard_min, hierarchical, maxmin, and TRL's DPO (`baseline_dpo`) on the first. Compared at one KL, interpolated between the
checkpoints of each training (TRL keeps none: between pi_ref and its end).

Reads    HH-RLHF and TruthfulQA; local ones by data.hh_rlhf.path=... data.truthfulqa.path=...
Writes   FILE (default: benchmarks/results/real_text.json) and a table beside it as Markdown

Finished parts are kept in FOLDER, so an interrupted study goes on where it was. `--quick` runs one tiny seed to see it
go through; its numbers mean nothing, and it writes to FOLDER. Everything runs in one process.
"""

import os

# Read when the libraries below are imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

from benchmarks.real_text.plan import FULL, LONGER_SHARE, MATCHED_KL, QUICK, Study
from benchmarks.real_text.run import run_seeds
from benchmarks.real_text.summary import study_results
from benchmarks.real_text.tables import markdown
from prmd.artifacts import io
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.artifacts.runs import git_state, versions
from prmd.errors import ConfigError
from prmd.runtime import configure_logging, hardware
from utils import user_errors_exit

logger = logging.getLogger("prmd.real_text")
WORK, RESULTS = PROJECT_ROOT / "outputs" / "real_text", PROJECT_ROOT / "benchmarks" / "results"
ALLOWED = ("data.", "model.")


def about(study: Study) -> str:
    """What was run, in a paragraph."""
    sizes = study.sizes
    return (
        f"SmolLM2-135M with LoRA on HH-RLHF helpful-base and harmless-base and on TruthfulQA; {sizes.pairs} training pairs per "
        f"objective, the longer response chosen in {LONGER_SHARE:.0%} of them, {sizes.policy_pairs} of all for the policies; "
        f"{len(sizes.seeds)} seed(s) of {sizes.prompts} test prompts, {sizes.samples} responses each of at most {sizes.tokens} "
        f"tokens. Judges are trained once on unbiased pairs that nothing else saw; the chance in them is in no interval, and "
        "judges near one half decide nothing. Intervals over prompts hold the trainings fixed; those over seeds hold "
        "everything but the judges, and with few seeds they are wide."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, write the results and their table, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one tiny seed, to see it go through")
    parser.add_argument("--work", type=Path, default=WORK, metavar="FOLDER", help="finished parts")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the results go, as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="data.* and model.* settings")
    options = parser.parse_intermixed_args(arguments)
    configure_logging()
    if strange := [text for text in options.overrides if not text.startswith(ALLOWED)]:
        raise ConfigError(f"command line: got {strange[0]!r}, wanted data.key=value or model.key=value")
    study = Study(QUICK if options.quick else FULL, options.work, tuple(options.overrides))
    started = time.monotonic()
    seeds, judges = run_seeds(study)
    setup = {"about": about(study), "sizes": asdict(study.sizes), "longer_share": LONGER_SHARE}
    setup |= {"hardware": hardware(), "versions": versions(), **git_state()}
    setup["minutes_of_the_last_call"] = round((time.monotonic() - started) / 60, 1)
    results = study_results(seeds, judges, MATCHED_KL, setup)
    default = options.work / "quick.json" if options.quick else RESULTS / "real_text.json"
    path = io.write_json(options.output or default, results)
    text = markdown(results)
    table = io.write_text(path.with_suffix(".md"), text)
    print(text)
    logger.info("written: %s and %s", path, table)


if __name__ == "__main__":
    with user_errors_exit():
        main()
