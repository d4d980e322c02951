"""Layers whose weights are in eight or four bits by bitsandbytes: their products and their plain weights."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dllm_rl.models.base import gather_if_sharded


def linear_of(weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None) -> nn.Linear:
    """Return a linear layer with these tensors, without copying them. The weight is frozen."""
    # The meta device, so that no random weights are drawn.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = cast(Any, bias)
    return layer


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Return whether a layer has bitsandbytes weights."""
    return isinstance(layer, nn.Linear) and type(layer.weight).__module__.startswith("bitsandbytes")


@torch.no_grad()
def plain_weight(layer: nn.Linear) -> Float[Tensor, "O I"]:
    """Return a linear layer's weight, dequantized from bitsandbytes and gathered if sharded."""
    if not is_bitsandbytes(layer):
        return gather_if_sharded(layer.weight.detach())
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit  # an optional dependency

        return dequantize_4bit(weight.data, weight.quant_state)
    # At its first forward, an 8-bit layer moves its codes and its scales (each row's largest |w|, code 127) to `state`.
    holder: Any = layer.state if weight.SCB is None else weight
    return (holder.CB * (holder.SCB.float() / 127)[:, None]).to(layer.plain_dtype)


class _EightBitProduct(torch.autograd.Function):
    """The product with a layer's dequantized weight, which is computed again for the backward, and not stored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, plain_weight(layer), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad_output,) = grad_outputs
        return (grad_output @ plain_weight(ctx.layer).to(grad_output.dtype)).to(ctx.dtype), None


def eight_bit_product(layer: nn.Linear, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
    """Return the output of a frozen layer with bitsandbytes weights of 8 bits.

    bitsandbytes itself also rounds the inputs, by how large those of the whole batch are. A row's output would depend
    on the other rows, and differ from that of a checkpoint of the merged weights.
    """
    return _EightBitProduct.apply(x, layer)
