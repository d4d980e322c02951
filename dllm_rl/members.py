"""Read and rebuild settings: list the contents of a record or a partial, print them, import a function by name.

A record made by a factory, such as `tis(cap=3)`, stores the call, so that the command line can change one keyword.
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

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")
Factory = TypeVar("Factory", bound=Callable[..., Any])


def configurable(function: Factory) -> Factory:
    """Decorate a function that returns a record, so that the record stores the function and its arguments.

    Use it for a custom corrector, estimator or prompt source. The command line can then change a keyword (the function
    is called again), and `describe` shows the keywords. The record must declare `factory: partial | None =
    field(default=None, init=False, repr=False, compare=False)`.
    """

    @wraps(function)
    def make(*arguments: Any, **keywords: Any) -> Any:
        record = function(*arguments, **keywords)
        # object.__setattr__, because the record is frozen. `replace` resets factory to None, because the factory would
        # not make the changed copy.
        object.__setattr__(record, "factory", partial(make, *arguments, **keywords))
        return record

    return typing.cast(Factory, make)


@dataclasses.dataclass(frozen=True)
class Member:
    """A field of a record, or an argument of a function."""

    value: Any
    annotation: Any = None
    help: str = ""
    bound: Bound | None = None


def members(owner: Any) -> dict[str, Member]:
    """Return the settings of a record or a function by name; {} for any other object.

    The settings of a record are its fields or, if a factory made it, the factory's arguments. Those of a function are
    its keywords that are bound or have a default, and its bound positional arguments as "1", "2" ...
    """
    if hasattr(owner, "factory"):
        return members(owner.factory)
    if isinstance(owner, partial) or inspect.isfunction(owner):
        function = owner if isinstance(owner, partial) else partial(owner)
        bounds = getattr(function.func, "bounds", {})
        members_by_name = {str(position): Member(argument) for position, argument in enumerate(function.args, 1)}
        for name, parameter in inspect.signature(function.func).parameters.items():
            value = function.keywords.get(name, parameter.default)
            if parameter.kind is parameter.KEYWORD_ONLY and value is not parameter.empty:
                members_by_name[name] = Member(value, parameter.annotation, bound=bounds.get(name))
        return members_by_name
    if not dataclasses.is_dataclass(owner) or isinstance(owner, type):
        return {}
    members_by_name = {}
    for field in dataclasses.fields(owner):
        members_by_name[field.name] = Member(
            getattr(owner, field.name), field.type, field.metadata.get("help", ""), field.metadata.get("bound")
        )
    return members_by_name


def function_of(value: Any) -> Any:
    """Return the function of a partial, and anything else unchanged."""
    return value.func if isinstance(value, partial) else value


def flattened(value: Any) -> Any:
    """Return a partial of a partial as one partial, and anything else unchanged."""
    # Python merges nested partials, except if the inner one's `__dict__` was read before, for example by `dir`.
    if not (isinstance(value, partial) and isinstance(value.func, partial)):
        return value
    inner = flattened(value.func)
    return partial(inner.func, *inner.args, *value.args, **(inner.keywords | value.keywords))


def import_function(path: str, text: str) -> Callable:
    """Import the function or class that `text`, MODULE:FUNCTION, names; errors name the option `path`."""
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        # An installed command has its program's folder in sys.path instead. Appended, so that it shadows nothing.
        sys.path.append(os.getcwd())
    try:
        function = getattr(import_module(module_name), name, None)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise ValueError(
            f"--{path} {text!r}: {error}; give MODULE:FUNCTION, with the module in the working folder or in PYTHONPATH"
        ) from None
    if not inspect.isfunction(function) and not inspect.isclass(function):
        raise ValueError(f"--{path} {text!r}: module {module_name!r} has no function {name!r}, and no class")
    return function


def describe(value: Any) -> str:
    """Format a value as text: functions with their keywords and records as name(k=v), including defaults.

    Use it to print a setting, such as a corrector.
    """
    if getattr(value, "factory", None) is not None:
        value = value.factory  # describe the call that made the record: it is shorter, and what a user would write
    if isinstance(value, partial):
        return _format_call(value.func, {name: member.value for name, member in members(value).items()})
    if inspect.isfunction(value) or inspect.isbuiltin(value) or isinstance(value, type):
        return full_name(value)
    if isinstance(value, tuple | list) and any(map(callable, value)):
        return f"({', '.join(map(describe, value))})"
    if dataclasses.is_dataclass(value):
        return _format_call(type(value), {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr})
    if inspect.ismethod(value):
        return f"{describe(value.__self__)}.{value.__name__}"
    text = repr(value)
    if not ADDRESS.search(text):
        return text
    if isinstance(value, dict):
        return f"{{{', '.join(f'{describe(key)}: {describe(part)}' for key, part in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(describe, value))})"
    return _describe_object(value) if hasattr(value, "__dict__") else text


def _describe_object(value: Any) -> str:
    """Format an object without a custom repr: its class, and the constructor arguments that it stores."""
    arguments = {}
    for name in inspect.signature(type(value)).parameters:
        if name in vars(value):
            argument = vars(value)[name]
            text = "itself" if argument is value else describe(argument)
            # Other values are hashed, because descriptions are saved and printed: text may be long or secret.
            is_shown = argument is None or isinstance(argument, bool | int | float) or callable(argument)
            arguments[name] = text if is_shown else f"#{hashlib.sha256(text.encode()).hexdigest()[:12]}"
            if ADDRESS.search(text):
                arguments[name] = text
    return f"{full_name(type(value))}({', '.join(f'{name}={text}' for name, text in arguments.items())})"


def _format_call(factory: Any, values: dict[str, Any]) -> str:
    texts = [("" if name.isdecimal() else f"{name}=") + describe(value) for name, value in values.items()]
    name = full_name(factory) if hasattr(factory, "__name__") else describe(factory)
    return f"{name}({', '.join(texts)})"


def full_name(target: Any) -> str:
    """Return the NAME of a function or class, or MODULE:NAME outside of this library."""
    # With the module, because a resume must distinguish functions of the same name.
    module = target.__module__ or "builtins"  # builtin functions of torch have no module
    if module.partition(".")[0] == "dllm_rl":
        return target.__name__
    module = _main_module_name() if module == "__main__" else module
    return f"{module}:{target.__name__}"


def _main_module_name() -> str:
    """Return the module name under which other code imports the running script; __main__ in a notebook."""
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


def described(record: Any) -> dict[str, Any]:
    """Return the fields as `plain` values, for JSON."""
    return {f.name: plain(getattr(record, f.name)) for f in dataclasses.fields(record)}
