"""The choice between sdpa and flex_attention, and that both compute the same."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_families import (
    SHARED,
    assert_same_gradients,
    causal_model,
    classifier,
    family_config,
    gradients,
)
from torch import Tensor, nn
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AutoModelForCausalLM, Qwen2Config
from transformers.integrations import flex_attention as transformers_flex

from prmd.artifacts.paths import ArtifactPaths
from prmd.config.shared import ModelConfig
from prmd.errors import ConfigError
from prmd.models import attention
from prmd.models.attention import (
    SDPA_OR_FLEX,
    attention_implementation,
    block_mask,
    rows_mask,
)
from prmd.models.loading import load_causal_lm, load_classifier, load_policy
from prmd.models.prefix_rows import PADDING, attention_mask, collate_rows
from prmd.models.sequence_models import SequenceLogps, SequenceRewards, supports_shared_prompts
from prmd.models.tokenization import PrefixRow

LONG_ROWS = [
    PrefixRow(tuple(range(2, 58)) * 3, (tuple(range(5, 50)) * 3, tuple(range(9, 60)) * 2)),
    PrefixRow((7, 8, 9), ((20, 21), (30, 31, 32), (33,))),
]


def with_attention(model: nn.Module, name: str) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.set_attn_implementation(name)
    return copied


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> list[tuple[BlockMask, set[torch.dtype]]]:
    """`flex_attention` without its compiler: the masks and number formats it was given."""
    seen: list[tuple[BlockMask, set[torch.dtype]]] = []

    def run(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **arguments: object) -> Tensor:
        seen.append((arguments["block_mask"], {query.dtype, key.dtype, value.dtype}))
        return torch_flex.flex_attention(query, key, value, **arguments)

    monkeypatch.setattr(transformers_flex, "compile_friendly_flex_attention", run)
    # Older releases of torch have no such switch.
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    return seen


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with a GPU and a compiler, as far as the choice looks."""
    monkeypatch.setattr(attention, "get_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(attention, "missing_compiler", lambda: None)
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


# ------------------------------------------------------------------ masks
def looks(segments: list[int], query: int, key: int) -> bool:
    """What a token may look at, in words: itself, and what stands before it in the prompt or in its own response."""
    if query == key:
        return True
    if key > query or segments[key] == PADDING:
        return False
    return segments[key] in (0, segments[query])


@settings(max_examples=30, deadline=None)
@given(
    segments=st.integers(1, 5).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(PADDING, 3), min_size=length, max_size=length), min_size=1, max_size=3
        )
    )
)
def test_both_masks_hold_the_pairs_that_may_look(segments):
    ids = torch.tensor(segments)
    rows, length = ids.shape
    expected = torch.tensor(
        [[[looks(row, q, k) for k in range(length)] for q in range(length)] for row in segments]
    )
    mask = block_mask(ids)
    assert mask.shape == (rows, 1, length, length)
    assert torch.equal(create_mask(mask.mask_mod, rows, 1, length, length, device="cpu")[:, 0], expected)
    if ids.max() > 1:
        assert torch.equal(attention_mask(ids)[:, 0], expected)


def test_blocks_of_rejected_by_chosen_are_skipped():
    ids = torch.tensor([[0] * 128 + [1] * 128 + [2] * 128])
    blocks = block_mask(ids).to_dense()[0, 0]
    assert blocks.tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


# ------------------------------------------------------------------ what is computed
@pytest.mark.parametrize("family", SHARED)
def test_logps_and_rewards_are_those_of_sdpa(family, eager_flex):
    batch = collate_rows(LONG_ROWS, pad_id=0)
    for wrap, model in ((SequenceLogps, causal_model(family)), (SequenceRewards, classifier(family))):
        flex = with_attention(model, SDPA_OR_FLEX)
        with torch.no_grad():
            ours, hidden = wrap(flex)(**batch), hidden_states(wrap(flex), batch)
            assert len(eager_flex) == 4, "every layer, in both passes"
            torch.testing.assert_close(ours, wrap(model)(**batch), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(hidden, hidden_states(wrap(model), batch), rtol=1e-4, atol=1e-4)
        eager_flex.clear()


def hidden_states(scorer: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return scorer.hidden_states(batch["input_ids"], batch["position_ids"], batch["segment_ids"])


def test_autocast_reaches_flex_as_it_reaches_sdpa(eager_flex):
    batch, model = collate_rows(LONG_ROWS, pad_id=0), causal_model("qwen2")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = SequenceLogps(with_attention(model, SDPA_OR_FLEX))(**batch)
        expected = SequenceLogps(model)(**batch)
    assert [formats for _, formats in eager_flex] == [{torch.bfloat16}] * 2
    torch.testing.assert_close(ours, expected, rtol=2e-2, atol=0.2)


def test_rows_of_one_response_stay_with_sdpa_and_train(eager_flex):
    batch, model = collate_rows(LONG_ROWS, pad_id=0, share_prompt=False), causal_model("llama")
    flex = with_attention(model, SDPA_OR_FLEX)
    assert rows_mask(flex, batch["segment_ids"]).shape == batch["segment_ids"].shape
    ours, expected = SequenceLogps(flex)(**batch), SequenceLogps(model)(**batch)
    assert torch.equal(ours, expected)
    assert_same_gradients(gradients(flex, ours.sum()), gradients(model, expected.sum()))
    assert not eager_flex


def test_generation_with_left_padding_is_that_of_sdpa(eager_flex):
    model = causal_model("qwen2")
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = (ids != 0).long()
    arguments = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(with_attention(model, SDPA_OR_FLEX).generate(**arguments), model.generate(**arguments))
    assert not eager_flex


def test_a_saved_model_does_not_name_the_switch(tmp_path):
    with_attention(causal_model("llama"), SDPA_OR_FLEX).save_pretrained(tmp_path)
    assert "flex" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_flex_shares_prompts_as_sdpa_does():
    full, window = family_config("qwen2"), family_config("mistral", sliding_window=8)
    full._attn_implementation = window._attn_implementation = SDPA_OR_FLEX
    assert supports_shared_prompts(full, 100_000)
    assert supports_shared_prompts(window, 8) and not supports_shared_prompts(window, 9)


# ------------------------------------------------------------------ the choice
def test_a_gpu_takes_flex_where_it_is_asked_for(gpu):
    config = Qwen2Config(hidden_size=2048, num_attention_heads=16)
    assert attention_implementation("auto", config) == "sdpa"
    assert attention_implementation("flex_attention", config) == SDPA_OR_FLEX
    assert torch._dynamo.config.recompile_limit == 64
    assert attention_implementation("sdpa", config) == "sdpa"


def test_without_a_gpu_auto_is_sdpa_and_flex_an_error(monkeypatch):
    monkeypatch.setattr(attention, "get_device", lambda: torch.device("cpu"))
    config = Qwen2Config()
    assert attention_implementation("auto", config) == "sdpa"
    with pytest.raises(ConfigError, match="flex_attention cannot run here: it needs a CUDA GPU"):
        attention_implementation("flex_attention", config)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"head_dim": 8}, "power of two"),
        ({"head_dim": 80}, "power of two"),
        ({"attention_dropout": 0.1}, "dropout"),
    ],
)
def test_models_that_flex_cannot_run(gpu, changes, word):
    config = family_config("llama", **({"head_dim": 16} | changes))
    assert attention_implementation("auto", config) == "sdpa"
    with pytest.raises(ConfigError, match=word):
        attention_implementation("flex_attention", config)


def test_a_machine_without_triton_cannot_run_flex(gpu, monkeypatch):
    monkeypatch.setattr(attention, "missing_compiler", lambda: "triton-windows")
    assert attention_implementation("auto", Qwen2Config()) == "sdpa"
    with pytest.raises(ConfigError, match="triton-windows is missing"):
        attention_implementation("flex_attention", Qwen2Config())


def test_models_are_loaded_with_the_choice(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr("prmd.models.loading.get_device", lambda: torch.device("cpu"))
    config = family_config("llama", head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    paths = ArtifactPaths(tmp_path, "embedded")
    for asked, name in (("auto", "sdpa"), ("flex_attention", SDPA_OR_FLEX), ("sdpa", "sdpa")):
        model = ModelConfig(name=str(tmp_path / "base"), dtype="float32", attention=asked)
        assert load_causal_lm(model, paths).config._attn_implementation == name
        assert load_policy(tmp_path / "base", model, paths).config._attn_implementation == name
    classifier("llama").save_pretrained(tmp_path / "rm")
    with pytest.raises(ConfigError, match="power of two"):
        load_classifier(tmp_path / "rm", "float32", attention="flex_attention")
    assert load_classifier(tmp_path / "rm", "float32", attention="auto").config._attn_implementation == "sdpa"
