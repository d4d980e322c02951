"""What only a real GPU can show: its kernels, its memory, its waits. `pytest -m gpu` on a machine that has one."""

import os
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import whole_steps
from devices import Cuda
from rows import gradients_of_shared_rows
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe

from dllm_rl import train
from dllm_rl.algorithms.optimizers import AdamW8bit
from dllm_rl.doctor.mismatch import diagnose
from dllm_rl.likelihoods.estimators import OneStep, Trajectory
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.forward.float32_head import float32_linear
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization import schemes
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.samplers import Unmask
from dllm_rl.types.rollouts import Prompts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: run `pytest -m gpu` where there is one"),
]
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
SIZES = {
    "characters": "1234.=",
    "hidden_size": 256,
    "num_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}


def llada(dtype=torch.bfloat16, **more):
    policy = tiny_llama(**(SIZES | more), causal=False, head_std=0.3)
    policy.module.to(dtype)
    return policy.to("cuda")


def prompts(rows: int = 4) -> Prompts:
    return Prompts.from_ids([[3, 4, 5], [6, 7]] * (rows // 2), pad_id=0, num_generations=2)


def batch():
    tokens = torch.arange(3, 9, device="cuda").repeat(4, 3)
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


KERNELS = {
    "Float8Dynamic": 0.02,
    "Float8WeightOnly": 0.02,
    "Int8WeightOnly": 0.02,
    "Int8Dynamic": 0.03,
    "Int4Packed": 0.2,
}


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no FP8 products")
@pytest.mark.parametrize("name", KERNELS)
def test_quantized_products_their_sync_and_the_aligned_forward(name):
    """Logits are near those of the weights dequantized, follow a sync, and are the aligned learner's."""
    policy = llada()
    rollout_policy = quantized_copy(policy, getattr(schemes, name)())
    assert rollout_policy.quantization_report.quantized
    plain, quantized = policy.logits(*batch()), rollout_policy.logits(*batch())
    assert torch.isfinite(quantized).all()
    assert (plain - quantized).float().norm() < KERNELS[name] * 3 * plain.float().norm()
    with torch.no_grad():
        policy.module.model.layers[0].mlp.up_proj.weight.mul_(-1)
    policy.weights_version += 1
    sync_weights(policy, rollout_policy)
    fresh = quantized_copy(policy, getattr(schemes, name)()).logits(*batch())
    assert torch.equal(rollout_policy.logits(*batch()), fresh) and not torch.equal(fresh, quantized)
    with aligned_forward(policy, rollout_policy):
        logits = policy.logits(*batch())
        logits.float().square().mean().backward()
    assert torch.equal(logits, fresh)
    gradient = policy.module.model.layers[0].mlp.up_proj.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


@pytest.mark.parametrize("name", KERNELS)
def test_the_doctor_finds_the_kernel(name):
    sampler = Unmask(max_new_tokens=8, diffusion_steps=4, temperature=1.0)
    report = diagnose(llada(), getattr(schemes, name)(), prompts=prompts(), sampler=sampler)
    assert 0 < report.total.mean_abs < 1


@pytest.mark.parametrize("scheme", ["Float8Dynamic", "Int8WeightOnly"])
@pytest.mark.parametrize("lora", [None, Lora(r=4, dropout=0.1)])
def test_a_run_with_real_kernels(tmp_path, scheme, lora):
    model = partial(tiny_llama, causal=False, **SIZES)
    fields = {"bf16": True, "beta": 0.1, "num_iterations": 2, "rollout_quantization": getattr(schemes, scheme)()}
    train(tiny_recipe(tmp_path, model=model, lora=lora, **fields))
    assert all(row["grad_norm"] > 0 for row in metrics_of(tmp_path))


@needs_bitsandbytes
def test_moments_in_8_bit(tmp_path):
    train(tiny_recipe(tmp_path, optim=AdamW8bit()))
    assert all(row["grad_norm"] > 0 for row in metrics_of(tmp_path))


@needs_bitsandbytes
def test_a_base_in_few_bits(tmp_path):
    model = partial(tiny_llama, causal=False, **SIZES)
    train(tiny_recipe(tmp_path, model=model, base_quantization="nf4", lora=Lora(r=4), bf16=True))
    assert all(row["grad_norm"] > 0 for row in metrics_of(tmp_path))


ZERO = """
import sys
from tiny_recipe import tiny_recipe
from dllm_rl import train
train(tiny_recipe(sys.argv[1], zero_mismatch=True, rollout_quantization=None, bf16=len(sys.argv) > 2))
"""


@pytest.mark.parametrize("more", [[], ["bf16"]])
def test_rollout_and_learner_agree_bit_for_bit(tmp_path, more):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", ZERO, str(tmp_path), *more], check=True, env=environment)
    assert all(row["rollout_corr/abs_log_ratio_max"] == 0 and row["grad_norm"] > 0 for row in metrics_of(tmp_path))


def test_the_host_waits_as_often_as_the_simulated_device_says():
    """At most once a sampler step and twice a scored view, by torch's own warnings of synchronization."""
    policy, waits = llada(), []
    with Cuda() as cuda:
        for steps in (6, 12):
            with cuda.phase(f"{steps} steps"):
                sampler = Unmask(max_new_tokens=12, diffusion_steps=steps, temperature=1.0)
                rollout = sampler(policy, prompts(), torch.Generator().manual_seed(0))
            waits.append(cuda.waits(f"{steps} steps"))
        assert waits[1] - waits[0] <= 6, cuda.report()
        for likelihood in (OneStep(), Trajectory()):
            noise = likelihood.draw_views(rollout, torch.Generator().manual_seed(0))
            forward, backward = (f"{likelihood.name}, {what}" for what in ("forward", "backward"))
            with cuda.phase(forward):
                for view in each_view(noise):
                    view.logprobs(policy, rollout)
            with cuda.phase(backward):
                for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
                    view.backward(policy, rollout, weight)
            assert max(cuda.waits(forward), cuda.waits(backward)) <= 2 * len(noise.masked), cuda.report()
        rollout_policy = quantized_copy(policy, schemes.Float8WeightOnly())
        with cuda.phase("sync"):
            sync_weights(policy, rollout_policy)
        assert cuda.waits("sync") <= 4, cuda.report()


def test_whole_steps_are_replayed():
    whole_steps.check("own", ["confidence"], "llada", "Float8WeightOnly")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_heads_sums_are_in_fp32(dtype):
    """The products of 16-bit numbers are exact; a sum of D of them in fp32 is off by at most D of its roundings, here
    doubled, because tensor cores cut off."""
    x, weight = (torch.randn(rows, 4096, device="cuda").to(dtype) for rows in (300, 1000))
    found = float32_linear(x, weight).double()
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    assert ((found - exact).abs() <= 4096 * 2**-23 * size).all()


def test_the_gradient_of_shared_rows_repeats_bit_for_bit():
    found = gradients_of_shared_rows(llada(torch.float32))
    assert found[0].abs().max() > 0 and all(torch.equal(found[0], other) for other in found)
