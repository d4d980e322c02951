from shutil import copytree

import pytest
from repetitions import slow
from small_checkpoints import saved


@pytest.fixture(scope="session", params=["masked_lm", slow("llama")])
def saved_once(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def folder(saved_once, tmp_path):
    """A small checkpoint; what is refused is the same in every family."""
    return copytree(saved_once, tmp_path / "checkpoint")
