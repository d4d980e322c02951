"""Ranks, commit rules and caches under the names that a command line gives them."""

import inspect
from collections.abc import Callable
from functools import partial

from dllm_rl.samplers import revise, rules
from dllm_rl.samplers.cache import Cache, block_cache, dual_cache, prefix_cache

RANKS: dict[str, Callable] = {f.__name__: f for f in (*rules.RANKS, rules.plackett_luce)}
# PACED rules take as many steps as num_steps says.
PACED = (rules.schedule, rules.late_schedule, rules.origin, revise.remask, revise.soft_edit)
ADAPTIVE = (rules.threshold, rules.factor, rules.entropy_bound, revise.edit)
OWN_RANKS = {"entropy_bound": "entropy", "origin": "random", "remask": "random"}  # whose scores a rule is made for
COMMITS: dict[str, Callable] = {f.__name__: f for f in (*PACED, *ADAPTIVE)}
CACHES: dict[str, Callable[..., Cache]] = {"block": block_cache, "prefix": prefix_cache, "dual": dual_cache}


def read_rank(text: str) -> Callable:
    """A rank by its name, or with its number, as `plackett_luce=0.3`. Raises ValueError on anything else."""
    return _read("rank", text, RANKS)


def read_commit(text: str) -> Callable:
    """`schedule`, or a rule with its number, as `threshold=0.9`. Raises ValueError on anything else."""
    return _read("commit", text, COMMITS)


def _read(kind: str, text: str, known: dict[str, Callable]) -> Callable:
    name, _, value = text.partition("=")
    if name not in known:
        raise ValueError(f"{kind}={text!r} is not one of {', '.join(known)}")
    keywords = inspect.signature(known[name]).parameters.values()
    needed = [p.name for p in keywords if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if bool(value) != bool(needed):
        raise ValueError(f"{kind}={text!r}: {name} takes " + (f"a number, as {name}=0.9" if needed else "no number"))
    return partial(known[name], **{needed[0]: _number(text, value)}) if needed else known[name]


def rank_for(commit: str, asked: str | None = None) -> str:
    """The name of the rank: the one asked for, else the one whose scores the rule is made for (as `read_commit` has
    its name)."""
    return asked or OWN_RANKS.get(commit.partition("=")[0], "confidence")


def read_cache(text: str) -> Cache:
    """`block`, `prefix`, `dual`, or the latter two with the steps between refreshes, as `dual=4`."""
    name, _, value = text.partition("=")
    if name not in CACHES or (value and name == "block"):
        raise ValueError(f"cache={text!r} is not block, prefix, dual, prefix=STEPS or dual=STEPS")
    return CACHES[name](refresh=int(_number(text, value))) if value else CACHES[name]()


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{text!r}: {value!r} is not a number") from None


# What reads each of a sampler's settings that a command line names.
READERS: dict[str, Callable] = {"rank": read_rank, "commit": read_commit, "cache": read_cache}
