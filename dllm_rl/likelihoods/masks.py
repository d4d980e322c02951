"""Masks for likelihood estimates, as pure functions of uniform random numbers.

A view is a pair (masked, weight): the hidden positions, and each log-prob's coefficient (0 where none is scored).
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.rng import row_seeds
from dllm_rl.types import Rollout, Views


def row_generators(rollout: Rollout, generator: Generator) -> list[Generator]:
    """Return one generator per row, so that a row's masks depend neither on other rows nor on padding."""
    rows = torch.arange(len(rollout.tokens)) if rollout.batch_row is None else rollout.batch_row.cpu()
    seeds = row_seeds(generator, int(rows.max()) + 1)[rows]  # by the row's number, on whichever process it is
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def uniforms_at(marked: Bool[Tensor, "B T"], generators: list[Generator]) -> Float[Tensor, "B T"]:
    """Draw uniforms in [0, 1) where `marked`, +inf elsewhere, from each row's generator, left to right."""
    out = torch.full(marked.shape, torch.inf)
    for row, where, generator in zip(out, marked.cpu(), generators, strict=True):
        row[where] = torch.rand(int(where.sum()), generator=generator)
    return out.to(marked.device)  # drawn on the host: the same numbers on every device


def uniforms_per_row(
    generators: list[Generator], num_samples: int, *, stratified: bool, device: torch.device | str
) -> Float[Tensor, "N B 1"]:
    """Draw num_samples uniforms in [0, 1) per row. `stratified` puts sample j into [j/N, (j+1)/N)."""
    u = torch.stack([torch.rand(num_samples, generator=g, dtype=torch.float64) for g in generators], dim=1)
    if stratified:
        u = (torch.arange(num_samples)[:, None] + u) / num_samples
    return u[..., None].to(device)


def mask_keys(
    rollout: Rollout, generators: list[Generator], informed_masking: float | None = None
) -> Float[Tensor, "B T"]:
    """Draw keys whose k smallest are the k positions that a mask hides.

    Without `informed_masking` every set of k is equally likely. With `informed_masking` d, positions are drawn without
    replacement, with q_i proportional to exp(d (max m - m_i) / (max m - min m)), m the rollout's `confidence_change`.
    Raise ValueError if it is not recorded.
    """
    completion = rollout.completion_mask
    uniforms = uniforms_at(completion, generators)
    if informed_masking is None:
        return uniforms
    change = rollout.confidence_change
    if change is None:
        raise ValueError(
            f"informed_masking={informed_masking} needs the rollout's confidence_change: sample with "
            "unmask(confidence_radius=10), or leave informed_masking at None"
        )
    most = change.masked_fill(~completion, -torch.inf).amax(-1, keepdim=True)
    least = change.masked_fill(~completion, torch.inf).amin(-1, keepdim=True)
    log_q = informed_masking * torch.where(most > least, (most - change) / (most - least), 0)
    # The first of exponential times of rates q_i is i with probability q_i / sum q, and so on for the remaining ones.
    times = uniforms.double().where(completion, 0.5).clamp(min=1e-12).neg().log1p().neg().log() - log_q
    return times.masked_fill(~completion, torch.inf)


def choose(u: Float[Tensor, "*N B 1"], count: Int[Tensor, "B 1"]) -> Int[Tensor, "*N B 1"]:
    """Return floor(u * count): uniform over 0 .. count-1 (0 where count is 0)."""
    return (u * count).long().minimum(count - 1).clamp(min=0)  # a stratified u may round to 1


def ranks(keys: Float[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return each key's rank in its row, from 0."""
    return keys.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)  # stable: ties go from left to right


def exact_view(
    inside: Bool[Tensor, "B T"], keys: Float[Tensor, "B T"], k: Int[Tensor, "B 1"]
) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Mask the k positions of `inside` with the smallest keys, each with weight L/k, L = |inside|.

    Averaged over k in 1..L and all orders, sum_i weight_i l_i is sum_k (1/k) E_{|m|=k} sum_{i in m} l_i(m).
    """
    masked = inside & (ranks(keys.masked_fill(~inside, torch.inf)) < k)  # exactly k, whatever the keys
    return masked, masked * inside.sum(-1, keepdim=True) / k.clamp(min=1)  # an empty row has k = 0


def coupled_views(
    inside: Bool[Tensor, "B T"], keys: Float[Tensor, "B T"], k: Int[Tensor, "B 1"]
) -> list[tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]]:
    """Mask exactly k of `inside` with weight (L+1)/2k, and the other L-k with weight (L+1)/2(L-k).

    Every position is masked once. Averaged over k in 0..L and all orders, the sum of both views is that of
    `exact_view`.
    """
    size = inside.sum(-1, keepdim=True)
    order = ranks(keys.masked_fill(~inside, torch.inf))
    first = inside & (order < k)
    second = inside & (order >= k)
    return [
        (first, first * (size + 1) / (2 * k.clamp(min=1))),
        (second, second * (size + 1) / (2 * (size - k).clamp(min=1))),
    ]


def block_view(
    completion: Bool[Tensor, "B T"],
    keys: Float[Tensor, "B T"],
    u_block: Float[Tensor, "B 1"],
    u_count: Float[Tensor, "B 1"],
    *,
    block_size: int,
) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Choose one of the row's N blocks uniformly, and mask exactly k of its L positions, with weight N L/k.

    Earlier blocks are clean; later blocks are masked and not scored.
    """
    block = block_index(completion, block_size)
    chosen = choose(u_block, block.amax(-1, keepdim=True) + 1)
    inside = completion & (block == chosen)
    k = 1 + choose(u_count, inside.sum(-1, keepdim=True))
    masked, weight = exact_view(inside, keys, k)
    return masked | (completion & (block > chosen)), weight * (block.amax(-1, keepdim=True) + 1)


def block_index(completion: Bool[Tensor, "B T"], block_size: int) -> Int[Tensor, "B T"]:
    """Return the block of each completion position, -1 elsewhere. Only completion positions count."""
    place = completion.long().cumsum(-1) - 1
    return torch.where(completion, place // block_size, -1)


def stacked(views: list[tuple[Tensor, Tensor]], *, samples: int) -> Views:
    """Stack views, with their weights divided by `samples`."""
    masked = torch.stack([view[0] for view in views])
    weight = torch.stack([view[1] for view in views])
    return Views(masked, (weight / samples).float())


def draw_nothing(rollout: Rollout, generator: Generator) -> Views:
    """Return one view that masks nothing and scores the completion."""
    scored = rollout.completion_mask[None]
    return Views(torch.zeros_like(scored), scored.float())


def draw_everything(rollout: Rollout, generator: Generator, *, prompt_mask: float) -> Views:
    """Mask the full completion, and each prompt token with probability `prompt_mask`."""
    prompt = rollout.attention_mask & ~rollout.completion_mask
    hidden = uniforms_at(prompt, row_generators(rollout, generator)) < prompt_mask
    return Views((hidden | rollout.completion_mask)[None], rollout.completion_mask[None].float())


def draw_exact(
    rollout: Rollout,
    generator: Generator,
    *,
    num_samples: int,
    stratified: bool,
    antithetic: bool,
    informed_masking: float | None,
) -> Views:
    """Draw `exact_view`s with k uniform over 1..L.

    Antithetic pairs have L+1-k for k, from the other end of the same order.
    """
    completion = rollout.completion_mask
    generators = row_generators(rollout, generator)
    size = completion.sum(-1, keepdim=True)
    drawn = num_samples // 2 if antithetic else num_samples
    u = uniforms_per_row(generators, drawn, stratified=stratified, device=size.device)
    keys = [mask_keys(rollout, generators, informed_masking) for _ in range(drawn)]
    if antithetic:
        k = 1 + choose(u / 2, size)  # the lower half; the pairs are the upper one
        counts = torch.cat([k, size + 1 - k])
        keys += [-key for key in keys]
    else:
        counts = 1 + choose(u, size)
    views = [exact_view(completion, key, k) for key, k in zip(keys, counts, strict=True)]
    return stacked(views, samples=num_samples)


def draw_coupled(rollout: Rollout, generator: Generator, *, num_samples: int, informed_masking: float | None) -> Views:
    """Draw `coupled_views` with k stratified over 0..L."""
    completion = rollout.completion_mask
    generators = row_generators(rollout, generator)
    size = completion.sum(-1, keepdim=True)
    u = uniforms_per_row(generators, num_samples, stratified=True, device=size.device)
    views = []
    for k in choose(u, size + 1):
        views += coupled_views(completion, mask_keys(rollout, generators, informed_masking), k)
    return stacked(views, samples=num_samples)


def draw_quadrature(rollout: Rollout, generator: Generator, *, nodes: int) -> Views:
    """Draw an `exact_view` at each Gauss-Legendre node t of [0, 1], with k = floor(t L) + 1 and the node's weight."""
    completion = rollout.completion_mask
    generators = row_generators(rollout, generator)
    size = completion.sum(-1, keepdim=True)
    views = []
    for point, w in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        t = torch.full(size.shape, (point + 1) / 2, dtype=torch.float64, device=size.device)
        masked, weight = exact_view(completion, uniforms_at(completion, generators), 1 + choose(t, size))
        views.append((masked, w / 2 * weight))  # leggauss is for [-1, 1], whose weights add up to 2
    return stacked(views, samples=1)


def draw_block(rollout: Rollout, generator: Generator, *, block_size: int, num_samples: int) -> Views:
    """Draw `block_view`s, with the block stratified over the samples and k uniform in it."""
    completion = rollout.completion_mask
    generators = row_generators(rollout, generator)
    u_block = uniforms_per_row(generators, num_samples, stratified=True, device=completion.device)
    # Not stratified too: early blocks would then always have few hidden positions, and late ones many.
    u_count = uniforms_per_row(generators, num_samples, stratified=False, device=completion.device)
    views = []
    for block, count in zip(u_block, u_count, strict=True):
        keys = uniforms_at(completion, generators)
        views.append(block_view(completion, keys, block, count, block_size=block_size))
    return stacked(views, samples=num_samples)
