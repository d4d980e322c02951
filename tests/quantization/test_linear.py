"""Shapes that a kernel does not take."""

import pytest
import torch

from dllm_rl.quantization.linear import unsupported_reason
from dllm_rl.quantization.schemes import Float8Dynamic


@pytest.mark.parametrize(("rows", "columns", "fits"), [(32, 48, True), (24, 48, False), (48, 24, False)])
def test_dynamic_float8_takes_sixteens_of_rows_and_of_columns(rows, columns, fits):
    found = unsupported_reason(torch.zeros(rows, columns), Float8Dynamic().config())
    assert found == (None if fits else f"{rows}x{columns}: not multiples of 16")
