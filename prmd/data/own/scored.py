"""Rows whose responses carry scores: how they are read, and the pairs that the scores make for each objective."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from math import isfinite
from typing import Any

from prmd.config.shared import ScoredConfig
from prmd.data.readers import Row
from prmd.errors import DataError
from prmd.pairs import hash_share


def scored_rows(rows: Iterable[Row], where: str, *, settings: ScoredConfig, key: str) -> Iterator[Row]:
    """One row a prompt: `prompt`, `responses`, and `scores` with a list for every objective, None where one is missing.

    The file has a row for each prompt, with lists of responses and scores, or a row for each response; rows of one prompt
    are brought together.

    Args:
        where: the file, for messages.
        key: of its section in the configuration.

    Raises:
        DataError: a column is missing, or responses and scores of a row do not match; names it.
    """
    rows = list(rows)
    if settings.preset == "ultrafeedback":
        yield from (_ultrafeedback(row, settings, f"{where}: row {n}") for n, row in enumerate(rows, start=1))
        return
    prompt, response = (settings.columns.get(name, name) for name in ("prompt", "response"))
    there = list(dict.fromkeys(column for row in rows for column in row))
    for column in (prompt, response, *settings.scores.values()) if rows else ():
        if column not in there:
            raise DataError(
                f"{where}: no column {column!r}; it has {', '.join(there)}; name them in {key}.columns (prompt, response) "
                f"and {key}.scores"
            )
    grouped: dict[Any, Row] = {}
    for number, row in enumerate(rows, start=1):
        responses, scores = _lists(row, response, settings, f"{where}: row {number}")
        empty = {"prompt": row.get(prompt), "responses": [], "scores": {k: [] for k in settings.scores}}
        group = grouped.setdefault(repr(row.get(prompt)), empty)
        group["responses"] += responses
        for objective, values in scores.items():
            group["scores"][objective] += values
    yield from grouped.values()


def _lists(
    row: Row, response: str, settings: ScoredConfig, where: str
) -> tuple[list[Any], dict[str, list[float | None]]]:
    responses = row.get(response)
    several = isinstance(responses, list)
    responses = responses if several else [responses]
    scores = {}
    for objective, column in settings.scores.items():
        values = row.get(column)
        values = values if several else [values]
        if not isinstance(values, list) or len(values) != len(responses):
            raise DataError(
                f"{where}: {column!r} holds {values!r:.60}, wanted a list of {len(responses)} scores, one for each response"
            )
        scores[objective] = [as_score(value) for value in values]
    return responses, scores


def _ultrafeedback(row: Row, settings: ScoredConfig, where: str) -> Row:
    """A row of openbmb/UltraFeedback: `instruction`, and `completions` with a rating for each of four aspects."""
    completions = row.get("completions")
    if "instruction" not in row or not isinstance(completions, list):
        raise DataError(
            f"{where}: wanted instruction and a list of completions, as UltraFeedback has them, got {', '.join(row)}"
        )

    def rating(completion: Mapping[str, Any], aspect: str) -> float | None:
        found = (completion.get("annotations") or {}).get(aspect)
        return as_score(found.get("Rating")) if isinstance(found, dict) else None

    return {
        "prompt": row["instruction"],
        "responses": [completion.get("response") for completion in completions],
        "scores": {k: [rating(c, aspect) for c in completions] for k, aspect in settings.scores.items()},
    }


def as_score(value: Any) -> float | None:
    """A number, also one written as text; None for what is none, such as UltraFeedback's `N/A`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):  # no number; an integer beyond every float
        return None
    return number if isfinite(number) else None


def preferred(
    prompt: str, scores: Sequence[float | None], *, least_difference: float, at_most: int
) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """The pairs (better, worse) of a prompt's responses by one score, and how many were left out for which reason.

    Of more than `at_most`, those with the smallest hash are kept: the widest differences would be the easiest pairs.

    Args:
        prompt: on which the hash depends.
        scores: of the responses; None: unknown.
    """
    kept, left_out = [], dict.fromkeys(("no_score", "tied_scores", "below_least_difference"), 0)
    for i, j in combinations(range(len(scores)), 2):
        if scores[i] is None or scores[j] is None:
            left_out["no_score"] += 1
        elif scores[i] == scores[j]:
            left_out["tied_scores"] += 1
        elif abs(scores[i] - scores[j]) < least_difference:
            left_out["below_least_difference"] += 1
        else:
            kept.append((i, j) if scores[i] > scores[j] else (j, i))
    chosen = sorted(kept, key=lambda pair: hash_share("scored pairs", f"{min(pair)}-{max(pair)} {prompt}"))
    left_out["over_pairs_per_prompt"] = max(0, len(kept) - at_most)
    return chosen[:at_most], left_out
