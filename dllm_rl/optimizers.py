"""Optimisers that a recipe can name. All are AdamW; they differ in what its two moments take in memory."""

from collections.abc import Iterable

from torch import Tensor, optim


def adamw(parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float) -> optim.Optimizer:
    """torch's AdamW: 8 bytes a parameter for its moments."""
    return optim.AdamW(parameters, lr=lr, betas=betas, weight_decay=weight_decay)


def adamw_8bit(
    parameters: Iterable[Tensor], lr: float, betas: tuple[float, float], weight_decay: float
) -> optim.Optimizer:
    """bitsandbytes' AdamW with moments in 8 bits, 2 bytes a parameter; small tensors (below 4096) keep fp32 ones."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
