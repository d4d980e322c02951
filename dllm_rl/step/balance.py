"""Load balancing. Groups without advantage are not scored, so that some processes have more work than others.

A process with much work swaps complete groups for cheaper groups of another process, each group at most once. A row's
random noise stays the same, because it depends on `Rollout.batch_row`, the row's index before the swap.
"""

from dataclasses import replace

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dllm_rl.device import copy_to_device
from dllm_rl.distributed.collectives import collective, gather_on_host
from dllm_rl.step.samples import Samples, active_rows
from dllm_rl.step.settings import StepSettings
from dllm_rl.types.groups import group_numbers, starts_group
from dllm_rl.types.rollouts import Rollout

GroupSlot = tuple[int, int]  # a process, and the index of a group among that process's groups
UPDATE_COST = 3  # cost of an update's forward and backward, relative to a forward that only scores
MIN_SAVING = 0.02  # a swap must save the busier process more than this share of its work


def balance(
    settings: StepSettings,
    samples: Samples,
    accelerator: Accelerator,
    *,
    pad_id: int,
    swaps: bool = True,
    all_groups: bool = False,
) -> Samples:
    """Move groups between processes so that all have about equal work. Call it before scoring; collective: every
    process must call it.

    Returns:
        The samples with this process's new rows, and the groups in their new order.
    """
    rollout = samples.rollout
    batch_row = samples.local(torch.arange(len(samples.group)), accelerator)
    # Groups that were sampled by different processes may have the same number in their rollouts.
    rollout = replace(rollout, batch_row=batch_row, group=samples.local(samples.group, accelerator))
    # Swap nothing under zero_mismatch (swaps=False), where the bits of a row depend on the width of its rollout, or if
    # late rollouts have log-probs, which `take_rows` does not move.
    if not swaps or samples.source == "late":
        return replace(samples, rollout=rollout)
    if rollout.sampling_params.support != "rollout":
        rollout = replace(rollout, filter_support=None)  # no longer needed, and some processes have none
    width_and_slots = torch.tensor([rollout.tokens.shape[1], *rollout.slots()])
    (sizes_of_processes,) = gather_on_host([width_and_slots[None]], accelerator)
    (lengths,) = gather_on_host([rollout.attention_mask.sum(-1).cpu()[:, None]], accelerator, samples.counts)
    is_trained_row = active_rows(settings, samples, all_groups=all_groups)
    forwards_per_token = (samples.metric_weights > 0) + UPDATE_COST * is_trained_row.long()
    group, first_rows = group_numbers(samples.group), starts_group(samples.group)
    row_costs = lengths[:, 0] * forwards_per_token
    group_costs = torch.zeros(int(first_rows.sum()), dtype=row_costs.dtype).index_add(0, group, row_costs)
    process = torch.arange(len(samples.counts)).repeat_interleave(torch.tensor(samples.counts))[first_rows]
    groups_of_processes = [(process == number).nonzero()[:, 0] for number in range(len(samples.counts))]
    # The groups of each process. Processes with fewer groups have slots of -1, which are not swapped.
    slots = pad_sequence(groups_of_processes, batch_first=True, padding_value=-1)
    swap_pairs = plan_swaps(torch.where(slots < 0, 0, group_costs[slots]), slots < 0)
    for first, second in swap_pairs:  # every process computes the same new slots
        slots[first], slots[second] = int(slots[second]), int(slots[first])
    rows_of_group = torch.arange(len(group)).split(group.bincount().tolist())
    rows_of_processes = [torch.cat([rows_of_group[number] for number in row if number >= 0]) for row in slots]
    if swap_pairs:
        max_width, *max_slots = sizes_of_processes.amax(0).tolist()
        rollout = rollout.padded(max_width - rollout.tokens.shape[1], pad_id=pad_id).with_slots(iter(max_slots))
        rollout = take_rows(rollout, rows_of_processes[accelerator.process_index], accelerator, samples.counts)
    return samples.reorder(torch.cat(rows_of_processes), tuple(map(len, rows_of_processes)), rollout)


def plan_swaps(costs: Int[Tensor, "W P"], is_empty: Bool[Tensor, "W P"]) -> list[tuple[GroupSlot, GroupSlot]]:
    """Return pairs of groups to swap, each group at most once. The choice is greedy, and the same in every process.
    A process has no group at slots that are empty.
    """
    loads = costs.sum(1)
    is_swapped = is_empty.clone()
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


@collective
def take_rows(rollout: Rollout, rows: Int[Tensor, " b"], accelerator: Accelerator, counts: tuple[int, ...]) -> Rollout:
    """Return the rollout of these rows of all processes, whose rollouts have the same width and fields."""
    device = rollout.tokens.device
    tensors = rollout.tensors()  # the same fields in the same order in all processes
    # fp64 represents masks, ids and fp32 exactly, so that one gather is enough.
    flat_rows = torch.cat([value.double().reshape(len(value), -1) for value in tensors], dim=1)
    (all_rows,) = gather_on_host([flat_rows], accelerator, counts)
    (mine,) = copy_to_device(device, all_rows[rows])
    fields = iter(mine.split([value[0].numel() for value in tensors], dim=1))
    rollout = rollout.map(lambda value: next(fields).reshape(-1, *value.shape[1:]).to(value.dtype))
    first_column = int(rollout.attention_mask.any(0).long().argmax())  # columns before it are padding in every row
    return rollout.rows(torch.arange(len(rollout.tokens), device=device), slice(first_column, None))


@collective
def to_sampling_order(
    values: Float[Tensor, "b K"], trained: Samples, sampled: Samples, accelerator: Accelerator
) -> Float[Tensor, "c K"]:
    """Reorder per-row values after load balancing: return, on the host, the values of the rows that this process
    sampled, in sampling order.

    Args:
        values: Values of the rows of `trained`.
        trained: The samples after load balancing.
        sampled: The samples before it.
        accelerator: Processes.
    """
    batch_row = trained.rollout.batch_row
    if batch_row is None:
        return values.cpu()
    (gathered,) = gather_on_host([torch.cat([values.double(), batch_row[:, None]], dim=1)], accelerator, trained.counts)
    in_order = gathered[gathered[:, -1].argsort()][:, :-1]
    return in_order.split(list(sampled.counts))[accelerator.process_index]
