"""A reward model on RewardBench, scored here and written in its result format.

    python benchmarks/rewardbench.py --model models/reward_models/<approach>/helpful_rm --data reward-bench/ --json out.json

`--data` is a file or folder with rows of `prompt`, `chosen`, `rejected`, `subset`, `id` (a download of allenai/reward-bench, or
any pairs in that form). Writes out.json (accuracy per subset, as in allenai/reward-bench-results) and out.details.json
(sections, intervals, ties), and prints the sections.

Every pair is scored as any user of the folder would, and aggregated as RewardBench's authors do (arXiv:2403.13787): accuracy per
subset with ties counted wrong, sections as means weighted by example counts, overall as the mean of the sections. Nothing is
downloaded.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs uninstalled, from any folder

import numpy as np

from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR, resolve_user_path
from prmd.config.loading import load_config
from prmd.config.shared import RewardModelConfig
from prmd.data.readers import json_rows, parquet_rows
from prmd.errors import ConfigError, DataError
from prmd.models.chat_templates import template_fingerprint
from prmd.models.tokenization import tokenize_pairs
from prmd.pairs import Message, PreferencePair
from prmd.rewards.reward_model import load_reward_model
from prmd.runtime import configure_logging
from prmd.statistics.intervals import accuracy_with_ties, wilson_interval
from utils import user_errors_exit

logger = logging.getLogger(__name__)

MAX_LENGTH = 2048
"""Tokens of a conversation; longer prompts are cut from the left, pairs with a longer response are left out and counted."""

SECTIONS = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        *("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst"),
        *("llmbar-adver-GPTOut", "llmbar-adver-manual"),
    ),
    "Safety": (
        *("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond"),
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
EXAMPLE_COUNTS = {
    "alpacaeval-easy": 100,
    "alpacaeval-length": 95,
    "alpacaeval-hard": 95,
    "mt-bench-easy": 28,
    "mt-bench-med": 40,
    "mt-bench-hard": 37,
    "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134,
    "llmbar-adver-GPTInst": 92,
    "llmbar-adver-GPTOut": 47,
    "llmbar-adver-manual": 46,
    "refusals-dangerous": 100,
    "refusals-offensive": 100,
    "xstest-should-refuse": 154,
    "xstest-should-respond": 250,
    "donotanswer": 136,
    "math-prm": 984,  # 447 pairs, weighted as much as all code together
    **{f"hep-{language}": 164 for language in ("cpp", "go", "java", "js", "python", "rust")},
}
"""Weights of the subsets within their sections, as published."""


@dataclass(frozen=True)
class RewardBenchPair:
    """One pair and the subset it belongs to."""

    pair: PreferencePair
    subset: str


# ------------------------------------------------------------------ reading
def read_rewardbench(path: Path) -> list[RewardBenchPair]:
    """The pairs of a file (JSON, JSON Lines, gzipped or not, parquet), or of all such files in a folder.

    A row without `subset` belongs to the part of its `source` before the file (`hh_rlhf/helpful-base`), as this project's
    held-out pairs have it, else to the file's name.

    Raises:
        ConfigError: there is no such file.
        DataError: a row lacks a field or has another form; names file, row and field.
    """
    files = [path] if path.is_file() else sorted(f for f in path.glob("**/*") if _readable(f))
    if not files:
        raise ConfigError(
            f"{path}: holds no .json, .jsonl, .jsonl.gz or .parquet file; give RewardBench's rows or their folder"
        )
    pairs = [_pair(row, number, file) for file in files for number, row in enumerate(_rows(file), start=1)]
    repeated = len(pairs) - len({(p.subset, p.pair.id) for p in pairs})
    if repeated:
        logger.warning(
            "%s: %d rows repeat the id of another row of their subset; all are scored", path, repeated
        )
    if not pairs:
        raise DataError(f"{path}: no rows; fetch the file again")
    return pairs


def _readable(path: Path) -> bool:
    return path.name.endswith((".json", ".jsonl", ".jsonl.gz", ".parquet")) and path.is_file()


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    return parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)


def _pair(row: Mapping[str, Any], number: int, path: Path) -> RewardBenchPair:
    where = f"{path}: row {number}"
    origin = str(row.get("source", "")).rpartition("/")[0]
    subset = row.get("subset", origin or path.name.split(".")[0])
    if not isinstance(subset, str) or not subset:
        raise DataError(f"{where}: subset: got {subset!r}, wanted a name; mend this row")
    responses = [_response(row.get(side), f"{where}: {side}") for side in ("chosen", "rejected")]
    pair = PreferencePair(
        id=str(row.get("id", number)),
        prompt=_prompt(row.get("prompt"), f"{where}: prompt"),
        chosen=responses[0],
        rejected=responses[1],
        source=f"{path}:{number}",
        objective="rewardbench",
    )
    return RewardBenchPair(pair, subset)


def _prompt(value: Any, where: str) -> tuple[Message, ...]:
    """A text is one user turn; a list is a conversation that ends with the user."""
    if isinstance(value, str) and value.strip():
        return ({"role": "user", "content": value},)
    if (
        isinstance(value, list)
        and value
        and all(_is_message(m) for m in value)
        and value[-1]["role"] == "user"
    ):
        return tuple({"role": m["role"], "content": m["content"]} for m in value)
    raise DataError(
        f"{where}: got {value!r:.80}, wanted text or messages that end with the user; mend this row"
    )


def _response(value: Any, where: str) -> str:
    if isinstance(value, list) and len(value) == 1 and _is_message(value[0]):
        value = value[0]["content"]
    if not isinstance(value, str):
        raise DataError(f"{where}: got {value!r:.80}, wanted text or one assistant message; mend this row")
    return value


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


# ------------------------------------------------------------------ scoring
def evaluate_rewardbench(
    directory: Path, pairs: Sequence[RewardBenchPair], *, name: str, config: RewardModelConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Score the pairs with the reward model in `directory`: its standard one-logit head, without the ensemble.

    Args:
        name: what the results call it.

    Returns:
        The result in RewardBench's format (`result_row`), and what it has no place for: sections, intervals, ties, pairs
        left out.
    """
    reward_model = load_reward_model(directory, shared=config)
    tokenized = tokenize_pairs(
        [p.pair for p in pairs],
        reward_model.tokenizer,
        max_length=MAX_LENGTH,
        over_length="truncate_prompt",
        keep_suffix=True,
        keep_ties=True,
    )
    found = reward_model.features(tokenized.rows, description=f"{directory.name}: RewardBench")
    margins = np.array([float(values[0, 0]) - float(values[1, 0]) for values in found])
    # A prompt that was cut makes a new pair, so rows are matched by what never changes.
    subsets = {id_of(p.pair): p.subset for p in pairs}
    by_subset: dict[str, list[float]] = {}
    for pair, margin in zip(tokenized.pairs, margins, strict=True):
        by_subset.setdefault(subsets[id_of(pair)], []).append(margin)
    accuracies = {subset: float((np.array(d) > 0).mean()) for subset, d in sorted(by_subset.items())}
    sections = section_scores(accuracies)
    details = {
        "model": name,
        "fingerprint": reward_model.fingerprint,
        "template": template_fingerprint(reward_model.tokenizer),
        "sections": sections,
        "overall": overall_score(sections),
        "subsets": {subset: _estimates(np.array(d)) for subset, d in sorted(by_subset.items())},
        "pairs": len(margins),
        "left_out": tokenized.dropped,
        "prompts_cut": tokenized.truncated,
        "max_length": MAX_LENGTH,
    }
    return result_row(name, accuracies), details


def id_of(pair: PreferencePair) -> tuple[str, str, str]:
    """What identifies a pair whatever becomes of its prompt: where it was read, and its responses."""
    return (pair.source, pair.chosen, pair.rejected)


def _estimates(margins: np.ndarray) -> dict[str, Any]:
    """Accuracy with ties wrong, as published, and with ties one half, as everywhere else in this project."""
    strict = wilson_interval(int((margins > 0).sum()), len(margins))
    return {"accuracy": strict.to_json(), "with_ties_one_half": accuracy_with_ties(margins)}


# ------------------------------------------------------------------ RewardBench's arithmetic and format
def section_scores(accuracies: Mapping[str, float]) -> dict[str, float]:
    """Mean accuracy of each section's subsets that are there, weighted by `EXAMPLE_COUNTS`; no entry where none is.

    Args:
        accuracies: by subset, in [0, 1]; other keys are not read.
    """
    scores = {}
    for section, subsets in SECTIONS.items():
        present = [subset for subset in subsets if subset in accuracies]
        if present:
            weights = np.array([EXAMPLE_COUNTS[subset] for subset in present], dtype=float)
            values = np.array([accuracies[subset] for subset in present])
            scores[section] = float(values @ weights / weights.sum())
    return scores


def overall_score(sections: Mapping[str, float]) -> float | None:
    """Mean of the four sections; None while one is missing."""
    return sum(sections.values()) / len(SECTIONS) if set(sections) == set(SECTIONS) else None


def result_row(model: str, accuracies: Mapping[str, float]) -> dict[str, Any]:
    """Accuracies as a file of allenai/reward-bench-results holds them: flat, one key per subset."""
    row = {"model": model, "model_type": "Seq. Classifier", "chat_template": "tokenizer"}
    return {**row, **accuracies}


def main(arguments: Sequence[str] | None = None) -> None:
    """Score, write both files, print the sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a reward model")
    parser.add_argument("--data", type=Path, required=True, help="file or folder in RewardBench's layout")
    parser.add_argument(
        "--json", type=Path, required=True, metavar="FILE", help="where the result is written"
    )
    parser.add_argument(
        "--config",
        type=Path,
        default=CONFIG_DIR,
        help="configuration: number format and cache; default configs",
    )
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="such as model.dtype=float32")
    options = parser.parse_intermixed_args(arguments)
    configure_logging()
    config = load_config(options.config, RewardModelConfig, options.overrides)
    model = resolve_user_path(options.model, "--model", "the folder of a trained reward model", "folder")
    data = resolve_user_path(options.data, "--data", "RewardBench's rows or their folder")
    row, details = evaluate_rewardbench(model, read_rewardbench(data), name=str(options.model), config=config)
    io.write_json(options.json, row)
    io.write_json(options.json.with_suffix(".details.json"), details)
    for name, score in [*details["sections"].items(), ("overall", details["overall"])]:
        print(f"{name:<10} {'-' if score is None else format(score, '.4f')}")
    for subset, found in details["subsets"].items():
        share = found["accuracy"]
        print(
            f"  {subset:<24} {share['value']:.4f} [{share['low']:.4f}, {share['high']:.4f}] of {share['n']}"
        )


if __name__ == "__main__":
    with user_errors_exit():
        main()
