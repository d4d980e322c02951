"""Read and rebuild settings: list the contents of a record or a bound function, print them, import a function by name.

A factory's arguments are remembered in its record, so that the command line can change one keyword.
"""

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
from dllm_rl.renamed import refuse_renamed, renamed_text

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")
Made = TypeVar("Made", bound=Callable[..., Any])


def configurable(function: Made) -> Made:
    """Decorate a function that returns a record: remember the function and its arguments in the record.

    Use it for a custom corrector, estimator or prompt source, so that the command line can change a keyword (the record
    is made again) and `describe` shows the keywords. The record must declare `factory: partial | None =
    field(default=None, init=False, repr=False, compare=False)`.
    """

    @wraps(function)
    def make(*parts: Any, **keywords: Any) -> Any:
        refuse_renamed(keywords, function.__name__)
        made = function(*parts, **keywords)
        # The record is frozen. A copy by `replace` has None, because the function would not make that copy.
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
    """Return the members of an owner by name.

    These are a record's fields, or its factory's arguments; a function's keywords, bound or with a default, and its
    bound positional arguments under 1, 2 ...; nothing for any other owner, or for a record without a factory call.
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
    """Return the function of a partial, and anything else unchanged."""
    return value.func if isinstance(value, partial) else value


def flattened(value: Any) -> Any:
    """Return a partial of a partial as one partial, and anything else unchanged."""
    # Python does not merge the two after the inner one's `__dict__` was read, for example by `dir`.
    if not (isinstance(value, partial) and isinstance(value.func, partial)):
        return value
    inner = flattened(value.func)
    return partial(inner.func, *inner.args, *value.args, **(inner.keywords | value.keywords))


def imported(path: str, text: str) -> Callable:
    """Import the function that `text`, MODULE:FUNCTION, names; `path` is the option that an error names."""
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(
            os.getcwd()
        )  # an installed command has its program's folder in the path instead; last, so that nothing is shadowed
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
    """Format a value as text: functions with their keywords and records as name(k=v), including defaults.

    Use it to print a setting, such as a corrector.
    """
    if getattr(value, "factory", None) is not None:
        value = value.factory  # shorter, and as a user would write it
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
    """Format an object without a custom repr: its class, and the constructor arguments that it stores."""
    held = {}
    for name in inspect.signature(type(value)).parameters:
        if name in vars(value):
            part = vars(value)[name]
            text = "itself" if part is value else describe(part)
            # A long text is data. A word may be a secret, and this text is saved and printed.
            shown = part is None or isinstance(part, bool | int | float) or callable(part)
            held[name] = text if shown else f"#{hashlib.sha256(text.encode()).hexdigest()[:12]}"
            if ADDRESS.search(text):
                held[name] = text
    return f"{full_name(type(value))}({', '.join(f'{name}={text}' for name, text in held.items())})"


def _call(factory: Any, held: dict[str, Any]) -> str:
    arguments = [("" if name.isdecimal() else f"{name}=") + describe(value) for name, value in held.items()]
    return f"{full_name(factory)}({', '.join(arguments)})"


def full_name(made: Any) -> str:
    """Return the NAME of a function or class, or MODULE:NAME outside of this library."""
    # A resume must distinguish two functions of one name.
    module = made.__module__ or "builtins"  # builtin functions of torch have no module
    if module.partition(".")[0] == "dllm_rl":
        return made.__name__
    module = _started_as() if module == "__main__" else module
    return f"{module}:{made.__name__}"


def _started_as() -> str:
    """Return the name by which other code imports the running script; __main__ in a notebook."""
    main = sys.modules["__main__"]
    if main.__spec__ is not None:  # python -m
        return main.__spec__.name
    file = getattr(main, "__file__", None)
    if file is None:
        return "__main__"
    path = Path(os.path.relpath(file)).with_suffix("")
    return path.name if ".." in path.parts else ".".join(path.parts)


def plain(value: Any) -> Any:
    """Return scalars unchanged and everything else as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else describe(value)


def same_setting(before: Any, now: Any) -> bool:
    """Return whether a stored value equals the current one, possibly as an earlier version described it.

    That version may have had other names, and fewer keywords: a keyword that its text does not name had its default.
    """
    if before == now or not (isinstance(before, str) and isinstance(now, str)):
        return before == now
    before = renamed_text(before)
    return before == now or before == _without_new_keywords(now, before)


def _without_new_keywords(text: str, before: str) -> str:
    """Leave out the keywords that have their defaults and that `before` does not name."""
    package = sys.modules[__name__.partition(".")[0]]
    for name in dict.fromkeys(re.findall(r"\b(\w+)\(", text)):
        maker = getattr(package, name) if name in package.__all__ else None
        for parameter in inspect.signature(maker).parameters.values() if callable(maker) else ():
            if parameter.default is not parameter.empty and f"{parameter.name}=" not in before:
                held = rf"(?<![\w.]){re.escape(f'{parameter.name}={describe(parameter.default)}')}(?=[,)])"
                text = re.sub(rf", {held}|{held}, |{held}", "", text)
    return text


def described(record: Any) -> dict[str, Any]:
    """Return the fields as `plain` values, for JSON."""
    return {f.name: plain(getattr(record, f.name)) for f in dataclasses.fields(record)}
