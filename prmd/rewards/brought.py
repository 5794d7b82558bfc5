"""Rewards that the user brings: a function or columns as an objective's only member, as the other stages use it.

What is not trained is read as text: rows are a prompt's messages and responses (`TextRow`), where a reward model's are tokens.
Trained reward models are in `reward_model`; the user's function itself is loaded and called in `functions`.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import BroughtConfig, SharedConfig
from prmd.errors import DataError
from prmd.inference.cache import KEY_BYTES, ScoreTable
from prmd.inference.generation import GeneratedResponse
from prmd.inference.scoring import gather, keep_in_turns, keep_scores, place_among_processes
from prmd.pairs import Message, PreferencePair
from prmd.pessimism.calibration import Calibration
from prmd.rewards.functions import RewardFunction, load_function
from prmd.runtime import progress

_AT_ONCE = 64
"""Responses a function is asked for between two looks at the clock."""
BROUGHT_FILE = "reward.json"
"""What the folder of a brought reward holds in the place of weights."""


@dataclass(frozen=True)
class TextRow:
    """A prompt with some responses as text.

    Attributes:
        names: which response each is, for messages.
        given: rewards of the responses where columns bring them, else empty.
    """

    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    names: tuple[str, ...]
    given: tuple[float, ...] = ()

    @property
    def keys(self) -> list[bytes]:
        """Key of each response behind the prompt, in the cache."""
        prompt = [[message["role"], message["content"]] for message in self.prompt]
        texts = (json.dumps([prompt, text]).encode("ascii") for text in self.responses)
        return [hashlib.sha256(text).digest()[:KEY_BYTES] for text in texts]


@dataclass(frozen=True)
class BroughtReward:
    """An objective's reward that no model was trained for: one member, repeated beside ensembles of M.

    Attributes:
        directory: its folder, with `reward.json` and `calibration.json`.
        function: None where columns of the pairs hold the rewards, which then cannot be had of samples.
        calibration: of each of the M copies, or None before it is fitted.
        members: M.
    """

    directory: Path
    objective: str
    source: BroughtConfig
    function: RewardFunction | None
    paths: ArtifactPaths
    calibration: Calibration | None = None
    members: int = 1

    @property
    def fingerprint(self) -> str:
        """Key of what its rewards depend on beside the texts; that of columns is part of the data."""
        if self.function is not None:
            return self.function.fingerprint
        columns = [self.source.column_chosen, self.source.column_rejected]
        return io.fingerprint(["reward columns", self.objective, columns])

    def repeated(self, members: int) -> "BroughtReward":
        """The same as M equal members, each calibrated alike."""
        return replace(
            self, members=members, calibration=self.calibration and self.calibration.repeated(members)
        )

    def record(self) -> dict[str, object]:
        """What `reward.json` holds."""
        sha256 = self.function.sha256 if self.function else None
        return {
            "fingerprint": self.fingerprint,
            **self.source.model_dump(exclude_none=True),
            "sha256": sha256,
        }

    def rows_of_pairs(self, pairs: Sequence[PreferencePair]) -> list[TextRow]:
        """Rows of chosen and rejected.

        Raises:
            DataError: a pair brings no rewards of the objective although columns should.
        """
        given = [()] * len(pairs) if self.function else [tuple(self._given(pair)) for pair in pairs]
        return [
            TextRow(
                pair.prompt,
                (pair.chosen, pair.rejected),
                (f"{pair.id} (chosen)", f"{pair.id} (rejected)"),
                own,
            )
            for pair, own in zip(pairs, given, strict=True)
        ]

    def _given(self, pair: PreferencePair) -> Sequence[float]:
        if self.objective not in pair.rewards:
            raise DataError(
                f"{self.objective}: the pair {pair.id} ({pair.source}) brings no rewards of it; prepare the data again with "
                "data.own_pairs.rewards as it is now"
            )
        return pair.rewards[self.objective]

    def rows_of_texts(self, prompt: Sequence[Message], texts: Sequence[str]) -> TextRow:
        """The row of a prompt and what was sampled for it."""
        asked = " ".join(prompt[-1]["content"].split())
        names = (f"sample {i} of the prompt {asked!r:.60}" for i in range(len(texts)))
        return TextRow(tuple(prompt), tuple(texts), tuple(names))

    def rows_of_samples(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[Sequence[GeneratedResponse]]
    ) -> list[TextRow]:
        """Rows of prompts and their samples."""
        texts = ([sample.text for sample in samples] for samples in responses)
        return [self.rows_of_texts(*one) for one in zip(prompts, texts, strict=True)]

    def rewards(self, rows: Sequence[TextRow], *, description: str) -> list[Tensor]:
        """Raw rewards of every response of every row, those of a function cached by content.

        Returns:
            One float64 [n_responses, M] tensor per row, its columns the same.

        Raises:
            DataError: the function fails on a response, or a sample is to be rewarded by columns.
        """
        found = [row.given for row in rows] if self.function is None else self._called(rows, description)
        if any(len(own) != len(row.responses) for own, row in zip(found, rows, strict=True)):
            raise DataError(
                f"{self.objective}: its rewards are columns, which cannot score samples; bring a function"
            )
        values = (torch.tensor(own, dtype=torch.float64) for own in found)
        return [own[:, None].expand(-1, self.members) for own in values]

    def held(self, rows: Sequence[TextRow]) -> list[bool]:
        """Whether every response of a row is in the cache."""
        table = self._table()
        return [all(key in table for key in row.keys) for row in rows]

    def release(self) -> None:
        """A reward that was brought holds no weights."""

    def _table(self) -> ScoreTable:
        return ScoreTable(self.paths.cache("rewards", self.fingerprint), 1, model=self.directory.name)

    def _called(self, rows: Sequence[TextRow], description: str) -> list[Sequence[float]]:
        """What the function says; in a distributed run the main process asks it, and the others are told."""
        table, keys = self._table(), [row.keys for row in rows]
        missing = {
            key: (row, i)
            for row, own in zip(rows, keys, strict=True)
            for i, key in enumerate(own)
            if key not in table
        }
        asks, todo = place_among_processes()[0] == 0, list(missing.items())
        parts = [todo[i : i + _AT_ONCE] for i in range(0, len(todo), _AT_ONCE)]

        def turns() -> Iterator[list[tuple[bytes, Tensor]]]:
            for part in progress(parts, len(parts), description):
                said = [
                    self.function(row.prompt, row.responses[i], row.names[i]) for _, (row, i) in part if asks
                ]
                values = torch.tensor(gather(said), dtype=torch.float32)[:, None]
                yield list(zip((key for key, _ in part), values, strict=True))

        keep_in_turns(turns(), partial(keep_scores, table))
        return [[float(table[key][0]) for key in own] for own in keys]


def brought_reward(shared: SharedConfig, objective: str, directory: Path) -> BroughtReward:
    """The reward of an objective as the configuration brings it, not calibrated yet.

    Raises:
        ConfigError: its function cannot be loaded.
    """
    source = shared.data.brought[objective]
    key = f"data.own_pairs.rewards.{objective}.function"
    function = load_function(source.function, key) if source.function is not None else None
    return BroughtReward(directory, objective, source, function, shared.paths)
