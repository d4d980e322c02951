"""Ranks, commit rules and caches by the names that the command line gives them."""

import inspect
from collections.abc import Callable
from functools import partial

from dllm_rl.samplers import records
from dllm_rl.samplers.cache import Cache, block_cache, dual_cache, prefix_cache
from dllm_rl.samplers.rules import name_of

RANKS: dict[str, Callable] = {rank.__name__: rank for rank in records.RANKS}
# Commit rules that read the scores of one rank only, and this rank.
REQUIRED_RANKS = {"entropy_bound": "entropy", "origin": "random", "remask": "random"}
COMMITS: dict[str, Callable] = {rule.__name__: rule for rule in records.COMMITS}
CACHES: dict[str, Callable[..., Cache]] = {"block": block_cache, "prefix": prefix_cache, "dual": dual_cache}


def read_rank(text: str) -> Callable:
    """Return a rank from its name, or name and number, as `plackett_luce=0.3`. Raise ValueError on other text."""
    return _read("rank", text, RANKS)


def read_commit(text: str) -> Callable:
    """Return a commit rule from its name, or name and number, as `threshold=0.9`. Raise ValueError on other text."""
    return _read("commit", text, COMMITS)


def read_cache(text: str) -> Cache:
    """Return the cache `block`, `prefix` or `dual`; the number of the latter two is `refresh`, as in `dual=4`."""
    return _read("cache", text, CACHES, parse=int)()


def _read(kind: str, text: str, known: dict[str, Callable], parse: Callable[[str], float] = float) -> Callable:
    """Return the function that `text` names. A number in the text is bound to the function's first keyword argument.

    The number may be left out if every keyword argument has a default.
    """
    name, _, value = text.partition("=")
    if name not in known:
        raise ValueError(f"{kind}={text!r} is not one of {', '.join(known)}")
    keywords = [p for p in inspect.signature(known[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    if not value and all(keyword.default is not keyword.empty for keyword in keywords):
        return known[name]
    if not value or not keywords:
        raise ValueError(f"{kind}={text!r}: {name} takes " + (f"a number, as {name}=0.9" if keywords else "no number"))
    try:
        return partial(known[name], **{keywords[0].name: parse(value)})
    except ValueError:
        raise ValueError(f"{kind}={text!r}: {value!r} is not {'a' if parse is float else 'a whole'} number") from None


def required_rank(commit: str) -> str | None:
    """Return the name of the rank whose scores a named commit rule needs; None if the rule takes any rank."""
    return REQUIRED_RANKS.get(commit.partition("=")[0])


def text_of(rule: Callable) -> str:
    """Return the text that names a rule and its numbers, as `threshold=0.9`."""
    numbers = rule.keywords.values() if isinstance(rule, partial) else ()
    return "=".join([name_of(rule), *map(str, numbers)])


# Parsers of the sampler settings that the command line gives as text.
READERS: dict[str, Callable] = {"rank": read_rank, "commit": read_commit, "cache": read_cache}
