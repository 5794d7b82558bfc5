"""Soup: the weighted mean of the per-objective DPO policies' weights, without training.

    theta_soup = sum_k lambda_k theta_k        (arXiv:2306.04488)

With LoRA theta are the adapter's matrices A and B, which all policies start from alike; otherwise all weights. The mean is
stored in float32, whatever the policies are stored in: they may differ by less than the distance of two bfloat16 numbers.
"""

from collections.abc import Sequence
from pathlib import Path

from prmd.artifacts import io
from prmd.errors import DataError

RECORDS = ("run.json", "config.yaml", "metrics.json", "fingerprint.json")


def average_policies(sources: Sequence[Path], weights: Sequence[float], target: Path) -> None:
    """Write the mean of finished policies in float32, with what else their folder holds (tokenizer, configuration), to `target`.

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
        held = [io.read_tensors(source / name) for source in sources]
        shapes = [{key: tensor.shape for key, tensor in tensors.items()} for tensors in held]
        for source, own in zip(sources, shapes, strict=True):
            if own != shapes[0]:
                raise DataError(
                    f"soup: {source / name} does not hold the tensors of {sources[0] / name}; train both with one tuning"
                )
        mean = {
            key: sum(weight * own[key].double() for weight, own in zip(weights, held, strict=True)).float()
            for key in held[0]
        }
        io.write_tensors(target / name, mean, {"format": "pt"})
