"""Random masks of likelihood estimates, as pure functions of uniform random numbers.

A view is a pair (masked, weight): the positions that are hidden, and the coefficient of each position's log-prob, which
is 0 where nothing is scored. L is the number of completion tokens of a row, and k the number of masked ones.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from dllm_rl.rng import row_seeds
from dllm_rl.types.groups import group_numbers
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Views


def row_generators(rollout: Rollout, generator: Generator, *, per_group: bool = False) -> list[Generator]:
    """Return one generator per row, so that a row's masks depend neither on other rows nor on padding.

    With `per_group` the generators of a group's rows have the same seed, so that their draws are equal.
    """
    rows = torch.arange(len(rollout.tokens)) if rollout.batch_row is None else rollout.batch_row.cpu()
    if per_group:
        number = group_numbers(rollout.group.cpu())
        first = rows.new_zeros(int(number.max()) + 1).scatter_reduce(0, number, rows, "amin", include_self=False)
        rows = first[number]  # whatever the order of the group's rows is now
    # A row's seed depends on its index in the global batch, not on the process that has the row.
    seeds = row_seeds(generator, int(rows.max()) + 1)[rows]
    return [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]


def uniforms_at(marked: Bool[Tensor, "B T"], generators: list[Generator]) -> Float[Tensor, "B T"]:
    """Draw uniforms in [0, 1) at the `marked` positions, +inf at the others, by each row's generator, left to right."""
    out = torch.full(marked.shape, torch.inf)
    host_marked = marked.cpu()  # drawn on the host: the same numbers on every device
    counts = host_marked.sum(-1).tolist()
    out[host_marked] = torch.cat([torch.rand(n, generator=g) for n, g in zip(counts, generators, strict=True)])
    return out.to(marked.device)


def uniforms_per_row(
    generators: list[Generator], num_samples: int, *, stratified: bool, device: torch.device | str
) -> Float[Tensor, "N B 1"]:
    """Draw num_samples uniforms in [0, 1) per row. If `stratified`, sample j lies in [j/N, (j+1)/N)."""
    u = torch.stack([torch.rand(num_samples, generator=g, dtype=torch.float64) for g in generators], dim=1)
    if stratified:
        u = (torch.arange(num_samples)[:, None] + u) / num_samples
    return u[..., None].to(device)


def uniform_index(u: Float[Tensor, "*N B 1"], count: Int[Tensor, "B 1"]) -> Int[Tensor, "*N B 1"]:
    """Return floor(u * count): uniform over 0 .. count-1 (0 where count is 0)."""
    return (u * count).long().minimum(count - 1).clamp(min=0)  # a stratified u may round to 1


def ranks(keys: Float[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Return the rank of each key in its row, from 0 for the smallest."""
    return keys.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)  # stable: ties go from left to right


def k_masked_view(
    inside: Bool[Tensor, "B T"], keys: Float[Tensor, "B T"], k: Int[Tensor, "B 1"]
) -> tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Mask the k positions of `inside` with the smallest keys, and weight them by L/k, where L = |inside|.

    Averaged over k in 1..L and all orders of the keys, sum_i weight_i l_i(m) is the any-order ELBO of `estimators`,
    sum_k (1/k) E_{|m|=k} sum_{i in m} l_i(m).
    """
    masked = inside & (ranks(keys.masked_fill(~inside, torch.inf)) < k)  # exactly k positions, also with equal keys
    return masked, masked * inside.sum(-1, keepdim=True) / k.clamp(min=1)  # an empty row has k = 0


def coupled_views(
    inside: Bool[Tensor, "B T"], keys: Float[Tensor, "B T"], k: Int[Tensor, "B 1"]
) -> list[tuple[Bool[Tensor, "B T"], Float[Tensor, "B T"]]]:
    """Return two views: one masks k positions of `inside`, with weight (L+1)/2k, the other the L-k remaining positions.

    The weight of the second view is (L+1)/2(L-k), so that each position is masked in one view. Averaged over k in 0..L
    and all orders of the keys, the sum of both views estimates the same ELBO as `k_masked_view`.
    """
    size = inside.sum(-1, keepdim=True)
    rank = ranks(keys.masked_fill(~inside, torch.inf))
    first = inside & (rank < k)
    second = inside & (rank >= k)
    return [
        (first, first * (size + 1) / (2 * k.clamp(min=1))),
        (second, second * (size + 1) / (2 * (size - k).clamp(min=1))),
    ]


def block_index(completion: Bool[Tensor, "B T"], block_size: int) -> Int[Tensor, "B T"]:
    """Return the block of each completion position, -1 outside the completion. Only completion positions count."""
    offset = completion.long().cumsum(-1) - 1
    return torch.where(completion, offset // block_size, -1)


def stack_views(views: list[tuple[Tensor, Tensor]], *, samples: int) -> Views:
    """Stack pairs (masked, weight) into one `Views`, with their weights divided by `samples`."""
    masked = torch.stack([view[0] for view in views])
    weight = torch.stack([view[1] for view in views])
    return Views(masked, (weight / samples).float())
