"""Replay of rollouts of a rule that rewrites (`remask`, `soft_edit`).

Their views see the canvas before a step of each position, and score what that step wrote.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.likelihoods.views import View, ViewFeature
from dllm_rl.types import Rollout, Views


def canvas_at(rollout: Rollout, *, step: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return the tokens before `step` of each position, and those that it wrote; -1 if masked, or not written."""
    events = rollout.events
    if events is None:
        raise ValueError("the rollout has no events: only a sampler that revises records them")
    known = events.step >= 0
    count = (known & (events.step < step[..., None])).sum(-1, keepdim=True)
    latest = events.token.gather(-1, (count - 1).clamp(min=0))
    first = torch.where(known[..., :1], -1, rollout.tokens[..., None])  # a position without events never changed
    before = torch.where(count > 0, latest, first)[..., 0]
    return before, torch.where(events.step == step[..., None], events.token, -1).amax(-1).long()


@dataclass(frozen=True)
class Replayed(ViewFeature):
    """Feature of views that see the tokens before their step, and score those that it wrote."""

    step: Int[Tensor, "N B T"]

    def apply_to(self, view: View, number: int) -> View:
        return replace(view, canvas=partial(canvas_at, step=self.step[number]))

    def sampler_logprobs(self, rollout: Rollout, logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        assert rollout.events is not None, "views are replayed of a rollout with events"
        # Slot by slot, in the order in which views are summed.
        return sum(rollout.events.logprobs.unbind(-1), torch.zeros_like(logprobs))


def last_and_first_step(rollout: Rollout) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Return the last and the first step in which each position changed; -1 off the completion."""
    step = rollout.unmask_step
    if rollout.events is None:
        return step, step
    return rollout.events.step.amax(-1).to(step), rollout.events.step[..., 0].to(step)


def check_merges(rollout: Rollout, num_segments: int | None) -> None:
    """Raise ValueError where steps are merged although a position may be written in several of them."""
    if num_segments is not None and rollout.events is not None:
        raise ValueError(
            f"num_segments={num_segments} merges steps, and this rollout's commit rule may write a position in several "
            "of them (remask, soft_edit): leave num_segments at None; num_sampled_steps scores some of the steps"
        )


def replayed(rollout: Rollout, step: Int[Tensor, "S B T"]) -> Views:
    """Return views of the canvas before each position's step, which score what that step wrote."""
    events = rollout.events
    if events is None or events.depends_on_tokens:
        raise ValueError(
            "likelihood='trajectory' replays events, but which positions this rollout rewrote depends on the tokens "
            "drawn (edit, rank=confidence), and its ratios would be biased: use soft_edit or remask with rank=random, "
            "or one_step(), elbo() or coupled()"
        )
    params = rollout.sampling_params
    if params.filters and params.support != "per_policy":
        raise ValueError(
            f"sampling_support={params.support!r}: a rollout that revises records what a filter kept at each "
            "position's last writing alone; use sampling_support='per_policy'"
        )
    both: Iterator = (canvas_at(rollout, step=each) for each in step)
    before, written = map(torch.stack, zip(*both, strict=True))
    return Views(before < 0, (written >= 0).float(), features=(Replayed(step),))
