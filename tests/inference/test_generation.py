"""Sampling against a plain loop and against the model's own distribution; order, stops, resume, rows for scoring."""

import re

import numpy as np
import pytest
import torch
from gloo_processes import run_processes
from scipy import stats
from tiny_models import QUESTIONS, tiny_causal_lm
from transformers import AutoModelForCausalLM, GenerationConfig

from prmd import runtime
from prmd.inference import generation, scoring
from prmd.inference.cache import JsonTable, tokens_key
from prmd.inference.generation import GeneratedResponse, generate, sample_rows
from prmd.models.chat_templates import stop_token
from prmd.models.loading import load_tokenizer_from
from prmd.models.tokenization import tokenize_prompt, tokenize_row


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_causal_lm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer_from(folder)


@pytest.fixture
def model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    # what a hub model may carry; none of it may be used
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_k=1, top_p=0.2, repetition_penalty=1.5, max_length=3
    )
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [
        tokenize_prompt(tokenizer, [{"role": "user", "content": text}], max_length=100) for text in QUESTIONS
    ]


def sample(model, tokenizer, prompts, **changes):
    arguments = {
        "samples_per_prompt": 1,
        "max_new_tokens": 8,
        "seed": 5,
        "batch_size": 3,
        "description": "test",
        "temperature": 1.0,
    }
    return generate(model, tokenizer, prompts, **(arguments | changes))


@torch.no_grad()
def greedy(model, prompt, stop, limit):
    ids = list(prompt)
    while len(ids) - len(prompt) < limit:
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == stop:
            break
    return tuple(ids[len(prompt) :])


def with_stop_bias(model, stop, amount):
    """The end-of-turn token becomes likelier: its logit is doubled and the head is a copy of its own."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[stop] *= amount
    return model


# ------------------------------------------------------------------ distribution
def test_greedy_decoding_equals_a_plain_loop(model, tokenizer, prompts):
    stop = stop_token(tokenizer)
    with_stop_bias(model, stop, 3.0)
    found = sample(model, tokenizer, prompts, temperature=0, max_new_tokens=12)
    for prompt, [response] in zip(prompts, found, strict=True):
        expected = greedy(model, prompt, stop, 12)
        assert response.token_ids == expected
        assert response.finished == (expected[-1] == stop)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_follow_the_models_own_distribution(model, tokenizer, prompts, temperature):
    n = 3000
    found = sample(
        model,
        tokenizer,
        prompts[:3],
        samples_per_prompt=n,
        max_new_tokens=1,
        batch_size=3 * n,
        temperature=temperature,
    )
    for prompt, responses in zip(prompts, found, strict=False):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
        probabilities = (logits / temperature).softmax(-1).numpy()
        counts = np.bincount([r.token_ids[0] for r in responses], minlength=len(probabilities))
        common = probabilities * n >= 5
        observed = np.append(counts[common], counts[~common].sum())
        expected = np.append(probabilities[common], probabilities[~common].sum()) * n
        assert common.sum() > 20  # neither a few tokens nor one
        assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_top_p_keeps_the_smallest_set_that_reaches_it(model, tokenizer, prompts):
    found = sample(
        model, tokenizer, prompts[:1], samples_per_prompt=600, max_new_tokens=1, batch_size=600, top_p=0.3
    )
    with torch.no_grad():
        p = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].softmax(-1)
    order = p.argsort(descending=True)
    size = int((p[order].cumsum(0) < 0.3).sum()) + 1
    assert {r.token_ids[0] for r in found[0]} <= set(order[:size].tolist())
    assert len({r.token_ids[0] for r in found[0]}) > 1


def test_the_models_own_settings_are_back_afterwards(model, tokenizer, prompts):
    own = model.generation_config
    sample(model, tokenizer, prompts[:1])
    assert model.generation_config is own
    assert own.repetition_penalty == 1.5


# ------------------------------------------------------------------ ends, order, seeds
def test_a_finished_response_ends_at_its_first_stop_token(model, tokenizer, prompts):
    stop = stop_token(tokenizer)
    assert tokenizer.decode([stop]) == "<|im_end|>"
    with_stop_bias(model, stop, 2.0)
    found = sample(model, tokenizer, prompts, samples_per_prompt=40, batch_size=200, max_new_tokens=6)
    responses = [r for group in found for r in group]
    finished = [r for r in responses if r.finished]
    assert 0 < len(finished) < len(responses)
    for r in responses:
        assert r.token_ids.count(stop) == int(r.finished)
        assert (r.token_ids[-1] == stop) == r.finished
        assert r.finished or len(r.token_ids) == 6
        assert r.text == tokenizer.decode(r.token_ids, skip_special_tokens=True).strip()


def test_responses_come_back_in_the_order_of_the_prompts(model, tokenizer, prompts):
    together = sample(model, tokenizer, prompts, temperature=0)
    backwards = sample(model, tokenizer, prompts[::-1], temperature=0, batch_size=1)
    assert together == backwards[::-1]
    assert len({r[0].token_ids for r in together}) > 1


def test_samples_depend_on_the_seed_alone(model, tokenizer, prompts):
    first = sample(model, tokenizer, prompts, samples_per_prompt=2)
    torch.manual_seed(123)
    assert sample(model, tokenizer, prompts, samples_per_prompt=2) == first
    assert sample(model, tokenizer, prompts, samples_per_prompt=2, seed=6) != first
    assert all(a.token_ids != b.token_ids for a, b in first)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_samples_do_not_depend_on_what_is_sampled_beside_them(
    model, tokenizer, prompts, tmp_path, batch_size
):
    whole = sample(model, tokenizer, prompts, samples_per_prompt=2, batch_size=100)
    assert len({r.token_ids for group in whole for r in group}) == 10
    arguments = {"samples_per_prompt": 2, "batch_size": batch_size}
    assert sample(model, tokenizer, prompts[::-1], **arguments)[::-1] == whole
    # half of the cache is gone
    table = JsonTable(tmp_path)
    table.append(
        [
            (tokens_key(p).hex(), [r.token_ids for r in g])
            for p, g in zip(prompts[1::2], whole[1::2], strict=True)
        ]
    )
    assert sample(model, tokenizer, prompts, table=table, **arguments) == whole
    # neither on how many samples are drawn nor on how long they may get
    fewer = sample(model, tokenizer, prompts, batch_size=batch_size)
    assert fewer == [group[:1] for group in whole]
    for short, long in zip(sample(model, tokenizer, prompts, max_new_tokens=4), fewer, strict=True):
        assert long[0].token_ids[:4] == short[0].token_ids


def test_prompts_of_an_earlier_version_stay_beside_new_ones(model, tokenizer, prompts, tmp_path):
    whole = sample(model, tokenizer, prompts)
    JsonTable(tmp_path).append([(tokens_key(prompts[2]).hex(), [[40, 41, 42]])])
    found = sample(model, tokenizer, prompts, table=JsonTable(tmp_path))
    assert [r.token_ids for r in found[2]] == [(40, 41, 42)]
    assert found[:2] + found[3:] == whole[:2] + whole[3:]
    assert sample(None, tokenizer, prompts, table=JsonTable(tmp_path)) == found


def test_a_prompt_given_twice_is_sampled_once(model, tokenizer, prompts):
    found = sample(model, tokenizer, [prompts[0], prompts[1], prompts[0]])
    assert found[0] == found[2]


# ------------------------------------------------------------------ resume
def test_an_interrupted_run_goes_on_with_the_same_samples(model, tokenizer, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SHARD_SECONDS", -1.0)
    whole = sample(model, tokenizer, prompts, samples_per_prompt=2, batch_size=2)
    batches = []
    real = generation._generate_batch

    def counted(model, group, decoding):
        if len(batches) == 2:
            batches.append(None)
            raise KeyboardInterrupt
        batches.append(group)
        return real(model, group, decoding)

    monkeypatch.setattr(generation, "_generate_batch", counted)
    arguments = {"samples_per_prompt": 2, "batch_size": 2}
    with pytest.raises(KeyboardInterrupt):
        sample(model, tokenizer, prompts, table=JsonTable(tmp_path), **arguments)
    assert sample(model, tokenizer, prompts, table=JsonTable(tmp_path), **arguments) == whole
    assert len(batches) == 1 + len(prompts)
    assert sample(None, tokenizer, prompts, table=JsonTable(tmp_path), **arguments) == whole


def test_progress_names_the_pass_and_the_remaining_time(model, tokenizer, prompts, monkeypatch, capsys):
    monkeypatch.setattr(runtime, "_PROGRESS_AFTER_SECONDS", 0.0)
    sample(model, tokenizer, prompts, batch_size=2, description="hard_min: sampling")
    last = capsys.readouterr().err.splitlines()[-1]
    assert "hard_min: sampling: 100%" in last and "3/3" in last
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d", last)  # elapsed < remaining


# ------------------------------------------------------------------ several processes
@pytest.mark.slow
def test_two_processes_share_the_batches_and_return_the_samples_of_one(folder, tokenizer, prompts, tmp_path):
    one, two = (run_processes("two_generations.py", tmp_path / str(n), folder, processes=n) for n in (1, 2))
    assert two[0]["samples"] == two[1]["samples"] == one[0]["samples"]
    assert len(one[0]["batches"]) == 5
    shares = [record["batches"] for record in two]
    assert sorted(shares[0] + shares[1]) == sorted(one[0]["batches"]) and min(map(len, shares)) == 2
    # the main process alone has written everything: it is read back without a model
    arguments = {"samples_per_prompt": 2, "batch_size": 2, "table": JsonTable(tmp_path / "2" / "samples")}
    stored = sample(None, tokenizer, prompts, **arguments)
    assert [[list(r.token_ids) for r in responses] for responses in stored] == one[0]["samples"][1]


# ------------------------------------------------------------------ rows for scoring
def test_samples_become_rows_as_training_tokenises_them(tokenizer, prompts):
    text = "I do not know"
    stop = stop_token(tokenizer)
    ids = tuple(tokenizer.encode(text, add_special_tokens=False))
    finished = GeneratedResponse(text, (*ids, stop), True)
    cut = GeneratedResponse(text, ids, False)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    for keep_suffix in (True, False):
        trained = tokenize_row(tokenizer, messages, [text], keep_suffix=keep_suffix)
        [row] = sample_rows(prompts[:1], [[finished, cut]], tokenizer, keep_suffix=keep_suffix)
        assert row.prompt_ids == trained.prompt_ids
        assert row.responses[0] == trained.responses[0]
        # a reward model reads a cut response closed like any other; a policy is scored on what it sampled
        assert row.responses[1] == (trained.responses[0] if keep_suffix else ids)
