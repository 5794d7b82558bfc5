"""`judges.text`, `judges.rubrics`, `judges.chats`, `judges.classifier`: judges of every kind on a server, tiny models and files."""

import json
from pathlib import Path

import pytest
import torch
from chat_server import ChatServer, completion
from tiny_models import direct_logits, labelled, tiny_causal_lm
from tiny_workspace import evaluation_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from prmd.config.evaluation import EvaluationConfig, TextJudgeConfig
from prmd.errors import ConfigError, DataError
from prmd.judges import endpoint as endpoint_module
from prmd.judges.chats import ReplayChat, conversation_key, short_name
from prmd.judges.classifier import LabelClassifier
from prmd.judges.endpoint import ATTEMPTS, EndpointError
from prmd.judges.rubrics import JAILBREAK, REFUSAL, JudgeItem, item_key
from prmd.judges.text import ReplayJudge, TextJudge, make_text_judge

ITEMS = [JudgeItem("How do I {response}?", "Like {request} this."), JudgeItem("Why?", "No idea.")]


def judge_of(root: Path, **settings: object) -> TextJudge:
    return make_text_judge(config_of(root, **settings))


def config_of(root: Path, **settings: object) -> EvaluationConfig:
    return evaluation_config(root, text_judge=TextJudgeConfig(**settings))


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(endpoint_module, "LONGEST_PAUSE_SECONDS", 0.01)


# ------------------------------------------------------------------ rubrics
def test_texts_with_braces_are_put_in_as_they_are() -> None:
    (message,) = JAILBREAK.ask(ITEMS[0])
    assert "[REQUEST]\nHow do I {response}?\n" in message["content"]
    assert "[RESPONSE]\nLike {request} this.\n" in message["content"] and message["role"] == "user"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("unsafe", True), ("Safe.", False), ("\n\nunsafe\nS2,S9", True), ("**Unsafe**", True),
        ("The response is unsafe.", True), ("I would say that this is safe", False), ("Yes", True),
        ("", None), ("maybe", None), ("It is not safe, it is unsafe", None), ("12", None),
    ],
)  # fmt: skip
def test_replies_are_read_or_counted_as_unread(reply: str, said: bool | None) -> None:
    assert JAILBREAK.read(reply) is said


def test_labels_are_words_the_rubric_reads_again() -> None:
    for rubric in (JAILBREAK, REFUSAL):
        assert [rubric.read(rubric.label(said) or "") for said in (True, False, None)] == [True, False, None]


# ------------------------------------------------------------------ endpoint
def served(server: ChatServer, **more: object) -> dict[str, object]:
    return {
        "kind": "endpoint", "model": "org/judge-7b", "base_url": server.url,
        "max_requests_per_minute": 1e6, **more,
    }  # fmt: skip


def test_an_endpoint_judges_counts_its_cost_and_is_asked_once(tmp_path: Path) -> None:
    prices = {"price_per_million_prompt_tokens": 3.0, "price_per_million_reply_tokens": 15.0}
    with ChatServer(lambda i, body: completion(["unsafe", "well..."][i], 100 + i, 4)) as server:
        judge = judge_of(tmp_path, **served(server, **prices))
        assert judge.name == "judge-7b" and judge.writes and judge.answers(REFUSAL)
        verdicts = judge.judge([*ITEMS, ITEMS[0]], JAILBREAK)
        assert [v.positive for v in verdicts] == [True, None, True] and verdicts[1].raw == "well..."
        assert [r["body"]["messages"] for r in server.requests] == [JAILBREAK.ask(item) for item in ITEMS]
        assert judge.usage() == {
            "replies": 2, "requests_now": 2, "prompt_tokens": 201, "reply_tokens": 8,
            "cost": pytest.approx((201 * 3 + 8 * 15) / 1e6),
        }  # fmt: skip
        again = judge_of(tmp_path, **served(server))
        assert [v.positive for v in again.judge(ITEMS, JAILBREAK)] == [True, None]
        assert len(server.requests) == 2  # from the disk
        assert again.usage()["requests_now"] == 0 and again.usage()["prompt_tokens"] == 201
        assert again.usage()["cost"] is None


def test_an_endpoint_that_breaks_down_loses_nothing(tmp_path: Path) -> None:
    items = [JudgeItem("Why?", f"Because {i}.") for i in range(40)]
    broken = {"now": True}

    def answer(i: int, body: dict) -> tuple:
        return (503, {}, b"down") if i >= 21 and broken["now"] else completion("no")

    with ChatServer(answer) as server:
        with pytest.raises(EndpointError, match="21 of 40 replies are kept, run the same command again"):
            judge_of(tmp_path, **served(server)).judge(items, REFUSAL)
        assert len(server.requests) == 21 + ATTEMPTS
        broken["now"] = False
        verdicts = judge_of(tmp_path, **served(server)).judge(items, REFUSAL)
        assert [v.positive for v in verdicts] == [False] * 40
        assert len(server.requests) == 21 + ATTEMPTS + 19


def test_a_guard_is_shown_the_exchange_itself(tmp_path: Path) -> None:
    with ChatServer(lambda i, body: completion("\n\nunsafe\nS1")) as server:
        judge = judge_of(tmp_path, **served(server, conversation=True))
        assert not judge.answers(REFUSAL) and not judge.writes
        assert judge.judge(ITEMS[1:], JAILBREAK)[0].positive is True
    assert server.requests[0]["body"]["messages"] == [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No idea."},
    ]  # fmt: skip


# ------------------------------------------------------------------ local model
def test_a_local_model_completes_greedily_and_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_causal_lm(tmp_path / "tiny-judge")
    judge = judge_of(tmp_path, kind="local_model", model=str(folder))
    prompts = [[{"role": "user", "content": "Is it?"}], [{"role": "user", "content": "Why is the sky blue?"}]]
    replies = judge.complete(prompts, max_new_tokens=5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        new: list[int] = []
        with torch.no_grad():
            while len(new) < 5 and tokenizer.eos_token_id not in new:
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert reply == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert judge.name == "tiny-judge" and judge.usage()["replies"] == 2
    monkeypatch.setattr("prmd.judges.chats.load_causal_lm", lambda *_: pytest.fail("loaded again"))
    again = judge_of(tmp_path, kind="local_model", model=str(folder))
    assert again.complete(prompts, max_new_tokens=5) == replies


def test_a_conversation_longer_than_the_context_gets_no_reply(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge = judge_of(tmp_path, kind="local_model", model=str(tiny_causal_lm(tmp_path / "base")))
    prompts = [[{"role": "user", "content": "why " * 3000}], [{"role": "user", "content": "Why?"}]]
    replies = judge.complete(prompts, max_new_tokens=3)
    assert replies[0] == "" and "1 of 2 conversations are longer" in caplog.text


def test_a_local_model_that_is_not_there_names_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    judge = judge_of(tmp_path, kind="local_model", model=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"text_judge\.model: cannot load"):
        judge.complete([[{"role": "user", "content": "Why?"}]], max_new_tokens=9)


# ------------------------------------------------------------------ classifier
def test_a_classifier_reads_request_and_response_by_its_named_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = labelled(tmp_path / "guard", {0: "safe", 1: "Unsafe"})
    judge = judge_of(tmp_path, kind="classifier", model=str(folder))
    verdicts = judge.judge(ITEMS, JAILBREAK)
    for item, verdict in zip(ITEMS, verdicts, strict=True):
        wanted = float(direct_logits(folder, item.request, item.response).softmax(-1)[1])
        assert verdict.score == pytest.approx(wanted, abs=1e-5) and verdict.positive is (wanted > 0.5)
    assert judge.name == "guard" and judge.answers(JAILBREAK) and not judge.answers(REFUSAL)
    with pytest.raises(ConfigError, match="classifier cannot write"):
        judge.complete([], max_new_tokens=9)
    monkeypatch.setattr("prmd.judges.classifier.load_labelled_classifier", lambda *_: pytest.fail("again"))
    assert judge_of(tmp_path, kind="classifier", model=str(folder)).judge(ITEMS, JAILBREAK) == verdicts


def test_a_classifier_reads_spelled_control_tokens_as_text(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "guard", {0: "safe", 1: "unsafe"})
    spelled = "no<|im_end|><|pad|>"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = LabelClassifier(str(folder), "unsafe", "text_judge", evaluation_config(tmp_path).paths)
    as_text = tokenizer(spelled, split_special_tokens=True)["input_ids"]
    assert not {0, 1, 2} & set(as_text) and tokenizer.decode(as_text) == spelled
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = float(model(torch.tensor([as_text])).logits[0].softmax(-1)[1])
    assert found.probabilities([spelled]) == pytest.approx([wanted], abs=1e-5)
    assert wanted != pytest.approx(float(direct_logits(folder, spelled).softmax(-1)[1]), abs=1e-3)


def test_independent_labels_and_a_single_logit_are_sigmoids(tmp_path: Path) -> None:
    several = labelled(
        tmp_path / "several",
        {0: "toxic", 1: "insult", 2: "threat"},
        problem_type="multi_label_classification",
    )
    single = labelled(tmp_path / "single", {0: "LABEL_0"})
    config = evaluation_config(tmp_path)
    texts = ["A fox.", "I do not know why the sky is blue."]
    for folder, label, index in ((several, None, 0), (several, "threat", 2), (single, None, 0)):
        found = LabelClassifier(str(folder), label, "text_judge", config.paths).probabilities(texts)
        wanted = [float(direct_logits(folder, text).sigmoid()[index]) for text in texts]
        assert found == pytest.approx(wanted, abs=1e-5)


def test_a_classifier_without_a_known_label_or_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = labelled(tmp_path / "mood", {0: "sad", 1: "glad"})
    config = evaluation_config(tmp_path)
    with pytest.raises(ConfigError, match=r"labels \['glad', 'sad'\], none of which"):
        LabelClassifier(str(folder), None, "text_judge", config.paths).probabilities(["a"])
    with pytest.raises(ConfigError, match="has no label 'toxic'"):
        LabelClassifier(str(folder), "toxic", "text_judge", config.paths).probabilities(["a"])
    for absent in (tmp_path / "nowhere", tiny_causal_lm(tmp_path / "no-head")):
        with pytest.raises(ConfigError, match="cannot be loaded as a text classifier"):
            LabelClassifier(str(absent), None, "text_judge", config.paths).probabilities(["a"])


# ------------------------------------------------------------------ replay and kinds
def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_verdicts_and_replies_are_replayed_from_a_file(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "Rate it."}]
    rows = [
        {"id": item_key(ITEMS[0], JAILBREAK), "label": "unsafe"},
        {"id": item_key(ITEMS[1], JAILBREAK), "label": None, "raw": "hm"},
        {"id": conversation_key(prompt, 9), "text": "[[7]]"},
    ]
    judge = judge_of(tmp_path, kind="replay", file=str(write_rows(tmp_path / "said.jsonl", *rows)))
    assert [v.positive for v in judge.judge(ITEMS, JAILBREAK)] == [True, None]
    assert judge.complete([prompt], max_new_tokens=9) == ["[[7]]"] and judge.name == "said"
    with pytest.raises(DataError, match="2 of 2 verdicts are missing"):
        judge.judge(ITEMS, REFUSAL)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"label": "safe"}], "row 1: id: got None"),
        (
            [{"id": "a", "label": "safe"}, {"id": "a", "label": "unsafe"}],
            "row 2: id: 'a' has another verdict",
        ),
        ([{"id": "a", "label": 3}], "row 1: neither label nor text"),
    ],
)
def test_a_malformed_file_of_verdicts_is_one_line(tmp_path: Path, rows: list[dict], said: str) -> None:
    with pytest.raises(DataError, match=said):
        ReplayChat(write_rows(tmp_path / "said.jsonl", *rows))


def test_a_file_that_is_missing_or_not_utf8_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text_judge\.file: .* is not there"):
        judge_of(tmp_path, kind="replay", file=str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_bytes(b'{"id": "a", "label": "\xff"}')
    with pytest.raises(DataError, match="UTF-8"):
        judge_of(tmp_path, kind="replay", file=str(tmp_path / "bad.jsonl"))


def test_kinds_without_a_model(tmp_path: Path) -> None:
    assert judge_of(tmp_path, kind="none") is None
    judge = judge_of(tmp_path)
    assert (judge.kind, judge.writes, judge.answers(JAILBREAK)) == ("strings", False, False)
    assert short_name("org/Judge-7B") == short_name("C:\\models\\Judge-7B\\") == "Judge-7B"
    assert isinstance(
        judge_of(tmp_path, kind="replay", file=str(write_rows(tmp_path / "x.jsonl"))), ReplayJudge
    )
