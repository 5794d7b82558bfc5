"""Content-keyed tables of everything that is expensive and frozen: rewards, reference log-probabilities, samples.

A table is a folder of shards below `data/cache`; its name is a key of the model and template, and the key of a row is
its tokens. Training arguments are never part of a key, so that beta, loss and method are swept without a forward pass.
A shard is written whole or not at all: after an interruption a row is complete or absent. Its name carries a digest of its
content, so that two runs never write one file and a shard that was changed on the disk is left out.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from prmd.artifacts import io
from prmd.errors import DataError, NotFiniteError
from prmd.models.tokenization import PrefixRow

logger = logging.getLogger(__name__)

KEY_BYTES = 16
_reported: set[Path] = set()
"""Changed shards of which this process has said so."""


def tokens_key(*parts: Sequence[int]) -> bytes:
    """16-byte key of token sequences, e.g. a prompt and a response."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.asarray(part, dtype="<i8").tobytes())
    return digest.digest()[:KEY_BYTES]


def _next_shard(directory: Path, suffix: str) -> Path:
    """A name behind all shards there are, so that none is overwritten where one was deleted; its digest is put behind it."""
    numbers = (int(shard.stem.split("-")[1]) for shard in directory.glob(f"shard-*{suffix}"))
    return directory / f"shard-{max(numbers, default=-1) + 1:05d}{suffix}"


def _whole_shards(directory: Path, suffix: str) -> Iterator[Path]:
    """The shards of a table that are as they were written; each other one is named in a warning, once."""
    for shard in sorted(directory.glob(f"shard-*{suffix}")):
        if shard.is_file() and io.is_as_written(shard):
            yield shard
        elif shard not in _reported:
            _reported.add(shard)
            logger.warning(
                "%s: this file of the cache was changed since it was written (its sha256 is another, or it is a folder); it "
                "is left out and its rows are computed again; delete it",
                shard,
            )


class ScoreTable:
    """Float32 rows of fixed width by key, in safetensors shards.

    Whatever a model says of a response passes through here on its way to the rest, so that it is finite is checked here.
    """

    def __init__(self, directory: Path, width: int, *, model: str = "") -> None:
        """Open or begin a table.

        Args:
            width: numbers per row (members, or 1 for log-probabilities).
            model: whose numbers these are, for people.

        Raises:
            DataError: a shard does not have this width.
        """
        self.directory, self.width, self.model = directory, width, model or directory.name
        self._rows: dict[bytes, np.ndarray] = {}
        for shard in _whole_shards(directory, ".safetensors"):
            tensors = io.read_tensors(shard)
            if tensors["values"].shape[1:] != (width,):
                raise DataError(
                    f"{shard}: rows of {tuple(tensors['values'].shape[1:])}, expected ({width},); delete {directory}"
                )
            keys = tensors["keys"].numpy().tobytes()
            values = tensors["values"].numpy()
            self._rows.update(
                (keys[i * KEY_BYTES : (i + 1) * KEY_BYTES], row) for i, row in enumerate(values)
            )

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: bytes) -> Tensor:
        return torch.from_numpy(self._rows[key])

    def holds(self, rows: Iterable[PrefixRow]) -> bool:
        """Whether every response of every row is here."""
        return all(tokens_key(row.prompt_ids, response) in self for row in rows for response in row.responses)

    def append(self, keys: Sequence[bytes], values: Tensor, *, write: bool = True) -> None:
        """Add rows [n, width] as one new shard (`write=False`: in memory alone, for a process that is not the main one).

        Raises:
            NotFiniteError: a value is NaN or infinite.
        """
        if not keys:
            return
        if bad := int((~torch.isfinite(values)).sum()):
            rows = int((~torch.isfinite(values)).any(dim=1).sum())
            raise NotFiniteError(
                f"{self.model}: {bad} scores are not finite; nothing was cached of {rows} of {len(keys)} responses that it "
                "gives NaN or infinity; train it again, or set another model.dtype"
            )
        array = values.float().cpu().numpy()
        if write:
            packed = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8)
            shard = _next_shard(self.directory, ".safetensors")
            io.write_digested(shard, save({"keys": packed, "values": torch.from_numpy(array)}))
        self._rows.update(zip(keys, array, strict=True))


class JsonTable:
    """JSON rows by hexadecimal key, in JSON Lines shards; holds generated samples."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._rows: dict[str, Any] = {}
        for shard in _whole_shards(directory, ".jsonl"):
            self._rows.update((row["key"], row["value"]) for row in io.read_jsonl(shard))

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> Any:
        return self._rows[key]

    def holds(self, prompts: Iterable[Sequence[int]]) -> bool:
        """Whether every prompt is here."""
        return all(tokens_key(prompt).hex() in self for prompt in prompts)

    def append(self, items: Iterable[tuple[str, Any]], *, write: bool = True) -> None:
        """Add rows as one new shard (`write=False`: in memory alone)."""
        items = list(items)
        if not items:
            return
        if write:
            lines = (io.jsonl_line({"key": key, "value": value}) for key, value in items)
            io.write_digested(_next_shard(self.directory, ".jsonl"), "".join(lines).encode("utf-8"))
        self._rows.update(items)
