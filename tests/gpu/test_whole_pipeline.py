"""All stages on the device with a tiny model, as `test_pipeline` looks at them on the CPU."""

import math

import pytest
import torch
from tiny_pipeline import POLICIES, Pipeline, artifacts

from prmd.artifacts import io
from prmd.objectives import OBJECTIVES

pytestmark = pytest.mark.slow


def test_every_stage_ran_on_the_device_and_measured_something(
    device: torch.device, pipeline: Pipeline
) -> None:
    for directory in artifacts(pipeline):
        record = io.read_json(directory / "run.json")
        assert record["device"] == str(device), directory
        assert bool(record["hardware"]["gpus"]) == (device.type == "cuda")
    rows = io.read_json(pipeline.paths.metrics / "comparison.json")["rows"]
    assert {row["method"] for row in rows} == {"reference", *POLICIES}
    for row in rows:
        assert all(0 <= row["win_rate"][objective]["value"] <= 1 for objective in OBJECTIVES)
        assert math.isfinite(row["kl"]["value"])
    assert all(row["kl"]["value"] > 0 for row in rows if row["method"] != "reference"), "trained"
    assert pipeline.paths.report.is_file()
