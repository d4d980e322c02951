"""The views of `Trajectory()`: a replay of the rollout's steps.

View s hides the tokens that were written in segment s or later, and scores those of segment s. A segment is one step,
or several merged steps.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dllm_rl.likelihoods.masks import row_generators
from dllm_rl.types import Rollout, Views


def segments(step: Int[Tensor, "B T"], num_segments: int | None) -> Int[Tensor, "B T"]:
    """Return the segment of each position, -1 outside the completion.

    Without num_segments it is the position's step. Otherwise each row's steps are merged into num_segments segments.
    """
    if num_segments is None:
        return step
    num_steps = step.amax(-1, keepdim=True) + 1  # per row: rows may end early
    return torch.where(step < 0, -1, step * num_segments // num_steps.clamp(min=1))


def all_segments(segment: Int[Tensor, "B T"]) -> Int[Tensor, "S 1 1"]:
    """Return the indices of all segments, to score every segment of every row."""
    return torch.arange(int(segment.max()) + 1, device=segment.device)[:, None, None]


def sampled_segments(
    segment: Int[Tensor, "B T"], rollout: Rollout, generator: Generator, num_sampled_steps: int
) -> tuple[Int[Tensor, "S B 1"], Float[Tensor, "B 1"]]:
    """Draw num_sampled_steps segments of each row without replacement.

    Returns:
        Indices of the segments, filled up with -2 in rows with fewer segments; the weight of each row that makes the
        sum over its segments unbiased.
    """
    counts = segment.amax(-1).cpu() + 1
    indices = []
    for row_generator, count in zip(row_generators(rollout, generator), counts.tolist(), strict=True):
        permutation = torch.rand(max(count, 0), generator=row_generator).argsort()
        drawn = permutation[:num_sampled_steps].sort().values
        indices.append(F.pad(drawn, (0, num_sampled_steps - len(drawn)), value=-2))  # -1 is outside completions
    weight = counts / counts.clamp(1, num_sampled_steps)
    return torch.stack(indices, dim=1)[..., None].to(segment.device), weight[:, None].to(segment.device)


def segment_views(rollout: Rollout, segment: Int[Tensor, "B T"], index: Int[Tensor, "S #B 1"]) -> Views:
    """Return views that hide the segments >= index[s] and score segment index[s].

    With a negative index a view hides and scores nothing in the row.
    """
    masked = rollout.completion_mask & (segment >= index) & (index >= 0)
    return Views(masked, (rollout.completion_mask & (segment == index)).float())
