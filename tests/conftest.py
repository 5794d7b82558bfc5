"""Fixtures that several test modules share: a tiny model, one run of the whole pipeline, copies of it to change."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run: whoever changes something knows that a failure is of that change, not of a busy machine.
settings.register_profile("repeatable", derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

# Tiny models run many times slower on several threads that wait for one another; subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Hide every GPU, before anything imports torch, unless this run is `python -m pytest -m gpu`.

    Whichever machine it is, all other tests run on the CPU, and so do the programs they start and the workers of pytest-xdist,
    which inherit the variable. A worker is given the expression behind `-m` too, wherever that stands (command line,
    PYTEST_ADDOPTS, pyproject).
    """
    if not _asks_for_gpus(config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # an empty value would unset the variable on Windows


def _asks_for_gpus(expression: str) -> bool:
    """Whether only tests marked `gpu` are selected: `gpu`, `gpu and not slow`; anything with `or` is a run on the CPU."""
    words = expression.split()
    return words[:1] == ["gpu"] and "or" not in words


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test of the card, before its fixtures are made, where there is none or it is hidden."""
    if item.get_closest_marker("gpu"):
        import torch  # most test modules have done so

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device (where there is one: python -m pytest -m gpu)")


if TYPE_CHECKING:
    from tiny_pipeline import Pipeline
    from tiny_tables import Table

    from prmd.models.sequence_models import SequenceLogps


@pytest.fixture(autouse=True)
def logging_restored() -> Iterator[None]:
    """Programs set up logging for their process, which here is that of all tests."""
    root, ours = logging.getLogger(), logging.getLogger("prmd")
    handlers, level, own_level = list(root.handlers), root.level, ours.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(own_level)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> "Pipeline":
    """All stages, run once on a tiny model; not to be changed."""
    from tiny_pipeline import first_run  # imports every stage, which most test modules do without

    return first_run(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def copied(pipeline: "Pipeline", tmp_path: Path) -> "Pipeline":
    """A copy of that run, to change."""
    from tiny_pipeline import copy_of

    return copy_of(pipeline, tmp_path / "artifacts")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny causal model, not to be changed."""
    from tiny_models import tiny_causal_lm

    return tiny_causal_lm(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def policy_model(tmp_path_factory: pytest.TempPathFactory) -> "SequenceLogps":
    """A tiny policy, to be differentiated and not to be changed."""
    from tiny_scores import tiny_policy

    return tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> "dict[str, Table]":
    """Random tables in the place of reward models, by objective."""
    from tiny_tables import use_tables

    return use_tables(monkeypatch)
