"""Logits in fp32 from a model in 16 bits, without an fp32 copy of the head.

Neighboring bf16 numbers between 8 and 16 differ by 0.0625. With bf16 logits, the small numerical difference between
sampler and learner would be rounded to multiples of this step.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HALF = (torch.bfloat16, torch.float16)
SLAB = 2**22  # number of weights in fp32 at a time on a CPU: 16 MiB; four times as many on a GPU, to keep it busy


class _Float32Linear(torch.autograd.Function):
    """x W^T + b in fp32. Gradients are computed in fp32, and rounded once to the dtype of their tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        if x.is_cuda and x.dtype == weight.dtype and x.dtype in HALF:
            # Tensor cores multiply 16-bit numbers exactly, and add the products in fp32.
            with torch.autocast(x.device.type, enabled=False):
                out = torch.mm(x.flatten(0, -2), weight.T, out_dtype=torch.float32)
            return (out if bias is None else out + bias.float()).unflatten(0, x.shape[:-1])
        out = x.new_empty(*x.shape[:-1], len(weight), dtype=torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # autocast would round the fp32 product's operands again
            x_fp32 = x.float()
            for slab in slabs(weight):  # in slabs, so that no fp32 copy of the full head is made
                slab_bias = None if bias is None else bias[slab].float()
                out[..., slab] = F.linear(x_fp32, weight[slab].float(), slab_bias)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (dy,) = gradients
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        dx = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if needs_dx else None
        dw = torch.empty_like(weight) if needs_dw else None
        with torch.autocast(x.device.type, enabled=False):
            x_rows = x.flatten(0, -2).float() if needs_dw else None
            for slab in slabs(weight):
                if dx is not None:
                    dx += dy[..., slab] @ weight[slab].float()
                if dw is not None and x_rows is not None:
                    dw[slab] = (dy[..., slab].flatten(0, -2).T @ x_rows).to(dw.dtype)
        db = dy.flatten(0, -2).sum(0).to(ctx.bias_dtype) if needs_db else None
        return None if dx is None else dx.to(x.dtype), dw, db


def slabs(weight: Float[Tensor, "V D"]) -> Iterator[slice]:
    """Return slices of rows with at most SLAB elements, or 4 * SLAB on an accelerator, but with at least one row."""
    size = max(1, (SLAB if weight.device.type == "cpu" else 4 * SLAB) // weight.shape[1])
    return (slice(start, start + size) for start in range(0, len(weight), size))


def float32_linear(
    x: Float[Tensor, "... D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"] | None = None
) -> Float[Tensor, "... V"]:
    """Return a linear layer's output in fp32, for all dtypes and under autocast. It is differentiable once."""
    return _Float32Linear.apply(x, weight, bias)


class projected_in_float32(TorchFunctionMode):
    """In this context, compute the layer's product in fp32. The layer's hooks still run; torch.compile traces it."""

    def __init__(self, output: nn.Linear) -> None:
        super().__init__()
        self.output = output

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1] is self.output.weight:  # which sharding replaces for the call
            return float32_linear(*args)
        return func(*args, **(kwargs or {}))
