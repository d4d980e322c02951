"""How much each written token changed the confidence of the masked positions near it."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.samplers.canvas import Canvas, Turn
from dllm_rl.samplers.records import Commit, Rank


class ConfidenceChange:
    """Sum, for each position, how much confidences moved between the step that wrote it and the block's next step.

    The sum is over the positions that stayed masked within `radius` places. Positions of one step share the changes.
    """

    def __init__(self, canvas: Canvas, rank: Rank, commit: Commit, radius: int) -> None:
        """Raise ValueError for a rank whose scores are not confidences, or a rule that rewrites."""
        if rank.order not in ("confidence", "max_prob") or commit.revises:
            raise ValueError(
                f"confidence_radius={radius} needs rank=confidence or max_prob, and a commit rule that does not "
                f"rewrite, but rank={rank.name} and commit={commit.name}; set confidence_radius=None"
            )
        self.radius = radius
        self.total = torch.zeros_like(canvas.logprobs)
        self.confidence = torch.full_like(canvas.logprobs, -1.0)  # of the row's last step; -1: not masked in it
        self.written = torch.zeros_like(canvas.masked)  # in the row's last step

    def record(self, turn: Turn, logprobs: Float[Tensor, "R L"], chosen: Bool[Tensor, "R L"]) -> None:
        """Record a step: the log-probs that its rank returned, in nats, and the positions that it writes."""
        (rows,) = send(chosen.device, turn.rows)
        now = logprobs.exp()
        before = self.confidence[rows]
        moved = torch.where(turn.masked & (before >= 0), now - before, 0)
        near = F.pad(moved, (self.radius, self.radius)).unfold(-1, 2 * self.radius + 1, 1).sum(-1)
        self.total[rows] += near * self.written[rows]
        self.confidence[rows] = torch.where(turn.masked, now, -1)
        self.written[rows] = chosen
