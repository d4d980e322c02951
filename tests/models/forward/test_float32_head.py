"""Logits in fp32 from a model in 16 bits: exact products, gradients, no fp32 copy of the head, alike everywhere."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layouts import checkpoint
from repetitions import crossed
from run_outputs import metrics_of
from simulated_cuda import SimulatedCuda
from tiny_recipe import SIZES, tiny_recipe
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_rl import load_policy, quantized_copy, train
from dllm_rl.models.forward import float32_head as head
from dllm_rl.models.forward.batch_invariance import batch_invariant
from dllm_rl.models.forward.float32_head import float32_linear
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization.schemes import Int8WeightOnly
from dllm_rl.training.policies import build_policy

FAMILIES = ("llada", "dream", "smollm2", "bert", "roberta", "modernbert")
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class LargestFloat32(TorchDispatchMode):
    """Elements of the largest fp32 tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.seen = max(self.seen, out.numel())
        return out


def test_a_sum_that_bf16_cannot_hold():
    """1 * 8 + 2^-7 * 1.5 + 2^-8 = 8.015625, between bf16's 8 and 8.0625."""
    x = torch.tensor([[1.0, 2**-7]], dtype=torch.bfloat16)
    weight = torch.tensor([[8.0, 1.5], [-8.0, 1.0]], dtype=torch.bfloat16)
    bias = torch.tensor([2**-8, 0.0], dtype=torch.bfloat16)
    assert float32_linear(x, weight, bias).tolist() == [pytest.approx([8.015625, -7.9921875], rel=1e-6)]
    assert F.linear(x, weight, bias).tolist() != [pytest.approx([8.015625, -7.9921875], rel=1e-4)]


@pytest.mark.parametrize("slab", [2**22, 24])
@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_autograds_in_fp32_rounded_once(monkeypatch, slab, dtype, with_bias):
    monkeypatch.setattr(head, "SLAB", slab)  # 24: slabs of three rows of eight, the last of two
    parts = [drawn(2, 5, 8), drawn(11, 8, seed=1), *([drawn(11, seed=2)] if with_bias else [])]
    low = [x.to(dtype).requires_grad_() for x in parts]
    wide = [x.detach().float().requires_grad_() for x in low]
    upstream = drawn(2, 5, 11, seed=3)
    got, expected = float32_linear(*low), F.linear(*wide)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    got.backward(upstream)
    expected.backward(upstream)
    for a, b in zip(low, wide, strict=True):
        assert a.grad.dtype == dtype
        torch.testing.assert_close(a.grad.float(), b.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
def test_a_gpus_one_product_is_that_of_slabs(monkeypatch, dtype):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    x, weight, bias = (drawn(*shape, seed=i, dtype=dtype) for i, shape in enumerate([(2, 5, 8), (11, 8), (11,)]))
    here = float32_linear(x, weight, bias)
    with SimulatedCuda():
        there = [each.to("cuda") for each in (x, weight, bias)]
        found = float32_linear(*there)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu(), here, rtol=1e-6, atol=1e-6)
        with batch_invariant():
            one = float32_linear(there[0][:1], *there[1:])
            assert torch.equal(float32_linear(*there)[:1].cpu(), one.cpu())


def test_gradients_in_fp32_itself():
    x, weight, bias = (drawn(*shape, seed=i).requires_grad_() for i, shape in enumerate([(6, 8), (11, 8), (11,)]))
    ours = torch.autograd.grad(float32_linear(x, weight, bias).square().sum(), (x, weight, bias))
    plain = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (x, weight, bias))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_only_what_wants_a_gradient_gets_one():
    x, weight = drawn(3, 4, dtype=torch.bfloat16).requires_grad_(), drawn(5, 4, dtype=torch.bfloat16)
    float32_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad.float(), weight.float().sum(0).expand(3, 4), rtol=1e-2, atol=0)
    assert weight.grad is None


def test_no_fp32_copy_of_the_head_is_made(monkeypatch):
    monkeypatch.setattr(head, "SLAB", 64)
    x = drawn(4, 8, dtype=torch.bfloat16).requires_grad_()
    weight = drawn(40, 8, seed=1, dtype=torch.bfloat16).requires_grad_()
    with LargestFloat32() as largest:
        float32_linear(x, weight).sum().backward()
    assert largest.seen == 4 * 40  # the logits; the head has 320 elements, a slab 64
    with LargestFloat32() as largest:
        F.linear(x.float(), weight.float())
    assert largest.seen == 320  # the spy does see a copy


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize(("family", "dtype"), crossed(FAMILIES, HALF, row="bert", column="bfloat16"))
def test_a_16_bit_models_logits_are_the_exact_products(tmp_path, family, dtype):
    policy = load_policy(checkpoint(tmp_path, family), dtype=dtype)
    hidden = drawn(4, 32, dtype=HALF[dtype])
    output = policy.module.get_output_embeddings()
    seen = []
    output.register_forward_hook(lambda layer, inputs, out: seen.append((inputs[0], out)))
    logits = policy.head(hidden)
    inputs, out = seen[0]
    bias = 0 if output.bias is None else output.bias.double()
    torch.testing.assert_close(logits.double(), inputs.double() @ output.weight.double().T + bias, rtol=0, atol=2e-5)
    assert logits.dtype == torch.float32 and torch.equal(out, logits) and "forward" not in vars(output)
    policy.float32_head = False
    rounded = policy.head(hidden)
    assert rounded.dtype == HALF[dtype] and (rounded.double() - logits).abs().max() > 1e-4


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_fp32_model_is_left_alone_to_the_bit(tmp_path, family):
    policy = load_policy(checkpoint(tmp_path, family))
    hidden = drawn(5, 32)
    plain, of_rounded = (policy.spec.head(policy.module, h) for h in (hidden, hidden.bfloat16().float()))
    assert torch.equal(policy.head(hidden), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(policy.head(hidden), plain)  # outside of autocast
        assert torch.equal(policy.head(hidden.bfloat16()), of_rounded)
        policy.float32_head = False
        assert policy.head(hidden).dtype == torch.bfloat16


def test_gradients_under_autocast_stay_in_fp32():
    x, weight = drawn(16, 8, dtype=torch.bfloat16), drawn(40, 8, seed=1, dtype=torch.bfloat16).requires_grad_()
    upstream = drawn(16, 40, seed=2)
    float32_linear(x, weight).backward(upstream)
    outside, weight.grad = weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        float32_linear(x, weight).backward(upstream)
    assert torch.equal(weight.grad, outside)


def test_an_output_layer_with_a_product_of_its_own_is_refused():
    class Own(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    policy = tiny_llama(characters="ab", causal=True, hidden_size=32, num_layers=1)
    head = policy.module.lm_head
    policy.module.lm_head = Own(head.in_features, head.out_features, bias=False)
    hidden = drawn(2, head.in_features)
    assert policy.head(hidden).dtype == torch.float32
    policy.module.bfloat16()
    with pytest.raises(ValueError, match="float32_head = False"):
        policy.head(hidden.bfloat16())


def test_whatever_is_made_from_a_policy_has_its_head(tmp_path):
    folder = checkpoint(tmp_path, "llada")
    assert load_policy(folder).float32_head
    policy = load_policy(folder, dtype="bfloat16")
    add_lora(policy, Lora(r=2))
    policy.float32_head = False
    for other in (policy.reference(), quantized_copy(policy, Int8WeightOnly()), copy.copy(policy)):
        assert other.float32_head is False
    for kept in (False, True):
        given = tiny_masked_lm(**SIZES)
        given.float32_head = kept
        assert build_policy(tiny_recipe(tmp_path / "run", model=given), torch.device("cpu")).float32_head is kept


@pytest.mark.slow
def test_a_run_in_float16(tmp_path):
    """float16 is a dtype of the weights, with adapters on them: AdamW's own numbers need fp32."""
    tiny_llama(characters="1234.=", causal=False, hidden_size=32, num_layers=1).save_pretrained(tmp_path / "base")
    options = {"model": str(tmp_path / "base"), "dtype": "float16", "learning_rate": 1e-3}
    with pytest.raises(ValueError, match="dtype='float16' needs lora, or another optim"):
        tiny_recipe(tmp_path / "run", **options)
    train(tiny_recipe(tmp_path / "run", **options, lora=Lora(r=2), beta=0.1))
    steps = metrics_of(tmp_path / "run")
    assert len(steps) == 2 and all(0 < row["grad_norm"] < 10 for row in steps)
    policy = load_policy(tmp_path / "run" / "checkpoints" / "step-000002", dtype="auto")
    assert next(policy.module.parameters()).dtype == torch.float16
