"""Load balancing. Groups without advantage are not scored, so that some processes have more work than others.

A process with much work swaps complete groups, once, for cheaper groups. `Rollout.batch_row` preserves the noise of
their rows.
"""

from dataclasses import replace

import torch
from accelerate import Accelerator
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.distributed.collectives import gather_on_host, local, swap
from dllm_rl.recipe import Recipe
from dllm_rl.training.samples import Samples
from dllm_rl.training.views import active_groups
from dllm_rl.types import Rollout

Place = tuple[int, int]  # a process, and the index of a group in its share
UPDATE = 3  # cost of an update's forward and backward, in forwards of scoring
WORTH = 0.02  # a swap must save the slower process this share of its work


def balance(recipe: Recipe, samples: Samples, accelerator: Accelerator, *, pad_id: int) -> Samples:
    """Return the samples with this process's new rows and all groups in the new order. Collective: every process must
    call it.
    """
    if accelerator.num_processes == 1:
        return samples
    rollout = samples.rollout
    rows = local(torch.arange(samples.advantages.numel()), accelerator)
    rollout = replace(rollout, batch_row=send(rollout.tokens.device, rows)[0])
    if recipe.zero_mismatch:  # the bits of a row depend on the width of the rollout that sampled it
        return replace(samples, rollout=rollout)
    if rollout.sampling_params.support != "rollout":
        rollout = replace(rollout, filter_support=None)  # not used from here on, and not every process records it
    lengths = reduce(rollout.attention_mask.long(), "(p g) t -> p", "sum", g=rollout.group_size).cpu()
    shape = (rollout.tokens.shape[1], *rollout.slots())
    (table,) = gather_on_host([torch.cat([lengths, torch.tensor(shape)])[None]], accelerator)
    work = (samples.metric_weights > 0) + UPDATE * active_groups(recipe, samples.advantages).long()
    costs = table[:, : -len(shape)] * rearrange(work, "(w p) -> w p", w=len(table))
    plan = swaps(costs)
    mine = dict[int, list[int]]()  # by process: its places to swap, in the plan's order in both processes
    for pair in plan:
        for (process, place), (other, _) in (pair, pair[::-1]):
            if process == accelerator.process_index:
                mine.setdefault(other, []).append(place)
    if mine:
        width, *slots = table[:, -len(shape) :].amax(0).tolist()
        rollout = exchanged(rollout.padded(width - shape[0], pad_id=pad_id).with_slots(iter(slots)), mine)
    home = torch.arange(costs.numel()).view_as(costs)  # every process computes the same new order
    order = home.clone()
    for first, second in plan:
        order[first] = home[second]
        order[second] = home[first]
    return samples.reordered(order.flatten(), rollout)


def swaps(costs: Int[Tensor, "W P"]) -> list[tuple[Place, Place]]:
    """Return pairs of groups to swap, each group at most once. The choice is greedy, and the same in every process."""
    loads = costs.sum(1)
    settled = torch.zeros_like(costs, dtype=torch.bool)
    found = list[tuple[Place, Place]]()
    while True:
        most = int(loads.argmax())
        least = int(loads.argmin())
        apart = loads[most] - loads[least]
        handed = costs[most][:, None] - costs[least]
        handed[settled[most][:, None] | settled[least]] = 0
        left = (apart - 2 * handed).abs()  # swap the pair that brings the two processes closest
        if apart - left.min() <= 2 * WORTH * loads[most]:
            return found
        give, take = divmod(int(left.argmin()), costs.shape[1])
        loads[most] -= handed[give, take]
        loads[least] += handed[give, take]
        settled[most, give] = settled[least, take] = True
        found.append(((most, give), (least, take)))


def exchanged(rollout: Rollout, mine: dict[int, list[int]]) -> Rollout:
    """Send the groups at the places `mine` to each process, and return the rollout with the received groups in their
    place.
    """
    group = torch.arange(rollout.group_size)
    counts = [len(places) * len(group) for places in mine.values()]
    places = torch.tensor([place for each in mine.values() for place in each])
    (rows,) = send(rollout.tokens.device, rearrange(places[:, None] * len(group) + group, "p g -> (p g)"))
    tensors = rollout.tensors()  # of the record and its nested records, in the same order in all processes
    lines = [value[rows].double().reshape(len(rows), -1) for value in tensors]  # fp64 holds masks, ids, fp32
    parcels = torch.cat(lines, dim=1).split(counts)  # all fields of a row travel as one line
    arrived = [torch.empty_like(parcel) for parcel in parcels]
    swap(list(zip(mine, parcels, strict=True)), list(zip(mine, arrived, strict=True)))
    columns = iter(torch.cat(arrived).split([line.shape[1] for line in lines], dim=1))

    def received(value: Tensor) -> Tensor:
        return value.index_copy(0, rows, next(columns).view(-1, *value.shape[1:]).to(value.dtype))

    rollout = rollout.map(received)
    start = int(rollout.attention_mask.any(0).long().argmax())  # columns before it pad every row
    return rollout.rows(torch.arange(len(rollout.tokens), device=rows.device), slice(start, None))


def of_sampled_rows(values: Float[Tensor, "B K"], rollout: Rollout, accelerator: Accelerator) -> Float[Tensor, "B K"]:
    """Return values of the balanced rows in the order in which this process sampled its rows, on the host. Collective:
    every process must call it.
    """
    if rollout.batch_row is None:
        return values.cpu()
    (found,) = gather_on_host([torch.cat([values.double(), rollout.batch_row[:, None]], dim=1)], accelerator)
    return local(found[found[:, -1].argsort()], accelerator)[:, :-1]
