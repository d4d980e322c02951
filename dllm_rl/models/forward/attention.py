"""Attention of short rows in 16 bits on a CPU: the backward of torch's fused kernel takes several times as long as that
of plain products and softmax (benchmarks/README.md)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SHORT = 128  # keys, up to which plain products are clearly faster, forward and backward


class PlainAttention(TorchFunctionMode):
    """In the block, attention on a CPU over few keys, in 16 bits or under autocast, is products and softmax."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and is_short(args[1]):
            func = plain_attention
        return func(*args, **(kwargs or {}))


def is_short(key: Tensor) -> bool:
    # Shapes and dtypes alone decide, not gradients, so that a sampler and a learner round alike.
    narrow = key.dtype.itemsize == 2 or torch.is_autocast_enabled("cpu")
    return key.device.type == "cpu" and narrow and key.shape[-2] <= SHORT


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` by its definition. Raises ValueError on dropout: it draws from the global RNG."""
    if dropout_p:
        raise ValueError(f"dropout_p={dropout_p}: attention with dropout does not repeat; set it to 0 in the config")
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(times, -3)
        value = value.repeat_interleave(times, -3)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1).to(value.dtype) @ value
