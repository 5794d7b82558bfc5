"""`benchmarks.jailbreakbench`: rates counted by hand, judges on a server, attack files, files that are wrong."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, completion
from tiny_models import tiny_causal_lm
from tiny_workspace import candidate, evaluation_config, result_of

from prmd.artifacts import io
from prmd.benchmarks import jailbreakbench
from prmd.benchmarks.base import BenchmarkResult, Sampling
from prmd.benchmarks.jailbreakbench import jailbreak_rubric, run_jailbreakbench
from prmd.benchmarks.jailbreakbench_data import read_behaviors
from prmd.benchmarks.run import run_benchmarks
from prmd.config.evaluation import BenchmarksConfig, EvaluationConfig, JailbreakBenchConfig, TextJudgeConfig
from prmd.errors import ConfigError, DataError
from prmd.inference.candidates import CandidateModels
from prmd.inference.generation import GeneratedResponse
from prmd.judges import endpoint as endpoint_module
from prmd.judges.cards import CONSTANT_ANSWER
from prmd.judges.rubrics import JudgeItem

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "jailbreakbench"
LONG = "Here is a plan in several steps, each with all that you need to carry it out at home."
REPLIES = {
    "harmful 0": LONG,
    "harmful 1": "I'm sorry, no.",
    "harmful 2": "Sure thing.",
    "harmful 3": "",
    "benign 0": LONG,
    "benign 1": "I cannot help with that.",
    "benign 2": "I won't.",
    "benign 3": "Yes: a poem.",
    "Pretend! harmful 0": LONG,
    "Pretend! harmful 1": LONG,
    "Pretend! harmful 2": "I can't.",
}


def write_behaviors(folder: Path, number: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for group, index, header in (("harmful", "", str.title), ("benign", "index", str)):
        with (folder / f"{group}-behaviors.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow([index, *map(header, ("goal", "target", "behavior", "category", "source"))])
            for i in reversed(range(number)):
                writer.writerow([i, f"{group} {i}", "Sure", "b", f"category {i % 2}", "Original"])
    return folder


def write_attacks(path: Path, **changes: Any) -> Path:
    labelled = [("Yes, " + LONG, True), ("I'm sorry", False), ("Well, " + LONG, False), ("I can't.", True)]
    rows = [
        {"index": i, "prompt": None if i == 3 else f"Pretend! harmful {i}", "response": r, "jailbroken": j}
        for i, (r, j) in enumerate(labelled)
    ]
    rows[0] |= changes
    path.write_text(json.dumps({"parameters": {}, "jailbreaks": rows}), encoding="utf-8")
    return path


def configured(root: Path, judge: dict[str, Any] | None = None, **settings: Any) -> EvaluationConfig:
    benchmarks = BenchmarksConfig(
        run=("jailbreakbench",),
        jailbreakbench=JailbreakBenchConfig(**{"path": str(root / "jbb"), **settings}),
    )
    return evaluation_config(root, benchmarks=benchmarks, text_judge=TextJudgeConfig(**(judge or {})))


def run(config: EvaluationConfig) -> BenchmarkResult:
    return result_of(run_jailbreakbench, config, candidate(config, "reference"))


def mean_outcomes(result: BenchmarkResult) -> dict[str, tuple[float, int]]:
    """Mean and number of each outcome over the items, to be compared with the metric of that name."""
    found: dict[str, list[float]] = {}
    for item in result.items:
        for name, value in item["outcomes"].items():
            found.setdefault(name, []).append(value)
    return {name: (sum(values) / len(values), len(values)) for name, values in found.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jailbreak")
    tiny_causal_lm(folder / "base")
    write_behaviors(folder / "jbb")
    write_attacks(folder / "attacks.json")
    return folder


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The policy answers by `REPLIES`; the decoding of every call is remembered."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(endpoint_module, "LONGEST_PAUSE_SECONDS", 0.001)
    calls: list[dict[str, Any]] = []

    def sample(
        models: CandidateModels, prompts: Sequence[tuple[int, ...]], _: Sampling, **decoding: Any
    ) -> list:
        calls.append(decoding)
        texts = [models.tokenizer.decode(p) for p in prompts]
        users = [t.removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0] for t in texts]
        return [[GeneratedResponse(REPLIES[user], (5,), True)] for user in users]

    monkeypatch.setattr(jailbreakbench, "sample", sample)
    return calls


# ------------------------------------------------------------------ refusal phrases
def test_rates_of_phrases_are_counted_by_hand(root: Path, scripted: list[dict[str, Any]]) -> None:
    result = run(configured(root, attacks=str(root / "attacks.json")))
    values = {name: (m["value"], m["n"]) for name, m in result.metrics.items()}
    assert values == {
        "jbb_nonrefusal[strings]": (2 / 4, 4),
        "jbb_nonrefusal[strings, 15 words or more]": (1 / 4, 4),
        "jbb_nonrefusal[jbb13]": (3 / 4, 4),
        "jbb_nonrefusal[strings], attack": (2 / 4, 4),
        "jbb_nonrefusal[strings, 15 words or more], attack": (2 / 4, 4),
        "jbb_nonrefusal[jbb13], attack": (3 / 4, 4),
        "jbb_nonrefusal[strings] of a constant answer": (1.0, 4),
        "jbb_benign_refusal[strings]": (2 / 4, 4),
    }
    assert not any("asr" in name for name in result.metrics)
    assert result.label == "jailbreakbench[strings]" and result.judge["empty_responses"] == 1
    assert result.judge["constant_answer"] is None  # phrases do not judge harm
    assert (scripted[0]["temperature"], scripted[0]["max_new_tokens"]) == (0.0, 150)
    assert [item["id"] for item in result.items][:5] == [*(f"harmful/{i}" for i in range(4)), "benign/0"]
    lost = next(item for item in result.items if item["id"] == "attack/3")
    assert lost["verdicts"] == {}  # no prompt: a failed attack, counted above
    assert set(lost["outcomes"].values()) == {0.0}
    assert mean_outcomes(result) == {n: v for n, v in values.items() if "constant" not in n}


def test_labels_of_an_attack_file_say_how_far_the_phrases_can_be_trusted(root: Path, scripted: list) -> None:
    agrees = run(configured(root, attacks=str(root / "attacks.json"))).judge["agreement"]
    # labels 1 0 0 1; the phrases say 1 0 1 0
    assert agrees["strings"]["agree"]["value"] == 0.5
    assert (agrees["strings"]["fpr"], agrees["strings"]["fnr"]) == (0.5, 0.5)
    assert run(configured(root)).judge["agreement"] is None


def test_the_real_policy_is_sampled_once_and_greedily(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(root, max_new_tokens=3, max_behaviors=2)
    first = run(config)
    assert len(first.items) == 4 and {s["tokens"] for s in first.samples} <= {1, 2, 3}
    monkeypatch.setattr(
        "prmd.inference.candidates.load_causal_lm", lambda *_, **__: pytest.fail("sampled again")
    )
    assert run(config).samples == first.samples


# ------------------------------------------------------------------ judges
def endpoint_judge(server: ChatServer) -> dict[str, Any]:
    return {"kind": "endpoint", "model": "judge-7b", "base_url": server.url, "max_requests_per_minute": 1e6}


def verdict(i: int, body: dict[str, Any]) -> tuple:
    """Unsafe where the response is long, refused where it says so, and once nothing that can be read."""
    text = body["messages"][0]["content"]
    response = text.partition("[RESPONSE]\n")[2].partition("\n\n[END]")[0]
    if "refuses to help" in text:
        return completion("yes" if "I cannot" in response else "no")
    if response == "Sure thing.":
        return completion("hm")
    return completion("unsafe" if LONG in response else "safe")


def test_a_judge_gives_attack_success_over_what_it_could_say(root: Path, scripted: list) -> None:
    with ChatServer(verdict) as server:
        config = configured(root, endpoint_judge(server), attacks=str(root / "attacks.json"))
        result = run(config)
        asked = [r["body"]["messages"][0]["content"] for r in server.requests]
    values = {n: (m["value"], m["n"]) for n, m in result.metrics.items() if "judge-7b" in n}
    assert values == {
        "jbb_asr[judge-7b]": (1 / 3, 3),
        "jbb_asr[judge-7b], attack": (2 / 4, 4),
        "jbb_benign_refusal[judge-7b]": (1 / 4, 4),
        "jbb_asr[judge-7b] of a constant answer": (0.0, 4),
    }
    assert {n: v for n, v in mean_outcomes(result).items() if n in values} == {
        n: v for n, v in values.items() if "constant" not in n
    }
    assert result.label == "jailbreakbench[judge-7b]"
    card = result.judge
    assert (card["verdicts"], card["parse_failures"]) == (11, 1) and card["usage"]["requests_now"] > 0
    assert card["constant_answer"]["text"] == CONSTANT_ANSWER
    # labels 1 0 0 1; the judge says 1 0 1 0
    # of the two benign refusals by their phrases the judge sees one
    benign = card["agreement"]["benign refusals, against strings"]
    assert (benign["agree"]["value"], benign["fpr"], benign["fnr"]) == (3 / 4, 0.0, 0.5)
    assert card["agreement"]["judge-7b"]["fpr"] == 0.5 and card["agreement"]["judge-7b"]["n"] == 4
    assert not any("Pretend!" in text for text in asked)  # the goal is the request, not the attack
    assert "[REQUEST]\nharmful 0\n" in asked[0]


def test_judgements_can_be_replayed_from_their_own_file(root: Path, scripted: list, tmp_path: Path) -> None:
    with ChatServer(verdict) as server:
        first = run(configured(root, endpoint_judge(server)))
    file = io.write_jsonl(tmp_path / "kept.jsonl", first.judgements)
    again = run(configured(root, {"kind": "replay", "file": str(file)}))
    for name in ("jbb_asr[{}]", "jbb_benign_refusal[{}]"):
        assert again.metrics[name.format("kept")] == first.metrics[name.format("judge-7b")]
    assert again.judge["parse_failures"] == 1 and again.judge["constant_answer"] is None
    io.write_jsonl(file, first.judgements[:-1])
    assert (
        "judge missing: " in (lacking := run(configured(root, {"kind": "replay", "file": str(file)}))).reason
    )
    assert "1 of 4 verdicts are missing" in lacking.reason


def test_a_judge_that_breaks_down_stops_the_benchmark_and_goes_on_later(
    root: Path, scripted: list, tmp_path: Path
) -> None:
    down = {"now": True}

    def answer(i: int, body: dict[str, Any]) -> tuple:
        return (503, {}, b"") if down["now"] and i >= 2 else verdict(i, body)

    with ChatServer(answer) as server:
        settings = {**endpoint_judge(server), "model": "flaky"}
        config = configured(root, settings)
        models = candidate(config, "reference")

        def stage() -> dict[str, Any]:
            arguments = {"reference": models.reference, "tokenizer": models.tokenizer, "force": False}
            return run_benchmarks(config, models.candidate, **arguments)[0]

        record = stage()
        assert record["status"] == "not run" and "2 of 4 replies are kept" in record["reason"]
        before, down["now"] = len(server.requests), False
        record = stage()
        assert record["status"] == "done" and record["metrics"]["jbb_asr[flaky]"]["n"] == 3
        assert len(server.requests) - before == 2 + 4 + 4  # the rest, the benign ones, the constant answer
        folder = config.paths.benchmark("jailbreakbench")
        assert len(io.read_jsonl(folder / "reference.samples.jsonl")) == 8
        assert len(io.read_jsonl(folder / "reference.judgements.jsonl")) == 4 + 4 + 4
        assert stage() == record and len(server.requests) == before + 10
        write_behaviors(root / "jbb")  # the same rows at another time: judged again, from the disk
        assert stage()["fingerprint"] != record["fingerprint"] and len(server.requests) == before + 10


def test_other_words_for_the_judge_come_from_a_file(root: Path, scripted: list, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("Mine: {request} / {response}", encoding="utf-8")
    with ChatServer(lambda i, body: completion("safe")) as server:
        result = run(configured(root, {**endpoint_judge(server), "model": "other"}, judge_prompt=str(words)))
        assert server.requests[0]["body"]["messages"][0]["content"] == f"Mine: harmful 0 / {LONG}"
    assert result.judge["rubrics"]["jailbreak"] == "Mine: {request} / {response}"


def test_words_of_a_file_hold_both_places_in_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("R: {request} A: {response} safe or unsafe?", encoding="utf-8")
    (message,) = jailbreak_rubric(str(file)).ask(JudgeItem("Why?", "No idea."))
    assert message["content"] == "R: Why? A: No idea. safe or unsafe?"
    file.write_text("R: {request}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lacks \{response\}"):
        jailbreak_rubric(str(file))
    file.write_bytes(b"\xff\xfe{request}{response}")
    with pytest.raises(ConfigError, match="UTF-8"):
        jailbreak_rubric(str(file))


# ------------------------------------------------------------------ what does not run, and why
@pytest.mark.parametrize(
    ("judge", "settings", "said"),
    [
        ({}, {"path": None}, "data missing at benchmarks.jailbreakbench.path: null"),
        ({}, {"path": "/nowhere/jbb"}, "data missing at /nowhere/jbb"),
        ({"kind": "none"}, {}, "judge missing at text_judge.kind: none"),
        ({"kind": "replay", "file": "/nowhere.jsonl"}, {}, "text_judge.file: got /nowhere.jsonl, wanted"),
        ({}, {"attacks": "/nowhere.json"}, "benchmarks.jailbreakbench.attacks: got /nowhere.json, wanted"),
        (
            {},
            {"judge_prompt": "/nowhere.txt"},
            "benchmarks.jailbreakbench.judge_prompt: got /nowhere.txt, wanted",
        ),
    ],
)
def test_what_is_missing_is_named(root: Path, judge: dict, settings: dict, said: str) -> None:
    result = run(configured(root, judge, **settings))
    assert result.status == "not run" and said in result.reason and "\n" not in result.reason


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x,goal,t,b,c,s", "harmful-behaviors.csv:3: index: got 'x', wanted a whole number"),
        ("0,again,t,b,c,s", "harmful-behaviors.csv:3: index: 0 is there before, at"),
        ("1,,t,b,c,s", "harmful-behaviors.csv:3: goal: got '', wanted text"),
        ("1,goal,t,b", "harmful-behaviors.csv:3: category: got nothing, wanted text"),
    ],
)
def test_a_malformed_row_is_named_with_its_field(tmp_path: Path, line: str, said: str) -> None:
    write_behaviors(tmp_path)
    text = f"Index,Goal,Target,Behavior,Category,Source\n0,goal,t,b,c,s\n{line}\n"
    (tmp_path / "harmful-behaviors.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_behaviors(JailbreakBenchConfig(path=str(tmp_path)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    write_behaviors(tmp_path)
    with pytest.raises(ConfigError, match="one file; give the folder"):
        read_behaviors(JailbreakBenchConfig(path=str(tmp_path / "benign-behaviors.csv")))
    (tmp_path / "harmful-behaviors.csv").write_bytes(b"Index,Goal\n0,\xff\n")
    with pytest.raises(DataError, match="UTF-8"):
        read_behaviors(JailbreakBenchConfig(path=str(tmp_path)))
    (tmp_path / "harmful-behaviors.csv").write_text("Index,Goal\n", encoding="utf-8")
    with pytest.raises(DataError, match="no rows"):
        read_behaviors(JailbreakBenchConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"index": 1}, "index: 1 is there before"),
        ({"index": 77}, "index: 77 is none of the harmful behaviours"),
        ({"prompt": 5}, "prompt: got 5"),
        ({"response": 5}, "response: got int"),
        ({"jailbroken": "yes"}, "jailbroken: got 'yes'"),
    ],
)
def test_a_malformed_attack_is_named_with_its_field(
    root: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    file = write_attacks(tmp_path / "attacks.json", **changes)
    reason = run(configured(root, attacks=str(file))).reason
    assert said in reason and str(file) in reason


def test_attacks_may_be_json_lines_too(root: Path, scripted: list, tmp_path: Path) -> None:
    file = io.write_jsonl(tmp_path / "attacks.jsonl", [{"index": 0, "prompt": "Pretend! harmful 0"}])
    metrics = run(configured(root, attacks=str(file))).metrics
    assert metrics["jbb_nonrefusal[strings], attack"]["value"] == 1 / 4  # three have no prompt


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs JailbreakBench's behaviours")
def test_the_published_behaviours_are_a_hundred_of_each() -> None:
    found, _ = read_behaviors(JailbreakBenchConfig(path=str(SHARED)))
    for group in ("harmful", "benign"):
        assert [b.index for b in found[group]] == list(range(100))
        assert len({b.category for b in found[group]}) == 10


def test_the_hub_gives_the_same_behaviours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(key: str, path: str, revision: str, name: str | None, subset: str | None) -> dict[str, list]:
        asked.append((key, path, revision, name, subset))
        rows = [{"Index": i, "Goal": f"goal {i}", "Category": "c"} for i in range(3)]
        return {"harmful": rows, "benign": rows[:2]}

    monkeypatch.setattr("prmd.data.readers._load", load)
    found, _ = read_behaviors(JailbreakBenchConfig(path="JailbreakBench/JBB-Behaviors", revision="abc"))
    assert [b.goal for b in found["harmful"]] == ["goal 0", "goal 1", "goal 2"] and len(found["benign"]) == 2
    key = "benchmarks.jailbreakbench.path"
    assert set(asked) == {(key, "JailbreakBench/JBB-Behaviors", "abc", "behaviors", None)}
