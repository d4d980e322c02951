"""The log-probability of an order, for `Confidence`, `PlackettLuce` and `SoftThreshold` of `samplers.rules`.

A rank scores the masked positions of a step, and the positions with the highest scores are committed. For `Confidence`,
the order's log-prob is the log-prob that the other positions stay masked. For `PlackettLuce`, it is the log-prob that
these positions are drawn, in this order.

LLaDA's `low_confidence` draws a token y_j ~ p_j at every masked position of a step, and commits the k positions whose
draws have the highest confidence conf_j(y_j), which is the untempered log-prob. For a set S of committed positions with
the tokens y_S,
    log P(S, y_S | state) = sum_{i in S} log p_i(y_i) + sum_{j masked, not in S} log F_j(c),
    c = min_{i in S} conf_i(y_i),   F_j(c) = sum_v p_j(v) [token v at position j ranks below S].
c is the cutoff. Token v at j ranks below S if conf_j(v) < c. Ties go to the leftmost position: conf_j(v) = c ranks
below S if j is to the right of the position whose confidence is c.

For the commit rule `SoftThreshold`, the log-prob is that of the set of positions that a step writes [ours]. Every
masked position j of the current block is written independently, with probability
q_j = sigmoid((logit p_j - logit tau) / temperature), where p_j is the probability of its likeliest token. An empty set
is redrawn, so that a step writes a nonempty set S with
    log P(S | state) = sum_{j in S} log q_j + sum_{j not in S} log(1 - q_j) - log(1 - prod_j (1 - q_j)).
P is a smooth function of the logits. If an empty set were instead replaced by the most confident position, P would jump
where two positions swap their order of confidence, and the gradient of log P would miss the jump.

docs/papers.md explains the tag [ours].
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import TokenLogprob, chunked, invert_cdf, process, upcast
from dllm_rl.types.rollouts import SamplingParams

# Lower limit, in nats, of each log F_j. At the limit it has no gradient.
MIN_LOGPROB = -20.0
# Those of `SoftThreshold`:
MAX_LOGPROB = -1e-4  # nats; a higher log p is clamped to this value, because rounding leaves few digits of 1 - p
LOG_ZERO = -1e4  # nats, far below any log q; finite, because gradients of log-sums of -inf are NaN


def commit_cutoff(
    scores: Float[Tensor, " C"],
    steps: Int[Tensor, " C"],
    columns: Int[Tensor, " C"],
    stay_steps: Int[Tensor, " J"],
    stay_columns: Int[Tensor, " J"],
    num_steps: int,
) -> tuple[Float[Tensor, " J"], Bool[Tensor, " J"]]:
    """Return the cutoff c of each position that stays masked.

    Args:
        scores: Scores of the positions that a step committed.
        steps: Their step ids: each step of each row has a different number below num_steps.
        columns: Their columns.
        stay_steps: Step ids of the positions that stay masked.
        stay_columns: Their columns.
        num_steps: Upper limit of the step ids.

    Returns:
        The lowest score that the position's step committed (+inf if the step committed nothing); whether the position
        is to the right of the rightmost committed position with this score. If it is, an equal score ranks below the
        cutoff, because `highest` prefers the leftmost of equal scores.
    """
    lowest = scores.new_full((num_steps,), torch.inf).scatter_reduce(0, steps, scores, "amin")
    lowest_columns = torch.where(scores == lowest[steps], columns, -1)  # scatter_reduce has no argmin
    last = columns.new_full((num_steps,), -1).scatter_reduce(0, steps, lowest_columns, "amax")
    return lowest[stay_steps], stay_columns > last[stay_steps]


def plackett_luce_logprobs_fixed_shape(
    scores: Float[Tensor, "B L"],
    draw_index: Int[Tensor, "B L"],
    masked: Bool[Tensor, "B L"],
    chosen: Bool[Tensor, "B L"],
) -> Float[Tensor, "B L"]:
    """Return `plackett_luce_logprobs` of every masked position, in fixed shapes, for compiled steps."""
    candidates = masked[:, None, :] & (draw_index[:, None, :] >= draw_index[:, :, None])
    denominator = scores[:, None, :].masked_fill(~candidates, -torch.inf).logsumexp(-1)
    return torch.where((chosen == masked).all(-1, keepdim=True) | ~masked, 0, scores - denominator)


def plackett_luce_logprobs(
    scores: Float[Tensor, " K"],
    step_ids: Int[Tensor, " K"],
    draw_index: Int[Tensor, " K"],
    drawn: Int[Tensor, " C"],
    width: int,
) -> Float[Tensor, " C"]:
    """Return Plackett-Luce log-probs of the drawn positions i: scores_i - log sum_m exp(scores_m), in nats.

    The sum covers i and all positions of its step that are not drawn before i, including those that are never drawn.
    The result is 0 if the step drew all its positions: their order has no effect, and its log-prob would only add
    noise to every ratio.

    Args:
        scores: Scores of K positions.
        step_ids: A number for the step and row of each position, in ascending order.
        draw_index: Index of the draw of its step, from 0, that chose each position.
        drawn: Indices of the positions that the step committed.
        width: Upper limit of the number of positions that a step writes.
    """
    members, is_member = step_members(step_ids, drawn, width)
    candidates = is_member & (draw_index[members] >= draw_index[drawn, None])
    candidate_scores = scores[members].masked_fill(~candidates, -torch.inf)
    peak = candidate_scores.detach().amax(-1, keepdim=True)
    mass = (candidate_scores - peak).exp()
    while mass.shape[-1] > 1:  # pairwise, so that the number of empty slots does not change the rounding
        mass = mass[:, : mass.shape[-1] // 2] + mass[:, mass.shape[-1] // 2 :]
    logprobs = scores[drawn] - peak[:, 0] - mass[:, 0].log()
    drawn_ids = step_ids[drawn]  # in ascending order too
    num_drawn = torch.searchsorted(drawn_ids, drawn_ids, right=True) - torch.searchsorted(drawn_ids, drawn_ids)
    return torch.where(num_drawn < is_member.sum(-1), logprobs, 0)


def step_members(
    step_ids: Int[Tensor, " K"], drawn: Int[Tensor, " C"], width: int
) -> tuple[Int[Tensor, "C M"], Bool[Tensor, "C M"]]:
    """Return, for each drawn position, the indices of all positions of its step, in M slots.

    The second result is whether a slot is in use; used slots come first. A step has at most `width` positions, and M is
    a power of two that is at least `width` and 16.
    """
    num_slots = max(16, 1 << (width - 1).bit_length())
    slots = torch.searchsorted(step_ids, step_ids[drawn])[:, None] + torch.arange(num_slots, device=step_ids.device)
    members = slots.clamp(max=len(step_ids) - 1)
    return members, (slots == members) & (step_ids[members] == step_ids[drawn, None])


def log_chances(
    logprobs: Float[Tensor, "*K"], *, tau: float, temperature: float
) -> tuple[Float[Tensor, "*K"], Float[Tensor, "*K"]]:
    """Return log q and log(1 - q), in nats, from log p. q is the probability that a position is written."""
    logprobs = logprobs.clamp(max=MAX_LOGPROB)
    logit = logprobs - torch.expm1(logprobs).neg().log()
    z = (logit - math.log(tau) + math.log1p(-tau)) / temperature
    return F.logsigmoid(z), F.logsigmoid(-z)


def draw_set(
    logprobs: Float[Tensor, "R L"],
    masked: Bool[Tensor, "R L"],
    uniforms: Float[Tensor, "R L"],
    *,
    tau: float,
    temperature: float,
) -> Bool[Tensor, "R L"]:
    """Draw a set S of the masked positions of each row, with probability P(S).

    A row without masked positions has an empty set. First the leftmost position of S is drawn, then the positions to
    its right, independently.
    """
    log_q, log_not_q = log_chances(logprobs.double(), tau=tau, temperature=temperature)
    log_not_q = log_not_q.masked_fill(~masked, 0)
    # The log-prob that a position is the leftmost one of S.
    log_leftmost = (log_q + log_not_q.cumsum(-1) - log_not_q).masked_fill(~masked, -torch.inf)
    log_leftmost = log_leftmost.masked_fill(~masked.any(-1, keepdim=True), 0)  # -inf everywhere would give NaN
    first_masked = masked.long().argmax(-1, keepdim=True)
    mass = (log_leftmost - log_leftmost.amax(-1, keepdim=True)).exp()
    leftmost = invert_cdf(mass, uniforms.gather(-1, first_masked)[:, 0].double())[:, None]
    position = torch.arange(masked.shape[1], device=masked.device)
    # No position to the right of the leftmost one uses the uniform number that drew the leftmost one.
    return masked & ((position == leftmost) | (position > leftmost) & (uniforms < log_q.exp()))


def set_logprobs(
    logprobs: Float[Tensor, " K"],
    step_ids: Int[Tensor, " K"],
    drawn: Int[Tensor, " C"],
    width: int,
    *,
    tau: float,
    temperature: float,
) -> Float[Tensor, " C"]:
    """Return log P(S) in nats, divided equally among the positions of S.

    Args:
        logprobs: Log-prob of the likeliest token of K positions, in nats.
        step_ids: A number for the step and row of each position, in ascending order.
        drawn: Indices of the positions that the step wrote.
        width: Upper limit of the number of positions that a step writes.
        tau: See `samplers.rules.SoftThreshold`.
        temperature: See `samplers.rules.SoftThreshold`.
    """
    log_q, log_not_q = log_chances(logprobs, tau=tau, temperature=temperature)
    is_written = torch.zeros_like(step_ids, dtype=torch.bool).index_fill(0, drawn, True)
    members, is_member = step_members(step_ids, drawn, width)
    log_set = torch.where(is_written, log_q, log_not_q)[members].masked_fill(~is_member, 0)
    log_nonempty = log_q[members].masked_fill(~is_member, LOG_ZERO)
    log_empty = log_not_q[members].masked_fill(~is_member, 0)
    while log_nonempty.shape[-1] > 1:  # pairwise, so that the number of empty slots does not change the rounding
        half = log_nonempty.shape[-1] // 2
        log_nonempty = torch.logaddexp(log_nonempty[:, :half], log_empty[:, :half] + log_nonempty[:, half:])
        log_empty = log_empty[:, :half] + log_empty[:, half:]
        log_set = log_set[:, :half] + log_set[:, half:]
    num_written = (is_written[members] & is_member).sum(-1)
    return (log_set - log_nonempty)[:, 0] / num_written


def state_scores(
    policy: Policy, hidden: Float[Tensor, "K D"], sampling_params: SamplingParams, rank: Any
) -> Float[Tensor, " K"]:
    """Return the differentiable scores of a `rank` that does not depend on drawn tokens, computed as in the sampler.

    The head runs in chunks of rows. `rank` is a `samplers.rules.Rank`.
    """

    def score_chunk(hidden_chunk: Tensor) -> tuple[Tensor]:
        logits = untempered_logits(policy.head(hidden_chunk), sampling_params, policy.spec.mask_id)
        inputs = {"logits": logits, "normalizer": logits.logsumexp(-1), "hidden": hidden_chunk}
        return (rank(**{name: inputs[name] for name in rank.reads}),)

    return chunked(score_chunk, hidden, policy=policy)[0]


def untempered_logits(logits: Float[Tensor, "K V"], sampling_params: SamplingParams, mask_id: int | None) -> Tensor:
    """Return the model's logits, neither tempered nor filtered. Suppressed ids are at -inf, except the mask token."""
    suppress = tuple(token for token in sampling_params.suppress if token != mask_id)
    return process(logits, SamplingParams(suppress=suppress))


def confidence_normalizer(
    logits: Float[Tensor, "K V"], processed: Float[Tensor, "K V"], sampling_params: SamplingParams, mask_id: int | None
) -> Float[Tensor, " K"]:
    """Return the normalizer of confidences: the log-sum-exp of untempered logits, with the mask token.

    `processed` are the logits of the sampling distribution. Suppressed ids except the mask token are left out.
    """
    assert mask_id is not None, "a diffusion model has a mask token"
    # With these settings `processed` is untempered and unfiltered. With the mask token added, its log-sum-exp equals
    # the sampler's to the last bit.
    if sampling_params.temperature in (0, 1) and not sampling_params.filters:
        return processed.logsumexp(-1).logaddexp(upcast(logits[:, mask_id]))
    return untempered_logits(logits, sampling_params, mask_id).logsumexp(-1)


class _StayMaskedLogprob(torch.autograd.Function):
    """log of the probability of the tokens that `ranks_below` marks, at least MIN_LOGPROB.

    The backward makes a single (K, V) tensor: grad_output * (p(v | marked) - p(v)).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ranks_below: Tensor) -> Tensor:
        log_total = logits.logsumexp(-1)
        log_marked = logits.masked_fill(~ranks_below, -torch.inf).logsumexp(-1)
        ctx.save_for_backward(logits, ranks_below, log_total, log_marked)
        return (log_marked - log_total).clamp(min=MIN_LOGPROB)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        logits, ranks_below, log_total, log_marked = ctx.saved_tensors
        is_above_limit = log_marked - log_total > MIN_LOGPROB
        gradient = (logits - log_marked[:, None]).masked_fill_(~ranks_below, -torch.inf).exp_()
        gradient -= (logits - log_total[:, None]).exp_()
        gradient = gradient.mul_(grad_output[:, None])
        return gradient.masked_fill_(~is_above_limit[:, None], 0), None  # a row without a marked token would be NaN


def score_stay_masked(policy: Policy, sampling_params: SamplingParams) -> Callable[..., tuple[Tensor]]:
    """Return the function that computes `stay_masked_logprobs` of one chunk of rows.

    The returned function is also called by `backward_chunked`.
    """

    def score_chunk(
        hidden: Tensor, cutoff: Tensor, is_right_of_cutoff: Tensor, normalizer: Tensor | None = None
    ) -> tuple[Tensor]:
        logits = policy.head(hidden)
        processed = process(logits, sampling_params)
        with torch.no_grad():  # the gradient goes through F_j, but not through the cutoff c [ours]; see docs/sampler.md
            if normalizer is None:
                normalizer = confidence_normalizer(logits, processed, sampling_params, policy.spec.mask_id)
            confidences = upcast(logits) - normalizer[:, None]
            ranks_below = confidences < cutoff[:, None]
            ranks_below |= is_right_of_cutoff[:, None] & (confidences == cutoff[:, None])
        return (_StayMaskedLogprob.apply(processed, ranks_below),)

    return score_chunk


def stay_masked_logprobs(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    cutoff: Float[Tensor, " K"],
    is_right_of_cutoff: Bool[Tensor, " K"],
    sampling_params: SamplingParams,
    normalizer: Float[Tensor, " K"] | None = None,
) -> Float[Tensor, " K"]:
    """Return log F_j(c) of K positions that stay masked, in nats, at least MIN_LOGPROB.

    The head runs in chunks of rows.

    Args:
        policy: Policy whose head is run.
        hidden: States of the positions.
        cutoff: c, the lowest confidence that the step committed (`commit_cutoff`).
        is_right_of_cutoff: Whether the position is to the right of the position whose confidence is c.
        sampling_params: Settings of the sampling distribution.
        normalizer: Normalizer of the confidences. None (default): it is computed.
    """
    inputs = (cutoff, is_right_of_cutoff) if normalizer is None else (cutoff, is_right_of_cutoff, normalizer)
    return chunked(score_stay_masked(policy, sampling_params), hidden, *inputs, policy=policy)[0]


def token_logprobs_and_confidences(
    policy: Policy, hidden: Float[Tensor, "K D"], tokens: Int[Tensor, " K"], sampling_params: SamplingParams
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Return log p(tokens_k) under the sampling distribution, and the confidences without gradient, in nats."""
    return chunked(score_committed(policy, sampling_params), hidden, tokens, policy=policy)  # type: ignore[return-value]


def score_committed(policy: Policy, sampling_params: SamplingParams) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes `token_logprobs_and_confidences` of one chunk of rows.

    The returned function is also called by `backward_chunked`.
    """

    def score_chunk(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = policy.head(hidden)
        processed = process(logits, sampling_params, tokens)
        with torch.no_grad():
            normalizer = confidence_normalizer(logits, processed, sampling_params, policy.spec.mask_id)
            confidence = upcast(logits).gather(-1, tokens[:, None])[:, 0] - normalizer
        return TokenLogprob.apply(processed, tokens), confidence

    return score_chunk
