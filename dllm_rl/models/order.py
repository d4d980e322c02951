"""The probability of an order: that a step leaves a position masked (`confidence`) or draws it (`plackett_luce`).

LLaDA's `low_confidence` draws a token y_j ~ p_j at every masked position of a step, and commits the k positions whose
draws have the highest confidence conf_j(y_j), the untempered log-prob. For a set S of committed positions with y_S
    log P(S, y_S | state) = sum_{i in S} log p_i(y_i) + sum_{j masked, not in S} log F_j(c),
    c = min_{i in S} conf_i(y_i),   F_j(c) = sum_v p_j(v) [v at j ranks after the last of S].
A draw at j ranks after S if conf_j(v) < c. Ties go to the lowest position: conf_j(v) = c ranks after S if j is to the
right of the position that set c.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.models.logprobs import TokenLogprob, chunked, process, wide
from dllm_rl.types import SamplingParams

LEAST = -20.0  # nats; an order that a policy cannot choose has this log-prob and no gradient, as log-ratios are clamped


def block_first_step(unmask_step: Int[Tensor, "B L"], block: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Return the first step of each written position's block; -1 at positions that are masked."""
    far = torch.iinfo(unmask_step.dtype).max
    steps = torch.where(unmask_step < 0, far, unmask_step)
    first = torch.full_like(steps, far).scatter_reduce(1, block, steps, "amin").gather(1, block)
    return torch.where(unmask_step < 0, -1, first)


def descending_index(scores: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Return each position's index in the descending order of its row's scores. Ties go to the leftmost."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(order).scatter(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )


def highest(
    scores: Float[Tensor, "B L"], masked: Bool[Tensor, "B L"], *, count: Int[Tensor, " B"]
) -> Bool[Tensor, "B L"]:
    """Return the `count` best masked positions of every row. Ties go to the lowest index."""
    return masked & (descending_index(scores) < count[:, None])


def commit_cutoff(
    scores: Float[Tensor, " C"],  # of the positions that a step committed
    steps: Int[Tensor, " C"],  # a number for each step of each row
    places: Int[Tensor, " C"],
    stay_steps: Int[Tensor, " J"],  # of the positions that a step left masked
    stay_places: Int[Tensor, " J"],
    num_steps: int,
) -> tuple[Float[Tensor, " J"], Bool[Tensor, " J"]]:
    """Return, for each position left masked, the lowest score that its step committed, +inf if none.

    The second result is whether the position is to the right of the last one with this score: an equal score then ranks
    after it (`highest`).
    """
    lowest = scores.new_full((num_steps,), torch.inf).scatter_reduce(0, steps, scores, "amin")
    at = torch.where(scores == lowest[steps], places, -1)  # scatter_reduce has no argmin
    last = places.new_full((num_steps,), -1).scatter_reduce(0, steps, at, "amax")
    return lowest[stay_steps], stay_places > last[stay_steps]


def draw_index(
    noisy_scores: Float[Tensor, "B L"], masked: Bool[Tensor, "B L"], chosen: Bool[Tensor, "B L"]
) -> Int[Tensor, "B L"]:
    """Return which draw of its step takes each position, from 0; 0 in a row whose masked positions are all chosen."""
    return descending_index(noisy_scores).masked_fill((chosen == masked).all(-1, keepdim=True), 0)


def draw_logprobs_of_rows(
    scores: Float[Tensor, "B L"], nth: Int[Tensor, "B L"], masked: Bool[Tensor, "B L"], chosen: Bool[Tensor, "B L"]
) -> Float[Tensor, "B L"]:
    """Return `drawn_logprobs` of every masked position, with fixed shapes."""
    rivals = masked[:, None, :] & (nth[:, None, :] >= nth[:, :, None])
    among = scores[:, None, :].masked_fill(~rivals, -torch.inf).logsumexp(-1)
    return torch.where((chosen == masked).all(-1, keepdim=True) | ~masked, 0, scores - among)


def drawn_logprobs(
    scores: Float[Tensor, " K"],
    groups: Int[Tensor, " K"],  # rising; a group is one step of one row
    nth: Int[Tensor, " K"],  # which draw of its group takes the position
    drawn: Int[Tensor, " C"],  # the positions that the step committed
    width: int,  # at least the size of a group
) -> Float[Tensor, " C"]:
    """Return Plackett-Luce log-probs: scores_i - log sum_m exp(scores_m), in nats.

    The sum is over the m of i's group that are drawn with i or later. The result is 0 where a group is drawn
    completely: nothing depends on its order, whose log-prob would be noise in every ratio.
    """
    member, mine = members(groups, drawn, width)
    rivals = mine & (nth[member] >= nth[drawn, None])
    among = scores[member].masked_fill(~rivals, -torch.inf)
    peak = among.detach().amax(-1, keepdim=True)
    mass = (among - peak).exp()
    while mass.shape[-1] > 1:  # in pairs: more empty slots do not change the rounding
        mass = mass[:, : mass.shape[-1] // 2] + mass[:, mass.shape[-1] // 2 :]
    found = scores[drawn] - peak[:, 0] - mass[:, 0].log()
    own = groups[drawn]  # also rising
    count = torch.searchsorted(own, own, right=True) - torch.searchsorted(own, own)
    return torch.where(count < mine.sum(-1), found, 0)


def members(
    groups: Int[Tensor, " K"], drawn: Int[Tensor, " C"], width: int
) -> tuple[Int[Tensor, "C M"], Bool[Tensor, "C M"]]:
    """Return, for each drawn position, all positions of its group in slots, and which slots are in use: the first ones.

    A group has at most `width` positions.
    """
    slots = max(16, 1 << (width - 1).bit_length())
    at = torch.searchsorted(groups, groups[drawn])[:, None] + torch.arange(slots, device=groups.device)
    member = at.clamp(max=len(groups) - 1)
    return member, (at == member) & (groups[member] == groups[drawn, None])


def state_scores(
    policy: Policy, hidden: Float[Tensor, "K D"], sampling_params: SamplingParams, rank: Callable
) -> Float[Tensor, " K"]:
    """Return a state-only rank's scores as the sampler computes them, differentiable.

    The head runs in chunks of rows.
    """

    def one(h: Tensor) -> tuple[Tensor]:
        logits = own_logits(policy.head(h), sampling_params, policy.spec.mask_id)
        return (rank(logits=logits, normalizer=logits.logsumexp(-1)),)

    return chunked(one, hidden, policy=policy)[0]


def own_logits(logits: Float[Tensor, "K V"], sampling_params: SamplingParams, mask_id: int | None) -> Tensor:
    """Return the model's logits, neither tempered nor filtered, with suppressed ids except the mask at -inf."""
    return process(logits, SamplingParams(suppress=tuple(i for i in sampling_params.suppress if i != mask_id)))


def confidence_normalizer(
    logits: Float[Tensor, "K V"], drawn: Float[Tensor, "K V"], sampling_params: SamplingParams, mask_id: int | None
) -> Float[Tensor, " K"]:
    """Return the log-sum-exp of untempered logits with the mask token, without suppressed ids.

    The confidence subtracts it.
    """
    assert mask_id is not None, "a diffusion model has a mask token"
    if sampling_params.temperature in (0, 1) and not sampling_params.filters:  # `drawn` equals the sampler's to the bit
        return drawn.logsumexp(-1).logaddexp(wide(logits[:, mask_id]))
    return own_logits(logits, sampling_params, mask_id).logsumexp(-1)


class _LeftLogprob(torch.autograd.Function):
    """log sum_{v inside} p(v), at least LEAST; its backward makes one (K, V) tensor, g (p(v | inside) - p(v))."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, inside: Tensor) -> Tensor:
        total = logits.logsumexp(-1)
        part = logits.masked_fill(~inside, -torch.inf).logsumexp(-1)
        ctx.save_for_backward(logits, inside, total, part)
        return (part - total).clamp(min=LEAST)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, inside, total, part = ctx.saved_tensors
        possible = part - total > LEAST
        out = (logits - part[:, None]).masked_fill_(~inside, -torch.inf).exp_()
        out -= (logits - total[:, None]).exp_()
        return out.mul_(gradient[:, None]).masked_fill_(~possible[:, None], 0), None  # an impossible row may be NaN


def score_left(policy: Policy, sampling_params: SamplingParams) -> Callable[..., tuple[Tensor]]:
    """Return the function that computes `left_logprobs` of one chunk of rows, also for `backward_chunked`."""

    def one(h: Tensor, lowest: Tensor, behind: Tensor, normalizer: Tensor | None = None) -> tuple[Tensor]:
        logits = policy.head(h)
        drawn = process(logits, sampling_params)
        with torch.no_grad():  # the gradient goes through F_j and not through its bound c [ours: docs/order.md]
            if normalizer is None:
                normalizer = confidence_normalizer(logits, drawn, sampling_params, policy.spec.mask_id)
            confidences = wide(logits) - normalizer[:, None]
            inside = confidences < lowest[:, None]
            inside |= behind[:, None] & (confidences == lowest[:, None])
        return (_LeftLogprob.apply(drawn, inside),)

    return one


def left_logprobs(
    policy: Policy,
    hidden: Float[Tensor, "K D"],
    lowest: Float[Tensor, " K"],  # c, the lowest committed confidence
    behind: Bool[Tensor, " K"],  # the position is to the right of the one that set c
    sampling_params: SamplingParams,
    normalizer: Float[Tensor, " K"] | None = None,  # of the confidences; None: computed
) -> Float[Tensor, " K"]:
    """Return log F_j(c) of K positions that a step left masked, in nats, at least LEAST.

    The head runs in chunks of rows.
    """
    given = (lowest, behind) if normalizer is None else (lowest, behind, normalizer)
    return chunked(score_left(policy, sampling_params), hidden, *given, policy=policy)[0]


def token_logprobs_and_confidences(
    policy: Policy, hidden: Float[Tensor, "K D"], tokens: Int[Tensor, " K"], sampling_params: SamplingParams
) -> tuple[Float[Tensor, " K"], Float[Tensor, " K"]]:
    """Return log p(tokens_k) under the sampled distribution, and the tokens' confidence without a gradient, in nats."""
    return chunked(score_committed(policy, sampling_params), hidden, tokens, policy=policy)  # type: ignore[return-value]


def score_committed(policy: Policy, sampling_params: SamplingParams) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function that computes `token_logprobs_and_confidences` of one chunk, also for `backward_chunked`."""

    def one(h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = policy.head(h)
        drawn = process(logits, sampling_params, y)
        with torch.no_grad():
            normalizer = confidence_normalizer(logits, drawn, sampling_params, policy.spec.mask_id)
            confidence = wide(logits).gather(-1, y[:, None])[:, 0] - normalizer
        return TokenLogprob.apply(drawn, y), confidence

    return one
