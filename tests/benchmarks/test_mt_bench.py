"""`benchmarks.mt_bench`: temperatures, ratings against numpy, both orders, what does not run, judging without generating."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_mt_bench import CATEGORIES, ScriptedJudge, changed, write_files, write_rows
from tiny_workspace import candidate, evaluation_config, result_of, write_workspace

from prmd.artifacts import io
from prmd.benchmarks import mt_bench
from prmd.benchmarks.base import BenchmarkResult
from prmd.benchmarks.mt_bench import run_mt_bench
from prmd.benchmarks.run import run_benchmarks
from prmd.config.evaluation import BenchmarksConfig, EvaluationConfig, MtBenchConfig, TextJudgeConfig
from prmd.inference.generation import GeneratedResponse
from prmd.judges.cards import CONSTANT_ANSWER, PairwiseResult
from prmd.judges.chats import ReplayChat, conversation_key
from prmd.pairs import Message
from prmd.statistics.resampling import Resampling


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mt_bench")
    write_workspace(folder)
    write_files(folder / "files")
    return folder


def settings(root: Path, **changes: Any) -> EvaluationConfig:
    values = {"path": str(root / "files"), "max_new_tokens": 5} | changes
    return evaluation_config(root, benchmarks=BenchmarksConfig(mt_bench=MtBenchConfig(**values)))


def run(config: EvaluationConfig, method: str, judge: Any, patch: pytest.MonkeyPatch) -> BenchmarkResult:
    patch.setattr("prmd.benchmarks.mt_bench.make_text_judge", lambda _: judge)
    return result_of(run_mt_bench, config, candidate(config, method))


# ------------------------------------------------------------------ what does not run
def test_what_is_missing_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_path = evaluation_config(root)
    assert "benchmarks.mt_bench.path" in str(
        result_of(run_mt_bench, without_path, candidate(without_path, "reference")).reason
    )
    nowhere = settings(root, path=str(root / "nowhere"))
    reason = result_of(run_mt_bench, nowhere, candidate(nowhere, "reference")).reason
    assert str(reason).startswith(f"data missing at {root / 'nowhere'}: benchmarks.mt_bench.path: got ")
    half = settings(root, path=str(root))
    reason = result_of(run_mt_bench, half, candidate(half, "reference")).reason
    assert reason == f"data missing at {root / 'question.jsonl'}"
    for kind in ("none", "strings"):
        config = settings(root).model_copy(update={"text_judge": TextJudgeConfig(kind=kind)})
        result = result_of(run_mt_bench, config, candidate(config, "reference"))
        assert result.status == "not run" and f"text_judge.kind is {kind}" in result.reason


def test_a_malformed_file_does_not_run_and_says_why(root: Path, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "files")
    changed(folder / "question.jsonl", 3, turns=None)
    judge = TextJudgeConfig(kind="endpoint", model="m", base_url="http://127.0.0.1:9")
    config = settings(root, path=str(folder)).model_copy(update={"text_judge": judge})
    result = result_of(run_mt_bench, config, candidate(config, "reference"))
    assert result.status == "not run" and "question.jsonl:4: turns" in result.reason


# ------------------------------------------------------------------ answers
def test_temperatures_by_category_and_second_turns_behind_own_answers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[float, int]] = []
    generate = mt_bench.generate

    def recorded(model: Any, tokenizer: Any, prompts: Sequence[Any], **options: Any) -> Any:
        calls.append((options["temperature"], len(prompts)))
        assert options["max_new_tokens"] == 5 and options["samples_per_prompt"] == 1
        return generate(model, tokenizer, prompts, **options)

    monkeypatch.setattr(mt_bench, "generate", recorded)
    judge = ScriptedJudge()
    result = run(settings(root), "reference", judge, monkeypatch)
    assert calls == [(0.0, 2), (0.1, 1), (0.7, 2)] * 2  # math twice; stem; writing and the unknown category
    answers = {(s["id"], s["turn"]): s["response"] for s in result.samples}
    assert len(answers) == 10
    second = [p[-1]["content"] for p in judge.asked if "Q1 first 0?" in p[-1]["content"]]
    assert f"Q1 first 0? A1 {answers['81', 1]} Q2 second 0? A2 {answers['81', 2]}" in second


# ------------------------------------------------------------------ judging
def test_means_of_readable_ratings_per_turn_and_category(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = ScriptedJudge(silent_every=4)
    result = run(settings(root), "reference", judge, monkeypatch)
    texts = [prompt[-1]["content"] for prompt in judge.asked[:10]]
    rated = np.array([np.nan if i % 4 == 0 else 1 + len(text) % 10 for i, text in enumerate(texts)])
    categories = np.repeat(CATEGORIES, 2)
    values = {name: found["value"] for name, found in result.metrics.items()}
    assert values["average"] == pytest.approx(np.nanmean(rated))
    assert values["turn 1"] == pytest.approx(np.nanmean(rated[::2]))
    assert values["turn 2"] == pytest.approx(np.nanmean(rated[1::2]))
    assert values["average, math"] == pytest.approx(np.nanmean(rated[categories == "math"]))
    assert values["unreadable ratings"] == np.isnan(rated).mean()
    assert (
        result.metrics["average"]["n"] == 5 and result.metrics["average"]["items"] == 7
    )  # questions, ratings
    constant = [1 + len(p[-1]["content"]) % 10 for i, p in enumerate(judge.asked[10:20]) if i % 4]
    assert all(CONSTANT_ANSWER in p[-1]["content"] for p in judge.asked[10:20])
    assert values["average, constant answer"] == pytest.approx(np.mean(constant))
    assert not any("win rate" in name for name in values)  # the reference against itself says nothing
    assert result.label == "mt_bench[judge=scripted]"
    assert result.judge["parse_failures"] == 3 and result.judge["verdicts"] == 10
    assert [item["id"] for item in result.items] == ["81", "82", "83", "84", "85"]
    assert result.items[0]["rating_1"] is None and result.items[0]["rating_2"] == rated[1]


def test_a_judge_that_always_prefers_the_first_makes_only_ties(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = ScriptedJudge()
    result = run(settings(root), "hard_min", judge, monkeypatch)
    rate = result.metrics["win rate against the reference"]
    assert (rate["value"], rate["chance"], rate["n"], rate["items"]) == (0.5, 0.5, 5, 10)
    assert result.judge["position_bias"]["first_wins"]["value"] == 1.0
    assert result.judge["position_bias"]["consistent"]["value"] == 0.0
    assert {item["win_1"] for item in result.items} == {0.5}


def test_a_judge_that_knows_the_policy_lets_it_win(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Partial(ScriptedJudge):
        def complete(self, prompts: Sequence[list[Message]], *, max_new_tokens: int) -> list[str]:
            replies = super().complete(prompts, max_new_tokens=max_new_tokens)
            pairs = [p[-1]["content"].startswith("PAIR") for p in prompts]
            if not all(pairs):
                return replies
            self.orders = getattr(self, "orders", 0) + 1  # first call: the policy is A
            return ["[[A]]" if self.orders == 1 else "[[B]]"] * len(prompts)

    result = run(settings(root), "hard_min", Partial(), monkeypatch)
    assert result.metrics["win rate against the reference"]["value"] == 1.0
    silent = run(settings(root), "hard_min", ScriptedJudge(silent_every=1), monkeypatch)
    assert (
        set(silent.metrics) == {"unreadable ratings"} and silent.metrics["unreadable ratings"]["value"] == 1.0
    )


def test_the_win_rate_at_equal_length_takes_out_what_length_wins() -> None:
    """Wins that are a logistic function of length alone: one half at equal length, whatever the plain rate."""

    def answers(tokens: list[int]) -> list[Any]:
        return [
            (GeneratedResponse("", (1,) * n, True), GeneratedResponse("", (1,) * (n + 2), True))
            for n in tokens
        ]

    longer = [-4, -2, 0, 2, 4, 6, 8, 10]
    pairs = PairwiseResult(tuple(float(n > 0) if n else 0.5 for n in longer for _ in (1, 2)), (), ())
    both = answers([20 + n for n in longer]), answers([20] * 8)
    [(name, found)] = mt_bench.win_rate_at_equal_length(pairs, *both, Resampling(200, 0)).items()
    assert name == "win rate against the reference, at equal length"
    assert found["value"] == pytest.approx(0.5, abs=0.02) and (found["n"], found["items"]) == (8, 16)
    unread = PairwiseResult((None, 1.0, None, None, *pairs.outcomes[4:]), (), ())
    found = mt_bench.win_rate_at_equal_length(unread, *both, Resampling(200, 0))[name]
    assert (found["n"], found["items"]) == (7, 13)
    none = PairwiseResult((None,) * 16, (), ())
    assert mt_bench.win_rate_at_equal_length(none, *both, Resampling(200, 0)) == {}


def test_pairwise_can_be_left_out_and_replies_cut_short(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, config = ScriptedJudge(), settings(root, pairwise=False)
    short = config.text_judge.model_copy(update={"max_reply_tokens": 7})
    result = run(config.model_copy(update={"text_judge": short}), "hard_min", judge, monkeypatch)
    assert judge.reply_tokens == 7
    assert {row["id"] for row in result.judgements} == {conversation_key(p, 7) for p in judge.asked}
    assert len(judge.asked) == 20 and "win_1" not in result.items[0]


def test_another_judge_generates_nothing_and_its_file_can_be_replayed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(settings(root), "hard_min", ScriptedJudge(), monkeypatch)

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("generated again")

    monkeypatch.setattr("prmd.inference.candidates.load_policy", no_weights)
    monkeypatch.setattr("prmd.inference.candidates.load_causal_lm", no_weights)
    judge = ScriptedJudge(name="other", silent_every=2)
    second = run(settings(root), "hard_min", judge, monkeypatch)
    assert second.samples == first.samples and second.label != first.label
    keys = [conversation_key(prompt, 2048) for prompt in judge.asked]
    assert {row["id"] for row in second.judgements} == set(keys)
    write_rows(tmp_path / "verdicts.jsonl", first.judgements)
    chat = ReplayChat(tmp_path / "verdicts.jsonl")
    assert chat.complete(judge.asked[:1], max_new_tokens=2048)[0].startswith("Rating: [[")


def test_the_stage_keeps_samples_judgements_and_metrics_apart(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prmd.benchmarks.mt_bench.make_text_judge", lambda _: ScriptedJudge())
    config = settings(root)
    benchmarks = config.benchmarks.model_copy(update={"run": ("mt_bench",)})
    config = config.model_copy(update={"benchmarks": benchmarks})
    models = candidate(config, "reference")
    (record,) = run_benchmarks(
        config, models.candidate, reference=models.reference, tokenizer=models.tokenizer, force=True
    )
    assert (record["benchmark"], record["name"], record["status"]) == (
        "mt_bench[judge=scripted]", "mt_bench", "done",
    )  # fmt: skip
    assert record["judge"]["name"] == "scripted" and record["n"] == 5
    folder = config.paths.benchmark("mt_bench")
    rows = {
        kind: io.read_jsonl(folder / f"reference.{kind}.jsonl") for kind in ("items", "samples", "judgements")
    }
    assert {kind: len(found) for kind, found in rows.items()} == {"items": 5, "samples": 10, "judgements": 20}
