"""What of the settings decides the result of a training, and what may be edited while it is half done or finished.

Micro-batches, recomputed layers, rows of a log and the steps at which checkpoints are kept change no step of a training, and
the batch size of sampling changes no sample.
"""

from collections.abc import Mapping
from typing import Any

from prmd.config.shared import CalibrationConfig, TrainingConfig

_CUT = ("pairs_per_device", "gradient_accumulation_steps", "pairs_per_step")
_FREE = (*_CUT, "gradient_checkpointing", "logging_steps", "checkpoints")
Keys = tuple[dict[str, Any], dict[str, Any]]
"""What fingerprints are made of: today's, and those of versions that counted every setting."""


def training_keys(training: TrainingConfig) -> Keys:
    """What decides the result; of the batch it is the pairs of a step, which `StepSize` cuts."""
    values = training.model_dump(mode="json")
    product = training.pairs_per_device * training.gradient_accumulation_steps
    step = training.pairs_per_step or product
    earlier = values if step != product else _without(values, ("pairs_per_step",))
    return _without(values, _FREE) | {"pairs_per_step": step}, earlier


def calibration_keys(calibration: CalibrationConfig) -> Keys:
    """What decides a calibration."""
    values = calibration.model_dump(mode="json")
    return _without(values, ("batch_size",)), values


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
