"""The command line around a stage, and the check of the set-up, as processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT
from prmd.setup_check import missing_package

SCRIPT = f'''"""A small stage.

    python small.py --config configs/policy_config.yaml
"""
import json, os, sys
from pathlib import Path
sys.path.insert(0, {str(PROJECT_ROOT)!r})
from prmd.config.policy import PolicyConfig
from prmd.errors import DataError, StoppedError
from utils import run_stage

def small_stage(config: PolicyConfig, *, objective: str, force: bool = False, dry_run: bool = False) -> Path:
    if objective == "data":
        raise DataError("rows.jsonl:3: not JSON; mend this line")
    if objective == "stopped":
        raise StoppedError("helpful: stopped; the same command continues from step 3", 143)
    if objective == "ctrl-c":
        raise KeyboardInterrupt
    if objective == "bug":
        raise RuntimeError("ours to mend")
    print(json.dumps([config.policy.beta, config.paths.approach, objective, force, dry_run]))
    print(os.environ["HF_HUB_DISABLE_TELEMETRY"], os.environ["TOKENIZERS_PARALLELISM"])
    return Path("made")

if __name__ == "__main__":
    run_stage("small:small_stage", description=__doc__, objective=sys.argv.pop(1))
'''


def run(
    program: Path | str, *arguments: str, folder: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables}
    for name in ("PYTHONPATH", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM"):
        environment.pop(name, None)
    return subprocess.run(
        [sys.executable, str(program), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(SCRIPT, encoding="utf-8", newline="\n")
    return path


def test_stage_gets_its_configuration_arguments_and_flags(small: Path, tmp_path: Path) -> None:
    done = run(
        small,
        "helpful",
        "policy.beta=0.25",
        "--force",
        "data.approach=embedded",
        "--dry-run",
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    values, environment = done.stdout.splitlines()
    assert json.loads(values) == [0.25, "embedded", "helpful", True, True]
    assert environment == "1 false"
    assert "prmd.run: would write made" in done.stderr


@pytest.mark.parametrize(
    "given", [CONFIG_DIR / "quickstart", CONFIG_DIR / "quickstart/policy_config.yaml", "configs/quickstart"]
)
def test_config_is_a_file_or_its_folder_and_the_project_s_own_from_anywhere(
    small: Path, tmp_path: Path, given: Path | str
) -> None:
    done = run(small, "helpful", "--config", str(given), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0]) == [0.1, "embedded", "helpful", False, False]
    assert "result: made" in done.stderr


def test_a_configuration_that_is_nowhere_is_one_line_with_both_places(small: Path, tmp_path: Path) -> None:
    done = run(small, "helpful", "--config", "configs/quikstart", folder=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    for place in (tmp_path, PROJECT_ROOT):
        assert f"{place / 'configs' / 'quikstart'} is not there" in done.stderr


def test_help_shows_every_key_of_the_yaml_with_default_and_meaning(small: Path, tmp_path: Path) -> None:
    shown = run(small, "helpful", "--help", folder=tmp_path).stdout
    assert "keys of configs/policy_config.yaml with defaults" in shown
    assert (CONFIG_DIR / "policy_config.yaml").read_text(encoding="utf-8").rstrip() in shown


def test_help_imports_no_library_and_takes_less_than_a_second(tmp_path: Path) -> None:
    script = PROJECT_ROOT / "3_policy_training" / "pessimistic_dpo.py"
    program = f"""
import runpy, sys, time
sys.argv = [{str(script)!r}, "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0
heavy = {{"torch", "transformers", "trl", "datasets", "pydantic", "yaml", "numpy"}} & set(sys.modules)
print("\\n", sorted(heavy), time.process_time())
"""
    done = run("-c", program, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded, seconds = done.stdout.splitlines()[-1].rsplit(" ", 1)
    assert loaded.strip() == "[]" and float(seconds) < 1


def test_a_console_without_greek_letters_gets_help_and_errors(small: Path, tmp_path: Path) -> None:
    for arguments, status in ((["helpful", "--help"], 0), (["helpful", "policy.\u03b2=1"], 2)):
        done = run(small, *arguments, folder=tmp_path, PYTHONIOENCODING="cp1252")
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr


def test_help_shows_the_docstring_as_written_and_the_default_file(small: Path, tmp_path: Path) -> None:
    done = run(small, "helpful", "--help", folder=tmp_path)
    assert done.returncode == 0
    assert "A small stage.\n\n    python small.py --config configs/policy_config.yaml\n" in done.stdout
    assert "default configs/policy_config.yaml" in " ".join(done.stdout.split())


def test_a_mistake_of_the_user_is_one_line_and_exit_2(small: Path, tmp_path: Path) -> None:
    done = run(small, "data", folder=tmp_path)
    assert (done.returncode, done.stderr) == (2, "rows.jsonl:3: not JSON; mend this line\n")
    done = run(small, "helpful", "policy.bta=1", "nonsense", folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and "did you mean policy.beta?" in done.stderr and "nonsense" in done.stderr


def test_a_stop_is_one_line_and_its_status(small: Path, tmp_path: Path) -> None:
    done = run(small, "stopped", folder=tmp_path)
    assert (done.returncode, done.stderr) == (
        143,
        "helpful: stopped; the same command continues from step 3\n",
    )
    done = run(small, "ctrl-c", folder=tmp_path)
    assert done.returncode == 130 and done.stderr.startswith("stopped; what is finished is kept")
    assert len(done.stderr.splitlines()) == 1


def test_a_mistake_of_ours_keeps_its_traceback(small: Path, tmp_path: Path) -> None:
    done = run(small, "bug", folder=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "RuntimeError: ours to mend" in done.stderr


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (["--methods", "hard_min"], '"policy.methods=..."'),
        (["--policy.methods=[hard_min]"], '"policy.methods=..."'),
        (["--learning-rate", "1e-5"], '"training.learning_rate=..."'),
    ],
)
def test_an_option_that_is_a_setting_says_how_settings_are_given(
    given: list[str], advice: str, small: Path, tmp_path: Path
) -> None:
    done = run(small, "helpful", *given, folder=tmp_path)
    assert done.returncode == 2 and "settings have no dashes, give key.sub=value" in done.stderr
    assert advice in done.stderr


HIDDEN = """
import runpy, sys
package, *scripts = sys.argv[1:]
sys.modules[package] = None
for script in scripts:
    sys.argv = [script]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        print(script, stop.code)
"""


@pytest.mark.parametrize("package", ["pydantic", "yaml", "numpy", "torch", "transformers"])
def test_a_missing_package_is_one_line_from_every_script(package: str, tmp_path: Path) -> None:
    scripts = [*map(str, sorted(PROJECT_ROOT.glob("[0-9]_*/*.py"))), str(PROJECT_ROOT / "run_pipeline.py")]
    scripts.remove(str(PROJECT_ROOT / "2_reward_modeling" / "train_rm.py"))  # wants an objective first
    if package == "transformers":
        scripts = [script for script in scripts if "data_preparation" not in script and "run_" not in script]
    done = run("-c", HIDDEN, package, *scripts, folder=tmp_path, PATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{script} 2" for script in scripts]
    said = [line for line in done.stderr.splitlines() if not line.startswith("Stopped. Mend this")]
    name = "pyyaml" if package == "yaml" else package
    install = "pip install -r requirements.txt -c constraints-cpu.txt"
    line = f"{name} is not installed; give: {install} (python utils.py says what else is missing)"
    assert set(said) == {line} and len(said) == len(scripts)


def test_a_package_beside_the_project_s_own_is_installed_by_its_name() -> None:
    said = missing_package(ModuleNotFoundError("No module named 'wandb'", name="wandb"))
    assert said.startswith("wandb is not installed; give: pip install wandb (")
    wrapped = ModuleNotFoundError("Could not import module 'AutoModel'")
    wrapped.__cause__ = ModuleNotFoundError("No module named 'safetensors.torch'", name="safetensors.torch")
    assert missing_package(wrapped).startswith(
        "safetensors is not installed; give: pip install -r requirements.txt"
    )
    assert missing_package(ModuleNotFoundError("No module named 'prmd.x'", name="prmd.x")) == ""
    assert missing_package(ImportError("DLL load failed", name="torch")) == ""


def test_unknown_option_is_refused(small: Path, tmp_path: Path) -> None:
    done = run(small, "helpful", "--fast", folder=tmp_path)
    assert done.returncode == 2 and "unrecognized arguments: --fast" in done.stderr


def test_an_unknown_option_shows_no_key_of_an_address(small: Path, tmp_path: Path) -> None:
    done = run(small, "helpful", "--text_judge.base_url=http://h/v1?api-key=SECRET", folder=tmp_path)
    assert done.returncode == 2 and "h/v1?api-key=***" in done.stderr and "SECRET" not in done.stderr


# ------------------------------------------------------------------ python utils.py
def test_set_up_check_makes_the_directories_and_reports(tmp_path: Path) -> None:
    done = run(PROJECT_ROOT / "utils.py", f"artifact_root={tmp_path / 'all'}", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("ok    Python: ", "ok    torch: ", "ok    pyyaml: ", "hub: switched off by HF_HUB_OFFLINE"):
        assert line in done.stdout
    assert all(line.startswith(("ok ", "warn ", "fail ", " ")) for line in done.stdout.splitlines())
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"data", "models", "logs", "outputs"}


def test_set_up_check_without_any_package_says_how_to_install(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = (
        subprocess.run(  # -I -S: no site-packages at all; -I drops the script's folder, so it is given again
            [sys.executable, "-I", "-S", "-c", BARE, str(PROJECT_ROOT)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=60,
        )
    )
    assert done.returncode == 1, done.stderr
    assert "fail  packages: " in done.stdout
    assert "pip install -r requirements.txt -c constraints-cpu.txt" in done.stdout


BARE = """
import sys
sys.path.insert(0, sys.argv[1])
from utils import check_setup
sys.exit(check_setup([]))
"""


def test_every_stage_sets_the_hub_s_cache_before_its_client_is_imported(tmp_path: Path) -> None:
    stage = tmp_path / "small.py"
    text = SCRIPT.replace(
        "import json, os, sys", "import json, os, sys\nfrom huggingface_hub.constants import HF_HUB_CACHE"
    )
    text = text.replace(
        'print(os.environ["HF_HUB_DISABLE',
        'print(HF_HUB_CACHE)\n    print(os.environ["HF_HUB_DISABLE',
    )
    stage.write_text(text, encoding="utf-8")
    # the script itself is only the command line; the stage is imported by name, after the configuration is read
    script = tmp_path / "start.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(PROJECT_ROOT)!r}, {str(tmp_path)!r}]\nfrom utils import run_stage\n"
        'run_stage("small:small_stage", description="A stage.", objective="helpful")\n',
        encoding="utf-8",
    )
    root = tmp_path / "root"
    done = run(script, f"artifact_root={root.as_posix()}", folder=tmp_path, HF_HOME="", HF_HUB_CACHE="")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.splitlines()[1]) == root.resolve() / "data" / "cache" / "huggingface"
