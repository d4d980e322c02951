"""Views of a rollout whose commit rule rewrites tokens (`Remask`, `SoftEdit`): a replay of its recorded events.

A view rebuilds the canvas before a step of each position, and scores the tokens that this step wrote.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.likelihoods.views import View, ViewFeature
from dllm_rl.types.rollouts import Events, Rollout
from dllm_rl.types.scoring import Views


def recorded_events(rollout: Rollout) -> Events:
    """Return the rollout's events, which must be recorded."""
    assert rollout.events is not None, "only a sampler that revises records events"
    return rollout.events


def canvas_at(rollout: Rollout, *, step: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return the tokens before each position's `step` (-1: masked), and those that this step wrote (-1: none)."""
    events = recorded_events(rollout)
    is_event = events.step >= 0
    num_earlier = (is_event & (events.step < step[..., None])).sum(-1, keepdim=True)
    latest = events.token.gather(-1, (num_earlier - 1).clamp(min=0))
    # A position was masked before its first event; a position without events has never changed.
    initial = torch.where(is_event[..., :1], -1, rollout.tokens[..., None])
    before = torch.where(num_earlier > 0, latest, initial)[..., 0]
    written = torch.where(events.step == step[..., None], events.token, -1).amax(-1).long()
    return before, written


@dataclass(frozen=True)
class CanvasReplay(ViewFeature):
    """Feature of views whose canvas is rebuilt as it was before `step` of each position."""

    is_per_token: ClassVar[bool] = False  # a contribution is a sum over a position's writes

    step: Int[Tensor, "N B T"]

    def apply_to(self, view: View, number: int) -> View:
        return replace(view, canvas=partial(canvas_at, step=self.step[number]))

    def sampler_logprobs(self, rollout: Rollout, logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        # Event by event, in the order in which views are summed.
        return sum(recorded_events(rollout).logprobs.unbind(-1), torch.zeros_like(logprobs))


def last_and_first_step(rollout: Rollout, num_segments: int | None) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return the last and the first step in which each position changed; -1 outside the completion.

    Raises:
        ValueError: `num_segments` merges steps, and a position may be written in several of them.
    """
    if num_segments is not None:
        raise ValueError(
            f"num_segments={num_segments} merges steps, and this rollout rewrites tokens: a position may be written in "
            "several of them; use likelihood=Trajectory(num_segments=None), which scores every step"
        )
    events = recorded_events(rollout)
    return events.step.amax(-1).to(rollout.unmask_step), events.step[..., 0].to(rollout.unmask_step)


def event_views(rollout: Rollout, step: Int[Tensor, "S B T"]) -> Views:
    """Return one view for each of S steps. It has the canvas before the step, and scores the tokens written.

    Raises:
        ValueError: The recorded events do not determine a likelihood, or lack the support of a filter.
    """
    if recorded_events(rollout).depends_on_tokens:
        raise ValueError(
            "likelihood=Trajectory() replays events, but which positions this rollout rewrote depends on the tokens "
            "drawn (Edit, Confidence), and its ratios would be biased: use SoftEdit or Remask with rank=RandomOrder(), "
            "or OneStep(), ELBO() or Coupled()"
        )
    params = rollout.sampling_params
    if params.filters and params.support != "per_policy":
        raise ValueError(
            f"sampling_support={params.support!r}: a rollout that revises records what a filter kept only "
            "for each position's last write; use sampling_support='per_policy'"
        )
    canvases = [canvas_at(rollout, step=view_step) for view_step in step]
    masked = torch.stack([before < 0 for before, _ in canvases])
    scored = torch.stack([written >= 0 for _, written in canvases])
    return Views(masked, scored.float(), features=(CanvasReplay(step),))
