"""Ranks, which score the masked positions, and commit rules, which choose the positions that a step writes.

Custom functions can be passed in place of both. A rank scores each of K masked positions; positions with the highest
scores are committed first. A rank receives by name the inputs that it needs:
    logits (K, V): untempered fp32 logits. Suppressed ids are at -inf; the mask token keeps its logit, although it is
        never drawn
    normalizer (K,): log-sum-exp of the logits: logits - normalizer are log-probabilities in nats
    tokens (K,): the tokens sampled at the positions
    uniforms (K,): fresh random numbers in [0, 1)
    hidden (K, D): the last hidden states, which the model's head turns into logits; in the model's dtype

If a rank does not take `tokens`, the order does not depend on the drawn tokens, and the log-probs of committed tokens
are exact: the sampler draws the tokens with these probabilities.

A commit rule is a function (scores (B, L), masked (B, L), steps_left (B,)) -> positions to write (B, L). Scores are
-inf at positions that are not masked. steps_left is the number of remaining steps of the block, including the current
one. In the last step of a block, a rule must choose at least one masked position. Bind hyperparameters with
functools.partial. Rules that rewrite a block's tokens are in `revise`. docs/methods.md explains the tags [paper] and
[ours].
"""

import inspect
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.bounds import Bound, bounded
from dllm_rl.models.order import highest
from dllm_rl.models.soft_threshold import draw_set
from dllm_rl.types import MIN_TEMPERATURE

Logits = Float[Tensor, "K V"]
PerPosition = Float[Tensor, " K"]
Scores = Float[Tensor, "B L"]
PositionMask = Bool[Tensor, "B L"]
Counts = Int[Tensor, " B"]
RANK_INPUTS = ("logits", "normalizer", "tokens", "uniforms", "hidden")


def confidence(logits: Logits, normalizer: PerPosition, tokens: Int[Tensor, " K"]) -> PerPosition:
    """Rank positions by the log-probability of the SAMPLED token, in nats (LLaDA's low_confidence remasking).

    Use it to reproduce LLaDA's sampler [paper]; use `max_prob` for an order that does not depend on the drawn tokens.
    The order depends on the drawn tokens, so that the log-probs of committed tokens alone are not exact. The rollout
    therefore records the log-prob of the order in `Order.logprobs`, and `trajectory()` computes the log-prob of the
    order as well [ours].
    """
    return logits.gather(-1, tokens[:, None])[:, 0] - normalizer


def max_prob(logits: Logits, normalizer: PerPosition) -> PerPosition:
    """Rank positions by the log-probability of the likeliest token, in nats.

    Use it as the default: the order does not depend on the drawn tokens. The likeliest token may be the mask
    token, although it is never drawn. Source: Dream's maskgit_plus at temperature 0 [paper].
    """
    return logits.amax(-1) - normalizer


def margin(logits: Logits, normalizer: PerPosition) -> PerPosition:
    """Rank positions by the probability of the likeliest token minus the probability of the second.

    Use it to prefer positions without a close competitor. The order does not depend on the drawn tokens. Source:
    Dream's topk_margin [paper].
    """
    if logits.shape[-1] < 2:
        raise ValueError("margin needs a vocabulary of at least 2 tokens")
    first, second = (logits.topk(2, dim=-1).values - normalizer[:, None]).exp().unbind(-1)
    return first - second


def entropy(logits: Logits, normalizer: PerPosition) -> PerPosition:
    """Rank positions by minus their entropy, sum_v p_v log p_v, in nats.

    Use it with `entropy_bound`, which reads these scores. The order does not depend on the drawn tokens. Source: Dream
    [paper], whose entropy is that of the tempered and filtered distribution.
    """
    logp = logits - normalizer[:, None]
    return (logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)  # -inf would give NaN gradients


def random(uniforms: PerPosition) -> PerPosition:
    """Rank positions in a uniformly random order.

    Use it with `origin` and `remask`, which read these scores, or for an order that does not depend on the model.
    Source: LLaDA's remasking="random" and Dream's origin [paper].
    """
    return uniforms


@bounded(temperature=Bound(at_least=MIN_TEMPERATURE))
def plackett_luce(
    logits: Logits, normalizer: PerPosition, *, temperature: float, base_rank: Callable = max_prob
) -> PerPosition:
    """Rank positions by base_rank / temperature; the sampler adds Gumbel noise, so that the order has a probability.

    Use it to train the order together with the tokens: `trajectory()` computes the log-probs of both. It needs the
    commit rule `schedule` or `late_schedule`.

    With s = base_rank / temperature, a step commits the positions j_1 .. j_k, sorted by noisy score, with probability
    (Plackett-Luce [paper])
        prod_{i=1..k} exp(s_{j_i}) / sum_{m masked, not j_1 .. j_(i-1)} exp(s_m).
    This is the probability of the ORDERED draw; the probability of the set would be a sum over k! orders. The ratio of
    two policies' probabilities of the ordered draw, averaged over the orders in which the sampler may draw a set, is
    the ratio of their probabilities of the set. So importance weights and gradients stay unbiased. A step that commits
    all remaining positions has probability 1.

    Args:
        logits: Untempered fp32 logits (K, V).
        normalizer: Log-sum-exp of the logits (K,).
        temperature: Temperature of the order, at least 1e-30. Towards 0 the order is that of `base_rank`, towards
            infinity that of `random`.
        base_rank: Rank to which noise is added: max_prob, margin, entropy, or a custom function with the same
            arguments. The order of a custom one has a known probability only if it is declared:
            `Rank(own, "deterministic")`.

    Source: ours.
    """
    return base_rank(logits=logits, normalizer=normalizer) / temperature


def rank_inputs(rank: Callable) -> frozenset[str]:
    """Return the RANK_INPUTS that a rank takes. Raise ValueError if it requires any other input."""
    parameters = inspect.signature(rank).parameters.values()
    unknown = [p.name for p in parameters if p.name not in RANK_INPUTS and p.default is p.empty]
    if unknown:
        raise ValueError(
            f"rank {name_of(rank)} takes {unknown[0]!r}, which is not one of {', '.join(RANK_INPUTS)}; "
            "bind it with functools.partial"
        )
    return frozenset(p.name for p in parameters if p.name in RANK_INPUTS)


def name_of(rule: object) -> str:
    """Return the name of a rule's function, without the settings that are bound to it."""
    return getattr(getattr(rule, "func", rule), "__name__", repr(rule))


def schedule(scores: Scores, masked: PositionMask, steps_left: Counts) -> PositionMask:
    """Commit an equal share of a block per step, with the remainder on the first steps: ceil(masked / steps_left).

    Use it as the default; the number of steps is then `diffusion_steps`. Source: LLaDA [paper].
    """
    return highest(scores, masked, count=schedule_count(masked.sum(-1), steps_left))


def schedule_count(num_masked: Counts, steps_left: Counts) -> Counts:
    """Return the number of positions that `schedule` commits: ceil(num_masked / steps_left)."""
    return -(-num_masked // steps_left)


def late_schedule(scores: Scores, masked: PositionMask, steps_left: Counts) -> PositionMask:
    """Commit an equal share of a block per step, with the remainder on the last steps: floor(masked / steps_left).

    Use it to reproduce Dream [paper]. Dream's time grid ends at 1e-3, and its steps may commit nothing; here it ends at
    0 [ours].
    """
    return highest(scores, masked, count=late_schedule_count(masked.sum(-1), steps_left))


def late_schedule_count(num_masked: Counts, steps_left: Counts) -> Counts:
    """Return the number of positions that `late_schedule` commits: floor(num_masked / steps_left)."""
    return num_masked // steps_left


def origin(scores: Scores, masked: PositionMask, steps_left: Counts) -> PositionMask:
    """Write each masked position with probability 1/steps_left, the ancestral step of masked diffusion.

    Use it with rank=random, whose scores are uniform random numbers. A step may commit nothing. Source: Dream's origin
    [paper].
    """
    return masked & (scores >= 1 - 1 / steps_left[:, None])


@bounded(tau=Bound(above=0, at_most=1))
def threshold(scores: Scores, masked: PositionMask, steps_left: Counts, *, tau: float) -> PositionMask:
    """Commit all positions with probability >= tau, and at least the best one (Fast-dLLM's parallel decoding).

    Use it to take fewer steps where the model is certain. It needs log-probabilities as scores (rank=confidence or
    max_prob). With max_prob the log-probs of `trajectory()` are exact for the positions that were written. How many are
    written also depends on the model, and only `soft_threshold` gives this number a gradient.

    Args:
        scores: Log-probabilities (B, L); -inf at positions that are not masked.
        masked: Masked positions (B, L).
        steps_left: Remaining steps (B,); not used.
        tau: Lowest probability at which a position is written, in (0, 1].

    Source: Fast-dLLM, arXiv 2505.22618 [paper].
    """
    log_tau = torch.tensor(tau, dtype=torch.float64).log().item()
    return masked & (scores >= log_tau) | highest(scores, masked, count=torch.ones_like(steps_left))


@bounded(tau=Bound(above=0, below=1), temperature=Bound(at_least=0.01))
def soft_threshold(
    scores: Scores,
    masked: PositionMask,
    steps_left: Counts,
    uniforms: Scores,  # fresh random numbers in [0, 1)
    *,
    tau: float,
    temperature: float = 0.5,
) -> PositionMask:
    """Commit each masked position independently, with a probability that rises around tau (`models.soft_threshold`).

    Use it in place of `threshold` for training: `trajectory()` also computes the log-prob of the set of positions that
    each step of this rule wrote (docs/order.md), and this log-prob has a gradient. Which positions `threshold` writes
    depends on the weights too, but has no gradient.

    The rule needs rank=max_prob. A position is written with probability sigmoid((logit p - logit tau) / temperature),
    independently, given that at least one position is written.

    Args:
        scores: Log-probabilities (B, L); -inf at positions that are not masked.
        masked: Masked positions (B, L).
        steps_left: Remaining steps (B,); not used.
        uniforms: Fresh random numbers in [0, 1), (B, L).
        tau: Value of p at which a position is written with probability 1/2, in (0, 1).
        temperature: Width of the transition, at least 0.01; towards 0 the rule becomes `threshold`. With tau=0.9, a
            position with p=0.99 is written with probability 0.992 at temperature 0.5 and 0.92 at temperature 1; a
            position with p=0.5 with probability 0.012 and 0.1.

    Source: ours.
    """
    return draw_set(scores, masked, uniforms, tau=tau, temperature=temperature)


def soft_threshold_params(commit: Callable) -> tuple[float, float]:
    """Return tau and temperature that a partial of `soft_threshold` binds."""
    parameters = inspect.signature(commit).parameters
    if parameters["tau"].default is inspect.Parameter.empty:
        raise ValueError("commit=soft_threshold lacks its tau; give functools.partial(soft_threshold, tau=0.9)")
    return float(parameters["tau"].default), float(parameters["temperature"].default)


@bounded(f=Bound(above=0))
def factor(scores: Scores, masked: PositionMask, steps_left: Counts, *, f: float) -> PositionMask:
    """Commit the n positions with the highest p, for the largest n whose n-th p is >= 1 - f/(n+1); at least one.

    Use it in place of `threshold`, if more positions per step should require more certainty. It needs
    log-probabilities as scores (rank=confidence or max_prob).

    Args:
        scores: Log-probabilities (B, L); -inf at positions that are not masked.
        masked: Masked positions (B, L).
        steps_left: Remaining steps (B,); not used.
        f: Tolerance, above 0. A larger value writes more positions per step.

    Source: Fast-dLLM's factor rule, arXiv 2505.22618 [paper].
    """
    sorted_probs = scores.sort(dim=-1, descending=True).values.exp()
    n = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    count = torch.where(sorted_probs >= 1 - f / (n + 1), n, 1).amax(-1)
    return highest(scores, masked, count=count)


@bounded(gamma=Bound(at_least=0))
def entropy_bound(scores: Scores, masked: PositionMask, steps_left: Counts, *, gamma: float) -> PositionMask:
    """Commit the positions U of lowest entropy H, as many as satisfy sum_U H - max_U H <= gamma, in nats (EB-Sampler).

    Use it to take fewer steps with a bound on the dependence between the tokens of a step. It needs rank=entropy, whose
    scores are -H. A single position always satisfies the bound.

    Args:
        scores: Minus the entropies (B, L) in nats; -inf at positions that are not masked.
        masked: Masked positions (B, L).
        steps_left: Remaining steps (B,); not used.
        gamma: Bound, at least 0, in nats. A larger value writes more positions per step.

    Source: EB-Sampler, arXiv 2505.24857 [paper].
    """
    entropies = -scores.sort(dim=-1, descending=True).values
    # In ascending order the last entropy of U is the largest, so that the bound applies to the sum of the earlier ones.
    before = torch.nn.functional.pad(entropies.cumsum(-1)[:, :-1], (1, 0))
    return highest(scores, masked, count=(before <= gamma).sum(-1))


def check_steps(diffusion_steps: int | None, length: int, count: Callable | None) -> None:
    """Raise ValueError if both hold: there are more steps than positions, and every step commits at least one position.

    Args:
        diffusion_steps: Number of steps. None: not checked.
        length: Number of positions.
        count: Function from (num_masked, steps_left) to the number of positions that the commit rule commits, such as
            `schedule_count`. None: the rule has no such function, and is not checked.
    """
    if diffusion_steps is None or count is None or not 0 < length < diffusion_steps:
        return
    if count(torch.tensor([length]), torch.tensor([diffusion_steps])) > 0:
        raise ValueError(
            f"diffusion_steps={diffusion_steps} is more than the {length} tokens of a completion, and a step writes at "
            f"least one; use at most {length}"
        )


def steps_per_block(diffusion_steps: int | None, sizes: list[int]) -> list[int]:
    """Divide the steps equally between blocks of these sizes, with the remainder on the first blocks.

    Without `diffusion_steps` a block has one step per position. Raise ValueError if there are fewer steps than blocks.
    """
    if diffusion_steps is None:
        return sizes
    if diffusion_steps < len(sizes):
        raise ValueError(
            f"diffusion_steps={diffusion_steps} is fewer than the {len(sizes)} blocks, each of which needs one; "
            f"use at least {len(sizes)}"
        )
    per_block, remainder = divmod(diffusion_steps, len(sizes))
    return [per_block + (i < remainder) for i in range(len(sizes))]


def check_last_step(
    name: str, steps_left: Int[Tensor, " R"], num_masked: Int[Tensor, " R"], committed: Int[Tensor, " R"]
) -> None:
    """Raise ValueError if the last step of a block commits none of its masked positions."""
    if ((steps_left == 1) & (num_masked > 0) & (committed == 0)).any():
        raise ValueError(
            f"commit={name} chose nothing in the last step of a block, where it must choose a position: does it need "
            "the scores of another rank?"
        )
