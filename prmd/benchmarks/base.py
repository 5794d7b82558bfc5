"""What every benchmark is made of: its task, its result, why it did not run, responses by its own decoding, rows of files checked field by field.

Responses are cached by the candidate's weights and the decoding, so that judging again, or with another judge, samples
nothing; after an interruption only what is missing is sampled. Every mistake in a file is one line that names row and field.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths, find_user_path
from prmd.config.evaluation import EvaluationConfig
from prmd.config.shared import BatchSize
from prmd.data.readers import open_csv
from prmd.errors import ConfigError, DataError
from prmd.inference.cache import JsonTable
from prmd.inference.candidates import CandidateModels
from prmd.inference.generation import GeneratedResponse, generate
from prmd.models.tokenization import Tokens


@dataclass(frozen=True)
class BenchmarkResult:
    """One benchmark on one candidate.

    Attributes:
        reason: why it did not run; None where it did.
        metrics: name -> estimate with `chance` (None where guessing has no defined score).
        items: one row per question or pair, for paired comparisons and for reading.
        data_sha256: of the data it ran on.
        label: what the metrics are called in tables where they depend on a judge, such as `mt_bench[judge=...]`; None: the
            benchmark's name.
        judge: the judge's card; None where nothing was judged.
        samples: what was generated, one row per response, in a file of its own.
        judgements: what the judge said, one row per verdict, in a file of its own.
        not_finite: it did not run because numbers of the candidate are NaN or infinite.
    """

    reason: str | None = None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    data_sha256: str | None = None
    label: str | None = None
    judge: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    judgements: list[dict[str, Any]] = field(default_factory=list)
    not_finite: bool = False

    @property
    def status(self) -> str:
        return "done" if self.reason is None else "not run"


@dataclass(frozen=True)
class Task:
    """One benchmark, as the last lines of its module say it; its name is its row in `TASKS`.

    Attributes:
        run: measures one candidate; raises `NotRunError` where it cannot.
        section: key under `benchmarks` with its settings. A task that reads the section of another always runs with it.
        text_judged: whether `text_judge` judges it, so that a result depends on those settings.
        honest_judged: whether the judge of honesty may, so that a result depends on that model.
    """

    run: Callable[[EvaluationConfig, CandidateModels], BenchmarkResult]
    section: str
    text_judged: bool = False
    honest_judged: bool = False


class NotRunError(Exception):
    """A benchmark lacks its data or its judge; the message is the reason, in one line."""


@contextmanager
def needed(said: str = "") -> Iterator[None]:
    """A `NotRunError` in the place of an error in configuration or data, its reason begun with `said`."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise NotRunError(f"{said}{error}") from error


@contextmanager
def needed_data(path: str | None, key: str) -> Iterator[None]:
    """The same for the data at `path`, which the configuration gives under `key`."""
    if path is None:
        raise NotRunError(no_path(key))
    try:
        yield
    except ConfigError as error:
        raise NotRunError(f"data missing at {path}: {error}") from error
    except DataError as error:
        raise NotRunError(str(error)) from error


def no_path(key: str) -> str:
    """The reason of a benchmark whose data are not given."""
    return f"data missing at {key}: null; name a hub id, a folder or a file there"


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled in every benchmark; lengths and temperatures are each benchmark's own.

    Attributes:
        paths: samples are cached below this artifact root.
        seed: of the noise.
        batch_size: responses sampled at a time, or `auto`.
    """

    paths: ArtifactPaths
    seed: int
    batch_size: BatchSize

    @classmethod
    def of(cls, config: EvaluationConfig) -> "Sampling":
        """As the evaluation samples."""
        return cls(config.paths, config.shared.seed, config.generation.batch_size)


def sample(
    models: CandidateModels,
    prompts: Sequence[Tokens],
    sampling: Sampling,
    *,
    description: str,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
) -> list[list[GeneratedResponse]]:
    """`samples_per_prompt` responses to each prompt, in order.

    Args:
        prompts: token ids, with the generation prompt where the chat template is used.
        temperature: 0 decodes greedily.
    """
    candidate, seed = models.candidate, sampling.seed
    decoding = [samples_per_prompt, max_new_tokens, temperature, top_p, seed]
    key = io.fingerprint(["benchmark samples", candidate.fingerprint, decoding])
    table = JsonTable(sampling.paths.cache("samples", key))
    return generate(
        None if table.holds(prompts) else models.policy,
        models.tokenizer,
        prompts,
        samples_per_prompt=samples_per_prompt,
        max_new_tokens=max_new_tokens,
        seed=int(io.fingerprint([seed, candidate.method])[:8], 16),
        batch_size=sampling.batch_size,
        description=f"{candidate.method}: {description}",
        temperature=temperature,
        top_p=top_p,
        table=table,
    )


Row = Mapping[str, Any]


def csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """(where, row) for each row of a CSV file with a header; column names in lower case.

    Raises:
        DataError: not UTF-8, or not a CSV file.
    """
    with open_csv(path) as reader:
        for row in reader:
            values = {(name or "").strip().casefold(): value for name, value in row.items()}
            yield f"{path}:{reader.line_num}", values


def numbered(rows: Iterable[Row], source: object) -> Iterator[tuple[str, Row]]:
    """(where, row) for rows without line numbers."""
    for number, row in enumerate(rows, start=1):
        yield f"{source}: row {number}", row


def text_of(row: Row, name: str, where: str) -> str:
    """A field that must hold words.

    Args:
        name: the field, a dot between the levels of nested ones.
    """
    value = value_of(row, name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name}: got {_shown(value)}, wanted text; mend or remove this row")
    return value


def share_of(row: Row, name: str, where: str) -> float | None:
    """A field that holds a number from 0 to 1, or nothing."""
    value = value_of(row, name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DataError(
            f"{where}: {name}: got {_shown(value)}, wanted a number from 0 to 1 or null; mend this row"
        )
    return float(value)


def integer_of(row: Row, names: tuple[str, ...], where: str) -> int:
    """The first of several fields that is there, a whole number or its digits."""
    name = next((n for n in names if n in row), names[0])
    value = row.get(name)
    if isinstance(value, bool) or not (
        isinstance(value, int) or (isinstance(value, str) and value.isdigit())
    ):
        raise DataError(
            f"{where}: {name or 'index'}: got {_shown(value)}, wanted a whole number; mend this row"
        )
    return int(value)


def value_of(row: Row, name: str) -> Any:
    """A field by its dotted name; None where it is absent."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def refuse_twice(seen: dict[Any, str], key: Any, name: str, where: str) -> None:
    """Remember where a key was met; a second time is a mistake."""
    if key in seen:
        raise DataError(f"{where}: {name}: {key!r} is there before, at {seen[key]}; keep one of the two")
    seen[key] = where


def _shown(value: Any) -> str:
    text = repr(value)
    return "nothing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


def content_key(settings: BaseModel) -> list[list[Any]]:
    """Name, size and time of every local file that a section names, for a benchmark's fingerprint.

    Of a folder its own files and those one folder down, where readers look (`reference_answer/gpt-4.jsonl`).
    """
    found = []
    for value in settings.model_dump().values():
        place = find_user_path(value) if isinstance(value, str) else None
        if place is None:
            continue
        files = [place] if place.is_file() else sorted([*place.glob("*"), *place.glob("*/*")])
        for file in (f for f in files if f.is_file()):
            name = file.relative_to(place.parent).as_posix()
            found.append([name, file.stat().st_size, file.stat().st_mtime_ns])
    return found
