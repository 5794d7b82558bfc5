"""Sharded weights: FSDP2 in two gloo processes on the CPU against one process, and the proof that weights are spread."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from gloo_processes import run_processes
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer
from torch import nn
from transformers import LlamaForCausalLM

from prmd.errors import ConfigError
from prmd.training.sharding import check_sharded, in_step, requested_sharding

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
FSDP = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
TRAININGS = ("policy", "reward_model", "lora")


def run(directory: Path, processes: int, **environment: str) -> list[dict[str, Any]]:
    """What every process recorded; `environment` as `accelerate launch` would set it."""
    for name in TRAININGS:
        tiny_tokenizer(directory / name / "tokenizer")
    return run_processes("sharded_processes.py", directory, processes=processes, **environment)


def fsdp_environment() -> dict[str, str]:
    """`configs/accelerate/fsdp2.yaml` as `accelerate launch` hands it to its processes."""
    values = {key.upper(): str(value).lower() for key, value in FSDP.items()}
    for key in ("FSDP_AUTO_WRAP_POLICY", "FSDP_STATE_DICT_TYPE"):
        values[key] = values[key].upper()
    return values | {"ACCELERATE_USE_FSDP": "true"}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one")
    return run(directory, 1)[0] | {"directory": directory}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two")
    records = run(directory, 2, PRMD_TEST_SHARDS="1", **fsdp_environment())
    return [record | {"directory": directory} for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_fsdp2_shards_every_layer_and_logs_the_same(one, two, training):
    tolerance = 1e-2 if training == "lora" else 1e-4  # bfloat16 weights
    for record in two:
        assert record[training]["share_held"] == pytest.approx(0.5, abs=0.001)
        assert record[training]["layers_sharded"]
        for name in ("loss", "grad_norm", "eval_loss"):
            found, expected = (
                [row[name] for row in logs[training]["logs"] if name in row] for logs in (record, one)
            )
            assert len(set(expected)) == (2 if name == "eval_loss" else 3)
            assert found == pytest.approx(expected, rel=tolerance)
    assert one[training]["share_held"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("training", [*TRAININGS, "policy-resumed"])
def test_fsdp2_learns_the_same_parameters_and_goes_on_from_a_checkpoint(one, two, training):
    expected = load_file(one["directory"] / f"{training.removesuffix('-resumed')}.safetensors")
    found = load_file(two[0]["directory"] / f"{training}.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4 if training == "lora" else 2e-5)


@pytest.mark.slow
def test_all_weights_go_on_from_a_checkpoint_that_names_tied_ones_once(one):
    saved = load_file(one["directory"] / "policy/checkpoint-2/model.safetensors")
    assert "lm_head.weight" not in saved
    resumed, whole = (load_file(one["directory"] / f"policy{end}.safetensors") for end in ("-resumed", ""))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_a_sharded_checkpoint_is_a_whole_model_that_anyone_loads(one, two):
    last = "policy/checkpoint-3"
    sharded, plain = (LlamaForCausalLM.from_pretrained(r["directory"] / last) for r in (two[0], one))
    assert sharded.config.tie_word_embeddings
    assert sharded.lm_head.weight is sharded.model.embed_tokens.weight
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(sharded.state_dict()[name], value, rtol=0, atol=2e-5)
    adapter = "lora/checkpoint-3/adapter_model.safetensors"
    assert load_file(two[0]["directory"] / adapter).keys() == load_file(one["directory"] / adapter).keys()


@pytest.mark.slow
@pytest.mark.parametrize("training", TRAININGS)
def test_a_sharded_checkpoint_holds_all_weights_once_more(one, two, training):
    """What `training.run.check_training` asks the disk for besides; adapters bring the frozen weights along."""
    copy = two[0]["directory"] / training / "checkpoint-3" / "pytorch_model_fsdp.bin"
    saved = torch.load(copy, weights_only=True)
    names = load_file(one["directory"] / f"{training}.safetensors").keys()
    assert names - saved.keys() == set()
    assert (training == "policy") == ("model.lm_head.weight" in saved.keys() - names), (
        "tied to the embeddings"
    )
    size = sum(value.numel() * value.element_size() for value in saved.values())
    assert size < copy.stat().st_size < size + 1024 * len(saved), (
        "a tied weight is stored under both its names"
    )


@pytest.mark.slow
def test_fsdp2_that_accelerate_ignores_is_refused(tmp_path):
    """Without GPUs, accelerate takes plain data parallelism and says nothing."""
    for record in run(tmp_path, 2, **fsdp_environment()):
        assert "FSDP was asked for, but the model is not sharded: parameter model" in record["refused"]
        assert "9,600 of 9,600 elements on each of 2 processes" in record["refused"]


# ------------------------------------------------------------------ ZeRO-3, by stand-ins of its parameters
@dataclass
class Zero3Parameter:
    """What DeepSpeed makes of a parameter: the tensor itself is empty, the partition beside it."""

    ds_id: int
    ds_numel: int
    ds_tensor: torch.Tensor

    def numel(self) -> int:
        return 0


class Zero3Model:
    def __init__(self, *partitions: tuple[int, int]) -> None:
        self.parameters = {
            f"layer.{i}.weight": Zero3Parameter(i, total, torch.zeros(held))
            for i, (total, held) in enumerate(partitions)
        }

    def named_parameters(self):
        return self.parameters.items()


def test_zero3_partitions_pass_and_whole_parameters_do_not():
    check_sharded(Zero3Model((1000, 250), (10, 3)), sharding="ZeRO-3", processes=4)
    with pytest.raises(ConfigError, match=r"ZeRO-3 .* layer\.0\.weight holds 1,000 of 1,000 .* 4 processes"):
        check_sharded(Zero3Model((1000, 1000), (10, 3)), sharding="ZeRO-3", processes=4)
    with pytest.raises(ConfigError, match=r"holds 500 of 1,000 .* wanted at most 250 \(1 of 2 parameters"):
        check_sharded(Zero3Model((1000, 500), (10, 3)), sharding="ZeRO-3", processes=4)


def test_plain_parameters_are_refused_unless_the_process_is_alone():
    model = nn.Linear(8, 8)
    check_sharded(model, sharding="FSDP", processes=1)
    with pytest.raises(ConfigError, match=r"parameter weight holds 64 of 64 .* \(2 of 2 parameters"):
        check_sharded(model, sharding="FSDP", processes=2)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, None),
        ({"ACCELERATE_USE_FSDP": "false"}, None),
    ],
)
def test_the_request_is_read_where_accelerate_leaves_it(monkeypatch, values, expected):
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert requested_sharding() == expected


# ------------------------------------------------------------------ passes in step, configurations
@pytest.mark.parametrize(("items", "processes"), [(7, 2), (8, 2), (5, 4), (4, 4), (3, 1)])
def test_every_item_counts_once_and_all_take_as_many_steps(items, processes):
    shares = [in_step(range(items), rank=r, processes=processes) for r in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(item for share in shares for item, counts in share if counts) == list(range(items))


def test_too_few_items_are_taken_by_all():
    assert [in_step("ab", rank=r, processes=3) for r in range(3)] == [[("a", True), ("b", True)]] * 3


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero3"])
def test_launch_configurations_are_read_by_accelerate(name):
    """And none lets other processes than the first load empty weights: scoring passes load models too."""
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == 2
    assert not config.fsdp_config.get("fsdp_cpu_ram_efficient_loading")
    assert not config.deepspeed_config.get("zero3_init_flag")
