"""Length-biased preferences on real text: does distillation lose less than DPO to a judge that never saw the bias?

    python benchmarks/real_text.py [--closed-form] [--quick] [--work FOLDER] [--output FILE] [key.sub=value ...]

SmolLM2-135M-Instruct with LoRA. Helpful and harmless pairs are helpful-base and harmless-base of HH-RLHF, honest ones
TruthfulQA: the reward models are three, so the third objective stays. In every objective the longer response is the
chosen one in 80 % of the training pairs, by choosing pairs (arXiv:2405.19316); validation, test and judge pairs are
unbiased. Three seeds, each with its own pairs, reward models, policies, test prompts and samples: our `dpo`, mean,
hard_min, hierarchical, maxmin, and TRL's DPO (`baseline_dpo`) on the first. Compared at one KL, interpolated between the
checkpoints of each training (TRL keeps none: between pi_ref and its end).

Reads    HH-RLHF and TruthfulQA; local ones by data.hh_rlhf.path=... data.truthfulqa.path=...
Writes   FILE (default: benchmarks/results/real_text.json) and a table beside it as Markdown

`--closed-form` trains nothing: linear reward models on frozen features of 1,500 pairs an objective, 20 seeds, exact optima on
samples of pi_ref, two judges (`real_text/closed_form.py`); it writes benchmarks/results/real_text_closed_form.json.

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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

from benchmarks.real_text import closed_form
from benchmarks.real_text.closed_form_summary import association_rows, closed_form_page, closed_form_rows
from benchmarks.real_text.plan import FULL, LONGER_SHARE, MATCHED_KL, QUICK, Study
from benchmarks.real_text.run import run_seeds
from benchmarks.real_text.summary import study_results
from benchmarks.real_text.tables import markdown
from benchmarks.sources import source_hashes
from prmd.artifacts import io
from prmd.artifacts.paths import PROJECT_ROOT
from prmd.artifacts.runs import git_state, versions
from prmd.errors import ConfigError
from prmd.runtime import configure_logging, hardware, progress
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
    parser.add_argument("--closed-form", action="store_true", help="linear reward models, no training")
    options = parser.parse_intermixed_args(arguments)
    configure_logging()
    if strange := [text for text in options.overrides if not text.startswith(ALLOWED)]:
        raise ConfigError(f"command line: got {strange[0]!r}, wanted data.key=value or model.key=value")
    run = run_closed_form if options.closed_form else run_trained
    results, text = run(options.quick, options.work, tuple(options.overrides))
    name = "real_text_closed_form" if options.closed_form else "real_text"
    default = options.work / f"{name}_quick.json" if options.quick else RESULTS / f"{name}.json"
    path = io.write_json(options.output or default, results)
    table = io.write_text(path.with_suffix(".md"), text)
    print(text)
    logger.info("written: %s and %s", path, table)


def run_trained(quick: bool, work: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The trained part: its results and their tables."""
    study, started = Study(QUICK if quick else FULL, work, tuple(overrides)), time.monotonic()
    seeds, judges = run_seeds(study)
    setup = {"about": about(study), "sizes": asdict(study.sizes), "longer_share": LONGER_SHARE}
    results = study_results(seeds, judges, MATCHED_KL, setup | _how(started))
    return results, markdown(results)


def run_closed_form(quick: bool, work: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The closed-form part: its results and their tables."""
    sizes, started = closed_form.QUICK if quick else closed_form.FULL, time.monotonic()
    config = closed_form.closed_form_config(sizes, work, overrides)
    material = closed_form.make_material(config, sizes)
    folder = config.paths.root / "closed_form" / io.fingerprint(asdict(sizes))[:8]
    seeds = []
    for seed in progress(range(sizes.seeds), sizes.seeds, "closed form"):
        seeds.append(
            {k: v.numpy() for k, v in io.read_tensors(closed_form.run_seed(material, seed, folder)).items()}
        )
    rows = closed_form_rows(seeds)
    natural = closed_form.natural_rows(material)
    sources = association_rows(closed_form.longer_by_source(config))
    results = {"policies": rows, "natural": natural, "sources": sources}
    setup = {"sizes": asdict(sizes)} | _how(started)
    return results | {"setup": setup}, closed_form_page(rows, natural, sources, sizes)


def _how(started: float) -> dict[str, Any]:
    """On what and for how long it ran."""
    minutes = round((time.monotonic() - started) / 60, 1)
    facts = {"hardware": hardware(), "versions": versions(), "minutes_of_the_last_call": minutes}
    facts["sources"] = source_hashes(Path(__file__))
    return facts | git_state()


if __name__ == "__main__":
    with user_errors_exit():
        main()
