"""`inference.candidates`: which prompts, who takes part, no KL without training, independent samples."""

import logging
from pathlib import Path

import pytest
import torch
from tiny_workspace import (
    candidate,
    evaluation_config,
    prompts_of,
    write_lora_policy,
    write_prepared,
    write_workspace,
)

from prmd.artifacts import io
from prmd.config.evaluation import EvaluationConfig, GenerationConfig
from prmd.models.loading import load_tokenizer
from prmd.objectives import OBJECTIVES
from prmd.pairs import read_pairs


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    return write_workspace(tmp_path_factory.mktemp("candidates"), policies=False)


# ------------------------------------------------------------------ prompts
def test_prompts_are_shared_evenly_distinct_and_independent_of_file_order(
    workspace: EvaluationConfig, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(workspace.shared.model, workspace.paths)
    prompts = prompts_of(workspace, tokenizer)
    counts = [sum(p.objective == k for p in prompts) for k in OBJECTIVES]
    assert counts == [3, 2, 2] and len({p.id for p in prompts}) == 7
    other = evaluation_config(tmp_path)
    write_prepared(other.paths)
    for objective in OBJECTIVES:
        path = other.paths.split(objective, "test")
        io.write_jsonl(path, list(reversed(io.read_jsonl(path))))
    assert prompts_of(other, tokenizer) == prompts


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
        prompts = prompts_of(config, tokenizer)
    assert len(prompts) == 1 and len(read_pairs(config.paths, "honest", "test")) == 2
    assert "wanted 50, the test splits hold 1" in caplog.text


# ------------------------------------------------------------------ KL
def test_an_untrained_adapter_has_no_kl(tmp_path: Path) -> None:
    config = write_workspace(tmp_path, policies=False)
    write_lora_policy(config.paths.policy("cvar"), tmp_path / "base", scale=0.0)
    prompts = prompts_of(config)
    with candidate(config, "cvar") as models:
        values = torch.stack(models.kls(prompts, models.samples(prompts)))
    assert torch.equal(values, torch.zeros(7, 3, 3))


def test_equal_weights_do_not_give_equal_samples(tmp_path: Path) -> None:
    config = write_workspace(tmp_path, policies=False)
    write_lora_policy(config.paths.policy("cvar"), tmp_path / "base", scale=0.0)
    prompts = prompts_of(config)
    samples = [candidate(config, method).samples(prompts) for method in ("reference", "cvar")]
    assert samples[0] != samples[1]


def test_neither_batch_size_nor_a_lost_part_of_the_cache_changes_samples(tmp_path: Path) -> None:
    config = write_workspace(tmp_path, policies=False)
    prompts = prompts_of(config)
    candidate(config, "reference").samples(prompts[:3])
    whole = candidate(config, "reference").samples(prompts)
    (folder,) = (config.paths.root / "data" / "cache").glob("samples-*")
    assert len(list(folder.glob("*.jsonl"))) == 2
    one = config.model_copy(update={"generation": config.generation.model_copy(update={"batch_size": 1})})
    for lost in ("none", "shard-00000*", "*.jsonl"):
        for shard in list(folder.glob(lost)):
            shard.unlink()
        assert candidate(one, "reference").samples(prompts) == whole
    assert list((config.paths.root / "data" / "cache").glob("samples-*")) == [folder]
