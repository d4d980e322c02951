"""Masks for likelihood estimates, as pure functions of uniform random numbers.

Every row has a generator of its own, seeded from the caller's: its masks depend on its seed and on its own completion,
not on its neighbours or on padding. A view is a pair (masked, weight): the positions hidden from the model, and the
coefficient of each scored log-prob (0 where none is scored).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.types import Rollout, row_seeds


def row_generators(rollout: Rollout, generator: Generator) -> list[Generator]:
    """One generator per row, seeded with the row's draw from `generator`."""
    return [torch.Generator().manual_seed(int(seed)) for seed in row_seeds(generator, len(rollout.tokens))]


def uniforms_at(marked: Bool[Tensor, "B T"], generators: list[Generator]) -> Float[Tensor, "B T"]:
    """Uniforms in [0, 1) where `marked`, +inf elsewhere; row i's come from its own generator, left to right."""
    out = torch.full(marked.shape, torch.inf)
    for row, where, generator in zip(out, marked.cpu(), generators, strict=True):
        row[where] = torch.rand(int(where.sum()), generator=generator)
    return out.to(marked.device)


def uniforms_per_row(
    generators: list[Generator], num_samples: int, *, stratified: bool, device
) -> Float[Tensor, "N B 1"]:
    """num_samples uniforms in [0, 1) for each row; stratified puts sample j into [j/N, (j+1)/N), so that how many fall
    where adds no variance to a mean over samples."""
    u = torch.stack([torch.rand(num_samples, generator=g, dtype=torch.float64) for g in generators], dim=1)
    if stratified:
        u = (torch.arange(num_samples)[:, None] + u) / num_samples
    return u[..., None].to(device)


def choose(u: Float[Tensor, "*N B 1"], count: Int[Tensor, "B 1"]) -> Int[Tensor, "*N B 1"]:
    """floor(u * count): uniform over 0 .. count-1 (0 where count is 0)."""
    return (u * count).long().minimum(count - 1).clamp(min=0)


def ranks(keys: Float[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Each position's place when the row is sorted by `keys`, from 0; ties go from left to right."""
    return keys.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)


def exact_view(
    inside: Bool[Tensor, "B T"], keys: Float[Tensor, "B T"], k: Int[Tensor, "B 1"]
) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Mask the k positions of `inside` with the smallest keys, each weighted by L/k, L = |inside|.

    Averaged over k in 1..L and all orders, sum_i weight_i l_i is sum_k (1/k) E_{|m|=k} sum_{i in m} l_i(m).
    """
    masked = inside & (ranks(keys.masked_fill(~inside, torch.inf)) < k)
    return masked, masked * inside.sum(-1, keepdim=True) / k.clamp(min=1)


def coupled_views(
    inside: Bool[Tensor, "B T"], keys: Float[Tensor, "B T"], k: Int[Tensor, "B 1"]
) -> list[tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]]:
    """Exactly k of `inside`, weighted (L+1)/2k, and the other L-k, weighted (L+1)/2(L-k): every position once.

    Averaged over k in 0..L and all orders, the two together are the sum that `exact_view` gives.
    """
    size, order = inside.sum(-1, keepdim=True), ranks(keys.masked_fill(~inside, torch.inf))
    halves = ((inside & (order < k), k), (inside & (order >= k), size - k))
    return [(masked, masked * (size + 1) / (2 * count.clamp(min=1))) for masked, count in halves]


def block_view(
    completion: Bool[Tensor, "B T"],
    keys: Float[Tensor, "B T"],
    u_block: Float[Tensor, "B 1"],
    u_count: Float[Tensor, "B 1"],
    *,
    block_size: int,
) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
    """One of the row's N blocks, uniformly: those before it clean, exactly k of its L positions masked, those after it
    masked and not scored; weight N L/k. Blocks are counted from the row's first completion position."""
    block = block_index(completion, block_size)
    chosen = choose(u_block, block.amax(-1, keepdim=True) + 1)
    inside = completion & (block == chosen)
    k = 1 + choose(u_count, inside.sum(-1, keepdim=True))
    masked, weight = exact_view(inside, keys, k)
    return masked | (completion & (block > chosen)), weight * (block.amax(-1, keepdim=True) + 1)


def block_index(completion: Bool[Tensor, "B T"], block_size: int) -> Int[Tensor, "B T"]:
    """The block of each completion position, -1 elsewhere; blocks start at the row's first completion position."""
    offset = torch.arange(completion.shape[-1], device=completion.device) - completion.long().argmax(-1, keepdim=True)
    return torch.where(completion, offset // block_size, -1)
