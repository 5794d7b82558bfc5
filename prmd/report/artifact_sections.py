"""What the report says of data, reward models, policies and runs: artifacts in, text and tables for the template out.

What lives here: one function per section, each of which states a missing part as the command that makes it instead of
failing, and the readers all sections share. What does not: the sections of stage 4 (`evaluation_sections`, to be read
next), figures and the page (`page`), how numbers are written (`tables`).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths, reward_model_command, stage_command
from prmd.config.evaluation import BenchmarksConfig
from prmd.errors import DataError
from prmd.report.tables import (
    DOWN,
    NOTHING,
    SIGNIFICANT,
    UP,
    Table,
    as_text,
    flat,
    format_estimate,
    format_number,
    format_seconds,
    with_mark,
)

Section = dict[str, Any]


def load(path: Path, kind: type = dict) -> Any:
    """The JSON of `path`, or None where it is not there, cannot be read or is of another kind: all of it is missing."""
    try:
        found = io.read_json(path) if path.exists() else None
    except DataError:
        return None
    return found if isinstance(found, kind) else None


def load_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON Lines file; none where it is missing or unreadable."""
    try:
        return io.read_jsonl(path) if path.exists() else []
    except DataError:
        return []


def missing(paths: ArtifactPaths, command: str) -> str:
    """The command that makes what is not there yet."""
    return f"{command} data.approach={paths.approach}"


def folders(parent: Path) -> list[Path]:
    """Published folders of `parent` by name; half-written ones begin with a dot."""
    if not parent.exists():
        return []
    return sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith("."))


def benchmark_names(paths: ArtifactPaths) -> list[str]:
    """The benchmarks there are by default, then those that others bring along and that wrote results."""
    written = sorted(folder.name for folder in (paths.outputs / "benchmarks").glob("*") if folder.is_dir())
    return list(dict.fromkeys([*BenchmarksConfig().run, *written]))


# ------------------------------------------------------------------ what was run
def runs_section(paths: ArtifactPaths) -> Section:
    """Every run.json of this approach: seconds, commit, device, seed; and the configurations they ran with."""
    found = [(what, folder, load(folder / "run.json")) for what, folder in _run_folders(paths)]
    done = [(what, folder, run) for what, folder, run in found if run]
    seconds = [_seconds(what, folder, run) for what, folder, run in done]
    rows = tuple(
        (what, format_seconds(s), *_run_cells(run)) for (what, _, run), s in zip(done, seconds, strict=True)
    )
    total = sum(s for (what, _, _), s in zip(done, seconds, strict=True) if not what.startswith(_JUDGE))
    columns = ("part", "time", "commit", "content key", "device", "seed", "peak memory")
    hardware = next((run["hardware"] for _, _, run in done if run.get("hardware")), None)
    versions = next((run["versions"] for _, _, run in done if run.get("versions")), {})
    return {
        "table": Table(
            columns,
            rows,
            f"Together {format_seconds(total)}: judges are part of the evaluation's time, and the sampling and scoring that "
            "policies share is in none of these. Read from the files of each part.",
        ),
        "missing": None if done else missing(paths, "python run_pipeline.py"),
        "hardware": flat(hardware) if hardware else "",
        "versions": flat(versions),
        "configs": _configs(done),
    }


def _run_folders(paths: ArtifactPaths) -> Iterable[tuple[str, Path]]:
    yield "data", paths.processed
    for objective in paths.objectives:
        yield f"reward model: {objective}", paths.reward_model(objective)
    for folder in folders(paths.policies):
        yield f"policy: {folder.name}", folder
    for objective in paths.objectives:
        yield f"{_JUDGE}{objective}", paths.judge(objective)
    yield "evaluation", paths.metrics
    for name in benchmark_names(paths):
        yield f"{_BENCHMARK}{name}", paths.benchmark(name)


_JUDGE, _BENCHMARK = "judge: ", "benchmark: "


def _seconds(what: str, folder: Path, run: dict[str, Any]) -> float:
    """Seconds of a part; of a benchmark those of all methods, for all benchmarks run in one pass."""
    if not what.startswith(_BENCHMARK):
        return run.get("seconds") or 0.0
    results = [load(path) for path in folder.glob("*.json") if path.name != "run.json"]
    return sum((result or {}).get("seconds") or 0.0 for result in results)


def _run_cells(run: dict[str, Any]) -> tuple[str, ...]:
    commit = str(run.get("commit") or "")[:10] or NOTHING
    memory = run.get("peak_memory_bytes")
    return (
        commit + (" + changes" if run.get("dirty") else ""),
        str(run.get("fingerprint") or NOTHING),
        str(run.get("device") or NOTHING),
        str(run.get("seed", NOTHING)),
        f"{memory / 2**30:.1f} GiB" if memory else NOTHING,
    )


def _configs(done: list[tuple[str, Path, dict[str, Any]]]) -> list[dict[str, str]]:
    """The distinct configurations, each named by the parts that ran with it."""
    texts: dict[str, list[str]] = {}
    for what, folder, _ in done:
        path = folder / "config.yaml"
        if path.exists():
            texts.setdefault(path.read_text(encoding="utf-8"), []).append(what)
    return [{"name": ", ".join(names), "text": text} for text, names in texts.items()]


# ------------------------------------------------------------------ reward models and policies
def reward_models_section(paths: ArtifactPaths) -> Section:
    """One column per objective; what is missing is named with its command."""
    models = {
        k: (load(paths.reward_analysis / f"{k}.json") or {})  # with examples; the other is written last
        | (load(paths.reward_model(k) / "metrics.json") or {})
        for k in paths.objectives
    }
    lacking = [missing(paths, reward_model_command(k)) for k, m in models.items() if not m]
    present = {
        k: m | {"calibration": load(paths.reward_model(k) / "calibration.json")}
        for k, m in models.items()
        if m
    }
    rows = tuple((label, *(read(m) for m in present.values())) for label, read in _REWARD_ROWS)
    examples = [
        {"objective": k, "title": title, "rows": m[key]}
        for k, m in present.items()
        for key, title in (("top", "largest margins"), ("bottom", "smallest margins"))
        if m.get(key)
    ]
    caption = (
        "Held-out test pairs; brackets: 95 % intervals. Length only: the longer response is called better."
    )
    for objective, m in present.items():
        if source := m.get("brought"):
            caption += f" The reward of {objective} is brought, not trained: {flat(source)}."
    table = Table(("measure", *present), rows, caption) if present else None
    return {
        "table": table,
        "debias": _debias_table(present),
        "scan": _scan_table(present),
        "missing": lacking,
        "examples": examples,
    }


def _debias_table(models: dict[str, dict[str, Any]]) -> Table | None:
    """What was held to be a bias of which labels, and what debiasing reached; None where nothing was named."""
    rows = tuple(
        (
            f"{objective}: {name}",
            format_estimate(one["share"]),
            *(format_estimate(one[column]) for column in ("sign", "size")),
            f"{_from_to(found['member_strengths'])}, {_from_to(found['member_strengths_reached'])}",
            format_number(one["slope"]),
            _from_to(one["member_slopes"]),
            with_mark(metrics.get("accuracy")),
            with_mark(one["balanced_accuracy"]),
        )
        for objective, metrics in models.items()
        if (found := metrics.get("debias"))
        for name, one in found["features"].items()
    )
    columns = (
        *("feature", "chosen has more", "b, having more", "b, size", "strength of members: asked, reached"),
        *("slope of the reward model", "slopes of members", "accuracy", "accuracy, balanced by the feature"),
    )
    caption = (
        "Features held to be a bias of the labels (debias.features). Chosen has more: share of the training pairs that differ. "
        "b: log-odds with which the feature alone predicts the label, the size in root mean squares. Strength: 0 keeps all of "
        "it in the margins, 1 none; reached: on held-out pairs, first and last member. Slope: of held-out margins on the "
        "size. Balanced: the chosen response has more in half of the pairs; a model that follows the feature alone gets ½."
    )
    return Table(columns, rows, caption) if rows else None


def _from_to(values: list[Any]) -> str:
    first, last = (format_estimate(values[i]) for i in (0, -1))
    return first if len(values) == 1 else f"{first} to {last}"


def _scan_table(models: dict[str, dict[str, Any]]) -> Table | None:
    """How often the chosen response has more of each feature, named or not."""
    scans = {
        objective: metrics["feature_scan"]
        for objective, metrics in models.items()
        if metrics.get("feature_scan")
    }
    names = tuple(dict.fromkeys(name for scan in scans.values() for name in scan))
    rows = tuple(
        (name.replace("_", " "), *(_scanned(scan.get(name)) for scan in scans.values())) for name in names
    )
    caption = (
        "Share of the training pairs that differ in a feature in which the chosen response has more of it. ↑ ↓: p < .05 for ½ "
        "after Holm's correction over the features. A strong association is a bias of the labels or what the objective asks "
        "for; only a person knows."
    )
    return Table(("feature", *scans), rows, caption) if rows else None


def _scanned(share: dict[str, Any] | None) -> str:
    if not share:
        return NOTHING
    mark = "" if share["p_holm"] >= SIGNIFICANT else UP if share["value"] > 0.5 else DOWN
    return f"{format_estimate(share)} {mark}".rstrip() + f" (n = {share['n']})"


def _sizes(metrics: dict[str, Any]) -> str:
    return " / ".join(
        str((metrics.get("sizes") or {}).get(s, NOTHING)) for s in ("train", "fit", "val", "test")
    )


def _calibration(metrics: dict[str, Any]) -> str:
    fit = (metrics.get("calibration") or {}).get("calibration") or {}
    scale = fit.get("scale") or []
    if not scale:
        return "not there yet"
    spread = f"s {format_number(min(scale))} to {format_number(max(scale))}"
    return f"{spread} over members, {fit.get('n_prompts', '?')} prompts"


def _accuracy(key: str) -> Any:
    def read(metrics: dict[str, Any]) -> str:
        estimate = metrics.get(key) or {}
        return (
            f"{with_mark(estimate)} (n = {estimate['n']}, ties {estimate.get('ties', 0)})"
            if estimate
            else NOTHING
        )

    return read


FEW_MISTAKES = 5
"""Wrong (or right) pairs below which nothing is said of whether disagreement foretells mistakes."""


def _disagreement(key: str, *, neutral: float) -> Any:
    def read(metrics: dict[str, Any]) -> str:
        found = metrics.get("disagreement") or {}
        bins = found.get("bins") or []
        n, right = sum(b["n"] for b in bins), round(sum(b["n"] * b["accuracy"] for b in bins))
        rarer = min(right, n - right)
        if found.get(key) and bins and rarer < FEW_MISTAKES:
            return f"not told: {rarer} {'wrong' if right > n - right else 'right'} of {n} pairs"
        return with_mark(found.get(key), neutral)

    return read


def _raw_and_calibrated(key: str, digits: int) -> Any:
    """Of r_0's margins as they are, and of the mean member's in calibrated units."""

    def read(metrics: dict[str, Any]) -> str:
        after = metrics.get("calibrated") or {}
        return f"{format_number(metrics.get(key), digits)} / {format_number(after.get(key), digits)}"

    return read


_REWARD_ROWS = (
    ("accuracy of the reward model", _accuracy("accuracy")),
    ("accuracy of the mean member", _accuracy("mean_member_accuracy")),
    ("the same, the longer chosen in half", lambda m: with_mark(m.get("length_balanced_accuracy"))),
    ("accuracy of length only", _accuracy("length_only_accuracy")),
    (
        "expected calibration error, raw / calibrated rewards",
        _raw_and_calibrated("expected_calibration_error", 3),
    ),
    ("log-odds per unit of reward, raw / calibrated", _raw_and_calibrated("log_odds_slope", 2)),
    ("members", lambda m: str(m.get("members", NOTHING))),
    ("correlation between members", lambda m: format_number(m.get("member_correlation"))),
    (
        "the same on reference samples",
        lambda m: format_number(m.get("member_correlation_reference_samples")),
    ),
    ("disagreement with error, rank correlation", _disagreement("mistake_correlation", neutral=0.0)),
    ("wrong pairs disagree more than right ones, AUC", _disagreement("auc", neutral=0.5)),
    ("calibration for minima", _calibration),
    ("pairs: train / fit heads / val / test", _sizes),
    (
        "pairs dropped / prompts truncated",
        lambda m: f"{m.get('dropped', NOTHING)} / {m.get('truncated', NOTHING)}",
    ),
)


# ------------------------------------------------------------------ data
def data_section(paths: ArtifactPaths) -> Section:
    """Split sizes, rows refused and pairs left out with their reasons, and the random examples."""
    stats = load(paths.processed / "stats.json") or {}
    sizes = stats.get("sizes") or (load(paths.visualizations / "sizes.json") or {}).get("objectives") or {}
    if not sizes:
        return {"missing": missing(paths, stage_command("split_objectives"))}
    splits = tuple(dict.fromkeys(split for row in sizes.values() for split in row))
    rows = tuple((k, *(f"{row.get(s, 0):,}" for s in splits)) for k, row in sizes.items())
    left_out = tuple(
        (kind, reason, f"{count:,}")
        for key, kind in (("quarantined", "row refused"), ("dropped", "pair left out"))
        for reason, count in (stats.get(key) or {}).items()
        if count
    )
    examples = {k: load(paths.visualizations / f"examples_{k}.json", list) or [] for k in paths.objectives}
    caption = "Every refused row lies in quarantine.jsonl beside the splits."
    return {
        "missing": None,
        "table": Table(
            ("objective", *splits), rows, "Preference pairs per split; no prompt is in two splits."
        ),
        "left_out": Table(("what", "why", "count"), left_out, caption) if left_out else None,
        "rows": _rows_table(stats.get("rows") or {}, splits),
        "weights": _weights_table(stats.get("weights") or {}),
        "told": [f"{k}: {sentence}." for k, sentence in (stats.get("can_be_told") or {}).items()],
        "examples": [{"objective": k, "rows": [_example(r) for r in v]} for k, v in examples.items() if v],
    }


def _weights_table(weights: dict[str, dict[str, Any]]) -> Table | None:
    """The weights of training pairs; None where no objective has any."""
    rows = tuple(
        (
            objective,
            f"{found['pairs']:,}",
            *(format_number(found[key], 3) for key in ("min", "mean", "max")),
            f"{format_number(found['effective_pairs'], 0)} ({found['effective_pairs'] / found['pairs']:.0%})",
        )
        for objective, found in weights.items()
    )
    caption = (
        "Weights of the training pairs as they were given; trainings divide them by their mean. They count as: Kish's effective "
        "number (Σw)² / Σw², the pairs of equal weight that would be as certain."
    )
    columns = ("objective", "pairs with a weight", "smallest", "mean", "largest", "they count as")
    return Table(columns, rows, caption) if rows else None


def _rows_table(rows: dict[str, Any], splits: tuple[str, ...]) -> Table | None:
    """What became of every row of each objective; None where its rows were not of one objective each."""

    def counted(reasons: dict[str, int]) -> str:
        said = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items() if count)
        return f"{sum(reasons.values()):,}" + (f" ({said})" if said else "")

    cells = tuple(
        (
            objective,
            f"{row['read']:,}",
            *(counted(row[key]) for key in ("refused", "left_out")),
            *(f"{row['kept'].get(split, 0):,}" for split in splits),
        )
        for objective, row in rows.items()
    )
    columns = ("objective", "read", "refused", "left out", *splits)
    return (
        Table(columns, cells, "What became of every row: read = refused + left out + kept.")
        if cells
        else None
    )


def _example(row: dict[str, Any]) -> dict[str, str]:
    return {part: as_text(row.get(part)) for part in ("prompt", "chosen", "rejected")}
