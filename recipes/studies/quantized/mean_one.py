"""A corrector for studies: weights that change no view's size, only which of its tokens count more."""

import torch

from dllm_rl.algorithms.correctors import TIS, Corrector, TokenStats, TokenWeights


class MeanOne(Corrector):
    """A corrector's weights, divided by their mean over the tokens of the batch that one view scores.

    `Trajectory(num_segments=num_views)` scores the tokens of step s of `num_steps` in view s * num_views // num_steps.
    Weights from an estimate may be small or large throughout a view; this keeps the view's part of the gradient.

    Args:
        num_views: Number of views.
        num_steps: Number of denoising steps of a row.
        corrector: The corrector. Default: TIS().
    """

    num_views: int
    num_steps: int
    corrector: Corrector = TIS()

    def weights(self, stats: TokenStats) -> TokenWeights:
        weights, keep, metrics = self.corrector.weights(stats)
        view = stats.unmask_step * self.num_views // self.num_steps
        weights = weights.clone()
        for number in range(self.num_views):
            scored = keep & (view == number)
            if scored.any() and (size := weights[scored].mean()) > 0:
                weights = torch.where(scored, weights / size, weights)
        return TokenWeights(weights, keep, metrics)
