"""Soup: the weighted mean of the per-objective DPO policies' weights, without training.

    theta_soup = sum_k lambda_k theta_k        (arXiv:2306.04488)

With LoRA theta are the adapter's matrices A and B, which all policies start from alike; otherwise all weights.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from prmd.artifacts import io
from prmd.errors import DataError

RECORDS = ("run.json", "config.yaml", "metrics.json", "fingerprint.json")


def average_policies(sources: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    """Write the mean of finished policies, with what else their folder holds (tokenizer, configuration), to `target`.

    Args:
        weights: one per source, together 1.

    Raises:
        DataError: the policies do not have the same weight files, or not the same tensors in them.
    """
    files = sorted(path.name for path in sources[0].glob("*.safetensors"))
    for source in sources[1:]:
        found = sorted(path.name for path in source.glob("*.safetensors"))
        if found != files or not files:
            raise DataError(
                f"soup: {source} holds {found}, {sources[0]} holds {files}; train both with one tuning"
            )
    for path in sources[0].iterdir():
        if path.is_file() and path.name not in (*RECORDS, *files):
            io.copy_file(path, target / path.name)
    for name in files:
        _average_file([source / name for source in sources], weights, target / name)


def _average_file(paths: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    mean: dict[str, torch.Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path, weight in zip(paths, weights, strict=True):
        tensors = io.read_tensors(path)
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        if mean and shapes != {name: list(tensor.shape) for name, tensor in mean.items()}:
            raise DataError(
                f"soup: {path} does not hold the tensors of {paths[0]}; train both with one tuning"
            )
        for name, tensor in tensors.items():
            dtypes[name] = tensor.dtype
            mean[name] = mean.get(name, 0.0) + weight * tensor.double()
    generator = torch.Generator().manual_seed(0)
    averaged = {name: _stored(tensor, dtypes[name], generator) for name, tensor in mean.items()}
    io.write_tensors(target, averaged, {"format": "pt"})


def _stored(mean: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A mean in the dtype of the weights, in bfloat16 rounded up or down by chance.

    Policies differ from their base by less than the distance of two bfloat16 numbers; the nearest one would be the base.
    """
    if dtype != torch.bfloat16:
        return mean.to(dtype)
    bits = mean.float().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
