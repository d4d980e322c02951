"""Views of a rollout of several turns: a view of an earlier turn does not see the columns of later ones.

A sampler of turns sets `Rollout.first_step`: tokens that a tool wrote and positions of a later turn come onto the
canvas after the earlier turn's steps. `Trajectory()` hides them from the views of these steps, which the sampler's
forwards did not have either.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.likelihoods.views import ForwardPlan, View, ViewFeature
from dllm_rl.models.base import Policy
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Views


@dataclass(frozen=True)
class VisibleColumns(ViewFeature):
    """Feature of views that see only the columns in `visible`."""

    visible: Bool[Tensor, "N B T"]

    def apply_to(self, view: View, number: int) -> View:
        forward = partial(_forward_visible, forward=view.forward, visible=self.visible[number])
        # The rows of a group may see different columns.
        return replace(view, forward=forward, share=False)


def _forward_visible(
    policy: Policy, plan: ForwardPlan, *inputs: Tensor, forward: Callable[..., Tensor], visible: Bool[Tensor, "B T"]
) -> Float[Tensor, "R T D"]:
    tokens, attention_mask, *others = inputs
    return forward(policy, plan, tokens, attention_mask & visible[plan.rows], *others)


def hide_later_columns(rollout: Rollout, views: Views) -> Views:
    """Return views of several turns that do not see columns that came onto the canvas after the step that they score.

    Each row of a view must score positions of one step.
    """
    assert rollout.first_step is not None
    steps = torch.where(views.coefficients != 0, rollout.unmask_step, torch.iinfo(torch.long).max)
    visible = rollout.first_step <= steps.amin(-1, keepdim=True)  # a row that a view does not score sees all columns
    return replace(views, features=(*views.features, VisibleColumns(visible)))


def check_turns(policy: Policy, views: Views) -> None:
    """Raise ValueError for views of a rollout of several turns that would see later turns."""
    if policy.spec.attention != "causal" and not any(isinstance(feature, VisibleColumns) for feature in views.features):
        raise ValueError(
            "likelihood: the rollout has several turns (first_step), and this estimator's views of a turn would see "
            "the later ones; use Trajectory() with one view per step"
        )
