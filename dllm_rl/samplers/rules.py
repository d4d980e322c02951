"""Which masked positions come next (rank), and how many of them at once (commit). Users can pass their own.

A rank scores each of K masked positions; the highest are committed first. A rank takes by name what it needs:
    logits      (K, V)  untempered fp32 logits, suppressed ids at -inf except the mask token, which is never sampled
    normalizer  (K,)    their log-sum-exp: logits - normalizer are log-probabilities in nats
    tokens      (K,)    the tokens sampled there
    uniforms    (K,)    fresh random numbers in [0, 1)
    hidden      (K, D)  the last hidden states, which the model's head turns into logits; in the model's dtype
A rank without `tokens` is a function of the state alone. The order is then independent of the draws, and log-probs at
commit are the exact behaviour probabilities.

A commit rule (scores (B, L), masked (B, L), steps_left (B,)) -> (B, L) picks masked positions; scores are -inf
elsewhere. steps_left counts the block's remaining steps, this one included. A rule must have chosen a position by the
last step. Bind hyper-parameters with functools.partial. Rules that rewrite what a block holds are in `revise`.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.bounds import Bound, bounded
from dllm_rl.models.order import highest
from dllm_rl.models.soft_threshold import drawn_set

Logits = Float[Tensor, "K V"]
PerPosition = Float[Tensor, " K"]
Scores = Float[Tensor, "B L"]
Places = Bool[Tensor, "B L"]
Counts = Int[Tensor, " B"]
RANK_INPUTS = ("logits", "normalizer", "tokens", "uniforms", "hidden")


def confidence(logits: Logits, normalizer: PerPosition, tokens: Int[Tensor, " K"]) -> PerPosition:
    """LLaDA's low_confidence remasking: log-probability of the SAMPLED token, nats.

    The commit depends on the draw, so at-commit log-probs are not the exact behaviour probabilities [paper].
    `Order.logprobs` of the rollout records the rest, and `trajectory()` scores it [ours].
    """
    return logits.gather(-1, tokens[:, None])[:, 0] - normalizer


def max_prob(logits: Logits, normalizer: PerPosition) -> PerPosition:
    """Log-probability of the likeliest token, nats; the mask token counts. State-only. [paper: Dream's maskgit_plus at
    temperature 0]
    """
    return logits.amax(-1) - normalizer


def margin(logits: Logits, normalizer: PerPosition) -> PerPosition:
    """Probability of the likeliest token minus that of the second. State-only. [paper: Dream's topk_margin]"""
    if logits.shape[-1] < 2:
        raise ValueError("margin needs a vocabulary of at least 2 tokens")
    first, second = (logits.topk(2, dim=-1).values - normalizer[:, None]).exp().unbind(-1)
    return first - second


def entropy(logits: Logits, normalizer: PerPosition) -> PerPosition:
    """Minus the entropy, sum_v p_v log p_v, nats. State-only. [paper: Dream's, there tempered and filtered]"""
    logp = logits - normalizer[:, None]
    return (logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)  # before the product: finite gradients


def random(uniforms: PerPosition) -> PerPosition:
    """A uniformly random order, as LLaDA's remasking="random" and Dream's origin. State-only. [paper]"""
    return uniforms


@bounded(temperature=Bound(above=0))
def plackett_luce(
    logits: Logits, normalizer: PerPosition, *, temperature: float, base_rank: Callable = max_prob
) -> PerPosition:
    """S = base_rank / temperature, to which the sampler adds Gumbel noise: an order with a known probability [ours].

    A step commits j_1 .. j_k, in the order of noisy scores, with probability (Plackett-Luce [paper])
        prod_{i=1..k} exp(s_{j_i}) / sum_{m masked, not j_1 .. j_(i-1)} exp(s_m).
    It is that of the ORDERED draw; the set's is a sum over k! orders. Given the set, the mean of the ordered ratio is
    the set's ratio: weights and gradients stay unbiased. A step that commits all that is left counts 1.
    Needs `schedule` or `late_schedule`.

    Args:
        temperature: Towards 0 the order of `base_rank`, towards infinity that of `random`.
        base_rank: Max_prob, margin, entropy, or a function of your own with the same arguments.
    """
    if rank_inputs(base_rank) != {"logits", "normalizer"}:
        raise ValueError(
            f"base_rank={name_of(base_rank)} must take logits and normalizer, as max_prob, margin and entropy do"
        )
    return base_rank(logits, normalizer) / temperature


def rank_inputs(rank: Callable) -> frozenset[str]:
    """Which of RANK_INPUTS a rank takes. Raises ValueError when it wants anything else."""
    parameters = inspect.signature(rank).parameters.values()
    unknown = [p.name for p in parameters if p.name not in RANK_INPUTS and p.default is p.empty]
    if unknown:
        raise ValueError(
            f"rank {name_of(rank)} takes {unknown[0]!r}, which is not one of {', '.join(RANK_INPUTS)}; "
            "bind it with functools.partial"
        )
    return frozenset(p.name for p in parameters if p.name in RANK_INPUTS)


def name_of(rule: Any) -> str:
    return getattr(getattr(rule, "func", rule), "__name__", repr(rule))


def schedule(scores: Scores, masked: Places, steps_left: Counts) -> Places:
    """LLaDA's equal shares of a block, the remainder on the first steps: ceil(masked / steps_left). [paper]"""
    return highest(scores, masked, count=share(masked.sum(-1), steps_left))


def share(num_masked: Counts, steps_left: Counts) -> Counts:
    """How many positions `schedule` commits: ceil(num_masked / steps_left)."""
    return -(-num_masked // steps_left)


def late_schedule(scores: Scores, masked: Places, steps_left: Counts) -> Places:
    """Dream's shares, floor(masked / steps_left), with the remainder on the last steps.

    [paper; ours: Dream's time grid ends at 1e-3 instead of 0, so that Dream commits nothing in some steps]
    """
    return highest(scores, masked, count=late_share(masked.sum(-1), steps_left))


def late_share(num_masked: Counts, steps_left: Counts) -> Counts:
    """How many positions `late_schedule` commits: floor(num_masked / steps_left)."""
    return num_masked // steps_left


def origin(scores: Scores, masked: Places, steps_left: Counts) -> Places:
    """Dream's origin, the ancestral step of masked diffusion: write each masked position with probability 1 - s/t =
    1/steps_left. Needs rank=random, whose scores are the uniforms. A step may commit nothing. [paper]
    """
    return masked & (scores >= 1 - 1 / steps_left[:, None])


@bounded(tau=Bound(above=0, at_most=1))
def threshold(scores: Scores, masked: Places, steps_left: Counts, *, tau: float) -> Places:
    """Fast-dLLM's parallel decoding (arXiv 2505.22618): all positions with probability >= tau, at least the best one.
    Needs log-probabilities as scores (confidence, max_prob). Ignores steps_left. [paper]

    Args:
        tau: The probability from which on a position is written, in (0, 1].
    """
    log_tau = torch.tensor(tau, dtype=torch.float64).log().item()
    return masked & (scores >= log_tau) | highest(scores, masked, count=torch.ones_like(steps_left))


@bounded(tau=Bound(above=0, below=1), temperature=Bound(at_least=0.01))
def soft_threshold(
    scores: Scores,
    masked: Places,
    steps_left: Counts,
    uniforms: Scores,  # fresh random numbers in [0, 1)
    *,
    tau: float,
    temperature: float = 0.5,
) -> Places:
    """`threshold` by independent draws (`models.soft_threshold`): each masked position is written with
    probability sigmoid((logit p - logit tau) / temperature), independently, given that one at least is. [ours]

    Args:
        tau: The probability at which a position is written every second time, in (0, 1).
        temperature: At least 0.01; towards 0 the rule is `threshold`. At tau=0.9 a position of p=0.99 is written with
            probability 0.992 at temperature 0.5 and 0.92 at 1, one of p=0.5 with 0.012 and 0.1.

    `threshold` writes a number of positions that is a function of the weights, and no gradient sees it. Of this rule
    `trajectory()` scores the set that each step wrote (docs/order.md). Needs rank=max_prob. Ignores steps_left.
    """
    return drawn_set(scores, masked, uniforms, tau=tau, temperature=temperature)


def softness(commit: Callable) -> tuple[float, float]:
    """Tau and temperature of a bound `soft_threshold`."""
    given = inspect.signature(commit).parameters
    if given["tau"].default is inspect.Parameter.empty:
        raise ValueError("commit=soft_threshold lacks its tau; give functools.partial(soft_threshold, tau=0.9)")
    return float(given["tau"].default), float(given["temperature"].default)


@bounded(f=Bound(above=0))
def factor(scores: Scores, masked: Places, steps_left: Counts, *, f: float) -> Places:
    """Fast-dLLM's factor rule: the n best, n the largest with p_(n) >= 1 - f/(n+1), p sorted downwards; at least one.
    Needs log-probabilities as scores (confidence, max_prob). Ignores steps_left. [paper]

    Args:
        f: Above 0; larger writes more at once.
    """
    best = scores.sort(dim=-1, descending=True).values.exp()
    n = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    count = torch.where(best >= 1 - f / (n + 1), n, 1).amax(-1)
    return highest(scores, masked, count=count)


@bounded(gamma=Bound(at_least=0))
def entropy_bound(scores: Scores, masked: Places, steps_left: Counts, *, gamma: float) -> Places:
    """EB-Sampler (arXiv 2505.24857): the most certain positions U, as many as keep sum_U H - max_U H <= gamma, nats.
    Needs rank=entropy, whose scores are -H; one position always fits. Ignores steps_left. [paper]

    Args:
        gamma: The bound, nats; larger writes more at once.
    """
    entropies = -scores.sort(dim=-1, descending=True).values
    # In rising order the largest is the last, so what counts is the sum of those before it.
    before = torch.nn.functional.pad(entropies.cumsum(-1)[:, :-1], (1, 0))
    return highest(scores, masked, count=(before <= gamma).sum(-1))


def check_steps(diffusion_steps: int | None, length: int, count: Callable | None) -> None:
    """Raise ValueError if a rule whose `count` writes a position in each step would take fewer than
    `diffusion_steps`.
    """
    if diffusion_steps is None or count is None or not 0 < length < diffusion_steps:
        return
    if count(torch.tensor([length]), torch.tensor([diffusion_steps])) > 0:
        wrong = f"diffusion_steps={diffusion_steps} is more than the {length} tokens of a completion"
        raise ValueError(f"{wrong}, and a step writes at least one; use at most {length}")


def steps_per_block(diffusion_steps: int | None, sizes: list[int]) -> list[int]:
    """Equal shares of steps per block, the remainder on the first; None: one step per position. Raises ValueError with
    fewer steps than blocks.
    """
    if diffusion_steps is None:
        return sizes
    if diffusion_steps < len(sizes):
        raise ValueError(
            f"diffusion_steps={diffusion_steps} is fewer than the {len(sizes)} blocks, each of which needs one; "
            f"use at least {len(sizes)}"
        )
    each, remainder = divmod(diffusion_steps, len(sizes))
    return [each + (i < remainder) for i in range(len(sizes))]


def check_last_step(
    name: str, steps_left: Int[Tensor, " R"], num_masked: Int[Tensor, " R"], committed: Int[Tensor, " R"]
) -> None:
    """Raise ValueError where a block's last step commits none of its masked positions."""
    if ((steps_left == 1) & (num_masked > 0) & (committed == 0)).any():
        wrong = f"commit={name} chose nothing in the last step of a block; it must choose a position by then"
        raise ValueError(f"{wrong}: are the rank's scores those that it wants?")
