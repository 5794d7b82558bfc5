"""The real-text study: its biased pairs counted by hand, its untouched splits, its KL matching on known lines, its tables."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.real_text.data import biased_subsample, longer_is_chosen, longer_share, prepare_biased
from benchmarks.real_text.plan import FULL, METHODS, QUICK, Study
from benchmarks.real_text.summary import (
    checkpoint_row,
    estimate,
    matched,
    paired_rows,
    study_results,
    summary_row,
)
from benchmarks.real_text.tables import markdown
from prmd.artifacts import io
from prmd.config.shared import RewardModelConfig
from prmd.errors import DataError
from prmd.objectives import OBJECTIVES, SPLITS
from prmd.pairs import BENCHMARK_QUESTIONS_FILE, PreferencePair, make_pair, read_pairs

WORDS = "word " * 8


def pair(number: int, objective: str, *, longer: bool | None, split: str = "train") -> PreferencePair:
    """A pair whose chosen response is longer, shorter, or (None) as long as the rejected one."""
    chosen, rejected = f"{WORDS}{number}", f"No {number}"
    if longer is None:
        chosen, rejected = f"yes {number}", f"not {number}"
    elif not longer:
        chosen, rejected = rejected, chosen
    prompt = [{"role": "user", "content": f"{objective} {split} question {number}?"}]
    source = f"made/{split}:{number + 1}"
    return make_pair(prompt=prompt, chosen=chosen, rejected=rejected, source=source, objective=objective)


def mixed_pairs(longer: int, shorter: int, equal: int = 0, **names: str) -> list[PreferencePair]:
    """Pairs of all three kinds, shuffled."""
    kinds = [True] * longer + [False] * shorter + [None] * equal
    np.random.default_rng(0).shuffle(kinds)
    objective, split = names.get("objective", "helpful"), names.get("split", "train")
    return [pair(i, objective, longer=kind, split=split) for i, kind in enumerate(kinds)]


# ------------------------------------------------------------------ the biased pairs
@given(count=st.integers(0, 20), share=st.floats(0, 1), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_the_longer_response_is_chosen_in_exactly_the_share_wanted(
    count: int, share: float, seed: int
) -> None:
    pool = mixed_pairs(20, 20, 5)
    kept = biased_subsample(pool, share=share, count=count, seed=seed)
    longer = sum(len(p.chosen) > len(p.rejected) for p in kept)
    shorter = sum(len(p.chosen) < len(p.rejected) for p in kept)
    assert (longer, shorter) == (round(share * count), count - round(share * count))
    # whole pairs of the pool, each once, in their order: no label was turned around
    positions = [pool.index(p) for p in kept]
    assert positions == sorted(set(positions))


def test_every_seed_chooses_its_own_pairs_and_always_the_same() -> None:
    pool = mixed_pairs(40, 40)
    first, again, other = (biased_subsample(pool, share=0.8, count=20, seed=s) for s in (0, 0, 1))
    assert first == again and {p.id for p in first} != {p.id for p in other}


def test_too_few_pairs_of_a_kind_are_refused() -> None:
    with pytest.raises(DataError, match=r"3 of 33 pairs prefer the shorter response, 4 wanted"):
        biased_subsample(mixed_pairs(30, 3), share=0.8, count=20, seed=0)


def test_equal_lengths_count_for_no_side() -> None:
    assert longer_is_chosen(pair(0, "helpful", longer=None)) is None
    assert longer_share(mixed_pairs(3, 1, 6)) == 0.75
    assert longer_share(mixed_pairs(0, 0, 2)) is None


def test_only_train_pairs_are_chosen_from(tmp_path: Path) -> None:
    source = RewardModelConfig(artifact_root=str(tmp_path / "unbiased"), seed=0)
    target = RewardModelConfig(artifact_root=str(tmp_path / "biased"), seed=7)
    for objective in OBJECTIVES:
        for split in SPLITS:
            pairs = mixed_pairs(20, 20, objective=objective, split=split)
            io.write_jsonl(source.paths.split(objective, split), (p.to_row() for p in pairs))
    io.write_json(source.paths.processed / BENCHMARK_QUESTIONS_FILE, ["kept?"])
    io.write_json(source.paths.processed / "run.json", {"fingerprint": "prepared"})
    kept = (p for p in source.paths.processed.rglob("*") if p.is_file() and p.name != "run.json")
    before = {p: p.read_bytes() for p in kept}

    folder = prepare_biased(source, target, share=0.8, count=10)

    assert {p: p.read_bytes() for p in before} == before
    record = io.read_json(source.paths.processed / "run.json")
    assert record["fingerprint"] == "prepared"  # beside it only the list of the files it accepted
    assert set(record) == {"fingerprint", "files"}
    for objective in OBJECTIVES:
        for split in ("val", "test", "judge"):
            given_split, made = source.paths.split(objective, split), target.paths.split(objective, split)
            assert made.read_bytes() == given_split.read_bytes()
        train = read_pairs(target.paths, objective, "train")
        assert sum(len(p.chosen) > len(p.rejected) for p in train) == 8 and len(train) == 10
        labels = {p.id: (p.chosen, p.rejected) for p in read_pairs(source.paths, objective, "train")}
        assert all(labels[p.id] == (p.chosen, p.rejected) for p in train)
    record = io.read_json(folder / "run.json")
    assert record["longer_is_chosen"]["honest"] == {"before": 0.5, "after": 0.8, "pairs": 10}

    (folder / "mark").touch()
    assert prepare_biased(source, target, share=0.8, count=10) == folder and (folder / "mark").exists()
    prepare_biased(source, target, share=0.5, count=10)
    assert not (folder / "mark").exists()


# ------------------------------------------------------------------ configurations
@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_every_seed_has_its_own_root_and_the_sizes_reach_the_stages(sizes: object, tmp_path: Path) -> None:
    study = Study(sizes, tmp_path, ("data.hh_rlhf.path=some folder",))
    roots = {study.shared(seed).paths.root for seed in (None, 0, 1)}
    assert len(roots) == 3 and all(root.is_relative_to(study.root) for root in roots)
    policies, evaluation = study.policies(1), study.evaluation(1)
    assert policies.shared == evaluation.shared == study.shared(1)
    assert policies.shared.data.hh_rlhf.path == "some folder"
    assert policies.policy.methods == METHODS and policies.training.max_pairs == study.sizes.policy_pairs
    assert policies.tuning.method == "lora" and policies.shared.seed == 1
    assert evaluation.judges.training.max_pairs == study.sizes.judge_pairs <= 240
    assert study.sizes.pairs <= 200 and study.sizes.prompts % len(OBJECTIVES) == 0


def test_other_settings_have_another_root(tmp_path: Path) -> None:
    same = {Study(FULL, tmp_path).root, Study(FULL, tmp_path, ("data.hh_rlhf.path=x",)).root}
    assert len(same | {Study(QUICK, tmp_path).root}) == 3


# ------------------------------------------------------------------ KL matching and intervals
def checkpoint(kl: float, wins: dict[str, np.ndarray], minimum: np.ndarray, length: np.ndarray) -> dict:
    """A checkpoint of known values per prompt."""
    per_prompt = {f"win_rate/{k}": values.tolist() for k, values in wins.items()}
    return {
        "kl": kl,
        "win_rate": {k: float(values.mean()) for k, values in wins.items()},
        "mean_of_min": float(minimum.mean()),
        "length": float(length.mean()),
        "per_prompt": per_prompt | {"mean_of_min": minimum.tolist(), "length": length.tolist()},
    }


def line(slopes: np.ndarray, kls: tuple[float, ...] = (0.0, 0.16, 0.64), *, lift: float = 0.0) -> list[dict]:
    """A training whose prompts all move in proportion to sqrt(KL), each with its own slope."""
    rows = []
    for kl in kls:
        distance = math.sqrt(kl)
        factors = dict(zip(OBJECTIVES, (1.0, 0.5, -0.25), strict=True))
        wins = {k: 0.5 + (factor * slopes + lift) * distance for k, factor in factors.items()}
        rows.append(checkpoint(kl, wins, -1 + slopes * distance, 40 + 10 * slopes * distance))
    return rows


def test_measures_at_a_kl_are_those_of_the_known_line() -> None:
    slopes = np.array([0.1, 0.2, 0.3, 0.0])
    found, reached = matched(line(slopes), 0.25)
    assert reached and found["kl"] == 0.25
    np.testing.assert_allclose(found["per_prompt/win_rate/helpful"], 0.5 + 0.5 * slopes)
    np.testing.assert_allclose(found["per_prompt/mean_of_min"], -1 + 0.5 * slopes)
    assert found["worst_per_world"] == pytest.approx(0.5 - 0.125 * slopes.mean())
    found, reached = matched(line(slopes), 1.0)
    assert not reached and found["kl"] == 0.64
    np.testing.assert_allclose(found["per_prompt/length"], 40 + 8 * slopes)


def test_a_training_without_checkpoints_is_matched_between_start_and_end() -> None:
    found, reached = matched(line(np.array([0.2, 0.4]), kls=(0.0, 1.0)), 0.25)
    assert reached and found["win_rate/helpful"] == pytest.approx(0.5 + 0.3 * 0.5)


def test_intervals_over_seeds_are_students_t_and_those_over_prompts_hold_the_mean() -> None:
    seeds = [np.array([0.2, 0.6]), np.array([0.5, 0.7]), np.array([0.9, 0.7])]
    found = estimate(seeds)
    means = [0.4, 0.6, 0.8]
    assert found["by_seed"] == pytest.approx(means) and found["value"] == pytest.approx(0.6)
    wanted = stats.t.interval(0.95, 2, loc=0.6, scale=0.2 / math.sqrt(3))
    assert found["seeds"] == pytest.approx(wanted)
    assert 0.2 <= found["prompts"][0] < 0.6 < found["prompts"][1] <= 0.9
    assert estimate(seeds[:1])["seeds"] is None


def test_a_row_holds_the_means_over_seeds_and_says_who_got_there() -> None:
    slopes = {0: np.array([0.1, 0.3]), 1: np.array([0.2, 0.4])}
    runs = {0: line(slopes[0]), 1: line(slopes[1], kls=(0.0, 0.04, 0.09))}
    row = summary_row("mean", runs, 0.25)
    assert row["reached"] == [True, False] and row["kl"] == [0.25, 0.09]
    helpful = [0.5 + 0.5 * 0.2, 0.5 + 0.3 * 0.3]
    assert row["win_rate"]["helpful"]["by_seed"] == pytest.approx(helpful)
    honest = [0.5 - 0.25 * 0.5 * 0.2, 0.5 - 0.25 * 0.3 * 0.3]
    assert row["worst_win_rate"]["value"] == pytest.approx(np.mean(honest))
    assert row["worst_win_rate"]["by_seed"] == pytest.approx(honest)
    assert row["at_end"]["kl"] == [0.64, 0.09]


def test_differences_are_paired_by_prompt_on_the_seeds_both_have() -> None:
    slopes = np.array([0.0, 0.3, 0.1])
    runs = {
        "dpo": {0: line(slopes), 1: line(slopes)},
        "mean": {0: line(slopes, lift=0.1), 1: line(slopes, lift=0.2)},
        "baseline_dpo": {1: line(slopes, lift=-0.1)},
    }
    rows = {(row["method"], row["measure"]): row for row in paired_rows(runs, 0.25)}
    found = rows["mean", "win_rate/harmless"]
    assert found["by_seed"] == pytest.approx([0.05, 0.1]) and found["value"] == pytest.approx(0.075)
    alone = rows["baseline_dpo", "win_rate/honest"]
    assert alone["seeds_compared"] == [1] and alone["seeds"] is None
    # every prompt differs by the same: no doubt about the prompts is left
    assert alone["prompts"] == pytest.approx([-0.05, -0.05])


# ------------------------------------------------------------------ results and tables
def test_a_checkpoint_is_read_out_of_the_metrics_of_a_policy() -> None:
    scores = {k: [0.25, 0.75] for k in OBJECTIVES}
    metrics = {
        "kl": {"per_response": {"value": 0.3}},
        "objectives": {k: {"win_rate": {"value": 0.5}} for k in OBJECTIVES},
        "mean_of_min": {"value": -1.5},
        "length": {"value": 30.0},
        "per_prompt": {"win_rate": scores, "mean_of_min": [-2.0, -1.0], "length": [20.0, 40.0]},
    }
    row = checkpoint_row(metrics)
    assert row["kl"] == 0.3 and row["per_prompt"]["win_rate/honest"] == [0.25, 0.75]
    found, _ = matched([row | {"kl": 0.0}, row], 0.1)
    assert found["per_prompt/length"] == pytest.approx([20.0, 40.0])


def synthetic_results() -> dict:
    """Results of two seeds, TRL's baseline on the first alone."""
    slopes, share = np.array([0.1, 0.3, 0.2]), {"value": 0.6, "low": 0.5, "high": 0.7}
    model = {
        "objective": "helpful",
        "accuracy": share,
        "mean_member_accuracy": share,
        "member_correlation": 0.5,
        "prefers_longer": 0.7,
    }
    seeds = [
        {
            "seed": seed,
            "methods": {"dpo": line(slopes), "mean": line(slopes, lift=0.1)}
            | ({"baseline_dpo": line(slopes, kls=(0.0, 0.09))} if seed == 0 else {}),
            "reward_models": [model],
            "longer_is_chosen": {"helpful": {"before": 0.52, "after": 0.8, "pairs": 10}},
        }
        for seed in (0, 1)
    ]
    judge = {
        "objective": "helpful",
        "pairs": 9,
        "longer_share": 0.52,
        "accuracy": share,
        "length_only_accuracy": share,
        "prefers_longer": None,
    }
    return study_results(seeds, [judge], 0.25, {"about": "made up"})


def test_the_results_are_json_and_every_method_has_its_row(tmp_path: Path) -> None:
    results = synthetic_results()
    io.write_json(tmp_path / "real_text.json", results)
    rows = {row["method"]: row for row in results["summary"]}
    assert {m: row["seeds"] for m, row in rows.items()} == {
        "dpo": [0, 1],
        "mean": [0, 1],
        "baseline_dpo": [0],
    }
    assert results["reference"]["mean_of_min"]["value"] == -1.0
    assert "per_prompt" not in results["checkpoints"]["dpo"]["1"][0]


def test_the_table_shows_values_intervals_and_who_got_there() -> None:
    text = markdown(synthetic_results())
    lines = [part for part in text.splitlines() if part.startswith("| mean |")]
    # helpful: .5 + (.2 + .1) * .5; both seeds alike, so the interval over seeds is a point
    assert "0.65 [0.65, 0.65]" in lines[1] and lines[1].endswith("| 2 of 2 |")
    trl = [part for part in text.splitlines() if part.startswith("| baseline_dpo |")]
    assert trl[0].endswith("| 0 of 1 |") and "| 0.09 |" in trl[0]
    assert "[" not in trl[1], "one seed has no interval over seeds"
    ends = next(part for part in trl if "KL at the end" in part)
    assert ends == "| baseline_dpo | KL at the end | 0.09 | – |"
    judge = next(part for part in text.splitlines() if part.startswith("| helpful | 9 |"))
    assert "0.60 [0.50, 0.70]" in judge and judge.endswith("| – |")
    assert any(part.startswith("| mean less dpo | win rate, helpful | 0.05") for part in text.splitlines())
    model = next(part for part in text.splitlines() if part.startswith("| helpful, seed 1 | 10 |"))
    assert "| 0.52 → 0.80 |" in model
