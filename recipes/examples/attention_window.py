"""An attention mask of one's own: `ELBO` whose forwards let a token see only the `width` tokens on either side.

python -m recipes.examples.attention_window     checks it with `check_estimator`
RECIPE.py --likelihood recipes.examples.attention_window.Windowed --likelihood.width 8
"""

from dataclasses import dataclass, replace

import torch

from dllm_rl import ELBO, LikelihoodEstimator, Prompts, Unmask, option, tiny_masked_lm
from dllm_rl.likelihoods.views import ViewFeature
from dllm_rl.models.base import position_ids, shift_states
from dllm_rl.testing import check_estimator


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


class Windowed(LikelihoodEstimator):
    width: int = option(default=2, at_least=0)
    supported_attention = ("full",)  # `seen` replaces the family's mask

    def draw_views(self, rollout, generator):
        return replace(ELBO().draw_views(rollout, generator), features=(Window(self.width),))


policy = tiny_masked_lm(characters="1234.=")
prompts = Prompts.from_ids([[3, 4, 5], [6, 5, 4]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
rollout = Unmask(max_new_tokens=6, temperature=1.0)(policy, prompts, torch.Generator())

if __name__ == "__main__":
    check_estimator(Windowed(), policy, rollout)
