"""Estimates of log p(completion | prompt): their interface, `LikelihoodEstimator`, and those of the library.

An estimator scores several views of the batch. A view is a copy of the batch with the positions of one set m masked;
one forward scores some of its positions. `combine` adds up the views' log-probs per position; the sum over T estimates
log p(completion | prompt). The views are drawn once, and every policy is scored with the same views. Scoring and the
update process one view at a time, so that memory does not grow with the number of views. The cost of an estimate is its
number of forwards of the full batch.

Notation: y is a completion of L tokens, and l_i(m) = log p(y_i | prompt, y with m masked), in nats. The any-order ELBO
is a lower bound of log p(y), where p(y) is the likelihood if the tokens are written one at a time in a random order:
    sum_{k=1..L} (1/k) E_{|m|=k} sum_{i in m} l_i(m)  <=  log p(y),
    p(y) = E_order prod_i p(y_i | the positions before i in the order).

docs/papers.md explains the tags [paper] and [ours].
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dllm_rl.likelihoods import masks
from dllm_rl.likelihoods.events import event_views, last_and_first_step
from dllm_rl.likelihoods.order_logprobs import add_order_logprobs
from dllm_rl.likelihoods.packed import Packed, steps_in_blocks
from dllm_rl.likelihoods.renoising import renoise_views
from dllm_rl.likelihoods.turns import check_turns, hide_later_columns
from dllm_rl.likelihoods.views import each_forward
from dllm_rl.models.base import Policy, join_uneven_forwards
from dllm_rl.records import FunctionRecord, Record, option
from dllm_rl.types.batch_record import decorate_own, given_copies
from dllm_rl.types.retained_graphs import RetainedGraphs
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Views

EXACT = "Trajectory(num_segments=None, block_size=None)"  # in full: an option keeps the recipe's other fields


class LikelihoodEstimator(Record):
    """An estimate of log p(completion | prompt): pure functions that draw the views and combine their log-probs.

    Use `ELBO`, `Trajectory` or another class of this module for a published estimate. For a custom one, subclass this
    class, override `draw_views` and the properties that differ, and test it by `check_estimator`. Where
    an estimator is expected, a plain function (rollout, generator) -> Views is one too. Contributions are zero outside
    the completion. Both sides of a ratio must use the same estimator and the same views.

    Example:
            views = Coupled().draw_views(rollout, generator)
            log_ratio = Coupled().logprobs(policy, rollout, views) - Coupled().logprobs(other, rollout, views)
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        methods = ("draw_views", "combine", "with_advantages", "view_logprobs", "backward", "logprobs")
        decorate_own(cls, given_copies, *methods)

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        """Return the masks and coefficients of every view of the rollout."""
        raise TypeError(f"{type(self).__name__} must define draw_views(rollout, generator)")

    def combine(self, scores: Float[Tensor, "N B T"], views: Views) -> Float[Tensor, "B T"]:
        """Return the contributions in nats of the views' log-probs; differentiable.

        Default: sum_n coefficient_n * log p(y_t | view n) per position.
        """
        total = torch.zeros_like(scores[0])
        # One by one, so that the sum has the same bits as the sampler's record.
        for view_scores, coefficients in zip(scores, views.coefficients, strict=True):
            total = total + view_scores * coefficients
        return total

    def with_advantages(self, views: Views, advantages: Float[Tensor, " B"]) -> Views:
        """Return the views, adapted to the advantages. Default: unchanged."""
        return views

    @property
    def name(self) -> str:
        """Name of the estimate in messages."""
        return type(self).__name__

    @property
    def supported_attention(self) -> tuple[str, ...]:
        """Values of the policy's attention for which the estimate is defined."""
        return ("full", "block_causal")

    @property
    def exact_for_sampler(self) -> bool:
        """Whether scoring under the rollout policy equals the sampler's record (`recorded`), which then replaces it."""
        return False

    @property
    def replays_steps(self) -> bool:
        """Whether view n shows what the sampler saw before it wrote the tokens that the view scores.

        The views must be in the sampler's order.
        """
        return False

    @property
    def is_random(self) -> bool:
        """Whether two calls of `draw_views` differ. Inner updates may then draw separate masks (`resample_masks`)."""
        return True

    @property
    def variance_growth(self) -> float | None:
        """By how much the gradient's variance may grow for scoring only some steps, which `draw_steps` draws once the
        advantages are known. `draw_views` must return a view for each step. None: all views are scored.
        """
        return None

    @property
    def reads_order(self) -> bool:
        """Whether `draw_views` reads `Order.logprobs`. If not, the rollouts of a run do not record it."""
        return True

    @property
    def required_block_size(self) -> int | None:
        """Block size that the policy must have, for views that mask complete blocks. None: any."""
        return None

    def view_logprobs(
        self,
        policy: Policy,
        rollout: Rollout,
        views: Views,
        *,
        micro_batch_size: int | None = None,
        retain_graphs: bool = False,
        graphs: RetainedGraphs | None = None,
    ) -> Float[Tensor, "N B T"]:
        """Return log p(y_t | view n) in nats where view n scores t, and 0 elsewhere.

        Call it with `retain_graphs` to differentiate the result, or with `graphs` before `backward`; call `logprobs` if
        no gradient is needed.

        Args:
            policy: Policy to score under.
            rollout: Rollout to score, of B rows.
            views: Views of `draw_views`.
            micro_batch_size: Number of rows per forward. None: all.
            retain_graphs: Whether the result can be differentiated. Default: False.
            graphs: Where to keep the autograd graphs that `backward` reuses, while there is room. None (default): none.
        """
        self.check_policy(policy)
        if rollout.first_step is not None:
            check_turns(policy, views)
        out = torch.zeros(views.coefficients.shape, device=rollout.tokens.device)
        if graphs is not None:
            is_scored = torch.zeros(views.coefficients.shape[:2], dtype=torch.bool, device=out.device)
            num_forwards = math.prod(feature.num_forwards for feature in views.features)
            # No backward would free the graphs of the other rows.
            for key, n, chunk, view in each_forward(rollout, views.restrict_to_rows(graphs.rows), micro_batch_size):
                if not graphs.has_room(num_forwards):
                    break
                score = partial(view.logprobs, policy, chunk.rollout)
                out[n, chunk.rows, chunk.columns] = graphs.add(key, score, policy.module)
                is_scored[n, chunk.rows] = graphs.rows[chunk.rows]  # a forward has whole groups
            views = replace(views, coefficients=views.coefficients * ~is_scored[..., None])
        # Processes may have different numbers of rows: see `join_uneven_forwards`.
        with torch.set_grad_enabled(retain_graphs), join_uneven_forwards(policy):
            for _, n, chunk, view in each_forward(rollout, views, micro_batch_size):
                out[n, chunk.rows, chunk.columns] += view.logprobs(policy, chunk.rollout)
        return out

    def backward(
        self,
        policy: Policy,
        rollout: Rollout,
        views: Views,
        vectors: Float[Tensor, "N B T"],
        *,
        micro_batch_size: int | None = None,
        graphs: RetainedGraphs | None = None,
    ) -> None:
        """Compute `view_logprobs(...).backward(vectors)`, one forward at a time.

        A forward whose graph is in `graphs`, which `view_logprobs` with the same `micro_batch_size` filled, is not run
        again; every other is, and is differentiated immediately, so that memory does not grow with the number of views.
        `vectors` is the gradient of the loss with respect to `view_logprobs(...)`. The parameters' gradients do not
        depend on which graphs are retained, except for rounding where one view runs the head several times.
        """
        retained = {} if graphs is None else graphs.logprobs
        with join_uneven_forwards(policy, backward=True):
            for key, n, chunk, view in each_forward(rollout, views, micro_batch_size):
                grad_output = vectors[n, chunk.rows][:, chunk.columns]
                if key in retained:
                    retained.pop(key).backward(grad_output)
                else:
                    view.backward(policy, chunk.rollout, grad_output)

    def logprobs(
        self, policy: Policy, rollout: Rollout, views: Views, *, micro_batch_size: int | None = None
    ) -> Float[Tensor, "B T"]:
        """Return each position's contribution to the estimate in nats, without gradient.

        The sum over T estimates the sequence's log-prob.
        """
        return self.combine(self.view_logprobs(policy, rollout, views, micro_batch_size=micro_batch_size), views)

    @property
    def exact_ratios(self) -> bool:
        """Whether exp(difference of two policies' estimates) is the ratio of the probabilities of what was sampled."""
        return self.exact_for_sampler or self.supported_attention == ("causal",)

    def check_policy(self, policy: Policy) -> None:
        """Raise ValueError when the estimate does not support this policy's attention or block size."""
        if policy.spec.attention not in self.supported_attention:
            raise ValueError(
                f"likelihood={self.name!r} is for {' or '.join(self.supported_attention)} attention, but the policy's "
                f"is {policy.spec.attention!r}; "
                f"use {'Causal()' if policy.spec.attention == 'causal' else EXACT}"
            )
        if self.required_block_size not in (None, policy.spec.block_size):
            raise ValueError(
                f"block_size={self.required_block_size} is not the policy's block size, {policy.spec.block_size}"
            )


class FunctionLikelihood(FunctionRecord, LikelihoodEstimator):
    """An estimator whose views a function draws.

    Args:
        function: Function of the rollout and a generator. It returns the masks and coefficients of every view.
    """

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        return self.function(rollout.copied(), generator)


def recorded(rollout: Rollout, views: Views) -> Float[Tensor, "B T"]:
    """Return the contributions (B, T) that the sampler recorded, in nats.

    Call it instead of scoring if the estimator is `exact_for_sampler`.
    """
    logprobs = rollout.logprobs
    for feature in views.features:
        logprobs = feature.sampler_logprobs(rollout, logprobs.clone())
    return logprobs if views.inverse_chances is None else torch.where(views.inverse_chances[0] > 0, logprobs, 0)


class Causal(LikelihoodEstimator):
    """Score a completion of an autoregressive policy: log p(y) = sum_t log p(y_t | prompt, y_<t).

    Use it for policies with causal attention, and only for them. It is exact and costs one forward.
    """

    supported_attention = ("causal",)
    is_random = False
    reads_order = False

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        scored = rollout.completion_mask[None]
        return Views(torch.zeros_like(scored), scored.float())


class OneStep(LikelihoodEstimator):
    """Score all tokens in one forward with the completion fully masked (d1's mean-field estimate).

    Use it if cost matters most: all completions of a prompt share one masked input, and so one forward. The estimate is
    the sum of l_i with all of y masked; each prompt token is masked too, with probability `prompt_mask`. It is biased,
    because it treats the tokens as independent. The prompt's mask is drawn once per group [ours]: d1 draws it for each
    completion, with the same mean, and one forward per completion.

    Args:
        prompt_mask: Share of the prompt's tokens that are masked, in [0, 1).

    Source: d1, arXiv 2504.12216 [paper].
    """

    prompt_mask: float = option(default=0.15, at_least=0, below=1)

    reads_order = False

    @property
    def is_random(self) -> bool:
        return self.prompt_mask > 0

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        completion = rollout.completion_mask
        prompt = rollout.attention_mask & ~completion
        generators = masks.row_generators(rollout, generator, per_group=True)
        hidden_prompt = masks.uniforms_at(prompt, generators) < self.prompt_mask
        return Views((hidden_prompt | completion)[None], completion[None].float())


class ELBO(LikelihoodEstimator):
    """Estimate the any-order ELBO with random masks of exactly k tokens.

    Use it as the standard estimate of masked-diffusion models. Some tokens may stay unscored; `antithetic` and
    `Coupled` score every token. The estimate is the mean over samples of (L/k) sum_{i in m} l_i(m), k ~ U{1..L}. It is
    unbiased for the ELBO and has a high variance.

    Args:
        num_samples: Number of masks, and of forwards.
        stratified: Spread k evenly over 1..L across the samples.
        antithetic: Draw samples in pairs: one masks the first k tokens of a random order, the other the last L+1-k
            (one token is in both), so that every token is scored. num_samples must then be even.

    Source: LLaDA eq. 14; VRPO [paper].
    """

    num_samples: int = option(default=4, at_least=1)
    stratified: bool = True
    antithetic: bool = False

    reads_order = False

    def check(self) -> None:
        if self.antithetic and self.num_samples % 2:
            raise ValueError(
                f"num_samples={self.num_samples} must be even with antithetic=True; use {self.num_samples + 1}"
            )

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        completion = rollout.completion_mask
        generators = masks.row_generators(rollout, generator)
        size = completion.sum(-1, keepdim=True)
        num_draws = self.num_samples // 2 if self.antithetic else self.num_samples
        u = masks.uniforms_per_row(generators, num_draws, stratified=self.stratified, device=size.device)
        keys = [masks.uniforms_at(completion, generators) for _ in range(num_draws)]
        if self.antithetic:
            # k is in the lower half of 1..L; the second view of each pair has the upper half, and the largest keys.
            k = 1 + masks.uniform_index(u / 2, size)
            counts = torch.cat([k, size + 1 - k])
            keys += [-key for key in keys]
        else:
            counts = 1 + masks.uniform_index(u, size)
        views = [masks.k_masked_view(completion, key, k) for key, k in zip(keys, counts, strict=True)]
        return masks.stack_views(views, samples=self.num_samples)


class Coupled(LikelihoodEstimator):
    """Estimate the any-order ELBO from a mask and its complement, so that every token is scored.

    Use it in place of `ELBO` to score every token, at two forwards per sample. The estimate is
        ( sum_{i in m} l_i(m) (L+1)/k + sum_{i not in m} l_i(m^c) (L+1)/(L-k) ) / 2,
    where m has k of the L positions, m^c is its complement, and k is stratified over 0..L. A sum over an empty set is
    0. The estimate is unbiased for the ELBO.

    Args:
        num_samples: Number of pairs of masks. Each pair costs two forwards.

    Source: the form that ESPO uses [paper].
    """

    num_samples: int = option(default=1, at_least=1)

    reads_order = False

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        completion = rollout.completion_mask
        generators = masks.row_generators(rollout, generator)
        size = completion.sum(-1, keepdim=True)
        u = masks.uniforms_per_row(generators, self.num_samples, stratified=True, device=size.device)
        views = []
        for k in masks.uniform_index(u, size + 1):
            keys = masks.uniforms_at(completion, generators)
            views += masks.coupled_views(completion, keys, k)
        return masks.stack_views(views, samples=self.num_samples)


class Trajectory(LikelihoodEstimator):
    """Score a rollout by replaying its recorded unmasking steps.

    Use it if ratios must be exact or the sampler takes few steps: it costs one forward per segment. The forward of
    segment s masks the tokens that the sampler wrote in segment s or later, and scores the tokens of segment s. With
    one segment per step (the default), the sum over positions is the exact log-probability of the tokens given the
    order. With `variance_growth` a training step scores only some steps, and the ratios of their tokens stay exact.
    `self_conditioning` applies to rollouts of `Renoise` only.

    If the order in which tokens are written also depends on the model's parameters, and the rollout recorded the
    log-probability of the order, it is added (`include_order`). With the sampler setting rank=Confidence(), every
    position that a step leaves masked adds the log-probability that a token drawn there has a lower confidence than all
    tokens that the step wrote (`decoding.order` [ours]). With rank=PlackettLuce(), a step adds the log-probability of
    its draw of positions. With commit=SoftThreshold(), it adds the log-probability of the positions that it wrote. The
    row's sum is then the exact log-probability of tokens AND order. With other settings whose order depends on the
    drawn tokens, the order is left out, and a run prints a warning.

    A rollout that rewrites tokens (`Remask`, `SoftEdit`) is replayed write by write [ours]: the tokens and masks that
    each step saw are rebuilt, and a position's contribution is the sum over its writes (docs/sampler.md). A rollout of
    `Renoise` is replayed in one view; a position's contribution is the sum over its accepted draws [ours].

    Args:
        num_segments: Number of segments into which a row's steps are merged. Fewer segments cost less, but the estimate
            is then not exact. Step s of n goes to segment floor(s * num_segments / n), with steps counted over all
            blocks. None: one segment per step. A rollout that rewrites tokens needs None.
        block_size: Block size of a block-causal model, to replay several blocks per forward: forward j replays step j
            of every block. The likelihood is the same, and num_segments is the number of segments of a block. None: a
            forward replays one step (or segment) of each row.
        include_order: Add the order's log-probability if the rollout recorded one, and num_segments is None. A
            rollout records it with (a) rank=Confidence() or PlackettLuce() and a
            commit rule that writes a number of tokens known before the step, as Schedule() does, or (b)
            rank=MaxProb() and commit=SoftThreshold().
        variance_growth: Score only some pairs of a completion and a denoising step, drawn so that the variance of the
            gradient grows by about this share of the batch's own, such as 0.1 (`likelihoods.drawn_steps`). A step is
            likely to be drawn if the advantage is large and the sampler was unsure of the tokens that it wrote: the
            more certain the policy, the fewer forwards. A drawn token has its exact ratio, and its gradient is
            multiplied by the inverse chance of its step, so that the mean over draws is the gradient of all steps.
            None: all steps.
        self_conditioning: Gradient of a rollout of `Renoise`, in which each step reads the logits of the previous step.
            "detached" stops the gradient at these logits and needs the memory of one step; "full" differentiates
            through all steps and needs the memory of all steps. The log-probs are the same.

    Source: TraceRL, and StepMerge of d2 [paper]. With the defaults and rollouts of `Unmask(block_size=1)` it is the
    likelihood of JustGRPO (arXiv 2601.15165, its authors' code [paper]).
    """

    num_segments: int | None = option(default=None, at_least=1)
    block_size: int | None = option(default=None, at_least=1)
    include_order: bool = True
    variance_growth: float | None = option(default=None, above=0)  # type: ignore[assignment]
    self_conditioning: Literal["detached", "full"] = "detached"

    def check(self) -> None:
        if self.variance_growth is not None and self.num_segments is not None:
            raise ValueError(
                f"variance_growth={self.variance_growth:g} draws denoising steps, which num_segments="
                f"{self.num_segments} merges: leave one at None"
            )

    @property
    def supported_attention(self) -> tuple[str, ...]:  # type: ignore[override]
        if self.block_size is not None:
            return ("block_causal",)
        return ("full", "block_causal", "encoder_decoder") if self.exact_for_sampler else ("full", "block_causal")

    @property
    def exact_for_sampler(self) -> bool:  # type: ignore[override]
        return self.num_segments is None  # one view for each step

    @property
    def replays_steps(self) -> bool:
        return self.block_size is None  # else a view holds a step of every block

    is_random = False  # drawing steps comes later

    @property
    def reads_order(self) -> bool:  # type: ignore[override]
        return self.include_order and self.exact_for_sampler  # a merged segment is not a step of the sampler

    @property
    def required_block_size(self) -> int | None:  # type: ignore[override]
        return self.block_size

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        if rollout.renoised is not None:
            return renoise_views(rollout, full=self.self_conditioning == "full")
        last_step = first_step = rollout.unmask_step
        if bool((rollout.completion_mask & (last_step < 0)).any()):
            raise ValueError(
                f"likelihood={self.name!r} replays the steps in which a completion's tokens were written, and this "
                "sampler records none for some (unmask_step=-1); record them, or use OneStep(), ELBO() or Coupled()"
            )
        if rollout.events is not None:
            last_step, first_step = last_and_first_step(rollout, self.num_segments)
        start: Tensor | int = 0  # the first step of each position's block, if the blocks are replayed together
        if self.block_size is not None:
            segment, start = steps_in_blocks(
                rollout, last_step, first_step, block_size=self.block_size, num_segments=self.num_segments
            )
        elif self.num_segments is None:
            segment = last_step
        else:
            num_steps = last_step.amax(-1, keepdim=True) + 1  # per row: rows may end early
            segment = torch.where(last_step < 0, -1, last_step * self.num_segments // num_steps.clamp(min=1))
        index = torch.arange(int(segment.max()) + 1, device=segment.device)[:, None, None]
        completion = rollout.completion_mask
        if rollout.events is None:  # view s hides the segments from index s on
            views = Views(completion & (segment >= index), (completion & (segment == index)).float())
        else:
            views = event_views(rollout, (index + start).expand(-1, *segment.shape))
        if self.block_size is not None:
            views = replace(views, features=(*views.features, Packed()))
        elif rollout.first_step is not None and self.num_segments is None:  # a merged segment has several steps
            views = hide_later_columns(rollout, views)
        has_order = rollout.order is not None and rollout.order.logprobs is not None
        if has_order and self.reads_order:
            views = add_order_logprobs(rollout, views)
        return views
