"""An attention mask of one's own: `elbo` whose forwards let a token see only the `width` tokens on either side.

python -m recipes.examples.attention_window     checks it with `check_estimator`
RECIPE.py --likelihood recipes.examples.attention_window:windowed --likelihood.width 8
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from dllm_rl import LikelihoodEstimator, Prompts, check_estimator, elbo, tiny_masked_lm, unmask
from dllm_rl.likelihoods.views import ViewFeature
from dllm_rl.members import configurable
from dllm_rl.models.base import position_ids
from dllm_rl.models.policy import shift_states


@dataclass(frozen=True)
class Window(ViewFeature):
    width: int

    def apply_to(self, view, number):
        return replace(view, forward=self.forward)

    def forward(self, policy, plan, tokens, attention_mask, clean, read):  # tokens (R, T) of the rows plan.rows
        places = position_ids(attention_mask)
        near = (places[:, :, None] - places[:, None]).abs() <= self.width
        seen = (near & attention_mask[:, None])[:, None]  # (R, 1, T, T): whether a query (axis 2) sees a key (axis 3)
        states = policy.encode(tokens, seen, places)
        return shift_states(states, attention_mask) if policy.spec.shift else states


def draw_windowed(rollout, generator, *, width):
    return replace(elbo().draw_views(rollout, generator), features=(Window(width),))


@configurable
def windowed(*, width: int = 2) -> LikelihoodEstimator:
    draw = partial(draw_windowed, width=width)
    return LikelihoodEstimator("windowed", draw, supported_attention=("full",))  # `seen` replaces the family's mask


policy = tiny_masked_lm(characters="1234.=")
prompts = Prompts.from_ids([[3, 4, 5], [6, 5, 4]], pad_id=policy.pad_id, group_size=2, seeds=range(4))
rollout = unmask(policy, prompts, torch.Generator(), max_new_tokens=6, temperature=1.0)

if __name__ == "__main__":
    check_estimator(windowed(), policy, rollout)
