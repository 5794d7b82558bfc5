"""The device of the tests in this folder: one body each, on the CPU in every run and on the card by `-m gpu`."""

from collections.abc import Iterator

import pytest
import torch

from prmd.runtime import get_device


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where the test runs, which is where the project itself would; float32 products in float32, not in TF32."""
    found = get_device()
    assert found.type == request.param
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield found
    torch.set_float32_matmul_precision(before)
