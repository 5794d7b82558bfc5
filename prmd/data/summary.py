"""What stage 1 shows of the prepared data: sizes, length distributions and examples, as JSON, text and figures.

Reads pairs in memory and writes to `outputs/visualizations/<approach>/`. Drawing is in `figures`.
"""

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import ModelConfig
from prmd.data.collection import PairCollection
from prmd.data.splits import SplitPairs, SplitResult
from prmd.errors import UserError
from prmd.objectives import SPLITS
from prmd.pairs import Message, PreferencePair
from prmd.report import figures

logger = logging.getLogger(__name__)

EXAMPLES = 10
LENGTH_SAMPLE = 2000
"""Pairs per objective whose lengths are drawn: enough for a distribution, and 6,000 to tokenise."""


def sizes_of(pairs: SplitPairs) -> dict[str, dict[str, int]]:
    """objective -> split -> number of pairs."""
    return {
        objective: {split: len(rows) for split, rows in splits.items()} for objective, splits in pairs.items()
    }


def describe_rows(collection: PairCollection, result: SplitResult) -> dict[str, Any]:
    """What became of every row of each objective, logged as a table, with what can be told from so many.

    Returns:
        `rows` and `can_be_told` by objective; nothing for sources whose rows belong to several objectives at once.
    """
    if not collection.read:
        return {}
    rows, told = {}, {}
    for objective, splits in result.pairs.items():
        refused = Counter(row["reason"] for row in collection.quarantine if row["objective"] == objective)
        left_out = collection.left_out.get(objective, Counter()) + result.left_out.get(objective, Counter())
        kept = {split: len(pairs) for split, pairs in splits.items()}
        rows[objective] = {
            "read": collection.read[objective],
            "refused": dict(refused),
            "left_out": dict(left_out),
        }
        rows[objective]["kept"] = kept
        told[objective] = _what_can_be_told(kept["test"])
    for line in rows_lines(rows):
        logger.info("%s", line)
    for objective, sentence in told.items():
        logger.info("%s: %s", objective, sentence)
    return {"rows": rows, "can_be_told": told}


def rows_lines(rows: Mapping[str, dict[str, Any]]) -> list[str]:
    """The table of `describe_rows` as lines of equal columns."""
    cells = [("objective", "read", "refused", "left out", *SPLITS)]
    for objective, row in rows.items():
        counts = [f"{sum(row[key].values()):,}" for key in ("refused", "left_out")]
        cells.append((objective, f"{row['read']:,}", *counts, *(f"{row['kept'][s]:,}" for s in SPLITS)))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.rjust, line, widths)) for line in cells]
    for objective, row in rows.items():
        reasons = {**row["refused"], **row["left_out"]}
        if said := ", ".join(f"{reason} {count:,}" for reason, count in reasons.items() if count):
            lines.append(f"{objective}: {said}")
    return lines


def _what_can_be_told(test_pairs: int) -> str:
    """How far a share that is measured on so many test pairs may be off, in words."""
    if not test_pairs:
        return "no test pair, so nothing can be said of its reward model"
    half = 100 * 1.96 * 0.5 / math.sqrt(test_pairs)
    if half >= 50:
        return f"on {test_pairs} test pairs an accuracy says nothing: any share may be chance"
    known = f"on {test_pairs:,} test pairs an accuracy is known to about ±{half:.0f} percentage points"
    small = f"; a reward model right in fewer than {50 + half:.0f} % cannot be told from guessing"
    return known + (small if half >= 5 else "")


def write_summary(pairs: SplitPairs, *, model: ModelConfig, paths: ArtifactPaths, seed: int) -> list[Path]:
    """Write sizes, lengths and ten examples per objective, and draw the first two.

    Args:
        model: by whose tokenizer texts are measured.
        seed: which examples are shown.

    Returns:
        The files written.
    """
    directory = paths.visualizations
    chosen = {objective: _sample(splits, seed) for objective, splits in pairs.items()}
    sizes = io.write_json(
        directory / "sizes.json", {"approach": paths.approach, "objectives": sizes_of(pairs)}
    )
    lengths = io.write_json(directory / "lengths.json", _lengths(model, paths, chosen))
    written = [sizes, lengths, figures.plot_split_sizes(sizes), *figures.plot_length_distributions(lengths)]
    for objective, sample in chosen.items():
        examples = sample[:EXAMPLES]
        written += [
            io.write_json(directory / f"examples_{objective}.json", [p.to_row() for p in examples]),
            io.write_text(directory / f"examples_{objective}.txt", _readable(objective, examples)),
        ]
    return written


def _sample(splits: dict[str, list[PreferencePair]], seed: int) -> list[PreferencePair]:
    everything = [pair for rows in splits.values() for pair in rows]
    return random.Random(seed).sample(everything, min(LENGTH_SAMPLE, len(everything)))


def _lengths(
    model: ModelConfig, paths: ArtifactPaths, samples: dict[str, list[PreferencePair]]
) -> dict[str, Any]:
    units: dict[str, Callable[[str], int]] = {"words": lambda text: len(text.split()), "characters": len}
    if count_tokens := _token_counter(model, paths):
        units["tokens"] = count_tokens
    return {
        "approach": paths.approach,
        "sample": f"at most {LENGTH_SAMPLE} random pairs per objective; texts without the chat template",
        "tokenizer": model.name if "tokens" in units else None,
        "objectives": {
            objective: {unit: _measure(sample, count) for unit, count in units.items()}
            for objective, sample in samples.items()
        },
    }


def _measure(sample: Sequence[PreferencePair], count: Callable[[str], int]) -> dict[str, list[int]]:
    return {
        "prompt": [sum(count(m["content"]) for m in pair.prompt) for pair in sample],
        "chosen": [count(pair.chosen) for pair in sample],
        "rejected": [count(pair.rejected) for pair in sample],
    }


def _token_counter(model: ModelConfig, paths: ArtifactPaths) -> Callable[[str], int] | None:
    """How many tokens a text has for the configured model, or None where its tokenizer is not at hand."""
    from prmd.models.loading import (
        load_tokenizer,  # brings transformers and peft, which nothing else here needs
    )

    try:
        tokenizer = load_tokenizer(model, paths)
    except UserError as error:
        logger.info("lengths are in words and characters only: %s", error)
        return None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))


def _readable(objective: str, pairs: Sequence[PreferencePair]) -> str:
    blocks = [f"{len(pairs)} random pairs for {objective}, of all splits\n"]
    for number, pair in enumerate(pairs, start=1):
        blocks.append(
            f"{'=' * 80}\n{number}. {pair.id}   from {pair.source}\n\n{_conversation(pair.prompt)}\n\n"
            f"--- chosen ---\n{pair.chosen}\n\n--- rejected ---\n{pair.rejected}\n"
        )
    return "\n".join(blocks)


def _conversation(messages: Sequence[Message]) -> str:
    return "\n\n".join(f"[{m['role']}] {m['content']}" for m in messages)
