"""Random texts, files and replies for everything that reads what others wrote: a valid result, or a `UserError`, nothing else."""

import gzip
import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow
from faults.rows import Row
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from pyarrow import parquet
from tiny_mt_bench import BODIES

from prmd.artifacts import io
from prmd.artifacts.paths import CONFIG_DIR
from prmd.benchmarks import jailbreakbench_data, mt_bench_data
from prmd.config.evaluation import EvaluationConfig, JailbreakBenchConfig, TextJudgeConfig
from prmd.config.loading import load_config
from prmd.config.policy import PolicyConfig
from prmd.config.shared import HhRlhfConfig, PkuSafeRlhfConfig, RewardModelConfig, TruthfulQaConfig
from prmd.data import truthfulqa
from prmd.data.collection import PairCollection, RawFile
from prmd.data.hh_rlhf import hh_rlhf_pairs
from prmd.data.pku_safe_rlhf import pku_pairs
from prmd.data.readers import json_rows, parquet_rows
from prmd.errors import UserError
from prmd.judges import rubrics
from prmd.judges.chats import ReplayChat
from prmd.judges.endpoint import _PassingError, make_endpoint
from prmd.judges.exchange import Answer, _unpacked
from prmd.pairs import PreferencePair

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)  # halves of characters included
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3)
)


def _pieces(*words: str) -> st.SearchStrategy[str]:
    """Texts made of the words that a parser looks for, with anything between them."""
    return st.lists(st.sampled_from(words) | ANY_TEXT, max_size=9).map("".join)


def _rows_with(*keys: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Rows that have most of the wanted keys, with values of every kind."""
    row = st.dictionaries(st.sampled_from(keys) | ANY_TEXT, JSON | st.just("a text"), max_size=len(keys) + 1)
    return st.lists(row, max_size=3)


@st.composite
def _damaged(draw: Callable[..., Any], files: Sequence[bytes]) -> bytes:
    """A file with bytes replaced, put in or left out; or bytes alone."""
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        content[place : place + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
    return bytes(content[: draw(st.integers(0, len(content)))] if draw(st.booleans()) else content)


def _as_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="faults-fuzz-"))


def _file(name: str, content: bytes) -> Path:
    path = _folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ------------------------------------------------------------------ what is read
def _transcripts(rows: list[dict[str, Any]]) -> None:
    file = RawFile("hh_rlhf", "helpful-base/train", "train", Path("x"), rows)
    found = hh_rlhf_pairs([file], HhRlhfConfig())
    assert len(found.pairs) + len(found.quarantine) == len(rows)
    _are_pairs(found)


def _are_pairs(found: PairCollection) -> None:
    for item in found.pairs:
        row = json.loads(io.jsonl_line(item.pair.to_row()))
        assert PreferencePair.from_row(row, objective=item.pair.objective, where="x") == item.pair


def _pku(rows: list[dict[str, Any]]) -> None:
    for honest in ("deception_categories", "better_response"):
        file = RawFile("pku_safe_rlhf", "x", None, Path("x"), rows)
        _are_pairs(pku_pairs([file], PkuSafeRlhfConfig(honest=honest)))


def _truthfulqa(rows: list[dict[str, Any]]) -> None:
    questions = list(truthfulqa._questions(rows, Path("x")))
    file = RawFile("truthfulqa", "generation", None, Path("x"), questions)
    _are_pairs(truthfulqa.truthfulqa_pairs([file], TruthfulQaConfig()))


def _stored_pair(row: dict[str, Any]) -> None:
    assert PreferencePair.from_row(row, objective="helpful", where="x").prompt


def _configuration(text: str) -> None:
    for kind, name in ((RewardModelConfig, "reward_model_config.yaml"), (PolicyConfig, "policy_config.yaml")):
        load_config(_file(f"yaml/{name}", text.encode("utf-8", "surrogatepass")), kind)


def _overrides(words: list[str]) -> None:
    load_config(CONFIG_DIR, EvaluationConfig, words)


def _json_files(content: bytes) -> None:
    for read, name in ((json_rows, "a.jsonl"), (json_rows, "a.json"), (io.read_jsonl, "b.jsonl")):
        try:
            assert all(isinstance(row, dict) for row in read(_file(name, content)))
        except UserError as error:
            assert name in str(error)
    io.read_json(_file("c.json", content))


def _packed_files(content: bytes) -> None:
    list(json_rows(_file("a.jsonl.gz", content)))


def _csv(content: bytes) -> None:
    path = _file("TruthfulQA.csv", content)
    list(truthfulqa._questions(truthfulqa.csv_rows(path), path))


def _parquet(content: bytes) -> None:
    parquet_rows(_file("a.parquet", content))


def _tensors(content: bytes) -> None:
    io.read_tensors(_file("a.safetensors", content))


def _verdicts(reply: str) -> None:
    for rubric in (rubrics.JAILBREAK, rubrics.REFUSAL):
        assert rubric.read(reply) in (True, False, None)
        assert isinstance(rubric.ask(rubrics.JudgeItem(reply, reply))[0]["content"], str)
    rating = mt_bench_data.parse_rating(reply)
    assert rating is None or 1 <= rating <= 10
    assert mt_bench_data.parse_verdict(reply) in ("first", "second", "tie", None)
    for tells in rubrics.NON_REFUSAL.values():
        assert tells(reply) in (True, False)


def _endpoint(body: bytes) -> None:
    settings_of = TextJudgeConfig(kind="endpoint", model="m", base_url="http://127.0.0.1:9/v1")
    try:
        reply = make_endpoint(settings_of)._reply(Answer(200, "OK", {}, _unpacked(body, 1 << 16)))
        assert reply.text is None or reply.text.encode() is not None
    except _PassingError as error:  # asked again
        assert "\n" not in str(error)


def _replayed(content: bytes) -> None:
    ReplayChat(_file("verdicts.jsonl", content)).texts(["a"])


def _templates(content: bytes) -> None:
    mt_bench_data.read_templates(_file("judge_prompts.jsonl", content))


def _attacks(content: bytes) -> None:
    path = _file("attacks.json", content)
    behaviors = {"harmful": [jailbreakbench_data.Behavior(0, "goal", "category")], "benign": []}
    jailbreakbench_data.read_attacks(JailbreakBenchConfig(attacks=str(path)), behaviors)


# ------------------------------------------------------------------ what it is made of
_TRANSCRIPT = _pieces("\n\nHuman:", "\n\nAssistant:", " a", "\n\n", "Human:", "\n", "\u00a0", "\0", "\ufeff")
_PKU_KEYS = (
    *("prompt", "response_0", "response_1", "better_response_id", "safer_response_id"),
    *("is_response_0_safe", "is_response_1_safe", "response_0_harm_category", "response_1_harm_category"),
)
_LABELS = st.sampled_from([0, 1, "0", "1", 0.0, True, 2, None, "", [0]]) | JSON
_PKU_ROW = st.fixed_dictionaries({key: JSON | _LABELS | st.just("text") for key in _PKU_KEYS})
_QUESTION_KEYS = (
    *("Question", "Best Answer", "Correct Answers", "Incorrect Answers"),
    *("question", "best_answer", "correct_answers", "incorrect_answers"),
)
_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "x"]) | JSON, "content": JSON}
)
_PAIR = st.fixed_dictionaries(
    {
        "id": ANY_TEXT | JSON,
        "prompt": st.lists(_MESSAGE | JSON, max_size=3) | JSON,
        "chosen": st.lists(_MESSAGE, max_size=2) | JSON,
        "rejected": st.lists(_MESSAGE, max_size=2) | JSON,
        "source": ANY_TEXT | JSON,
    }
)
_YAML = _pieces(
    *("data:", " {approach: embedded}", "\n", "  ", "training:", "learning_rate: ", "1e-5", "- ", "[", "]"),
    *(
        "{",
        "}",
        ": ",
        "!!int 7",
        "*a",
        "&a",
        "extends: .",
        "seed: ",
        "'",
        '"',
        "#",
        "---\n",
        "? ",
        "|",
        ">",
        "\t",
        ".nan",
    ),
)
_OVERRIDE = _pieces(
    "seed", "=", ".", "generation", "benchmarks", "run", "[", "]", "{", "a: ", "1", "-1", "nan", ",", "null"
)
_PAIR_FILE = _as_lines([{"chosen": "a", "rejected": "é", "n": 1.5}, {"chosen": ["x"], "rejected": None}])
_CSV_FILE = b'Type,Question,Best Answer,Correct Answers,Incorrect Answers\r\nx,Q?,a,a; b,"c; d"\r\n'
_REPLY = _pieces(
    "[[",
    "]]",
    "5",
    "1e9",
    "[",
    "]",
    "A",
    "B",
    "C",
    "yes",
    "no",
    "unsafe",
    " ",
    "I'm sorry",
    "\u2019",
    "{request}",
    "-",
)
_COMPLETION = {
    "choices": [{"message": {"role": "assistant", "content": "yes"}}],
    "usage": {"prompt_tokens": 3},
}
_VERDICTS = [{"id": "a", "label": "yes"}, {"id": "b", "raw": "no"}]
_TEMPLATES = [{"name": name, "system_prompt": "J", "prompt_template": body} for name, body in BODIES.items()]
_ATTACKS = {"jailbreaks": [{"index": 0, "prompt": "p", "response": None, "jailbroken": True}]}


def _parquet_file() -> bytes:
    stream = BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{"a": "é", "b": [1, 2]}, {"a": None, "b": []}]), stream)
    return stream.getvalue()


def _tensor_file() -> bytes:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    return len(header).to_bytes(8, "little") + header + bytes(8)


_DEEP = b"[" * 3000
_LONG = b'{"a": ' + b"9" * 5000 + b"}"
TARGETS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any], None]]] = {
    "transcripts": (
        st.lists(st.fixed_dictionaries({"chosen": _TRANSCRIPT | JSON, "rejected": _TRANSCRIPT}), max_size=3),
        _transcripts,
    ),
    "PKU-SafeRLHF rows": (st.lists(_PKU_ROW, max_size=2) | _rows_with(*_PKU_KEYS), _pku),
    "TruthfulQA rows": (_rows_with(*_QUESTION_KEYS), _truthfulqa),
    "prepared rows": (_PAIR, _stored_pair),
    "configuration": (_YAML, _configuration),
    "overrides": (st.lists(_OVERRIDE, max_size=3), _overrides),
    "JSON files": (
        _damaged([_PAIR_FILE, b"[" + _PAIR_FILE.replace(b"\n", b",", 1) + b"]", _DEEP, _LONG]),
        _json_files,
    ),
    "gzipped files": (_damaged([gzip.compress(_PAIR_FILE), _PAIR_FILE]), _packed_files),
    "CSV files": (_damaged([_CSV_FILE]), _csv),
    "parquet files": (_damaged([_parquet_file()]), _parquet),
    "safetensors files": (_damaged([_tensor_file()]), _tensors),
    "judges' verdicts": (_REPLY, _verdicts),
    "endpoints' answers": (
        _damaged(
            [json.dumps(_COMPLETION).encode(), gzip.compress(json.dumps(_COMPLETION).encode()), _DEEP, _LONG]
        )
        | JSON.map(
            lambda value: json.dumps(_COMPLETION | {"choices": [{"message": {"content": value}}]}).encode()
        ),
        _endpoint,
    ),
    "replayed verdicts": (
        _damaged([_as_lines(_VERDICTS), _DEEP, _LONG]) | _rows_with("id", "label", "raw").map(_as_lines),
        _replayed,
    ),
    "MT-Bench templates": (
        _damaged([_as_lines(_TEMPLATES)]) | _rows_with("name", "system_prompt").map(_as_lines),
        _templates,
    ),
    "attack files": (
        _damaged([json.dumps(_ATTACKS).encode(), _DEEP, _LONG])
        | _rows_with("index", "prompt", "response").map(
            lambda rows: json.dumps({"jailbreaks": rows}).encode()
        ),
        _attacks,
    ),
}


def check(name: str, examples: int, number: int = 0) -> None:
    """Read examples of one kind; raises what a reader raised that is no `UserError`."""
    strategy, read = TARGETS[name]

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(strategy)
    def examined(value: Any) -> None:
        try:
            read(value)
        except UserError as error:
            assert str(error).strip()

    examined()


def run_fuzz(name: str, examples: int, number: int) -> Row:
    """The row of one kind; the smallest example that failed is in its detail."""
    case = f"{examples} examples"
    try:
        check(name, examples, number)
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", ()))
        return Row(
            "fuzz",
            name,
            case,
            "bad",
            " ".join(f"{type(error).__name__}: {error} {notes}".split())[:600],
            examples,
        )
    return Row("fuzz", name, case, "identical", "a valid result or one clear error each", examples)
