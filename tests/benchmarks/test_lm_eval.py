"""TruthfulQA against lm-eval: the same MC1 and MC2 on the same questions and model, from fewer tokens.

Needs `pip install "lm-eval[hf]"`, in an environment of its own if need be, and the questions as published. With
`PRMD_LM_EVAL_MODEL=<folder>` the same is asked of a real model, 50 questions, which takes lm-eval about 15 minutes on two
cores at 135M parameters.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tiny_models import tiny_causal_lm
from tiny_workspace import evaluation_config, questions_of
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from prmd.artifacts import io
from prmd.benchmarks.truthfulqa import Question, question_row, score_question, strided
from prmd.inference.cache import ScoreTable
from prmd.inference.scoring import score_logps

lm_eval = pytest.importorskip("lm_eval", reason='lm-eval is not installed (pip install "lm-eval[hf]")')
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "truthfulqa"
REAL_MODEL = os.environ.get("PRMD_LM_EVAL_MODEL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs TruthfulQA.csv as published"),
]


@dataclass
class Scores:
    """Per question, in the order asked; `tokens` entered the model, padding included."""

    mc1: list[float]
    mc2: list[float]
    tokens: int


class TokenCount:
    """Counts the tokens that enter a model until it is closed."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens = 0
        self.close = model.get_input_embeddings().register_forward_pre_hook(self._add).remove

    def _add(self, module: nn.Module, arguments: Sequence[torch.Tensor]) -> None:
        self.tokens += arguments[0].numel()


def scores_of_lm_eval(folder: Path, questions: Sequence[Question], work: Path) -> Scores:
    """lm-eval's two tasks with its own prompt and its own arithmetic; only the data set is local."""
    from lm_eval.models.huggingface import HFLM

    io.write_jsonl(work / "questions.jsonl", [lm_eval_row(question) for question in questions])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    count = TokenCount(model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, device="cpu"),
        tasks=local_tasks(work / "questions.jsonl"),
        log_samples=True,
        bootstrap_iters=0,
    )
    count.close()
    values = {
        name: [float(s["acc"]) for s in sorted(result["samples"][name], key=lambda s: s["doc_id"])]
        for name in ("local_mc1", "local_mc2")
    }
    return Scores(values["local_mc1"], values["local_mc2"], count.tokens)


def lm_eval_row(question: Question) -> dict[str, Any]:
    """A row of the hub's multiple_choice layout."""
    mc1 = [question.best, *question.false]
    mc2 = [*question.true, *question.false]
    return {
        "question": question.text,
        "mc1_targets": {"choices": mc1, "labels": [1] + [0] * len(question.false)},
        "mc2_targets": {
            "choices": mc2,
            "labels": [1] * len(question.true) + [0] * len(question.false),
        },
    }


def local_tasks(questions: Path) -> list[dict[str, Any]]:
    folder = Path(lm_eval.__file__).parent / "tasks" / "truthfulqa"
    task = yaml.safe_load((folder / "truthfulqa_mc1.yaml").read_text(encoding="utf-8"))
    for key in ("tag", "dataset_name"):
        task.pop(key)
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(questions)}}}
    mc2 = {
        "task": "local_mc2",
        "doc_to_choice": "{{mc2_targets.choices}}",
        "process_results": module_at(folder / "utils.py").process_results_mc2,
    }
    return [task | data | {"task": "local_mc1"}, task | data | mc2]


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("lm_eval_truthfulqa_utils", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def our_scores(folder: Path, questions: Sequence[Question], work: Path) -> Scores:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    count, tokenizer = TokenCount(model), AutoTokenizer.from_pretrained(folder)
    logps = score_logps(
        model,
        [question_row(tokenizer, question) for question in questions],
        table=ScoreTable(work / "logps", 1),
        pad_id=tokenizer.pad_token_id,
        tokens_per_batch=8192,
        description="ours",
        behind_primer=True,
    )
    scores = [score_question(q, values) for q, values in zip(questions, logps, strict=True)]
    return Scores([s.mc1 for s in scores], [s.mc2 for s in scores], count.tokens)


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        ("tiny", 20),
        pytest.param(
            REAL_MODEL, 50, marks=pytest.mark.skipif(not REAL_MODEL, reason="PRMD_LM_EVAL_MODEL is not set")
        ),
    ],
    ids=["tiny", "real"],
)
def test_mc1_and_mc2_are_those_of_lm_eval(
    model: str, asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tiny_causal_lm(tmp_path / "model") if model == "tiny" else Path(model)
    everything = questions_of(evaluation_config(tmp_path, truthfulqa=SHARED))[0]
    questions = strided(everything, asked)
    ours = our_scores(folder, questions, tmp_path)
    theirs = scores_of_lm_eval(folder, questions, tmp_path)
    means = {
        name: (np.mean(s.mc1), np.mean(s.mc2), s.tokens) for name, s in (("ours", ours), ("lm-eval", theirs))
    }
    print(f"{asked} questions, (MC1, MC2, tokens): {means}")
    assert ours.mc1 == theirs.mc1
    # lm-eval exponentiates the sums; far below exp(-700) its probabilities vanish, and those questions say nothing.
    defined = [i for i in range(asked) if np.isfinite(theirs.mc2[i])]
    assert len(defined) >= (asked if model != "tiny" else 1)
    assert [ours.mc2[i] for i in defined] == pytest.approx([theirs.mc2[i] for i in defined], abs=2e-4)
    assert theirs.tokens >= 8 * ours.tokens
