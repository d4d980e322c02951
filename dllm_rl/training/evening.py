"""Scoring and update evened out: a process with many groups to score has others run some of their forwards.

Groups without advantage are not scored, so that some processes have more to do than others, and all wait for the
slowest. Rewards, corrector, loss and metrics stay where the rows are; what travels are a group's tokens and masks to
the process that runs it, its scores back, and the loss's gradient with respect to them to where the backward is.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, Integer
from torch import Tensor

from dllm_rl.distributed import gather_numbers, processes, swap
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.models.base import Policy
from dllm_rl.models.buckets import FORWARD
from dllm_rl.models.transfer import send
from dllm_rl.types import Noise, Rollout

Move = tuple[int, int, int]  # from a process, to another, the group's place on the former


@dataclass(frozen=True)
class Evened:
    """Which forwards of a rollout's rows this process runs, beside those that others run of them.

    parts  rows and masks to run: its own rollout, without what others run, and what it runs for each of `hosts`.
    sent   the processes that run some of its own rows, and which (R,).
    hosts  the processes that the other parts come from.
    """

    parts: list[tuple[Rollout, Noise]]
    sent: list[tuple[int, Int[Tensor, " R"]]] = dataclasses.field(default_factory=list)
    hosts: list[int] = dataclasses.field(default_factory=list)

    def run(
        self,
        likelihood: LikelihoodEstimator,
        policy: Policy,
        *,
        micro_batch_size: int | None,
        keep_graphs: bool = False,
        note: Integer[Tensor, "N B T M E"] | None = None,
    ) -> list[Tensor]:
        """The scores (N, R, T) of every part. note: as `LikelihoodEstimator.scores` takes it, where no rows travel."""
        return [
            likelihood.scores(
                policy, rollout, noise, micro_batch_size=micro_batch_size, keep_graphs=keep_graphs, note=note
            )
            for rollout, noise in self.parts
        ]

    def home(self, scores: Sequence[Tensor]) -> Float[Tensor, "N B T"]:
        """The scores of this process's rows, from those that every process found; an exchange."""
        own, *others = scores
        if not self.sent and not self.hosts:
            return own
        back = [(process, own[:, rows]) for process, rows in self.sent]  # of their shape, to be written over
        swap(list(zip(self.hosts, others, strict=True)), back)
        for (_, found), (_, rows) in zip(back, self.sent, strict=True):
            own[:, rows] = found
        return own

    def away(self, vectors: Float[Tensor, "N B T"]) -> list[Float[Tensor, "N R T"]]:
        """Of vectors for this process's scores those for every part's; an exchange."""
        others = [torch.empty_like(noise.weight, dtype=vectors.dtype) for _, noise in self.parts[1:]]
        swap([(process, vectors[:, rows]) for process, rows in self.sent], list(zip(self.hosts, others, strict=True)))
        return [vectors, *others]


def even_out(rollout: Rollout, noise: Noise, *, stays: bool) -> Evened:
    """Who runs which of the groups that `noise` scores, agreed on by all processes, and what that takes.

    stays  whether this process's rows cannot travel, as the graphs of their forwards are kept: then all keep theirs.
    """
    alone = Evened([(rollout, noise)])
    if processes()[0] == 1:
        return alone
    if rollout.sampling_params.support != "rollout":
        rollout = dataclasses.replace(rollout, kept_ids=None)  # not used, and not recorded by every process
    device, kept = rollout.tokens.device, rollout.kept_ids
    live = (noise.weight != 0).any(-1).sum(0) * rollout.attention_mask.sum(-1)
    costs = rearrange(live, "(p g) -> p g", g=rollout.group_size).sum(-1)
    facts = (len(noise.weight), rollout.tokens.shape[1], 0 if kept is None else kept.shape[-1], int(stays))
    table = gather_numbers(torch.cat([costs, *send(device, torch.tensor(facts))]))
    if table[:, -1].any():
        return alone
    extra = int(table[:, -4].amax()) * FORWARD.get(device.type, FORWARD["cuda"])
    return exchanged(rollout, noise, moves(table[:, :-4], extra=extra), table[:, -4:-1].tolist())


def moves(costs: Int[Tensor, "W P"], *, extra: int) -> list[Move]:
    """Groups that go from the process with the most to do to that with the least, one by one, as long as the slower of
    the two is done earlier for it. Greedy, on the host, the same on every process.

    costs  of each process's groups, in positions that are run; 0: nothing is. extra: what a guest costs beside its own.
    """
    left = [{place: cost for place, cost in enumerate(row) if cost} for row in costs.tolist()]
    loads, found = [sum(groups.values()) for groups in left], list[Move]()
    while True:
        most, least = loads.index(max(loads)), loads.index(min(loads))
        apart = loads[most] - loads[least]
        fitting = {place: cost for place, cost in left[most].items() if cost + extra < apart}
        if not fitting:
            return found
        place = min(fitting, key=lambda place: abs(2 * fitting[place] + extra - apart))
        cost = left[most].pop(place)
        loads[most], loads[least] = loads[most] - cost, loads[least] + cost + extra
        found.append((most, least, place))


def exchanged(rollout: Rollout, noise: Noise, plan: Sequence[Move], shapes: Sequence[Sequence[int]]) -> Evened:
    """The rows of a plan, where they are run. shapes: each process's N, T, and kept ids a token."""
    gives, takes = given_and_taken(plan, processes()[1])
    device, group = rollout.tokens.device, torch.arange(rollout.group_size)
    rows = [rearrange(torch.tensor(each)[:, None] * len(group) + group, "p g -> (p g)") for each in gives.values()]
    sent = list(zip(gives, send(device, *rows), strict=True)) if rows else []
    parcels = [(taker, packed(rollout.rows(mine), noise.rows(mine))) for taker, mine in sent]
    layouts = {
        giver: layout(rollout, noise, len(places) * len(group), shapes[giver]) for giver, places in takes.items()
    }
    numbers = {giver: sum(map(math.prod, each.values())) for giver, each in layouts.items()}
    wanted = [(giver, torch.empty(count, dtype=torch.double, device=device)) for giver, count in numbers.items()]
    swap(parcels, wanted)
    guests = [unpacked(rollout, noise, parcel, layouts[giver]) for giver, parcel in wanted]
    if sent:
        stay = torch.ones_like(rollout.attention_mask[:, 0])
        stay[torch.cat([mine for _, mine in sent])] = False
        noise = noise.only(stay)
    return Evened([(rollout, noise), *guests], sent, list(takes))


def given_and_taken(plan: Sequence[Move], me: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """This process's places by who runs them, and those of others by whose they are."""
    gives, takes = dict[int, list[int]](), dict[int, list[int]]()
    for giver, taker, place in plan:
        if giver == me:
            gives.setdefault(taker, []).append(place)
        if taker == me:
            takes.setdefault(giver, []).append(place)
    return gives, takes


def tensors(rollout: Rollout, noise: Noise) -> dict[str, Tensor]:
    """What both records hold, by name."""
    named = [(f.name, getattr(each, f.name)) for each in (rollout, noise) for f in dataclasses.fields(each)]
    return {name: value for name, value in named if isinstance(value, Tensor)}


def packed(rollout: Rollout, noise: Noise) -> Float[Tensor, " K"]:
    """All their numbers in one tensor, in fp64, which holds masks, token ids and fp32 exactly."""
    return torch.cat([value.double().flatten() for value in tensors(rollout, noise).values()])


def layout(rollout: Rollout, noise: Noise, rows: int, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The shapes of `tensors` with so many rows of another process, whose N, T and kept ids a token are given."""
    views, columns, ids = shape
    by_axes = {1: (rows,), 2: (rows, columns), 3: (views, rows, columns)}
    found = {name: by_axes[value.dim()] for name, value in tensors(rollout, noise).items()}
    return found | ({"kept_ids": (rows, columns, ids)} if "kept_ids" in found else {})


def unpacked(
    rollout: Rollout, noise: Noise, parcel: Float[Tensor, " K"], shapes: dict[str, tuple[int, ...]]
) -> tuple[Rollout, Noise]:
    """What another process packed, as records like these."""
    like = tensors(rollout, noise)
    parts = zip(shapes.items(), parcel.split([math.prod(shape) for shape in shapes.values()]), strict=True)
    found = {name: part.view(shape).to(like[name].dtype) for (name, shape), part in parts}
    records: list[Any] = [
        dataclasses.replace(each, **{f.name: found[f.name] for f in dataclasses.fields(each) if f.name in found})
        for each in (rollout, noise)
    ]
    return records[0], records[1]
