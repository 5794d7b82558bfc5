"""`contenders`: which prompts, who takes part, KL in blocks against full softmaxes, independent samples."""

import logging
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import direct_kl, tiny_config
from tiny_workspace import evaluation_config, write_lora_policy, write_prepared, write_workspace
from transformers import LlamaForCausalLM

from prmd import io
from prmd.config import EvaluationConfig, GenerationConfig
from prmd.contenders import ContenderModels, evaluation_prompts, find_contenders, response_kls
from prmd.models import load_tokenizer
from prmd.objectives import OBJECTIVES
from prmd.pair_batches import collate_rows
from prmd.preferences import read_pairs
from prmd.tokenization import PrefixRow


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    return write_workspace(tmp_path_factory.mktemp("contenders"), policies=False)


# ------------------------------------------------------------------ prompts
def test_prompts_are_shared_evenly_distinct_and_independent_of_file_order(
    workspace: EvaluationConfig, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(workspace.shared.model, workspace.paths)
    prompts = evaluation_prompts(workspace, tokenizer)
    counts = [sum(p.objective == k for p in prompts) for k in OBJECTIVES]
    assert counts == [3, 2, 2] and len({p.id for p in prompts}) == 7
    other = evaluation_config(tmp_path)
    write_prepared(other.paths)
    for objective in OBJECTIVES:
        path = other.paths.split(objective, "test")
        io.write_jsonl(path, list(reversed(io.read_jsonl(path))))
    assert evaluation_prompts(other, tokenizer) == prompts


def test_prompts_with_one_first_turn_count_once_across_objectives(
    workspace: EvaluationConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = evaluation_config(tmp_path, generation=GenerationConfig(prompts=50, samples_per_prompt=2))
    write_prepared(config.paths)
    for objective in OBJECTIVES:
        rows = [
            r | {"prompt": [{"role": "user", "content": "The same?"}]}
            for r in io.read_jsonl(config.paths.split(objective, "test"))
        ]
        io.write_jsonl(config.paths.split(objective, "test"), rows[:2])
    tokenizer = load_tokenizer(workspace.shared.model, workspace.paths)
    with caplog.at_level(logging.WARNING):
        prompts = evaluation_prompts(config, tokenizer)
    assert len(prompts) == 1 and len(read_pairs(config.paths, "honest", "test")) == 2
    assert "wanted 50, the test splits hold 1" in caplog.text


# ------------------------------------------------------------------ KL
@pytest.mark.parametrize("share_prompt", [True, False])
def test_response_kls_in_blocks_equal_the_full_softmax(
    share_prompt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prmd.contenders.LOGITS_AT_ONCE", 1000)  # three positions of 300 logits at a time
    torch.manual_seed(0)
    policy, reference = (LlamaForCausalLM(tiny_config()).eval() for _ in range(2))
    rows = [PrefixRow((5, 6, 7), ((8, 9, 2), (10, 11, 12, 13, 2))), PrefixRow((20, 21), ((30,),))]
    with torch.inference_mode():
        found = response_kls(
            policy, lambda: nullcontext(reference), collate_rows(rows, pad_id=0, share_prompt=share_prompt)
        )
    wanted = [direct_kl(policy, reference, row.prompt_ids, r) for row in rows for r in row.responses]
    assert found.numpy() == pytest.approx(np.array(wanted), rel=1e-4)


def test_an_untrained_adapter_has_no_kl(tmp_path: Path) -> None:
    config = write_workspace(tmp_path, policies=False)
    write_lora_policy(config.paths.policy("cvar"), tmp_path / "base", scale=0.0)
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    reference, policy = find_contenders(config, tokenizer)
    prompts = evaluation_prompts(config, tokenizer)
    with ContenderModels(config, policy, reference=reference, tokenizer=tokenizer) as models:
        values = torch.stack(models.kls(prompts, models.samples(prompts)))
    assert torch.equal(values, torch.zeros(7, 3, 3))


def test_equal_weights_do_not_give_equal_samples(tmp_path: Path) -> None:
    config = write_workspace(tmp_path, policies=False)
    write_lora_policy(config.paths.policy("cvar"), tmp_path / "base", scale=0.0)
    tokenizer = load_tokenizer(config.shared.model, config.paths)
    contenders = find_contenders(config, tokenizer)
    prompts = evaluation_prompts(config, tokenizer)
    samples = [
        ContenderModels(config, c, reference=contenders[0], tokenizer=tokenizer).samples(prompts)
        for c in contenders
    ]
    assert samples[0] != samples[1]
