"""Ranks, which score the masked positions, and commit rules, which choose the positions that a step writes.

docs/papers.md explains the tags [paper] and [ours]. Rules that rewrite a block's tokens are in `revise`.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.decoding.order import draw_set
from dllm_rl.records import FunctionRecord, Record, option
from dllm_rl.types.rollouts import MIN_TEMPERATURE

Logits = Float[Tensor, "K V"]
PerPosition = Float[Tensor, " K"]
Scores = Float[Tensor, "B L"]
PositionMask = Bool[Tensor, "B L"]
Counts = Int[Tensor, " B"]
RANK_INPUTS = ("logits", "normalizer", "tokens", "uniforms", "hidden", "positions")
COMMIT_INPUTS = ("remaskable", "redrawable", "replaceable", "steps", "uniforms")
REWRITES = COMMIT_INPUTS[:3]
SCORED_ORDERS = ("confidence", "plackett_luce", "soft_threshold")  # samplers record their log-probability


def rank_inputs(name: str, rule: Callable) -> frozenset[str]:
    """Return the RANK_INPUTS that a rank takes. Raise ValueError if it requires any other input."""
    parameters = [p for p in inspect.signature(rule).parameters.values() if p.name != "self"]
    unknown = [p.name for p in parameters if p.name not in RANK_INPUTS and p.default is p.empty]
    if unknown:
        raise ValueError(
            f"rank={name} takes {unknown[0]!r}, which is not one of {', '.join(RANK_INPUTS)}; make it a field of a Rank"
        )
    return frozenset(p.name for p in parameters if p.name in RANK_INPUTS)


def commit_inputs(name: str, rule: Callable) -> frozenset[str]:
    """Return the COMMIT_INPUTS that a rule takes. Raise ValueError if it takes more than one of REWRITES."""
    parameters = inspect.signature(rule).parameters.values()
    inputs = frozenset(p.name for p in parameters if p.name in COMMIT_INPUTS and p.default is p.empty)
    rewrites = [kind for kind in REWRITES if kind in inputs]
    if len(rewrites) > 1:
        raise ValueError(
            f"commit={name} takes {' and '.join(rewrites)}, which contradict each other about a position that it "
            "picks: take one of them"
        )
    return inputs


class _Rule:
    """What ranks and commit rules share."""

    inputs_of = staticmethod(rank_inputs)

    def __init_subclass__(cls, **keywords: Any) -> None:
        own = vars(cls) | vars(cls).get("__annotations__", {})
        if "__call__" in own:  # the parent's order and inputs are those of other scores
            if "order" not in own:
                setattr(cls, "order", "unknown")  # noqa: B010
            if "reads" not in own:
                setattr(cls, "reads", cls.inputs_of(cls.__name__, cls.__call__))  # noqa: B010
        super().__init_subclass__(**keywords)

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def is_custom(self) -> bool:
        """Whether it comes from outside the library."""
        return isinstance(self, FunctionRecord) or not type(self).__module__.startswith("dllm_rl.")

    def check_order(self, kind: str, order: str, orders: tuple[str, ...]) -> None:
        """Raise ValueError if a custom rule declares none of these orders, and no order of the library's own rules."""
        if self.is_custom and order not in (*orders, "unknown", "max_prob", *SCORED_ORDERS):
            raise ValueError(
                f"{kind}={self.name} declares order={order!r}, which is not one of {', '.join(orders)}; leave order "
                "out if the probability of the positions is not known"
            )


class Rank(_Rule, Record):
    """A score of each of K masked positions; positions with the highest scores are committed first.

    For a custom rank, subclass it, define `__call__`, and declare `order`; where a rank is expected, a plain function
    is one too, whose order is unknown. `__call__` takes by name the inputs that it needs:
        logits (K, V): untempered fp32 logits. Suppressed ids are at -inf; the mask token keeps its logit, although it
            is never drawn
        normalizer (K,): log-sum-exp of the logits: logits - normalizer are log-probabilities in nats
        tokens (K,): the tokens sampled at the positions
        uniforms (K,): fresh random numbers in [0, 1)
        hidden (K, D): the last hidden states, which the model's head turns into logits; in the model's dtype
        positions (K,): the places of the positions in their completions, from 0

    If a rank does not take `tokens`, the order does not depend on the drawn tokens, and the log-probs of committed
    tokens are exact: the sampler draws the tokens with these probabilities.
    """

    @property
    def order(self) -> str:
        """The kind of order that the scores make.

        "deterministic": the scores are a function of the canvas and the weights. "independent": they are random numbers
        that do not depend on the weights. "unknown": neither is known. `Confidence`, `MaxProb` and `PlackettLuce` have
        kinds of their own, see `order_probability`.
        """
        return "unknown"

    @property
    def reads(self) -> frozenset[str]:
        """The RANK_INPUTS that `__call__` takes. A subclass's are read once, when it is defined."""
        return frozenset()

    adds_gumbel = False  # whether the sampler adds Gumbel noise to the scores, as for `PlackettLuce`

    def __call__(self, *arguments: Any, **inputs: Any) -> PerPosition:
        """Return the scores (K,)."""
        raise TypeError(f"{type(self).__name__} must define __call__ with some of {', '.join(RANK_INPUTS)}")

    def check(self) -> None:
        self.check_order("rank", self.order, ("deterministic", "independent"))
        allowed = {
            "deterministic": {"logits", "normalizer", "hidden", "positions"},
            "independent": {"uniforms", "positions"},
        }
        contradicting = self.reads - allowed.get(self.order, self.reads)
        if contradicting:
            read, readable = (", ".join(sorted(names)) for names in (contradicting, allowed[self.order]))
            raise ValueError(
                f"rank={self.name} is declared {self.order}, but reads {read}; read only {readable}, or declare "
                "another order, or none"
            )


class FunctionRank(FunctionRecord, Rank):
    """A rank that a function computes.

    Args:
        function: Function that scores positions, with the inputs of `Rank` that it needs.
        order: "deterministic", "independent" or "unknown" (default), see `Rank.order`.
    """

    order: Literal["unknown", "deterministic", "independent"] = "unknown"

    @property
    def reads(self) -> frozenset[str]:
        return rank_inputs(self.name, self.function)


class Confidence(Rank):
    """Rank positions by the log-probability of the SAMPLED token, in nats (LLaDA's low_confidence remasking).

    Use it to reproduce LLaDA's sampler [paper]; use `MaxProb` for an order that does not depend on the drawn tokens.
    The order depends on the drawn tokens, so that the log-probs of committed tokens alone are not exact. The rollout
    therefore records the log-prob of the order in `Order.logprobs`, and `Trajectory` computes the log-prob of the
    order as well [ours].
    """

    order = "confidence"

    def __call__(self, logits: Logits, normalizer: PerPosition, tokens: Int[Tensor, " K"]) -> PerPosition:
        return logits.gather(-1, tokens[:, None])[:, 0] - normalizer


class MaxProb(Rank):
    """Rank positions by the log-probability of the likeliest token, in nats.

    Use it as the default: the order does not depend on the drawn tokens. The likeliest token may be the mask
    token, although it is never drawn. Source: Dream's maskgit_plus at temperature 0 [paper].
    """

    order = "max_prob"

    def __call__(self, logits: Logits, normalizer: PerPosition) -> PerPosition:
        return logits.amax(-1) - normalizer


class Margin(Rank):
    """Rank positions by the probability of the likeliest token minus the probability of the second.

    Use it to prefer positions without a close competitor. The order does not depend on the drawn tokens. Source:
    Dream's topk_margin [paper].
    """

    order = "deterministic"

    def __call__(self, logits: Logits, normalizer: PerPosition) -> PerPosition:
        if logits.shape[-1] < 2:
            raise ValueError("Margin needs a vocabulary of at least 2 tokens")
        first, second = (logits.topk(2, dim=-1).values - normalizer[:, None]).exp().unbind(-1)
        return first - second


class Entropy(Rank):
    """Rank positions by minus their entropy, sum_v p_v log p_v, in nats.

    Use it with `EntropyBound`, which reads these scores. The order does not depend on the drawn tokens. Source: Dream
    [paper], whose entropy is that of the tempered and filtered distribution.
    """

    order = "deterministic"

    def __call__(self, logits: Logits, normalizer: PerPosition) -> PerPosition:
        logp = logits - normalizer[:, None]
        return (logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)  # -inf would give NaN gradients


class RandomOrder(Rank):
    """Rank positions in a uniformly random order.

    Use it with `Origin` and `Remask`, which read these scores, or for an order that does not depend on the weights.
    Source: LLaDA's remasking="random" and Dream's origin [paper].
    """

    order = "independent"

    def __call__(self, uniforms: PerPosition) -> PerPosition:
        return uniforms


class LeftToRight(Rank):
    """Rank positions from left to right, so that each step writes the leftmost masked positions of the block.

    Use it for an order that does not depend on the weights, such as JustGRPO's (arXiv 2601.15165 [paper]), with any
    number of positions a step.
    """

    order = "independent"

    def __call__(self, positions: Int[Tensor, " K"]) -> PerPosition:
        return -positions.float()


class PlackettLuce(Rank):
    """Rank positions by base_rank / temperature; the sampler adds Gumbel noise, so that the order has a probability.

    Use it to train the order together with the tokens: `Trajectory` computes the log-probs of both. It needs a
    commit rule with `Commit.count`, such as `Schedule`.

    With s = base_rank / temperature, a step commits the positions j_1 .. j_k, sorted by noisy score, with probability
    (Plackett-Luce [paper])
        prod_{i=1..k} exp(s_{j_i}) / sum_{m masked, not j_1 .. j_(i-1)} exp(s_m).
    This is the probability of the ORDERED draw; the probability of the set would be a sum over k! orders. The ratio of
    two policies' probabilities of the ordered draw, averaged over the orders in which the sampler may draw a set, is
    the ratio of their probabilities of the set. So importance weights and gradients stay unbiased. A step that commits
    all remaining positions has probability 1.

    Args:
        temperature: Temperature of the order, at least 1e-30. Towards 0 the order is that of `base_rank`, towards
            infinity that of `RandomOrder`.
        base_rank: Rank to which noise is added: MaxProb(), Margin(), Entropy(), or a custom rank of logits, normalizer
            and hidden. The order of a custom one has a known probability only if it is declared "deterministic". It may
            have weights of its own, which training changes between steps (recipes/examples/learned_order.py).

    Source: ours.
    """

    temperature: float = option(at_least=MIN_TEMPERATURE)
    base_rank: Rank = MaxProb()

    @property
    def order(self) -> str:
        return "unknown" if self.base_rank.order == "unknown" else "plackett_luce"

    adds_gumbel = True

    @property
    def reads(self) -> frozenset[str]:
        return self.base_rank.reads

    def check(self) -> None:
        if not self.reads or self.reads - {"logits", "normalizer", "hidden"}:
            raise ValueError(
                f"base_rank={self.base_rank.name} must take some of logits, normalizer and hidden and no other input, "
                "as MaxProb, Margin and Entropy do"
            )

    def __call__(self, **inputs: Any) -> PerPosition:
        return self.base_rank(**inputs) / self.temperature


# Ranks by name whose scores are a function of the canvas and the weights, without random numbers and drawn tokens.
DETERMINISTIC: dict[str, Rank] = {rank.name: rank for rank in (MaxProb(), Margin(), Entropy())}


class Commit(_Rule, Record):
    """A rule that chooses the positions that a step writes.

    For a custom rule, subclass it, define `__call__`, and declare `order`; where a rule is expected, a plain function
    is one too, whose order is unknown. `__call__` takes
        scores (B, L): scores of the rank; -inf at positions that are not masked
        masked (B, L): masked positions
        steps_left (B,): remaining steps of the block, including the current one
    and any of these by name:
        steps (B,): total number of steps of the block
        uniforms (B, L): fresh random numbers in [0, 1); with rank=RandomOrder() the same numbers as the scores
        one of REWRITES (B, L), for a rule that rewrites tokens, see `revise`
    and returns the positions to write (B, L). In the last step of a block it must choose at least one masked position.
    """

    @property
    def order(self) -> str:
        """The kind of order that the choice of positions makes.

        "deterministic": the positions are a function of the rule's inputs, and the rule does not compare `uniforms`
        with numbers that depend on the weights, because the positions would then have a probability that depends on the
        weights. "unknown": not known. `SoftThreshold` has a kind of its own.
        """
        return "unknown"

    @property
    def count(self) -> Callable[[Counts, Counts], Counts] | None:
        """Function (number of masked positions, steps left) -> number of positions that the rule picks.

        They are those with the highest scores; all, if the number is larger. None: the number depends on the scores.
        """
        return None

    @property
    def adaptive(self) -> bool:
        """Whether the rule, and not `diffusion_steps`, determines how many steps a block takes."""
        return False

    @property
    def required_ranks(self) -> tuple[Rank, ...]:
        """The ranks whose scores the rule can read, the usual one first; (): any rank's."""
        return ()

    inputs_of = staticmethod(commit_inputs)

    @property
    def reads(self) -> frozenset[str]:
        """The COMMIT_INPUTS that `__call__` takes. A subclass's are read once, when it is defined."""
        return frozenset()

    @property
    def revises(self) -> bool:
        """Whether the rule rewrites tokens of a block."""
        return not self.reads.isdisjoint(REWRITES)

    @property
    def takes_highest(self) -> bool:
        """Whether the rule is known to pick the highest scores, and how many does not depend on the scores."""
        return self.order == "deterministic" and self.has_count

    @property
    def has_count(self) -> bool:
        """Whether `count` says how many positions a step writes. Of a rule that rewrites it says nothing."""
        return self.count is not None and not self.revises

    def __call__(self, *arguments: Any, **inputs: Any) -> PositionMask:
        """Return the positions to write (B, L)."""
        raise TypeError(f"{type(self).__name__} must define __call__(scores, masked, steps_left)")

    def check(self) -> None:
        self.check_order("commit", self.order, ("deterministic",))
        self.reads  # noqa: B018  raises if the inputs contradict each other

    def choose(
        self, contradicts: Bool[Tensor, ""], scores: Scores, masked: PositionMask, steps_left: Counts, **inputs: Tensor
    ) -> PositionMask:
        """Return the positions that a call gives, and set `contradicts` to True if they contradict what a custom rule
        declares. It is a tensor on the device, so that the host does not wait for it.

        Raises:
            ValueError: They are not a mask of the shape (B, L).
        """

        def call() -> PositionMask:
            given = {"scores": scores, "masked": masked, "steps_left": steps_left, **inputs}
            if self.is_custom:  # it may write into them
                given = {name: x.clone() for name, x in given.items()}
            chosen: Any = self(given.pop("scores"), given.pop("masked"), given.pop("steps_left"), **given)
            if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != masked.shape:
                is_tensor = isinstance(chosen, Tensor)
                kind = f"{chosen.dtype} of the shape {tuple(chosen.shape)}" if is_tensor else type(chosen).__name__
                raise ValueError(
                    f"commit={self.name} returned {kind}; return torch.bool of the shape {tuple(masked.shape)} of its "
                    "scores, True at the positions to write"
                )
            return chosen

        chosen = call()
        if self.is_custom and self.has_count:
            expected = highest(scores, masked, count=self.number_to_choose(masked.sum(-1), steps_left))
            contradicts.logical_or_((chosen & masked != expected).any())
        elif self.is_custom and self.order == "deterministic":
            contradicts.logical_or_((chosen != call()).any())
        return chosen

    def contradiction(self) -> str:
        """Return how `choose` found a contradiction, and the remedy."""
        if self.has_count:
            return (
                f"commit={self.name} chose other positions than those with the highest scores, as many as its `count` "
                "says: correct `count` or the choice, or declare no count"
            )
        return (
            f"commit={self.name} is declared deterministic, but chose other positions when it was called again with "
            "the same inputs: take `uniforms` for random numbers, or declare order='unknown'"
        )

    def number_to_choose(self, num_masked: Counts, steps_left: Counts) -> Counts:
        """Return `count` of these numbers, at most the number of masked positions. Raise ValueError if `count` does not
        return a whole number for each row.
        """
        assert self.count is not None, "the caller has asked"
        number = self.count(num_masked.clone(), steps_left.clone())  # a custom one may write into them
        if not isinstance(number, Tensor) or number.shape != num_masked.shape or number.is_floating_point():
            raise ValueError(
                f"count of commit={self.name} must return a whole number for each of its {len(num_masked)} rows, as a "
                f"tensor such as torch.full_like(num_masked, 2), and returned {number!r}"
            )
        return number.minimum(num_masked)


class FunctionCommit(FunctionRecord, Commit):
    """A commit rule that a function computes.

    Args:
        function: Function (scores, masked, steps_left) -> positions (B, L), with the further inputs of `Commit`.
        order: "deterministic" or "unknown" (default), see `Commit.order`.
        count: Function (number of masked positions, steps left) -> number of positions that the rule picks, those with
            the highest scores. None (default): the number depends on the scores.
        adaptive: Whether the rule, and not `diffusion_steps`, determines how many steps a block takes. Default: False.
    """

    order: Literal["unknown", "deterministic"] = "unknown"
    count: Callable[[Tensor, Tensor], Any] | None = None
    adaptive: bool = False

    @property
    def reads(self) -> frozenset[str]:
        return commit_inputs(self.name, self.function)


def descending_index(scores: Float[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """Return each position's index in the descending order of its row's scores. Ties go to the leftmost."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    index = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.zeros_like(order).scatter(-1, order, index)


def highest(
    scores: Float[Tensor, "B L"], masked: Bool[Tensor, "B L"], *, count: Int[Tensor, " B"]
) -> Bool[Tensor, "B L"]:
    """Return the `count` masked positions with the highest scores of every row. Ties go to the leftmost.

    Positions that are not masked must have the score -inf.
    """
    return masked & (descending_index(scores) < count[:, None])


def draw_index(
    noisy_scores: Float[Tensor, "B L"], masked: Bool[Tensor, "B L"], chosen: Bool[Tensor, "B L"]
) -> Int[Tensor, "B L"]:
    """Return each position's index in the order of draws, from 0. Positions that were not chosen come last.

    If all masked positions of a row are chosen, their indices are 0, because nothing depends on the order.
    """
    return descending_index(noisy_scores).masked_fill((chosen == masked).all(-1, keepdim=True), 0)


class Schedule(Commit):
    """Commit an equal share of a block per step, with the remainder on the first steps: ceil(masked / steps_left).

    Use it as the default; the number of steps is then `diffusion_steps`. Source: LLaDA [paper].
    """

    order = "deterministic"

    @staticmethod
    def count(num_masked: Counts, steps_left: Counts) -> Counts:
        return -(-num_masked // steps_left)

    def __call__(self, scores: Scores, masked: PositionMask, steps_left: Counts) -> PositionMask:
        return highest(scores, masked, count=self.count(masked.sum(-1), steps_left))


class LateSchedule(Commit):
    """Commit an equal share of a block per step, with the remainder on the last steps: floor(masked / steps_left).

    Use it to reproduce Dream [paper]. Dream's time grid ends at 1e-3, and its steps may commit nothing; here it ends at
    0 [ours].
    """

    order = "deterministic"

    @staticmethod
    def count(num_masked: Counts, steps_left: Counts) -> Counts:
        return num_masked // steps_left

    def __call__(self, scores: Scores, masked: PositionMask, steps_left: Counts) -> PositionMask:
        return highest(scores, masked, count=self.count(masked.sum(-1), steps_left))


class Origin(Commit):
    """Write each masked position with probability 1/steps_left, the ancestral step of masked diffusion.

    Use it with rank=RandomOrder(), whose scores are uniform random numbers. A step may commit nothing. Source: Dream's
    origin [paper].
    """

    order = "deterministic"
    required_ranks = (RandomOrder(),)

    def __call__(self, scores: Scores, masked: PositionMask, steps_left: Counts) -> PositionMask:
        return masked & (scores >= 1 - 1 / steps_left[:, None])


class Threshold(Commit):
    """Commit all positions with probability >= tau, and at least the best one (Fast-dLLM's parallel decoding).

    Use it to take fewer steps where the model is certain. It needs log-probabilities as scores (rank=Confidence() or
    MaxProb()). With MaxProb() the log-probs of `Trajectory` are exact for the positions that were written. How many are
    written also depends on the model, and only `SoftThreshold` gives this number a gradient.

    Args:
        tau: Lowest probability at which a position is written, in (0, 1].

    Source: Fast-dLLM, arXiv 2505.22618 [paper].
    """

    tau: float = option(above=0, at_most=1)

    order = "deterministic"
    adaptive = True
    required_ranks = (MaxProb(), Confidence())

    def __call__(self, scores: Scores, masked: PositionMask, steps_left: Counts) -> PositionMask:
        return above_threshold(scores, masked, steps_left, self.tau)


def above_threshold(scores: Scores, masked: PositionMask, steps_left: Counts, tau: float) -> PositionMask:
    """Return the masked positions with probability >= tau, and at least the best one of each row."""
    log_tau = torch.tensor(tau, dtype=torch.float64).log().item()
    return masked & (scores >= log_tau) | highest(scores, masked, count=torch.ones_like(steps_left))


class SoftThreshold(Commit):
    """Commit each masked position independently, with a probability that rises around tau (`decoding.order`).

    Use it in place of `Threshold` for training: `Trajectory` also computes the log-prob of the set of positions that
    each step of this rule wrote (docs/sampler.md), and this log-prob has a gradient. Which positions `Threshold` writes
    depends on the weights too, but has no gradient.

    The rule needs rank=MaxProb(). A position is written with probability sigmoid((logit p - logit tau) / temperature),
    independently, given that at least one position is written.

    Args:
        tau: Value of p at which a position is written with probability 1/2, in (0, 1).
        temperature: Width of the transition, at least 0.01; towards 0 the rule becomes `Threshold`. With tau=0.9, a
            position with p=0.99 is written with probability 0.992 at temperature 0.5 and 0.92 at temperature 1; a
            position with p=0.5 with probability 0.012 and 0.1.

    Source: ours.
    """

    tau: float = option(above=0, below=1)
    temperature: float = option(default=0.5, at_least=0.01)

    order = "soft_threshold"
    adaptive = True
    required_ranks = (MaxProb(),)

    def __call__(self, scores: Scores, masked: PositionMask, steps_left: Counts, uniforms: Scores) -> PositionMask:
        return draw_set(scores, masked, uniforms, tau=self.tau, temperature=self.temperature)


class EntropyBound(Commit):
    """Commit the positions U of lowest entropy H, as many as satisfy sum_U H - max_U H <= gamma, in nats (EB-Sampler).

    Use it to take fewer steps with a bound on the dependence between the tokens of a step. It needs rank=Entropy(),
    whose scores are -H. A single position always satisfies the bound.

    Args:
        gamma: Bound, at least 0, in nats. A larger value writes more positions per step.

    Source: EB-Sampler, arXiv 2505.24857 [paper].
    """

    gamma: float = option(at_least=0)

    order = "deterministic"
    adaptive = True
    required_ranks = (Entropy(),)

    def __call__(self, scores: Scores, masked: PositionMask, steps_left: Counts) -> PositionMask:
        entropies = -scores.sort(dim=-1, descending=True).values
        # In ascending order the last entropy of U is the largest, so that the bound applies to the earlier ones' sum.
        before = torch.nn.functional.pad(entropies.cumsum(-1)[:, :-1], (1, 0))
        return highest(scores, masked, count=(before <= self.gamma).sum(-1))


def check_scores(rank: Rank, commit: Commit) -> None:
    """Raise ValueError if a rank of this library has other scores than those that the commit rule reads. Of a custom
    rank nothing is known.
    """
    ranks = commit.required_ranks
    if ranks and rank not in ranks and rank in (*DETERMINISTIC.values(), Confidence(), RandomOrder()):
        raise ValueError(
            f"commit={commit.name}(...) needs the scores of {' or '.join(f'{each.name}()' for each in ranks)}, and "
            f"rank={rank.name} has other scores; use rank={ranks[0].name}()"
        )


def order_probability(rank: Rank, commit: Commit, *, greedy: bool = False) -> str:
    """Return the kind of probability of the order in which the pair writes.

    deterministic  the probability is 1: the order is a function of the canvas and the weights
    independent    the probability does not depend on the weights
    SCORED_ORDERS  samplers record the log-probability, and `Trajectory` scores it
    unknown        the probability is not known
    """
    if "unknown" in (rank.order, commit.order):
        return "unknown"
    is_random = rank.adds_gumbel or commit.order == "soft_threshold"
    depends_on_draws = not greedy and (rank.order == "confidence" or "replaceable" in commit.reads)
    if not is_random and not depends_on_draws:
        return "independent" if rank.order == "independent" else "deterministic"
    if greedy:
        return "unknown"
    if commit.order == "soft_threshold":
        return "soft_threshold" if rank.order == "max_prob" else "unknown"
    return rank.order if commit.takes_highest else "unknown"


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
