"""The masks of a trajectory: a rollout's own steps, replayed. View s hides what was written in segment s or later, and
scores segment s; a segment is a step, or several of them."""

import dataclasses

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from dllm_rl.likelihoods import events
from dllm_rl.likelihoods.masks import row_generators
from dllm_rl.types import Rollout, Views


def draw_trajectory(rollout: Rollout, generator: Generator, *, num_segments: int | None) -> Views:
    """The rollout's own masks: view s hides what was committed in segment s or later, and scores segment s."""
    return views_of_segments(rollout, segments(rollout, num_segments))


def draw_some_segments(rollout: Rollout, generator: Generator, *, num_segments: int | None, num_sampled: int) -> Views:
    """num_sampled of a row's S views in `draw_trajectory`, without replacement, weighted by S / drawn."""
    segment = segments(rollout, num_segments)
    counts = segment.amax(-1).cpu() + 1
    views = []
    for row, count in zip(row_generators(rollout, generator), counts.tolist(), strict=True):
        drawn = torch.rand(max(count, 0), generator=row).argsort()[:num_sampled].sort().values
        views.append(torch.nn.functional.pad(drawn, (0, num_sampled - len(drawn)), value=-2))  # -2: no segment's number
    index = torch.stack(views, dim=1)[..., None].to(segment.device)
    every = views_of_segments(rollout, segment, index)
    inverse_share = (counts / counts.clamp(1, num_sampled))[:, None].to(segment.device)  # so that the sum is unbiased
    return dataclasses.replace(every, weight=every.weight * inverse_share)


def segments(rollout: Rollout, num_segments: int | None) -> Int[Tensor, "B T"]:
    """The segment of each position: its step, or its step's part of num_segments; -1 off the completion."""
    step = events.last_step(rollout)
    if num_segments is None:
        return step
    events.check_merges(rollout, num_segments)
    steps = step.amax(-1, keepdim=True) + 1  # a row's own: rows may end early
    return torch.where(step < 0, -1, step * num_segments // steps.clamp(min=1))


def views_of_segments(
    rollout: Rollout,
    segment: Int[Tensor, "B T"],
    index: Int[Tensor, "S #B 1"] | None = None,
    first: Int[Tensor, "B T"] | None = None,  # the step of segment 0, where steps count from each block's own
) -> Views:
    """View s hides segments >= index and scores segment `index` (None: each one); a negative index does neither."""
    if index is None:
        index = torch.arange(int(segment.max()) + 1, device=segment.device)[:, None, None]
    if rollout.events is not None:
        return events.replayed(rollout, (index if first is None else index + first).expand(-1, *segment.shape))
    masked = rollout.completion_mask & (segment >= index) & (index >= 0)  # -2 fills up a row of few steps
    return Views(masked, (rollout.completion_mask & (segment == index)).float())
