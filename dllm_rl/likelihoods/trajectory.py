"""The views of a trajectory: a rollout's steps, replayed.

View s hides what was written in segment s or later, and scores segment s. A segment is one step, or several.
"""

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dllm_rl.likelihoods.masks import row_generators
from dllm_rl.types import Rollout, Views


def segments(step: Int[Tensor, "B T"], num_segments: int | None) -> Int[Tensor, "B T"]:
    """Return the segment of each position: its step, or its step's part of num_segments; -1 off the completion."""
    if num_segments is None:
        return step
    steps = step.amax(-1, keepdim=True) + 1  # per row: rows may end early
    return torch.where(step < 0, -1, step * num_segments // steps.clamp(min=1))


def all_segments(segment: Int[Tensor, "B T"]) -> Int[Tensor, "S 1 1"]:
    """Return the indices of all segments."""
    return torch.arange(int(segment.max()) + 1, device=segment.device)[:, None, None]


def sampled_segments(
    segment: Int[Tensor, "B T"], rollout: Rollout, generator: Generator, num_sampled_steps: int
) -> tuple[Int[Tensor, "S B 1"], Float[Tensor, "B 1"]]:
    """Draw segments of each row without replacement. Return them and the weight that makes their sum unbiased."""
    counts = segment.amax(-1).cpu() + 1
    rows = []
    for row, count in zip(row_generators(rollout, generator), counts.tolist(), strict=True):
        drawn = torch.rand(max(count, 0), generator=row).argsort()[:num_sampled_steps].sort().values
        rows.append(
            torch.nn.functional.pad(drawn, (0, num_sampled_steps - len(drawn)), value=-2)
        )  # -2: no segment's number
    weight = counts / counts.clamp(1, num_sampled_steps)
    return torch.stack(rows, dim=1)[..., None].to(segment.device), weight[:, None].to(segment.device)


def views_of_segments(rollout: Rollout, segment: Int[Tensor, "B T"], index: Int[Tensor, "S #B 1"]) -> Views:
    """Return views that hide segments >= index[s] and score segment index[s]. A negative index does neither."""
    masked = rollout.completion_mask & (segment >= index) & (index >= 0)  # -2 fills up a row of few steps
    return Views(masked, (rollout.completion_mask & (segment == index)).float())
