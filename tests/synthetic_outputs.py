"""A whole set of made-up artifacts, in the files' real formats, for the tests of figures and report.

`write_outputs(root, approach)` writes what every stage would, from a seeded generator; no model is involved. The files of
stage 4 are made in `synthetic_evaluation`.
"""

from pathlib import Path
from typing import Any

import numpy as np
from synthetic_evaluation import HOSTILE, METHODS, estimate, write_benchmarks, write_evaluation

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.objectives import OBJECTIVES


def write_outputs(root: Path, approach: str = "embedded") -> ArtifactPaths:
    """Write data, reward models, policies, metrics and benchmarks of one approach below `root`."""
    paths = ArtifactPaths(root, approach)
    rng = np.random.default_rng(7)
    write_data(paths, rng)
    for objective in OBJECTIVES:
        write_reward_model(paths, objective, rng)
    for method in METHODS:
        write_policy(paths, method, rng)
    write_evaluation(paths, rng)
    _record(paths.metrics, 340.0)
    write_benchmarks(paths)
    return paths


def run_record(seconds: float) -> dict[str, Any]:
    return {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "versions": {"torch": "2.13.0", "python": "3.11.9"},
        "device": "cpu",
        "hardware": {"cpu": "Test CPU", "cores": 2, "gpus": [], "memory_gib": 8.0, "os": "Linux"},
        "seed": 42,
        "inputs": {},
        "fingerprint": "abc123",
        "seconds": seconds,
        "peak_memory_bytes": 3 << 29,
    }


def _record(directory: Path, seconds: float) -> None:
    io.write_json(directory / "run.json", run_record(seconds))
    io.write_text(directory / "config.yaml", "seed: 42\ndata:\n  approach: embedded\n")


def write_data(paths: ArtifactPaths, rng: np.random.Generator) -> None:
    splits = {"train": 140, "val": 20, "test": 24, "judge": 20}
    io.write_json(
        paths.visualizations / "sizes.json",
        {"approach": paths.approach, "objectives": dict.fromkeys(OBJECTIVES, splits)},
    )
    lengths = {
        k: {
            "words": {p: rng.integers(3, 90, 60).tolist() for p in ("prompt", "chosen", "rejected")},
            "characters": {p: rng.integers(15, 500, 60).tolist() for p in ("prompt", "chosen", "rejected")},
            "tokens": {p: rng.integers(5, 160, 60).tolist() for p in ("prompt", "chosen", "rejected")},
        }
        for k in OBJECTIVES
    }
    io.write_json(paths.visualizations / "lengths.json", {"unit": ["words", "tokens"], "objectives": lengths})
    stats = {"sizes": dict.fromkeys(OBJECTIVES, splits), "dropped": {"near-duplicate of a test prompt": 4}}
    stats["quarantined"] = {"empty response": 2, "roles do not alternate": 1}
    io.write_json(paths.processed / "stats.json", stats)
    pair = {"prompt": [{"role": "user", "content": "Why?"}], "source": "embedded", "id": "helpful-1"}
    pair |= {
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": HOSTILE}],
    }
    for objective in OBJECTIVES:
        io.write_json(paths.visualizations / f"examples_{objective}.json", [pair] * 2)
    _record(paths.processed, 2.5)


def write_reward_model(paths: ArtifactPaths, objective: str, rng: np.random.Generator) -> None:
    margins = rng.normal(0.6, 1.0, 48)
    rejected = rng.normal(0, 1, 48)
    draws = rng.normal(size=(48, 8)) + margins[:, None]
    metrics = {
        "objective": objective,
        "approach": paths.approach,
        "accuracy": estimate(0.71, 0.12, 48, ties=1),
        "mean_member_accuracy": estimate(0.69, 0.12, 48, ties=0),
        "expected_calibration_error": 0.084,
        "log_odds_slope": 0.81,
        "length_only_accuracy": estimate(0.52, 0.14, 48, ties=2),
        "member_correlation": 0.83,
        "disagreement": {
            "mistake_correlation": estimate(0.21, 0.2, 48),
            "error_correlation": estimate(0.18, 0.2, 48),
            "auc": estimate(0.61, 0.15, 48),
            "bins": [
                {"disagreement": sd, "accuracy": a, "low": a - 0.2, "high": min(1, a + 0.15), "n": 24}
                for sd, a in ((0.3, 0.79), (0.8, 0.58))
            ],
        },
        "reliability": [
            {"confidence": c, "accuracy": c - 0.03, "low": c - 0.15, "high": min(1, c + 0.1), "n": 12}
            for c in (0.55, 0.65, 0.78, 0.9)
        ],
        "members": 8,
        "margins": margins.tolist(),
        "rewards_chosen": (rejected + margins).tolist(),
        "rewards_rejected": rejected.tolist(),
        "member_correlation_matrix": np.corrcoef(draws, rowvar=False).tolist(),
        "curve": [
            {"step": s, "eval_loss": 0.7 - s / 200, "eval_accuracy": 0.5 + s / 200} for s in range(0, 40, 8)
        ],
        "sizes": {"train": 140, "fit": 42, "val": 20, "test": 48},
        "dropped": 1,
        "truncated": 3,
    }
    example = {"margin": 2.5, "prompt": "Human: hi", "chosen": "Hello!", "rejected": HOSTILE}
    analysis = metrics | {"top": [example] * 10, "bottom": [example | {"margin": -1.5}] * 10}
    io.write_json(paths.reward_analysis / f"{objective}.json", analysis)
    io.write_json(paths.reward_model(objective) / "metrics.json", metrics)
    io.write_json(
        paths.reward_model(objective) / "calibration.json",
        {
            "source": "validation_responses",
            "calibration": {"scale": [1.1] * 8, "offset": [0.2] * 8, "n_prompts": 20, "n_responses": 40},
        },
    )
    _record(paths.reward_model(objective), 61.0)


def write_policy(paths: ArtifactPaths, method: str, rng: np.random.Generator) -> None:
    counts, edges = np.histogram(rng.normal(0, 1.2, 200), 20)
    curve = [
        {"step": s, "loss": 0.7 - s / 100, "rewards/margins": s / 60, "margins/target": 0.8, "epoch": s / 24}
        for s in range(1, 25)
    ]
    metrics = {"method": method, "curve": curve, "notes": [f"{method}: a note <with> markup"]}
    if method != "dpo":
        histogram = {"edges": edges.tolist(), "counts": counts.tolist()}
        metrics |= {
            "target_margins": {"mean": 0.4, "sd": 1.2, "clipped_share": 0.02, "histogram": histogram},
            "reward_scale": 0.28,
        }
    io.write_json(paths.policy(method) / "metrics.json", metrics)
    _record(paths.policy(method), 118.0)
