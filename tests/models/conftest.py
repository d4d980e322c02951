import pytest
from repetitions import slow
from small_checkpoints import saved


@pytest.fixture(params=["masked_lm", slow("llama")])
def folder(request, tmp_path):
    """A small checkpoint; what is refused is the same in every family."""
    return saved(request.param, tmp_path / "checkpoint")
