"""PKU-SafeRLHF: its files and its pairs, in the first schema (seven columns) and the current one (19 harm categories).

`better_response_id` is helpfulness and `safer_response_id` harmlessness. No version has an honesty label, so the honest
pairs are a proxy that `data.pku_safe_rlhf.honest` chooses.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import Any

from prmd.config.shared import DataConfig, PkuSafeRlhfConfig
from prmd.data.collection import PairCollection, RawFile, SourcedPair
from prmd.data.readers import (
    SourceFile,
    hub_file,
    local_file,
    local_path,
    plain_stem,
    split_rows,
)
from prmd.errors import ConfigError
from prmd.pairs import broken_text, make_pair
from prmd.runtime import progress

LABELS = ("better_response_id", "safer_response_id")
DECEPTION_CATEGORIES = ("Mental Manipulation", "Economic Crime", "White-Collar Crime")
"""Harm categories that deceive someone: the nearest thing to dishonesty that the labels hold."""


def pku_pairs(files: Iterable[RawFile], settings: PkuSafeRlhfConfig) -> PairCollection:
    """Helpful, harmless and (unless it comes from TruthfulQA) honest pairs.

    `honest: deception_categories` takes the rows in which exactly one response is flagged with one of
    `DECEPTION_CATEGORIES` and prefers the other one; `better_response` takes the helpfulness label again.

    Raises:
        ConfigError: `deception_categories` is asked of rows without categories; names the choices left.
    """
    collection = PairCollection()
    for file in files:
        for index, row in enumerate(progress(file.rows, len(file.rows), f"pairs of {file.label}")):
            if reason := _refusal(row):
                detail = _unknown_label(row) if reason == "unknown_label" else None
                collection.refuse(
                    source=file.where(index), objective=None, reason=reason, row=row, detail=detail
                )
                continue
            collection.counts["pku_sha256_mismatches"] += _sha256_mismatches(row)
            for objective, chosen in _preferences(row, settings.honest, file.where(index)).items():
                pair = make_pair(
                    prompt=[{"role": "user", "content": row["prompt"].strip()}],
                    chosen=row[f"response_{chosen}"].strip(),
                    rejected=row[f"response_{1 - chosen}"].strip(),
                    source=file.where(index),
                    objective=objective,
                )
                collection.pairs.append(SourcedPair(pair, file.upstream_split))
    return collection


def _refusal(row: dict[str, Any]) -> str | None:
    """Why a row cannot be used, or None."""
    texts = [row.get(name) for name in ("prompt", "response_0", "response_1")]
    if not all(isinstance(text, str) for text in texts):
        return "malformed"
    if broken_text(*texts):
        return "broken_text"
    if _unknown_label(row):
        return "unknown_label"
    prompt, first, second = (text.strip() for text in texts)
    if not prompt:
        return "empty_prompt"
    if not first or not second:
        return "empty_response"
    return "identical_responses" if first == second else None


def _label(value: Any) -> int | None:
    """0 or 1 as an export may write them (0, 0.0, "0", "0.0", false), or None."""
    try:
        number = float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):  # no number; an integer beyond every float
        return None
    return int(number) if number in (0.0, 1.0) else None


def _unknown_label(row: dict[str, Any]) -> str | None:
    """Which label cannot be read, and what it is; None where both can."""
    for name in LABELS:
        if _label(row.get(name)) is None:
            return f"{name} is {row.get(name)!r:.40}, wanted 0 or 1"
    return None


def _preferences(row: dict[str, Any], honest: str, where: str) -> dict[str, int]:
    """Objective -> number of the preferred response."""
    preferred = dict(zip(("helpful", "harmless"), (_label(row[name]) for name in LABELS), strict=True))
    if honest == "better_response":
        preferred["honest"] = preferred["helpful"]
    elif honest == "deception_categories":
        deceives = [_is_deceptive(row, number, where) for number in (0, 1)]
        if deceives[0] != deceives[1]:
            preferred["honest"] = deceives.index(False)
    return preferred


def _is_deceptive(row: dict[str, Any], number: int, where: str) -> bool:
    categories = row.get(f"response_{number}_harm_category")
    if not isinstance(categories, dict):
        raise ConfigError(
            f"data.pku_safe_rlhf.honest: deception_categories needs harm categories, and {where} has none (the "
            "seven-column schema); choose better_response or truthfulqa, or a revision with categories"
        )
    return any(bool(categories.get(name)) for name in DECEPTION_CATEGORIES)


def _sha256_mismatches(row: dict[str, Any]) -> int:
    """Responses whose sha256(prompt + response) is not the recorded one: told, not refused."""
    recorded = [(number, row.get(f"response_{number}_sha256")) for number in (0, 1)]
    return sum(
        hashlib.sha256((row["prompt"] + row[f"response_{number}"]).encode("utf-8")).hexdigest() != digest
        for number, digest in recorded
        if digest
    )


def plan_pku(data: DataConfig) -> list[SourceFile]:
    """Train and test split on the hub; else the one file, or all files of the folder."""
    settings = data.pku_safe_rlhf
    key = "data.pku_safe_rlhf.path"
    path = local_path(settings.path, key)
    if path is None:
        return [
            hub_file(
                "pku_safe_rlhf",
                f"default/{split}",
                split,
                settings,
                partial(split_rows, key, settings.path, settings.revision, split),
            )
            for split in ("train", "test")
        ]
    if path.is_file():
        return [local_file(path, plain_stem(path), None)]
    if found := sorted(p for s in ("train", "test") for p in path.glob(f"data/*/{s}.json*") if p.is_file()):
        return [local_file(p, f"{p.parent.name}/{plain_stem(p)}", plain_stem(p)) for p in found]
    found = sorted(
        p for pattern in ("*.json", "*.jsonl", "*.jsonl.gz") for p in path.glob(pattern) if p.is_file()
    )
    if not found:
        raise ConfigError(
            f"{key}: {path} has neither data/<model>/train.jsonl nor *.json, *.jsonl or *.jsonl.gz files; "
            "point it at a folder in the hub's layout"
        )
    splits = {"train": "train", "test": "test"}
    return [local_file(p, plain_stem(p), splits.get(plain_stem(p))) for p in found]
