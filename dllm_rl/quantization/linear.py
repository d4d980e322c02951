"""Quantized linear layers: quantize a weight, update it in place, multiply, dequantize.

Also mixture-of-experts modules, split into one linear layer per expert.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchao.float8.inference import Float8MMConfig
from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    PerRow,
    quantize_,
)
from torchao.quantization.quantize_.common import KernelPreference, _choose_quant_func_and_quantize_tensor
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor, QuantizeTensorToFloat8Kwargs

from dllm_rl.models.lora import STACKS, linear_of
from dllm_rl.quantization.schemes import TINY, EmulatedLinear, FakeQuantize, Float8DynamicEmulated


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a layer is a quantized linear layer, emulated or of torchao."""
    return isinstance(layer, EmulatedLinear) or (isinstance(layer, nn.Linear) and is_torchao_tensor(layer.weight))


def is_torchao_tensor(weight: Tensor) -> bool:
    """Return whether a tensor is a quantized tensor of torchao."""
    return hasattr(weight, "qdata")


def unsupported_reason(weight: Tensor, config: Any) -> str | None:
    """Return why a torchao config cannot quantize a weight (..., O, I), or None if it can.

    For such a weight, torchao itself would do nothing, or raise an AssertionError.
    """
    rows, columns = weight.shape[-2:]
    granularity = getattr(config, "granularity", None)
    group_size = getattr(granularity, "group_size", None) or getattr(config, "group_size", None)
    if group_size and columns % group_size:
        return f"{rows}x{columns}: {columns} is not a multiple of the group size {group_size}"
    # torch._scaled_mm needs multiples of 16.
    multiple = 16 if isinstance(config, Float8DynamicActivationFloat8WeightConfig) else 1
    if isinstance(config, Int8DynamicActivationInt8WeightConfig) and weight.is_cuda:
        multiple = 8  # for other sizes torchao would multiply on the CPU
    if rows % multiple or columns % multiple:
        return f"{rows}x{columns}: not multiples of {multiple}"
    return None


@torch.no_grad()
def quantize_weight(weight: Tensor, config: Any, like: Tensor | None = None) -> tuple[Tensor, Bool[Tensor, ""]]:
    """Quantize one weight with a torchao config or `Float8DynamicEmulated`. Rows of zeros get the scale TINY.

    The result is that of torchao's `quantize_`, which takes several times as long for FP8.

    Args:
        weight: Weight.
        config: torchao config or `Float8DynamicEmulated`.
        like: An earlier result for this config, which saves time with FP8 products.

    Returns:
        The quantized weight; whether the weight is finite.
    """
    # With KernelPreference.AUTO, torchao searches the disk for the package mslk at every call.
    if isinstance(config, Float8DynamicEmulated):
        inputs = QuantizeTensorToFloat8Kwargs(
            torch.float8_e4m3fn, PerRow(), hp_value_lb=TINY, kernel_preference=KernelPreference.TORCH
        )
        packed = Float8Tensor.from_hp(
            weight,
            hp_value_lb=TINY,
            mm_config=Float8MMConfig(use_fast_accum=False),
            kernel_preference=KernelPreference.TORCH,
            act_quant_kwargs=inputs,
        )
    elif isinstance(config, Float8WeightOnlyConfig):
        packed = Float8Tensor.from_hp(
            weight, config.weight_dtype, config.granularity, kernel_preference=KernelPreference.TORCH
        )
    elif isinstance(config, Float8DynamicActivationFloat8WeightConfig) and isinstance(like, Float8Tensor):
        packed = Float8Tensor.from_hp(
            weight,
            config.weight_dtype,
            config.granularity[1],
            mm_config=like.mm_config,
            kernel_preference=like.kernel_preference,
            act_quant_kwargs=like.act_quant_kwargs,
        )
    else:
        layer = linear_of(weight.detach(), None)
        quantize_(layer, config)
        packed = layer.weight.data
    scale: Any = getattr(packed, "scale", None)
    # amax propagates NaN and infinity into the scale, so that a check of the scales checks every number.
    finite = (weight if scale is None else scale).isfinite().all()
    if isinstance(packed, Float8Tensor):
        is_zero = scale == 0  # without `any()`, which would make the CPU wait for the GPU
        code_groups = packed.qdata.view(torch.uint8).unflatten(-1, (scale.shape[-1], -1))
        code_groups.masked_fill_(is_zero.expand(packed.shape[0], -1)[..., None], 0)  # 0/0 made these codes NaN
        scale.masked_fill_(is_zero, TINY)
    return packed, finite


def quantized_linear(weight: Tensor, bias: Tensor | None, config: Any) -> tuple[nn.Linear, Bool[Tensor, ""]]:
    """Return a linear layer with the quantized weight, and whether the weight is finite."""
    if isinstance(config, FakeQuantize):
        layer = EmulatedLinear(weight, bias, config)
        return layer, layer.weight.isfinite().all()
    packed, finite = quantize_weight(weight, config)
    return linear_of(packed, bias), finite


# (sum, count) by metric. codes_changed: (number of changed codes, number of codes). scale_change: (sum of
# |s' - s| / |s|, number of scales). The sums stay on their device.
SyncStats = dict[str, tuple[Tensor, int]]
FiniteFlags = dict[str, Bool[Tensor, ""]]  # whether the weight of a layer is finite, by the layer's name


def check_finite(finite: FiniteFlags) -> None:
    """Raise ValueError with the name of the first layer whose weight is not finite.

    All flags are moved to the CPU together.
    """
    flags = torch.stack(list(finite.values())).tolist() if finite else []
    for name, is_finite in zip(finite, flags, strict=True):
        if not is_finite:
            raise ValueError(f"{name}.weight has NaN or infinity: it cannot be quantized; has training diverged?")


@torch.no_grad()
def load_weight_(layer: nn.Linear, weight: Tensor) -> tuple[SyncStats, Bool[Tensor, ""]]:
    """Quantize `weight` into a quantized layer, in place. Return `SyncStats`, and whether the weight is finite.

    The layer's tensors keep their storage.
    """
    if not isinstance(layer, EmulatedLinear):
        current: Any = layer.weight
        new: Any
        new, finite = quantize_weight(weight.to(current.dtype), layer.quantization, like=current)
        stats = {"codes_changed": differing_codes(current.qdata, new.qdata, current.numel())}
        stats |= scale_change(scales_of(current), scales_of(new))
        current.copy_(new)
        return stats, finite
    if layer.config.weight is None:
        layer.load_(weight)
        return {}, layer.weight.isfinite().all()
    codes = layer.codes().clone()  # copies, because load_ overwrites both tensors
    scale = layer.weight_scale.clone()
    layer.load_(weight)
    stats = {"codes_changed": ((layer.codes() != codes).count_nonzero(), codes.numel())}
    return stats | scale_change(scale, layer.weight_scale), layer.weight.isfinite().all()


def differing_codes(before: Tensor, after: Tensor, num_codes: int) -> tuple[Tensor, int]:
    """Return the number of codes that differ between two packed tensors, and the number of all codes.

    If there are fewer bytes than `num_codes`, a byte contains two codes of 4 bits.
    """
    a = before.view(torch.uint8)
    b = after.view(torch.uint8)
    if before.nbytes < num_codes:
        differing_bits = a ^ b
        return (differing_bits & 0xF).count_nonzero() + (differing_bits >> 4).count_nonzero(), 2 * a.numel()
    is_different = a != b
    if before.is_floating_point():
        is_different &= ((a | b) & 0x7F) != 0  # 0x80 is -0: a change between 0 and -0 does not count
    return is_different.count_nonzero(), a.numel()  # on a CPU, sum() of bools takes twenty times as long


def scales_of(packed: Tensor) -> Tensor | None:
    """Return the scales of torchao's quantized tensor, or None if its layout is unknown."""
    scale_and_zero = getattr(packed, "scale_and_zero", None)
    return getattr(packed, "scale", None) if scale_and_zero is None else scale_and_zero[..., 0]


def scale_change(before: Tensor | None, after: Tensor | None) -> SyncStats:
    """Return the metric scale_change: the sum of the relative changes of scales, and the number of scales."""
    if before is None or after is None:
        return {}
    change = (after.double() - before.double()).abs() / before.double().abs().clamp(min=TINY)
    return {"scale_change": (change.sum(), before.numel())}


def quantized_forward(layer: nn.Linear, x: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the quantized layer's output with this bias, and the arguments for `dequantized_input`."""
    if isinstance(layer, EmulatedLinear):
        return layer.quantized_forward(x, bias)
    return F.linear(x, layer.weight, bias), (x,)


def dequantized_weight(layer: nn.Linear) -> Tensor:
    """Return the layer's weight as floating-point numbers that approximate the learner's weight."""
    return layer.dequantized() if isinstance(layer, EmulatedLinear) else dequantize_packed(layer.weight)


def dequantize_packed(weight: Tensor) -> Tensor:
    """Return a quantized weight (O, I) of torchao as floating-point numbers."""
    if type(weight).dequantize is Tensor.dequantize:  # int4_packed, whose layout only its kernel can read
        return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).T.contiguous()
    return weight.dequantize()


def dequantized_input(layer: nn.Linear, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the input as the layer rounded it. `x` and `scale` are the second result of `quantized_forward`."""
    if scale is not None:
        return x * scale
    kwargs = getattr(layer.weight, "act_quant_kwargs", None)
    return x if kwargs is None else _choose_quant_func_and_quantize_tensor(x, kwargs).dequantize()


def write_count(layer: nn.Linear) -> int:
    """Return autograd's count of in-place writes to the quantized data."""
    weight: Any = layer.weight
    return (weight if isinstance(layer, EmulatedLinear) else weight.qdata)._version


def stored_bytes(tensor: Any) -> int:
    """Return the size in bytes of a tensor, or of a quantized tensor's codes and scales."""
    if not is_torchao_tensor(tensor):
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])


class UnstackedExperts(nn.Module):
    """Replacement for transformers' mixture-of-experts module, with one linear layer per expert.

    transformers stacks the weights of all experts, but quantized tensors must be two-dimensional.
    """

    def __init__(self, gate_up_proj: list[nn.Linear], down_proj: list[nn.Linear], act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = nn.ModuleList(gate_up_proj)
        self.down_proj = nn.ModuleList(down_proj)
        self.act_fn = act_fn

    @torch.compiler.disable  # the number of rows of an expert differs in every step, and must be known on the CPU
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Float[Tensor, "S D"]:
        return moe_forward(x, index, weights, list(self.gate_up_proj), list(self.down_proj), act_fn=self.act_fn)


def moe_forward(
    hidden_states: Float[Tensor, "S D"],
    top_k_index: Int[Tensor, "S K"],
    top_k_weights: Float[Tensor, "S K"],
    gate_up_proj: Sequence[Callable[[Tensor], Tensor]],
    down_proj: Sequence[Callable[[Tensor], Tensor]],
    *,
    act_fn: Callable[[Tensor], Tensor],
) -> Float[Tensor, "S D"]:
    """Return sum_k weight_k down_e(act(gate_e(x)) * up_e(x)) with e = index_k.

    It computes the same as transformers' mixture-of-experts module.
    """
    expert_ids = top_k_index.flatten()
    order = expert_ids.argsort(stable=True)  # sorted by expert
    counts = expert_ids.bincount(minlength=len(gate_up_proj)).tolist()  # the CPU waits for the GPU only here
    outputs = []
    for expert, rows in enumerate(hidden_states[order // top_k_index.shape[1]].split(counts)):
        if len(rows):
            gate, up = gate_up_proj[expert](rows).chunk(2, dim=-1)
            outputs.append(down_proj[expert](act_fn(gate) * up))
    weighted = torch.cat(outputs) * top_k_weights.flatten()[order][:, None]
    inverse_order = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[inverse_order].unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)


def locate_parameter(name: str) -> tuple[str, int | None]:
    """Return the parameter of an unquantized module from which a quantized layer was made.

    Args:
        name: Name of the quantized layer.

    Returns:
        Name of the parameter; index of the expert in this parameter, or None if the layer is not an expert.
    """
    match = re.fullmatch(rf"(.*\.(?:{'|'.join(STACKS)}))\.(\d+)", name)
    return (match[1], int(match[2])) if match else (f"{name}.weight", None)
