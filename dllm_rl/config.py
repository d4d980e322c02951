"""Recipes from the command line, and recipes as text.

Every scalar has a path: a field (`learning_rate`), a keyword of a function (`sampler.temperature`) or of a record's
maker (`likelihood.num_segments`), a field of a record (`task.clues`, `corrector.weigh.cap`). Functions are picked by
name (`--corrector tis`), records by their makers (`--likelihood elbo`). MODULE:FUNCTION imports and runs any module's
function: only the command line may name one, never a checkpoint. A path's help is the docstring line that begins with
its name and two spaces.
"""

import dataclasses
import difflib
import inspect
import math
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from dllm_rl.screen import escape_controls, interactive

Record = TypeVar("Record", bound=Any)  # a frozen dataclass, as Recipe or a task
SCALARS = (bool, int, float, str, Path)
NOTHING: Mapping[str, str] = types.MappingProxyType({})
Made = TypeVar("Made", bound=Callable[..., Any])


def maker(function: Made) -> Made:
    """Make a function's record store in `made_by` the function and its keywords, so that a keyword can be changed.

    The record declares `made_by: partial | None = field(default=None, init=False, repr=False, compare=False)`. A copy
    by `dataclasses.replace` does not inherit it, because the function would not make that copy.
    """

    @wraps(function)
    def make(**keywords: Any) -> Any:
        made = function(**keywords)
        object.__setattr__(made, "made_by", partial(make, **keywords))
        return made

    return typing.cast(Made, make)


def from_command_line(recipe: Record, argv: list[str] | None = None) -> Record:
    """The recipe with `--path value` overrides applied. Exits with status 2 and one line on an unknown path or a bad
    value, naming the nearest valid one; `--help` lists every path of the resulting recipe.

    argv  None: the program's arguments, or none in a notebook or at a prompt
    """
    arguments = list(([] if interactive() else sys.argv[1:]) if argv is None else argv)
    wanted = [word for word in arguments if word not in ("--help", "-h")]
    try:
        recipe = _overridden(recipe, _pairs(list(wanted)))
        if wanted != arguments:
            print(escape_controls(usage(recipe), keep="\n"))
            raise SystemExit(0)
    except ValueError as error:
        print(f"error: {escape_controls(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    return recipe


def _overridden(recipe: Record, pairs: list[tuple[str, str]]) -> Record:
    """Apply overrides, short paths first, until none is left: a path may become valid only after another."""
    pairs = sorted(pairs, key=lambda pair: pair[0].count("."))
    while pairs:
        waiting, errors = [], []
        for path, text in pairs:
            try:
                below = {name.removeprefix(f"{path}."): words for name, words in pairs if name.startswith(f"{path}.")}
                recipe = override(recipe, path, text, below)
            except ValueError as error:
                waiting.append((path, text))
                errors.append(error)
        if len(waiting) == len(pairs):
            raise errors[0]
        pairs = waiting
    return recipe


def _pairs(arguments: list[str]) -> list[tuple[str, str]]:
    """`--a 1 --b=2 --flag` -> (a, 1), (b, 2), (flag, true)."""
    pairs: list[tuple[str, str]] = []
    while arguments:
        head = arguments.pop(0)
        if not head.startswith("--"):
            raise ValueError(f"{head!r} is not an option; options are written --name value")
        name, equals, value = head[2:].partition("=")
        if not equals:
            value = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "true"
        pairs.append((name, value))
    return pairs


def override(recipe: Record, path: str, text: str, below: Mapping[str, str] = NOTHING) -> Record:
    """The recipe with the value at `path` read from text. Raises ValueError naming the field, the value, the remedy.

    below  texts of keywords that a named function requires
    """
    known = paths(recipe)
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1, cutoff=0)
        raise ValueError(f"--{path} is not a field of the recipe; the nearest is --{near[0]} (--help lists all)")
    try:
        return _replace(recipe, path.split("."), known[path].read(text, below))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if path.rpartition(".")[2] in message else f"--{path}: {message}") from None


@dataclasses.dataclass(frozen=True)
class Setting:
    value: Any
    help: str
    choices: tuple[str, ...]  # empty: any that can be read
    read: Callable[..., Any]  # of a text, and for a named function of its keywords' texts


@dataclasses.dataclass(frozen=True)
class _Member:
    """A field of a record, or a keyword of a function. `example` is its default, which shows what it may be."""

    name: str
    value: Any
    annotation: Any
    help: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    example: Any = None


def paths(owner: Any, prefix: str = "") -> dict[str, Setting]:
    """Every path below a record or a function, with its value and how to read another from text."""
    found: dict[str, Setting] = {}
    for member in _members(owner):
        path, value, kinds = f"{prefix}{member.name}", member.value, _kinds(member.annotation)
        if choices := _choices(member):
            names = (*sorted(choices), *["none"] * (types.NoneType in kinds))
            found[path] = Setting(value, member.help, names, partial(_pick, path, member, choices))
        elif _scalar(member.annotation) and (not callable(value) or str in kinds):
            found[path] = Setting(value, member.help, _literals(kinds), partial(_read, path, member.annotation))
        record = dataclasses.is_dataclass(value) and not isinstance(value, type)
        if record or isinstance(value, partial | tuple) or inspect.isfunction(value):
            found |= paths(value, f"{path}.")
    found.pop("model.seed", None)  # the recipe's own seed is what the model is made with
    return found


def _literals(kinds: tuple) -> tuple[str, ...]:
    return tuple(name for kind in kinds if typing.get_origin(kind) is typing.Literal for name in typing.get_args(kind))


def _scalar(annotation: Any) -> bool:
    return any(kind in SCALARS or _literals((kind,)) for kind in _kinds(annotation))


def _function(value: Any) -> Any:
    """The function of a bound one; anything else as it is."""
    return value.func if isinstance(value, partial) else value


def _members(owner: Any) -> list[_Member]:
    """A record's fields, or its maker's keywords; a function's keywords, bound or by default; a tuple's functions."""
    if hasattr(owner, "made_by"):
        return [] if owner.made_by is None else _members(owner.made_by)
    if isinstance(owner, tuple):
        return [_Member(str(i), v, None, "") for i, v in enumerate(owner, 1) if callable(v)]
    if isinstance(owner, partial) or inspect.isfunction(owner):
        bound = owner if isinstance(owner, partial) else partial(owner)
        helps, members = helps_of(bound.func), []
        for p in inspect.signature(bound.func).parameters.values():
            value = bound.keywords.get(p.name, p.default)
            if p.kind is p.KEYWORD_ONLY and value is not p.empty:
                example = value if p.default is p.empty or p.default is None else p.default
                members.append(_Member(p.name, value, p.annotation, helps.get(p.name, ""), example=example))
        return members
    helps, members = helps_of(type(owner)), []
    for f in dataclasses.fields(owner):
        example = f.metadata.get("like") or f.default if f.metadata.get("pick") else None
        help = f.metadata.get("help") or helps.get(f.name, "")
        members.append(_Member(f.name, getattr(owner, f.name), f.type, help, f.metadata, example))
    return members


def helps_of(described: Any) -> dict[str, str]:
    """A docstring's help per name: lines "name  text" or "name, name  text", and the deeper lines below them; a class
    inherits its bases' help."""
    found: dict[str, str] = {}
    for owner in reversed(getattr(described, "__mro__", (described,))):
        names: list[str] = []
        depth = 0
        for line in inspect.cleandoc(owner.__doc__ or "").splitlines():
            text = line.lstrip()
            if start := re.match(r"([a-z_0-9]+(?:, [a-z_0-9]+)*) {2,}(?=\S)", text):
                names, depth = start[1].split(", "), len(line) - len(text)
                found |= dict.fromkeys(names, text[start.end() :])
            elif text and len(line) - len(text) > depth:
                found |= {name: f"{found[name]} {text}" for name in names}
            else:
                names = []
    return found


def _replace(owner: Any, keys: list[str], value: Any) -> Any:
    if getattr(owner, "made_by", None) is not None:
        return _replace(owner.made_by, keys, value)()
    if len(keys) > 1:
        below = {member.name: member.value for member in _members(owner)}
        value = _replace(below[keys[0]], keys[1:], value)
    if isinstance(owner, tuple):
        place = int(keys[0]) - 1
        return (*owner[:place], value, *owner[place + 1 :])
    if isinstance(owner, partial) or inspect.isfunction(owner):
        return partial(owner, **{keys[0]: value})
    return dataclasses.replace(owner, **{keys[0]: value})


def _choices(member: _Member) -> dict[str, Any]:
    """What may be named for a field or keyword: functions of its `pick`, makers of its record type, or siblings of its
    function; empty for anything else."""
    value = member.value
    if pick := member.metadata.get("pick"):
        return pickable(pick, member.example, member.annotation)
    if record := _record_type(member.annotation):
        return makers_of(record)
    if inspect.isfunction(_function(member.example)):
        now = {value.__name__: value} if inspect.isfunction(value) else {}
        return now | siblings(_function(member.example))
    return {}


def _record_type(annotation: Any) -> type | None:
    """The record among an annotation's types."""
    kinds = (kind for kind in _kinds(annotation) if isinstance(kind, type) and dataclasses.is_dataclass(kind))
    return next(kinds, None)


def makers_of(record: type) -> dict[str, Callable]:
    """Functions of a record's module that make one from keywords that can be read from text."""
    functions = _public_functions(record.__module__).items()
    alike = {n: f for n, f in functions if inspect.signature(f).return_annotation is record}
    plain = {n: f for n, f in alike.items() if all(p.kind is p.KEYWORD_ONLY for p in _parameters(f))}
    return {n: f for n, f in plain.items() if all(map(_scalar, _needed_keywords(f).values()))}


def _public_functions(module_name: str) -> dict[str, Callable]:
    """Functions that a module defines."""
    held = vars(import_module(module_name)).items()
    return {n: f for n, f in held if inspect.isfunction(f) and not n.startswith("_") and f.__module__ == module_name}


def pickable(module_name: str, value: Any, annotation: Any) -> dict[str, Any]:
    """Public functions that take the positional parameters of `value` first; without any, those without arguments."""
    functions, example = _public_functions(module_name), _function(value)
    if inspect.isfunction(example) and (first := _positional(example)):
        return {n: f for n, f in siblings(example).items() if n in functions and _positional(f)[: len(first)] == first}
    return {n: f for n, f in functions.items() if all(p.kind is p.KEYWORD_ONLY for p in _parameters(f))}


def siblings(function: Callable) -> dict[str, Callable]:
    """Public functions of the same module with the same return annotation and no other required keyword except numbers
    and names; the function alone without a return annotation."""
    if (kind := inspect.signature(function).return_annotation) is inspect.Signature.empty:
        return {function.__name__: function}
    public, given = _public_functions(function.__module__), _needed_keywords(function)
    alike = {n: f for n, f in public.items() if str(inspect.signature(f).return_annotation) == str(kind)}
    return {n: f for n, f in alike.items() if all(_scalar(a) or k in given for k, a in _needed_keywords(f).items())}


def _parameters(function: Callable) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _needed_keywords(function: Callable) -> dict[str, Any]:
    """Keywords without a default and not bound, with their annotations."""
    return {p.name: p.annotation for p in _parameters(function) if p.kind is p.KEYWORD_ONLY and p.default is p.empty}


def _positional(function: Callable) -> list[str]:
    return [p.name for p in _parameters(function) if p.kind is p.POSITIONAL_OR_KEYWORD]


def _pick(path: str, member: _Member, choices: dict[str, Any], text: str, below: Mapping[str, str] = NOTHING) -> Any:
    """The function that text names, bound with the keywords that it needs (`below`), or the record that it makes."""
    optional = types.NoneType in _kinds(member.annotation)
    record = _record_type(member.annotation)
    if optional and text == "none":
        return None
    chosen = _imported(path, text) if ":" in text and not record else choices.get(text)
    if chosen is None:
        raise _unknown(path, text, [*sorted(choices), *["none"] * optional])
    given = _needed_keywords(member.example) if inspect.isfunction(_function(member.example)) else {}
    needs, helps = _needed_keywords(chosen), helps_of(_function(chosen))
    for name in sorted(needs.keys() - given.keys() - below.keys()):
        raise ValueError(f"--{path} {text} needs --{path}.{name}" + (f" ({helps[name]})" if name in helps else ""))
    bound = {name: _read(f"{path}.{name}", needs[name], below[name]) for name in needs.keys() - given.keys()}
    function = partial(chosen, **bound) if bound else chosen
    return function() if record else function


def _imported(path: str, text: str) -> Callable:
    """The function that `text`, MODULE:FUNCTION, names."""
    module_name, _, name = text.partition(":")
    try:
        function = getattr(import_module(module_name), name, None)
    except ImportError as error:
        raise ValueError(f"--{path} {text!r}: {error}; give MODULE:FUNCTION, its folder in PYTHONPATH") from None
    if not inspect.isfunction(function):
        raise ValueError(f"--{path} {text!r}: module {module_name!r} has no function {name!r}")
    return function


def _unknown(path: str, text: str, names: list[str]) -> ValueError:
    near = difflib.get_close_matches(text, names, n=1, cutoff=0)
    return ValueError(f"--{path} {text!r} is not known; the nearest is {near[0]!r} (one of {', '.join(names)})")


def _kinds(annotation: Any) -> tuple:
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def _read(path: str, annotation: Any, text: str, below: Mapping[str, str] = NOTHING) -> Any:
    """Text as the first of the annotation's types that accepts it; `below` is for functions, see `_pick`."""
    if text == "none" and types.NoneType in _kinds(annotation):
        return None
    for kind in _kinds(annotation):
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if text in _literals((kind,)):
            return text
        if typing.get_origin(kind) is tuple and "," in text:
            return tuple(_read(path, typing.get_args(kind)[0], part) for part in text.split(","))
        if kind in (int, float):
            try:
                value = kind(text)
            except ValueError:
                continue
            if math.isfinite(value):
                return value
        if kind in (str, Path) and (text or annotation is str):  # an empty path is a variable that is not set
            return kind(text)
    if literal := _literals(_kinds(annotation)):
        raise _unknown(path, text, [*literal, *["none"] * (types.NoneType in _kinds(annotation))])
    wanted = getattr(annotation, "__name__", str(annotation))
    raise ValueError(f"--{path} {text!r} is not a valid {wanted.replace('types.NoneType', 'none')}")


def describe(value: Any) -> str:
    """A value as text: bound functions and records as name(k=v) with defaults filled in, without fields that are None
    and whose metadata has `omit_none`."""
    if isinstance(value, partial):
        arguments = ", ".join(f"{member.name}={describe(member.value)}" for member in _members(value))
        return f"{value.func.__name__}({arguments})"
    if inspect.isfunction(value) or isinstance(value, type):
        return value.__name__
    if isinstance(value, tuple | list) and any(map(callable, value)):
        return f"({', '.join(map(describe, value))})"
    if dataclasses.is_dataclass(value):
        members = [(f, getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr]
        shown = [(f.name, v) for f, v in members if not (f.metadata.get("omit_none") and v is None)]
        return f"{type(value).__name__}({', '.join(f'{n}={describe(v)}' for n, v in shown)})"
    return repr(value)


def plain(value: Any) -> Any:
    """Scalars as they are, everything else as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else describe(value)


def described(recipe: Record) -> dict[str, Any]:
    """Field by field, as `plain` values; for JSON."""
    return {f.name: plain(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}


def usage(recipe: Any) -> str:
    """Every path with its value, its meaning and its choices, below the field that it belongs to."""
    listed = paths(recipe)
    lines = [f"usage: [accelerate launch] RECIPE.py [--FIELD VALUE ...]      recipe {recipe.name}", ""]
    indented = partial(textwrap.fill, width=118, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for field in dataclasses.fields(recipe):
        own = {path: setting for path, setting in listed.items() if path.partition(".")[0] == field.name}
        if field.name not in own and own:
            lines += [f"  {field.name}", indented(field.metadata.get("help", ""))]
        for path, setting in own.items():
            shown = f"--{path} {describe(setting.value)}"
            short = len(shown) <= 52 and len(setting.help) <= 66
            lines.append(f"  {shown:52}{setting.help}".rstrip() if short else f"  {shown}")
            if setting.help and not short:
                lines.append(indented(setting.help))
            if setting.choices:
                lines.append(indented(f"one of: {', '.join(setting.choices)}"))
    return "\n".join(lines)
