"""Rows of the run at full size in words: a line as each is measured, and a page of Markdown for a card."""

from collections.abc import Sequence
from typing import Any

from prmd.runtime import GIB

Row = dict[str, Any]
HEAD = ("| stage | phase | seconds | |", "|---|---|---:|---|")
PHASES = {
    "make": "random weights made and saved",
    "prepare": "pairs written, fetched and split",
    "held": "weights of the training model",
    "check": "the optimizer's progress and the attention's mask are tried",
    "plan": "memory planned",
    "tokenize": "pairs tokenized",
    "load": "a model read from the disk to the device",
    "first_step": "the first optimizer step",
    "compile": "what the first steps took beyond as many later ones",
    "step": "an optimizer step, median",
    "save": "weights and optimizer states written",
    "hash": "sha256 of files",
    "score": "rewards or log-probabilities of responses",
    "sample": "responses sampled",
    "total": "the whole stage",
    "cut": "stopped",
    "skipped": "not begun",
    "failed": "ended by an error",
}
"""What a row's phase is; those of a whole stage come last."""


def line(row: Row) -> str:
    """A row as one line of the table."""
    return (
        f"| {row['stage']} | {row['phase']} | {row['seconds']:.3g} | {PHASES[row['phase']]}{_details(row)} |"
    )


def _details(row: Row) -> str:
    said = [text for text in (_work(row), _memory(row), _parts(row), row.get("note")) if text]
    return f": {'; '.join(said)}" if said else ""


def _work(row: Row) -> str:
    parts = []
    if "share_of_each" in row:
        shares = ", ".join(f"{share:.1%}" for share in row["share_of_each"])
        parts.append(f"{row['parameters']:,}, of which the processes hold {shares}")
    if "bytes" in row:
        parts.append(f"{row['bytes'] / 1e9:.2f} GB")
    if "steps" in row:
        parts.append(f"{row['steps']} steps")
    if "slowest" in row:
        parts.append(f"{row['fastest']:.3g} to {row['slowest']:.3g} s")
    if "tokens_per_second" in row:
        parts.append(
            f"{row['tokens_per_second']:,.0f} tokens per second, {row['tokens_per_step']:,.0f} a step"
        )
    elif "tokens" in row:
        parts.append(f"{row['tokens']:,} tokens, {row['tokens'] / row['seconds']:,.0f} per second")
    if "counted_parameters" in row:
        share = f"{row['mfu']:.3f}" if row["mfu"] else "left out, the peak of this device is not known"
        parts.append(f"MFU {share} (N {row['counted_parameters']:,})")
    return "; ".join(parts)


def _memory(row: Row) -> str:
    if "planned_bytes" not in row:
        return ""
    peak = f"peak {row['peak_bytes'] / GIB:.2f} GiB" if row["peak_bytes"] else "peak not measured on a CPU"
    planned = row["planned_bytes"]
    return f"{peak}, {planned / GIB:.2f} planned" if planned else f"{peak}, TRL's is not planned"


def _parts(row: Row) -> str:
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in row.get("parts", {}).items())


def page(rows: Sequence[Row]) -> str:
    """All rows of a card, by run."""
    lines = [
        f"# The full size on {rows[0]['card']}",
        "",
        "`python benchmarks/full_size.py`: the stages themselves, on a model of random weights. Tokens are those that were",
        "processed, without padding; MFU is 6 N tokens over seconds and the card's dense bfloat16 peak, N without the input",
        "embedding matrix, recomputed layers not counted (`benchmarks/side_by_side/mfu.py`). A phase of less than a tenth of a",
        "second is in the whole stage's row alone.",
    ]
    for run in dict.fromkeys(row["run"] for row in rows):
        own = [row for row in rows if row["run"] == run]
        lines += ["", f"## {run}", "", setting(own[0]), "", *HEAD, *(line(row) for row in own)]
    return "\n".join(lines) + "\n"


def setting(row: Row) -> str:
    """What the rows of a run have in common."""
    cap = f"capped at {row['cap_gib']:g} GiB" if row["cap_gib"] else "no card"
    used = [f"{name} {row[name]}" for name in ("torch", "transformers", "trl", "torchao", "driver")]
    changed = " with changes" if row["dirty"] else ""
    return (
        f"Shape {row['shape']}, {row['processes']} process(es), {cap}; {row['pairs']}; {', '.join(used)}; "
        f"commit {row['commit']}{changed}."
    )
