"""Which masked positions come next (rank), and how many of them at once (commit). Users can pass their own.

A rank gives each masked position a score, the highest commits first, from log_probs (K, V), the untempered fp32
log-probabilities at K masked positions; tokens (K,), the ones sampled there; uniforms (K,), fresh random numbers.
A commit rule picks positions from scores (B, L), -inf where nothing is masked, and a quota of positions per row.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def confidence(
    log_probs: Float[Tensor, "K V"], tokens: Int[Tensor, " K"], uniforms: Float[Tensor, " K"]
) -> Float[Tensor, " K"]:
    """LLaDA's low_confidence remasking: log-probability of the SAMPLED token, nats.

    The commit then depends on the draw, so at-commit log-probs are not the exact behaviour probabilities. [paper]
    """
    return log_probs.gather(-1, tokens[:, None])[:, 0]


def max_prob(
    log_probs: Float[Tensor, "K V"], tokens: Int[Tensor, " K"], uniforms: Float[Tensor, " K"]
) -> Float[Tensor, " K"]:
    """Log-probability of the likeliest token, nats. A function of the state alone, so that the trajectory likelihood
    is exact given the order."""
    return log_probs.amax(-1)


def schedule(scores: Float[Tensor, "B L"], masked: Bool[Tensor, "B L"], quota: int) -> Bool[Tensor, "B L"]:
    """The `quota` best positions of every row; ties go to the lowest index. [paper: LLaDA]"""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(masked).scatter(-1, order[:, :quota], True)
    return chosen & masked


def block_bounds(length: int, block_size: int) -> list[tuple[int, int]]:
    """[start, end) of each block; the last is shorter when block_size does not divide length."""
    return [(start, min(start + block_size, length)) for start in range(0, length, block_size)]


def quotas(num_positions: int, num_steps: int) -> list[int]:
    """LLaDA's equal shares of num_positions over at most num_steps steps, the remainder on the first ones.

    A step that would commit nothing is left out: it changes no token.
    """
    share, remainder = divmod(num_positions, num_steps)
    return [n for n in (share + (i < remainder) for i in range(num_steps)) if n]


def steps_per_block(num_steps: int, num_blocks: int) -> list[int]:
    """Equal shares of steps, the remainder on the first blocks. Raises ValueError with fewer steps than blocks."""
    if num_steps < num_blocks:
        raise ValueError(f"num_steps={num_steps} is fewer than the {num_blocks} blocks, each of which needs one; use at least {num_blocks}")
    share, remainder = divmod(num_steps, num_blocks)
    return [share + (i < remainder) for i in range(num_blocks)]
