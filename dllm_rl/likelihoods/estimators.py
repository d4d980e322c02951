"""The sequence-likelihood estimators that there are. What an estimator is: `likelihoods.estimator`.

Cost is in forwards of the whole batch per scoring.

Notation: y a completion of L tokens, m a set of its positions, l_i(m) = log p(y_i | prompt, y with m masked), nats.
The any-order ELBO is  sum_{k=1..L} (1/k) E_{|m|=k} sum_{i in m} l_i(m)  <=  log p(y) = log E_order prod_i p(y_i | those
before it in the order).
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dllm_rl.bounds import Bound, bounded
from dllm_rl.likelihoods import masks
from dllm_rl.likelihoods.estimator import LikelihoodEstimator, weighted_sum
from dllm_rl.likelihoods.events import check_merges, last_and_first_step, replayed
from dllm_rl.likelihoods.order import with_order
from dllm_rl.likelihoods.packed import packed_views
from dllm_rl.likelihoods.renoise import SELF_CONDITIONING, renoised_view
from dllm_rl.likelihoods.trajectory import all_segments, sampled_segments, segments, views_of_segments
from dllm_rl.members import configurable
from dllm_rl.types import Rollout, Views


@configurable
def causal() -> LikelihoodEstimator:
    """Log p(y) = sum_t log p(y_t | prompt, y_<t). One forward, exact. For autoregressive policies."""
    return LikelihoodEstimator("causal", masks.draw_nothing, supported_attention=("causal",), is_random=False)


@configurable
@bounded(prompt_mask=Bound(at_least=0, below=1))
def one_step(*, prompt_mask: float = 0.15) -> LikelihoodEstimator:
    """d1's mean-field estimate: sum_i l_i(all of y), each prompt token masked with probability `prompt_mask`.

    Args:
        prompt_mask: Share of the prompt's tokens that are masked, in [0, 1).

    One forward (per group at prompt_mask=0). Biased: tokens count as independent. Source: d1, arXiv 2504.12216 [paper].
    """
    draw = partial(masks.draw_everything, prompt_mask=prompt_mask)
    return LikelihoodEstimator("one_step", draw, is_random=prompt_mask > 0)


@configurable
@bounded(num_samples=Bound(at_least=1), informed_masking=Bound(above=0))
def elbo(
    *,
    num_samples: int = 4,
    stratified: bool = True,
    antithetic: bool = False,
    informed_masking: float | None = None,
) -> LikelihoodEstimator:
    """The any-order ELBO by masks of exactly k tokens: the mean over samples of (L/k) sum_{i in m} l_i(m), k ~ U{1..L}.

    Unbiased for the ELBO, high variance. Sources: LLaDA eq. 14, VRPO [paper].

    Args:
        num_samples: Masks, and forwards.
        stratified: K spread evenly over 1..L among the samples.
        antithetic: Samples in pairs (num_samples even): k and L+1-k, from both ends of an order; all tokens are scored.
        informed_masking: D of Informed Masking (arXiv 2609.25927 [paper]), 1.5 there: m is drawn without replacement
            with q_i proportional to exp(d (max c - c_i) / (max c - min c)), where c_i is the change of confidence that
            writing i made within 10 places (`unmask(confidence_radius=10)` records it). The expectation is then sum_k
            (1/k) E_{m ~ q, |m|=k} sum_{i in m} l_i(m), which is not the ELBO: tokens that changed little count more.
            The change is signed, of open positions of the block [ours]. None: any m alike.
    """
    if antithetic and num_samples % 2:  # samples come in pairs
        raise ValueError(f"num_samples={num_samples} must be even with antithetic=True; use {num_samples + 1}")
    draw = partial(
        masks.draw_exact,
        num_samples=num_samples,
        stratified=stratified,
        antithetic=antithetic,
        informed_masking=informed_masking,
    )
    return LikelihoodEstimator("elbo", draw, reads_confidence_change=informed_masking is not None)


@configurable
@bounded(num_samples=Bound(at_least=1), informed_masking=Bound(above=0))
def coupled(*, num_samples: int = 1, informed_masking: float | None = None) -> LikelihoodEstimator:
    """The any-order ELBO from a mask and its complement, so that every token is scored.

    k is stratified over 0..L, m holds exactly k of the L completion positions (a term with an empty set is 0):
        ( sum_{i in m} l_i(m) (L+1)/k + sum_{i not in m} l_i(m^c) (L+1)/(L-k) ) / 2
    Unbiased for the ELBO. Source: ESPO's form [paper].

    Args:
        num_samples: Pairs of masks, of two forwards each.
        informed_masking: As of `elbo`: m is drawn so, and m^c is what it leaves; the expectation is then not the ELBO.
    """
    draw = partial(masks.draw_coupled, num_samples=num_samples, informed_masking=informed_masking)
    return LikelihoodEstimator("coupled", draw, reads_confidence_change=informed_masking is not None)


@configurable
@bounded(nodes=Bound(at_least=1))
def quadrature(*, nodes: int = 3) -> LikelihoodEstimator:
    """The any-order ELBO, integral_0^1 E_m[(L/k) sum_{i in m} l_i(m)] dt, by Gauss-Legendre nodes t_n with weights w_n:
    sum_n w_n (L/k_n) sum_{i in m_n} l_i(m_n), k_n = floor(t_n L) + 1, one random mask of k_n tokens per node.

    No variance from k. Bias from the quadrature rule and from rounding k_n, which more masks do not reduce. Sources:
    SDMC of the diffusion GDPO (not the normalisation `decoupled`), arXiv 2510.08554 [paper]; exactly k masked tokens
    instead of independent ones [ours].

    Args:
        nodes: Of the quadrature: masks, and forwards.
    """
    return LikelihoodEstimator("quadrature", partial(masks.draw_quadrature, nodes=nodes))


@configurable
@bounded(block_size=Bound(at_least=1), num_samples=Bound(at_least=1))
def block_elbo(*, block_size: int, num_samples: int = 2) -> LikelihoodEstimator:
    """The ELBO of block-wise decoding: blocks before a chosen one clean, a mask inside it, later ones fully masked.

    With blocks b = 1..N of L_b tokens, k ~ U{1..L_b} and m in b with |m| = k, the mean over samples of
        N (L_b / k) sum_{i in m} l_i(m and all later blocks),  b ~ U{1..N}, stratified over the samples.
    Unbiased for a lower bound of the block-wise sampler's likelihood: the sum of each block's any-order ELBO given
    earlier blocks. Blocks start at the completion, as in `unmask`. Source: SPG, arXiv 2510.09541 [paper], whose code
    also scores later blocks [ours: only the chosen one].

    Args:
        block_size: Tokens of a block.
        num_samples: Masks, and forwards; as many as there are blocks score every block.
    """
    return LikelihoodEstimator("block_elbo", partial(masks.draw_block, block_size=block_size, num_samples=num_samples))


def upper_bound(scores: Float[Tensor, "N B T"], views: Views, *, beta: float) -> Float[Tensor, "B T"]:
    """(1/beta) log sum_n weight_n p_i(view n)^beta per position, nats; 0 where no view scores it."""
    scored = views.coefficients > 0
    # A position that no view scores would be log 0, with a NaN gradient: its terms are replaced before the log too.
    logits = torch.where(scored, beta * scores + views.coefficients.where(scored, 1).log(), -torch.inf)
    nowhere = ~scored.any(0)
    return torch.where(nowhere, 0, logits.masked_fill(nowhere, 0).logsumexp(0) / beta)


def mixed_bounds(scores: Float[Tensor, "N B T"], views: Views, *, beta: float) -> Float[Tensor, "B T"]:
    """The lower bound mixed with the upper one by `upper_bound_weight`, per position, nats."""
    lower = weighted_sum(scores, views)
    if views.upper_bound_weight is None:  # advantages are not known yet
        return lower
    return torch.lerp(lower, upper_bound(scores, views, beta=beta), views.upper_bound_weight[:, None].to(lower))


def upper_where_negative(views: Views, advantages: Float[Tensor, " B"], *, mix: float) -> Views:
    """The noise with upper_bound_weight = mix in the rows whose advantage is negative, 0 in the others."""
    return replace(views, upper_bound_weight=mix * (advantages < 0).to(views.coefficients))


@configurable
@bounded(beta=Bound(above=0))
def eubo(*, beta: float = 1.5, base: LikelihoodEstimator | None = None) -> LikelihoodEstimator:
    """SPG's evidence upper bound: the contribution of position i is (1/beta) log sum_n w_n p_i(m_n)^beta, over the
    views n of `base` that mask i, with their weights w_n (SPG writes it as a mean over masks of p_i^beta / t).

    Args:
        base: Elbo, coupled (None: `coupled()`), quadrature or block_elbo: the same masks, and their weights for 1/t.
        beta: Exponent of the probabilities, above 0.

    Cost as base. Over all masks it is at least the ELBO, for every beta > 0 (Jensen). It is at least log p in random
    order if beta >= L (Hoelder), or if all conditionals of the model come from one joint distribution, which those of a
    network do not. In other cases log p may lie above it [ours]; SPG's theorem for beta >= 1 adds a constant. Few masks
    bias the log of a mean downwards. Source: SPG, arXiv 2510.09541 [paper], whose code divides by the scored tokens.
    """
    base = coupled() if base is None else base
    made = replace(base, name="eubo", exact_for_sampler=False, scores_order=False)
    return replace(made, combine=partial(upper_bound, beta=beta))


@configurable
@bounded(beta=Bound(above=0), mix=Bound(at_least=0, at_most=1))
def sandwich(*, beta: float = 1.5, mix: float = 0.5, base: LikelihoodEstimator | None = None) -> LikelihoodEstimator:
    """SPG's pair of bounds: the ELBO where the advantage is >= 0, mix * EUBO + (1 - mix) * ELBO where it is negative.

    Both bounds come from the same views of `base` (see `eubo`), at its cost. Without `with_advantages` the ELBO alone.

    Args:
        beta: Exponent of the upper bound, above 0.
        mix: Weight of the upper bound, in [0, 1].
        base: The estimate whose masks both bounds take; None: `coupled()`.

    Source: SPG, arXiv 2510.09541, and its code [paper]; inside a clipped ratio, per token and unnormalised [ours].
    """
    base = coupled() if base is None else base
    combine = partial(mixed_bounds, beta=beta)
    with_advantages = partial(upper_where_negative, mix=mix)
    made = replace(base, name="sandwich", exact_for_sampler=False, scores_order=False)
    return replace(made, combine=combine, with_advantages=with_advantages)


@configurable
@bounded(num_segments=Bound(at_least=1), block_size=Bound(at_least=1), num_sampled_steps=Bound(at_least=1))
def trajectory(
    *,
    num_segments: int | None = None,
    block_size: int | None = None,
    include_order: bool = True,
    num_sampled_steps: int | None = None,
    self_conditioning: str = "detached",
) -> LikelihoodEstimator:
    """Replay the recorded unmasking: in segment s, score the tokens committed there, everything from s on masked.

    One forward per segment. With one segment per step, the exact log-probability of the tokens given the order.
    Sources: TraceRL, d2's StepMerge [paper]. Under the sampler's rank `confidence` the order depends on the draws: each
    step then also scores the positions left masked, by the probability of a lower-ranked draw (`models.order` [ours]);
    under `plackett_luce` the draw of positions, under the commit rule `soft_threshold` the set of a step. The row's sum
    is then the exact log-probability of tokens AND order.
    A rollout that revises (`remask`, `soft_edit`) is replayed event by event [ours]: the canvas of each step is
    rebuilt, and a position's contribution is the sum over its writings (docs/order.md).
    A rollout of `renoise` is replayed in one view; a position's contribution is the sum over its accepted draws [ours].

    Args:
        num_segments: Parts into which a row's steps are merged: step s of the row's n steps, counted over all its
            blocks, goes to part floor(s * num_segments / n). None: one per step, which is exact, and all that a rollout
            that revises can have.
        block_size: Of a block-causal model: the same likelihood from one packed forward per place of a step in its
            block, all blocks together; num_segments then counts the segments of a block.
        include_order: Also the order's log-probability, where the rollout recorded one (rank=confidence or
            plackett_luce with commit=schedule or late_schedule; commit=soft_threshold) and num_segments is None.
        num_sampled_steps: Steps (or segments) of each row that are scored, drawn without replacement: an unbiased
            estimate [ours] of the row's sum and, on-policy, of its gradient. None: all. With `unmask(block_size=1)`,
            all are JustGRPO (arXiv 2601.15165, its authors' code [paper]).
        self_conditioning: Of `renoise`, whose steps see the logits of the step before. detached: the gradient stops
            there, and memory is of one step; full: it goes back through them, and memory is of all steps. The log-probs
            are the same.
    """
    if self_conditioning not in SELF_CONDITIONING:
        raise ValueError(f"self_conditioning={self_conditioning!r} must be 'detached' or 'full'")
    if num_sampled_steps is not None and block_size is not None:
        raise ValueError(
            f"num_sampled_steps={num_sampled_steps} draws steps, and block_size={block_size} packs them: drop one"
        )
    exact = num_segments is None and num_sampled_steps is None  # one view per step
    scores_order = exact and include_order  # a merged segment is no step of the sampler
    attention: tuple[str, ...] = ("full", "block_causal") if block_size is None else ("block_causal",)
    if exact and block_size is None:
        attention = (*attention, "encoder_decoder")
    draw = partial(
        trajectory_views,
        num_segments=num_segments,
        num_sampled_steps=num_sampled_steps,
        block_size=block_size,
        scores_order=scores_order,
        full=self_conditioning == "full",
    )
    return LikelihoodEstimator(
        "trajectory",
        draw,
        supported_attention=attention,
        exact_for_sampler=exact,
        scores_order=scores_order,
        is_random=num_sampled_steps is not None,
        block_size=block_size,
    )


def trajectory_views(
    rollout: Rollout,
    generator: Generator,
    *,
    num_segments: int | None,
    num_sampled_steps: int | None,
    block_size: int | None,
    scores_order: bool,
    full: bool,
) -> Views:
    """The views of `trajectory()`, whose arguments these are; `full`: of the self-conditioning."""
    if rollout.renoised is not None:
        return renoised_view(rollout, full=full)
    check_merges(rollout, num_segments)
    if block_size is not None:
        views = packed_views(rollout, num_segments=num_segments, block_size=block_size)
    else:
        step, _ = last_and_first_step(rollout)
        segment = segments(step, num_segments)
        index, coefficient = all_segments(segment), None
        if num_sampled_steps is not None:
            index, coefficient = sampled_segments(segment, rollout, generator, num_sampled_steps)
        if rollout.events is None:
            views = views_of_segments(rollout, segment, index)
        else:
            views = replayed(rollout, index.expand(-1, *segment.shape))
        if coefficient is not None:
            views = replace(views, coefficients=views.coefficients * coefficient)
    return with_order(rollout, views) if scores_order else views
