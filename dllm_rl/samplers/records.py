"""`Rank` and `Commit`: a rank function or commit rule, its inputs, and the kind of order that it makes."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from dllm_rl.members import flattened
from dllm_rl.samplers import revise, rules
from dllm_rl.samplers.rules import name_of, rank_inputs

# `Rank.order` of each rank of the library: "deterministic" or "independent", or the name of a rank that
# `order_probability` must recognize.
RANKS: dict[Callable, str] = {
    rules.confidence: "confidence",
    rules.max_prob: "max_prob",
    rules.margin: "deterministic",
    rules.entropy: "deterministic",
    rules.random: "independent",
    rules.plackett_luce: "plackett_luce",
}
_ADAPTIVE = {"order": "deterministic", "adaptive": True}
# Fields of `Commit` for each commit rule of the library.
COMMITS: dict[Callable, dict[str, Any]] = {
    rules.schedule: {"order": "deterministic", "count": rules.schedule_count},
    rules.late_schedule: {"order": "deterministic", "count": rules.late_schedule_count},
    rules.origin: {"order": "deterministic"},
    revise.remask: {"order": "deterministic"},
    revise.soft_edit: {"order": "deterministic"},
    rules.threshold: _ADAPTIVE,
    rules.soft_threshold: {"order": "soft_threshold", "adaptive": True},
    rules.factor: _ADAPTIVE,
    rules.entropy_bound: _ADAPTIVE,
    revise.edit: _ADAPTIVE,
}


@dataclass(frozen=True)
class Rank:
    """A rank function, with the kind of order that its scores make.

    Use it to declare the order of a custom rank, also of the `base_rank` of `plackett_luce`. A function of the library,
    or a partial of one, can be passed without a `Rank`.

    Args:
        function: Function that scores positions, see `samplers.rules`.
        order: Order of a custom function. "deterministic": the scores are a function of the canvas and the weights.
            "independent": the scores are random numbers that do not depend on the weights. "unknown" (default): neither
            is known.

    Raises:
        ValueError: The function needs an input that samplers do not pass, or takes an input that contradicts `order`.
            Or it is `plackett_luce`, and its base_rank reads other inputs than logits and normalizer.
    """

    function: Any
    order: str = "unknown"
    library: Any = field(default=None, init=False, repr=False, compare=False)  # the library's function; None if custom
    reads: frozenset[str] = field(default=frozenset(), init=False, repr=False)  # inputs taken by name

    def __post_init__(self) -> None:
        function, library = _unwrap("rank", self.function, RANKS)
        known_order = None if library is None else RANKS[library]
        if library is rules.plackett_luce:
            base = as_rank(inspect.signature(function).parameters["base_rank"].default)
            if base.reads != {"logits", "normalizer"}:
                raise ValueError(
                    f"base_rank={base.name} must take logits and normalizer, as max_prob, margin and entropy do"
                )
            known_order = "unknown" if base.order == "unknown" else known_order
        orders = ("unknown", "deterministic", "independent") if known_order is None else ("unknown", known_order)
        _check_order("rank", function, self.order, orders)
        reads = rank_inputs(function)
        allowed = {"deterministic": {"logits", "normalizer", "hidden"}, "independent": {"uniforms"}}
        contradicting = reads - allowed.get(self.order, reads)
        if contradicting:
            names = ", ".join(sorted(contradicting))
            raise ValueError(f"rank={name_of(function)} is declared {self.order}, but reads {names}")
        order = known_order or self.order
        vars(self).update(function=function, order=order, library=library, reads=reads)

    @property
    def name(self) -> str:
        return name_of(self.function)

    def __call__(self, **inputs: Tensor | None) -> Tensor:
        return self.function(**inputs)


@dataclass(frozen=True)
class Commit:
    """A commit rule, with the kind of order that its choice of positions makes.

    Use it to declare a custom rule. A rule of the library, or a partial of one, can be passed without
    a `Commit`.

    Args:
        function: Rule that chooses positions, see `samplers.rules`, or `samplers.revise` for rules that rewrite.
        order: Order of a custom rule. "deterministic": the positions are a function of the rule's inputs, and the rule
            does not compare random numbers with numbers that depend on the weights, because the positions would then
            have a probability that depends on the weights. "unknown" (default): not known.
        count: Function (number of masked positions, steps left) -> number of positions that the rule picks, those with
            the highest scores. None (default): the number depends on the scores.
        adaptive: Whether the rule, and not `diffusion_steps`, determines how many steps a block takes. Default: False.

    Raises:
        ValueError: `order` is no such value, or the rule's inputs contradict each other.
    """

    function: Any
    order: str = "unknown"
    count: Callable | None = None
    adaptive: bool = False
    reads: frozenset[str] = field(default=frozenset(), init=False, repr=False)  # inputs taken by name

    def __post_init__(self) -> None:
        function, library = _unwrap("commit", self.function, COMMITS)
        declared = {} if library is None else COMMITS[library]
        _check_order("commit", function, self.order, ("unknown", declared.get("order", "deterministic")))
        vars(self).update(declared, function=function, reads=revise.commit_inputs(function))

    @property
    def name(self) -> str:
        return name_of(self.function)

    @property
    def revises(self) -> bool:
        return bool(self.reads & revise.KINDS)

    @property
    def takes_highest(self) -> bool:
        """Whether the rule is known to pick the highest scores, and how many does not depend on the scores."""
        return self.order == "deterministic" and self.count is not None and not self.revises

    def __call__(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        return self.function(*inputs, **more)


def as_rank(rank: object) -> Rank:
    """Return a rank function as a `Rank`, and a `Rank` unchanged."""
    return rank if isinstance(rank, Rank) else Rank(rank)


def as_commit(commit: object) -> Commit:
    """Return a commit rule as a `Commit`, and a `Commit` unchanged."""
    return commit if isinstance(commit, Commit) else Commit(commit)


def _unwrap(kind: str, function: object, library: Mapping[Callable, object]) -> tuple[Callable, Callable | None]:
    """Return the function, without a partial that binds nothing, and the library's function that it is or binds.

    The second result is None for other functions, for example a wrapper or a lambda, whose behavior is unknown.
    """
    if not callable(function):
        raise ValueError(
            f"{kind}={function!r} must be a function, as rank=max_prob or commit=schedule, or a Rank or Commit"
        )
    rule: Callable = flattened(function)
    if isinstance(rule, partial) and not rule.args and not rule.keywords:
        rule = rule.func
    bound = rule if isinstance(rule, partial) else partial(rule)
    if not inspect.isfunction(bound.func) or bound.func not in library or bound.args:
        return rule, None
    settings = {name for name, p in inspect.signature(bound.func).parameters.items() if p.kind is p.KEYWORD_ONLY}
    return rule, bound.func if bound.keywords.keys() <= settings else None


def _check_order(kind: str, function: Callable, order: str, known: tuple[str, ...]) -> None:
    """Raise ValueError if `order` is not one of `known`."""
    if order not in known:
        raise ValueError(f"order={order!r} of {kind}={name_of(function)} must be one of {', '.join(known)}")


def order_probability(rank: Rank, commit: Commit, *, greedy: bool = False) -> str:
    """Return the kind of probability of the order in which the pair writes.

    deterministic  the probability is 1: the order is a function of the canvas and the weights
    independent    the probability does not depend on the weights
    confidence, plackett_luce, soft_threshold  samplers record the log-probability, and `trajectory()` scores it
    unknown        the probability is not known
    """
    if "unknown" in (rank.order, commit.order):
        return "unknown"
    is_random = rank.order == "plackett_luce" or commit.order == "soft_threshold"
    depends_on_draws = not greedy and (rank.order == "confidence" or "replaceable" in commit.reads)
    if not is_random and not depends_on_draws:
        return "independent" if rank.order == "independent" else "deterministic"
    if greedy:
        return "unknown"
    if commit.order == "soft_threshold":
        return "soft_threshold" if rank.order == "max_prob" else "unknown"
    return rank.order if commit.takes_highest else "unknown"


def has_order_logprob(rank: Rank, commit: Commit, *, greedy: bool = False) -> bool:
    """Return whether the order has a log-probability that samplers record."""
    return order_probability(rank, commit, greedy=greedy) in ("confidence", "plackett_luce", "soft_threshold")
