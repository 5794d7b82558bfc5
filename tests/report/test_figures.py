"""Figures: that they are written from their files alone, hold what the file holds and leave nothing behind."""

import math
import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from synthetic_evaluation import METHODS, estimate
from synthetic_outputs import write_outputs

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.report.evaluation_figures import ellipse_95, plot_metrics
from prmd.report.figures import (
    PALETTE,
    canvas,
    plot_length_distributions,
    plot_policy_training,
    plot_split_sizes,
)
from prmd.report.reward_figures import plot_reward_model
from prmd.statistics.reliability import disagreement_measures


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
    assert [p.name for p in plot_length_distributions(source, tmp_path)] == [
        "lengths_words.png",
        "lengths_tokens.png",
    ]
    lengths = io.read_json(source)
    for units in lengths["objectives"].values():
        units["tokens"] = None
    io.write_json(tmp_path / "lengths.json", lengths)
    assert [p.name for p in plot_length_distributions(tmp_path / "lengths.json")] == ["lengths_words.png"]


def test_lengths_of_an_empty_objective(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    empty = {"prompt": [], "chosen": [], "rejected": []}
    io.write_json(tmp_path / "lengths.json", {"objectives": {"helpful": {"words": empty}}})
    assert png_size(plot_length_distributions(tmp_path / "lengths.json")[0])
    assert not recwarn.list


def test_reward_model_draws_what_the_file_holds(paths: ArtifactPaths, tmp_path: Path) -> None:
    source = paths.reward_analysis / "helpful.json"
    names = [p.stem for p in plot_reward_model(source, tmp_path)]
    assert names == [
        f"helpful_{n}" for n in ("rewards", "margins", "reliability", "members", "disagreement", "curve")
    ]
    analysis = io.read_json(source)
    analysis["member_correlation_matrix"], analysis["disagreement"] = [[1.0]], None
    analysis["curve"] = []
    io.write_json(tmp_path / "honest.json", analysis)
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


def test_metrics_figures(paths: ArtifactPaths, tmp_path: Path) -> None:
    names = [p.stem for p in plot_metrics(paths.metrics / "comparison.json", tmp_path)]
    assert names == [
        "win_rates",
        "worst_objective",
        "kl_frontier",
        "pareto",
        "over_optimisation",
        "length_win_rate",
        "radar",
    ]
    assert sorted(p.stem for p in tmp_path.glob("*.png")) == sorted(names)


def test_metrics_without_intervals_kl_or_second_objective(tmp_path: Path) -> None:
    rows = [{"method": m, "win_rate": {"helpful": estimate(0.6, 0.1)}, "kl": None} for m in METHODS]
    io.write_json(tmp_path / "comparison.json", {"rows": rows})
    assert [p.stem for p in plot_metrics(tmp_path / "comparison.json")] == ["win_rates"]
    io.write_json(tmp_path / "comparison.json", {"rows": [{"method": "reference", "win_rate": {}}]})
    assert plot_metrics(tmp_path / "comparison.json") == []


def test_figures_depend_on_the_file_alone(paths: ArtifactPaths, tmp_path: Path) -> None:
    source = paths.reward_analysis / "helpful.json"
    first, second = plot_reward_model(source, tmp_path / "a"), plot_reward_model(source, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_nothing_is_left_open_or_changed(paths: ArtifactPaths, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plot_split_sizes(paths.visualizations / "sizes.json", tmp_path)
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
