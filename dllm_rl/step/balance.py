"""Load balancing. Groups without advantage are not scored, so that some processes have more work than others.

A process with much work swaps complete groups for cheaper groups of another process, each group at most once. A row's
random noise stays the same, because it depends on `Rollout.batch_row`, the row's index before the swap.
"""

from dataclasses import replace

import torch
from accelerate import Accelerator
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.distributed.collectives import gather_on_host, local, swap
from dllm_rl.step.context import StepContext
from dllm_rl.step.features import StepFeature
from dllm_rl.step.mask_sets import active_groups
from dllm_rl.step.samples import Samples
from dllm_rl.step.settings import StepSettings
from dllm_rl.types import Rollout

GroupSlot = tuple[int, int]  # a process, and the index of a group among that process's groups
UPDATE_COST = 3  # cost of an update's forward and backward, relative to a forward that only scores
MIN_SAVING = 0.02  # a swap must save the busier process more than this share of its work


class Balance(StepFeature):
    """Load balancing between several processes."""

    def __init__(self, *, swaps: bool) -> None:
        self.swaps = swaps  # False: every process keeps its groups

    def before_scoring(self, context: StepContext, samples: Samples) -> Samples:
        pad_id = context.policy.pad_id
        return balance(context.settings, samples, context.accelerator, pad_id=pad_id, swaps=self.swaps)


def balance(
    settings: StepSettings, samples: Samples, accelerator: Accelerator, *, pad_id: int, swaps: bool = True
) -> Samples:
    """Move groups between processes so that all have about equal work. Call it before scoring; collective: every
    process must call it.

    Returns:
        The samples with this process's new rows, and the groups in their new order.
    """
    rollout = samples.rollout
    row_index = local(torch.arange(samples.advantages.numel()), accelerator)
    rollout = replace(rollout, batch_row=copy_to_device(rollout.tokens.device, row_index)[0])
    # Swap nothing under zero_mismatch (swaps=False), where the bits of a row depend on the width of its rollout, or if
    # late rollouts have log-probs, which `exchange_groups` does not send.
    if not swaps or samples.rollout_logprobs:
        return replace(samples, rollout=rollout)
    if rollout.sampling_params.support != "rollout":
        rollout = replace(rollout, filter_support=None)  # no longer needed, and some processes have none
    lengths = reduce(rollout.attention_mask.long(), "(p g) t -> p", "sum", g=rollout.group_size).cpu()
    width_and_slots = (rollout.tokens.shape[1], *rollout.slots())
    (lengths_and_sizes,) = gather_on_host([torch.cat([lengths, torch.tensor(width_and_slots)])[None]], accelerator)
    forwards_per_token = (samples.metric_weights > 0) + UPDATE_COST * active_groups(settings, samples.advantages).long()
    costs = lengths_and_sizes[:, : -len(width_and_slots)] * rearrange(
        forwards_per_token, "(w p) -> w p", w=len(lengths_and_sizes)
    )
    swap_pairs = plan_swaps(costs)
    # Partner process -> the local groups to swap with it, in the same order in both processes.
    outgoing: dict[int, list[int]] = {}
    for swap_pair in swap_pairs:
        for (process, slot), (partner, _) in (swap_pair, swap_pair[::-1]):
            if process == accelerator.process_index:
                outgoing.setdefault(partner, []).append(slot)
    if outgoing:
        max_width, *max_slots = lengths_and_sizes[:, -len(width_and_slots) :].amax(0).tolist()
        rollout = exchange_groups(
            rollout.padded(max_width - width_and_slots[0], pad_id=pad_id).with_slots(iter(max_slots)), outgoing
        )
    old_index = torch.arange(costs.numel()).view_as(costs)  # every process computes the same new order
    order = old_index.clone()
    for first, second in swap_pairs:
        order[first] = old_index[second]
        order[second] = old_index[first]
    return samples.reorder_groups(order.flatten(), rollout)


def plan_swaps(costs: Int[Tensor, "W P"]) -> list[tuple[GroupSlot, GroupSlot]]:
    """Return pairs of groups to swap, each group at most once. The choice is greedy, and the same in every process."""
    loads = costs.sum(1)
    is_swapped = torch.zeros_like(costs, dtype=torch.bool)
    swaps: list[tuple[GroupSlot, GroupSlot]] = []
    while True:
        busiest = int(loads.argmax())
        idlest = int(loads.argmin())
        gap = loads[busiest] - loads[idlest]
        moved_cost = costs[busiest][:, None] - costs[idlest]
        moved_cost[is_swapped[busiest][:, None] | is_swapped[idlest]] = 0
        remaining_gap = (gap - 2 * moved_cost).abs()  # swap the pair that brings the two processes closest
        if gap - remaining_gap.min() <= 2 * MIN_SAVING * loads[busiest]:
            return swaps
        outgoing, incoming = divmod(int(remaining_gap.argmin()), costs.shape[1])
        loads[busiest] -= moved_cost[outgoing, incoming]
        loads[idlest] += moved_cost[outgoing, incoming]
        is_swapped[busiest, outgoing] = is_swapped[idlest, incoming] = True
        swaps.append(((busiest, outgoing), (idlest, incoming)))


def exchange_groups(rollout: Rollout, outgoing: dict[int, list[int]]) -> Rollout:
    """Send this process's groups in `outgoing` to their partner processes, and return the rollout with the received
    groups in their place.
    """
    group_size = rollout.group_size
    rows_per_partner = [len(slots) * group_size for slots in outgoing.values()]
    slots = torch.tensor([slot for slots in outgoing.values() for slot in slots])
    (rows,) = copy_to_device(
        rollout.tokens.device, rearrange(slots[:, None] * group_size + torch.arange(group_size), "p g -> (p g)")
    )
    tensors = rollout.tensors()  # the same fields in the same order in all processes
    # fp64 represents masks, ids and fp32 exactly.
    flat_fields = [value[rows].double().reshape(len(rows), -1) for value in tensors]
    sent = torch.cat(flat_fields, dim=1).split(rows_per_partner)  # one flat row per completion
    received = [torch.empty_like(rows_sent) for rows_sent in sent]
    swap(list(zip(outgoing, sent, strict=True)), list(zip(outgoing, received, strict=True)))
    received_fields = iter(torch.cat(received).split([field.shape[1] for field in flat_fields], dim=1))

    def replace_rows(value: Tensor) -> Tensor:
        return value.index_copy(0, rows, next(received_fields).view(-1, *value.shape[1:]).to(value.dtype))

    rollout = rollout.map(replace_rows)
    first_column = int(rollout.attention_mask.any(0).long().argmax())  # columns before it are padding in every row
    return rollout.rows(torch.arange(len(rollout.tokens), device=rows.device), slice(first_column, None))


def to_sampling_order(values: Float[Tensor, "B K"], rollout: Rollout, accelerator: Accelerator) -> Float[Tensor, "B K"]:
    """Reorder per-row values after load balancing: return, on the host, the values of the rows that this process
    sampled, in sampling order. Collective: every process must call it.
    """
    if rollout.batch_row is None:
        return values.cpu()
    (gathered,) = gather_on_host([torch.cat([values.double(), rollout.batch_row[:, None]], dim=1)], accelerator)
    return local(gathered[gathered[:, -1].argsort()], accelerator)[:, :-1]
