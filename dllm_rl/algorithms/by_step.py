"""Correctors per denoising step: the mismatch of early steps, which see few tokens, differs from that of late steps.

docs/methods.md explains the tag [ours].
"""

import torch

from dllm_rl.algorithms.correctors import AIS, Corrector, TokenStats, TokenWeights
from dllm_rl.algorithms.losses import Loss, LossReduction


class ByStep(Corrector):
    """A corrector whose statistics cover one denoising step at a time [ours].

    Use it if the mismatch differs between early and late steps. The lambda of `AIS`, sequence ratios and sequence
    rejection are then computed over the tokens of one step. A corrector that weights each token by its ratio alone
    (`TIS` and `IcePop` by default) does not change. Each metric is averaged over the steps, weighted by their numbers
    of tokens.

    Args:
        corrector: Corrector to apply per step; its loss and reduction are kept. Default: AIS().
    """

    corrector: Corrector = AIS()

    @property
    def loss(self) -> Loss | None:
        return self.corrector.loss

    @property
    def loss_reduction(self) -> LossReduction | None:
        return self.corrector.loss_reduction

    @property
    def align_forward(self) -> bool:
        return self.corrector.align_forward

    @property
    def needs_entropy(self) -> bool:
        return self.corrector.needs_entropy

    @property
    def has_weights(self) -> bool:
        return self.corrector.has_weights

    def weights(self, stats: TokenStats) -> TokenWeights:
        weights = torch.ones_like(stats.log_mismatch).detach()
        loss_mask = torch.zeros_like(stats.mask)
        weighted_sums: dict[str, float] = {}
        steps, counts = stats.unmask_step[stats.mask].unique(return_counts=True)
        for step, count in zip(steps.tolist(), counts.tolist(), strict=True):
            step_mask = stats.mask & (stats.unmask_step == step)
            result = self.corrector.weights(stats.among(step_mask))
            weights = torch.where(step_mask, result.importance_weights, weights)
            loss_mask |= result.loss_mask
            for name, value in result.metrics.items():
                weighted_sums[name] = weighted_sums.get(name, 0.0) + value * count
        if not weighted_sums:  # no tokens: return the corrector's result for an empty mask
            return self.corrector.weights(stats)
        num_tokens = stats.mask.sum().item()
        return TokenWeights(weights, loss_mask, {name: total / num_tokens for name, total in weighted_sums.items()})
