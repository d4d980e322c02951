"""What records and functions hold, by name: values, help from docstrings, and all of it as text."""

import dataclasses
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar

from dllm_rl.bounds import Bound

Made = TypeVar("Made", bound=Callable[..., Any])


def maker(function: Made) -> Made:
    """Remember, in the record that a function returns, the function and its keywords: a command line changes a keyword
    by making the record again. The record declares
    `made_by: partial | None = field(default=None, init=False, repr=False, compare=False)`."""

    @wraps(function)
    def make(**keywords: Any) -> Any:
        made = function(**keywords)
        # The record is frozen. A copy by `replace` has None: the function would not make that copy.
        object.__setattr__(made, "made_by", partial(make, **keywords))
        return made

    return typing.cast(Made, make)


@dataclasses.dataclass(frozen=True)
class Member:
    """A field of a record, or a keyword of a function. `example` is its default, which shows what it may be."""

    name: str
    value: Any
    annotation: Any
    help: str
    pick: str | None = None  # the module of its functions
    example: Any = None
    bound: Bound | None = None


def function_of(value: Any) -> Any:
    """The function of a bound one; anything else as it is."""
    return value.func if isinstance(value, partial) else value


def flattened(value: Any) -> Any:
    """A partial of a partial as one partial; anything else as it is."""
    # Python keeps the two apart once the inner one's `__dict__` was read, as by `dir`.
    if not (isinstance(value, partial) and isinstance(value.func, partial)):
        return value
    inner = flattened(value.func)
    return partial(inner.func, *inner.args, *value.args, **(inner.keywords | value.keywords))


def members(owner: Any) -> list[Member]:
    """A record's fields, or its maker's keywords; a function's keywords, bound or by default; a tuple's functions."""
    if hasattr(owner, "made_by"):
        return [] if owner.made_by is None else members(owner.made_by)  # a record that no function made has no keywords
    if isinstance(owner, tuple):
        return [Member(str(i), v, None, "") for i, v in enumerate(owner, 1) if callable(v)]
    if isinstance(owner, partial) or inspect.isfunction(owner):
        return _keywords(owner if isinstance(owner, partial) else partial(owner))
    helps = helps_of(type(owner))
    found = []
    for f in dataclasses.fields(owner):
        pick = f.metadata.get("pick")
        example = (f.metadata.get("like") or f.default) if pick else None  # its parameters show which functions fit
        help = f.metadata.get("help") or helps.get(f.name, "")
        found.append(Member(f.name, getattr(owner, f.name), f.type, help, pick, example, f.metadata.get("bound")))
    return found


def _keywords(function: partial) -> list[Member]:
    helps = helps_of(function.func)
    bounds = getattr(function.func, "bounds", {})
    found = []
    for p in inspect.signature(function.func).parameters.values():
        value = function.keywords.get(p.name, p.default)
        if p.kind is p.KEYWORD_ONLY and value is not p.empty:
            # None shows nothing of what may be given
            example = value if p.default is p.empty or p.default is None else p.default
            help = helps.get(p.name, "")
            found.append(Member(p.name, value, p.annotation, help, example=example, bound=bounds.get(p.name)))
    return found


def helps_of(described: Any) -> dict[str, str]:
    """Help per name from a docstring's lines "name  text" or "name, name  text" and the deeper lines below them."""
    found: dict[str, str] = {}
    for owner in reversed(getattr(described, "__mro__", (described,))):  # a class's own help replaces its bases'
        names: list[str] = []
        depth = 0
        for line in inspect.cleandoc(owner.__doc__ or "").splitlines():
            text = line.lstrip()
            if start := re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*) {2,}(?=\S)", text):
                names = start[1].split(", ")
                depth = len(line) - len(text)
                found |= dict.fromkeys(names, text[start.end() :])
            elif text and len(line) - len(text) > depth:
                found |= {name: f"{found[name]} {text}" for name in names}
            else:
                names = []
    return found


def describe(value: Any) -> str:
    """A value as text: functions and records as name(k=v) with defaults, without `omit_none` fields that are None."""
    if isinstance(value, partial):
        return _call(value.func, {member.name: member.value for member in members(value)})
    if inspect.isfunction(value) or isinstance(value, type):
        return _full_name(value)
    if isinstance(value, tuple | list) and any(map(callable, value)):
        return f"({', '.join(map(describe, value))})"
    if dataclasses.is_dataclass(value):
        shown = {}
        for f in dataclasses.fields(value):
            held = getattr(value, f.name)
            if f.repr and not (held is None and f.metadata.get("omit_none")):
                shown[f.name] = held
        return _call(type(value), shown)
    return repr(value)


def _call(made_by: Any, held: dict[str, Any]) -> str:
    arguments = [f"{name}={describe(value)}" for name, value in held.items()]
    return f"{_full_name(made_by)}({', '.join(arguments)})"


def _full_name(made: Any) -> str:
    """NAME, or MODULE:NAME outside of this library."""
    # A resume must distinguish two functions of one name.
    if made.__module__.partition(".")[0] == "dllm_rl":
        return made.__name__
    module = _started_as() if made.__module__ == "__main__" else made.__module__
    return f"{module}:{made.__name__}"


def _started_as() -> str:
    """The name with which other code imports the script that runs; __main__ in a notebook."""
    main = sys.modules["__main__"]
    if main.__spec__ is not None:  # python -m
        return main.__spec__.name
    file = getattr(main, "__file__", None)
    if file is None:
        return "__main__"
    path = Path(os.path.relpath(file)).with_suffix("")
    return path.name if ".." in path.parts else ".".join(path.parts)


def plain(value: Any) -> Any:
    """Scalars as they are, everything else as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else describe(value)


def described(record: Any) -> dict[str, Any]:
    """Field by field, as `plain` values; for JSON."""
    return {f.name: plain(getattr(record, f.name)) for f in dataclasses.fields(record)}
