"""Ranks and commit rules as records: the function, what it reads, and what is known of the order that it chooses."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from dllm_rl.members import flattened
from dllm_rl.samplers import revise, rules
from dllm_rl.samplers.rules import name_of, rank_inputs

# What is known of the library's ranks: `deterministic` or `independent` (see `Rank`), or a name of its own where the
# order has a log-probability, or decides that of a commit rule.
RANKS: dict[Any, str] = {
    rules.confidence: "confidence",
    rules.max_prob: "max_prob",
    rules.margin: "deterministic",
    rules.entropy: "deterministic",
    rules.random: "independent",
    rules.plackett_luce: "plackett_luce",
}
# What the library's commit rules declare, by the names of `Commit`.
_ADAPTIVE = {"order": "deterministic", "adaptive": True}
COMMITS: dict[Any, dict[str, Any]] = {
    rules.schedule: {"order": "deterministic", "count": rules.share},
    rules.late_schedule: {"order": "deterministic", "count": rules.late_share},
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
    """A rank, and what is known of its scores. A library rank, or a partial of its settings, declares itself.

    Args:
        function: See `rules`.
        order: Of a function of yours: deterministic, if the scores follow from the canvas and the weights, without
            chance; independent, if they are random numbers, free of the weights; unknown, which claims nothing.
    """

    function: Any
    order: str = "unknown"
    library: Any = field(default=None, init=False, repr=False, compare=False)  # the library's function, unbound
    reads: frozenset[str] = field(default=frozenset(), init=False, repr=False)  # inputs taken by name

    def __post_init__(self) -> None:
        """Raises ValueError for inputs that no sampler has, or an order that contradicts them."""
        function, library = _unwrapped("rank", self.function, RANKS)
        mine = ("unknown", "deterministic", "independent")
        _check_order("rank", function, self.order, mine if library is None else ("unknown", RANKS[library]))
        reads = rank_inputs(function)
        allowed = {"deterministic": {"logits", "normalizer", "hidden"}, "independent": {"uniforms"}}
        wrong = reads - allowed.get(self.order, reads)
        if wrong:
            raise ValueError(f"rank={name_of(function)} is declared {self.order}, but reads {', '.join(sorted(wrong))}")
        vars(self).update(function=function, order=RANKS.get(library, self.order), library=library, reads=reads)

    @property
    def name(self) -> str:
        return name_of(self.function)

    def __call__(self, **inputs: Any) -> Any:
        return self.function(**inputs)


@dataclass(frozen=True)
class Commit:
    """A commit rule, and what is known of the positions that it picks. A library rule declares itself, as in `Rank`.

    Args:
        function: See `rules`, and of one that rewrites `revise`.
        order: Of a function of yours: deterministic, if the positions follow from what it takes, and random numbers
            among these meet nothing that the weights decide; unknown, which claims nothing.
        count: (masked positions, steps left) -> how many of the highest it picks, whatever the scores; None: it varies.
        adaptive: The rule chooses how many steps a block takes, and not `diffusion_steps`.
    """

    function: Any
    order: str = "unknown"
    count: Callable | None = None
    adaptive: bool = False
    reads: frozenset[str] = field(default=frozenset(), init=False, repr=False)  # inputs taken by name

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown order, or for inputs that contradict each other."""
        function, library = _unwrapped("commit", self.function, COMMITS)
        declared = COMMITS.get(library, {})
        _check_order("commit", function, self.order, ("unknown", declared.get("order", "deterministic")))
        vars(self).update(declared, function=function, reads=revise.commit_inputs(function))

    @property
    def name(self) -> str:
        return name_of(self.function)

    @property
    def revises(self) -> bool:
        return bool(self.reads & revise.KINDS)

    def __call__(self, *inputs: Any, **more: Any) -> Any:
        return self.function(*inputs, **more)


def as_rank(rank: Any) -> Rank:
    return rank if isinstance(rank, Rank) else Rank(rank)


def as_commit(commit: Any) -> Commit:
    return commit if isinstance(commit, Commit) else Commit(commit)


def _unwrapped(kind: str, function: Any, library: dict[Any, Any]) -> tuple[Any, Any]:
    """The function without partials that bind nothing; and the library's function, if it is one or binds settings of
    one. A wrapper, a copy or a lambda is another function: what it does is not known.
    """
    if not callable(function):
        raise ValueError(f"{kind}={function!r} must be a function, as rank=max_prob, commit=schedule, or its record")
    function = flattened(function)
    if isinstance(function, partial) and not function.args and not function.keywords:
        function = function.func
    bound = function if isinstance(function, partial) else partial(function)
    if not inspect.isfunction(bound.func) or bound.func not in library or bound.args:
        return function, None
    settings = {name for name, p in inspect.signature(bound.func).parameters.items() if p.kind is p.KEYWORD_ONLY}
    return function, bound.func if bound.keywords.keys() <= settings else None


def _check_order(kind: str, function: Any, order: str, known: tuple[str, ...]) -> None:
    if order not in known:
        raise ValueError(f"order={order!r} of {kind}={name_of(function)} must be one of {', '.join(known)}")


def order_probability(rank: Rank, commit: Commit, *, greedy: bool = False) -> str:
    """What is known of the probability of the order in which the pair writes.

    deterministic  1: it follows from the canvas and the weights
    independent    a number that no weights change
    confidence, plackett_luce, soft_threshold  a log-probability, which samplers record and `trajectory()` scores
    unknown        none of these
    """
    if "unknown" in (rank.order, commit.order):
        return "unknown"
    by_chance = rank.order == "plackett_luce" or commit.order == "soft_threshold"
    by_draws = not greedy and (rank.order == "confidence" or "replaceable" in commit.reads)
    if not by_chance and not by_draws:
        return "independent" if rank.order == "independent" else "deterministic"
    if greedy:
        return "unknown"
    if commit.order == "soft_threshold":
        return "soft_threshold" if rank.order == "max_prob" else "unknown"
    return "unknown" if commit.count is None or commit.revises else rank.order


def has_order_logprob(rank: Rank, commit: Commit, *, greedy: bool = False) -> bool:
    """Whether the order has a log-probability that samplers record."""
    return order_probability(rank, commit, greedy=greedy) in ("confidence", "plackett_luce", "soft_threshold")
