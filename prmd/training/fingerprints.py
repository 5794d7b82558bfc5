"""What of the settings decides the result of a training, and what may be edited while it is half done or finished.

Micro-batches, recomputed layers, rows of a log and the steps at which checkpoints are kept change no step of a training, and
the batch size of sampling changes no sample. The engine that `auto` takes changes samples, but not what they are samples of:
what was calibrated before vLLM was installed, or is read where it is not, stays finished.
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
    values = _without(training.model_dump(mode="json"), ("merge_micro_batches",))  # which no version counted
    product = training.pairs_per_device * training.gradient_accumulation_steps
    step = training.pairs_per_step or product
    earlier = values if step != product else _without(values, ("pairs_per_step",))
    return _without(values, _FREE) | {"pairs_per_step": step}, earlier


def calibration_keys(calibration: CalibrationConfig) -> Keys:
    """What decides a calibration."""
    values = calibration.model_dump(mode="json")
    if calibration.engine == "auto":
        values["engine"] = "transformers"
    earlier = {"batch_size": 32} if calibration.batch_size == "auto" else {}  # there was no auto
    return _without(values, ("batch_size",)), values | earlier


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
