"""What a training shows of itself: loggers that the configuration names."""

from pathlib import Path

import pytest

from prmd.errors import ConfigError
from prmd.training import arguments


def test_a_logger_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match="report_to: got wandb, which is not installed; give `pip install wandb`"
    ):
        arguments.reporting_callbacks(["wandb"], tmp_path, "policy", task="policy")
