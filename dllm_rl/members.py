"""What records and functions hold, by name and as text; and a function that text names."""

import dataclasses
import hashlib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from dllm_rl.bounds import Bound
from dllm_rl.renamed import refuse_renamed

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")
Made = TypeVar("Made", bound=Callable[..., Any])


def configurable(function: Made) -> Made:
    """Remember, in the record that a function returns, the function and its arguments: the command line changes one of
    them by making the record again, and `describe` shows them. The record declares
    `factory: partial | None = field(default=None, init=False, repr=False, compare=False)`.
    """

    @wraps(function)
    def make(*parts: Any, **keywords: Any) -> Any:
        refuse_renamed(keywords, function.__name__)
        made = function(*parts, **keywords)
        # The record is frozen. A copy by `replace` has None: the function would not make that copy.
        object.__setattr__(made, "factory", partial(make, *parts, **keywords))
        return made

    return typing.cast(Made, make)


@dataclasses.dataclass(frozen=True)
class Member:
    """A field of a record, or an argument of a function."""

    value: Any
    annotation: Any = None
    help: str = ""
    bound: Bound | None = None


def members(owner: Any) -> dict[str, Member]:
    """By name: a record's fields, or what its maker got; a function's keywords, bound or by default, and its bound
    positional arguments under 1, 2 ...; nothing for anything else, as for a record that no maker made.
    """
    if hasattr(owner, "factory"):
        return members(owner.factory)
    if isinstance(owner, partial) or inspect.isfunction(owner):
        function = owner if isinstance(owner, partial) else partial(owner)
        bounds = getattr(function.func, "bounds", {})
        found = {str(place): Member(part) for place, part in enumerate(function.args, 1)}
        for name, parameter in inspect.signature(function.func).parameters.items():
            value = function.keywords.get(name, parameter.default)
            if parameter.kind is parameter.KEYWORD_ONLY and value is not parameter.empty:
                found[name] = Member(value, parameter.annotation, bound=bounds.get(name))
        return found
    if not dataclasses.is_dataclass(owner) or isinstance(owner, type):
        return {}
    found = {}
    for f in dataclasses.fields(owner):
        found[f.name] = Member(getattr(owner, f.name), f.type, f.metadata.get("help", ""), f.metadata.get("bound"))
    return found


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


def imported(path: str, text: str) -> Callable:
    """The function that `text`, MODULE:FUNCTION, names; `path` is the option that an error names."""
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a command has the folder of its program there; last, so that nothing is hidden
    try:
        function = getattr(import_module(module_name), name, None)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise ValueError(
            f"--{path} {text!r}: {error}; give MODULE:FUNCTION, its folder the working one or in PYTHONPATH"
        ) from None
    if not inspect.isfunction(function):
        raise ValueError(f"--{path} {text!r}: module {module_name!r} has no function {name!r}")
    return function


def describe(value: Any) -> str:
    """A value as text: functions with their keywords, and records, as name(k=v), defaults included."""
    if getattr(value, "factory", None) is not None:
        value = value.factory  # shorter, and as one would write it
    if isinstance(value, partial):
        return _call(value.func, {name: member.value for name, member in members(value).items()})
    if inspect.isfunction(value) or inspect.isbuiltin(value) or isinstance(value, type):
        return full_name(value)
    if isinstance(value, tuple | list) and any(map(callable, value)):
        return f"({', '.join(map(describe, value))})"
    if dataclasses.is_dataclass(value):
        return _call(type(value), {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr})
    if inspect.ismethod(value):
        return f"{describe(value.__self__)}.{value.__name__}"
    text = repr(value)
    if not ADDRESS.search(text):
        return text
    if isinstance(value, dict):
        return f"{{{', '.join(f'{describe(key)}: {describe(part)}' for key, part in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    return _described_object(value) if hasattr(value, "__dict__") else text


def _described_object(value: Any) -> str:
    """An object without a text of its own: its class, and what it keeps of its constructor's arguments."""
    held = {}
    for name in inspect.signature(type(value)).parameters:
        if name in vars(value):
            part = vars(value)[name]
            text = "itself" if part is value else describe(part)
            # A long text is of data. A word may be a secret, and this text is saved and shown.
            shown = part is None or isinstance(part, bool | int | float) or callable(part)
            held[name] = text if shown else f"#{hashlib.sha256(text.encode()).hexdigest()[:12]}"
            if ADDRESS.search(text):
                held[name] = text
    return f"{full_name(type(value))}({', '.join(f'{name}={text}' for name, text in held.items())})"


def _call(factory: Any, held: dict[str, Any]) -> str:
    arguments = [("" if name.isdecimal() else f"{name}=") + describe(value) for name, value in held.items()]
    return f"{full_name(factory)}({', '.join(arguments)})"


def full_name(made: Any) -> str:
    """NAME of a function or class, or MODULE:NAME outside of this library."""
    # A resume must distinguish two functions of one name.
    module = made.__module__ or "builtins"  # torch's own functions name none
    if module.partition(".")[0] == "dllm_rl":
        return made.__name__
    module = _started_as() if module == "__main__" else module
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
