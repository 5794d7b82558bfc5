"""The gold-reward study: its true rewards counted by hand, its labels by their frequencies, its KL matching on a known line."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.gold.figures import bias_message
from benchmarks.gold.labels import LabelledPairs, label_pairs, longer_share, preference_probability
from benchmarks.gold.page import wanted_table
from benchmarks.gold.plan import COMPARED
from benchmarks.gold.summary import (
    DPO,
    OURS,
    ablation_row,
    at_kl,
    curve_points,
    differences,
    fall_rows,
    harm_rows,
    paired_rows,
    summary_row,
    t_interval,
)
from benchmarks.gold.targets import calibrated_like, choose_members, take_sides
from benchmarks.gold.world import (
    END,
    VOCABULARY,
    decode,
    draw_prompts,
    draw_response,
    encode,
    gold_rewards,
    gold_table,
    make_tokenizer,
    prompt_tokens,
)
from prmd.config.shared import EnsembleConfig
from prmd.models.chat_templates import check_template, stop_token
from prmd.models.tokenization import tokenize_prompt
from prmd.rewards import heads as rewards_heads


# ------------------------------------------------------------------ the world
def test_true_rewards_are_those_counted_by_hand() -> None:
    half, one = 1 - math.exp(-0.5), 1 - math.exp(-1.0)  # sat(1), sat(2)
    # two topics of the prompt, a risky letter twice in a row, one claim with its hedge
    found = gold_rewards("abgh", "abiiuq")
    assert found == pytest.approx(
        (2 * one + 0.7 * one + 0.6 * half - 0.5 * half - 0.7 * half, -2 * one, 0.8 * half)
    )
    # a dangerous topic of the prompt, a topic that is not in it, one safe letter, two claims without a hedge
    found = gold_rewards("abgh", "gcmux")
    assert found == pytest.approx(
        (2 * half + 0.6 * one + 0.5 * half, -1.5 * half + 0.5 * half, -1.5 * one - 0.8 * half)
    )
    # filler alone, eleven letters, no two alike in a row: three letters too many
    assert gold_rewards("abgh", "yzyzyzyzyzy") == pytest.approx((-0.36, 0.0, 0.0))
    assert gold_rewards("abgh", "") == (0.0, 0.0, 0.0)


def test_the_table_has_objectives_first_and_drops_the_end_of_turn() -> None:
    responses = [[(*encode("ab"), END), encode("i")], [(END,), encode("yy")]]
    table = gold_table(["abcd", "efgh"], responses)
    assert table.shape == (3, 2, 2)
    assert table[:, 0, 1] == pytest.approx(gold_rewards("abcd", "i"))
    assert table[:, 1, 1] == pytest.approx(gold_rewards("efgh", "yy"))
    assert table[:, 1, 0] == pytest.approx((0, 0, 0))


def test_the_tokenizer_speaks_the_projects_template() -> None:
    tokenizer = make_tokenizer()
    check_template(tokenizer, "gold")
    messages = [{"role": "user", "content": "aceg"}]
    assert tuple(tokenize_prompt(tokenizer, messages, max_length=64)) == prompt_tokens("aceg")
    assert stop_token(tokenizer) == END == tokenizer.eos_token_id
    assert len(tokenizer) == len(VOCABULARY)
    assert decode((*encode("maze"), END)) == "maze"


def test_prompts_are_distinct_and_responses_stay_in_the_prior() -> None:
    rng = np.random.default_rng(0)
    first = draw_prompts(rng, 40)
    second = draw_prompts(rng, 200, without=frozenset(first))
    assert len({*first, *second}) == 240
    assert all(len(set(prompt)) == 4 for prompt in first)
    lengths = {len(draw_response(rng, first[0])) for _ in range(300)}
    assert lengths == set(range(4, 15))


# ------------------------------------------------------------------ labels
def draw(rewards: np.ndarray, lengths: np.ndarray, count: int, bias: float = 0.5, objective: str = "helpful"):
    return label_pairs(
        np.random.default_rng(7),
        rewards=rewards,
        lengths=lengths,
        objective=objective,
        bias=bias,
        count=count,
    )


def test_labels_follow_bradley_terry_with_noise() -> None:
    n = 12_000
    rewards = np.stack([np.zeros(n), np.full(n, 0.8)], axis=1)
    pairs = draw(rewards, np.ones((n, 2)), n)
    expected = 0.9 / (1 + math.exp(-1.2)) + 0.05
    assert preference_probability(np.array([0.8, 0.0])) == pytest.approx([expected, 0.5])
    assert (pairs.chosen == 1).mean() == pytest.approx(expected, abs=4 * math.sqrt(0.25 / n))


@pytest.mark.parametrize(
    ("objective", "bias", "share"),
    [
        ("helpful", 0.5, 0.5),
        ("helpful", 0.8, 0.8),
        ("honest", 0.8, 2 / 3),  # half of the log-odds: 4 to 1 becomes 2 to 1
        ("harmless", 0.8, 0.5),
    ],
)
def test_the_bias_is_the_share_of_longer_responses_preferred(
    objective: str, bias: float, share: float
) -> None:
    n = 24_000
    lengths = np.tile([5, 9], (n, 1))
    pairs = draw(np.zeros((n, 2)), lengths, 8000, bias, objective)
    assert len(pairs) == 8000
    assert longer_share(pairs, lengths) == pytest.approx(share, abs=4 * math.sqrt(0.25 / 8000))


def test_the_bias_changes_no_label() -> None:
    rng = np.random.default_rng(1)
    rewards, lengths = rng.normal(size=(300, 4)), rng.integers(3, 9, size=(300, 4))

    def labels(pairs: LabelledPairs) -> set[tuple[int, int, int]]:
        return set(zip(pairs.prompt.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))

    everything = labels(draw(rewards, lengths, 300 * 6))
    biased = labels(draw(rewards, lengths, 500, bias=0.9))
    assert len(everything) == 1800
    assert biased <= everything


def test_labels_refuse_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match=r"bias must be in \[.5, 1\)"):
        draw(np.zeros((4, 2)), np.ones((4, 2)), 2, bias=0.4)
    with pytest.raises(ValueError, match="5 wanted; give more samples"):
        draw(np.zeros((4, 2)), np.ones((4, 2)), 5)


# ------------------------------------------------------------------ rewards
def test_calibration_forgets_scale_and_offset_of_every_member() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    scores = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64)
    scale, offset = torch.rand(2, 3, 1, 1) + 0.5, torch.randn(2, 3, 5, 1)
    plain = calibrated_like(scores, reference, raw=False)
    moved = calibrated_like(scores * scale + offset, reference * scale + offset, raw=False)
    assert torch.allclose(plain, moved, atol=1e-9)
    own = calibrated_like(reference, reference, raw=False)
    assert torch.allclose(own.mean(dim=3), torch.zeros(2, 3, 5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(own.square().sum(dim=(2, 3)) / (5 * 5), torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(calibrated_like(scores, reference, raw=True), scores)


def test_members_are_the_first_heads_and_one_member_is_the_single_reward_model() -> None:
    scores = torch.arange(2 * 6).reshape(2, 6, 1, 1)
    assert choose_members(scores, 1).flatten().tolist() == [0, 6]
    assert choose_members(scores, 3).flatten().tolist() == [1, 2, 3, 7, 8, 9]
    assert choose_members(scores, 3, "debiased").flatten().tolist() == [1, 2, 3, 7, 8, 9]


def test_a_smaller_family_spans_the_same_strengths() -> None:
    scores = torch.arange(21).reshape(1, 21, 1, 1)
    assert choose_members(scores, 1, "strengths").flatten().tolist() == [0]
    assert choose_members(scores, 3, "strengths").flatten().tolist() == [1, 10, 20]
    assert choose_members(scores, 5, "strengths").flatten().tolist() == [1, 6, 10, 15, 20]
    assert choose_members(scores, 20, "strengths").flatten().tolist() == list(range(1, 21))


def test_a_smaller_ensemble_is_the_beginning_of_a_larger_one(monkeypatch) -> None:
    monkeypatch.setattr(rewards_heads, "FIT_STEPS", 50)
    generator = torch.Generator().manual_seed(0)
    features, rewards = torch.randn(2, 12, 4, generator=generator), torch.randn(2, 12, generator=generator)

    def heads(members: int) -> torch.Tensor:
        fitted = rewards_heads.fit_ensemble(
            chosen_features=features[0],
            rejected_features=features[1],
            chosen_rewards=rewards[0],
            rejected_rewards=rewards[1],
            pair_ids=[str(i) for i in range(12)],
            config=EnsembleConfig(members=members),
            seed=3,
        )
        return fitted.rewards(features[0], rewards[0])

    assert torch.allclose(heads(4)[:, :2], heads(2), atol=1e-3)


def test_sides_are_chosen_then_rejected() -> None:
    values = torch.arange(12).reshape(3, 4)
    position = torch.tensor([[2, 0], [1, 3], [0, 2]])
    assert take_sides(values, position).tolist() == [[9, 8], [3, 2]]


# ------------------------------------------------------------------ numbers
def line(slope: float, kls: tuple[float, ...] = (0.0, 0.3, 0.9, 2.5)) -> list[dict]:
    """Checkpoints whose measures are linear in sqrt(KL): win rates .5 + slope d, .5 - slope d, .5 + 2 slope d."""
    return [
        {
            "step": i,
            "kl": kl,
            "length": 9 + math.sqrt(kl),
            "win_rate": dict(
                zip(
                    ("helpful", "harmless", "honest"),
                    (0.5 + s * math.sqrt(kl) for s in (slope, -slope, 2 * slope)),
                    strict=True,
                )
            ),
            "mean_reward": {k: 3 * slope * math.sqrt(kl) for k in ("helpful", "harmless", "honest")},
            "mean_of_min": -1 + slope * math.sqrt(kl),
            "proxy": 4 * slope * math.sqrt(kl),
            "proxy_robust": 5 * slope * math.sqrt(kl),
        }
        for i, kl in enumerate(kls)
    ]


@pytest.mark.parametrize("kl", [0.1, 0.3, 0.7, 2.0, 2.5])
def test_matching_is_exact_on_a_line_in_root_kl(kl: float) -> None:
    found, reached = at_kl(line(0.1), kl)
    d = math.sqrt(kl)
    assert reached and found["kl"] == kl
    assert found["win_rate/helpful"] == pytest.approx(0.5 + 0.1 * d)
    assert found["win_rate/honest"] == pytest.approx(0.5 + 0.2 * d)
    assert found["length"] == pytest.approx(9 + d)


def test_matching_takes_the_first_crossing_and_says_where_there_is_none() -> None:
    there_and_back = [*line(0.1), *line(-0.3, kls=(0.2, 3.0))]
    assert at_kl(there_and_back, 1.0)[0]["win_rate/helpful"] == pytest.approx(0.6)
    found, reached = at_kl(line(0.1), 4.0)
    assert not reached and found["kl"] == 2.5


def test_intervals_are_students_t() -> None:
    found = t_interval([1.0, 2.0, 3.0])
    assert (found.value, found.high - found.value) == pytest.approx((2.0, 4.302653 / math.sqrt(3)), rel=1e-6)
    assert t_interval([0.4]).low == 0.4


def test_a_row_has_what_is_promised() -> None:
    row = summary_row((*DPO, 0.8), [line(0.1), line(0.2)], 1.0)
    wanted = "method family bias kl worst_win_rate ci win_rate mean_of_min mean_of_min_ci seeds"
    assert set(wanted.split()) <= set(row)
    assert (row["family"], row["worst_per_world"]) == ("none", pytest.approx(0.35))
    assert (row["method"], row["bias"], row["kl"], row["seeds"], row["reached"]) == ("dpo", 0.8, 1.0, 2, 2)
    assert row["win_rate"] == pytest.approx({"helpful": 0.65, "harmless": 0.35, "honest": 0.8})
    assert row["worst_win_rate"] == min(row["win_rate"].values())
    assert row["ci"][0] < 0.35 < row["ci"][1]
    assert row["mean_of_min"] == pytest.approx(-0.85)
    assert row["imbalance"] == pytest.approx(0.45)


def test_the_worst_objective_is_taken_after_interpolation() -> None:
    run = line(0.1, kls=(0.0, 4.0))
    run[1]["win_rate"] = {"helpful": 0.9, "harmless": 0.5, "honest": 0.7}
    run[0]["win_rate"] = {"helpful": 0.1, "harmless": 0.9, "honest": 0.7}
    # half-way in sqrt(KL): .5, .7, .7; the mean of the two ends' minima would be .3
    assert at_kl(run, 1.0)[0]["worst_per_world"] == pytest.approx(0.5)


def test_an_ablation_is_shown_at_its_end_and_less_the_shipped_value() -> None:
    main, runs = [line(0.1), line(0.2)], [line(0.15), line(0.25)]
    row = ablation_row("x", runs, main, summary_row((*DPO, 0.8), runs, 1.0), 1.0)
    assert row["label"] == "x" and row["method"] == "dpo"
    assert row["at_end"]["mean_of_min"] == pytest.approx(-1 + 0.2 * math.sqrt(2.5))
    assert row["at_end"]["worst_win_rate"] == pytest.approx(0.5 - 0.2 * math.sqrt(2.5))
    assert row["against_shipped"]["mean_of_min"]["difference"] == pytest.approx(0.05)
    same = ablation_row("x", main, main, summary_row((*DPO, 0.8), main, 1.0), 1.0)
    assert same["against_shipped"] == {}


def test_differences_are_paired_by_seed() -> None:
    runs = {(*DPO, 0.8): [line(0.1), line(0.3)], ("mean", "strengths", 0.8): [line(0.15), line(0.35)]}
    rows = {row["measure"]: row for row in paired_rows(runs, 1.0)}
    assert rows["mean_of_min"]["difference"] == pytest.approx(0.05)
    assert rows["mean_of_min"]["ci"] == pytest.approx([0.05, 0.05])
    assert rows["worst_per_world"]["difference"] == pytest.approx(-0.05)
    assert all(row["p"] is row["p_holm"] is None for row in rows.values())  # not declared


def test_the_declared_family_has_twelve_tests_and_their_p_are_holms() -> None:
    rng = np.random.default_rng(2)
    runs = {
        (*compared, bias): [line(slope) for slope in 0.1 + 0.05 * place + rng.normal(0, 0.03, 6)]
        for place, compared in enumerate(COMPARED)
        for bias in (0.5, 0.8, 0.9)
    }
    rows = paired_rows(runs, 1.0)
    declared = [row for row in rows if row["p_holm"] is not None]
    keys = {(row["against"], row["bias"], row["measure"]) for row in declared}
    assert len(declared) == len(keys) == 12
    assert {(row["method"], row["family"]) for row in declared} == {OURS}
    assert {key[0] for key in keys} == {"dpo/none", "hard_min/bootstrap"}
    (one,) = (
        r
        for r in declared
        if (r["against"], r["bias"]) == ("dpo/none", 0.8) and r["measure"] == "mean_of_min"
    )
    values = [at_kl(a, 1.0)[0]["mean_of_min"] for a in runs[*OURS, 0.8]]
    others = [at_kl(a, 1.0)[0]["mean_of_min"] for a in runs[*DPO, 0.8]]
    assert one["p"] == pytest.approx(float(stats.ttest_rel(values, others).pvalue))
    p, adjusted = zip(*sorted((row["p"], row["p_holm"]) for row in declared), strict=True)
    by_hand = np.minimum(1, np.maximum.accumulate([(12 - i) * value for i, value in enumerate(p)]))
    assert adjusted == pytest.approx(by_hand)
    wanted = wanted_table(rows, fall_rows(runs, 1.0))
    assert wanted.count("| at least +.05, interval above 0 |") == 2 and wanted.count("| no loss |") == 2
    assert "fall of the worst objective from 0.5 to 0.9" in wanted


def test_harm_is_shown_less_dpo() -> None:
    runs = {DPO: [line(0.1), line(0.2)], OURS: [line(0.3), line(0.4)]}
    dpo, ours = harm_rows(runs, 0.9, 1.0)
    assert (dpo["method"], dpo["bias"], dpo["less_dpo"]) == ("dpo", 0.9, {})
    assert ours["less_dpo"]["mean_of_min"]["difference"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("ci", "said"),
    [
        ([0.01, 0.09], "Family beats DPO at"),
        ([-0.01, 0.09], "Family and DPO not told apart at"),
        ([-0.09, -0.01], "Family loses to DPO at"),
    ],
)
def test_the_title_claims_what_the_interval_shows(ci: list[float], said: str) -> None:
    row = {"method": "hard_min", "family": "strengths", "against": "dpo/none", "bias": 0.9, "ci": ci}
    row |= {"measure": "worst_per_world", "difference": sum(ci) / 2}
    assert bias_message([row | {"seeds": 6}], 0.9).startswith(said)
    assert "not told apart" in bias_message([row | {"seeds": 1}], 0.9)


def test_differences_are_taken_where_both_trainings_have_been() -> None:
    short = line(0.3, kls=(0.0, 0.25))
    found = differences([short], [line(0.1)], 1.0)
    assert found["mean_of_min"] == pytest.approx([(0.3 - 0.1) * 0.5])


def test_losses_are_compared_with_those_of_dpo() -> None:
    runs = {
        (*DPO, 0.5): [line(0.3), line(0.4)],
        (*DPO, 0.9): [line(0.1), line(0.2)],
        ("mean", "strengths", 0.5): [line(0.3), line(0.3)],
        ("mean", "strengths", 0.9): [line(0.2), line(0.1)],
    }
    rows = {(row["method"], row["measure"]): row for row in fall_rows(runs, 1.0)}
    assert rows["dpo", "mean_of_min"]["fall"] == pytest.approx(0.2)
    assert rows["dpo", "mean_of_min"]["more_than_dpo"] is None
    mean = rows["mean", "mean_of_min"]
    assert mean["fall"] == pytest.approx(0.15) and mean["more_than_dpo"] == pytest.approx(-0.05)
    half = 12.706205 * 0.05  # t of one degree of freedom, differences -.1 and 0
    assert mean["more_than_dpo_ci"] == pytest.approx([-0.05 - half, -0.05 + half])
    assert fall_rows({key: run for key, run in runs.items() if key[2] == 0.5}, 1.0) == []


def test_curves_are_gains_over_the_start() -> None:
    points = curve_points([line(0.1), line(0.3)])
    assert points[0]["gold"] == points[0]["gold_min"] == points[0]["distance"] == 0
    assert points[-1]["gold"] == pytest.approx(0.6 * math.sqrt(2.5))
    assert points[-1]["gold_min"] == pytest.approx(0.2 * math.sqrt(2.5))
    assert points[-1]["proxy"] == pytest.approx(0.8 * math.sqrt(2.5))
    low, high = points[-1]["proxy_robust_ci"]
    assert (low + high) / 2 == pytest.approx(points[-1]["proxy_robust"]) == pytest.approx(math.sqrt(2.5))
