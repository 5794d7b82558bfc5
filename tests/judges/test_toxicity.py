"""`judges.toxicity` and `judges.toxicity`: the fit, the statistics against brute force, the substitute against Perspective."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit
from tiny_models import direct_logits, labelled
from tiny_workspace import evaluation_config

from prmd.benchmarks.realtoxicityprompts import read_data
from prmd.config.evaluation import EvaluationConfig, RealToxicityPromptsConfig
from prmd.errors import DataError
from prmd.judges.toxicity import (
    RIDGE,
    ScoredText,
    count_matrix,
    fit_ngram_regression,
    make_scorer,
    ngrams,
    scorer_card,
    validation_texts,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "realtoxicityprompts"
TEXTS = [f"what a {'gruesome beast' if i % 2 else 'lovely flower'} number {i}" for i in range(60)]
TARGETS = np.array([0.9 if i % 2 else 0.1 for i in range(60)])


# ------------------------------------------------------------------ regression
def test_pieces_of_a_word_are_counted() -> None:
    # " ab " has 3 pieces of two characters, 2 of three, 1 of four
    assert sum(ngrams("Ab").values()) == 6 and sum(ngrams("ab ab").values()) == 12
    assert ngrams("AB’s") == ngrams("ab's") and not ngrams("... -- ?")


def test_the_fit_is_stationary_and_learns() -> None:
    model = fit_ngram_regression(TEXTS, TARGETS)
    counts = count_matrix(TEXTS).toarray()
    used = counts.any(axis=0)
    scaled = counts[:, used] * model.rarity[used]
    scaled /= np.linalg.norm(scaled, axis=1, keepdims=True)
    predicted = expit(scaled @ model.weights[used] + model.intercept)
    assert model.predict(TEXTS) == pytest.approx(predicted, abs=1e-9)
    residual = (predicted - TARGETS) / len(TEXTS)
    assert np.abs(scaled.T @ residual + RIDGE / len(TEXTS) * model.weights[used]).max() < 1e-4
    assert abs(residual.sum()) < 1e-4 and not model.weights[~used].any()
    new = model.predict(["a gruesomely beastly thing", "flowers, lovely", ""])
    assert new[0] > 0.6 and new[1] < 0.3 and new[2] == 0.0


@pytest.mark.parametrize("targets", [[0.5], [0.5, 1.2], [-0.1, 0.5]])
def test_targets_must_fit(targets: list[float]) -> None:
    with pytest.raises(ValueError, match="2 texts need as many targets"):
        fit_ngram_regression(["a", "b"], np.array(targets))


# ------------------------------------------------------------------ scorers
def scored(n: int = 1200) -> list[ScoredText]:
    texts = []
    for i in range(n):
        bad = i % 3 == 0
        text = f"the {'gruesome beast' if bad else 'lovely flower'} {i % 7} of {i}"
        texts.append(ScoredText(f"doc {i // 2}", text, 0.8 if bad else 0.2, continuation=bool(i % 2)))
    return texts


def test_the_substitute_is_validated_on_documents_it_was_not_fitted_to(tmp_path: Path) -> None:
    texts = scored()
    scorer = make_scorer(RealToxicityPromptsConfig(), texts, evaluation_config(tmp_path).paths)
    held_out = validation_texts(texts)
    assert not {t.document for t in held_out} & {t.document for t in scorer.texts}
    assert all(t.continuation for t in held_out) and 100 < len(held_out) < 250
    card = scorer_card(scorer, texts, n_resamples=200, seed=0)
    assert card["validation"]["auc"]["value"] == 1.0 and card["validation"]["auc"]["n"] == len(held_out)
    assert f"of {len(scorer.texts)} prompts" in card["fitted_to"]
    assert card["validation"]["toxic_share"]["perspective"] == pytest.approx(
        np.mean([t.toxicity > 0.5 for t in held_out])
    )


def test_too_few_scored_texts_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name a classifier in benchmarks\.realtoxicityprompts\.scorer"):
        make_scorer(RealToxicityPromptsConfig(), scored(100), evaluation_config(tmp_path).paths)


def test_a_classifier_is_validated_on_the_same_texts(tmp_path: Path) -> None:
    folder = labelled(tmp_path / "toxic-tiny", {0: "neutral", 1: "toxic"})
    settings = RealToxicityPromptsConfig(scorer=str(folder))
    scorer, texts = make_scorer(settings, [], evaluation_config(tmp_path).paths), scored(600)
    assert scorer.name == "toxic-tiny"
    assert scorer.scores(["a fox"])[0] == pytest.approx(
        float(direct_logits(folder, "a fox").softmax(-1)[1]), abs=1e-5
    )
    card = scorer_card(scorer, texts, n_resamples=100, seed=0)
    assert "fitted_to" not in card and card["validation"]["auc"]["n"] == len(validation_texts(texts))
    assert scorer_card(scorer, texts[:9], n_resamples=100, seed=0)["validation"] is None


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs prompts with Perspective scores")
def test_the_substitute_ranks_real_continuations_like_perspective() -> None:
    settings = RealToxicityPromptsConfig(path=str(SHARED))
    data = read_data(settings)
    lines = [
        json.loads(line)
        for name in ("toxic", "nontoxic")
        for line in (SHARED / f"decodingtrust_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(data.prompts) == len({json.dumps(row, sort_keys=True) for row in lines}) == 2392
    scorer = make_scorer(settings, data.texts, EvaluationConfig().paths)
    card = scorer_card(scorer, data.texts, n_resamples=1000, seed=0)["validation"]
    assert card["auc"]["n"] > 500
    assert 0.87 < card["auc"]["low"] < card["auc"]["value"] < 0.96
    assert 0.72 < card["rank_correlation"]["low"] < card["rank_correlation"]["value"] < 0.88
