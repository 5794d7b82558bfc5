"""Is a machine fit: packages against ranges, code for a GPU, hub, directories."""

import re
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import Qwen2Config

from prmd import setup_check
from prmd.artifacts.paths import CONFIG_DIR, PROJECT_ROOT
from prmd.config.loading import load_pipeline
from prmd.runtime import TRITON_WINDOWS
from prmd.setup_check import INSTALL_BESIDE_CUDA, INSTALL_CUDA_TORCH, INSTALL_PINNED
from prmd.training.precision import TORCHAO


def packages(tmp_path: Path, text: str) -> dict[str, setup_check.Check]:
    path = tmp_path / "requirements.txt"
    path.write_text(text, encoding="utf-8")
    return {check.name: check for check in setup_check.check_packages(path)}


def test_installed_versions_are_held_against_the_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = {"inside": "1.5", "local": "2.13.0+cpu", "old": "0.9", "new": "3.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise setup_check.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(setup_check.metadata, "version", version)
    monkeypatch.setattr(setup_check, "nvidia_gpus", list)
    found = packages(
        tmp_path, "# comment\ninside>=1,<2  # why\n\nlocal>=2.7,<3\nold>=1\nnew>=1,<3\nabsent>=4\n"
    )
    assert {name: check.status for name, check in found.items()} == {
        "Python": "ok",
        "inside": "ok",
        "local": "ok",
        "old": "fail",
        "new": "fail",
        "absent": "fail",
    }
    assert found["old"].remedy == 'pip install "old>=1"' and "got 0.9, wanted old>=1" in found["old"].detail
    assert found["absent"].remedy == INSTALL_PINNED


def test_beside_a_gpu_the_cpu_constraints_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_check, "nvidia_gpus", lambda: ["NVIDIA GeForce RTX 5090"])
    assert setup_check.install_command() == INSTALL_BESIDE_CUDA
    assert pins(INSTALL_BESIDE_CUDA.split()[-1]) & {"torch", "setuptools"} == set()
    assert pins(INSTALL_PINNED.split()[-1]) == {"torch", "setuptools"}  # and all of the file it names
    assert (
        "-c constraints.txt"
        in (PROJECT_ROOT / "constraints-cpu.txt").read_text(encoding="utf-8").splitlines()
    )


def pins(name: str) -> set[str]:
    lines = (PROJECT_ROOT / name).read_text(encoding="utf-8").splitlines()
    return {line.partition("==")[0].lower() for line in lines if "==" in line and not line.startswith("#")}


def test_everything_that_is_required_is_pinned() -> None:
    lines = (PROJECT_ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = {re.split("[>=<]", line)[0].lower() for line in lines if line and not line.startswith("#")}
    assert wanted - pins("constraints.txt") == {"torch"}


def test_the_page_pairs_what_the_code_asks_for_beside_the_named_torch() -> None:
    page = (PROJECT_ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\w-]+) \| (\d[\w.]+) \| .+\|$", page, flags=re.MULTILINE)
    torch = INSTALL_CUDA_TORCH.split()[2]
    assert [f"{name}=={version}" for name, version in rows] == [torch, TORCHAO, TRITON_WINDOWS]
    assert TORCHAO in (PROJECT_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    readme = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    for command in (INSTALL_CUDA_TORCH, INSTALL_BESIDE_CUDA, "pip install torchao -c constraints.txt"):
        assert f"       {command}\n" in readme


@pytest.mark.parametrize("torch_is", ["missing", "for the CPU"])
def test_beside_a_gpu_the_line_for_torch_comes_first(
    torch_is: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_check, "nvidia_gpus", lambda: ["NVIDIA GeForce RTX 5090"])
    if torch_is == "missing":
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checks = setup_check.check_everything(PROJECT_ROOT / "configs", [f"artifact_root={tmp_path}"])
    lines = setup_check.report(checks)
    assert lines[0].startswith("fail  GPU: NVIDIA GeForce RTX 5090 is here, but torch ")
    assert lines[0].endswith(INSTALL_CUDA_TORCH)
    assert next(line for line in lines if line.startswith("   ")).strip() == INSTALL_CUDA_TORCH
    monkeypatch.setattr(setup_check, "nvidia_gpus", list)
    assert list(setup_check.check_torch_for_gpu()) == []


def test_the_driver_s_files_tell_of_a_gpu_where_no_program_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # by which the tests hide a card
    folder = tmp_path / "gpus"
    monkeypatch.setattr(setup_check, "_DRIVER_GPUS", folder)
    assert setup_check.nvidia_gpus() == []
    if sys.platform != "win32":
        (folder / "0000:01:00.0").mkdir(parents=True)
        information = "Model: \t\t NVIDIA GeForce RTX 5090\nIRQ:   \t\t 157\nDevice Minor: \t 0\n"
        (folder / "0000:01:00.0" / "information").write_text(information, encoding="utf-8")
        assert setup_check.nvidia_gpus() == ["NVIDIA GeForce RTX 5090"]
    monkeypatch.setattr(setup_check.sys, "platform", "win32")
    monkeypatch.setenv("SYSTEMROOT", str(tmp_path))
    assert setup_check.nvidia_gpus() == []
    (tmp_path / "System32").mkdir()
    (tmp_path / "System32" / "nvcuda.dll").write_bytes(b"")
    assert setup_check.nvidia_gpus() == ["an NVIDIA GPU"]


def test_missing_torch_beside_a_gpu_names_the_cuda_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise setup_check.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(setup_check.metadata, "version", version)
    monkeypatch.setattr(setup_check, "nvidia_gpus", lambda: ["NVIDIA GeForce RTX 5090"])
    assert packages(tmp_path, "torch>=2.7,<3\n")["torch"].remedy == INSTALL_CUDA_TORCH
    assert "torch==2.11.0" in INSTALL_CUDA_TORCH and INSTALL_CUDA_TORCH.endswith("/cu128")


def test_the_shipped_requirements_are_met_here() -> None:
    assert [c for c in setup_check.check_packages() if c.status == "fail"] == []


@pytest.mark.parametrize(
    ("version", "status"),
    [((3, 10, 4), "fail"), ((3, 11, 0), "ok"), ((3, 14, 9), "ok"), ((3, 15, 0), "fail")],
)
def test_only_a_python_with_wheels_will_do(
    version: tuple[int, int, int], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup_check.sys, "version_info", version)
    first = next(iter(setup_check.check_packages()))
    assert first.status == status and "wanted 3.11 to 3.14" in first.detail
    readme = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    assert "Python 3.11 or newer" in readme and "wheels up to 3.14" in readme


@pytest.mark.parametrize(
    ("capability", "built_for", "status"),
    [
        ((12, 0), ["sm_80", "sm_90", "sm_120"], "ok"),  # RTX 50xx with a cu128 build
        ((12, 0), ["sm_80", "sm_90", "sm_100"], "fail"),  # RTX 50xx with an older one
        ((8, 6), ["sm_80", "sm_90"], "ok"),  # same major number, smaller minor
        ((8, 0), ["sm_86"], "fail"),
        ((9, 0), ["sm_90", "compute_90"], "ok"),
        ((7, 0), [], "fail"),
    ],
)
def test_torch_must_have_code_for_the_gpu(
    capability: tuple[int, int], built_for: list[str], status: str
) -> None:
    check = setup_check.check_architecture("a GPU", capability, 32 * 1024**3, built_for)
    assert check.status == status and f"sm_{capability[0]}{capability[1]}" in check.detail
    assert check.remedy == ("" if status == "ok" else INSTALL_CUDA_TORCH)


def test_a_gpu_that_torch_cannot_use_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(setup_check, "nvidia_gpus", lambda: ["NVIDIA GeForce RTX 5090"])
    checks = {check.name: check for check in setup_check.check_machine()}
    assert checks["CUDA"].status == "fail" and checks["CUDA"].remedy == INSTALL_CUDA_TORCH
    monkeypatch.setattr(setup_check, "nvidia_gpus", list)
    checks = {check.name: check for check in setup_check.check_machine()}
    assert checks["CUDA"].status == "warn" and "float32" in checks["BF16"].detail


def test_hub_is_not_asked_when_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert setup_check.check_hub().status == "warn"


def test_unreachable_hub_names_the_keys_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused at once
    check = setup_check.check_hub()
    assert check.status == "warn" and "127.0.0.1:9 cannot be reached" in check.detail
    assert "model.name" in check.detail and "data.*.path" in check.detail


def test_directories_are_made_twice_without_complaint(tmp_path: Path) -> None:
    for _ in range(2):
        first, disk = setup_check.check_directories(tmp_path / "root")
        assert first.status == "ok" and disk.name == "disk"
    made = {p.relative_to(tmp_path / "root").as_posix() for p in (tmp_path / "root").glob("*/*")}
    assert made == {
        *(f"data/{name}" for name in ("raw", "processed", "cache")),
        *(f"models/{name}" for name in ("base", "reward_models", "policy_models", "judges")),
        "logs/runs",
        *(f"outputs/{n}" for n in ("step_results", "visualizations", "reward_analysis", "metrics")),
        *(f"outputs/{name}" for name in ("benchmarks", "report")),
    }


QWEN_3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("held_as", "overrides"),
    [
        ("bfloat16, 8-bit AdamW", ["tuning.optimizer=adamw_8bit_stochastic"]),
        ("LoRA, r = 64", ["tuning.method=lora"]),
        ("float32 masters, AdamW", ["tuning.optimizer=adamw_float32"]),
    ],
)
def test_the_pages_say_the_disk_that_the_configuration_needs(
    held_as: str, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prmd.training.precision._require_8bit", lambda *, asked: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    Qwen2Config(**QWEN_3B).save_pretrained(tmp_path / "base")
    own = [f"model.name={(tmp_path / 'base').as_posix()}", f"artifact_root={tmp_path.as_posix()}"]
    memory, disk = setup_check.check_needs(load_pipeline(CONFIG_DIR, [*own, *overrides]))
    most, kept = re.findall(r"(\d+) GiB at most and keep (\d+) GiB", disk.detail)[0]
    page = (PROJECT_ROOT / "docs" / "hardware.md").read_text(encoding="utf-8")
    assert f"| {held_as} | {most} | {kept} |" in page
    if "float32" not in held_as:
        readme = " ".join((PROJECT_ROOT / "README.md").read_text(encoding="utf-8").split())
        assert re.search(rf"{most}( GiB at most)? and {kept} GiB", readme)
    weights = 3.086e9  # of the model; a reward model has no head on them, with which its embedding is tied
    least = {"bfloat16, 8-bit AdamW": 6, "LoRA, r = 64": 2, "float32 masters, AdamW": 16}[held_as] * weights
    needed = float(re.findall(r"needs ([\d.]+) GiB and more", memory.detail)[0])
    assert least < needed * 1024**3 < 1.35 * least


def test_a_machine_that_is_too_small_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("prmd.runtime.free_disk_bytes", lambda path: 1024**2)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=1024))
    small = QWEN_3B | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 300}
    Qwen2Config(**small).save_pretrained(tmp_path / "base")
    configs = load_pipeline(CONFIG_DIR, [f"model.name={(tmp_path / 'base').as_posix()}"])
    memory, disk = setup_check.check_needs(configs)
    for check in (memory, disk):
        assert check.status == "warn" and "NOT ENOUGH" in check.detail
    assert setup_check.check_needs(load_pipeline(CONFIG_DIR / "quickstart", [])) == []


def test_a_root_that_cannot_be_made_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    (check,) = setup_check.check_directories(tmp_path / "file" / "root")
    assert check.status == "fail" and "artifact_root" in check.detail


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script stands for nvidia-smi")
def test_gpu_names_come_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setattr(setup_check, "_DRIVER_GPUS", tmp_path / "no-driver")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert setup_check.nvidia_gpus() == []
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 5090'\n", encoding="utf-8")
    program.chmod(0o755)
    assert setup_check.nvidia_gpus() == ["NVIDIA GeForce RTX 5090"]
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert setup_check.nvidia_gpus() == [], "a run on the CPU by choice is no failure of torch"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    program.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    assert setup_check.nvidia_gpus() == []
