"""Rows of a measurement as JSON Lines that outlive it: each is on the disk before the next one is measured."""

from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.runtime import is_main_process


class RowFile:
    """Rows behind those that earlier runs left in the same file; a run that is killed leaves a whole file of all it had.

    Args:
        file: where they go; None keeps them in memory alone. In a distributed run the main process writes it.

    Raises:
        DataError: the file that is there does not hold rows.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = io.read_jsonl(file) if file and file.is_file() else []

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; the file is replaced by a whole one, so that no moment has half a line."""
        self.rows.append(row)
        if self.file and is_main_process():
            io.write_jsonl(self.file, self.rows)
