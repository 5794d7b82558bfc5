"""Batches by memory, halves where memory runs out, prompts read once, ended samples gone: fewer computations, the same samples."""

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from model_families import VOCABULARY, causal_model
from tiny_models import QUESTIONS, tiny_causal_lm
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from prmd.errors import ConfigError
from prmd.inference import batching, generation
from prmd.inference.batching import BatchPlan
from prmd.inference.cache import JsonTable, tokens_key
from prmd.inference.generation import Decoding, SamplingSpeed, generate
from prmd.inference.noise import gumbel, sample_key, splitmix64
from prmd.models.card import MOST_SEQUENCES, prompts_at_once, sampling_bytes
from prmd.models.loading import load_tokenizer_from
from prmd.models.tokenization import Tokens, tokenize_prompt
from prmd.training.rehearsal import TensorBytes

PROMPTS = [(5, 6, 7, 8, 9, 10, 11, 12), (20,), (30, 31, 32), (9, 8, 7, 6, 5, 4, 3)]
DECODING = Decoding(3, 14, seed=4, temperature=1.0, top_p=1.0, stop=1, pad=0)


@torch.no_grad()
def one_at_a_time(model: nn.Module, prompt: Tokens, number: int, decoding: Decoding) -> list[int]:
    """One sample by whole forward passes over one row, without padding or cache."""
    key = torch.tensor([sample_key(decoding.seed, tokens_key(prompt).hex(), number)])
    ids: list[int] = []
    while len(ids) < decoding.max_new_tokens and ids[-1:] != [decoding.stop]:
        logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].float()
        noise = gumbel(splitmix64(key, 1, start=len(ids))[:, 0], len(logits))[0]
        ids.append(int((logits + noise).argmax()))
    return ids


def expected(
    model: nn.Module, decoding: Decoding, prompts: Sequence[Tokens] = PROMPTS
) -> list[list[list[int]]]:
    numbers = range(decoding.samples_per_prompt)
    return [[one_at_a_time(model, prompt, i, decoding) for i in numbers] for prompt in prompts]


def ending_at_different_times(model: nn.Module) -> tuple[Decoding, list[list[list[int]]]]:
    """A decoding that ends at the token that most samples hold, and what one row at a time gives with it."""
    drawn = [ids for group in generation._generate_batch(model, PROMPTS, DECODING) for ids in group]
    stop = max(range(2, VOCABULARY), key=lambda token: sum(token in ids for ids in drawn))
    decoding = replace(DECODING, stop=stop)
    found = expected(model, decoding)
    assert len({len(ids) for group in found for ids in group}) > 3
    return decoding, found


class Forwards:
    """Shapes of what a model's embedding was given, one a forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.hook = model.get_input_embeddings().register_forward_hook(
            lambda module, given, found: self.shapes.append(tuple(given[0].shape))
        )


# ------------------------------------------------------------------ one prompt once, ended samples no more
@pytest.mark.parametrize(
    ("family", "window"),
    [(f, None) for f in ("llama", "qwen2", "qwen3", "gemma", "gemma2")] + [("mistral", 6), ("gemma3", 6)],
)
def test_samples_are_those_of_one_row_at_a_time(family: str, window: int | None) -> None:
    model = causal_model(family, window)
    decoding, alone = ending_at_different_times(model)
    assert generation._generate_batch(model, PROMPTS, decoding) == alone


def test_a_family_without_keys_and_values_is_sampled_as_it_is() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.5
    )
    model = MambaForCausalLM(config).eval()
    equal_length = [(5, 6, 7), (8, 9, 10)]  # it reads padding
    assert generation._generate_batch(model, equal_length, DECODING) == expected(
        model, DECODING, equal_length
    )


def test_a_prompt_is_read_once_and_ended_samples_leave() -> None:
    model = causal_model("llama")
    decoding, _ = ending_at_different_times(model)
    forwards = Forwards(model)
    found = generation._generate_batch(model, PROMPTS, decoding)
    forwards.hook.remove()
    lengths = [len(ids) for group in found for ids in group]
    assert forwards.shapes[0] == (
        len(PROMPTS),
        max(map(len, PROMPTS)),
    )  # gives the first token of every sample
    assert {tokens for _, tokens in forwards.shapes[1:]} == {1} and len(forwards.shapes) == max(lengths)
    steps = [count for count, _ in forwards.shapes[1:]]
    for number, count in enumerate(steps, start=1):
        unended = sum(length > number for length in lengths)
        assert unended <= count < unended / (1 - generation.ENDED_SHARE) + 1
    assert steps == sorted(steps, reverse=True) and steps[-1] < len(lengths)


# ------------------------------------------------------------------ how many at once
SMALL = LlamaConfig(
    vocab_size=400, hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.1,
)  # fmt: skip
DESCRIPTION = "test: sampling"


def missing(*lengths: int) -> dict[str, Tokens]:
    return {f"{i}": (7,) * length for i, length in enumerate(lengths)}


def test_auto_fills_the_free_memory_with_as_many_prompts_as_their_length_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = LlamaForCausalLM(SMALL)
    sizes = sampling_bytes(model.config, torch.float32)
    plan, numbers = BatchPlan(4, 50, "auto"), {"samples": 4, "new_tokens": 50}
    free = 3 * sizes.of_prompt(200, **numbers) + 1
    monkeypatch.setattr(batching, "free_on_card", lambda model: free)
    batches = plan.batches(model, missing(*[20] * 40, *[200] * 7))
    lengths = [[len(prompt) for _, prompt in batch] for batch in batches]
    assert lengths[:2] == [[200] * 3, [200] * 3] and lengths[2][:2] == [200, 20]
    assert sum(map(len, lengths)) == 47 and len(lengths[3]) > 6
    for batch in lengths:
        assert len(batch) * sizes.of_prompt(batch[0], **numbers) <= free
        assert batch == lengths[-1] or (len(batch) + 1) * sizes.of_prompt(batch[0], **numbers) > free
    monkeypatch.setattr(batching, "free_on_card", lambda model: 10)
    assert [len(batch) for batch in plan.batches(model, missing(5, 5))] == [1, 1]
    monkeypatch.setattr(batching, "free_on_card", lambda model: 2**50)
    assert len(plan.batches(model, missing(*[5] * 300))[0]) == MOST_SEQUENCES // 4


def test_a_family_whose_cache_cannot_be_counted_is_sampled_as_without_a_card() -> None:
    assert sampling_bytes(MambaConfig(), torch.float32) is None
    assert prompts_at_once("auto", None, 2**40, samples=5, new_tokens=9)(20) == 6  # of 32 responses


def test_auto_takes_a_fixed_number_without_a_card_and_an_integer_means_itself() -> None:
    model, engine, prompts = LlamaForCausalLM(SMALL), object(), missing(*[5] * 300)
    assert batching.free_on_card(model) is None
    for given, sampler, count in ((32, model, 8), ("auto", model, 8), ("auto", engine, 256), (7, engine, 1)):
        batches = BatchPlan(4, 9, given).batches(sampler, prompts)
        assert {len(batch) for batch in batches[:-1]} == {count}
        assert [key for batch in batches for key, _ in batch] == list(prompts)


@pytest.mark.parametrize(("prompts", "length", "samples"), [(6, 40, 4), (24, 90, 1)])
def test_what_is_counted_is_what_a_sampling_holds(prompts: int, length: int, samples: int) -> None:
    """Against the bytes of all tensors of a sampling that nothing ends; a layer's copies and the mask are not counted."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(SMALL).eval()
    decoding = Decoding(samples, 24, seed=1, temperature=1.0, top_p=1.0, stop=399, pad=0)
    model.lm_head.weight.data[399] = 0
    texts = [tuple(range(3 + i, 3 + i + length)) for i in range(prompts)]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with TensorBytes(model.parameters()) as count:
        generation._generate_batch(model, texts, decoding)
    planned = prompts * sampling_bytes(SMALL, torch.float32).of_prompt(length, samples=samples, new_tokens=24)
    assert 0.75 < (count.peak - weights) / planned < 1.25


# ------------------------------------------------------------------ memory that runs out
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    return tiny_causal_lm(tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(folder, monkeypatch: pytest.MonkeyPatch):
    """`generate` of five prompts by batch size, and the batches that were sampled; the memory holds `asked.most` prompts."""
    tokenizer = load_tokenizer_from(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    prompts = [tokenize_prompt(tokenizer, [{"role": "user", "content": q}], max_length=99) for q in QUESTIONS]
    real = generation._generate_batch

    def sampled(model: nn.Module, group: Sequence[Tokens], decoding: Decoding) -> list[list[list[int]]]:
        if len(group) > ask.most:
            raise ask.error
        ask.batches.append([prompts.index(prompt) for prompt in group])
        return real(model, group, decoding)

    def ask(batch_size: int, table: JsonTable | None = None) -> list[list[Tokens]]:
        ask.batches = []
        found = generate(
            *(model, tokenizer, prompts),
            samples_per_prompt=2,
            max_new_tokens=6,
            seed=3,
            batch_size=batch_size,
            description=DESCRIPTION,
            table=table,
        )
        return [[response.token_ids for response in group] for group in found]

    ask.most, ask.error = 99, torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(generation, "_generate_batch", sampled)
    return ask


@pytest.mark.parametrize("cpu", [False, True])
def test_what_does_not_fit_is_halved_and_nothing_is_sampled_twice(
    asked, cpu: bool, caplog: pytest.LogCaptureFixture
) -> None:
    whole = asked(10)
    assert len(asked.batches) == 1
    asked.most = 1
    if cpu:
        asked.error = RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        )
    with caplog.at_level(logging.WARNING):
        assert asked(8) == whole  # four prompts, then one
    assert sorted(asked.batches) == [[0], [1], [2], [3], [4]]
    said = [record.getMessage() for record in caplog.records]
    for line, tried, next_size in zip(said, (8, 4), (4, 2), strict=True):
        assert f"out of memory with {tried} responses" in line and f"batches of {next_size} and fewer" in line


def test_a_part_that_is_done_stays_done_and_later_batches_begin_small(asked) -> None:
    whole = asked(10)
    asked.most = 2
    assert asked(6) == whole  # three prompts, then two
    order = [i for batch in asked.batches for i in batch]
    assert sorted(order) == [0, 1, 2, 3, 4] and max(map(len, asked.batches)) == 1
    asked.most = 3
    assert asked(10) == whole  # five: two at a time
    assert [len(batch) for batch in asked.batches] == [2, 2, 1]


def test_one_prompt_that_does_not_fit_is_refused_in_one_line(asked) -> None:
    asked.most = 0
    with pytest.raises(
        ConfigError, match=rf"^{DESCRIPTION}: out of memory for one prompt of \d+ tokens with 2"
    ):
        asked(4)
    asked.error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        asked(4)


# ------------------------------------------------------------------ speed
def test_the_speed_of_what_is_new_is_logged_and_carried_by_the_record(
    asked, tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="prmd"):
        found = asked(6, JsonTable(tmp_path))
        asked(6, JsonTable(tmp_path))  # nothing is new
    [record] = [r for r in caplog.records if hasattr(r, "sampling")]
    speed = record.sampling
    tokens = sum(len(ids) for group in found for ids in group)
    assert isinstance(speed, SamplingSpeed) and (speed.responses, speed.tokens) == (10, tokens)
    assert 0 < speed.seconds < 60 and speed.tokens_per_second == pytest.approx(tokens / speed.seconds)
    assert f"{DESCRIPTION}: 10 responses to 5 prompts, {tokens} tokens in " in record.getMessage()
    assert "tokens per second, up to 6 responses at once" in record.getMessage()
