"""The change of confidence that each written token caused at the masked positions near it."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.samplers.canvas import Canvas, StepPlan
from dllm_rl.samplers.rules import Commit, Rank


class ConfidenceChange:
    """For each position, the sum of the changes in confidence between the step that wrote it and its block's next step.

    The sum covers the positions at most `radius` away that are masked in both steps. If a step wrote several positions,
    a change counts for each of them that is near.
    """

    def __init__(self, canvas: Canvas, rank: Rank, commit: Commit, radius: int) -> None:
        """Raise ValueError for a rank whose scores are not confidences, or a rule that rewrites."""
        if rank.order not in ("confidence", "max_prob") or commit.revises:
            raise ValueError(
                f"confidence_radius={radius} needs rank=Confidence() or MaxProb(), and a commit rule that does not "
                f"rewrite, but rank={rank.name} and commit={commit.name}; set confidence_radius=None"
            )
        self.radius = min(radius, canvas.logprobs.shape[1])  # no position is further away
        self.total = torch.zeros_like(canvas.logprobs)
        # The state after each row's previous step: confidences, -1 where not masked, and the positions it wrote.
        self.confidence = torch.full_like(canvas.logprobs, -1.0)
        self.written = torch.zeros_like(canvas.masked)

    def record(self, plan: StepPlan, logprobs: Float[Tensor, "R L"], chosen: Bool[Tensor, "R L"]) -> None:
        """Record a step: the log-probs that its rank returned, in nats, and the positions that it writes."""
        (rows,) = copy_to_device(chosen.device, plan.rows)
        confidence = logprobs.exp()
        previous = self.confidence[rows]
        change = torch.where(plan.masked & (previous >= 0), confidence - previous, 0)
        nearby_change = F.pad(change, (self.radius, self.radius)).unfold(-1, 2 * self.radius + 1, 1).sum(-1)
        self.total[rows] += nearby_change * self.written[rows]
        self.confidence[rows] = torch.where(plan.masked, confidence, -1)
        self.written[rows] = chosen
