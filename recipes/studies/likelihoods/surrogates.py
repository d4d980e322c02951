"""Published surrogates that are not part of the package, as classes of `Loss`; and an estimator of the league.

`dllm_rl.algorithms.losses` explains the arguments. On the command line, name a surrogate by its module and class:

    python recipes/sudoku_unique.py --loss recipes.studies.likelihoods.surrogates.GDSD --loss_reduction SequenceMean
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from dllm_rl.algorithms.losses import WIDTH, Loss, PPOClip, clipped_objective, exp_ratio, row_mean
from dllm_rl.likelihoods import masks
from dllm_rl.likelihoods.estimators import LikelihoodEstimator, Trajectory
from dllm_rl.records import option
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Views


class DPPOTV(Loss):
    """sg(min(r, max_ratio)) A grad log p where the token's PROBABILITY has not moved too far, no gradient elsewhere.

        A > 0: p - p_old <= delta_high        A <= 0: p - p_old >= -delta

    |p - p_old| is the total variation between "this token" and "any other": a rare token may change its ratio by much,
    a likely one may not. The value is min(r, max_ratio) A inside, 0 outside. For log-probs of tokens (trajectory with
    every step, causal): contributions of a bound are no probabilities. DPPO-Binary-TV, arXiv 2602.04879, its authors'
    code [paper]; there p_old is the rollout's: with old_logprobs="rollout" it is here.

    Args:
        delta: How far a probability may have fallen (or risen) and keep its gradient. Default: 0.2.
        delta_high: How far it may have risen. None (default): delta.
        max_ratio: Largest ratio, at least 1. Default: 20.
    """

    delta: float = option(default=0.2, above=0)
    delta_high: float | None = option(default=None, above=0)
    max_ratio: float = option(default=20.0, at_least=1)
    inputs = frozenset({"old_logprobs"})

    def __call__(
        self, log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, old_logprobs: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        shift = (log_ratio.detach() + old_logprobs).exp() - old_logprobs.exp()
        up, down = shift <= (self.delta if self.delta_high is None else self.delta_high), shift >= -self.delta
        inside = torch.where((advantages > 0)[:, None], up, down)
        weight = exp_ratio(log_ratio.detach()).clamp(max=self.max_ratio)
        return torch.where(inside, _carried(weight, advantages, log_ratio), 0)


class BGPO(Loss):
    """`PPOClip` on the row's ratio as BGPO bounds it: r = 1 + D where A > 0, exp(D) elsewhere, D = mean_t log_ratio.

    1 + D <= exp(D), so that r A is never above exp(D) A; on-policy both have the same value and gradient. Linearity is
    there so that masks can be taken one at a time, which the constant-memory update does for any loss: what is left is
    how off-policy rows count. Where A < 0, BGPO takes the mean over masks of exp of each one's D, and this the exp of
    their mean, which that bounds [ours]; with one mask they are the same. Use it with `SequenceMean`. Source:
    arXiv 2510.11683, its abstract [paper]; 1 + D, the division by the length and the clips in a third party's code
    [digest].

    Args:
        epsilon: How far the ratio may fall below 1 and keep its gradient. Default: 0.2.
        epsilon_high: How far it may rise above 1. None (default): epsilon.
        delta: Largest unclipped ratio, above 1 + epsilon_high. None: no limit. Default: 3.
    """

    epsilon: float = option(default=0.2, above=0)
    epsilon_high: float | None = option(default=None, above=0)
    delta: float | None = option(default=3.0, at_least=1)

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Float[Tensor, "B T"]:
        mean = row_mean(log_ratio, mask)
        ratio = torch.where((advantages > 0)[:, None], 1 + mean, exp_ratio(mean))
        return clipped_objective(ratio, advantages, self.epsilon, self.epsilon_high, self.delta)


class EBPO(Loss):
    """`PPOClip` on the ratio of the row's whole estimate, r = exp(sum_t log_ratio), not normalized by its length.

    EBPO's objective (LLaDA2.1, arXiv 2602.08676, eq. 4 and 5 [paper]), whose log-ratio is a weighted sum over masks and
    blocks of a block-wise ELBO: what an estimator's contributions add up to. Use it with `SequenceMean`. The ranges are
    not published; ratios of sums move with the length, and 0.2 is [ours].

    Args:
        epsilon: How far the ratio may fall below 1 and keep its gradient. Default: 0.2.
        epsilon_high: How far it may rise above 1. None (default): epsilon.
    """

    epsilon: float = option(default=0.2, at_least=WIDTH)
    epsilon_high: float | None = option(default=None, at_least=WIDTH)

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Float[Tensor, "B T"]:
        ratio = exp_ratio(row_sum(log_ratio, mask))
        return clipped_objective(ratio, advantages, self.epsilon, self.epsilon_high)


class GDSD(Loss):
    """-(clamp(D, log(1 - epsilon), log(1 + epsilon_high)) / L - psi A)^2 / (2 psi), D = sum_t log_ratio, L tokens.

    A regression of the log-ratio on the advantage: its gradient is (A - D / (L psi)) grad mean_t log p inside the range
    and exactly 0 outside, so that a row comes to rest at D = L psi A. GDSD (arXiv 2605.29398), its authors' code
    [paper] with one mask (several are averaged before the square here [ours]), divided by 2 psi so that on-policy the
    gradient is A grad log p [ours]. The variant GDSD-TLC, on logits less their mean over the vocabulary, needs more
    than log-probs of tokens and is not here. Use it with `SequenceMean`.

    Args:
        psi: Nats per token that an advantage of 1 asks for, above 0. Default: 0.04.
        epsilon: How far exp(D) may fall below 1 and keep its gradient. Default: 0.2.
        epsilon_high: How far it may rise above 1. None (default): epsilon.
    """

    psi: float = option(default=0.04, above=0)
    epsilon: float = option(default=0.2, above=0, below=1)
    epsilon_high: float | None = option(default=None, above=0)

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Float[Tensor, "B T"]:
        low = math.log1p(-self.epsilon)
        high = math.log1p(self.epsilon if self.epsilon_high is None else self.epsilon_high)
        length = mask.sum(-1, keepdim=True).clamp(min=1)
        moved = row_sum(log_ratio, mask).clamp(low, high) / length
        return -(moved - self.psi * advantages[:, None]).square() / (2 * self.psi)


class StableDRL(Loss):
    """sg(w) A grad log p, w = min(r, max_ratio) over its mean in the global batch, r the row's exp(mean_t log_ratio).

    The ratio is clipped whatever the sign of A, and weights that add up to the number of rows keep the update among
    those of its rows, however noisy the ratios are. The value is w A. The mean is over the rows that have a token, of
    all processes, at the current weights. Use it with `SequenceMean`. StableDRL (arXiv 2603.06743), its authors'
    code [paper]: clipped from above alone; there each process normalizes by itself, the global batch is [digest].

    Args:
        max_ratio: Largest ratio of a row before it is normalized, at least 1. Default: 5.
    """

    max_ratio: float = option(default=5.0, at_least=1)
    inputs = frozenset({"sum_over_processes"})

    def __call__(
        self, log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, sum_over_processes: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B T"]:
        rows = mask.any(-1, keepdim=True)
        ratio = exp_ratio(_mean(log_ratio, mask)).clamp(max=self.max_ratio)
        total, count = sum_over_processes(
            torch.stack([torch.where(rows, ratio, 0).double().sum(), rows.sum().double()])
        )
        weight = ratio * (count / total.clamp(min=1e-30)).to(ratio)
        return _carried(weight, advantages, log_ratio)


class SequenceMasked(Loss):
    """`PPOClip` without the rows that the policy has left: 0 where A < 0 and mean_t (logp_rollout - logp) > bound.

    logp is the current one, so that both what quantization and what the updates since the rollout have moved counts:
    the mean is -mean_t (log_ratio + log_mismatch). Denominators stay. Off-policy sequence masking of DeepSeek-V3.2
    (arXiv 2512.02556, eq. 9), read in TRL's code [digest]; the paper's KL term: K3(bias_correction=True).

    Args:
        bound: Largest mean, in nats per token, that a row with a negative advantage may have. Default: 0.5.
        epsilon: As in `PPOClip`. Default: 0.2.
        epsilon_high: As in `PPOClip`. None (default): epsilon.
        delta: As in `PPOClip`. None (default): no limit.
    """

    bound: float = option(default=0.5, at_least=0)
    epsilon: float = option(default=0.2, at_least=WIDTH)
    epsilon_high: float | None = option(default=None, at_least=WIDTH)
    delta: float | None = option(default=None, at_least=1)
    inputs = frozenset({"log_mismatch"})

    def check(self) -> None:
        PPOClip(epsilon=self.epsilon, epsilon_high=self.epsilon_high, delta=self.delta)  # which checks them

    def __call__(
        self, log_ratio: Tensor, advantages: Tensor, mask: Tensor, *, log_mismatch: Float[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        behind = -_mean(log_ratio + log_mismatch, mask)
        dropped = (advantages < 0)[:, None] & (behind > self.bound)
        kept = clipped_objective(exp_ratio(log_ratio), advantages, self.epsilon, self.epsilon_high, self.delta)
        return torch.where(dropped, 0, kept)


def row_sum(log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The sum of log_ratio over the row's mask, at every position of the mask; 0 elsewhere. Gradients as in `row_mean`,
    of which it is L times."""
    return row_mean(log_ratio, mask) * mask.sum(-1, keepdim=True)


def _mean(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B 1"]:
    """The mean over the row's mask, without a gradient; 0 for an empty row."""
    return torch.where(mask, x.detach(), 0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def _carried(weight: Tensor, advantages: Tensor, log_ratio: Tensor) -> Tensor:
    """The value w A, with the gradient w A grad log p; w is detached."""
    return weight * advantages[:, None] * (1 + log_ratio - log_ratio.detach())


class UniformSteps(LikelihoodEstimator):
    """k of the N denoising steps of each completion, drawn uniformly; a token's log-prob is multiplied by N / k.

    The sum over a row is unbiased. A ratio is that of the token to the power N / k, on which clips and weights act:
    not so with `Trajectory.variance_growth`.

    Args:
        k: Steps of a completion that are scored.
    """

    k: int = option(at_least=1)

    reads_order = False

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        views = Trajectory(include_order=False).draw_views(rollout, generator)
        exists = (views.coefficients != 0).any(-1).T  # (B, N)
        keys = masks.uniforms_at(exists, masks.row_generators(rollout, generator))
        chosen = exists & (masks.ranks(keys) < self.k)
        weight = chosen * exists.sum(-1, keepdim=True) / chosen.sum(-1, keepdim=True).clamp(min=1)
        return replace(views, coefficients=views.coefficients * weight.T[..., None])
