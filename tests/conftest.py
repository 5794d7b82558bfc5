"""Fixtures that several test modules share: one run of the whole pipeline, and copies of it to change."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# The same examples in every run: whoever changes something knows that a failure is of that change.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# Tiny models run many times slower on several threads that wait for one another; subprocesses inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from tiny_pipeline import Pipeline


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
