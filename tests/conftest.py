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
