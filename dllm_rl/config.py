"""Recipes from the command line, and recipes as text. A scalar's path is a field (`learning_rate`), a keyword of a
function (`sampler.temperature`) or of a record's maker (`likelihood.num_segments`), or a record's field (`task.clues`).
"""

import dataclasses
import difflib
import inspect
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from dllm_rl.bounds import Bound
from dllm_rl.members import Member, describe, function_of, helps_of, members
from dllm_rl.screen import escape_controls, interactive

Record = TypeVar("Record", bound=Any)  # a frozen dataclass, as Recipe or a task
SCALARS = frozenset((bool, int, float, str, Path))
NOTHING: Mapping[str, str] = types.MappingProxyType({})


def from_command_line(recipe: Record, argv: list[str] | None = None) -> Record:
    """The recipe with `--path value` overrides; argv None: the program's arguments, or none at a prompt. `--help` lists
    every path. Exits with status 2 on an unknown path or a bad value, in one line that names the nearest valid one."""
    arguments = list(([] if interactive() else sys.argv[1:]) if argv is None else argv)
    wanted = [word for word in arguments if word not in ("--help", "-h")]  # help is of the recipe that the rest makes
    try:
        recipe = override(recipe, _pairs(list(wanted))) if wanted else recipe
        if wanted != arguments:
            print(escape_controls(usage(recipe), keep="\n"))
            raise SystemExit(0)
    except ValueError as error:
        print(f"error: {escape_controls(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    return recipe


def _pairs(arguments: list[str]) -> dict[str, str]:
    """`--a 1 --b=2 --flag` -> {a: 1, b: 2, flag: true}."""
    pairs: dict[str, str] = {}
    while arguments:
        head = arguments.pop(0)
        if not head.startswith("--"):
            raise ValueError(f"{head!r} is not an option; options are written --name value")
        name, equals, value = head[2:].partition("=")
        if not equals:
            value = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "true"
        pairs[name] = value
    return pairs


def override(owner: Any, texts: Mapping[str, str], prefix: str = "") -> Any:
    """The record or function with new values, texts by path. Each record is made, and checked, once with all of its
    changes. Raises ValueError on an unknown path or a bad value."""
    known = paths(owner, prefix)
    held = {member.name: member.value for member in members(owner)} if known else {}
    below: dict[str, dict[str, str]] = {}
    for path, text in texts.items():
        name, dot, rest = path.partition(".")
        below.setdefault(name, {}).update({rest: text} if dot else {})
    changes = {}
    for name, inner in below.items():
        path = f"{prefix}{name}"
        own = texts.get(name)
        if name not in held or (own is not None and path not in known):
            raise _no_field(path if own is not None else f"{path}.{next(iter(inner))}", own, known, held)
        # A function before its keywords: they are those of the function that is picked.
        value = held[name] if own is None else known[path].read(own, inner)
        changes[name] = override(value, inner, f"{path}.") if inner else value
    return _made(owner, changes, prefix)


def _made(owner: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    """The owner with its changes. Raises its own ValueError, with the paths where the message names none of them."""
    try:
        return _with(owner, changes)
    except ValueError as error:
        message = str(error)
        if not any(name in message for name in changes):
            message = f"{', '.join(f'--{prefix}{name}' for name in changes)}: {message}"
        raise ValueError(message) from None


def _no_field(path: str, text: str | None, known: Iterable[str], held: Iterable[str]) -> ValueError:
    if text and path in held:  # such as a task: its name would not say what its fields, and the sampler's, should be
        script = Path(sys.argv[0])
        files = [file.name for file in script.parent.glob("*.py") if text in file.stem]
        near = difflib.get_close_matches(script.name, files, n=1, cutoff=0)
        where = f": {near[0]}" if near else "'s file"
        return ValueError(f"--{path} {text!r}: a {path} is chosen by its recipe{where}")
    near = difflib.get_close_matches(path, known, n=1, cutoff=0)  # cutoff 0: the nearest, however far
    nearest = f"; the nearest is --{near[0]}" if near else ""
    return ValueError(f"--{path} is not a field of the recipe{nearest} (--help lists all)")


@dataclasses.dataclass(frozen=True)
class Setting:
    value: Any
    help: str
    choices: tuple[str, ...]  # empty: any that can be read
    read: Callable[..., Any]  # of a text, and for a named function of its keywords' texts
    bound: Bound | None = None


def paths(owner: Any, prefix: str = "") -> dict[str, Setting]:
    """Every path below a record or a function, with its value and how to read another from text."""
    found: dict[str, Setting] = {}
    record = dataclasses.is_dataclass(owner) and not isinstance(owner, type)
    if not record and not isinstance(owner, partial | tuple) and not inspect.isfunction(owner):
        return found  # a value that holds none
    for member in members(owner):
        path = f"{prefix}{member.name}"
        if setting := _setting(path, member):
            found[path] = setting
        found |= paths(member.value, f"{path}.")
    found.pop("model.seed", None)  # the recipe's own seed is what the model is made with
    return found


def _setting(path: str, member: Member) -> Setting | None:
    """What a text may be read as at the path; None: a member that only has members of its own."""
    kinds = _kinds(member.annotation)
    if choices := _choices(member):
        names = _names(sorted(choices), kinds)
        return Setting(member.value, member.help, names, partial(_pick, path, member, choices))
    if _scalar(member.annotation) and (not callable(member.value) or str in kinds):
        read = partial(_read, path, member.annotation)
        return Setting(member.value, member.help, _literals(kinds), read, member.bound)
    return None


def _names(known: Iterable[str], kinds: tuple) -> tuple[str, ...]:
    return (*known, "none") if types.NoneType in kinds else tuple(known)


def _literals(kinds: tuple) -> tuple[str, ...]:
    words: tuple[str, ...] = ()
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            words += typing.get_args(kind)
    return words


def _scalar(annotation: Any) -> bool:
    kinds = _kinds(annotation)
    return bool(_literals(kinds)) or not SCALARS.isdisjoint(kinds)


def _with(owner: Any, changes: Mapping[str, Any]) -> Any:
    if getattr(owner, "made_by", None) is not None:
        return _with(owner.made_by, changes)()
    if isinstance(owner, tuple):
        return tuple(changes.get(str(place), part) for place, part in enumerate(owner, 1))
    if isinstance(owner, partial) or inspect.isfunction(owner):  # a new partial: the recipe's own stays as it is
        return partial(owner, **changes)
    return dataclasses.replace(owner, **changes)


def _choices(member: Member) -> dict[str, Any]:
    """Functions of the member's `pick`, makers of its record type, or siblings of its function, by name."""
    if member.pick:
        return pickable(member.pick, member.example)
    if record := _record_type(member.annotation):
        return _offered(record.__module__, lambda function: not _positional(function) and _is_like(function, record))
    if inspect.isfunction(function_of(member.example)):
        value = member.value
        now = {value.__name__: value} if inspect.isfunction(value) else {}
        return now | siblings(function_of(member.example))
    return {}


def _record_type(annotation: Any) -> type | None:
    for kind in _kinds(annotation):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


def pickable(module_name: str, value: Any = None) -> dict[str, Any]:
    """Siblings that take the positional parameters of `value` first; without any, functions without arguments."""
    example = function_of(value)
    if not inspect.isfunction(example) or not (first := _positional(example)):
        return _offered(module_name, lambda function: not _positional(function))
    return {name: f for name, f in siblings(example).items() if _positional(f)[: len(first)] == first}


def siblings(function: Callable) -> dict[str, Callable]:
    """Public functions of its module with the same return annotation that need no keyword but numbers and names."""
    made = inspect.signature(function).return_annotation
    if made is inspect.Signature.empty:
        return {function.__name__: function}
    given = _needed_keywords(function)  # the caller gives them, so that no text needs to
    return _offered(function.__module__, lambda other: _is_like(other, made, given))


def _is_like(function: Callable, made: Any, given: Iterable[str] = ()) -> bool:
    """Whether the function returns `made` and needs only numbers and names beside what is given."""
    if str(inspect.signature(function).return_annotation) != str(made):
        return False
    return all(name in given or _scalar(kind) for name, kind in _needed_keywords(function).items())


def _offered(module_name: str, fits: Callable[[Callable], bool]) -> dict[str, Callable]:
    """The public functions that a module, and the modules that it names in MORE, define, where they fit."""
    module = import_module(module_name)
    found = {}
    for name, function in vars(module).items():
        own = inspect.isfunction(function) and function.__module__ == module_name
        if own and not name.startswith("_") and fits(function):
            found[name] = function
    for other in getattr(module, "MORE", ()):
        found |= _offered(other, fits)
    return found


def _needed_keywords(function: Callable) -> dict[str, Any]:
    """Keywords without a default and not bound, with their annotations."""
    needed = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            needed[name] = parameter.annotation
    return needed


def _positional(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.items()
    return [name for name, parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]


def _pick(path: str, member: Member, choices: dict[str, Any], text: str, below: Mapping[str, str] = NOTHING) -> Any:
    """The function that text names, bound with the keywords that it needs (`below`), or the record that it makes."""
    kinds = _kinds(member.annotation)
    record = _record_type(member.annotation)
    if text == "none" and types.NoneType in kinds:
        return None
    # A checkpoint's text never comes here: only a user's command line may import.
    chosen = imported(path, text) if ":" in text and not record else choices.get(text)
    if chosen is None:
        raise _unknown(path, text, _names(sorted(choices), kinds))
    needed = _needed_keywords(chosen)
    if inspect.isfunction(function_of(member.example)):
        for name in _needed_keywords(member.example):
            needed.pop(name, None)  # the caller gives it
    helps = helps_of(function_of(chosen))
    bound = {}
    for name, annotation in sorted(needed.items()):
        if name not in below:
            raise ValueError(f"--{path} {text} needs --{path}.{name}" + (f" ({helps[name]})" if name in helps else ""))
        bound[name] = _read(f"{path}.{name}", annotation, below[name])
    function = partial(chosen, **bound) if bound else chosen
    return function() if record else function


def imported(path: str, text: str) -> Callable:
    """The function that `text`, MODULE:FUNCTION, names."""
    module_name, _, name = text.partition(":")
    try:
        function = getattr(import_module(module_name), name, None)
    except (ImportError, ValueError) as error:  # ValueError: an empty name
        raise ValueError(f"--{path} {text!r}: {error}; give MODULE:FUNCTION, its folder in PYTHONPATH") from None
    if not inspect.isfunction(function):
        raise ValueError(f"--{path} {text!r}: module {module_name!r} has no function {name!r}")
    return function


def _unknown(path: str, text: str, names: tuple[str, ...]) -> ValueError:
    near = difflib.get_close_matches(text, names, n=1, cutoff=0)
    return ValueError(f"--{path} {text!r} is not known; the nearest is {near[0]!r} (one of {', '.join(names)})")


def _kinds(annotation: Any) -> tuple:
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def _read(path: str, annotation: Any, text: str, below: Mapping[str, str] = NOTHING) -> Any:
    """Text as the first of the annotation's types that accepts it; `below` is for functions, see `_pick`."""
    kinds = _kinds(annotation)
    if text == "none" and types.NoneType in kinds:
        return None
    if annotation is str:
        return text
    for kind in kinds:
        value = _accepted(path, kind, text)
        if value is not None:
            return value
    if literal := _literals(kinds):
        raise _unknown(path, text, _names(literal, kinds))
    wanted = getattr(annotation, "__name__", str(annotation))
    raise ValueError(f"--{path} {text!r} is not a valid {wanted.replace('types.NoneType', 'none')}")


def _accepted(path: str, kind: Any, text: str) -> Any:
    """Text as a value of one type; None: the type does not accept it."""
    if kind is bool:
        return {"true": True, "false": False}.get(text)
    if typing.get_origin(kind) is tuple and "," in text:
        return tuple(_read(path, typing.get_args(kind)[0], part) for part in text.split(","))
    if kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            return None
        return value if kind is int or math.isfinite(value) else None
    if kind in (str, Path):
        return kind(text) if text else None  # an empty path is a variable that is not set
    return text if text in _literals((kind,)) else None


def usage(recipe: Any) -> str:
    """Every path with its value, its meaning, its bound and its choices, below the field that it belongs to."""
    settings = paths(recipe)
    lines = [f"usage: [accelerate launch] RECIPE.py [--FIELD VALUE ...]      recipe {recipe.name}", ""]
    indented = partial(textwrap.fill, width=118, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for field in dataclasses.fields(recipe):
        own = {path: setting for path, setting in settings.items() if path.partition(".")[0] == field.name}
        if field.name not in own and own:
            lines += [f"  {field.name}", indented(field.metadata.get("help", ""))]
        for path, setting in own.items():
            shown = f"--{path} {describe(setting.value)}"
            help = setting.help
            if setting.bound and str(setting.bound) not in help:
                help += f" ({setting.bound})"
            short = len(shown) <= 52 and len(help) <= 66
            lines.append(f"  {shown:52}{help}".rstrip() if short else f"  {shown}")
            if help and not short:
                lines.append(indented(help))
            if setting.choices:
                lines.append(indented(f"one of: {', '.join(setting.choices)}"))
    return "\n".join(lines)
