"""One quantized linear layer: quantize, refresh in place, multiply, dequantize; and experts made of such layers."""

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
from torchao.quantization.quantize_.common import _choose_quant_func_and_quantize_tensor
from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor, QuantizeTensorToFloat8Kwargs

from dllm_rl.models.lora import STACKS, linear_of
from dllm_rl.quantization.schemes import TINY, EmulatedLinear, FakeQuantize, Float8DynamicEmulated, Scheme


def is_quantized(layer: nn.Module) -> bool:
    """Return whether a linear layer is quantized, by emulation or by torchao."""
    return isinstance(layer, EmulatedLinear) or (isinstance(layer, nn.Linear) and is_packed(layer.weight))


def is_packed(weight: Tensor) -> bool:
    """Return whether a tensor is torchao's quantized one."""
    return hasattr(weight, "qdata")


def unsupported_reason(weight: Tensor, config: Scheme) -> str | None:
    """Return why a torchao config cannot quantize a weight (..., O, I), or None: torchao would skip it or assert."""
    rows, columns = weight.shape[-2:]
    granularity = getattr(config, "granularity", None)
    group = getattr(granularity, "group_size", None) or getattr(config, "group_size", None)
    if group and columns % group:
        return f"{rows}x{columns}: {columns} is not a multiple of the group size {group}"
    step = 16 if isinstance(config, Float8DynamicActivationFloat8WeightConfig) else 1  # of torch._scaled_mm
    if isinstance(config, Int8DynamicActivationInt8WeightConfig) and weight.is_cuda:
        step = 8  # torchao would multiply on the CPU
    if rows % step or columns % step:
        return f"{rows}x{columns}: not multiples of {step}"
    return None


@torch.no_grad()
def quantized(weight: Tensor, config: Scheme) -> tuple[Tensor, Bool[Tensor, ""]]:
    """Quantize one weight by a config other than a FakeQuantize, and return it and whether it is finite.

    Zero rows get the smallest scale.
    """
    if isinstance(config, Float8DynamicEmulated):
        inputs = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow(), hp_value_lb=TINY)
        settings = {"mm_config": Float8MMConfig(use_fast_accum=False), "act_quant_kwargs": inputs}
        packed = Float8Tensor.from_hp(weight, torch.float8_e4m3fn, PerRow(), hp_value_lb=TINY, **settings)
    elif isinstance(config, Float8WeightOnlyConfig):
        # The same as quantize_ for this config in a third of the time.
        packed = Float8Tensor.from_hp(weight, config.weight_dtype, granularity=config.granularity)
    else:
        layer = linear_of(weight.detach(), None)
        quantize_(layer, config)
        packed = layer.weight.data
    scale: Any = getattr(packed, "scale", None)
    # amax propagates NaN and infinity into the scale, so checking scales checks every weight.
    finite = (weight if scale is None else scale).isfinite().all()
    if isinstance(packed, Float8Tensor):
        empty = scale == 0  # no `any()`: the host would wait for the result
        groups = packed.qdata.view(torch.uint8).unflatten(-1, (scale.shape[-1], -1))  # 0/0 made NaN of these
        groups.masked_fill_(empty.expand(packed.shape[0], -1)[..., None], 0)
        scale.masked_fill_(empty, TINY)
    return packed, finite


def quantized_linear(weight: Tensor, bias: Tensor | None, config: Scheme) -> tuple[nn.Linear, Bool[Tensor, ""]]:
    """Return a layer with a quantized weight, and whether the weight is finite."""
    if isinstance(config, FakeQuantize):
        layer = EmulatedLinear(weight, bias, config)
        return layer, layer.weight.isfinite().all()
    packed, finite = quantized(weight, config)
    return linear_of(packed, bias), finite


# codes_changed: (changed codes, all codes); scale_change: (sum of |s' - s| / |s|, scales). Sums stay on their device.
Changes = dict[str, tuple[Tensor, int]]
Finite = dict[str, Bool[Tensor, ""]]  # by the layer's name


def check_finite(finite: Finite) -> None:
    """Raise ValueError naming the first layer whose weight is not finite, with one transfer for all layers."""
    found = torch.stack(list(finite.values())).tolist() if finite else []
    for name, fine in zip(finite, found, strict=True):
        if not fine:
            raise ValueError(f"{name}.weight holds NaN or infinity: it cannot be quantised; has training diverged?")


@torch.no_grad()
def load_weight_(layer: nn.Linear, weight: Tensor) -> tuple[Changes, Bool[Tensor, ""]]:
    """Quantize `weight` into a quantized layer, in place. Return `Changes`, and whether the weight is finite.

    No storage moves.
    """
    if not isinstance(layer, EmulatedLinear):
        held: Any = layer.weight
        fresh: Any
        fresh, finite = quantized(weight.to(held.dtype), layer.quantization)
        changes = {"codes_changed": differing_codes(held.qdata, fresh.qdata, held.numel())}
        changes |= scale_change(scales_of(held), scales_of(fresh))
        held.copy_(fresh)
        return changes, finite
    if layer.config.weight is None:
        layer.load_(weight)
        return {}, layer.weight.isfinite().all()
    codes = layer.codes().clone()  # load_ writes the tensors that codes() and weight_scale are
    scale = layer.weight_scale.clone()
    layer.load_(weight)
    changes = {"codes_changed": ((layer.codes() != codes).sum(), codes.numel())}
    return changes | scale_change(scale, layer.weight_scale), layer.weight.isfinite().all()


def differing_codes(before: Tensor, after: Tensor, num_codes: int) -> tuple[Tensor, int]:
    """Return (different codes, all codes) of two packed tensors. A byte has two codes if bytes are fewer than codes."""
    a = before.view(torch.uint8)
    b = after.view(torch.uint8)
    if before.nbytes < num_codes:
        moved = a ^ b
        return ((moved & 0xF) != 0).sum() + ((moved >> 4) != 0).sum(), 2 * a.numel()
    moved = a != b
    if before.is_floating_point():
        moved &= ((a | b) & 0x7F) != 0  # 0x80 is -0: a zero that changes its sign has not changed
    return moved.sum(), a.numel()


def scales_of(packed: Tensor) -> Tensor | None:
    """Return the scales of torchao's quantized tensor, or None if its layout is unknown."""
    both = getattr(packed, "scale_and_zero", None)
    return getattr(packed, "scale", None) if both is None else both[..., 0]


def scale_change(before: Tensor | None, after: Tensor | None) -> Changes:
    """Return the sum of relative changes of scales, and their number."""
    if before is None or after is None:
        return {}
    change = (after.double() - before.double()).abs() / before.double().abs().clamp(min=TINY)
    return {"scale_change": (change.sum(), before.numel())}


def quantized_forward(layer: nn.Linear, x: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the quantized layer's product with this bias, and the arguments of `dequantized_input`."""
    if isinstance(layer, EmulatedLinear):
        return layer.quantized_forward(x, bias)
    return F.linear(x, layer.weight, bias), (x,)


def dequantized_weight(layer: nn.Linear) -> Tensor:
    """Return the weight in the learner's units."""
    return layer.dequantized() if isinstance(layer, EmulatedLinear) else unpacked(layer.weight)


def unpacked(weight: Tensor) -> Tensor:
    """Return torchao's quantized weight (O, I) in the learner's units."""
    if type(weight).dequantize is Tensor.dequantize:  # int4_packed's layout can be undone only by its product
        return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).T.contiguous()
    return weight.dequantize()


def dequantized_input(layer: nn.Linear, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Return the input as the layer rounded it."""
    if scale is not None:
        return x * scale
    kwargs = getattr(layer.weight, "act_quant_kwargs", None)
    return x if kwargs is None else _choose_quant_func_and_quantize_tensor(x, kwargs).dequantize()


def write_count(layer: nn.Linear) -> int:
    """Return autograd's count of in-place writes to the quantized data."""
    weight: Any = layer.weight
    return (weight if isinstance(layer, EmulatedLinear) else weight.qdata)._version


def stored_bytes(tensor: Any) -> int:
    """Return the bytes of a tensor, or of a quantized tensor's codes and scales."""
    if not is_packed(tensor):
        return tensor.nbytes
    return sum(getattr(tensor, name).nbytes for name in tensor.__tensor_flatten__()[0])


class Experts(nn.Module):
    """A layer's experts as separate layers: quantized tensors are two-dimensional, unlike stock stacks."""

    def __init__(self, gate_up_proj: list[nn.Linear], down_proj: list[nn.Linear], act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = nn.ModuleList(gate_up_proj)
        self.down_proj = nn.ModuleList(down_proj)
        self.act_fn = act_fn

    @torch.compiler.disable  # only the host knows an expert's number of rows, which differs per step
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Float[Tensor, "S D"]:
        return mixture(x, index, weights, list(self.gate_up_proj), list(self.down_proj), act_fn=self.act_fn)


def mixture(
    hidden_states: Float[Tensor, "S D"],
    top_k_index: Int[Tensor, "S K"],
    top_k_weights: Float[Tensor, "S K"],
    gate_up_proj: Sequence[Callable[[Tensor], Tensor]],
    down_proj: Sequence[Callable[[Tensor], Tensor]],
    *,
    act_fn: Callable[[Tensor], Tensor],
) -> Float[Tensor, "S D"]:
    """Return sum_k weight_k down_e(act(gate_e(x)) * up_e(x)), e = index_k, as in a stock mixture."""
    chosen = top_k_index.flatten()
    order = chosen.argsort(stable=True)
    counts = chosen.bincount(minlength=len(gate_up_proj)).tolist()  # the only wait for the device
    parts = []
    for expert, rows in enumerate(hidden_states[order // top_k_index.shape[1]].split(counts)):
        if len(rows):
            gate, up = gate_up_proj[expert](rows).chunk(2, dim=-1)
            parts.append(down_proj[expert](act_fn(gate) * up))
    weighted = torch.cat(parts) * top_k_weights.flatten()[order][:, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].unflatten(0, top_k_index.shape).sum(1).to(hidden_states.dtype)


def place(name: str) -> tuple[str, int | None]:
    """Return a quantized layer's parameter name in a plain module, and its expert in a stack."""
    stacked = re.fullmatch(rf"(.*\.(?:{'|'.join(STACKS)}))\.(\d+)", name)
    return (stacked[1], int(stacked[2])) if stacked else (f"{name}.weight", None)
