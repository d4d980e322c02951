"""Masks for likelihood estimates, as pure functions of uniform random numbers.

A view is a pair (masked, weight): the hidden positions, and each log-prob's coefficient (0 where none is scored).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.models.base import position_ids
from dllm_rl.rng import row_seeds
from dllm_rl.types import Noise, Rollout


def row_generators(rollout: Rollout, generator: Generator) -> list[Generator]:
    """One generator per row, so that a row's masks depend neither on its neighbours nor on padding."""
    rows = torch.arange(len(rollout.tokens)) if rollout.batch_row is None else rollout.batch_row.cpu()
    seeds = row_seeds(generator, int(rows.max()) + 1)[rows]  # of the row's number, whichever process holds it
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def uniforms_at(marked: Bool[Tensor, "B T"], generators: list[Generator]) -> Float[Tensor, "B T"]:
    """Uniforms in [0, 1) where `marked`, +inf elsewhere; row i's come from its own generator, left to right."""
    out = torch.full(marked.shape, torch.inf)
    for row, where, generator in zip(out, marked.cpu(), generators, strict=True):
        row[where] = torch.rand(int(where.sum()), generator=generator)
    return out.to(marked.device)  # drawn on the host: the same numbers on every device


def uniforms_per_row(
    generators: list[Generator], num_samples: int, *, stratified: bool, device: torch.device | str
) -> Float[Tensor, "N B 1"]:
    """num_samples uniforms in [0, 1) per row; stratified puts sample j into [j/N, (j+1)/N)."""
    u = torch.stack([torch.rand(num_samples, generator=g, dtype=torch.float64) for g in generators], dim=1)
    if stratified:
        u = (torch.arange(num_samples)[:, None] + u) / num_samples
    return u[..., None].to(device)


def choose(u: Float[Tensor, "*N B 1"], count: Int[Tensor, "B 1"]) -> Int[Tensor, "*N B 1"]:
    """floor(u * count): uniform over 0 .. count-1 (0 where count is 0)."""
    return (u * count).long().minimum(count - 1).clamp(min=0)  # a stratified u may round to 1


def ranks(keys: Float[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    return keys.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)  # stable: ties go from left to right


def exact_view(
    inside: Bool[Tensor, "B T"], keys: Float[Tensor, "B T"], k: Int[Tensor, "B 1"]
) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Mask the k positions of `inside` with the smallest keys, each weighted by L/k, L = |inside|.

    Averaged over k in 1..L and all orders, sum_i weight_i l_i is sum_k (1/k) E_{|m|=k} sum_{i in m} l_i(m).
    """
    masked = inside & (ranks(keys.masked_fill(~inside, torch.inf)) < k)  # exactly k, whatever the keys
    return masked, masked * inside.sum(-1, keepdim=True) / k.clamp(min=1)  # an empty row has k = 0


def coupled_views(
    inside: Bool[Tensor, "B T"], keys: Float[Tensor, "B T"], k: Int[Tensor, "B 1"]
) -> list[tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]]:
    """Exactly k of `inside`, weighted (L+1)/2k, and the other L-k, weighted (L+1)/2(L-k): every position once.

    Averaged over k in 0..L and all orders, the two together are the sum that `exact_view` gives.
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
    """One of the row's N blocks, uniformly: earlier blocks clean, exactly k of its L positions masked, later blocks
    masked and not scored; weight N L/k."""
    block = block_index(completion, block_size)
    chosen = choose(u_block, block.amax(-1, keepdim=True) + 1)
    inside = completion & (block == chosen)
    k = 1 + choose(u_count, inside.sum(-1, keepdim=True))
    masked, weight = exact_view(inside, keys, k)
    return masked | (completion & (block > chosen)), weight * (block.amax(-1, keepdim=True) + 1)


def block_index(completion: Bool[Tensor, "B T"], block_size: int) -> Int[Tensor, "B T"]:
    """The block of each completion position, -1 elsewhere; only completion positions count."""
    place = completion.long().cumsum(-1) - 1
    return torch.where(completion, place // block_size, -1)


def stacked(views: list[tuple[Tensor, Tensor]], *, samples: int) -> Noise:
    masked = torch.stack([view[0] for view in views])
    weight = torch.stack([view[1] for view in views])
    return Noise(masked, (weight / samples).float())


def draw_nothing(rollout: Rollout, generator: Generator) -> Noise:
    scored = rollout.completion_mask[None]
    return Noise(torch.zeros_like(scored), scored.float())


def draw_everything(rollout: Rollout, generator: Generator, *, prompt_mask: float) -> Noise:
    """All of the completion, and each prompt token with probability `prompt_mask`."""
    prompt = rollout.attention_mask & ~rollout.completion_mask
    hidden = uniforms_at(prompt, row_generators(rollout, generator)) < prompt_mask
    return Noise((hidden | rollout.completion_mask)[None], rollout.completion_mask[None].float())


def draw_exact(
    rollout: Rollout, generator: Generator, *, num_samples: int, stratified: bool, antithetic: bool
) -> Noise:
    """`exact_view`s with k uniform over 1..L. Antithetic pairs: L+1-k for k, from the other end of the same order."""
    completion = rollout.completion_mask
    generators = row_generators(rollout, generator)
    size = completion.sum(-1, keepdim=True)
    drawn = num_samples // 2 if antithetic else num_samples
    u = uniforms_per_row(generators, drawn, stratified=stratified, device=size.device)
    keys = [uniforms_at(completion, generators) for _ in range(drawn)]
    if antithetic:
        k = 1 + choose(u / 2, size)  # the lower half; the pairs are the upper one
        counts = torch.cat([k, size + 1 - k])
        keys += [-key for key in keys]
    else:
        counts = 1 + choose(u, size)
    views = [exact_view(completion, key, k) for key, k in zip(keys, counts, strict=True)]
    return stacked(views, samples=num_samples)


def draw_coupled(rollout: Rollout, generator: Generator, *, num_samples: int) -> Noise:
    completion = rollout.completion_mask
    generators = row_generators(rollout, generator)
    size = completion.sum(-1, keepdim=True)
    u = uniforms_per_row(generators, num_samples, stratified=True, device=size.device)
    views = []
    for k in choose(u, size + 1):
        views += coupled_views(completion, uniforms_at(completion, generators), k)
    return stacked(views, samples=num_samples)


def draw_quadrature(rollout: Rollout, generator: Generator, *, nodes: int) -> Noise:
    """An `exact_view` at each Gauss-Legendre node t of [0, 1], with k = floor(t L) + 1 and the node's weight."""
    completion = rollout.completion_mask
    generators = row_generators(rollout, generator)
    size = completion.sum(-1, keepdim=True)
    views = []
    for point, w in zip(*np.polynomial.legendre.leggauss(nodes), strict=True):
        t = torch.full(size.shape, (point + 1) / 2, dtype=torch.float64, device=size.device)
        masked, weight = exact_view(completion, uniforms_at(completion, generators), 1 + choose(t, size))
        views.append((masked, w / 2 * weight))  # leggauss is for [-1, 1], whose weights add up to 2
    return stacked(views, samples=1)


def draw_block(rollout: Rollout, generator: Generator, *, block_size: int, num_samples: int) -> Noise:
    """`block_view`s, the block stratified over the samples, k uniform inside it."""
    completion = rollout.completion_mask
    generators = row_generators(rollout, generator)
    u_block = uniforms_per_row(generators, num_samples, stratified=True, device=completion.device)
    # Not stratified as well: early blocks would then always have few positions hidden, and late ones many.
    u_count = uniforms_per_row(generators, num_samples, stratified=False, device=completion.device)
    views = []
    for block, count in zip(u_block, u_count, strict=True):
        keys = uniforms_at(completion, generators)
        views.append(block_view(completion, keys, block, count, block_size=block_size))
    return stacked(views, samples=num_samples)


def draw_trajectory(rollout: Rollout, generator: Generator, *, num_segments: int | None) -> Noise:
    """The rollout's own masks: view s hides what was committed in segment s or later, and scores segment s."""
    return _views(rollout, _merged(rollout, num_segments))


def draw_some_segments(rollout: Rollout, generator: Generator, *, num_segments: int | None, num_sampled: int) -> Noise:
    """num_sampled of a row's S views in `draw_trajectory`, without replacement, weighted by S / drawn."""
    segment = _merged(rollout, num_segments)
    counts = segment.amax(-1).cpu() + 1
    views = []
    for row, count in zip(row_generators(rollout, generator), counts.tolist(), strict=True):
        drawn = torch.rand(max(count, 0), generator=row).argsort()[:num_sampled].sort().values
        views.append(torch.nn.functional.pad(drawn, (0, num_sampled - len(drawn)), value=-2))  # -2: no segment's number
    index = torch.stack(views, dim=1)[..., None].to(segment.device)
    every = _views(rollout, segment, index)
    inverse_share = (counts / counts.clamp(1, num_sampled))[:, None].to(segment.device)  # so that the sum is unbiased
    return dataclasses.replace(every, weight=every.weight * inverse_share)


def _merged(rollout: Rollout, num_segments: int | None) -> Int[Tensor, "B T"]:
    """The segment of each position: its step, or its step's part of num_segments; -1 off the completion."""
    step = _last_step(rollout)
    if num_segments is None:
        return step
    _check_not_revised(rollout, num_segments)
    steps = step.amax(-1, keepdim=True) + 1  # a row's own: rows may end early
    return torch.where(step < 0, -1, step * num_segments // steps.clamp(min=1))


def draw_rounds(rollout: Rollout, generator: Generator, *, num_segments: int | None, block_size: int) -> Noise:
    """`draw_trajectory` in every block at once: view r hides what was committed r or more steps after the block's first
    step, and scores step r. Blocks count from the row's first token."""
    completion = rollout.completion_mask
    step = _last_step(rollout)
    begun = step if rollout.event_step is None else rollout.event_step[..., 0].to(step)
    block = position_ids(rollout.attention_mask) // block_size
    far = torch.iinfo(step.dtype).max  # positions off the completion are no block's first step
    blank = step.new_full((len(step), int(block.max()) + 1), far)
    first = blank.scatter_reduce(1, block, torch.where(completion, begun, far), "amin").gather(1, block)
    segment = step - first
    if num_segments is not None:
        _check_not_revised(rollout, num_segments)
        last = (-blank).scatter_reduce(1, block, torch.where(completion, step, -far), "amax").gather(1, block)
        segment = segment * num_segments // (last - first + 1).clamp(min=1)
    return _views(rollout, torch.where(completion, segment, -1), first=torch.where(completion, first, 0))


def _last_step(rollout: Rollout) -> Int[Tensor, "B T"]:
    """The last step in which something happened to each position; -1 off the completion."""
    step = rollout.unmask_step
    return step if rollout.event_step is None else rollout.event_step.amax(-1).to(step)


def _check_not_revised(rollout: Rollout, num_segments: int) -> None:
    if rollout.revised:
        raise ValueError(
            f"num_segments={num_segments} merges steps, and this rollout's commit rule may write a position in several "
            "of them (remask, soft_edit): leave num_segments at None; num_sampled scores some of the steps"
        )


def with_order(
    rollout: Rollout, generator: Generator, *, draw: Callable[[Rollout, Generator], Noise], packed: bool = False
) -> Noise:
    """The views of `draw`, one per step, which also score the positions that the step left, if the order has a law.

    Raises ValueError where the distribution was filtered and its kept set is not recorded.
    """
    noise = draw(rollout, generator)
    params = rollout.sampling_params
    if rollout.order_logprobs is None:  # the order is a function of the state, or has no known law
        return noise
    if params.filters and params.support != "own" and rollout.order_rank is None:
        raise ValueError(
            f"sampling_support={params.support!r}: the rollout does not record which tokens a filter kept at positions "
            "left masked, so their order has no probability; use sampling_support='own', or trajectory(order='given')"
        )
    assert rollout.open_step is not None, "a sampler that records an order's log-probs records its blocks"
    left = noise.masked & (noise.weight == 0)
    if not packed:  # a later block's positions are masked too, and could not be chosen
        left &= rollout.open_step <= torch.arange(len(left), device=left.device)[:, None, None]
    return dataclasses.replace(noise, weight=noise.weight + left, left=left)


def _views(
    rollout: Rollout,
    segment: Int[Tensor, "B T"],
    index: Int[Tensor, "S #B 1"] | None = None,
    first: Int[Tensor, "B T"] | None = None,  # the step of segment 0, where steps count from each block's own
) -> Noise:
    """View s hides segments >= index and scores segment `index` (None: each one); a negative index does neither."""
    if index is None:
        index = torch.arange(int(segment.max()) + 1, device=segment.device)[:, None, None]
    if rollout.revised:
        return _replayed(rollout, (index if first is None else index + first).expand(-1, *segment.shape))
    masked = rollout.completion_mask & (segment >= index) & (index >= 0)  # -2 fills up a row of few steps
    return Noise(masked, (rollout.completion_mask & (segment == index)).float())


def _replayed(rollout: Rollout, step: Int[Tensor, "S B T"]) -> Noise:
    """View s sees the canvas before its step of each position, and scores what that step wrote."""
    if rollout.by_draws or rollout.event_step is None:
        raise ValueError(
            "likelihood='trajectory' replays events, but which positions this rollout rewrote depends on the tokens "
            "drawn (edit, rank=confidence), and its ratios would be biased: use soft_edit or remask with rank=random, "
            "or one_step(), elbo() or coupled()"
        )
    params = rollout.sampling_params
    if params.filters and params.support != "own":
        raise ValueError(
            f"sampling_support={params.support!r}: a rollout that revises records what a filter kept at each "
            "position's last writing alone; use sampling_support='own'"
        )
    masked = []
    scored = []
    for each in step:
        before, written = rollout.canvas(each)
        masked.append(before < 0)
        scored.append(written >= 0)
    return Noise(torch.stack(masked), torch.stack(scored).float(), step=step)
