"""Quantized copies: what is quantized and what not, guards, and syncs that equal a fresh quantization bit for bit."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from emulated import CPU_SCHEMES, e4m3_emulated, int3_emulated
from own_module import own_policy
from refusals import refuses
from repetitions import few
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
)

from dllm_rl.models.base import LLAMA_LINEARS
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.merge import merged_copy
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization import rollout_policy
from dllm_rl.quantization import schemes as quantize
from dllm_rl.quantization.linear import dequantized_weight, skip_reasons, stored_bytes
from dllm_rl.quantization.rollout_policy import quantize_weight, quantized_copy, quantized_layers, sync_weights
from dllm_rl.quantization.schemes import FakeQuantize
from dllm_rl.records import describe
from dllm_rl.step.update import check_staleness
from dllm_rl.types.rollouts import Rollout, SamplingParams

SCHEMES = [*CPU_SCHEMES.values()]
small = {
    "characters": "abcdefgh",
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def masked_lm():
    return tiny_masked_lm(**small)


def llada(tied=False):
    policy = tiny_llama(**small, causal=False)
    if tied:
        policy.module.lm_head.weight = policy.module.model.embed_tokens.weight
        policy.module.config.tie_word_embeddings = True
    return policy


def adapted():
    policy = llada()
    add_lora(policy, Lora(r=4))
    for name, parameter in policy.module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return policy


def batch():
    tokens = torch.randint(3, 11, (3, 12), generator=torch.Generator().manual_seed(1))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def storages(module):
    """Address of every tensor that a module holds, codes and scales one by one."""
    found = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "qdata") else [None]
        for part in parts:
            found[name, part] = (tensor if part is None else getattr(tensor, part)).data_ptr()
    return found


def contents(module):
    found = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "qdata") else [None]
        for part in parts:
            found[name, part] = (tensor if part is None else getattr(tensor, part)).clone()
    return found


def equal(a, b):
    view = lambda x: x.view(torch.uint8) if x.element_size() == 1 else x  # noqa: E731
    return a.keys() == b.keys() and all(torch.equal(view(a[k]), view(b[k])) for k in a)


@pytest.mark.parametrize("scheme", [*SCHEMES[:6], int3_emulated, None], ids=describe)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(masked_lm, id="masked_lm", marks=pytest.mark.slow),
        pytest.param(llada, id="untied", marks=pytest.mark.slow),
        pytest.param(lambda: llada(tied=True), id="tied", marks=pytest.mark.slow),
        pytest.param(adapted, id="lora"),
    ],
)
@pytest.mark.repeated(every=3)
def test_steps_and_syncs_equal_a_fresh_quantization_and_move_no_storage(make, scheme):
    policy = make()
    rollout = quantized_copy(policy, scheme)
    addresses = storages(rollout.module)
    optimizer = torch.optim.AdamW([p for p in policy.module.parameters() if p.requires_grad], lr=1e-2)
    tokens, mask = batch()
    for step in range(2):
        before = contents(rollout.module)
        F.cross_entropy(policy.logits(tokens, mask).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        policy.weights_version += 1
        sync_weights(policy, rollout)
        assert rollout.weights_version == policy.weights_version == step + 1
        assert not equal(contents(rollout.module), before)
    assert equal(contents(rollout.module), contents(quantized_copy(policy, scheme).module))
    assert storages(rollout.module) == addresses
    assert torch.equal(rollout.logits(tokens, mask), quantized_copy(policy, scheme).logits(tokens, mask))
    if make not in (masked_lm, adapted):
        head, embedding = rollout.module.lm_head.weight, rollout.module.model.embed_tokens.weight
        assert (head is embedding) == policy.module.config.tie_word_embeddings


class Launches(TorchDispatchMode):
    """Counts the operators below torchao's tensors that are not views: on a GPU, each launches a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t.__module__.startswith("torchao") for t in types):
            return NotImplemented
        self.count += not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [quantize.Float8WeightOnly(), quantize.Int8Dynamic()], ids=describe)
@pytest.mark.parametrize("lora", [None, Lora(r=4)], ids=["full", "lora"])
@pytest.mark.repeated(first_only=True)
def test_a_sync_launches_as_many_kernels_for_many_layers_as_for_few(lora, scheme, dtype, monkeypatch):
    """All layers of one shape are quantized together, to the bits that they have one by one."""
    counts = []
    for num_layers in (2, 3):
        policy = tiny_llama(**small | {"num_layers": num_layers}, causal=False)
        policy.module.to(dtype)
        if lora:
            add_lora(policy, lora)
        together, alone = quantized_copy(policy, scheme), quantized_copy(policy, scheme)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.module.parameters():
                if parameter.requires_grad:
                    parameter += (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
            policy.module.model.layers[1].mlp.up_proj.requires_grad_(False)  # frozen or not, it is written
        with Launches() as launches:
            found = sync_weights(policy, together)
        counts.append(launches.count)
        monkeypatch.setattr(rollout_policy, "CHUNK_BYTES", 0)
        with Launches() as launches:
            expected = sync_weights(policy, alone)
        monkeypatch.undo()
        assert launches.count > 2 * counts[-1]
        assert equal(contents(together.module), contents(alone.module))
        assert found == pytest.approx(expected, rel=1e-6, abs=0) and min(found.values()) > 0
    assert counts[1] - counts[0] == (len(LLAMA_LINEARS) if lora else 0)  # the adapters' products, one by one


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("scheme", [*SCHEMES, None], ids=describe)
@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.float32]))
def test_a_copy_in_bf16_is_its_own_and_a_sync_rounds_as_the_first_copy_did(dtype, scheme):
    """The weights are rounded to bf16, and quantized then. A learner in bf16 shares no weight with its copy."""
    policy = llada()
    policy.module.to(dtype)
    rollout = quantized_copy(policy, scheme, dtype=torch.bfloat16)
    before = contents(rollout.module)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter += (0.01 * torch.randn(parameter.shape, generator=generator)).to(dtype)
    assert equal(contents(rollout.module), before)
    sync_weights(policy, rollout)
    fresh = contents(quantized_copy(policy, scheme, dtype=torch.bfloat16).module)
    assert equal(contents(rollout.module), fresh) and not equal(fresh, before)


def test_adapters_are_merged_and_gone():
    policy = adapted()
    rollout, merged = quantized_copy(policy, None), llada()
    merged.module = merged_copy(policy.module)
    assert [name for name, _ in rollout.module.named_parameters()] == [n for n, _ in llada().module.named_parameters()]
    assert torch.equal(rollout.logits(*batch()), merged.logits(*batch()))
    assert not torch.equal(rollout.logits(*batch()), llada().logits(*batch()))
    assert rollout.lora is None and policy.lora is not None
    quantized = quantized_copy(policy, quantize.Int8WeightOnly())
    assert torch.equal(quantized.logits(*batch()), quantized_copy(merged, quantize.Int8WeightOnly()).logits(*batch()))
    assert len(quantized.quantization_report.quantized) == 14


def test_a_layout_without_a_way_back_is_dequantized_by_its_own_product(monkeypatch):
    """int4_packed's kernels are CUDA's; the CPU has twins of them that take the codes one in 32 bits."""
    seen, ops = {}, torch.ops.aten

    def convert(pairs, tiles):
        seen["codes"] = torch.stack([pairs >> 4, pairs & 0xF], -1).flatten(1).int()
        return ops._convert_weight_to_int4pack_for_cpu(seen["codes"], tiles)

    def product(x, weight, group, scale_and_zero):
        seen["scales"] = scale_and_zero
        return ops._weight_int4pack_mm_for_cpu(x, weight, group, scale_and_zero)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(ops, "_convert_weight_to_int4pack", convert, raising=False)
    monkeypatch.setattr(ops, "_weight_int4pack_mm", product, raising=False)
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = nn.Linear(256, 48, bias=False)
    layer.weight = nn.Parameter(quantize_weight(weight, quantize.Int4Packed().config())[0], requires_grad=False)
    found = dequantized_weight(layer)
    # Codes are 0..15 about 8, in groups of 128: w = (code - 8) * scale + zero.
    scale, zero = (seen["scales"][:2, :48, i].T.repeat_interleave(128, 1) for i in (0, 1))
    expected = (seen["codes"][:48, :256].float() - 8) * scale.float() + zero.float()
    torch.testing.assert_close(found.float(), expected, rtol=2**-8, atol=0)
    assert (found - weight).abs().max() < 0.6 * scale.max()


def test_sync_also_copies_norms_biases_embeddings_head_and_buffers():
    policy = masked_lm()
    policy.module.register_buffer("table", torch.zeros(3), persistent=False)
    rollout = quantized_copy(policy, quantize.Int8WeightOnly())
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(1.0)
    policy.module.table += 2
    sync_weights(policy, rollout)
    quantized = {f"{name}.weight" for name, _ in quantized_layers(rollout)}
    for name, value in policy.module.named_parameters():
        if name not in quantized:
            assert torch.equal(rollout.module.get_parameter(name), value), name
    assert rollout.module.table.tolist() == [2, 2, 2]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "own": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
}


@pytest.mark.parametrize("scheme", [FakeQuantize(weight="int4"), quantize.Int8WeightOnly()], ids=str)
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_is_not_quantized_and_its_tensors_are_synced(kind, scheme):
    policy = own_policy()
    COMPUTED[kind](policy.module.blocks[0].out)
    rollout = quantized_copy(policy, scheme)
    report = rollout.quantization_report
    assert report.skipped["blocks.0.out"] == "the weight is computed from other tensors"
    assert {"blocks.0.out", "blocks.0.qkv"} & {*report.quantized} == {"blocks.0.qkv"}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    sync_weights(policy, rollout)
    assert torch.equal(rollout.module.blocks[0].out.weight, policy.module.blocks[0].out.weight)
    tokens, mask = torch.tensor([[3, 4, 5, 3]]), torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(rollout.logits(tokens, mask), quantized_copy(policy, scheme).logits(tokens, mask))
    with pytest.raises(ValueError, match=r"'blocks.0.out', whose weight is computed from other tensors; leave it out"):
        add_lora(policy, Lora(r=2))


def test_report_says_what_was_quantized_what_not_and_why():
    skip = lambda module, name: name.endswith("layers.1.mlp.up_proj")  # noqa: E731
    rollout = quantized_copy(llada(), quantize.Int8WeightOnly(), skip=skip)
    report = rollout.quantization_report
    assert len(report.quantized) == 2 * 7 - 1
    assert report.skipped == {
        "model.embed_tokens": "embedding",
        "lm_head": "outside the blocks",
        "model.layers.1.mlp.up_proj": "skip",
    }
    # Weights that turn from 4 bytes into 1, with a fp32 scale and an int8 zero point per row.
    layers = [llada().module.get_submodule(name).weight for name in report.quantized]
    saved = sum(3 * w.numel() - 5 * w.shape[0] for w in layers)
    assert report.bytes_before - report.bytes_after == saved
    assert str(report).startswith(
        "13 layers quantized, 0.1 -> 0.0 MiB; 1 skipped (embedding): model.embed_tokens; 1 skipped"
    )


def test_tied_routers_fused_experts_and_shapes_are_kept():
    block = nn.Module()
    block.gate, block.up, block.odd = nn.Linear(32, 4, bias=False), nn.Linear(32, 64), nn.Linear(24, 32)
    block.router, block.tied, block.conv = nn.Linear(32, 4), nn.Linear(32, 10, bias=False), nn.Conv1d(4, 4, 3)
    block.expert_list = nn.ModuleList([nn.Linear(32, 32)])
    block.experts = type("Experts", (nn.Module,), {"__module__": "models"})()
    block.experts.down_proj = nn.Parameter(torch.zeros(2, 4, 4))
    module = nn.Module()
    module.layers, module.embedding = nn.ModuleList([block]), nn.Embedding(10, 32)
    block.tied.weight = module.embedding.weight
    assert skip_reasons(module, quantize.Int4WeightOnly().config(), None) == {
        "embedding": "embedding",
        "layers.0.gate": "router",
        "layers.0.router": "router",
        "layers.0.odd": "32x24: 24 is not a multiple of the group size 32",
        "layers.0.tied": "tied to embedding",
        "layers.0.conv": "Conv1d, not nn.Linear",
        "layers.0.experts": "fused experts of an unknown layout",
    }
    dynamic = skip_reasons(module, Float8DynamicActivationFloat8WeightConfig(), None)
    assert dynamic["layers.0.odd"] == "32x24: not multiples of 16"
    with pytest.raises(ValueError, match="quantizes no layer of RobertaPreLayerNormForMaskedLM"):
        quantized_copy(masked_lm(), quantize.Int8WeightOnly(), skip=lambda m, name: True)


def test_no_plain_copy_of_a_quantized_weight_is_made():
    seen = []

    class Clones(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.clone.default and args[0].is_floating_point():
                seen.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    policy = llada()
    with Clones():
        rollout = quantized_copy(policy, quantize.Int8WeightOnly())
    shapes = {tuple(layer.weight.shape) for _, layer in quantized_layers(rollout)}
    assert len(shapes) == 3 and seen and not shapes & set(seen)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(
    ("scheme", "bad"),
    [*((scheme, float("nan")) for scheme in SCHEMES), (int3_emulated, float("inf")), (SCHEMES[0], float("-inf"))],
    ids=describe,
)
def test_weights_that_are_not_finite_are_refused_by_name(scheme, bad):
    policy = llada()
    rollout = quantized_copy(policy, scheme)
    policy.module.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    policy.weights_version = 1
    refuses(r"^model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinity", lambda: sync_weights(policy, rollout))
    assert rollout.weights_version == 0, "what is half written does not pass for the learner's weights"
    refuses(r"^model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinity", lambda: quantized_copy(policy, scheme))


def test_plain_weights_beside_rounded_inputs_must_be_finite_too():
    policy = llada()
    rollout = quantized_copy(policy, FakeQuantize(weight=None, activation="e4m3"))
    policy.module.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    refuses(r"^model\.layers\.1\.mlp\.up_proj\.weight has NaN or infinity", lambda: sync_weights(policy, rollout))


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("scheme", [*SCHEMES, None], ids=describe)
def test_no_weight_of_a_rollout_policy_is_trained(scheme):
    policy = llada()
    assert not any(p.requires_grad for p in quantized_copy(policy, scheme).module.parameters())
    assert all(p.requires_grad for p in policy.module.parameters())


def test_a_row_of_zeros_has_the_smallest_scale():
    weight = torch.eye(3, 32)
    weight[1] = 0
    packed, _ = quantize_weight(weight, quantize.Float8WeightOnly().config())
    assert packed.scale.flatten().tolist() == pytest.approx([1 / 448, 1e-12, 1 / 448], rel=1e-6, abs=0)


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize("scheme", SCHEMES, ids=describe)
def test_zero_rows_and_zero_inputs_give_zeros(scheme):
    policy = llada()
    policy.module.model.layers[0].self_attn.o_proj.weight.data.zero_()
    policy.module.model.layers[0].mlp.up_proj.weight.data[::2].zero_()
    rollout = quantized_copy(policy, scheme)
    layers = rollout.module.model.layers
    assert torch.equal(layers[0].self_attn.o_proj(torch.randn(2, 32)), torch.zeros(2, 32))
    assert (layers[0].mlp.up_proj(torch.randn(2, 32))[:, ::2] == 0).all()
    assert torch.equal(layers[1].mlp.up_proj(torch.zeros(2, 32)), torch.zeros(2, 64))
    sync_weights(policy, rollout)
    assert rollout.logits(*batch()).isfinite().all()


@pytest.mark.float8_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_emulation_equals_torchaos_dynamic_float8(dtype):
    policy = masked_lm()
    policy.module.to(dtype)
    fast = quantized_copy(policy, e4m3_emulated).logits(*batch())
    exact = quantized_copy(policy, quantize.Float8DynamicEmulated()).logits(*batch())
    moved = (fast - policy.logits(*batch())).norm()  # as far as quantization moves them
    assert moved > 0 and (fast - exact).norm() < (1e-4 if dtype == torch.float32 else 0.2) * moved


def test_quantization_error_is_bounded_by_the_format():
    """Half a step: e4m3 keeps 4 significant bits (2^-4 relative), int8 rows a/127.5/2, 15 and 7 levels a/14 and a/6."""
    weight = llada().module.model.layers[0].mlp.up_proj.weight
    top = weight.abs().amax(-1, keepdim=True)
    bounds = {
        "Float8WeightOnly": weight.abs() * 2**-4 + top * 2**-17,
        "Int8WeightOnly": top / 127.5 / 2 + top / 127.5 / 2 * (weight.abs() >= top * 127 / 127.5),
        "int4_emulated": top / 14,
        "int3_emulated": top / 6,
        "five_level_emulated": top / 4,
    }
    for name, bound in bounds.items():
        rollout = quantized_copy(llada(), CPU_SCHEMES[name])
        layer = rollout.module.model.layers[0].mlp.up_proj
        rounded = layer.dequantized() if hasattr(layer, "dequantized") else layer.weight.dequantize()
        assert ((rounded - weight).abs() <= bound * (1 + 1e-5)).all(), name


def test_stale_rollouts_are_refused():
    policy = masked_lm()
    tokens, mask = batch()
    rollout = Rollout(tokens, mask, mask, tokens, torch.zeros(tokens.shape), 1, 3, SamplingParams())
    policy.weights_version = 3
    check_staleness(rollout, policy)
    policy.weights_version = 5
    with pytest.raises(RuntimeError, match="weights_version=3 of the rollout is 2 updates behind the learner's 5"):
        check_staleness(rollout, policy)
    refuses("2 updates behind", lambda: check_staleness(rollout, policy, max_staleness=1), RuntimeError)
    check_staleness(rollout, policy, max_staleness=2)
    with pytest.raises(RuntimeError, match="weights_version=6"):
        check_staleness(replace(rollout, weights_version=6), policy, max_staleness=2)


def test_stored_bytes_counts_codes_and_scales():
    packed = quantized_copy(llada(), quantize.Float8WeightOnly()).module.model.layers[0].mlp.up_proj.weight
    assert stored_bytes(packed) == 64 * 32 + 64 * 4
    assert stored_bytes(torch.zeros(3, 5, dtype=torch.bfloat16)) == 30


def test_a_sharded_learner_syncs_as_a_whole_one(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    whole, policy = llada(), llada()
    rollout, expected = (quantized_copy(p, int3_emulated) for p in (policy, whole))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in [*policy.module.model.layers, policy.module]:
            fully_shard(layer, mesh=mesh)
        for module in (policy.module, whole.module):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1.25)
        assert hasattr(policy.module.lm_head.weight, "full_tensor")
        sync_weights(policy, rollout)
    finally:
        dist.destroy_process_group()
    sync_weights(whole, expected)
    assert equal(contents(rollout.module), contents(expected.module))


HALVES = """
import sys
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.quantization.schemes import FakeQuantize

make = lambda: tiny_llama(characters="ab", causal=False, hidden_size=16, num_layers=1, num_attention_heads=2)
whole, policy = make(), make()
rollout, expected = (quantized_copy(p, FakeQuantize(weight="int4", activation="e4m3")) for p in (policy, whole))
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
fully_shard(policy.module, mesh=dist.init_device_mesh("cpu", (2,)))
with torch.no_grad():
    for parameter in [*policy.module.parameters(), *whole.module.parameters()]:
        parameter.mul_(1.25)
assert policy.module.lm_head.weight.to_local().numel() < whole.module.lm_head.weight.numel()
sync_weights(policy, rollout)
sync_weights(whole, expected)
for ours, theirs in zip(rollout.module.parameters(), expected.module.parameters(), strict=True):
    assert torch.equal(ours, theirs)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_learner_in_two_halves_syncs_as_a_whole_one(tmp_path):
    command = [sys.executable, "-c", HALVES, str(tmp_path / "rendezvous")]
    ranks = [subprocess.Popen([*command, str(i)], stderr=subprocess.PIPE, text=True) for i in range(2)]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_weights_are_torchaos_own(dtype):
    from torchao.quantization import quantize_

    layer = torch.nn.Linear(384, 96, bias=False, dtype=dtype)
    ours = quantize_weight(layer.weight.detach().clone(), Float8WeightOnlyConfig())[0]
    quantize_(layer, Float8WeightOnlyConfig())
    assert torch.equal(ours.qdata.view(torch.uint8), layer.weight.qdata.view(torch.uint8))
    assert torch.equal(ours.scale, layer.weight.scale)


def test_float8_products_weights_after_a_sync_are_torchaos_own(monkeypatch):
    """A sync takes a shorter way than the first copy. torchao's check of the hardware would refuse a CPU."""
    from torchao.quantization import quant_api

    monkeypatch.setattr(quant_api, "_check_hardware_support", lambda granularity: None)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    config = quantize.Float8Dynamic().config()
    weight[3] = 0
    first, fresh = (quantize_weight(factor * weight, config)[0] for factor in (1, 1.5))
    monkeypatch.undo()
    synced, finite = quantize_weight(1.5 * weight, config, like=first)
    assert finite and torch.equal(synced.qdata.view(torch.uint8), fresh.qdata.view(torch.uint8))
    assert torch.equal(synced.scale, fresh.scale) and not torch.equal(first.scale, fresh.scale)
    kept = ("act_quant_kwargs", "mm_config", "kernel_preference", "block_size", "dtype")
    assert [getattr(synced, name) for name in kept] == [getattr(fresh, name) for name in kept]


def test_a_copy_shares_what_is_frozen_and_keeps_its_precision():
    policy = llada()
    apart = quantized_copy(policy, quantize.Float8WeightOnly())
    add_lora(policy, Lora(r=2))
    shared = quantized_copy(policy, quantize.Float8WeightOnly())
    rounded = quantized_copy(policy, quantize.Float8WeightOnly(), dtype=torch.bfloat16)
    plain = quantized_copy(policy, None)

    def places(module):
        found = {name: p for name, p in module.named_parameters() if type(p) is torch.nn.Parameter}
        return {name: p.data_ptr() for name, p in found.items()}

    kept = places(policy.module).keys() & places(shared.module).keys()
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= kept
    for copied, same in ((apart, False), (shared, True), (rounded, False), (plain, False)):
        assert all((places(copied.module)[name] == places(policy.module)[name]) is same for name in kept)
    before = {name: p.detach().clone() for name, p in policy.module.named_parameters()}
    sync_weights(policy, shared)
    assert all(torch.equal(p, before[name]) for name, p in policy.module.named_parameters())
    assert policy.module.model.embed_tokens.weight is not shared.module.model.embed_tokens.weight


@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "up_proj")])
def test_layers_of_one_shape_with_and_without_adapters_are_synced_apart(targets):
    policy = llada()
    add_lora(policy, Lora(r=4, targets=targets))
    rollout = quantized_copy(policy, quantize.Int8WeightOnly())
    before = contents(rollout.module)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    policy.weights_version += 1
    sync_weights(policy, rollout)
    assert not equal(contents(rollout.module), before)
    assert equal(contents(rollout.module), contents(quantized_copy(policy, quantize.Int8WeightOnly()).module))
