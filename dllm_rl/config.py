"""Recipes from the command line, and recipes as text.

Every scalar of a recipe has a path: a field (`learning_rate`), a keyword bound in a function (`sampler.temperature`),
a field of a record (`task.clues`, `corrector.weigh.cap`). Functions are picked by name (`--corrector tis`).
"""

import dataclasses
import difflib
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from dllm_rl.screen import escape_controls, interactive


@runtime_checkable
class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


Record = TypeVar("Record", bound=_Dataclass)  # frozen, as Recipe or a task
SCALARS = (bool, int, float, str, Path)


def from_command_line(recipe: Record, argv: list[str] | None = None) -> Record:
    """The recipe with `--path value` overrides applied. Exits with status 2 and one line on an unknown path or a bad
    value, naming the nearest valid one; `--help` lists every path with its value.

    argv  None: the program's arguments; none in a notebook or at a prompt, whose arguments are not the recipe's.
    """
    arguments = list(([] if interactive() else sys.argv[1:]) if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(escape_controls(usage(recipe), keep="\n"))
        raise SystemExit(0)
    try:
        recipe = _overridden(recipe, _pairs(arguments))
    except ValueError as error:
        print(f"error: {escape_controls(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    return recipe


def _overridden(recipe: Record, pairs: list[tuple[str, str]]) -> Record:
    """Apply overrides until none is left; one may become valid only after another (as a field of a newly picked
    record)."""
    while pairs:
        waiting, errors = [], []
        for path, text in pairs:
            try:
                recipe = override(recipe, path, text)
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


def override(recipe: Record, path: str, text: str) -> Record:
    """The recipe with the value at `path` read from text. Raises ValueError naming the field, the value, the remedy."""
    known = paths(recipe)
    if path not in known:
        near = difflib.get_close_matches(path, known, n=1, cutoff=0.5) or difflib.get_close_matches(
            path, known, n=1, cutoff=0
        )
        raise ValueError(f"--{path} is not a field of the recipe; the nearest is --{near[0]} (--help lists all)")
    try:
        return _replace(recipe, path.split("."), known[path].read(text))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if path.rpartition(".")[2] in message else f"--{path}: {message}") from None


@dataclasses.dataclass(frozen=True)
class Setting:
    value: Any
    help: str
    read: partial  # of the text alone


def paths(owner: Any, prefix: str = "") -> dict[str, Setting]:
    """Every path below a record or a bound function, with its present value and how to read another from text."""
    found: dict[str, Setting] = {}
    for name, value, annotation, metadata in _members(owner):
        path = f"{prefix}{name}"
        if metadata.get("pick"):
            choices = pickable(metadata["pick"], metadata.get("like") if value is None else value, annotation)
            found[path] = Setting(value, metadata.get("help", ""), partial(_pick, path, choices, _optional(annotation)))
        elif inspect.isfunction(value) and isinstance(owner, partial):
            choices = siblings(value)
            found[path] = Setting(value, metadata.get("help", ""), partial(_pick, path, choices, False))
        elif any(map(_readable, _kinds(annotation))) and (not callable(value) or str in _kinds(annotation)):
            found[path] = Setting(value, metadata.get("help", ""), partial(_read, path, annotation))
        if metadata.get("whole"):
            continue
        if isinstance(value, partial) or inspect.isfunction(value) or _is_record(value):
            found |= paths(value, f"{path}.")
    found.pop("model.seed", None)  # the recipe's own seed is what the model is made with
    return found


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _readable(kind: Any) -> bool:
    return kind in SCALARS or typing.get_origin(kind) is typing.Literal


def _members(owner: Any) -> list[tuple[str, Any, Any, dict]]:
    """Name, value, annotation, metadata of a record's fields, or of the keywords of a function, bound or by default."""
    if inspect.isfunction(owner):
        owner = partial(owner)
    if isinstance(owner, partial):
        parameters = inspect.signature(owner.func).parameters.values()
        bound = [(p, owner.keywords.get(p.name, p.default)) for p in parameters if p.kind is p.KEYWORD_ONLY]
        return [(p.name, value, p.annotation, {}) for p, value in bound if value is not p.empty]
    return [(f.name, getattr(owner, f.name), f.type, dict(f.metadata)) for f in dataclasses.fields(owner)]


def _replace(owner: Any, keys: list[str], value: Any) -> Any:
    if len(keys) > 1:
        value = _replace({n: v for n, v, *_ in _members(owner)}[keys[0]], keys[1:], value)
    if inspect.isfunction(owner):
        owner = partial(owner)
    if isinstance(owner, partial):
        return partial(owner.func, *owner.args, **{**owner.keywords, keys[0]: value})
    return dataclasses.replace(owner, **{keys[0]: value})


def pickable(module_name: str, value: Any, annotation: Any) -> dict[str, Any]:
    """Public functions of the module whose signature is compatible with `value`: the same positional parameters, or,
    where a record or a built object is wanted, functions that make one and need no argument."""
    module = import_module(module_name)
    functions = {
        n: f
        for n, f in vars(module).items()
        if inspect.isfunction(f) and not n.startswith("_") and f.__module__ == module_name
    }
    example = value.func if isinstance(value, partial) else value
    if inspect.isfunction(example) and _positional(example):
        return {n: f for n, f in siblings(example).items() if n in functions and _positional(f) == _positional(example)}
    makers = {n: f for n, f in functions.items() if not _required(f)}
    if dataclasses.is_dataclass(example):
        return {n: f() for n, f in makers.items() if inspect.signature(f).return_annotation is type(example)}
    return {n: f for n, f in makers.items() if not _positional(f)}


def siblings(function: Callable) -> dict[str, Callable]:
    """Public functions of the same module that return the same kind of thing and need no other keyword."""
    found = {
        n: f
        for n, f in vars(import_module(function.__module__)).items()
        if inspect.isfunction(f) and not n.startswith("_")
    }
    kind, given = str(inspect.signature(function).return_annotation), _needed_keywords(function)
    alike = {n: f for n, f in found.items() if str(inspect.signature(f).return_annotation) == kind}
    return {n: f for n, f in alike.items() if _needed_keywords(f) <= given}


def _needed_keywords(function: Callable) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}


def _positional(function: Callable) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


def _required(function: Callable) -> bool:
    return any(p.default is p.empty for p in inspect.signature(function).parameters.values())


def _pick(path: str, choices: dict[str, Any], optional: bool, text: str) -> Any:
    if optional and text == "none":
        return None
    if text in choices:
        return choices[text]
    names = sorted(choices) + (["none"] if optional else [])
    near = difflib.get_close_matches(text, names, n=1, cutoff=0)
    raise ValueError(f"--{path} {text!r} is not known; the nearest is {near[0]!r} (one of {', '.join(names)})")


def _kinds(annotation: Any) -> tuple:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)


def _optional(annotation: Any) -> bool:
    return types.NoneType in _kinds(annotation)


def _read(path: str, annotation: Any, text: str) -> Any:
    """Text as the first of the annotation's types that takes it."""
    for kind in _kinds(annotation):
        if kind is types.NoneType and text == "none":
            return None
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if typing.get_origin(kind) is typing.Literal and text in typing.get_args(kind):
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
        if kind in (str, Path):
            return kind(text)
    wanted = getattr(annotation, "__name__", str(annotation))
    raise ValueError(f"--{path} {text!r} is not a valid {wanted.replace('types.NoneType', 'none')}")


def describe(value: Any) -> str:
    """What ran, as text: every bound function as name(k=v) with its defaults filled in, records likewise; a field whose
    metadata says `omit_none` is left out where it is None."""
    if isinstance(value, partial):
        arguments = ", ".join(f"{name}={describe(v)}" for name, v, *_ in _members(value))
        return f"{value.func.__name__}({arguments})"
    if inspect.isfunction(value) or isinstance(value, type):
        return value.__name__
    if isinstance(value, tuple | list) and any(map(callable, value)):
        return f"({', '.join(map(describe, value))})"
    if dataclasses.is_dataclass(value):
        hidden = {f.name for f in dataclasses.fields(value) if not f.repr}
        members = [(n, v, metadata) for n, v, _, metadata in _members(value) if n not in hidden]
        shown = [(n, v) for n, v, metadata in members if not (metadata.get("omit_none") and v is None)]
        return f"{type(value).__name__}({', '.join(f'{n}={describe(v)}' for n, v in shown)})"
    return repr(value)


def plain(value: Any) -> Any:
    """Scalars as they are, everything else as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else describe(value)


def described(recipe: Record) -> dict[str, Any]:
    """Field by field, as `plain` values; for JSON."""
    return {f.name: plain(getattr(recipe, f.name)) for f in dataclasses.fields(recipe)}


def usage(recipe: Any) -> str:
    lines = [f"usage: [accelerate launch] RECIPE.py [--FIELD VALUE ...]      recipe {recipe.name}", ""]
    for path, setting in paths(recipe).items():
        choices = setting.read.args[1] if setting.read.func is _pick else {}
        shown = f"--{path} {describe(setting.value)}"
        lines.append(f"  {shown}" if len(shown) > 52 else f"  {shown:52}  {setting.help}".rstrip())
        if choices:
            lines.append(f"      one of: {', '.join(sorted(choices))}")
    return "\n".join(lines)
