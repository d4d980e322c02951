"""Ranks and commit rules as records: the function, what it reads, and what is known of the order that it chooses."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from dllm_rl.members import flattened
from dllm_rl.samplers import revise, rules
from dllm_rl.samplers.rules import RANK_INPUTS, name_of, rank_inputs

RANK_ORDERS = ("deterministic", "independent", "max_prob", "confidence", "plackett_luce", "unknown")
COMMIT_ORDERS = ("deterministic", "soft_threshold", "unknown")


@dataclass(frozen=True)
class Rank:
    """A rank, and what is known of its scores.

    function  see `rules`
    order     deterministic: the scores follow from the canvas and the weights, without chance. independent: they are
              random numbers, free of the weights. The other names are those of library ranks, whose order has a
              log-probability or decides that of a commit rule. unknown: nothing is known, and nothing is claimed
    reads     the inputs that the function takes by name
    """

    function: Callable
    order: str = "unknown"
    reads: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for inputs that no sampler has, or an order that contradicts them."""
        check_order("rank", self.name, self.order, RANK_ORDERS)
        reads = rank_inputs(self.function)
        chance = {"deterministic": {"tokens", "uniforms"}, "independent": set(RANK_INPUTS) - {"uniforms"}}
        if wrong := sorted(reads & chance.get(self.order, set())):
            raise ValueError(
                f"rank={self.name} is declared {self.order}, but reads {', '.join(wrong)}; leave order at 'unknown'"
            )
        object.__setattr__(self, "reads", reads)

    @property
    def name(self) -> str:
        return name_of(self.function)

    @property
    def library_name(self) -> str | None:
        return self.name if inspect.isfunction(self.function) and self.function in RANKS else None

    def __call__(self, **inputs: Any) -> Any:
        return self.function(**inputs)


@dataclass(frozen=True)
class Commit:
    """A commit rule, and what is known of the positions that it picks.

    function  see `rules`, and of one that rewrites `revise`
    order     deterministic: which positions are picked follows from what the rule takes, and random numbers among these
              are compared with nothing that the weights decide. soft_threshold: that rule. unknown: nothing is claimed
    count     (masked positions, steps left) -> how many of the highest the rule picks, whatever the scores; None:
              another number
    adaptive  the rule chooses how many steps a block takes, and not `diffusion_steps`
    """

    function: Callable
    order: str = "unknown"
    count: Callable | None = None
    adaptive: bool = False
    reads: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown order, or for inputs that contradict each other."""
        check_order("commit", self.name, self.order, COMMIT_ORDERS)
        object.__setattr__(self, "reads", revise.revising_inputs(self.function))

    @property
    def name(self) -> str:
        return name_of(self.function)

    @property
    def revises(self) -> bool:
        return bool(self.reads)

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        return self.function(*inputs, **more)


def check_order(kind: str, name: str, order: str, known: tuple[str, ...]) -> None:
    if order not in known:
        raise ValueError(f"order={order!r} of {kind}={name} must be one of {', '.join(known)}")


# What the library's functions declare. A wrapper of one, or a copy, is another function, and declares nothing.
RANKS: dict[Any, str] = {
    rules.confidence: "confidence",
    rules.max_prob: "max_prob",
    rules.margin: "deterministic",
    rules.entropy: "deterministic",
    rules.random: "independent",
    rules.plackett_luce: "plackett_luce",
}
COMMITS: dict[Any, Commit] = {
    commit.function: commit
    for commit in (
        Commit(rules.schedule, "deterministic", count=rules.share),
        Commit(rules.late_schedule, "deterministic", count=rules.late_share),
        Commit(rules.origin, "deterministic"),
        Commit(revise.remask, "deterministic"),
        Commit(revise.soft_edit, "deterministic"),
        Commit(rules.threshold, "deterministic", adaptive=True),
        Commit(rules.soft_threshold, "soft_threshold", adaptive=True),
        Commit(rules.factor, "deterministic", adaptive=True),
        Commit(rules.entropy_bound, "deterministic", adaptive=True),
        Commit(revise.edit, "deterministic", adaptive=True),
    )
}


def as_rank(rank: Any) -> Rank:
    """The record of a rank: itself, the library's, or of another function one that claims nothing."""
    if isinstance(rank, Rank):
        return rank
    function, library = _unwrapped("rank", rank)
    return Rank(function, RANKS.get(library, "unknown"))


def as_commit(commit: Any) -> Commit:
    """The record of a commit rule: itself, the library's, or of another function one that claims nothing."""
    if isinstance(commit, Commit):
        return commit
    function, library = _unwrapped("commit", commit)
    return replace(COMMITS[library], function=function) if library in COMMITS else Commit(function)


def _unwrapped(kind: str, function: Any) -> tuple[Any, Any]:
    """A function without partials that bind nothing, and the library's function whose settings alone it binds."""
    if not callable(function):
        raise ValueError(f"{kind}={function!r} must be a function, as rank=max_prob, commit=schedule, or its record")
    function = flattened(function)
    if isinstance(function, partial) and not function.args and not function.keywords:
        function = function.func
    if not isinstance(function, partial) or not inspect.isfunction(function.func):
        return function, function if inspect.isfunction(function) else None
    settings = {name for name, p in inspect.signature(function.func).parameters.items() if p.kind is p.KEYWORD_ONLY}
    return function, function.func if not function.args and function.keywords.keys() <= settings else None


def order_probability(rank: Rank, commit: Commit, *, greedy: bool = False) -> str:
    """What is known of the probability of the order in which the pair writes.

    deterministic  1: it follows from the canvas and the weights
    independent    a number that no weights change
    confidence, plackett_luce, soft_threshold  a log-probability, which samplers record and `trajectory()` scores
    unknown        none of these
    """
    if "unknown" in (rank.order, commit.order):
        return "unknown"
    by_draws = rank.order == "confidence" or "changed" in commit.reads
    by_chance = rank.order == "plackett_luce" or commit.order == "soft_threshold"
    if greedy:
        return "unknown" if by_chance else "independent" if rank.order == "independent" else "deterministic"
    if not by_draws and not by_chance:
        return "independent" if rank.order == "independent" else "deterministic"
    if commit.count is not None and not commit.revises:
        return rank.order
    return "soft_threshold" if (rank.order, commit.order) == ("max_prob", "soft_threshold") else "unknown"


def has_order_logprob(rank: Rank, commit: Commit, *, greedy: bool = False) -> bool:
    """Whether the order has a log-probability that samplers record."""
    return order_probability(rank, commit, greedy=greedy) in ("confidence", "plackett_luce", "soft_threshold")
