"""Figures: that they are written from their files alone, hold what the file holds and leave nothing behind."""

import itertools
import math
import struct
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from synthetic_evaluation import METHODS, estimate
from synthetic_outputs import write_outputs

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.report import figures
from prmd.report.evaluation_figures import ellipse_95, plot_metrics
from prmd.report.figures import (
    PALETTE,
    canvas,
    plot_length_distributions,
    plot_policy_training,
    plot_split_sizes,
)
from prmd.report.reward_figures import plot_reward_model
from prmd.statistics.intervals import wilson_interval
from prmd.statistics.reliability import disagreement_measures, merged_bins, reliability_bins


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> ArtifactPaths:
    return write_outputs(tmp_path_factory.mktemp("outputs"))


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_split_sizes_lie_beside_their_file(paths: ArtifactPaths) -> None:
    written = plot_split_sizes(paths.visualizations / "sizes.json")
    assert written == paths.visualizations / "sizes.png"
    assert png_size(written)[0] == 736  # 4.6 inches at 160 dots: sharp at twice 390 pixels less the margins


def test_lengths_in_tokens_only_where_they_were_counted(paths: ArtifactPaths, tmp_path: Path) -> None:
    source = paths.visualizations / "lengths.json"
    assert [p.name for p in plot_length_distributions(source)] == [
        "lengths_words.png",
        "lengths_characters.png",
        "lengths_tokens.png",
    ]
    lengths = io.read_json(source)
    for units in lengths["objectives"].values():
        units["tokens"] = units["characters"] = None
    io.write_json(tmp_path / "lengths.json", lengths)
    assert [p.name for p in plot_length_distributions(tmp_path / "lengths.json")] == ["lengths_words.png"]


def test_lengths_of_an_empty_objective(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    empty = {"prompt": [], "chosen": [], "rejected": []}
    io.write_json(tmp_path / "lengths.json", {"objectives": {"helpful": {"words": empty}}})
    assert png_size(plot_length_distributions(tmp_path / "lengths.json")[0])
    assert not recwarn.list


def test_reward_model_draws_what_the_file_holds(paths: ArtifactPaths, tmp_path: Path) -> None:
    source = paths.reward_analysis / "helpful.json"
    names = [p.stem for p in plot_reward_model(source)]
    assert names == [
        f"helpful_{n}" for n in ("rewards", "margins", "reliability", "members", "disagreement", "curve")
    ]
    analysis = io.read_json(source)
    analysis["member_correlation_matrix"], analysis["disagreement"] = [[1.0]], None
    for curve in ([], analysis["curve"][:1]):
        io.write_json(tmp_path / "honest.json", analysis | {"curve": curve})
        names = [p.stem for p in plot_reward_model(tmp_path / "honest.json")]
        assert names == ["honest_rewards", "honest_margins", "honest_reliability"]


@pytest.mark.parametrize("pairs", [1, 2, 7, 2000])
def test_disagreement_is_drawn_for_any_number_of_pairs(
    pairs: int, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    members = np.random.default_rng(pairs).normal(0.5, 1.0, (5, pairs))
    measures = disagreement_measures(members, n_resamples=100).to_json()
    io.write_json(tmp_path / "helpful.json", {"objective": "helpful", "disagreement": measures})
    (figure,) = plot_reward_model(tmp_path / "helpful.json")
    assert figure.name == "helpful_disagreement.png" and png_size(figure)[0] == 736
    assert not recwarn.list


def test_policy_without_targets_has_one_figure(paths: ArtifactPaths, tmp_path: Path) -> None:
    def drawn(method: str) -> list[str]:
        return [p.stem for p in plot_policy_training(paths.policy(method) / "metrics.json", tmp_path)]

    assert drawn("dpo") == ["policy_dpo_training"]
    assert drawn("hard_min") == ["policy_hard_min_training", "policy_hard_min_targets"]


def test_metrics_figures(paths: ArtifactPaths) -> None:
    names = [p.stem for p in plot_metrics(paths.metrics / "comparison.json")]
    assert names == [
        "win_rates",
        "worst_objective",
        "kl_frontier",
        "pareto",
        "over_optimisation",
        "length_win_rate",
        "radar",
    ]
    assert sorted(p.stem for p in paths.metrics.glob("*.png")) == sorted(names)
    assert sorted(p.stem for p in paths.metrics.glob("*.svg")) == sorted(names)


def test_metrics_without_intervals_kl_or_second_objective(tmp_path: Path) -> None:
    rows = [{"method": m, "win_rate": {"helpful": estimate(0.6, 0.1)}, "kl": None} for m in METHODS]
    io.write_json(tmp_path / "comparison.json", {"rows": rows})
    assert [p.stem for p in plot_metrics(tmp_path / "comparison.json")] == ["win_rates"]
    io.write_json(tmp_path / "comparison.json", {"rows": [{"method": "reference", "win_rate": {}}]})
    assert plot_metrics(tmp_path / "comparison.json") == []


def test_nothing_of_a_figure_lies_on_something_else(
    paths: ArtifactPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tick labels of an axis are apart, legends below all panels, and nothing is cut off at an edge."""
    drawn: list[Figure] = []

    def kept(*arguments: Any, **keywords: Any) -> Figure:
        drawn.append(Figure(*arguments, **keywords))
        return drawn[-1]

    monkeypatch.setattr(figures, "Figure", kept)
    plot_metrics(paths.metrics / "comparison.json")
    plot_reward_model(paths.reward_analysis / "helpful.json")
    plot_policy_training(paths.policy("hard_min") / "metrics.json", tmp_path)
    plot_length_distributions(paths.visualizations / "lengths.json")
    plot_split_sizes(paths.visualizations / "sizes.json")
    assert len(drawn) == 7 + 6 + 2 + 3 + 1
    for figure in drawn:
        canvas_of = FigureCanvasAgg(figure)
        canvas_of.draw()
        renderer, name = canvas_of.get_renderer(), figure.axes[0].get_title(loc="left")
        whole = figure.get_tightbbox(renderer).transformed(figure.dpi_scale_trans)
        assert whole.x0 >= -1 and whole.x1 <= figure.bbox.x1 + 1 and whole.y0 >= -1, name
        bottom = min(axes.get_tightbbox(renderer).y0 for axes in figure.axes)
        assert all(legend.get_window_extent(renderer).y1 <= bottom + 1 for legend in figure.legends), name
        assert not any(axes.get_legend() for axes in figure.axes)
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            labels = [text for text in axis.get_ticklabels() if text.get_visible() and text.get_text()]
            boxes = [text.get_window_extent(renderer) for text in labels]
            assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2)), name


def test_drawn_bins_of_reliability_hold_enough_pairs() -> None:
    margins = np.random.default_rng(3).normal(0.6, 1.0, 64)
    fine = reliability_bins(margins)
    bins = merged_bins(fine, least=15)
    assert [b["n"] for b in fine] == [7, 7, 7, 7, 6, 6, 6, 6, 6, 6] and [b["n"] for b in bins] == [21, 19, 24]
    nearest = np.argsort(np.abs(margins))[:21]  # the least confident pairs
    found = wilson_interval(float((margins[nearest] > 0).sum()), 21)
    assert bins[0] == pytest.approx(
        {"confidence": (1 / (1 + np.exp(-np.abs(margins[nearest])))).mean(), "n": 21}
        | {"accuracy": found.value, "low": found.low, "high": found.high}
    )
    assert [b["n"] for b in merged_bins(reliability_bins(margins[:9]), least=15)] == [9]


def test_figures_depend_on_the_file_alone(paths: ArtifactPaths, tmp_path: Path) -> None:
    source = paths.reward_analysis / "helpful.json"
    copies = (io.write_json(tmp_path / folder / source.name, io.read_json(source)) for folder in "ab")
    first, second = map(plot_reward_model, copies)
    for kind in (".png", ".svg"):
        one, other = ([p.with_suffix(kind).read_bytes() for p in drawn] for drawn in (first, second))
        assert one == other


def test_nothing_is_left_open_or_changed(paths: ArtifactPaths) -> None:
    before = dict(matplotlib.rcParams)
    plot_split_sizes(paths.visualizations / "sizes.json")
    assert dict(matplotlib.rcParams) == before
    assert matplotlib._pylab_helpers.Gcf.get_all_fig_managers() == []


def test_a_failed_drawing_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), canvas(tmp_path / "x.png"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_ellipse_covers_the_mean_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.6], [0.6, 2.0]])
    inside = 0
    for _ in range(400):
        scores = rng.multivariate_normal([0.3, -0.2], covariance, size=80)
        outline = ellipse_95(scores[:, 0].tolist(), scores[:, 1].tolist())
        inside += point_in_polygon(outline, (0.3, -0.2))
    assert abs(inside / 400 - 0.95) < 0.035  # three standard errors of 400 trials


def test_ellipse_of_independent_scores_has_known_half_axes() -> None:
    scores = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    outline = ellipse_95(scores[:, 0].tolist(), scores[:, 1].tolist())
    half = [math.sqrt(-2 * math.log(0.05) * variance / 4) for variance in (2 / 3, 8 / 3)]
    assert np.abs(outline).max(axis=1) == pytest.approx(half, rel=2e-3)


def test_ellipse_leaves_out_incomplete_prompts() -> None:
    assert ellipse_95([0.1, None, 0.3], [0.2, 0.4, None]) is None


def point_in_polygon(outline: np.ndarray, point: tuple[float, float]) -> bool:
    """Winding number of the outline around the point."""
    angles = np.unwrap(np.arctan2(outline[1] - point[1], outline[0] - point[0]))
    return abs(angles[-1] - angles[0]) > math.pi


def test_palette_differs_for_colour_blind_eyes() -> None:
    """Every two colours differ in what deuteranopes still see: blue-yellow and lightness."""
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in PALETTE])
    seen = np.stack([0.299 * rgb[:, 0] + 0.587 * rgb[:, 1] + 0.114 * rgb[:, 2], rgb[:, 2]], axis=1)
    distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.eye(len(seen))
    assert distances.min() > 0.1
