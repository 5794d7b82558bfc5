"""Two gloo processes on the CPU against one: the same losses, parameters and scores, and one writer."""

from pathlib import Path

import pytest
import torch
from gloo_processes import run_processes
from safetensors.torch import load_file
from tiny_models import tiny_tokenizer

PAIRS_PER_STEP = 8


def run(directory: Path, processes: int) -> list[dict]:
    """What every process recorded."""
    tiny_tokenizer(directory / "tokenizer")
    records = run_processes("two_processes.py", directory, PAIRS_PER_STEP, processes=processes)
    return [
        record | {"parameters": load_file(directory / f"rank-{r}.safetensors")}
        for r, record in enumerate(records)
    ]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), 1)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2)


def series(record: dict, name: str) -> list[float]:
    return [row[name] for row in record["logs"] if name in row]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/margins"]
)
def test_the_same_is_logged(one, two, name):
    expected = series(one, name)
    assert len(expected) == (2 if name.startswith("eval") else 3)
    assert len(set(expected)) > 1
    for record in two:
        assert series(record, name) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_the_same_parameters_are_learnt(one, two):
    for name, expected in one["parameters"].items():
        assert torch.equal(two[0]["parameters"][name], two[1]["parameters"][name])
        torch.testing.assert_close(two[0]["parameters"][name], expected, rtol=0, atol=2e-6)


@pytest.mark.slow
def test_before_a_step_every_process_is_given_all_its_rows(one, two):
    assert [len(rows) for rows in one["asked"]] == [8, 8, 5]
    assert one["asked"] == two[0]["asked"] == two[1]["asked"]


@pytest.mark.slow
def test_scores_are_shared_out_and_everybody_has_them_all(one, two):
    for record in two:
        for found, expected in zip(record["scores"], one["scores"], strict=True):
            torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-3)
    assert one["scored_rows"] == 30
    shares = [record["scored_rows"] for record in two]
    assert sum(shares) == 30
    assert min(shares) >= 8
    assert one["complete"] == two[0]["complete"] == two[1]["complete"] == "checkpoint-3"
