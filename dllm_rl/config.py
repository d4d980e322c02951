"""Override a recipe from the command line.

A path is a field (`learning_rate`), a keyword of a function in a field (`corrector.cap`, `sampler.commit.tau`), or a
field of a record in a field (`task.clues`).
"""

import dataclasses
import difflib
import inspect
import math
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dllm_rl.bounds import Bound
from dllm_rl.members import describe, full_name, function_of, imported, members
from dllm_rl.presets import PRESETS, find_preset, say_preset, with_preset
from dllm_rl.recipe import CHOICES, RECORDS, Recipe, fitted
from dllm_rl.renamed import hint
from dllm_rl.screen import escape_controls, interactive

Record = TypeVar("Record", bound=Any)  # a frozen dataclass, such as Recipe or a task
SCALARS = frozenset((bool, int, float, str, Path))
WIDTH = 118


def from_command_line(recipe: Record, argv: list[str] | None = None) -> Record:
    """Apply `--path value` overrides to a recipe.

    Call it in a script, before `train`. `--help` lists every path. On an unknown path or a bad value the process exits
    with status 2 and one line that names the nearest valid path.

    Args:
        recipe: Recipe, or another frozen dataclass of settings.
        argv: Words of the command line. None (default): the program's arguments, or none in an interactive session.

    Returns:
        The recipe with the overrides.

    Raises:
        SystemExit: After `--help` (status 0), or on an error (status 2).
    """
    arguments = list(([] if interactive() else sys.argv[1:]) if argv is None else argv)
    wanted = [
        word for word in arguments if word not in ("--help", "-h")
    ]  # help describes the recipe with the other overrides
    try:
        pairs = _pairs(list(wanted))
        if (preset := pairs.pop("preset", None)) is not None:  # before the other options, which override it
            recipe = take_preset(recipe, preset)
        recipe = override(recipe, pairs) if pairs else recipe
        if wanted != arguments:
            print(escape_controls(usage(recipe), keep="\n"))
            raise SystemExit(0)
    except ValueError as error:
        print(f"error: {escape_controls(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    return recipe


def take_preset(recipe: Any, name: str) -> Any:
    """Apply a preset of `dllm_rl.presets` to a recipe, and print one line that names it."""
    if not isinstance(recipe, Recipe):
        raise ValueError(f"--preset {name}: presets are of RL, and this is a {type(recipe).__name__}")
    taken = with_preset(recipe, name)
    settings, keywords = find_preset(name).for_task(recipe.task.name)
    say_preset(name, settings | keywords)
    return taken


def _pairs(arguments: list[str]) -> dict[str, str]:
    """Parse `--a 1 --b=2 --flag` into {a: 1, b: 2, flag: true}."""
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
    """Replace values of a record or function by texts, by path.

    Each record is made, and checked, once with all of its changes. Raises ValueError on an unknown path or a bad value.
    """
    held = members(owner)
    known = paths(owner, prefix)
    below: dict[str, dict[str, str]] = {}
    for path, text in texts.items():
        name, dot, rest = path.partition(".")
        below.setdefault(name, {}).update({rest: text} if dot else {})
    changes = {}
    for name, inner in below.items():
        path = f"{prefix}{name}"
        if name in texts and path in known:
            # The function is read before its keywords, which belong to the chosen function.
            value = _read(path, held[name].annotation, texts[name], inner)
        elif name in held and name not in texts:
            value = held[name].value
        else:
            function = function_of(getattr(owner, "factory", None) or owner)
            if now := hint(name, getattr(function, "__name__", type(owner).__name__) if prefix else ""):
                raise ValueError(f"--{path}: {now}")
            raise _no_field(owner, path if name in texts else f"{path}.{next(iter(inner))}", texts.get(name), known)
        changes[name] = override(value, inner, f"{path}.") if inner else value
    try:
        return _with(owner, changes)
    except ValueError as error:
        message = str(error)
        if not any(name in message for name in changes):
            message = f"{', '.join(f'--{prefix}{name}' for name in changes)}: {message}"
        raise ValueError(message) from None


def _with(owner: Any, changes: Mapping[str, Any]) -> Any:
    """Apply changes to an owner: rebuild a record, by its factory if it has one; make a new partial of a function."""
    if getattr(owner, "factory", None) is not None:
        return _with(owner.factory, changes)()
    if not isinstance(owner, partial) and not inspect.isfunction(owner):
        return dataclasses.replace(owner, **changes)
    function = owner if isinstance(owner, partial) else partial(owner)
    parts = [changes.get(str(place), part) for place, part in enumerate(function.args, 1)]
    keywords = {name: value for name, value in changes.items() if not name.isdecimal()}
    return partial(function.func, *parts, **(function.keywords | keywords))


def _no_field(owner: Any, path: str, text: str | None, known: Iterable[str]) -> ValueError:
    if text and path in members(owner):  # such as a task, whose name would not determine its fields and the sampler's
        script = Path(sys.argv[0])
        files = [file.name for file in script.parent.glob("*.py") if text in file.stem]
        near = difflib.get_close_matches(script.name, files, n=1, cutoff=0)
        where = f": {near[0]}" if near else "'s file"
        return ValueError(f"--{path} {text!r}: a {path} is chosen by its recipe{where}")
    near = difflib.get_close_matches(path, known, n=1, cutoff=0)  # cutoff 0: the nearest, at any distance
    remedy = f"the nearest is --{near[0]}" if near else f"--{path.rpartition('.')[0]} is {_short(owner)}, without any"
    return ValueError(f"--{path} is not a field of the recipe; {remedy} (--help lists all)")


@dataclasses.dataclass(frozen=True)
class Setting:
    value: Any
    help: str
    choices: tuple[str, ...]  # empty: any text that a type of the annotation accepts
    bound: Bound | None = None


def paths(owner: Any, prefix: str = "") -> dict[str, Setting]:
    """Return every path below a record or a function that text can set."""
    found: dict[str, Setting] = {}
    for name, member in members(owner).items():
        path = f"{prefix}{name}"
        kinds = _kinds(member.annotation)
        words = _words(path, kinds)
        # The model is made with the recipe's seed.
        if (words or not SCALARS.isdisjoint(kinds)) and path != "model.seed":
            found[path] = Setting(member.value, member.help, tuple(words), member.bound)
        found |= paths(member.value, f"{path}.")
    return found


def _kinds(annotation: Any) -> tuple:
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def _words(path: str, kinds: tuple) -> dict[str, Any]:
    """Return the words that text may be: the words of a Literal, or names of functions; and none if the value may be
    None.
    """
    literals = [kind for kind in kinds if typing.get_origin(kind) is typing.Literal]
    words: dict[str, Any] = {word: word for kind in literals for word in typing.get_args(kind)}
    if not words and SCALARS.isdisjoint(kinds):
        words = CHOICES.get(path.rpartition(".")[2], {})
    return words | {"none": None} if words and types.NoneType in kinds else words


def _read(path: str, annotation: Any, text: str, below: Mapping[str, str] = types.MappingProxyType({})) -> Any:
    """Convert text to a value: a word, a function or its record, or a value of the first type that accepts the text."""
    kinds = _kinds(annotation)
    words = _words(path, kinds)
    if text == "none" and types.NoneType in kinds:
        return None
    if any(map(callable, words.values())):
        return _pick(path, kinds, words, text, below)
    if text in words or annotation is str:
        return text
    for kind in kinds:
        value = _accepted(path, kind, text)
        if value is not None:
            return value
    if words:
        raise _unknown(path, text, words)
    wanted = getattr(annotation, "__name__", str(annotation))
    raise ValueError(f"--{path} {text!r} is not a valid {wanted.replace('types.NoneType', 'none')}")


def _pick(path: str, kinds: tuple, words: Mapping[str, Any], text: str, below: Mapping[str, str]) -> Any:
    """Return the function that text names, bound with its required keywords (`below`), or the record that it makes."""
    # Text of a checkpoint never reaches this line: only a user's command line may import.
    chosen = imported(path, text) if ":" in text else words.get(text)
    if chosen is None:
        raise _unknown(path, text, words)
    # Arguments that all of these functions need are passed by the caller.
    given = set.intersection(*(set(_needed(function)) for function in words.values() if function is not None))
    bound = {}
    for name, annotation in _needed(chosen).items():
        if name in below:
            bound[name] = _read(f"{path}.{name}", annotation, below[name])
        elif name not in given:
            raise ValueError(f"--{path} {text} needs --{path}.{name}")
    function = partial(chosen, **bound) if bound else chosen
    record = next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
    if record is None:
        return function
    made = fitted(path, record, function) if record in RECORDS else function()
    if not isinstance(made, record):
        raise ValueError(f"--{path} {text!r} makes no {record.__name__}; give a function that returns one")
    return made


def _needed(function: Callable) -> dict[str, Any]:
    """Return the keywords that have no default and that text can set, with their annotations."""
    parameters = inspect.signature(function).parameters.values()
    without = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return {p.name: p.annotation for p in without if not SCALARS.isdisjoint(_kinds(p.annotation))}


def _unknown(path: str, text: str, words: Iterable[str]) -> ValueError:
    if now := hint(text) or hint(f"{path}={text}"):
        return ValueError(f"--{path} {text}: {now}")
    near = difflib.get_close_matches(text, words, n=1, cutoff=0)
    return ValueError(f"--{path} {text!r} is not known; the nearest is {near[0]!r} (one of {', '.join(words)})")


def _accepted(path: str, kind: Any, text: str) -> Any:
    """Convert text to a value of one type; None if the type does not accept the text."""
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
    # An empty path comes from an unset variable.
    return kind(text) if kind in (str, Path) and text else None


def usage(recipe: Any) -> str:
    """Format the help: every path with its value, meaning, bound and choices, grouped by field.

    Below them are the docstrings of the functions and records in the recipe, which explain their keywords.
    """
    settings = paths(recipe)
    lines = [f"usage: [accelerate launch] RECIPE.py [--FIELD VALUE ...]      recipe {recipe.name}", ""]
    if isinstance(recipe, Recipe):
        lines += [f"  --preset {' | '.join(PRESETS)}   settings that belong together, beneath the other options", ""]
    indented = partial(textwrap.fill, width=WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for field in dataclasses.fields(recipe):
        own = {path: setting for path, setting in settings.items() if path.partition(".")[0] == field.name}
        if field.name not in own and own:
            lines += [f"  {field.name} {_short(getattr(recipe, field.name))}", indented(field.metadata.get("help", ""))]
        for path, setting in own.items():
            shown = f"--{path} {_short(setting.value)}"
            help = f"{setting.help} ({setting.bound})".strip() if setting.bound else setting.help
            short = len(shown) <= 52 and len(help) <= WIDTH - 54
            lines.append(f"  {shown:52}{help}".rstrip() if short else f"  {shown}")
            if help and not short:
                lines.append(indented(help))
            if setting.choices:
                lines.append(indented(f"one of: {', '.join(setting.choices)}"))
    lines += ["", "Keywords, as the functions and records explain them:"]
    for explained in dict.fromkeys(_explained(recipe)):
        lines += ["", f"  {full_name(explained)}", textwrap.indent(inspect.getdoc(explained) or "", " " * 6)]
    return "\n".join(lines)


def _short(value: Any) -> str:
    """Format a value for help: a function by its name, because its keywords have separate lines."""
    text = describe(next(iter(explained_by(value)), value))
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def explained_by(value: Any) -> list[Any]:
    """Return the function, or the record's class and its bases, whose docstrings explain a value's keywords."""
    value = function_of(getattr(value, "factory", None) or value)
    if inspect.isfunction(value):
        return [value]
    if not inspect.isclass(value):
        value = type(value) if members(value) else object
    return [base for base in value.__mro__ if dataclasses.is_dataclass(base)]


def _explained(owner: Any) -> Iterator[Any]:
    for member in members(owner).values():
        yield from explained_by(member.value)
        yield from _explained(member.value)
