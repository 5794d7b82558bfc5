"""A whole set of made-up artifacts, in the files' real formats, for the tests of figures and report.

`write_outputs(root, approach)` writes what every stage would, from a seeded generator; no model is involved.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from prmd import io
from prmd.objectives import OBJECTIVES
from prmd.paths import ArtifactPaths

METHODS = ("dpo", "hard_min", "hierarchical")
PROMPTS = 24
HOSTILE = '<script>window.hacked = 1</script> & "quoted" </script> ünïcode'


def estimate(value: float, half: float, n: int = PROMPTS, **extra: Any) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "method": "bootstrap", **extra}


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


def write_evaluation(paths: ArtifactPaths, rng: np.random.Generator) -> None:
    rows = []
    for i, method in enumerate(("reference", *METHODS)):
        metrics = _method_metrics(paths, method, i, rng)
        io.write_json(paths.metrics / f"{method}.json", metrics)
        io.write_jsonl(paths.metrics / "samples" / f"{method}.jsonl", _samples(method, rng))
        rows.append(
            {
                "method": method,
                "approach": paths.approach,
                "win_rate": {k: v["win_rate"] for k, v in metrics["objectives"].items()},
                "worst": metrics["worst_objective"]["win_rate"],
                "mean_of_min": metrics["mean_of_min"],
                "kl": metrics["kl"]["per_response"],
                "length": metrics["length"],
            }
        )
    paired = [
        {
            "method": "hard_min",
            "against": "dpo",
            "measure": measure,
            "difference": estimate(0.14, 0.09),
            "p": p,
            "p_holm": 2 * p,
        }
        for measure, p in (("win rate, helpful", 0.004), ("mean of minimum", 0.41))
    ]
    comparison = {"rows": rows, "paired": paired, "declared": "each method against dpo"}
    comparison["hypervolume"] = estimate(0.03, 0.02, chance=0.0)
    comparison["win_matrix"] = {
        k: [
            {"method": a, "against": b, "win_rate": estimate(0.45, 0.1, chance=0.5)}
            for a, b in itertools.combinations(("reference", *METHODS), 2)
        ]
        for k in OBJECTIVES
    }
    policies = [
        {"method": m, "kl": 0.9 * i, "distance": (0.9 * i) ** 0.5}
        | {"gold": estimate(0.2, 0.1), "proxy": estimate(0.4, 0.1)}
        for i, m in enumerate(METHODS, start=1)
    ]
    comparison["over_optimisation"] = {"curves": _best_of_n(), "policies": policies}
    io.write_json(paths.metrics / "comparison.json", comparison)
    io.write_json(paths.metrics / "frontier.json", _frontier(rows))
    _record(paths.metrics, 340.0)


def _best_of_n() -> dict[str, Any]:
    """Best of 1 to 4: the proxy gains, the judges half as much."""
    points = [
        {"n": n, "kl": math.log(n) - (n - 1) / n, "distance": math.sqrt(math.log(n) - (n - 1) / n)}
        | {"proxy": estimate(0.4 * n - 0.4, 0.1), "gold": estimate(0.2 * n - 0.2, 0.1)}
        for n in range(1, 5)
    ]
    fit = {"alpha": estimate(1.1, 0.3), "beta": estimate(0.2, 0.1), "peak_distance": 2.75}
    units = {"proxy": 1.0, "gold": 1.0}
    return {
        "mean": {"points": points, "fit": fit, "units": units},
        "hard_min": {"points": points, "fit": None, "units": units},
    }


def _frontier(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Two checkpoints before the end of every policy."""
    points = [
        row
        | {
            "checkpoint": name,
            "kl": {k: v * share if k in ("value", "low", "high") else v for k, v in row["kl"].items()},
        }
        for row in rows[1:]
        for name, share in (("33", 0.3), ("66", 0.7), ("end", 1.0))
    ]
    return {
        "fingerprint": "f",
        "prompts": 8,
        "reference": {"mean_of_min": rows[0]["mean_of_min"]},
        "points": points,
    }


def _proxy() -> dict[str, Any]:
    return {
        "members": 8,
        "mean_reward": {k: estimate(0.3, 0.1) for k in OBJECTIVES},
        "worst_member": {k: estimate(-0.6, 0.2) for k in OBJECTIVES},
        "worst_objective": {"objective": "honest", "reward": estimate(-0.6, 0.3)},
        "violation_rate": estimate(0.31, 0.05, chance=0.22),
        "thresholds": dict.fromkeys(OBJECTIVES, -1.4),
        "per_prompt": {},
    }


def _wins(rate: dict[str, Any], reference: bool) -> dict[str, Any]:
    if reference:
        return {"win_rate": rate, "length_controlled": None, "outcomes": None}
    controlled = {"win_rate": estimate(0.52, 0.1, chance=0.5), "length_effect": 0.44}
    outcomes = {"won": estimate(0.5, 0.1), "tied": estimate(0.1, 0.02), "lost": estimate(0.4, 0.1)}
    return {"win_rate": rate, "length_controlled": controlled, "outcomes": outcomes}


def _method_metrics(
    paths: ArtifactPaths, method: str, place: int, rng: np.random.Generator
) -> dict[str, Any]:
    reference = method == "reference"
    base = 0.5 if reference else 0.5 + 0.03 * place
    per_prompt = {
        k: (np.full(PROMPTS, 0.5) if reference else np.clip(rng.normal(base, 0.2, PROMPTS), 0, 1)).tolist()
        for k in OBJECTIVES
    }
    means = {k: float(np.mean(v)) for k, v in per_prompt.items()}
    rates = {k: estimate(v, 0.0 if reference else 0.08, chance=0.5) for k, v in means.items()}
    worst = min(rates, key=lambda k: rates[k]["value"])
    kl = 0.0 if reference else 0.9 * place
    judges = {
        k: {"path": f"models/judges/{k}", "fingerprint": "j1", "accuracy": estimate(accuracy, 0.1, 40)}
        for k, accuracy in zip(OBJECTIVES, (0.66, 0.66, 0.55), strict=True)
    }
    judging = {
        "answer": "I'm sorry, but I can't help with that.",
        "objectives": {
            k: {"win_rate": estimate(rate, 0.08, chance=0.5), "length_correlation": 0.21}
            for k, rate in zip(OBJECTIVES, (0.12, 0.9, 0.31), strict=True)
        },
    }
    return {
        "method": method,
        "approach": paths.approach,
        "evaluation": {
            "fingerprint": "eval0",
            "prompts": PROMPTS,
            "samples_per_prompt": 2,
            "max_new_tokens": 48,
            "temperature": 1.0,
            "judges": judges,
        },
        "objectives": {
            k: {"mean_reward": estimate(0.1, 0.2, chance=0.0), **_wins(rates[k], reference)}
            for k in OBJECTIVES
        },
        "worst_objective": {"objective": worst, "win_rate": rates[worst]},
        "mean_of_min": estimate(-0.4 + base / 5, 0.2),
        "cvar_10": {"value": -1.9, "low": None, "high": None, "n": PROMPTS, "method": "no interval"},
        "dominance": None
        if reference
        else {"dominates": estimate(0.2, 0.05, chance=0.13), "dominated": estimate(0.1, 0.05, chance=0.13)},
        "hypervolume": estimate(0.01, 0.01, chance=0.0),
        "proxy": _proxy(),
        **({"judging": judging, "best_of_n": _best_of_n()} if reference else {}),
        "kl": {
            "per_response": estimate(kl, kl / 5),
            "per_token": estimate(kl / 40, kl / 200),
            "k1": estimate(kl, kl),
            "k3_per_token": estimate(kl / 40, kl / 90),
        },
        "length": estimate(38.0 + place, 3.0),
        "truncated_share": 0.61,
        "per_prompt": {"ids": [f"p{i}" for i in range(PROMPTS)], "win_rate": per_prompt},
        "samples": f"samples/{method}.jsonl",
        "notes": [],
    }


def _samples(method: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    def response(i: int) -> dict[str, Any]:
        text = HOSTILE if i == 0 else f"Answer {i} of {method}. " + "It goes on for some while. " * (i % 5)
        rewards = {k: float(rng.normal()) for k in OBJECTIVES}
        return {"text": text, "tokens": 12, "finished": i % 2 == 0, "rewards": rewards}

    return [
        {
            "prompt_id": f"p{i}",
            "prompt": [{"role": "user", "content": f"Question {i}: {'long ' * 20}{HOSTILE}"}],
            "objective": OBJECTIVES[i % 3],
            "responses": [response(i), response(i + 1)],
        }
        for i in range(PROMPTS)
    ]


def write_benchmarks(paths: ArtifactPaths) -> None:
    paired = {"benchmark": "truthfulqa", "outcome": "mc1", "method": "hard_min", "against": "dpo"}
    paired |= {
        "difference": estimate(0.1, 0.08, 40),
        "test": "McNemar, 6 against 2 of 40",
        "p": 0.29,
        "p_holm": 0.58,
    }
    io.write_json(paths.benchmark_comparison, {"paired": [paired], "declared": "every outcome"})
    for method in ("reference", *METHODS):
        done = {"method": method, "approach": paths.approach, "status": "done", "reason": None, "n": 40}
        io.write_json(
            paths.benchmark("truthfulqa") / f"{method}.json",
            done
            | {
                "benchmark": "truthfulqa",
                "data_sha256": "99d6",
                "seconds": 31.0,
                "metrics": {
                    "mc1": estimate(0.24, 0.12, 40, chance=0.226),
                    "mc2": estimate(0.42, 0.06, 40, chance=0.449),
                },
            },
        )
        card = {"kind": "strings", "name": "lead-regex", "verdicts": 100, "parse_failures": 3}
        card |= {"parse_rate": estimate(0.97, 0.02, 100), "rubrics": {"jailbreak": "safe or unsafe?"}}
        card |= {"agreement": {"agree": estimate(0.88, 0.02, 100), "kappa": 0.747, "labels": "published"}}
        card |= {"position_bias": None, "constant_answer": {"text": HOSTILE, "asr": 0.5}, "usage": {}}
        io.write_json(
            paths.benchmark("jailbreakbench") / f"{method}.json",
            done
            | {"benchmark": "jailbreakbench", "judge": card}
            | {"metrics": {"jbb_nonrefusal[lead-regex]": estimate(0.6, 0.09, 100, chance=None)}},
        )
        refused = {"status": "not run", "reason": "data missing at data/raw/mt_bench", "metrics": {}}
        io.write_json(
            paths.benchmark("mt_bench") / f"{method}.json", done | refused | {"benchmark": "mt_bench"}
        )
