"""One self-contained page of everything that was measured, `outputs/report/index.html`, and the headline table as files.

    path = build_report(config.paths)

What lives here: drawing and embedding the figures, their alternative texts, rendering. What does not: what sections say
(`artifact_sections` and what ends like it) and the layout (`template.html`, in which every value is escaped). The
page asks nothing of the network and is a pure function of the files.
"""

import base64
import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.report.artifact_sections import (
    data_section,
    folders,
    load,
    reward_models_section,
    runs_section,
)
from prmd.report.benchmark_sections import benchmarks_section
from prmd.report.evaluation_figures import plot_metrics
from prmd.report.evaluation_sections import (
    EMBEDDED_CAVEAT,
    approaches_section,
    gate_section,
    headline_section,
    limits_section,
    samples_section,
)
from prmd.report.figures import (
    for_dark_pages,
    plot_length_distributions,
    plot_policy_training,
    plot_split_sizes,
)
from prmd.report.measures import headline_csv, measures_csv
from prmd.report.policy_sections import policies_section
from prmd.report.reward_figures import plot_reward_model
from prmd.report.tables import cell_parts, format_number, to_latex, to_markdown

logger = logging.getLogger(__name__)

_TEMPLATE = Path(__file__).with_name("template.html")


@dataclass(frozen=True)
class Figure:
    """One image of the page.

    Attributes:
        name: of its file.
        source: a data URI.
        dark: the same for dark pages.
        told: what it shows, also for who cannot see it, and how to read it.
    """

    name: str
    source: str
    dark: str
    told: str


_FIGURE_TEXTS = {
    "win_rates": (
        "Win rate of each policy per objective",
        "Bars start at ½, no change against the reference.",
    ),
    "worst_objective": (
        "Worst-objective win rate of each policy",
        "The band: lowest lower to lowest upper end over objectives.",
    ),
    "kl_frontier": (
        "Worst-objective win rate and mean of the minimum against KL",
        "Up is better, left is closer to the reference; small dots are checkpoints on the way, where they were sampled.",
    ),
    "over_optimisation": (
        "Gains of the best of n reference samples by the proxy that chose it and by the judges",
        "Where the proxy rises and the judges do not, choosing harder by the proxy is over-optimisation.",
    ),
    "pareto": (
        "Win rate on the first against the second objective",
        "95 % ellipses of the mean over prompts.",
    ),
    "length_win_rate": (
        "Worst-objective win rate against length",
        "Judges often like length; look for a slope.",
    ),
    "radar": ("Win rates on a wheel", "For orientation only: no intervals. Read the bars."),
    "sizes": ("Preference pairs per objective and split", "Judge pairs train only the evaluation's judges."),
    "lengths_words": ("Length distributions in words", "Chosen and rejected should lie close together."),
    "lengths_characters": (
        "Length distributions in characters",
        "Chosen and rejected should lie close together.",
    ),
    "lengths_tokens": ("Length distributions in tokens", "Chosen and rejected should lie close together."),
    "rewards": (
        "Rewards of chosen and rejected responses",
        "The wider apart, the better they are told apart.",
    ),
    "margins": ("Reward margins of held-out pairs", "Right of zero the reward model agrees with the label."),
    "reliability": ("Accuracy against confidence", "Below the dashed line the model is too sure of itself."),
    "members": ("Correlation between ensemble members", "All near 1 would be one model, not an ensemble."),
    "disagreement": (
        "Accuracy against the members' disagreement",
        "Where disagreement foretells mistakes, accuracy falls to the right.",
    ),
    "curve": ("Held-out loss and accuracy over training", "The best checkpoint is the one that is kept."),
    "training": ("Loss and margins over training", "Implicit margins move towards the targets."),
    "targets": ("Histogram of target margins", "What training aims at; a spike at either end is clipping."),
}
"""By the last part of the file name: what it shows, and how to read it."""


def build_report(paths: ArtifactPaths) -> Path:
    """Draw every figure, write the page, and its tables of results as `tables.md`, `.csv`, `.tex` and `measures.csv` beside it.

    `tables.md` and `.tex` hold the evaluation's and the benchmarks' tables, the other two the evaluation's numbers.

    Args:
        paths: of the approach to report; other approaches are compared where their evaluation is the same.

    Returns:
        Path of the page. What is not there yet is stated on it with the command that makes it.
    """
    headline = headline_section(paths)
    methods = [row["method"] for row in headline["rows"]]
    view = {
        "approach": paths.approach,
        "caveat": EMBEDDED_CAVEAT if paths.approach == "embedded" else "",
        "runs": runs_section(paths),
        "headline": headline,
        "approaches": approaches_section(paths),
        "benchmarks": benchmarks_section(paths),
        "reward_models": reward_models_section(paths),
        "gate": gate_section(paths),
        "policies": policies_section(paths),
        "data": data_section(paths),
        "samples": samples_section(paths, methods),
        "limits": limits_section(paths, headline),
        "figures": draw_figures(paths),
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["number"] = format_number
    environment.filters["parts"] = cell_parts
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # objectives in their own order
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    io.write_text(paths.report, template.render(view))
    _write_tables(paths.report.parent, headline, view["benchmarks"])
    logger.info("report: %s (%.1f MB)", paths.report, paths.report.stat().st_size / 1e6)
    return paths.report


def _write_tables(directory: Path, headline: dict[str, Any], benchmarks: dict[str, Any]) -> None:
    if headline["missing"]:
        return
    tables = {"Result": headline["table"], "Who judged": headline["judges"], **headline["tables"]}
    tables |= {"Benchmarks": benchmarks["table"], **benchmarks["folded"]}
    found = {name: table for name, table in tables.items() if table}
    markdown = (f"## {name}\n\n{to_markdown(table)}" for name, table in found.items())
    io.write_text(directory / "tables.md", "\n".join(markdown))
    latex = (f"% {name}\n{to_latex(table)}" for name, table in found.items())
    io.write_text(directory / "tables.tex", "\n".join(latex))
    io.write_text(directory / "tables.csv", headline_csv(headline["rows"]))
    every = measures_csv(headline["measures"], headline["samples_per_prompt"])
    io.write_text(directory / "measures.csv", every)


# ------------------------------------------------------------------ figures
def draw_figures(paths: ArtifactPaths) -> dict[str, list[Figure]]:
    """Draw anew every figure whose file is there; keys `data`, `rewards.reward_model`, `policies`, `metrics`."""
    shown = paths.visualizations
    return {
        "data": [
            *_figures(plot_split_sizes, shown / "sizes.json"),
            *_figures(plot_length_distributions, shown / "lengths.json"),
        ],
        "reward_models": [
            figure
            for k in paths.objectives
            for figure in _figures(plot_reward_model, paths.reward_analysis / f"{k}.json")
        ],
        "policies": [
            figure
            for folder in folders(paths.policies)
            for figure in _figures(plot_policy_training, folder / "metrics.json", shown)
        ],
        "metrics": list(_figures(plot_metrics, paths.metrics / "comparison.json")),
    }


def _figures(draw: Callable[..., Path | list[Path]], source: Path, *directory: Path) -> Iterable[Figure]:
    if not load(source):
        return
    drawn = draw(source, *directory)
    for path in [drawn] if isinstance(drawn, Path) else drawn:
        yield embed(path)


def embed(path: Path) -> Figure:
    """The drawing beside this PNG as data URIs with its texts; a name like helpful_margins is told by its last part.

    Where there is no such drawing that could be read, the PNG itself.
    """
    key = path.stem if path.stem in _FIGURE_TEXTS else path.stem.rpartition("_")[2]
    shows, reading = _FIGURE_TEXTS[key]
    owner = "" if key == path.stem else path.stem.removesuffix(f"_{key}").removeprefix("policy_") + ": "
    told = f"{owner}{shows}. {reading}"
    try:
        svg = _rounded(path.with_suffix(".svg").read_text(encoding="utf-8"))
        sources = [_uri("svg+xml", text.encode("utf-8")) for text in (svg, for_dark_pages(svg))]
    except (OSError, UnicodeDecodeError):
        sources = [_uri("png", path.read_bytes())] * 2
    return Figure(path.stem, *sources, told)


def _rounded(svg: str) -> str:
    """The drawing with two decimals in its outlines, a hundredth of a point, which is a third of its size less."""
    return re.sub(r' d="[^"]*"', lambda outline: re.sub(r"(\.\d\d)\d+", r"\1", outline[0]), svg)


def _uri(kind: str, image: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"
