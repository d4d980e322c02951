"""The sequence-likelihood estimators of the library. `likelihoods.estimator` defines the interface.

Notation: y is a completion of L tokens, m a set of its positions, and l_i(m) = log p(y_i | prompt, y with m masked), in
nats. The any-order ELBO is a lower bound of log p(y), where p(y) is the likelihood if the tokens are written one at a
time in a random order:
    sum_{k=1..L} (1/k) E_{|m|=k} sum_{i in m} l_i(m)  <=  log p(y),
    p(y) = E_order prod_i p(y_i | the positions before i in the order).

A view is a copy of the batch with the positions of one set m masked. One forward scores some of its positions. The cost
of an estimate is its number of forwards of the full batch. docs/methods.md explains the tags [paper] and [ours].
"""

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dllm_rl.likelihoods import masks
from dllm_rl.likelihoods.estimator import LikelihoodEstimator, weighted_sum
from dllm_rl.likelihoods.events import check_merges, event_views, last_and_first_step
from dllm_rl.likelihoods.order_logprobs import add_order_logprobs
from dllm_rl.likelihoods.packed import packed_views
from dllm_rl.likelihoods.renoising import renoise_views
from dllm_rl.likelihoods.trajectory import all_segments, sampled_segments, segment_views, segments
from dllm_rl.likelihoods.turns import hide_later_columns
from dllm_rl.records import option
from dllm_rl.types import Rollout, Views


class Causal(LikelihoodEstimator):
    """Score a completion of an autoregressive policy: log p(y) = sum_t log p(y_t | prompt, y_<t).

    Use it for policies with causal attention, and only for them. It is exact and costs one forward.
    """

    supported_attention = ("causal",)
    is_random = False

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        return masks.draw_unmasked(rollout, generator)


class OneStep(LikelihoodEstimator):
    """Score all tokens in one forward with the completion fully masked (d1's mean-field estimate).

    Use it if cost matters most: it takes one forward, and with prompt_mask=0 all completions of a prompt share one
    masked input. The estimate is the sum of l_i with all of y masked; each prompt token is masked too, with probability
    `prompt_mask`. It is biased, because it treats the tokens as independent.

    Args:
        prompt_mask: Share of the prompt's tokens that are masked, in [0, 1).

    Source: d1, arXiv 2504.12216 [paper].
    """

    prompt_mask: float = option(default=0.15, at_least=0, below=1)

    @property
    def is_random(self) -> bool:
        return self.prompt_mask > 0

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        return masks.draw_fully_masked(rollout, generator, prompt_mask=self.prompt_mask)


class ELBO(LikelihoodEstimator):
    """Estimate the any-order ELBO with random masks of exactly k tokens.

    Use it as the standard estimate of masked-diffusion models. Some tokens may stay unscored; `antithetic` and
    `Coupled` score every token. The estimate is the mean over samples of (L/k) sum_{i in m} l_i(m), k ~ U{1..L}. It is
    unbiased for the ELBO and has a high variance.

    Args:
        num_samples: Number of masks, and of forwards.
        stratified: Spread k evenly over 1..L across the samples.
        antithetic: Draw samples in pairs: one masks the first k tokens of a random order, the other the last L+1-k
            (one token is in both), so that every token is scored. num_samples must then be even, and informed_masking
            None: the last tokens of an informed order are not drawn with q.
        informed_masking: Strength d, in (0, 1000], of Informed Masking (arXiv 2609.25927 [paper], which uses 1.5). Let
            c_i be the sum of the changes of the model's confidence, from the step that wrote token i to the next step
            of its block, over the block's positions that are near i and still masked. Negative changes are included in
            the sum [ours]. A token with a small c_i, near which the confidence rose little or fell, is masked, and so
            scored, more often: the positions of m are drawn without replacement, with q_i proportional to
            exp(d (max c - c_i) / (max c - min c)). The expectation is then not the ELBO, but sum_k (1/k)
            E_{m ~ q, |m|=k} sum_{i in m} l_i(m). The sampler records c: sample with `Unmask(confidence_radius=10)`,
            where 10 is the largest distance of a nearby position. None: uniform masks.

    Source: LLaDA eq. 14; VRPO [paper].
    """

    num_samples: int = option(default=4, at_least=1)
    stratified: bool = True
    antithetic: bool = False
    informed_masking: float | None = option(default=None, above=0, at_most=1000)

    def check(self) -> None:
        if self.antithetic and self.num_samples % 2:
            raise ValueError(
                f"num_samples={self.num_samples} must be even with antithetic=True; use {self.num_samples + 1}"
            )
        if self.antithetic and self.informed_masking is not None:
            raise ValueError(
                f"informed_masking={self.informed_masking} cannot be combined with antithetic=True: the second mask of "
                "a pair would not be drawn with the chances of informed masking; set antithetic=False, or use Coupled"
            )

    @property
    def reads_confidence_change(self) -> bool:
        return self.informed_masking is not None

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        return masks.draw_k_masked(
            rollout,
            generator,
            num_samples=self.num_samples,
            stratified=self.stratified,
            antithetic=self.antithetic,
            informed_masking=self.informed_masking,
        )


class Coupled(LikelihoodEstimator):
    """Estimate the any-order ELBO from a mask and its complement, so that every token is scored.

    Use it in place of `ELBO` to score every token, at two forwards per sample. The estimate is
        ( sum_{i in m} l_i(m) (L+1)/k + sum_{i not in m} l_i(m^c) (L+1)/(L-k) ) / 2,
    where m has k of the L positions, m^c is its complement, and k is stratified over 0..L. A sum over an empty set is
    0. The estimate is unbiased for the ELBO.

    Args:
        num_samples: Number of pairs of masks. Each pair costs two forwards.
        informed_masking: Strength of Informed Masking, with which m is drawn as in `ELBO`. The expectation is then not
            the ELBO. None: uniform masks.

    Source: the form that ESPO uses [paper].
    """

    num_samples: int = option(default=1, at_least=1)
    informed_masking: float | None = option(default=None, above=0, at_most=1000)

    @property
    def reads_confidence_change(self) -> bool:
        return self.informed_masking is not None

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        return masks.draw_coupled(
            rollout, generator, num_samples=self.num_samples, informed_masking=self.informed_masking
        )


class Quadrature(LikelihoodEstimator):
    """Estimate the any-order ELBO by Gauss-Legendre quadrature over the share of masked tokens.

    Use it to estimate the ELBO in few forwards, if a small bias is acceptable. The ELBO is the integral over t in
    [0, 1] of E_m[(L/k) sum_{i in m} l_i(m)] with k = floor(t L) + 1. With nodes t_n and weights w_n the estimate is
    sum_n w_n (L/k_n) sum_{i in m_n} l_i(m_n), k_n = floor(t_n L) + 1, with one random mask of k_n tokens per node. The
    quadrature rule and the rounding of k_n add a bias that more masks do not reduce.

    Args:
        nodes: Number of nodes of the quadrature; each takes one mask and one forward.

    Source: SDMC, from "GDPO" (arXiv 2510.08554) [paper]; `Decoupled` implements another method named GDPO. The paper
    masks tokens independently; masking exactly k tokens is [ours].
    """

    nodes: int = option(default=3, at_least=1)

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        return masks.draw_quadrature(rollout, generator, nodes=self.nodes)


class BlockELBO(LikelihoodEstimator):
    """Estimate the ELBO of block-wise decoding: one block is partly masked, and later blocks are fully masked.

    Use it for rollouts of `Unmask` with a `block_size`. A sample draws one of N blocks, b ~ U{1..N}, stratified over
    the samples. Of the L_b tokens of this block it masks a random set m of k tokens, k ~ U{1..L_b}. The estimate is the
    mean over samples of
        N (L_b / k) sum_{i in m} l_i(m and all later blocks).
    It is unbiased for a lower bound of the block-wise sampler's likelihood: the sum of each block's any-order ELBO
    given the earlier blocks. The first block starts at the completion's first token, as in `Unmask`.

    Args:
        block_size: Number of tokens of a block.
        num_samples: Number of masks, and of forwards. If it equals the number of blocks, every block is scored.

    Source: SPG, arXiv 2510.09541 [paper]. SPG's code also scores later blocks; scoring only the drawn block is [ours].
    """

    block_size: int = option(at_least=1)
    num_samples: int = option(default=2, at_least=1)

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        return masks.draw_block(rollout, generator, block_size=self.block_size, num_samples=self.num_samples)


def upper_bound(scores: Float[Tensor, "N B T"], views: Views, *, beta: float) -> Float[Tensor, "B T"]:
    """Return (1/beta) log sum_n coefficient_n p_i(view n)^beta per position, in nats; 0 if no view scores it."""
    is_scored = views.coefficients > 0
    terms = torch.where(is_scored, beta * scores + views.coefficients.where(is_scored, 1).log(), -torch.inf)
    unscored = ~is_scored.any(0)
    # The terms of a position that no view scores are all -inf. Their logsumexp would have a NaN gradient, so they
    # are first replaced by 0.
    return torch.where(unscored, 0, terms.masked_fill(unscored, 0).logsumexp(0) / beta)


def mixed_bounds(scores: Float[Tensor, "N B T"], views: Views, *, beta: float) -> Float[Tensor, "B T"]:
    """Mix the lower and the upper bound of each position, in nats.

    `Views.upper_bound_weight` is the weight of the upper bound in each row.
    """
    lower = weighted_sum(scores, views)
    if views.upper_bound_weight is None:  # the advantages are not known yet
        return lower
    upper = upper_bound(scores, views, beta=beta)
    return torch.lerp(lower, upper, views.upper_bound_weight[:, None].to(lower))


def upper_where_negative(views: Views, advantages: Float[Tensor, " B"], *, mix: float) -> Views:
    """Set upper_bound_weight to `mix` in the rows with a negative advantage, and to 0 in the others."""
    return replace(views, upper_bound_weight=mix * (advantages < 0).to(views.coefficients))


class _FromBase(LikelihoodEstimator):
    """An estimator that combines the views of another one, `base`, in its own way."""

    base: LikelihoodEstimator = Coupled()

    @property
    def supported_attention(self) -> tuple[str, ...]:
        return self.base.supported_attention

    @property
    def replays_steps(self) -> bool:
        return self.base.replays_steps

    @property
    def is_random(self) -> bool:
        return self.base.is_random

    @property
    def reads_confidence_change(self) -> bool:
        return self.base.reads_confidence_change

    @property
    def required_block_size(self) -> int | None:
        return self.base.required_block_size

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        return self.base.draw_views(rollout, generator)


class EUBO(_FromBase):
    """Estimate SPG's evidence upper bound (EUBO) from the masks that another estimator draws.

    Use `Sandwich` instead to apply the upper bound only to rows with a negative advantage. The contribution of position
    i is (1/beta) log sum_n w_n p_i(m_n)^beta. The sum covers the views n of `base` that score position i; m_n is the
    view's mask and w_n its weight. SPG writes the sum as a mean of p_i^beta / t over masks. The cost is the cost of
    `base`, by default Coupled().

    If the sum covers all masks, the result is at least the ELBO, for every beta > 0 (by Jensen's inequality). For
    beta >= L it is an upper bound of log p(y) (by Hoelder's inequality). For beta < L it is certain to be an upper
    bound only if the model's conditionals are consistent, which means that one joint distribution has all of them. A
    network does not guarantee that, so log p(y) may exceed the result [ours]; the bound in SPG's theorem, for
    beta >= 1, has an additional constant. With few masks the result is biased downwards, because it is the log of a
    mean.

    Args:
        beta: Exponent of the probabilities, in [0.01, 1e6].
        base: Estimator that draws the masks and their weights, with its settings: one of ELBO, Coupled, Quadrature
            and BlockELBO. Default: Coupled().

    Source: SPG, arXiv 2510.09541 [paper]. SPG's code divides by the number of scored tokens.
    """

    beta: float = option(default=1.5, at_least=0.01, at_most=10**6)

    def combine(self, scores: Float[Tensor, "N B T"], views: Views) -> Float[Tensor, "B T"]:
        return upper_bound(scores, views, beta=self.beta)


class Sandwich(_FromBase):
    """Score rows by the ELBO if their advantage is >= 0, else by mix * EUBO + (1 - mix) * ELBO, as SPG does.

    Use it so that training on a negative advantage lowers an upper bound of the likelihood, and not only the ELBO. Both
    bounds are computed from the same views, which `base` draws (see `EUBO`; by default Coupled()).

    Args:
        beta: Exponent of the upper bound, in [0.01, 1e6].
        mix: Weight of the upper bound, in [0, 1].
        base: Estimator that draws the masks of both bounds, with its settings. Default: Coupled().

    Source: SPG, arXiv 2510.09541, and its code [paper]. Here the estimate enters a clipped ratio, per token, and is not
    divided by the number of tokens [ours].
    """

    beta: float = option(default=1.5, at_least=0.01, at_most=10**6)
    mix: float = option(default=0.5, at_least=0, at_most=1)

    def combine(self, scores: Float[Tensor, "N B T"], views: Views) -> Float[Tensor, "B T"]:
        return mixed_bounds(scores, views, beta=self.beta)

    def with_advantages(self, views: Views, advantages: Float[Tensor, " B"]) -> Views:
        return upper_where_negative(views, advantages, mix=self.mix)


class Trajectory(LikelihoodEstimator):
    """Score a rollout by replaying its recorded unmasking steps.

    Use it if ratios must be exact or the sampler takes few steps: it costs one forward per segment. The forward of
    segment s masks the tokens that the sampler wrote in segment s or later, and scores the tokens of segment s. With
    one segment per step (the default), the sum over positions is the exact log-probability of the tokens given the
    order. With `num_sampled_steps=n`, n random steps of a row's N steps are scored, with coefficient N / min(n, N).
    `self_conditioning` applies to rollouts of `Renoise` only.

    If the order in which tokens are written also depends on the model's parameters, and the rollout recorded the
    log-probability of the order, it is added (`include_order`). With the sampler setting rank=confidence, every
    position that a step leaves masked adds the log-probability that a token drawn there has a lower confidence than all
    tokens that the step wrote (`decoding.order` [ours]). With rank=PlackettLuce, a step adds the log-probability of
    its draw of positions. With commit=SoftThreshold, it adds the log-probability of the positions that it wrote. The
    row's sum is then the exact log-probability of tokens AND order. With other settings whose order depends on the
    drawn tokens, the order is left out, and a run prints a warning.

    A rollout that rewrites tokens (`Remask`, `SoftEdit`) is replayed write by write [ours]: the tokens and masks that
    each step saw are rebuilt, and a position's contribution is the sum over its writes (docs/order.md). A rollout of
    `Renoise` is replayed in one view; a position's contribution is the sum over its accepted draws [ours].

    Args:
        num_segments: Number of segments into which a row's steps are merged. Fewer segments cost less, but the estimate
            is then not exact. Step s of n goes to segment floor(s * num_segments / n), with steps counted over all
            blocks. None: one segment per step. A rollout that rewrites tokens needs None.
        block_size: Block size of a block-causal model, to replay several blocks per forward: forward j replays step j
            of every block. The likelihood is the same, and num_segments is the number of segments of a block. None: a
            forward replays one step (or segment) of each row.
        include_order: Add the order's log-probability if the rollout recorded one, and num_segments and
            num_sampled_steps are None. A rollout records it with (a) rank=confidence or plackett_luce together with
            commit=schedule or late_schedule, or (b) commit=soft_threshold.
        num_sampled_steps: Number of steps (or segments) of each row that are scored. They are drawn without
            replacement, and weighted so that the estimate of the row's sum and, on-policy, of its gradient is unbiased
            [ours]. None: all steps.
        self_conditioning: Gradient of a rollout of `Renoise`, in which each step reads the logits of the previous step.
            "detached" stops the gradient at these logits and needs the memory of one step; "full" differentiates
            through all steps and needs the memory of all steps. The log-probs are the same.

    Source: TraceRL, and StepMerge of d2 [paper]. With the defaults and rollouts of `Unmask(block_size=1)` it is the
    likelihood of JustGRPO (arXiv 2601.15165, its authors' code [paper]).
    """

    num_segments: int | None = option(default=None, at_least=1)
    block_size: int | None = option(default=None, at_least=1)
    include_order: bool = True
    num_sampled_steps: int | None = option(default=None, at_least=1)
    self_conditioning: Literal["detached", "full"] = "detached"

    def check(self) -> None:
        if self.num_sampled_steps is not None and self.block_size is not None:
            raise ValueError(
                f"num_sampled_steps={self.num_sampled_steps} cannot be combined with block_size={self.block_size}: "
                "leave one at None"
            )

    @property
    def supported_attention(self) -> tuple[str, ...]:
        if self.block_size is not None:
            return ("block_causal",)
        return ("full", "block_causal", "encoder_decoder") if self.exact_for_sampler else ("full", "block_causal")

    @property
    def exact_for_sampler(self) -> bool:
        return self.num_segments is None and self.num_sampled_steps is None  # one view for each step

    @property
    def scores_order(self) -> bool:
        return self.exact_for_sampler and self.include_order  # a merged segment is not a step of the sampler

    @property
    def replays_steps(self) -> bool:
        return self.block_size is None  # else a view holds a step of every block

    @property
    def is_random(self) -> bool:
        return self.num_sampled_steps is not None

    @property
    def required_block_size(self) -> int | None:
        return self.block_size

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        if rollout.renoised is not None:
            return renoise_views(rollout, full=self.self_conditioning == "full")
        check_merges(rollout, self.num_segments)
        if self.block_size is not None:
            views = packed_views(rollout, num_segments=self.num_segments, block_size=self.block_size)
        else:
            last_step, _ = last_and_first_step(rollout)
            segment_of_position = segments(last_step, self.num_segments)
            if self.num_sampled_steps is None:
                view_segments, coefficient = all_segments(segment_of_position), None
            else:
                view_segments, coefficient = sampled_segments(
                    segment_of_position, rollout, generator, self.num_sampled_steps
                )
            if rollout.events is None:
                views = segment_views(rollout, segment_of_position, view_segments)
            else:
                views = event_views(rollout, view_segments.expand(-1, *segment_of_position.shape))
            if coefficient is not None:
                views = replace(views, coefficients=views.coefficients * coefficient)
        # With merged segments or packed blocks, a view scores several steps.
        if rollout.first_step is not None and self.num_segments is None and self.block_size is None:
            views = hide_later_columns(rollout, views)
        return add_order_logprobs(rollout, views) if self.scores_order else views
