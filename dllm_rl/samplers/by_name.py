"""Ranks, commit rules and caches under the names that a command line gives them."""

import inspect
from collections.abc import Callable
from functools import partial

from dllm_rl.samplers import records
from dllm_rl.samplers.cache import Cache, block_cache, dual_cache, prefix_cache

RANKS: dict[str, Callable] = {rank.__name__: rank for rank in records.RANKS}
# Whose scores a rule is made for.
OWN_RANKS = {"entropy_bound": "entropy", "origin": "random", "remask": "random"}
COMMITS: dict[str, Callable] = {rule.__name__: rule for rule in records.COMMITS}
CACHES: dict[str, Callable[..., Cache]] = {"block": block_cache, "prefix": prefix_cache, "dual": dual_cache}


def read_rank(text: str) -> Callable:
    """A rank by its name, or with its number, as `plackett_luce=0.3`. Raises ValueError on anything else."""
    return _read("rank", text, RANKS)


def read_commit(text: str) -> Callable:
    """`schedule`, or a rule with its number, as `threshold=0.9`. Raises ValueError on anything else."""
    return _read("commit", text, COMMITS)


def read_cache(text: str) -> Cache:
    """`block`, `prefix`, `dual`, or the latter two with the steps between refreshes, as `dual=4`."""
    return _read("cache", text, CACHES, number=int)()


def _read(kind: str, text: str, known: dict[str, Callable], number: Callable[[str], float] = float) -> Callable:
    """The named function, its first keyword bound to the number. A keyword without a default needs one."""
    name, _, value = text.partition("=")
    if name not in known:
        raise ValueError(f"{kind}={text!r} is not one of {', '.join(known)}")
    keywords = [p for p in inspect.signature(known[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if not value and all(keyword.default is not keyword.empty for keyword in keywords):
        return known[name]
    if not value or not keywords:
        raise ValueError(f"{kind}={text!r}: {name} takes " + (f"a number, as {name}=0.9" if keywords else "no number"))
    try:
        return partial(known[name], **{keywords[0].name: number(value)})
    except ValueError:
        raise ValueError(f"{kind}={text!r}: {value!r} is not {'a' if number is float else 'a whole'} number") from None


def rank_for(commit: str, asked: str | None = None) -> str:
    """The name of the rank: the one asked for, else the one whose scores the rule is made for (as `read_commit` has
    its name).
    """
    return asked or OWN_RANKS.get(commit.partition("=")[0], "max_prob")


# What reads each of a sampler's settings that a command line names.
READERS: dict[str, Callable] = {"rank": read_rank, "commit": read_commit, "cache": read_cache}
