"""Two control variates of the ELBO: a fixed coefficient, and one fitted on other masks of the same row.

python -m recipes.examples.control_variates     checks both with `check_estimator`
RECIPE.py --likelihood recipes.examples.control_variates.Controlled --likelihood.coefficient 0.5
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dllm_rl import ELBO, LikelihoodEstimator, Prompts, Unmask, tiny_masked_lm
from dllm_rl.testing import check_estimator
from dllm_rl.types.scoring import Views, ViewTensors

base = ELBO(num_samples=4, stratified=False)  # four independent masks m_n with coefficients w_n


class Controlled(LikelihoodEstimator):
    """sum_n w_n (l(m_n) - c l(all)) + c l(all), where c is `coefficient`."""

    coefficient: float = 0.5

    def draw_views(self, rollout, generator):
        """Return the views; "all" is a first view that masks all tokens."""
        views, whole = base.draw_views(rollout, generator), rollout.completion_mask[None]  # (4, B, T), (1, B, T)
        control = self.coefficient * (whole.float() - views.coefficients.sum(0, keepdim=True))  # mean over masks: 0
        return Views(torch.cat([whole, views.masked]), torch.cat([control, views.coefficients]))


@dataclass(frozen=True)
class Advantages(ViewTensors):
    advantages: Tensor  # (B,)


class CrossFitted(LikelihoodEstimator):
    """The same, with c of a row fitted on two of its masks for the other two; 0 where the advantage is positive."""

    def draw_views(self, rollout, generator):
        views, whole = base.draw_views(rollout, generator), rollout.completion_mask[None]
        feature = Advantages(torch.zeros(len(rollout.tokens)))
        masked, coefficients = torch.cat([whole, views.masked]), torch.cat([whole.float(), views.coefficients])
        return Views(masked, coefficients, features=(feature,))

    def with_advantages(self, views, advantages):
        return replace(views, features=(Advantages(advantages),))

    def combine(self, scores, views):  # scores (5, B, T) -> (B, T)
        control, weights = scores[0] * views.coefficients[0], views.coefficients[1:]
        mean = control.sum(-1).detach()  # (B,): of 4 w l(all)
        pair = [(4 * weights * each).sum(-1).detach() - mean for each in (scores[1:], scores[:1])]  # (4, B) each
        total = torch.zeros_like(control)
        for target, source in ((slice(0, 2), slice(2, 4)), (slice(2, 4), slice(0, 2))):
            estimate, baseline = (each[source] for each in pair)
            c = (estimate * baseline).sum(0) / baseline.square().sum(0).clamp(min=1e-9)  # (B,), without a gradient
            c = torch.where(views.features[0].advantages > 0, 0, c.clamp(0, 1))[:, None]
            total = total + (weights[target] * (scores[1:][target] - c * scores[0])).sum(0) + c * control / 2
        return total


cross_fitted = CrossFitted()
policy = tiny_masked_lm(characters="1234.=")
prompts = Prompts.from_ids([[3, 4, 5], [6, 5, 4]], pad_id=policy.pad_id, num_generations=2, seeds=range(4))
rollout = Unmask(max_new_tokens=6, temperature=1.0)(policy, prompts, torch.Generator())

if __name__ == "__main__":
    for estimator in (Controlled(), cross_fitted):
        check_estimator(estimator, policy, rollout)
