"""A small checkpoint of each of two families."""

import pytest
from small_checkpoints import saved


@pytest.fixture(params=["masked_lm", "llama"])
def folder(request, tmp_path):
    return saved(request.param, tmp_path / "checkpoint")
