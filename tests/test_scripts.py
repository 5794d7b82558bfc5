"""The numbered scripts as a user runs them: --help and --dry-run, from another folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT

DOWNLOAD = "1_data_preparation/download_dataset.py"
SPLIT = "1_data_preparation/split_objectives.py"
HELPFUL = "2_reward_modeling/train_helpful_rm.py"
NEEDS: dict[str, tuple[str, ...]] = {
    DOWNLOAD: (),
    SPLIT: (DOWNLOAD,),
    HELPFUL: (SPLIT,),
    "2_reward_modeling/train_harmless_rm.py": (SPLIT,),
    "2_reward_modeling/train_honest_rm.py": (SPLIT,),
    "3_policy_training/baseline_dpo.py": (SPLIT,),
    "3_policy_training/pessimistic_dpo.py": (SPLIT, HELPFUL),
    "3_policy_training/hierarchical_dpo.py": (SPLIT, HELPFUL),
    "4_evaluation/compute_metrics.py": (SPLIT,),
    "4_evaluation/benchmark_eval.py": (SPLIT,),
}
"""Script -> the scripts that make what it reads."""

# One process for all, because each would import torch and transformers again for several seconds.
HELP_OF_ALL = """
import runpy, sys
from pathlib import Path
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    print("====", script)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        print("exit", stop.code)
"""


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    environment.pop("PYTHONPATH", None)  # the scripts must find the project themselves
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.fixture(scope="module")
def help_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    scripts = [str(PROJECT_ROOT / script) for script in NEEDS]
    done = run("-c", HELP_OF_ALL, *scripts, folder=tmp_path_factory.mktemp("elsewhere"))
    assert done.returncode == 0, done.stderr
    parts = re.split(r"^==== (.*)$", done.stdout, flags=re.MULTILINE)[1:]
    return {
        Path(name).relative_to(PROJECT_ROOT).as_posix(): text
        for name, text in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("script", NEEDS)
def test_help_shows_the_docstring_and_every_option(script: str, help_texts: dict[str, str]) -> None:
    text = help_texts[script]
    assert text.rstrip().endswith("exit 0")
    assert f"python {script} --config configs/" in text
    for word in ("Reads   ", "Writes  ", "--config PATH", "--force", "--dry-run", "key.sub=value"):
        assert word in text


@pytest.mark.slow
@pytest.mark.parametrize("script", NEEDS)
def test_dry_run_writes_nothing_and_names_what_is_missing(script: str, tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "artifacts", tmp_path / "elsewhere"
    elsewhere.mkdir()
    quickstart = str(CONFIG_DIR / "quickstart")
    done = run(
        str(PROJECT_ROOT / script),
        "--config",
        quickstart,
        f"artifact_root={root}",
        "--dry-run",
        folder=elsewhere,
    )
    assert done.returncode == 0, done.stderr
    assert "would write" in done.stderr
    for needed in NEEDS[script]:
        assert f"python {needed}" in done.stderr, done.stderr
    assert not root.exists() and not list(elsewhere.iterdir())


@pytest.mark.slow
def test_the_command_for_what_is_missing_is_of_the_same_configuration(tmp_path: Path) -> None:
    given = ("--config", "configs/own_pairs", f"artifact_root={tmp_path / 'my root'}")
    done = run(
        str(PROJECT_ROOT / "2_reward_modeling/train_rm.py"), *given, "objective=helpful", folder=PROJECT_ROOT
    )
    assert done.returncode == 2 and "approach 'own_pairs' is missing" in done.stderr
    program, script, *advised = shlex.split(done.stderr.rpartition("make it with: ")[2])
    assert (program, script, tuple(advised)) == ("python", SPLIT, given)
    copied = run(script, *advised, "--dry-run", folder=PROJECT_ROOT)
    assert copied.returncode == 0 and "own_pairs" in copied.stderr and "hh" not in copied.stderr
