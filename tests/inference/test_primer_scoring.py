"""`inference.scoring`: the same log-probabilities as plain scoring, from an eighth of the tokens."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import FAMILIES, causal_model, rows_of, separate_logps
from tiny_models import plain_logp, tiny_causal_lm
from tiny_workspace import evaluation_config, questions_of
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from prmd.benchmarks.truthfulqa import PRIMER, question_row, strided
from prmd.inference.cache import ScoreTable
from prmd.inference.scoring import PrimedLogps, score_logps, shared_beginning
from prmd.models.tokenization import PrefixRow

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "truthfulqa"
OPTIONS = {"pad_id": 0, "tokens_per_batch": 6000, "description": "test"}
score_behind = partial(score_logps, behind_primer=True)


class TokenCount:
    """Counts every token (padding too) that enters a model."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens = 0
        model.get_input_embeddings().register_forward_pre_hook(self._add)

    def _add(self, module: nn.Module, arguments: Sequence[torch.Tensor]) -> None:
        self.tokens += arguments[0].numel()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_causal_lm(tmp_path_factory.mktemp("model"))


def rows_behind(beginning: tuple[int, ...]) -> list[PrefixRow]:
    tails = [
        ((9,), ((11, 12), (13,))),
        ((8, 7, 6), ((14, 15, 16),)),
        ((5, 4), ((17,), (18, 19), (20, 21, 22))),
    ]
    return [PrefixRow(beginning + tail, responses) for tail, responses in tails]


def test_the_beginning_all_prompts_share_leaves_a_token_of_each() -> None:
    assert shared_beginning(rows_behind((1, 2, 3))) == (1, 2, 3)
    equal = [PrefixRow((1, 2, 3), ((4,),)), PrefixRow((1, 2, 3), ((5,),))]
    assert shared_beginning(equal) == (1, 2)
    assert shared_beginning([PrefixRow((1, 2, 3), ((4,),)), PrefixRow((1, 2), ((5,),))]) == (1,)
    assert shared_beginning([PrefixRow((1, 2), ((4,),)), PrefixRow((3, 2), ((5,),))]) == ()


@pytest.mark.parametrize("beginning", [(), (1,), tuple(range(30, 70))], ids=len)
def test_scores_are_those_of_plain_passes(folder: Path, tmp_path: Path, beginning: tuple[int, ...]) -> None:
    model, rows = AutoModelForCausalLM.from_pretrained(folder).eval(), rows_behind(beginning)
    table = ScoreTable(tmp_path / "table", 1)
    found = score_behind(model, rows, table=table, **OPTIONS)
    for row, values in zip(rows, found, strict=True):
        wanted = [plain_logp(model, list(row.prompt_ids), list(r)) for r in row.responses]
        assert values.tolist() == pytest.approx(wanted, abs=1e-4)
    again = score_behind(None, rows, table=ScoreTable(tmp_path / "table", 1), **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_as_one_conversation_at_a_time(family: str, tmp_path: Path) -> None:
    """Families that take no shared rows (a window in some layers, eager attention) are scored plainly."""
    beginning = tuple(range(2, 40))
    rows = [PrefixRow(beginning + row.prompt_ids, row.responses) for row in rows_behind(())]
    found = score_behind(
        causal_model(family), rows, table=ScoreTable(tmp_path, 1), **OPTIONS | {"tokens_per_batch": 120}
    )
    assert torch.cat(found).tolist() == pytest.approx(
        separate_logps(causal_model(family), rows).tolist(), abs=1e-4
    )


@settings(max_examples=25, deadline=None)
@given(rows=rows_of(), beginning=st.lists(st.integers(2, 60), min_size=1, max_size=30).map(tuple))
def test_any_rows_behind_any_beginning(
    rows: list[PrefixRow], beginning: tuple[int, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    behind = [PrefixRow(beginning + row.prompt_ids, row.responses) for row in rows]
    table = ScoreTable(tmp_path_factory.mktemp("table"), 1)
    found = score_behind(causal_model("qwen3"), behind, table=table, **OPTIONS)
    assert torch.cat(found).tolist() == pytest.approx(
        separate_logps(causal_model("qwen3"), behind).tolist(), abs=1e-4
    )


def test_one_answer_each_and_many_batches_agree_too(folder: Path, tmp_path: Path) -> None:
    model, beginning = AutoModelForCausalLM.from_pretrained(folder).eval(), tuple(range(30, 70))
    rows = [
        PrefixRow((*beginning, i), ((i + 1, i + 2),)) for i in range(3, 9)
    ]  # a 2-D mask: one answer a row
    options = OPTIONS | {"tokens_per_batch": 100}
    found = score_behind(model, rows, table=ScoreTable(tmp_path / "a", 1), **options)
    plain = score_logps(model, rows, table=ScoreTable(tmp_path / "b", 1), **options)
    assert torch.cat(found).tolist() == pytest.approx(torch.cat(plain).tolist(), abs=1e-4)


def test_a_model_without_such_masks_is_scored_plainly(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("primed")

    monkeypatch.setattr(PrimedLogps, "forward", refused)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    rows = rows_behind((1, 2, 3))
    found = score_behind(model, rows, table=ScoreTable(tmp_path, 1), **OPTIONS)
    assert float(found[0][0]) == pytest.approx(plain_logp(model, [1, 2, 3, 9], [11, 12]), abs=1e-4)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs TruthfulQA.csv as published")
def test_an_eighth_of_the_tokens_for_the_same_scores_on_real_questions(folder: Path, tmp_path: Path) -> None:
    """Against every distinct choice alone behind primer and question, which is what lm-eval computes."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    questions = strided(questions_of(evaluation_config(tmp_path, truthfulqa=SHARED))[0], 20)
    count = TokenCount(model)
    rows = [question_row(tokenizer, question) for question in questions]
    found = score_behind(model, rows, table=ScoreTable(tmp_path / "t", 1), **OPTIONS)
    ours, count.tokens = count.tokens, 0
    for question, values in zip(questions, found, strict=True):
        context = tokenizer(f"{PRIMER}\n\nQ: {question.text}\nA:")["input_ids"]
        alone = {
            answer: plain_logp(model, context, tokenizer(f" {answer}")["input_ids"])
            for answer in dict.fromkeys(question.answers)
        }
        # The tiny tokenizer makes answers of a hundred tokens: sums of hundreds of nats, of which float32 keeps 7 digits.
        wanted = [alone[answer] for answer in question.answers]
        assert values.tolist() == pytest.approx(wanted, abs=1e-4, rel=1e-6)
    assert count.tokens >= 8 * ours, (count.tokens, ours)
