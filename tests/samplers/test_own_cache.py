"""A family's own cache, which is not of transformers: a run with it is a run without one, and runs fewer columns."""

import runpy
from pathlib import Path

import pytest
import torch

from dllm_rl import BlockCache
from dllm_rl.samplers import whole_step

EXAMPLE = Path(__file__).parents[2] / "recipes/examples/own_cache.py"


@pytest.mark.parametrize("compile_step", [False, True])
def test_a_cache_that_is_not_of_transformers_changes_no_token(compile_step, monkeypatch):
    if compile_step:
        monkeypatch.setattr(whole_step, "compiled", lambda: whole_step._step)  # without compiling
    example = runpy.run_path(str(EXAMPLE))
    plain = example["sample"]()
    columns = list(example["columns"])
    cached = example["sample"](cache=BlockCache(), compile_step=compile_step)
    assert torch.equal(plain.tokens, cached.tokens) and len(plain.tokens.unique()) > 4
    torch.testing.assert_close(cached.logprobs, plain.logprobs, rtol=1e-5, atol=1e-5)
    assert compile_step or sum(example["columns"]) < sum(columns) / 2
