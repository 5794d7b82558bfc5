"""Is this machine fit for the project: Python, packages, GPU, memory, disk, hub, and the directories of artifacts.

Installed packages are imported inside the functions, because telling that one is missing is what this module is for.
`python utils.py` prints the result; what a run records about its machine is in `artifacts.runs`.
"""

import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from prmd.artifacts.hub import is_offline
from prmd.artifacts.paths import PROJECT_ROOT, ArtifactPaths

INSTALL_PINNED = "pip install -r requirements.txt -c constraints-cpu.txt"
INSTALL_BESIDE_CUDA = "pip install -r requirements.txt -c constraints.txt"
INSTALL_CUDA_TORCH = "pip install torch==2.11.0 --index-url https://download.pytorch.org/whl/cu128"
"""The newest torch that is built for CUDA 12.8, whose drivers RTX 50xx cards have; it has wheels for every Python below."""
OLDEST_PYTHON = (3, 11)
NEWEST_PYTHON = (3, 14)
"""transformers and TRL ask for the oldest; the torch of constraints-cpu.txt, and that for CUDA, have wheels up to the newest."""
GIB = 1024**3
_ENOUGH_MEMORY_GIB = 8
_HUB_SECONDS = 3.0
_DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "dateutil": "python-dateutil"}
"""What is imported under another name than it is installed by."""
_OWN_NAMES = {"prmd", "utils", "run_pipeline", "benchmarks", "tests"}
_DRIVER_GPUS = Path("/proc/driver/nvidia/gpus")
_WINDOWS_DRIVER = "System32/nvcuda.dll"


@dataclass(frozen=True)
class Check:
    """One line of the report; `fail` is something required, and `remedy` the command that mends it."""

    status: Literal["ok", "warn", "fail"]
    name: str
    detail: str
    remedy: str = ""


def check_everything(config: Path, overrides: Sequence[str]) -> list[Check]:
    """Everything that is checked here, with the directories below the `artifact_root` of a configuration.

    Args:
        config, overrides: as for `config.loading.load_config`.

    Raises:
        ConfigError: the configuration has mistakes.
    """
    checks = [*check_torch_for_gpu(), *check_packages(), *check_machine(), check_hub()]
    try:
        from prmd.config.loading import RewardModelConfig, load_pipeline

        configs = load_pipeline(config, overrides)
        checks += check_directories(configs[RewardModelConfig].paths.root)
        checks += check_needs(configs)
    except ModuleNotFoundError as error:
        checks.append(Check("fail", "directories", f"not made: {error.name} is not installed"))
    return checks


def report(checks: Sequence[Check]) -> list[str]:
    """The lines to print: one for each check, then each remedy once."""
    remedies = dict.fromkeys(check.remedy for check in checks if check.remedy)
    lines = [f"{check.status:<5} {check.name}: {check.detail}" for check in checks]
    return lines + [f"      {remedy}" for remedy in remedies]


def check_packages(requirements: Path = PROJECT_ROOT / "requirements.txt") -> Iterator[Check]:
    """Python's version, and every line of requirements.txt against what is installed."""
    found = ".".join(map(str, sys.version_info[:3]))
    wanted = " to ".join(".".join(map(str, version)) for version in (OLDEST_PYTHON, NEWEST_PYTHON))
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        yield Check("ok", "Python", f"{found} (wanted {wanted})")
    else:
        yield Check(
            "fail", "Python", f"got {found}, wanted {wanted}: transformers and torch have wheels for these"
        )
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        yield Check("fail", "packages", "none of requirements.txt is installed", install_command())
        return
    lines = requirements.read_text(encoding="utf-8").splitlines()
    for text in (line.partition("#")[0].strip() for line in lines):
        if text:
            requirement = Requirement(text)
            yield _check_package(requirement.name, requirement.specifier, text)


def _check_package(name: str, specifier: "object", text: str) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        remedy = INSTALL_CUDA_TORCH if name == "torch" and nvidia_gpus() else install_command()
        return Check("fail", name, f"not installed, wanted {text}", remedy)
    if not specifier.contains(version, prereleases=True):  # type: ignore[attr-defined]
        return Check("fail", name, f"got {version}, wanted {text}", f'pip install "{text}"')
    return Check("ok", name, version)


def check_torch_for_gpu() -> Iterator[Check]:
    """On a machine with an NVIDIA GPU whose torch is missing or cannot use it, the command to give before any other."""
    gpus = nvidia_gpus()
    if not gpus:
        return
    try:
        import torch

        state = f"torch {torch.__version__} cannot use it" if not torch.cuda.is_available() else ""
    except ModuleNotFoundError:
        state = "torch is not installed"
    if state:
        detail = f"{', '.join(gpus)} is here, but {state}; give this first: {INSTALL_CUDA_TORCH}"
        yield Check("fail", "GPU", detail, INSTALL_CUDA_TORCH)


def missing_package(error: BaseException) -> str:
    """The line for a package that is not installed, with the command that installs it; empty for any other error.

    What is missing may lie below what was asked for: transformers, for one, wraps it.
    """
    names = []
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ModuleNotFoundError) and seen.name:
            names.append(seen.name.partition(".")[0])
        seen = seen.__cause__ or seen.__context__
    if not names or names[-1] in _OWN_NAMES:
        return ""
    package = _DISTRIBUTIONS.get(names[-1], names[-1])
    if package == "torch" and nvidia_gpus():
        command = INSTALL_CUDA_TORCH
    else:
        command = (
            install_command() if package.replace("_", "-").lower() in _pinned() else f"pip install {package}"
        )
    return f"{package} is not installed; give: {command} (python utils.py says what else is missing)"


def _pinned() -> set[str]:
    """Packages that the install command brings, as pip compares names."""
    files = (PROJECT_ROOT / "requirements.txt", PROJECT_ROOT / "constraints.txt")
    lines = (line for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return {
        re.split("[>=<]", line)[0].strip().replace("_", "-").lower() for line in lines if line[:1].isalpha()
    }


def install_command() -> str:
    """The pip line for everything: with the torch of constraints-cpu.txt only where there is no GPU."""
    return INSTALL_BESIDE_CUDA if nvidia_gpus() else INSTALL_PINNED


def nvidia_gpus() -> list[str]:
    """Names of the NVIDIA GPUs of this machine, whatever torch was built for: as nvidia-smi says, else by the driver's files.

    None where all are hidden from programs, which nvidia-smi lists as well.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    return _gpus_by_program() or _gpus_by_driver()


def _gpus_by_driver() -> list[str]:
    """Where nvidia-smi is not on the path: what the Linux driver lists, or that Windows has one."""
    if sys.platform == "win32":
        found = (Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / _WINDOWS_DRIVER).is_file()
        return ["an NVIDIA GPU"] if found and shutil.which("nvidia-smi") is None else []
    try:
        texts = [path.read_text(encoding="utf-8") for path in sorted(_DRIVER_GPUS.glob("*/information"))]
    except OSError:
        return []
    lines = (line.partition(":") for text in texts for line in text.splitlines())
    return [value.strip() for key, _, value in lines if key.strip() == "Model"]


def _gpus_by_program() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):  # a driver without a GPU answers with an error
        return []
    return [line.strip() for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]


def check_machine() -> Iterator[Check]:
    """torch's CUDA build, whether it has code for each GPU, bfloat16, and memory."""
    try:
        import psutil
        import torch
    except ModuleNotFoundError as error:
        yield Check("fail", "machine", f"not checked: {error.name} is not installed", install_command())
        return
    memory = psutil.virtual_memory().total / GIB
    status = "ok" if memory >= _ENOUGH_MEMORY_GIB else "warn"
    yield Check(status, "memory", f"{memory:.1f} GiB (the quickstart wants {_ENOUGH_MEMORY_GIB})")
    if torch.cuda.is_available():
        yield Check("ok", "CUDA", f"torch {torch.__version__} built for CUDA {torch.version.cuda}")
        built_for = torch.cuda.get_arch_list()
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            yield check_architecture(gpu.name, (gpu.major, gpu.minor), gpu.total_memory, built_for)
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        yield Check(
            "ok" if native else "warn", "BF16", "native" if native else "emulated: use model.dtype: float32"
        )
    else:
        yield from _check_without_cuda(torch.__version__)


def _check_without_cuda(version: str) -> Iterator[Check]:
    if gpus := nvidia_gpus():
        yield Check("fail", "CUDA", f"torch {version} cannot use {', '.join(gpus)}", INSTALL_CUDA_TORCH)
    else:
        yield Check("warn", "CUDA", f"torch {version}, no NVIDIA GPU: everything runs on the CPU")
    yield Check(
        "warn", "BF16", "computed slowly on a CPU: use model.dtype: float32, as configs/quickstart does"
    )


def check_architecture(name: str, capability: tuple[int, int], memory: int, built_for: list[str]) -> Check:
    """Whether torch has code for a GPU.

    Args:
        name: the GPU's name.
        capability: its compute capability, (12, 0) for RTX 50xx.
        memory: bytes.
        built_for: `torch.cuda.get_arch_list()`, such as ["sm_90", "sm_120"]; code for the same major and a smaller minor
            number runs too.
    """
    wanted = f"sm_{capability[0]}{capability[1]}"
    numbers = [int("".join(filter(str.isdigit, arch))) for arch in built_for if arch.startswith("sm_")]
    runs = any(number // 10 == capability[0] and number % 10 <= capability[1] for number in numbers)
    detail = f"{name}, {memory / GIB:.0f} GiB, {wanted}"
    if runs:
        return Check("ok", "GPU", detail)
    return Check(
        "fail", "GPU", f"{detail}: torch was built for {' '.join(built_for)} only", INSTALL_CUDA_TORCH
    )


def check_hub() -> Check:
    """Whether the Hugging Face hub answers; without it, models and data must be local."""
    local = "set model.name and data.*.path to local folders, or use configs/quickstart"
    if is_offline():
        return Check("warn", "hub", f"switched off by HF_HUB_OFFLINE; {local}")
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(
            urllib.request.Request(endpoint, method="HEAD"), timeout=_HUB_SECONDS
        ) as reply:
            return Check("ok", "hub", f"{endpoint} answers ({reply.status})")
    except (urllib.error.URLError, TimeoutError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Check("warn", "hub", f"{endpoint} cannot be reached ({reason}); {local}")


def check_directories(root: Path) -> Iterator[Check]:
    """Make the directories of artifacts below `root`, and look at the free disk there."""
    folders = artifact_directories(root)
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        yield Check("fail", "directories", f"{error}; set artifact_root to a folder you can write to")
        return
    yield Check("ok", "directories", f"{len(folders)} below {root}: data models logs outputs")
    yield Check("ok", "disk", f"{shutil.disk_usage(root).free / GIB:.1f} GiB free")


# ------------------------------------------------------------------ what a configuration needs
def check_needs(configs: "dict[type, Any]") -> list[Check]:
    """Memory, where there is no GPU, and disk that a whole configuration needs, computed without its weights.

    Args:
        configs: as `config.loading.load_pipeline` gives them.

    Returns:
        A line each, with NOT ENOUGH where the machine has less; why not where the model's configuration is not at hand.
    """
    import torch

    from prmd.config.shared import RewardModelConfig
    from prmd.errors import UserError
    from prmd.training.run import choose_precision, planned_sizes

    paths, model = configs[RewardModelConfig].paths, configs[RewardModelConfig].model
    if model.source == "pypi_wheel":  # a small model, which must be fetched to be known
        return []
    sizes = []
    try:
        for what, base, tuning, training, task, count in _trainings(configs):
            if count:
                precision = choose_precision(base, paths, tuning, training, task)
                size = planned_sizes(base, paths, tuning, training, precision, task=task)
                sizes.append((what, size, count))
    except UserError as error:
        return [Check("warn", "needs", f"not known: {error}")]
    checks = [_disk_need(sizes, paths.root)]
    return checks if torch.cuda.is_available() else [_memory_need(sizes), *checks]


def _trainings(configs: "dict[type, Any]") -> "list[tuple[str, Any, Any, Any, Any, int]]":
    """(what, base, tuning, training, task, how many) of every training of a configuration."""
    from prmd.config.loading import EvaluationConfig, PolicyConfig, RewardModelConfig

    rewards, policies, evaluation = (configs[k] for k in (RewardModelConfig, PolicyConfig, EvaluationConfig))
    judges, objectives = evaluation.judges, rewards.paths.objectives
    members = rewards.ensemble.members if rewards.ensemble.kind == "adapters" else 1
    trained = (len(objectives) - len(rewards.data.brought)) * members
    judged = len([objective for objective in objectives if objective not in judges.paths])
    methods = 2 + len([method for method in policies.policy.methods if method != "soup"])
    base = rewards.model
    return [
        ("reward model", base, rewards.tuning, rewards.training, "reward_model", trained),
        ("policy", base, policies.tuning, policies.training, "policy", methods),
        ("judge", judges.model or base, judges.tuning, judges.training, "reward_model", judged),
    ]


def _memory_need(sizes: "list[tuple[str, Any, int]]") -> Check:
    import psutil

    needed, what = max((size.memory, what) for what, size, _ in sizes)
    has = psutil.virtual_memory().total
    said = (
        f"training a {what} on this CPU needs {needed / GIB:.1f} GiB and more (weights, gradients, optimizer), the machine "
        f"has {has / GIB:.1f} GiB"
    )
    if needed <= has:
        return Check("ok", "memory", said)
    return Check(
        "warn", "memory", f"{said}: NOT ENOUGH; use a GPU, a smaller model.name or configs/quickstart"
    )


def _disk_need(sizes: "list[tuple[str, Any, int]]", root: Path) -> Check:
    from prmd.runtime import free_disk_bytes

    kept = sum(size.kept * count for _, size, count in sizes)
    most = kept + max(size.most - size.kept for _, size, _ in sizes)
    free = free_disk_bytes(root)
    said = (
        f"the trainings need {most / GIB:.0f} GiB at most and keep {kept / GIB:.0f} GiB (nothing finished yet; model, data "
        f"and samples beside them), {free / GIB:.0f} GiB are free"
    )
    if most <= free:
        return Check("ok", "disk", said)
    return Check("warn", "disk", f"{said}: NOT ENOUGH; set artifact_root, or fewer training.checkpoints")


def artifact_directories(root: Path) -> list[Path]:
    """The directories that hold artifacts of every approach."""
    paths = ArtifactPaths(root, "any")
    return [
        paths.raw("any").parent,
        paths.processed.parent,
        paths.cache("any", "key").parent,
        paths.base_model("any").parent,
        paths.reward_model("any").parents[1],
        paths.policies.parent,
        paths.judge("any").parents[1],
        paths.runs("any").parent,
        paths.step_results,
        paths.visualizations.parent,
        paths.reward_analysis.parent,
        paths.metrics.parent,
        paths.benchmark("any").parents[1],
        paths.report.parent,
    ]
