"""The aligned forward is the rollout's, bit for bit; its gradient is the written-out straight-through definition."""

import pytest
import torch
import torch.nn.functional as F
from emulated import CPU_SCHEMES, int3_emulated
from repetitions import few

from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.merge import merged_copy
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization import schemes as quantize
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.linear import dequantized_input, dequantized_weight, quantized_forward
from dllm_rl.quantization.rollout_policy import quantized_copy, quantized_layers, sync_weights
from dllm_rl.records import describe

SCHEMES = [*CPU_SCHEMES.values()]
# One of each kind of layer, and of each kind of rounding.
KINDS = ["Float8WeightOnly", "Float8DynamicEmulated", "Int8Dynamic", "Int4WeightOnly", "int3_emulated"]
KINDS = [CPU_SCHEMES[name] for name in (*KINDS, "e5m2_emulated", "nvfp4_emulated")]
DTYPES = [torch.float32, torch.bfloat16]
small = {
    "characters": "abcdefgh",
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def make(family=tiny_masked_lm, dtype=torch.float32):
    policy = family(**small, **({"causal": False} if family is tiny_llama else {}))
    policy.module.to(dtype)
    return policy


def batch():
    tokens = torch.randint(3, 11, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, :4] = False
    return tokens, mask


def loss_of(policy):
    tokens, mask = batch()
    logits = policy.logits(tokens, mask)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def reference_forward(policy, rollout_policy):
    """The definition: autograd through the product of dequantized operands, identity through the quantizers."""
    restore = []
    for name, target in quantized_layers(rollout_policy):
        source = policy.module.get_submodule(name)

        def forward(x, source=source, target=target):
            seen = quantized_forward(target, x.detach(), None)[1]
            x_q = x + (dequantized_input(target, *seen) - x.detach())
            w_q = source.weight + (dequantized_weight(target) - source.weight).detach()
            y = F.linear(x_q, w_q, source.bias)
            # The value of the rollout's product, the derivative of the dequantized one.
            with torch.no_grad():
                value = target(x)
            return y + (value - y).detach()

        source.forward = forward
        restore.append(source)
    return restore


@pytest.mark.parametrize("dtype", few(DTYPES, [torch.bfloat16]))
@pytest.mark.parametrize("scheme", SCHEMES, ids=describe)
@pytest.mark.repeated(every=4)
def test_forward_equals_the_rollouts_bitwise(scheme, dtype):
    policy = make(dtype=dtype)
    rollout = quantized_copy(policy, scheme)
    plain, expected = policy.logits(*batch()), rollout.logits(*batch())
    with aligned_forward(policy, rollout):
        assert torch.equal(policy.logits(*batch()), expected)
        with torch.no_grad():
            assert torch.equal(policy.logits(*batch()), expected)
    assert not torch.equal(plain, expected)
    assert torch.equal(policy.logits(*batch()), plain)


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("family", few([tiny_masked_lm, tiny_llama], [tiny_masked_lm]))
@pytest.mark.parametrize("scheme", KINDS, ids=describe)
def test_gradient_is_the_straight_through_definition(scheme, family):
    policy = make(family)
    rollout = quantized_copy(policy, scheme)
    with aligned_forward(policy, rollout):
        got = torch.autograd.grad(loss_of(policy), list(policy.module.parameters()), allow_unused=True)
    swapped = reference_forward(policy, rollout)
    want = torch.autograd.grad(loss_of(policy), list(policy.module.parameters()), allow_unused=True)
    for layer in swapped:
        del layer.forward
    for (name, _), g, w in zip(policy.module.named_parameters(), got, want, strict=True):
        assert (g is None) == (w is None), name
        if w is not None:
            assert (g - w).norm() <= 1e-6 * w.norm() + 1e-9, name
            assert (g == 0).all() == (w == 0).all(), name


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("scheme", SCHEMES, ids=describe)
def test_a_layers_product_is_that_of_its_dequantized_operands(scheme):
    layer = next(layer for _, layer in quantized_layers(quantized_copy(make(), scheme)))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    y, seen = quantized_forward(layer, x, None)
    expected = F.linear(dequantized_input(layer, *seen), dequantized_weight(layer))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_one_layer_by_hand():
    """w = [[14, -2.4]] in int4, of scale 2, is [[14, -2]]: dx = dy * that, dw = dy * x, and not dy * w."""
    policy = make()
    rollout = quantized_copy(policy, quantize.FakeQuantize(weight="int4"))
    name, _ = next(iter(quantized_layers(rollout)))
    source = policy.module.get_submodule(name)
    with torch.no_grad():
        source.weight.zero_()
        source.weight[0, :2] = torch.tensor([14.0, -2.4])
    sync_weights(policy, rollout)
    x = torch.zeros(1, 32, requires_grad=True)
    with aligned_forward(policy, rollout):
        source(x + 3.0)[0, 0].backward()
    assert torch.allclose(x.grad[0, :3], torch.tensor([14.0, -2.0, 0.0]))
    torch.testing.assert_close(source.weight.grad[0], torch.full((32,), 3.0))
    torch.testing.assert_close(source.bias.grad[:2], torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize("scheme", KINDS, ids=describe)
@pytest.mark.repeated(every=3)
def test_a_step_inside_the_block_is_quantized_again(scheme):
    policy = make()
    rollout = quantized_copy(policy, scheme)
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=1e-2)
    with aligned_forward(policy, rollout):
        loss_of(policy).backward()
        optimizer.step()
        first = policy.logits(*batch())
        with pytest.raises(ValueError, match="outside of aligned"):
            quantized_copy(policy, scheme)
    assert not torch.equal(first, rollout.logits(*batch()))  # norms and embeddings have moved, and are not synced
    sync_weights(policy, rollout)
    assert torch.equal(rollout.logits(*batch()), first)
    assert torch.equal(quantized_copy(policy, scheme).logits(*batch()), first)


def test_forward_is_restored_whatever_happens_and_misuse_is_refused():
    policy = make()
    rollout = quantized_copy(policy, int3_emulated)
    plain = policy.logits(*batch())
    with pytest.raises(KeyError), aligned_forward(policy, rollout):
        raise KeyError("planted")
    assert torch.equal(policy.logits(*batch()), plain)
    with (
        pytest.raises(ValueError, match="is in another aligned_forward"),
        aligned_forward(policy, rollout),
        aligned_forward(policy, rollout),
    ):
        pass
    assert torch.equal(policy.logits(*batch()), plain)
    policy.weights_version = 1
    with pytest.raises(ValueError, match="=0 of the rollout is not the learner's 1"), aligned_forward(policy, rollout):
        pass
    policy.weights_version = 0
    with (
        pytest.raises(RuntimeError, match="changed between a forward and its backward"),
        aligned_forward(policy, rollout),
    ):
        loss = loss_of(policy)
        sync_weights(policy, rollout)
        loss.backward()


def test_adapters_align_and_take_the_gradient_of_the_merged_weight():
    policy = make(tiny_llama)
    add_lora(policy, Lora(r=4))
    for name, parameter in policy.module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    rollout = quantized_copy(policy, int3_emulated)
    expected, plain, base = rollout.logits(*batch()), policy.logits(*batch()), policy.reference().logits(*batch())
    with aligned_forward(policy, rollout):
        assert torch.equal(policy.logits(*batch()), expected)
        assert torch.equal(policy.reference().logits(*batch()), base)  # the reference is not aligned
        loss_of(policy).backward()
        layer = policy.module.model.layers[0].mlp.up_proj
        with torch.no_grad():
            layer.lora_B.weight.add_(0.01)
        moved = policy.logits(*batch())
    sync_weights(policy, rollout)
    assert torch.equal(rollout.logits(*batch()), moved)
    assert torch.equal(make(tiny_llama).logits(*batch()), base) and not torch.equal(plain, expected)
    # dA = s B^T dW and dB = s dW A^T, with dW the gradient of the merged weight in a module without adapters.
    with torch.no_grad():
        layer.lora_B.weight.sub_(0.01)
    merged = make(tiny_llama)
    merged.module = merged_copy(policy.module).requires_grad_(True)
    sync_weights(policy, rollout)
    with aligned_forward(merged, rollout):
        loss_of(merged).backward()
    dw, s = merged.module.model.layers[0].mlp.up_proj.weight.grad, 32.0 / 4
    torch.testing.assert_close(layer.lora_A.weight.grad, s * layer.lora_B.weight.T @ dw, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(layer.lora_B.weight.grad, s * dw @ layer.lora_A.weight.T, rtol=1e-4, atol=1e-8)


def test_adapters_with_dropout_are_refused():
    policy = make(tiny_llama)
    add_lora(policy, Lora(r=4, dropout=0.1))
    rollout = quantized_copy(policy, int3_emulated)
    with (
        pytest.raises(ValueError, match=r"lora.dropout=0.1: an aligned forward merges"),
        aligned_forward(policy, rollout),
    ):
        pass


def test_unquantized_rollout_aligns_nothing():
    policy = make()
    with aligned_forward(policy, quantized_copy(policy, None)):
        assert torch.equal(policy.logits(*batch()), make().logits(*batch()))


def test_what_is_yielded_refreshes_after_a_write_that_autograd_does_not_see():
    policy = make()
    rollout = quantized_copy(policy, int3_emulated)
    with aligned_forward(policy, rollout) as refresh:
        for name, _ in quantized_layers(rollout):
            policy.module.get_submodule(name).weight.data.mul_(-1)
        refresh()
        first = policy.logits(*batch())
    assert torch.equal(quantized_copy(policy, int3_emulated).logits(*batch()), first)


@pytest.mark.parametrize("scheme", [int3_emulated, quantize.Float8WeightOnly(), quantize.Int8Dynamic()])
def test_under_bf16_autocast_both_sides_still_agree_bitwise(scheme):
    policy = make()
    rollout = quantized_copy(policy, scheme)
    with torch.autocast("cpu", torch.bfloat16), aligned_forward(policy, rollout):
        assert torch.equal(policy.logits(*batch()), rollout.logits(*batch()))
        loss_of(policy).backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in policy.module.parameters())
    assert all((policy.module.get_submodule(name).weight.grad != 0).any() for name, _ in quantized_layers(rollout))
