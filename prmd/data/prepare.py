"""Stage 1: download the sources of an approach, and turn them into splits per objective.

`download_dataset` fills `data/raw/<source>/` (through `raw` and `sources`); `split_objectives` makes
`data/processed/<approach>/` (through `collection`, `pku_safe_rlhf` and `splits`). Stage 2 reads the splits with
`pairs.read_pairs`.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prmd.artifacts import io, locks, runs
from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import DataConfig, RewardModelConfig
from prmd.data.collection import PairCollection, merge
from prmd.data.embedded import embedded_pairs
from prmd.data.hh_rlhf import hh_rlhf_pairs
from prmd.data.own.pairs import own_pairs
from prmd.data.pku_safe_rlhf import pku_pairs
from prmd.data.raw import MANIFEST, fetch_source, read_manifest, read_source
from prmd.data.sources import plan_source, required_sources
from prmd.data.splits import SplitPairs, SplitResult, check_no_leak, limit_pairs, split_pairs
from prmd.data.summary import describe_rows, sizes_of, write_summary
from prmd.data.truthfulqa import truthfulqa_pairs
from prmd.data.weights import describe_weights, with_mean_one
from prmd.errors import DataError, UserError
from prmd.objectives import SPLITS
from prmd.pairs import BENCHMARK_QUESTIONS_FILE

logger = logging.getLogger(__name__)

SPLITTER_VERSION = 1
"""Raised whenever the same raw files would give other splits, so that prepared data is made again."""


def download_dataset(config: RewardModelConfig, *, force: bool = False, dry_run: bool = False) -> Path:
    """Fetch every source of the approach to `data/raw/<source>/`, resuming what was interrupted.

    Args:
        config: `data` says which approach and from where.
        force: fetch again what is there.
        dry_run: only say what would be fetched.

    Returns:
        `data/raw`.

    Raises:
        ConfigError: a source cannot be reached; names its YAML key.
        DataError: a file of a source is not what it should be.
    """
    names = required_sources(config.data)
    raw = config.paths.raw(names[0]).parent
    if dry_run:
        for name in names:
            _say_what_would_be_fetched(name, config.data, config.paths)
        return raw
    clock = runs.start_run()
    manifests = {}
    for name in names:
        with locks.held(config.paths.raw(name)):
            manifests[name] = fetch_source(name, config.data, config.paths, force=force)
    runs.write_step_result(
        config.paths,
        "download_dataset",
        {"approach": config.data.approach, "seconds": clock.seconds(), "sources": manifests},
    )
    return raw


def split_objectives(config: RewardModelConfig, *, force: bool = False, dry_run: bool = False) -> Path:
    """Make `data/processed/<approach>/<objective>/{train,val,test,judge}.jsonl` from the raw sources.

    Beside the splits lie `stats.json` (sizes and what was left out), `quarantine.jsonl` (refused rows with the reason)
    and `truthfulqa_benchmark_questions.json` (questions kept for the benchmark; null where TruthfulQA takes no part).

    Args:
        config: `data` decides the pairs and splits; `seed` only which examples are shown.
        force: make it again although it is current.
        dry_run: only say what would be read and written.

    Returns:
        `data/processed/<approach>`.

    Raises:
        ConfigError: the honest pairs of PKU-SafeRLHF cannot be made from its schema.
        DataError: a source was not downloaded, or an objective is left without pairs; names the remedy.
    """
    target = config.paths.processed
    if dry_run:
        _say_what_would_be_split(config.data, config.paths)
        return target
    clock = runs.start_run()
    names = required_sources(config.data)
    manifests = {name: read_manifest(name, config.data, config.paths) for name in names}
    inputs = _input_hashes(manifests)
    fingerprint = io.fingerprint(
        {"data": _deciding(config.data), "inputs": inputs, "splitter": SPLITTER_VERSION}
    )
    if not force and runs.is_current(target, fingerprint):
        logger.info(
            "%s is current (same data settings and raw files); reused, --force makes it again", target
        )
        return target
    with locks.held(target):
        _build(config, inputs, fingerprint, clock, force)
    return target


def _deciding(data: DataConfig) -> dict[str, Any]:
    """What of the settings decides the splits: functions that reward pairs, and whether they may, do not."""
    values = data.model_dump(mode="json")
    own = values.get("own_pairs", {})
    own.pop("allow_code", None)
    columns = {k: source for k, source in own.pop("rewards", {}).items() if source["function"] is None}
    if columns:
        own["rewards"] = columns
    return values


def _build(
    config: RewardModelConfig,
    inputs: dict[str, str],
    fingerprint: str,
    clock: runs.RunClock,
    force: bool,
) -> None:
    """Splits, statistics and figures, published when everything is there."""
    collection = _collect(config.data, config.paths)
    _say_constant_prompts(collection)
    result = _split(collection, config.data)
    stats = _stats(collection, result, config.data.approach) | describe_rows(collection, result)
    stats |= describe_weights(result.pairs)
    result = replace(result, pairs=with_mean_one(result.pairs))
    target = config.paths.processed
    partial = runs.partial_directory(target, fingerprint, force)
    _write(partial, result.pairs, collection, stats)
    written = write_summary(result.pairs, model=config.model, paths=config.paths, seed=config.seed)
    extra = {"sizes": stats["sizes"]}
    runs.finish_run(partial, config=config, inputs=inputs, fingerprint=fingerprint, clock=clock, extra=extra)
    runs.publish(partial, target)
    summary = {**stats, "seconds": clock.seconds(), "visualizations": [p.name for p in written]}
    runs.write_step_result(config.paths, "split_objectives", summary)


def _input_hashes(manifests: dict[str, dict[str, Any]]) -> dict[str, str]:
    """sha256 of every raw file, by source and name."""
    return {
        f"{source}/{name}": entry["sha256"]
        for source, manifest in manifests.items()
        for name, entry in manifest["files"].items()
    }


def _collect(data: DataConfig, paths: ArtifactPaths) -> PairCollection:
    """The pairs of every source of the approach."""
    builders = {
        "hh_rlhf": lambda files: hh_rlhf_pairs(files, data.hh_rlhf),
        "truthfulqa": lambda files: truthfulqa_pairs(files, data.truthfulqa),
        "pku_safe_rlhf": lambda files: pku_pairs(files, data.pku_safe_rlhf),
        "embedded": embedded_pairs,
        "own_pairs": lambda files: own_pairs(files, data.own_pairs),
    }
    collection = merge(builders[name](read_source(name, data, paths)) for name in required_sources(data))
    # U+FFFD stands where a character was lost by reading in a wrong encoding; published data holds a few, so they are kept.
    for pair in (item.pair for item in collection.pairs):
        if any(
            "\ufffd" in text for text in (pair.chosen, pair.rejected, *(m["content"] for m in pair.prompt))
        ):
            collection.counts["pairs_with_replacement_character"] += 1
    return collection


def _say_constant_prompts(collection: PairCollection) -> None:
    """Warn of an objective with one prompt alone: pairs are split by prompt, so all of them fall into one split."""
    counts = Counter(item.pair.objective for item in collection.pairs)
    prompts: dict[str, set[str]] = {objective: set() for objective in counts}
    for pair in (item.pair for item in collection.pairs):
        if len(prompts[pair.objective]) < 2:
            prompts[pair.objective].add(pair.prompt_key)
    for objective, count in counts.items():
        if count > 1 and len(prompts[objective]) == 1:
            logger.warning(
                "%s: all %d pairs have one prompt, %.60r, and pairs with one prompt share a split; give other prompts too",
                objective,
                count,
                *prompts[objective],
            )


def _split(collection: PairCollection, data: DataConfig) -> SplitResult:
    """Split, limit and check the pairs; an objective without training pairs is an error, another empty split a warning."""
    questions = collection.benchmark_questions or ()
    result = split_pairs(
        collection.pairs, data.splits, benchmark_questions=questions, objectives=data.objectives
    )
    whole, limited = result.pairs, limit_pairs(result.pairs, data.max_pairs_per_objective)
    result = replace(result, pairs=limited)
    for objective in limited:
        if removed := _total(whole[objective]) - _total(limited[objective]):
            result.drop(objective, "over_max_pairs_per_objective", removed)
    check_no_leak(result.pairs, questions)
    for objective, splits in result.pairs.items():
        for split, rows in splits.items():
            if not rows and split == "train":
                raise DataError(
                    f"data.approach {data.approach}: no training pair is left for {objective}; give more data, lower "
                    "data.splits fractions or data.truthfulqa.benchmark_fraction, or choose another approach; "
                    f"rows refused: {_refused(collection)}; pairs left out: {_listed(result.dropped)}; kept of {objective}: "
                    f"{', '.join(f'{name} {len(kept):,}' for name, kept in splits.items())}"
                )
            if not rows:
                logger.warning(
                    "%s/%s is empty: stages that need it will refuse; raise data.splits.%s_fraction or give more data",
                    objective,
                    split,
                    split,
                )
    return result


def _total(splits: Mapping[str, Sequence[Any]]) -> int:
    return sum(map(len, splits.values()))


def _stats(collection: PairCollection, result: SplitResult, approach: str) -> dict[str, Any]:
    """Sizes and everything left out, logged and kept in `stats.json`."""
    quarantined = Counter(row["reason"] for row in collection.quarantine)
    by_source = Counter(f"{row['source'].split(':')[0]} {row['reason']}" for row in collection.quarantine)
    sizes = sizes_of(result.pairs)
    kept = [pair for splits in result.pairs.values() for pairs in splits.values() for pair in pairs]
    if spelled := sum(pair.spells_control_tokens for pair in kept):
        collection.counts["pairs_that_spell_control_tokens"] = spelled
    for objective, splits in sizes.items():
        logger.info("%s: %s pairs", objective, ", ".join(f"{split} {splits[split]:,}" for split in SPLITS))
    logger.info("quarantined rows: %s", _refused(collection))
    logger.info("pairs left out: %s", _listed(result.dropped))
    if any(collection.counts.values()):
        logger.info("counts: %s", _listed(collection.counts))
    return {
        "approach": approach,
        "sizes": sizes,
        "quarantined": dict(sorted(quarantined.items())),
        "quarantined_by_source": dict(sorted(by_source.items())),
        "dropped": dict(sorted(result.dropped.items())),
        "counts": dict(sorted(collection.counts.items())),
    }


def _refused(collection: PairCollection) -> str:
    """Refused rows by reason, with the first of each: `unknown_label 3 (first mine:1: safer_response_id is 2, ...)`."""
    first = {row["reason"]: row for row in reversed(collection.quarantine)}
    counts = Counter(row["reason"] for row in collection.quarantine)
    return (
        ", ".join(
            f"{reason} {number:,} (first {': '.join(filter(None, (first[reason]['source'], first[reason].get('detail'))))})"
            for reason, number in counts.most_common()
        )
        or "none"
    )


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.most_common()) or "none"


def _write(directory: Path, pairs: SplitPairs, collection: PairCollection, stats: dict[str, Any]) -> None:
    for objective, splits in pairs.items():
        for split, rows in splits.items():
            io.write_jsonl(directory / objective / f"{split}.jsonl", (pair.to_row() for pair in rows))
    io.write_jsonl(directory / "quarantine.jsonl", collection.quarantine)
    io.write_json(directory / BENCHMARK_QUESTIONS_FILE, collection.benchmark_questions)
    io.write_json(directory / "stats.json", stats)


# ------------------------------------------------------------------ dry runs
def _say_what_would_be_fetched(name: str, data: DataConfig, paths: ArtifactPaths) -> None:
    try:
        plan = plan_source(name, data)
    except UserError as error:
        logger.warning("%s: %s", name, error)
        return
    for file in plan:
        logger.info(
            "%s: %s from %s to %s, about %.1f MB at most",
            name,
            file.label,
            getattr(getattr(data, name, None), "path", "the project" if name == "embedded" else "own files"),
            paths.raw(name) / (MANIFEST if name == "embedded" else file.name),
            file.size / 1e6,
        )


def _say_what_would_be_split(data: DataConfig, paths: ArtifactPaths) -> None:
    for name in required_sources(data):
        try:
            files = read_manifest(name, data, paths)["files"]
        except UserError as error:
            logger.warning("%s: %s", name, error)
            continue
        rows = sum(entry["rows"] for entry in files.values())
        logger.info("%s: would read %d files, %s rows", name, len(files), f"{rows:,}")
    logger.info(
        "would write {%s}/{%s}.jsonl, stats.json and quarantine.jsonl to %s, and sizes, lengths and examples to %s",
        ",".join(paths.objectives),
        ",".join(SPLITS),
        paths.processed,
        paths.visualizations,
    )
    logger.info("no model is loaded; memory is half a GiB and about three times the size of the raw files")
