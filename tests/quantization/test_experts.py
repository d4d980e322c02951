"""Stacked experts: each is quantized, synced in place, aligned, and seen by the doctor, like any other layer."""

from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from emulated import CPU_SCHEMES, EMULATED
from layouts import published
from mixtures import moe
from repetitions import few
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from dllm_rl import load_policy
from dllm_rl.doctor.mismatch import operands
from dllm_rl.models.base import copied
from dllm_rl.models.forward.batch_invariance import batch_invariant
from dllm_rl.models.lora import add_lora, is_stacked
from dllm_rl.models.lora_settings import Lora
from dllm_rl.quantization import schemes as quantize
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.linear import (
    UnstackedExperts,
    dequantized_input,
    dequantized_weight,
    moe_forward,
    quantized_forward,
    skip_reasons,
)
from dllm_rl.quantization.rollout_policy import locate_parameter, quantized_copy, quantized_layers, sync_weights
from dllm_rl.quantization.schemes import FakeQuantize

pytestmark = pytest.mark.usefixtures("no_rehearsal")

SCHEMES = CPU_SCHEMES | {"Int4WeightOnly": quantize.Int4WeightOnly(group_size=8)}  # divides the toys' 24 and 32 inputs
FEW = ("Float8WeightOnly", "Float8DynamicEmulated", "Int8Dynamic", "int3_emulated")
BLOCKS = ("NVFP4", "MXFP4", "nvfp4_emulated", "mxfp4_emulated")
FAMILIES = ("llada_moe", "llada2", "sdar_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    def checkpoint(family):
        folder = tmp_path_factory.mktemp(family)
        if family != "qwen3_moe":
            return published(folder, family)
        moe(causal=True, characters="abcdefghijklmnopqrstuvwxyz").save_pretrained(folder)
        return folder

    return cache(checkpoint)


@pytest.fixture(scope="module", params=few(FAMILIES, ["llada2"]))
def loaded(request, checkpoints):
    made = load_policy(checkpoints(request.param))
    for name, parameter in made.module.named_parameters():
        if ".experts." in name or ".mlp.gate." in name:  # large enough that which expert is taken matters
            parameter.data.mul_(8)
    return made


@pytest.fixture
def policy(loaded):
    return copied(loaded)


def batch(policy):
    tokens = torch.randint(4, 20, (3, 12), generator=torch.Generator().manual_seed(1))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def train(policy, generator):
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    policy.weights_version += 1


def test_the_mixture_is_the_stock_ones(policy):
    """Unquantized experts, expert by expert, give what the stock module's grouped product gives."""
    layers = [layer for layer in policy.module.modules() if is_stacked(layer)]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        stacks = {name: list(getattr(layer, name).unbind()) for name in ("gate_up_proj", "down_proj")}
        x = torch.randn(9, stacks["gate_up_proj"][0].shape[1], generator=generator)
        index = torch.stack([torch.randperm(len(stacks["down_proj"]), generator=generator)[:2] for _ in x])
        weights = torch.rand(9, 2, generator=generator)
        gate_up, down = ([lambda x, w=w: F.linear(x, w) for w in stack] for stack in stacks.values())
        ours = moe_forward(x, index, weights, gate_up, down, act_fn=layer.act_fn)
        theirs = layer(x, index, weights)  # a grouped product, which rounds otherwise
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())
    assert layers


def test_a_mixture_in_bf16_stays_in_bf16():
    """Routers in fp32 give weights in fp32, by which the experts' outputs are multiplied before they are rounded."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 8, generator=generator).bfloat16()
    gate_up, down = (torch.randn(shape, generator=generator).bfloat16() for shape in ((3, 12, 8), (3, 8, 6)))
    index, weights = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0], [1, 2]]), torch.rand(5, 2, generator=generator)
    expected = torch.zeros(5, 8)
    for row, (experts, shares) in enumerate(zip(index.tolist(), weights, strict=True)):
        for expert, share in zip(experts, shares, strict=True):
            gate, up = F.linear(x[row], gate_up[expert]).chunk(2)
            expected[row] += share * F.linear(F.silu(gate) * up, down[expert]).float()
    products = ([partial(F.linear, weight=weight) for weight in stack] for stack in (gate_up, down))
    found = moe_forward(x, index, weights, *products, act_fn=F.silu)
    assert found.dtype == torch.bfloat16
    # The products round to 8 bits, and a row alone may round otherwise than among others.
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


@pytest.mark.repeated
@pytest.mark.parametrize("scheme", FEW)
def test_all_but_router_norms_embeddings_and_head_is_quantized(policy, scheme):
    rollout_policy = quantized_copy(policy, SCHEMES[scheme])
    reasons = set(rollout_policy.quantization_report.skipped.values())
    assert reasons <= {"embedding", "router", "outside the blocks"}, rollout_policy.quantization_report
    held = {locate_parameter(name)[0] for name, _ in quantized_layers(rollout_policy)}
    for name, parameter in policy.module.named_parameters():
        blocks = ".layers." in name and parameter.dim() > 1 and not name.endswith("mlp.gate.weight")
        assert (name in held) == blocks, name
    experts = [layer for layer in rollout_policy.module.modules() if isinstance(layer, UnstackedExperts)]
    assert experts and not any(is_stacked(layer) for layer in rollout_policy.module.modules())
    assert rollout_policy.quantization_report.bytes_after < rollout_policy.quantization_report.bytes_before * (
        1.1 if scheme in EMULATED else 0.6
    )


@pytest.mark.parametrize("scheme", few([*SCHEMES, None], [*FEW, "Int4WeightOnly", None]))
@pytest.mark.repeated
def test_a_sync_equals_a_fresh_quantization_bitwise_and_moves_no_storage(policy, scheme):
    config, (tokens, mask) = SCHEMES[scheme] if scheme else None, batch(policy)
    rollout_policy = quantized_copy(policy, config)
    layers = [layer for _, layer in quantized_layers(rollout_policy)]
    before = [getattr(layer.weight, "qdata", layer.weight).data_ptr() for layer in layers]
    train(policy, torch.Generator().manual_seed(2))
    moved = sync_weights(policy, rollout_policy)
    fresh = quantized_copy(policy, config)
    assert torch.equal(rollout_policy.logits(tokens, mask), fresh.logits(tokens, mask))
    assert before == [getattr(layer.weight, "qdata", layer.weight).data_ptr() for layer in layers]
    assert scheme is None or 0 < moved["quantization/codes_changed"] <= 1
    total = sum(layer.weight.numel() for layer in layers)
    if scheme:
        skipped = rollout_policy.quantization_report.skipped
        # Blocks of 16 or 32 do not divide the inputs of some of these layers, which the report names.
        sizes = {name for name, reason in skipped.items() if scheme in BLOCKS and "is not a multiple" in reason}
        blocks = [
            p
            for name, p in policy.module.named_parameters()
            if ".layers." in name and p.dim() > 1 and "gate.w" not in name and not name.startswith(tuple(sizes))
        ]
        assert total == sum(p.numel() for p in blocks)


def definition(policy, rollout_policy):
    """Autograd through the product of dequantized operands, identity through the quantizers, expert by expert."""
    for name, target in rollout_policy.module.named_modules():
        source = policy.module.get_submodule(name) if name in dict(policy.module.named_modules()) else None

        def product(x, weight, layer, bias=None):
            seen = quantized_forward(layer, x.detach(), None)[1]
            x_q = x + (dequantized_input(layer, *seen) - x.detach())
            y = F.linear(x_q, weight + (dequantized_weight(layer) - weight).detach(), bias)
            return y + (quantized_forward(layer, x.detach(), bias)[0] - y).detach()

        if isinstance(target, UnstackedExperts):

            def experts(x, index, weights, source=source, target=target):
                ways = [
                    [
                        lambda x, w=w, layer=layer: product(x, w, layer)
                        for w, layer in zip(getattr(source, stack), getattr(target, stack), strict=True)
                    ]
                    for stack in ("gate_up_proj", "down_proj")
                ]
                return moe_forward(x, index, weights, *ways, act_fn=source.act_fn)

            source.forward = experts
        elif source is not None and isinstance(target, nn.Linear) and dict(quantized_layers(rollout_policy)).get(name):
            source.forward = lambda x, s=source, t=target: product(x, s.weight, t, s.bias)


@pytest.mark.repeated
@pytest.mark.parametrize("scheme", FEW)
def test_the_aligned_gradient_is_the_straight_through_definition(policy, scheme):
    tokens, mask = batch(policy)
    rollout_policy = quantized_copy(policy, SCHEMES[scheme])

    def gradients():
        policy.module.zero_grad()
        logits = policy.logits(tokens, mask)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        return logits.detach(), {n: p.grad.clone() for n, p in policy.module.named_parameters() if p.grad is not None}

    with aligned_forward(policy, rollout_policy):
        logits, ours = gradients()
    assert torch.equal(logits, rollout_policy.logits(tokens, mask))
    definition(policy, rollout_policy)
    _, theirs = gradients()
    assert ours.keys() == theirs.keys() and any("experts" in name for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_inside_an_aligned_forward_is_quantized_again(policy):
    rollout_policy = quantized_copy(policy, FakeQuantize(weight="int4", activation="e4m3"))
    tokens, mask = batch(policy)
    with aligned_forward(policy, rollout_policy):
        policy.logits(tokens, mask)
        with torch.no_grad():
            for name, parameter in policy.module.named_parameters():
                if "experts" in name:
                    parameter.mul_(-1.5)
        again = policy.logits(tokens, mask)
    assert torch.equal(
        again, quantized_copy(policy, FakeQuantize(weight="int4", activation="e4m3")).logits(tokens, mask)
    )
    sync_weights(policy, rollout_policy)


def test_a_weight_that_is_not_finite_is_named_with_its_expert(policy):
    rollout_policy = quantized_copy(policy, SCHEMES["Float8WeightOnly"])
    name, stack = next((n, p) for n, p in policy.module.named_parameters() if n.endswith("experts.down_proj"))
    with torch.no_grad():
        stack[2, 1, 1] = torch.nan
    for act in (
        lambda: sync_weights(policy, rollout_policy),
        lambda: quantized_copy(policy, rollout_policy.quantization),
    ):
        with pytest.raises(ValueError, match=rf"{name}\.2\.weight has NaN"):
            act()


def test_experts_can_be_left_as_they_are(policy):
    config = SCHEMES["Float8WeightOnly"].config()
    kept = skip_reasons(policy.module, config, lambda layer, name: name.endswith(".experts"))
    assert "skip" in kept.values()
    rollout_policy = quantized_copy(policy, config, skip=lambda layer, name: name.endswith(".experts"))
    assert not any(isinstance(layer, UnstackedExperts) for layer in rollout_policy.module.modules())
    train(policy, torch.Generator().manual_seed(3))
    sync_weights(policy, rollout_policy)
    stacks = [n for n, _ in policy.module.named_parameters() if n.endswith("experts.down_proj")]
    ours, theirs = dict(policy.module.named_parameters()), dict(rollout_policy.module.named_parameters())
    assert stacks and all(torch.equal(ours[name], theirs[name]) for name in stacks)


def test_groups_that_do_not_divide_a_projection_keep_the_experts(policy):
    kept = skip_reasons(policy.module, quantize.Int4WeightOnly(group_size=7).config(), None)
    assert all("multiple of the group size 7" in why for name, why in kept.items() if name.endswith(".experts"))
    assert any(name.endswith(".experts") for name in kept)


def test_the_doctor_rounds_experts_like_every_other_weight(policy):
    rounded, fresh = operands(quantized_copy(policy, None), FakeQuantize(weight="int4", activation=None))
    tokens, mask = batch(policy)
    torch.testing.assert_close(rounded.logits(tokens, mask), fresh.logits(tokens, mask), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(rounded.logits(tokens, mask), policy.logits(tokens, mask), atol=1e-3)


def test_grouped_products_do_not_depend_on_the_batch(policy):
    """A row alone, among others, and twice: the same bits, through the stock grouped product."""
    tokens, mask = batch(policy)
    with torch.no_grad(), batch_invariant():
        together = policy.logits(tokens, mask)
        alone = policy.logits(tokens[1:2], mask[1:2])
        twice = policy.logits(tokens[[1, 0, 1]], mask[[1, 0, 1]])
    assert torch.equal(together[1], alone[0]) and torch.equal(twice[0], alone[0]) and torch.equal(twice[2], alone[0])


def test_a_stack_of_another_layout_is_not_taken_for_experts():
    config = Qwen3MoeConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
        intermediate_size=8, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1)  # fmt: skip
    experts = Qwen3MoeForCausalLM(config).model.layers[0].mlp.experts
    assert is_stacked(experts)
    for name, value in (("is_transposed", True), ("has_bias", True), ("has_gate", False), ("is_concatenated", False)):
        before = getattr(experts, name, not value)  # early transformers 5 have not all of them
        setattr(experts, name, value)
        assert not is_stacked(experts), name
        setattr(experts, name, before)
    experts.bias = nn.Parameter(torch.zeros(2))
    assert not is_stacked(experts)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("skip", [None, lambda layer, name: is_stacked(layer)], ids=["all", "no experts"])
def test_a_copy_of_a_mixture_is_whole_in_its_dtype(adapted, skip):
    """Experts too, quantized or kept, with adapters or without."""
    policy = moe()
    if adapted:
        add_lora(policy, Lora(r=2, experts=True))
    copied = quantized_copy(policy, quantize.Int8WeightOnly(), skip=skip, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in copied.module.parameters()} == {torch.bfloat16}
    assert len(copied.quantization_report.quantized) > (0 if skip else 2 * 2 * 6)  # layers, stacks, experts
