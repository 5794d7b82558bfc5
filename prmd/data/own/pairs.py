"""The pairs of people's own files, with every row accounted for, and what is refused before anything trains."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prmd.config.shared import OwnFileConfig, OwnPairsConfig
from prmd.data.collection import PairCollection, RawFile, SourcedPair
from prmd.data.own.files import SCORED, reward_columns
from prmd.data.own.formats import Compared, RowError, compare, form_of
from prmd.data.own.scored import as_score, preferred
from prmd.errors import DataError
from prmd.pairs import PreferencePair, make_pair
from prmd.runtime import progress

LEAST_PAIRS = 20
"""Pairs without which the splits of an objective would hold one or two each."""


def own_pairs(files: Iterable[RawFile], settings: OwnPairsConfig) -> PairCollection:
    """The pairs of every objective.

    Raises:
        DataError: a file mixes formats, an id is no text or used twice, scores are all equal, an objective has too few
            pairs or weights for some of its files alone, or two objectives have the same ones; one line that names it.
    """
    collection = PairCollection()
    scores: dict[str, set[float]] = defaultdict(set)
    for file in files:
        if file.label == SCORED or file.label.startswith(f"{SCORED}/"):
            _add_scored(collection, file, settings, scores)
        else:
            _add_file(collection, file, settings)
    _refuse_equal_scores(scores, settings)
    pairs = _unique_ids([item.pair for item in collection.pairs])
    _refuse_few(pairs, collection, settings)
    _refuse_partly_weighted(pairs, settings)
    _refuse_copies(pairs, settings)
    return replace(collection, pairs=[SourcedPair(pair, None) for pair in pairs])


def _add_file(collection: PairCollection, file: RawFile, settings: OwnPairsConfig) -> None:
    objective = file.label.partition("/")[0]
    place, weighted = _place(objective, file, settings), _has_weights(file, settings.objectives[objective])
    form: dict[str, tuple[str, int]] = {}
    for index, row in enumerate(progress(file.rows, len(file.rows), f"pairs of {file.label}")):
        for name, kind in form_of(row).items():
            first, number = form.setdefault(name, (kind, index + 1))
            if kind != first:
                raise DataError(
                    f"{place}: {name} is {kind} in row {index + 1} and {first} in row {number}; one format a file: write "
                    "them alike, or give two files in a folder"
                )
        collection.read[objective] += 1
        own = {key: _own_text(row, key, f"{place}: row {index + 1}") for key in ("id", "source")}
        source = own["source"] or file.where(index)
        try:
            pair = _pair(compare(row), objective=objective, source=source)
            weight = _weight(row, f"{place}: row {index + 1}") if weighted else None
        except RowError as error:
            collection.refuse(
                source=file.where(index),
                objective=objective,
                reason=error.reason,
                row=row,
                detail=error.detail,
            )
            continue
        if weight == 0:
            collection.left_out[objective]["zero_weight"] += 1
            continue
        pair = replace(pair, id=own["id"] or pair.id, weight=weight, rewards=row.get("rewards", {}))
        collection.pairs.append(SourcedPair(pair, None))
    _refuse_unrewarded(
        [item.pair for item in collection.pairs if item.pair.objective == objective], place, settings
    )


def _has_weights(file: RawFile, settings: OwnFileConfig) -> bool:
    """Whether the rows of a file are to have weights: a column is named for them, or one `weight` is there and not empty."""
    return bool(settings.columns.get("weight")) or any(
        row.get("weight") not in (None, "") for row in file.rows
    )


def _weight(row: dict[str, Any], where: str) -> float:
    """The weight of a row whose file has weights.

    Raises:
        RowError: it is no finite number, or negative.
    """
    value = row.get("weight")
    number = as_score(value)
    if number is None or number < 0:
        raise RowError(
            "weight", f"{where}: got {value!r:.40}, wanted a finite number above 0 (0 leaves the pair out)"
        )
    return number


def _refuse_unrewarded(pairs: Sequence[PreferencePair], place: str, settings: OwnPairsConfig) -> None:
    """Refuse pairs that lack the number of an objective whose rewards are columns.

    Raises:
        DataError: says of how many, and of which first.
    """
    for objective, columns in reward_columns(settings).items():
        lacking = [pair for pair in pairs if None in pair.rewards[objective]]
        if lacking:
            raise DataError(
                f"{place}: {len(lacking)} of {len(pairs)} pairs have no number in {' or '.join(map(repr, columns))}, the rewards "
                f"of {objective} (the first: {lacking[0].id}, {lacking[0].source}); all objectives reward every pair that "
                "policies are trained on: fill them in, or remove these rows"
            )


def _own_text(row: dict[str, Any], key: str, where: str) -> str | None:
    """The row's own id or source; None where it has none.

    Raises:
        DataError: it is no text.
    """
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {key} is {value!r:.40}, wanted text; write it in quotes, or leave the column out by columns: "
            f"{{{key}: null}} ({key}s are then made)"
        )
    return value


def _place(objective: str, file: RawFile, settings: OwnPairsConfig) -> str:
    """`data.own_pairs.objectives.polite (polite.jsonl)`, for messages."""
    if objective == SCORED:
        key, path = "data.own_pairs.scored", settings.scored.path
    else:
        key, path = f"data.own_pairs.objectives.{objective}", settings.objectives[objective].path
    part = file.label.partition("/")[2]
    return f"{key} ({path}{f', {part}' if part else ''})"


def _pair(found: Compared, *, objective: str, source: str) -> PreferencePair:
    return make_pair(
        prompt=found.prompt, chosen=found.chosen, rejected=found.rejected, source=source, objective=objective
    )


# ------------------------------------------------------------------ scored responses
def _add_scored(
    collection: PairCollection, file: RawFile, settings: OwnPairsConfig, scores: dict[str, set[float]]
) -> None:
    """Add the pairs of a file, and to `scores` the different ones of each objective."""
    for index, row in enumerate(progress(file.rows, len(file.rows), f"pairs of {file.label}")):
        for objective in settings.scored.scores:
            scores[objective].update(v for v in row["scores"][objective] if v is not None)
            _add_prompt(collection, row, file.where(index), objective, settings)


def _refuse_equal_scores(scores: Mapping[str, set[float]], settings: OwnPairsConfig) -> None:
    """Refuse scores of which none is higher than another, in all files together: one of several may well hold equal ones.

    Args:
        scores: the different ones of each objective; without those of files without rows.
    """
    for objective, values in scores.items():
        if len(values) < 2:
            said = f"all scores are {min(values):g}" if values else "no score is a number"
            raise DataError(
                f"data.own_pairs.scored ({settings.scored.path}): {said} in {settings.scored.scores[objective]!r} "
                f"({objective}), so nothing is preferred; name another column in scores"
            )


def _add_prompt(
    collection: PairCollection, row: dict[str, Any], source: str, objective: str, settings: OwnPairsConfig
) -> None:
    scored, responses = settings.scored, row["responses"]
    kept, left_out = preferred(
        str(row["prompt"]),
        row["scores"][objective],
        least_difference=scored.least_difference,
        at_most=scored.pairs_per_prompt,
    )
    collection.read[objective] += len(kept) + sum(left_out.values())
    for reason, count in left_out.items():
        collection.left_out[objective][reason] += count
    for better, worse in kept:
        one = {"prompt": row["prompt"], "chosen": responses[better], "rejected": responses[worse]}
        try:
            pair = _pair(compare(one), objective=objective, source=source)
        except RowError as error:
            collection.refuse(
                source=source, objective=objective, reason=error.reason, row=one, detail=error.detail
            )
            continue
        collection.pairs.append(SourcedPair(pair, None))


# ------------------------------------------------------------------ all pairs together
def _unique_ids(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The pairs; an id that several objectives use gets the objective's name in front.

    Raises:
        DataError: two different pairs of one objective have one id.
    """
    home: dict[str, str] = {}
    shared = {pair.id for pair in pairs if home.setdefault(pair.id, pair.objective) != pair.objective}
    found: list[PreferencePair] = []
    first: dict[str, PreferencePair] = {}
    for pair in pairs:
        own = replace(pair, id=f"{pair.objective}-{pair.id}") if pair.id in shared else pair
        before = first.setdefault(own.id, own)
        if _content(before) != _content(own):
            raise DataError(
                f"data.own_pairs: the id {pair.id!r} is that of two pairs of {pair.objective} ({before.source} and "
                f"{pair.source}); give each row its own, or leave the column out by columns: {{id: null}}"
            )
        found.append(own)
    return found


def _content(pair: PreferencePair) -> tuple[Any, ...]:
    return tuple((m["role"], m["content"]) for m in pair.prompt), pair.chosen, pair.rejected


def _refuse_few(
    pairs: Sequence[PreferencePair], collection: PairCollection, settings: OwnPairsConfig
) -> None:
    for objective in settings.names:
        own = [_content(pair) for pair in pairs if pair.objective == objective]
        count = len(set(own))  # a pair that is there twice counts once
        if count < LEAST_PAIRS:
            refused = [row for row in collection.quarantine if row["objective"] == objective]
            reasons = {r["reason"]: sum(q["reason"] == r["reason"] for q in refused) for r in refused}
            reasons |= {reason: n for reason, n in collection.left_out[objective].items() if n}
            reasons |= {"repeated_pair": len(own) - count} if len(own) > count else {}
            said = ", ".join(f"{reason} {n}" for reason, n in reasons.items()) or "none refused"
            raise DataError(
                f"data.own_pairs: {objective} has {count} pairs of {collection.read[objective]} rows ({said}), wanted at "
                f"least {LEAST_PAIRS} to train, choose, test and judge on; give more"
            )


def _refuse_partly_weighted(pairs: Sequence[PreferencePair], settings: OwnPairsConfig) -> None:
    """A pair without a weight has none to be compared with: whether 1 is much or little, only its file's owner knows."""
    for objective in settings.objectives:
        own = [pair for pair in pairs if pair.objective == objective]
        bare = [pair.source for pair in own if pair.weight is None]
        if bare and len(bare) < len(own):
            raise DataError(
                f"data.own_pairs.objectives.{objective}.path: {len(bare)} pairs are of files without weights (the first is "
                f"{bare[0]}), {len(own) - len(bare)} of files with them; give every file a column for weights, or read none by "
                "columns: {weight: null}"
            )


def _refuse_copies(pairs: Sequence[PreferencePair], settings: OwnPairsConfig) -> None:
    held: dict[frozenset[int], str] = {}
    for objective in settings.names:
        own = frozenset(
            hash(_content(pair)) for pair in pairs if pair.objective == objective
        )  # texts would take memory
        if other := held.get(own):
            raise DataError(
                f"data.own_pairs: {other} and {objective} have the same {len(own)} pairs, which would count one objective "
                "twice; correct a path, or leave one out"
            )
        held[own] = objective
