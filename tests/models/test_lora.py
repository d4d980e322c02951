"""LoRA: settings; layers in their dtypes; a pair of adapters for each expert, merged, quantized, saved and resumed."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from layouts import published
from mixtures import moe
from refusals import refused, refuses
from run_outputs import metrics_of
from tiny_recipe import MOE_SIZES, tiny_recipe
from torch import nn
from torch.overrides import TorchFunctionMode

from dllm_rl import load_policy
from dllm_rl.models import lora as lora_module
from dllm_rl.models.checkpoint.adapters import adapter_state, load_adapter, save_adapter
from dllm_rl.models.lora import STACKS, LoraExperts, LoraLinear, add_lora, base_product, is_stacked, moe_layers
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.low_bit import linear_of
from dllm_rl.models.merge import merge_lora, merged_copy
from dllm_rl.models.tiny import tiny_moe
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.linear import UnstackedExperts
from dllm_rl.quantization.rollout_policy import quantized_copy, quantized_layers, sync_weights
from dllm_rl.quantization.schemes import Float8WeightOnly, Int8Dynamic
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")

LORA = Lora(r=3, alpha=6.0, experts=True)


def batch():
    tokens = torch.randint(4, 11, (3, 10), generator=torch.Generator().manual_seed(1))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def adapted(policy=None, *, moved=True):
    policy = moe() if policy is None else policy
    add_lora(policy, LORA)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if moved and ".lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return policy


def by_hand(policy):
    """The same module in which every expert's W + 2 B A stands in the stacks."""
    plain = moe()
    theirs = dict(policy.module.named_modules())
    with torch.no_grad():
        for path, layer in plain.module.named_modules():
            if is_stacked(layer):
                for name in STACKS:
                    a, b = theirs[path].lora_A[name], theirs[path].lora_B[name]
                    for expert, weight in enumerate(getattr(layer, name)):
                        weight += 2 * b[expert] @ a[expert]
            elif hasattr(theirs.get(path), "base_layer"):
                layer.weight += 2 * theirs[path].lora_B.weight @ theirs[path].lora_A.weight
    return plain


def test_nothing_changes_at_first_and_then_every_expert_has_its_own_pair():
    tokens, mask = batch()
    fresh = adapted(moved=False)
    assert torch.equal(fresh.logits(tokens, mask), moe().logits(tokens, mask))
    trained = {name for name, p in fresh.module.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert sum(".experts.lora_" in name for name in trained) == 2 * 2 * 2  # layers, stacks, A and B
    policy = adapted()
    torch.testing.assert_close(policy.logits(tokens, mask), by_hand(policy).logits(tokens, mask))
    assert not torch.allclose(policy.logits(tokens, mask), moe().logits(tokens, mask), atol=1e-2)
    torch.testing.assert_close(policy.reference().logits(tokens, mask), moe().logits(tokens, mask))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_merged_stacks(checkpointing):
    """dA = 2 B^T dW and dB = 2 dW A^T, expert by expert, dW of a plain module that holds the merged stacks."""
    tokens, mask = batch()
    policy = adapted()
    plain = by_hand(policy)
    policy.gradient_checkpointing = checkpointing
    for each in (policy, plain):
        F.cross_entropy(each.logits(tokens, mask).flatten(0, 1), tokens.flatten()).backward()
    theirs = dict(plain.module.named_modules())
    for path, layer in policy.module.named_modules():
        if isinstance(layer, LoraExperts):
            for name in STACKS:
                dw, a, b = getattr(theirs[path], name).grad, layer.lora_A[name], layer.lora_B[name]
                torch.testing.assert_close(a.grad, 2 * b.detach().mT @ dw, rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(b.grad, 2 * dw @ a.detach().mT, rtol=1e-4, atol=1e-6)
                assert a.grad.norm() > 0 and layer.base_layer.gate_up_proj.grad is None


@pytest.mark.repeated
@pytest.mark.parametrize("scheme", [Float8WeightOnly, Int8Dynamic, None])
def test_the_rollouts_copy_holds_the_merged_experts_and_syncs_in_place(scheme):
    tokens, mask = batch()
    policy, config = adapted(), None if scheme is None else scheme()
    rollout_policy = quantized_copy(policy, config)
    assert not any(".lora_" in name for name, _ in rollout_policy.module.named_parameters())
    assert torch.equal(rollout_policy.logits(tokens, mask), quantized_copy(merged(policy), config).logits(tokens, mask))
    if scheme:
        assert sum(isinstance(layer, UnstackedExperts) for layer in rollout_policy.module.modules()) == 2
        kept = set(rollout_policy.quantization_report.skipped.values())
        assert kept <= {"embedding", "router", "outside the blocks"}
    before = [parameter.data_ptr() for _, layer in quantized_layers(rollout_policy) for parameter in [layer.weight]]
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if ".lora_A" in name:
                parameter.mul_(1.5)
    policy.weights_version += 1
    sync_weights(policy, rollout_policy)
    fresh = quantized_copy(policy, config)
    assert torch.equal(rollout_policy.logits(tokens, mask), fresh.logits(tokens, mask))
    assert before == [layer.weight.data_ptr() for _, layer in quantized_layers(rollout_policy)]


def merged(policy):
    other = copy.copy(policy)
    other.module = merged_copy(policy.module)
    assert not any(".lora_" in name for name, _ in other.module.named_parameters())
    return other


def test_merging_and_saving_leave_ordinary_experts(tmp_path):
    tokens, mask = batch()
    policy = adapted()
    before = policy.logits(tokens, mask)
    torch.testing.assert_close(merged(policy).logits(tokens, mask), before)
    policy.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(load_policy(tmp_path / "whole").logits(tokens, mask), before)
    merge_lora(policy)
    torch.testing.assert_close(policy.logits(tokens, mask), before)
    assert all(is_stacked(layer.experts) for layer in moe_layers(policy.module)) and policy.lora is None


def test_the_aligned_forward_goes_through_the_adapted_experts():
    tokens, mask = batch()
    policy = adapted()
    rollout_policy = quantized_copy(policy, Float8WeightOnly())
    with aligned_forward(policy, rollout_policy):
        logits = policy.logits(tokens, mask)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        with torch.no_grad():
            reference = policy.reference().logits(tokens, mask)
    assert torch.equal(logits.detach(), rollout_policy.logits(tokens, mask))
    assert all(p.grad is not None and p.grad.norm() > 0 for n, p in policy.module.named_parameters() if ".lora_A" in n)
    torch.testing.assert_close(reference, moe().logits(tokens, mask))


def test_peft_opens_what_we_save_and_we_what_it_saves(tmp_path):
    peft = pytest.importorskip("peft")
    tokens, mask = batch()
    policy = adapted()
    save_adapter(policy, tmp_path / "ours")
    bare = moe()
    wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(bare.module), tmp_path / "ours")
    opened = copy.copy(bare)
    opened.module = wrapped.base_model.model
    torch.testing.assert_close(opened.logits(tokens, mask), policy.logits(tokens, mask), rtol=1e-5, atol=1e-5)
    wrapped.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = moe()
        load_adapter(again, tmp_path / folder)
        assert again.lora.experts and again.lora.r == 3
        torch.testing.assert_close(again.logits(tokens, mask), policy.logits(tokens, mask))
        assert adapter_state(again).keys() == adapter_state(policy).keys()


@pytest.mark.slow
def test_a_run_trains_experts_adapters_alone_and_resumes_bit_for_bit(tmp_path):
    settings = {"model": partial(tiny_moe, num_experts=4, **MOE_SIZES), "lora": Lora(experts=True)}
    train(tiny_recipe(tmp_path / "whole", **settings))
    train(tiny_recipe(tmp_path / "parts", num_steps=1, lr_schedule_steps=2, **settings))
    parts = tiny_recipe(tmp_path / "parts", lr_schedule_steps=2, resume_from_checkpoint="latest", **settings)
    policy = train(parts).policy
    assert isinstance(moe_layers(policy.module)[0].experts, LoraExperts)
    assert moe_layers(policy.module)[0].experts.lora_B["down_proj"].any()
    rows = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert rows[0][-1]["grad_norm"] == rows[1][-1]["grad_norm"] > 0


def test_what_does_not_go_with_it_is_refused(tmp_path):
    refuses(r"lora.dropout=0.1: adapters on experts", lambda: Lora(experts=True, dropout=0.1))
    with pytest.raises(ValueError, match=r"lora.experts=True, but LlamaForCausalLM has no stacked experts"):
        add_lora(load_policy(published(tmp_path, "llada")), LORA)


def test_merged_experts_are_rounded_once():
    """1 + 2^-8 + 2^-17 lies above the middle of two numbers of bf16, 1 and 1 + 2^-7. An adapter that is rounded before
    the sum is 2^-8, and the sum then a tie, which goes to 1."""
    base = nn.Module()
    for name in STACKS:
        base.register_parameter(name, nn.Parameter(torch.ones(1, 1, 1, dtype=torch.bfloat16)))
    layer = LoraExperts(base, Lora(r=1, alpha=1.0, experts=True), torch.Generator())
    with torch.no_grad():
        layer.lora_A["down_proj"].fill_(1 + 2**-9)
        layer.lora_B["down_proj"].fill_(2**-8)
    assert layer.merged("down_proj").item() == 1 + 2**-7


test_settings_that_cannot_be = refused(
    ({"r": 0}, "^r=0 must be at least 1"),
    ({"dropout": 1.0}, r"^dropout=1.0 must lie in \[0, 1\)"),
    by=lambda kwargs: Lora(**kwargs),
)


def test_the_small_adapters_are_what_their_name_says():
    assert Lora() == Lora(r=16, alpha=32.0)


class Products(TorchFunctionMode):
    """Keeps the dtypes of the operands of every linear layer."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.seen.append((args[0].dtype, args[1].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_the_inputs_dtype_gradients_in_fp32(dtype):
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(6, 4, bias=False)
    base.weight.data = torch.randn(4, 6, generator=generator).to(dtype)
    layer = LoraLinear(base, Lora(r=2, alpha=4.0), generator)
    layer.lora_B.weight.data = torch.randn(4, 2, generator=generator)
    x = torch.randn(5, 6, generator=generator).to(dtype)
    with Products() as products:
        y = layer(x)
    assert products.seen == [(dtype, dtype)] * 3 and y.dtype == dtype
    a, b = layer.lora_A.weight, layer.lora_B.weight
    by_hand = x.double() @ (base.weight.double() + 2 * b.double() @ a.double()).T  # alpha / r = 2
    torch.testing.assert_close(y.double(), by_hand, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    y.float().sum().backward()
    assert a.dtype == b.dtype == a.grad.dtype == b.grad.dtype == torch.float32
    expected = 2 * (x.double() @ a.double().T).sum(0).expand(4, 2)  # d sum(y) / dB
    torch.testing.assert_close(b.grad.double(), expected, rtol=1e-5 if dtype == torch.float32 else 0.03, atol=0.05)


def test_where_bf16_products_are_emulated_the_backward_is_in_fp32(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weight, bias = (torch.randn(shape, generator=generator).bfloat16() for shape in ((24, 16), (24,)))
    layer = linear_of(weight, nn.Parameter(bias, requires_grad=False))
    vector = torch.randn(3, 24, generator=generator).bfloat16()
    found = {}
    for supported in (True, False):
        monkeypatch.setattr(lora_module, "has_bf16_products", lambda supported=supported: supported)
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        out = base_product(layer, x)
        out.backward(vector)
        found[supported] = out.detach(), x.grad
        assert (type(out.grad_fn).__name__ == "_Float32BackwardBackward") is not supported
    assert torch.equal(found[True][0], found[False][0])
    assert torch.equal(found[False][1], (vector.float() @ layer.weight.float()).bfloat16())
    torch.testing.assert_close(found[True][1], found[False][1], rtol=2**-7, atol=2**-7)


def test_a_merge_equals_its_formula_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        layer = LoraLinear(linear_of(torch.randn(12, 8).to(dtype), None), Lora(r=2, alpha=3.0), torch.Generator())
        layer.lora_B.weight.data.normal_()
        before = layer.base_layer.weight.clone()
        added = layer.lora_B.weight @ layer.lora_A.weight
        assert torch.equal(layer.merged(), (before.float() + added * 1.5).to(dtype))
        assert torch.equal(layer.base_layer.weight, before)
        (layer.merged().float() ** 2).sum().backward()
        assert layer.lora_A.weight.grad.abs().sum() > 0 and layer.lora_B.weight.grad.abs().sum() > 0


def test_dropout_keeps_the_mean():
    """Kept inputs are divided by 1 - p. Of n draws the kept share is within 5 standard errors of 1 - p."""
    layer = LoraLinear(nn.Linear(1000, 1), Lora(r=1, dropout=0.25), torch.Generator().manual_seed(0))
    out = layer.apply_dropout(torch.ones(20, 1000))
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert out.count_nonzero().item() / 20_000 == pytest.approx(0.75, abs=5 * (0.75 * 0.25 / 20_000) ** 0.5)
