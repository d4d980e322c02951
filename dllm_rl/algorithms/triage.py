"""TRIAGE (arXiv 2610.07043): give a smaller weight only to the tokens that make a learner with low-bit rollouts drift.

docs/methods.md explains the tags [digest] and [ours].
"""

import torch
import torch.nn.functional as F

from dllm_rl.algorithms.correctors import Corrector, TokenStats, TokenWeights, drop_nonfinite
from dllm_rl.algorithms.losses import exp_ratio
from dllm_rl.records import option


class Triage(Corrector):
    """Damp unlikely tokens in completions with a negative advantage: w = rho for dangerous tokens, w = 1 for others.

    rho = exp(log_mismatch). A token is dangerous if its advantage is negative, its probability is lower under the
    learner than under the rollout policy (rho < 1), and the gate of its window is open. Use it if a low-bit rollout
    makes training drift: only the tokens that cause the drift get a smaller weight. It logs triage/open_fraction and
    triage/damped_fraction.

    The learner drifts if updates further lower the probability of tokens that it already finds unlikely. The choice of
    these tokens, and one gate per window of 64 tokens, are from the paper [digest]. The weight rho, and the rule that a
    window's gate is open if its mean |log_mismatch| exceeds `gate`, are [ours].

    Args:
        gate: Mean |log_mismatch| of a window, in nats, above which its tokens are damped; at least 0. Default: 0.02.
        window: Tokens per window, at least 1. Default: 64.

    Source: TRIAGE, arXiv 2610.07043 [digest].
    """

    gate: float = option(default=0.02, at_least=0)
    window: int = option(default=64, at_least=1)

    def weights(self, stats: TokenStats) -> TokenWeights:
        log_mismatch, finite_mask, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
        # Windows of tokens to correct, without padding.
        window_index = stats.mask.cumsum(-1).sub(1).clamp(min=0) // self.window
        in_window = F.one_hot(window_index) * finite_mask[..., None]  # (B, T, windows per row)
        num_tokens = in_window.sum(1).clamp(min=1)
        mean = (in_window * log_mismatch.abs().double()[..., None]).sum(1) / num_tokens
        is_open = (mean > self.gate).gather(1, window_index)
        damped = finite_mask & is_open & (log_mismatch < 0) & (stats.advantages < 0)[:, None]
        total = max(finite_mask.sum().item(), 1)
        metrics["triage/open_fraction"] = (finite_mask & is_open).sum().item() / total
        metrics["triage/damped_fraction"] = damped.sum().item() / total
        return TokenWeights(torch.where(damped, exp_ratio(log_mismatch), 1), finite_mask, metrics)
