"""Made-up metrics, samples, comparisons and benchmark results, in the files' real formats; `synthetic_outputs` adds the rest."""

import itertools
import math
from typing import Any

import numpy as np

from prmd.artifacts import io
from prmd.artifacts.paths import ArtifactPaths
from prmd.objectives import OBJECTIVES

METHODS = ("dpo", "hard_min", "hierarchical")
PROMPTS = 24
HOSTILE = '<script>window.hacked = 1</script> & "quoted" </script> ünïcode'


def estimate(value: float, half: float, n: int = PROMPTS, **extra: Any) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n, "method": "bootstrap", **extra}


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
    worst = [
        {"method": m, "against": "dpo", "difference": 0.04 * i, "p": 0.2 / i, "p_holm": 0.2}
        for i, m in enumerate(METHODS[1:], start=1)
    ]
    comparison = {"rows": rows, "baseline": "dpo", "worst_objective": worst}
    comparison |= {"paired": paired, "declared": "each method against dpo"}
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


def _evaluation() -> dict[str, Any]:
    judges = {
        k: {"path": f"models/judges/{k}", "fingerprint": "j1", "accuracy": estimate(accuracy, 0.1, 40)}
        for k, accuracy in zip(OBJECTIVES, (0.66, 0.66, 0.55), strict=True)
    }
    sampling = {"prompts": PROMPTS, "samples_per_prompt": 2, "max_new_tokens": 48, "temperature": 1.0}
    return {"fingerprint": "eval0", **sampling, "judges": judges}


def _judging() -> dict[str, Any]:
    """What the judges say of one constant answer."""
    return {
        "answer": "I'm sorry, but I can't help with that.",
        "objectives": {
            k: {"win_rate": estimate(rate, 0.08, chance=0.5), "length_correlation": 0.21}
            for k, rate in zip(OBJECTIVES, (0.12, 0.9, 0.31), strict=True)
        },
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
    return {
        "method": method,
        "approach": paths.approach,
        "evaluation": _evaluation(),
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
        **({"judging": _judging(), "best_of_n": _best_of_n()} if reference else {}),
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
