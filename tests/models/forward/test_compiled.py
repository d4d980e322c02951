"""Compiled blocks: the same numbers to rounding, weights synced in place, refusals of what is compiled anew."""

from functools import partial

import pytest
import torch
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe, tiny_recipe_ar

from dllm_rl.models.forward.blocks import blocks_of, compile_blocks
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization import schemes
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.samplers import unmask
from dllm_rl.samplers.cache import prefix_cache
from dllm_rl.training import train

SIZES = {"characters": "1234.=", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """torch's cache of compiled code does not distinguish instruction sets. Code that a run under another
    ATEN_CPU_CAPABILITY generated, compiled for this run's wider vectors, writes past its buffers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(autouse=True)
def afresh():
    """Compiled code is kept by the code it comes from; other tests' shapes must not use up how often it may be."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_blocks_follow_a_sync(mode):
    policy = tiny_llama(**SIZES, causal=False, head_std=0.3)
    eager, compiled = (quantized_copy(policy, schemes.float8_weight_only()) for _ in range(2))
    compile_blocks(compiled, mode=mode)
    calls = []
    for rows in (2, 3):  # another batch: by default the same code, with static shapes compiled anew
        tokens = torch.arange(3, 9).repeat(rows, 1)
        calls.append((tokens, torch.ones_like(tokens, dtype=torch.bool)))
    for _ in range(2):
        for call in calls:
            with torch.no_grad():
                torch.testing.assert_close(compiled.logits(*call), eager.logits(*call), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            for parameter in policy.module.parameters():
                parameter.mul_(1.1)
        policy.version += 1
        before = compiled.logits(*calls[0])
        for copied in (eager, compiled):
            sync_weights(policy, copied)
        assert not torch.allclose(compiled.logits(*calls[0]), before)
    assert all(block._compiled_call_impl is not None for block in blocks_of(compiled.module))
    assert all(block._compiled_call_impl is None for block in blocks_of(policy.module))


@pytest.mark.slow
def test_a_run_whose_rollouts_are_compiled(tmp_path):
    model = partial(tiny_llama, causal=False, **SIZES)
    plain, compiled = (tmp_path / name for name in ("plain", "compiled"))
    train(tiny_recipe(plain, model=model, num_steps=1))
    train(tiny_recipe(compiled, model=model, num_steps=1, torch_compile=True))
    (one,), (other,) = metrics_of(plain), metrics_of(compiled)
    assert other["reward"] == one["reward"] and other["loss"] == pytest.approx(one["loss"], abs=1e-4)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_what_does_not_go_with_it_is_refused(tmp_path):
    cached = partial(unmask, max_new_tokens=16, num_steps=4, block_size=8, cache=prefix_cache())
    for recipe, said in (
        (tiny_recipe(tmp_path, torch_compile=True, rollout_quantization=None), "rollout_quantization=None makes none"),
        (tiny_recipe(tmp_path, torch_compile=True, sampler=cached), "does not go with a cache"),
        (tiny_recipe_ar(tmp_path, torch_compile=True), "does not go with a cache"),
    ):
        with pytest.raises(ValueError, match=f"torch_compile=True .*{said}"):
            train(recipe)
    assert not list(tmp_path.iterdir())
