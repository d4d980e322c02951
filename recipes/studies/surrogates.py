"""Published surrogates that are no part of the package: a method needs no file there.

What a surrogate takes: `dllm_rl.algorithms.losses`. On the command line one is named by module and function:

    python recipes/sudoku_unique.py --loss recipes.studies.surrogates:gdsd --loss_reduction sequence_mean
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.algorithms.losses import exp_ratio, ppo_clip, row_mean
from dllm_rl.bounds import Bound, bounded


@bounded(delta=Bound(above=0), delta_high=Bound(above=0), max_ratio=Bound(at_least=1))
def dppo_tv(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    *,
    delta: float = 0.2,
    delta_high: float | None = None,
    max_ratio: float = 20.0,
) -> Float[Tensor, "B T"]:
    """sg(min(r, max_ratio)) A grad log p where the token's PROBABILITY has not moved too far, no gradient elsewhere.

        A > 0: p - p_old <= delta_high        A <= 0: p - p_old >= -delta
    |p - p_old| is the total variation between "this token" and "any other": a rare token may change its ratio by much,
    a likely one may not. The value is min(r, max_ratio) A inside, 0 outside. For log-probs of tokens (trajectory with
    every step, causal): contributions of a bound are no probabilities. DPPO-Binary-TV, arXiv 2602.04879, its authors'
    code [paper]; there p_old is the rollout's: with old_logprobs="rollout" it is here.

    delta       how far a probability may have fallen (or risen) and keep its gradient
    delta_high  how far it may have risen; None: delta
    max_ratio   bound on the ratio
    """
    shift = (log_ratio.detach() + old_logprobs).exp() - old_logprobs.exp()
    up, down = shift <= (delta if delta_high is None else delta_high), shift >= -delta
    inside = torch.where((advantages > 0)[:, None], up, down)
    weight = exp_ratio(log_ratio.detach()).clamp(max=max_ratio)
    return torch.where(inside, _carried(weight, advantages, log_ratio), 0)


@bounded(epsilon=Bound(above=0), epsilon_high=Bound(above=0), delta=Bound(at_least=1))
def bgpo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = 3.0,
) -> Float[Tensor, "B T"]:
    """ppo_clip on the row's ratio as BGPO bounds it: r = 1 + D where A > 0, exp(D) elsewhere, D = mean_t log_ratio.

    1 + D <= exp(D), so that r A is never above exp(D) A; on-policy both have the same value and gradient. Linearity is
    there so that masks can be taken one at a time, which the constant-memory update does for any loss: what is left is
    how off-policy rows count. Where A < 0, BGPO takes the mean over masks of exp of each one's D, and this the exp of
    their mean, which that bounds [ours]; with one mask they are the same. For the aggregation `sequence`. Source:
    arXiv 2510.11683, its abstract [paper]; 1 + D, the division by the length and the clips in a third party's code
    [digest].

    epsilon, epsilon_high  how far the ratio may fall below 1, and rise above it (None: alike), and keep its gradient
    delta         bound of the unclipped ratio, above 1 + epsilon_high; None: none
    """
    mean = row_mean(log_ratio, mask)
    ratio = torch.where((advantages > 0)[:, None], 1 + mean, exp_ratio(mean))
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])


@bounded(epsilon=Bound(above=0), epsilon_high=Bound(above=0))
def ebpo(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Float[Tensor, "B T"]:
    """ppo_clip on the ratio of the row's whole estimate, r = exp(sum_t log_ratio), not normalized by its length.

    EBPO's objective (LLaDA2.1, arXiv 2602.08676, eq. 4 and 5 [paper]), whose log-ratio is a weighted sum over masks and
    blocks of a block-wise ELBO: what an estimator's contributions add up to. For the aggregation `sequence`. The ranges
    are not published; ratios of sums move with the length, and 0.2 is [ours].

    epsilon, epsilon_high  how far the ratio may fall below 1, and rise above it (None: alike), and keep its gradient
    """
    total = row_sum(log_ratio, mask)
    return ppo_clip(total, advantages, mask, epsilon=epsilon, epsilon_high=epsilon_high)


@bounded(psi=Bound(above=0), epsilon=Bound(above=0, below=1), epsilon_high=Bound(above=0))
def gdsd(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    *,
    psi: float = 0.04,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Float[Tensor, "B T"]:
    """-(clamp(D, log(1 - epsilon), log(1 + epsilon_high)) / L - psi A)^2 / (2 psi), D = sum_t log_ratio, L tokens.

    A regression of the log-ratio on the advantage: its gradient is (A - D / (L psi)) grad mean_t log p inside the range
    and exactly 0 outside, so that a row comes to rest at D = L psi A. GDSD (arXiv 2605.29398), its authors' code
    [paper] with one mask (several are averaged before the square here [ours]), divided by 2 psi so that on-policy the
    gradient is A grad log p [ours]. The variant GDSD-TLC, on logits less their mean over the vocabulary, needs more
    than log-probs of tokens and is not here. For the aggregation `sequence`.

    psi      nats a token that an advantage of 1 asks for, above 0
    epsilon, epsilon_high  how far exp(D) may fall below 1, and rise above it (None: alike), and keep its gradient
    """
    low, high = math.log1p(-epsilon), math.log1p(epsilon if epsilon_high is None else epsilon_high)
    length = mask.sum(-1, keepdim=True).clamp(min=1)
    moved = row_sum(log_ratio, mask).clamp(low, high) / length
    return -(moved - psi * advantages[:, None]).square() / (2 * psi)


@bounded(max_ratio=Bound(at_least=1))
def stable_drl(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    sum_over_processes: Callable[[Tensor], Tensor],
    *,
    max_ratio: float = 5.0,
) -> Float[Tensor, "B T"]:
    """sg(w) A grad log p, w = min(r, max_ratio) over its mean in the global batch, r the row's exp(mean_t log_ratio).

    The ratio is clipped whatever the sign of A, and weights that add up to the number of rows keep the update among
    those of its rows, however noisy the ratios are. The value is w A. The mean is over the rows that have a token, of
    all processes, at the current weights. For the aggregation `sequence`. StableDRL (arXiv 2603.06743), its authors'
    code [paper]: clipped from above alone; there each process normalizes by itself, the global batch is [digest].

    max_ratio  bound on the row's ratio, before it is normalized
    """
    rows = mask.any(-1, keepdim=True)
    ratio = exp_ratio(_mean(log_ratio, mask)).clamp(max=max_ratio)
    total, count = sum_over_processes(torch.stack([torch.where(rows, ratio, 0).double().sum(), rows.sum().double()]))
    weight = ratio * (count / total.clamp(min=1e-30)).to(ratio)
    return _carried(weight, advantages, log_ratio)


@bounded(bound=Bound(at_least=0), epsilon=Bound(above=0), epsilon_high=Bound(above=0), delta=Bound(at_least=1))
def sequence_masked(
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    mask: Bool[Tensor, "B T"],
    log_mismatch: Float[Tensor, "B T"],
    *,
    bound: float = 0.5,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> Float[Tensor, "B T"]:
    """ppo_clip without the rows that the policy has left: 0 where A < 0 and mean_t (logp_rollout - logp) > bound.

    logp is the current one, so that both what quantization and what the updates since the rollout have moved counts:
    the mean is -mean_t (log_ratio + log_mismatch). Denominators stay. Off-policy sequence masking of DeepSeek-V3.2
    (arXiv 2512.02556, eq. 9), read in TRL's code [digest]; the paper's KL term: use_bias_correction_kl.

    bound  the largest mean, nats a token, that a row with a negative advantage may have
    epsilon, epsilon_high, delta  of `ppo_clip`
    """
    behind = -_mean(log_ratio + log_mismatch, mask)
    dropped = (advantages < 0)[:, None] & (behind > bound)
    kept = ppo_clip(log_ratio, advantages, mask, epsilon=epsilon, epsilon_high=epsilon_high, delta=delta)
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
