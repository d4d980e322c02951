"""The arithmetic that a recipe's forwards run in."""

import pytest
import torch
from accelerate import Accelerator
from tiny_recipe import tiny_recipe
from torch.overrides import _get_current_function_mode_stack

from dllm_rl.algorithms.correctors import none
from dllm_rl.diagnostics.batch_invariance import BatchInvariantOps
from dllm_rl.models.forward.attention import PlainAttention
from dllm_rl.training.arithmetic import arithmetic

EXACT = {"zero_mismatch": True, "rollout_quantization": None, "corrector": none()}


@pytest.mark.parametrize(
    ("changes", "mode"),
    [({}, None), ({"bf16": True}, PlainAttention), ({"dtype": "bfloat16"}, PlainAttention), (EXACT, BatchInvariantOps)],
)
def test_the_mode_that_a_recipe_asks_for_holds_inside_the_block_alone(changes, mode, tmp_path):
    recipe = tiny_recipe(tmp_path, **changes)
    before = _get_current_function_mode_stack()
    with arithmetic(recipe, Accelerator(cpu=True)):
        inside = [type(each) for each in _get_current_function_mode_stack()[len(before) :]]
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert inside == ([] if mode is None else [mode])
    assert product.dtype == (torch.bfloat16 if recipe.bf16 else torch.float32)
    assert _get_current_function_mode_stack() == before and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("size", [1, 2])
def test_sharded_weights_are_not_kept_in_bf16(size, tmp_path):
    """Autocast's cache would hold what no process has room for."""
    with arithmetic(tiny_recipe(tmp_path, bf16=True, shard_size=size), Accelerator(cpu=True)):
        assert torch.is_autocast_cache_enabled() == (size == 1)
