"""Sampling on the device: responses end at their end token, and are those of a CPU where rounding does not decide."""

import copy

import pytest
import torch
from tiny_models import QUESTIONS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from prmd.inference.generation import GeneratedResponse, generate
from prmd.models.chat_templates import stop_token
from prmd.models.loading import load_tokenizer_from
from prmd.models.tokenization import Tokens, tokenize_prompt

LIMIT = 8


@pytest.fixture(scope="module")
def tokenizer(tiny_base) -> PreTrainedTokenizerBase:
    return load_tokenizer_from(tiny_base)


@pytest.fixture(scope="module")
def model(tiny_base, tokenizer) -> nn.Module:
    """On the CPU; the logit of the end token is doubled, so that some responses end and some do not."""
    model = AutoModelForCausalLM.from_pretrained(tiny_base, attn_implementation="sdpa").eval()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.lm_head.weight[stop_token(tokenizer)] *= 2.0
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[Tokens]:
    return [
        tokenize_prompt(tokenizer, [{"role": "user", "content": text}], max_length=100) for text in QUESTIONS
    ]


def sampled(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Tokens],
    samples: int,
    temperature: float,
) -> list[GeneratedResponse]:
    found = generate(
        *(model, tokenizer, prompts),
        samples_per_prompt=samples,
        max_new_tokens=LIMIT,
        seed=5,
        batch_size=3 * samples,
        description="test",
        temperature=temperature,
    )
    return [response for group in found for response in group]


@torch.no_grad()
def greedy(model: nn.Module, prompt: Tokens, stop: int) -> Tokens:
    """The likeliest token, one pass over the whole conversation for each, on the CPU."""
    ids = list(prompt)
    while len(ids) < len(prompt) + LIMIT and (len(ids) == len(prompt) or ids[-1] != stop):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def test_responses_end_at_the_first_end_token(device, model, tokenizer, prompts) -> None:
    stop = stop_token(tokenizer)
    found = sampled(copy.deepcopy(model).to(device), tokenizer, prompts, 40, 1.0)
    finished = [response for response in found if response.finished]
    assert 0 < len(finished) < len(found) == 200
    for response in found:
        assert response.token_ids.count(stop) == int(response.finished)
        assert (response.token_ids[-1] == stop) == response.finished
        assert response.finished or len(response.token_ids) == LIMIT
    # the noise is the same integers everywhere; a logit's rounding of 1e-6 decides about one token in 1e5
    here = sampled(model, tokenizer, prompts, 40, 1.0)
    assert sum(ours == theirs for ours, theirs in zip(found, here, strict=True)) >= 198


def test_greedy_responses_are_those_of_a_plain_loop_on_the_cpu(device, model, tokenizer, prompts) -> None:
    found = sampled(copy.deepcopy(model).to(device), tokenizer, prompts, 1, 0.0)
    assert [r.token_ids for r in found] == [greedy(model, p, stop_token(tokenizer)) for p in prompts]
