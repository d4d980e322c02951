"""A recipe from the command line. A path is a field (`learning_rate`), a keyword of what a field holds
(`corrector.cap`, `sampler.commit.tau`), or a field of a record that it holds (`task.clues`).
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

Record = TypeVar("Record", bound=Any)  # a frozen dataclass, as Recipe or a task
SCALARS = frozenset((bool, int, float, str, Path))
WIDTH = 118


def from_command_line(recipe: Record, argv: list[str] | None = None) -> Record:
    """The recipe with `--path value` overrides; argv None: the program's arguments, or none at a prompt. `--help` lists
    every path. Exits with status 2 on an unknown path or a bad value, in one line that names the nearest valid one.
    """
    arguments = list(([] if interactive() else sys.argv[1:]) if argv is None else argv)
    wanted = [word for word in arguments if word not in ("--help", "-h")]  # help is of the recipe that the rest makes
    try:
        pairs = _pairs(list(wanted))
        if (preset := pairs.pop("preset", None)) is not None:  # beneath the other options
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
    """The recipe with a preset of `dllm_rl.presets`, which one line on the screen names."""
    if not isinstance(recipe, Recipe):
        raise ValueError(f"--preset {name}: presets are of RL, and this is a {type(recipe).__name__}")
    taken = with_preset(recipe, name)
    settings, keywords = find_preset(name).for_task(recipe.task.name)
    say_preset(name, settings | keywords)
    return taken


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
    changes. Raises ValueError on an unknown path or a bad value.
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
            # A function before its keywords: they are those of the function that is picked.
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
    """The owner with its changes: a record is made again, by its maker if it has one; of a function, a new partial."""
    if getattr(owner, "factory", None) is not None:
        return _with(owner.factory, changes)()
    if not isinstance(owner, partial) and not inspect.isfunction(owner):
        return dataclasses.replace(owner, **changes)
    function = owner if isinstance(owner, partial) else partial(owner)
    parts = [changes.get(str(place), part) for place, part in enumerate(function.args, 1)]
    keywords = {name: value for name, value in changes.items() if not name.isdecimal()}
    return partial(function.func, *parts, **(function.keywords | keywords))


def _no_field(owner: Any, path: str, text: str | None, known: Iterable[str]) -> ValueError:
    if text and path in members(owner):  # as a task, whose name would not say what its fields and the sampler's are
        script = Path(sys.argv[0])
        files = [file.name for file in script.parent.glob("*.py") if text in file.stem]
        near = difflib.get_close_matches(script.name, files, n=1, cutoff=0)
        where = f": {near[0]}" if near else "'s file"
        return ValueError(f"--{path} {text!r}: a {path} is chosen by its recipe{where}")
    near = difflib.get_close_matches(path, known, n=1, cutoff=0)  # cutoff 0: the nearest, however far
    remedy = f"the nearest is --{near[0]}" if near else f"--{path.rpartition('.')[0]} is {_short(owner)}, without any"
    return ValueError(f"--{path} is not a field of the recipe; {remedy} (--help lists all)")


@dataclasses.dataclass(frozen=True)
class Setting:
    value: Any
    help: str
    choices: tuple[str, ...]  # empty: any text that one of the annotation's types accepts
    bound: Bound | None = None


def paths(owner: Any, prefix: str = "") -> dict[str, Setting]:
    """Every path below a record or a function that text can set."""
    found: dict[str, Setting] = {}
    for name, member in members(owner).items():
        path = f"{prefix}{name}"
        kinds = _kinds(member.annotation)
        words = _words(path, kinds)
        # The recipe's own seed is what the model is made with.
        if (words or not SCALARS.isdisjoint(kinds)) and path != "model.seed":
            found[path] = Setting(member.value, member.help, tuple(words), member.bound)
        found |= paths(member.value, f"{path}.")
    return found


def _kinds(annotation: Any) -> tuple:
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def _words(path: str, kinds: tuple) -> dict[str, Any]:
    """What text may name there: the words of a Literal, or functions; and none, where the value may be None."""
    literals = [kind for kind in kinds if typing.get_origin(kind) is typing.Literal]
    words: dict[str, Any] = {word: word for kind in literals for word in typing.get_args(kind)}
    if not words and SCALARS.isdisjoint(kinds):
        words = CHOICES.get(path.rpartition(".")[2], {})
    return words | {"none": None} if words and types.NoneType in kinds else words


def _read(path: str, annotation: Any, text: str, below: Mapping[str, str] = types.MappingProxyType({})) -> Any:
    """What text says: a word, a function or the record that it makes, or a value of the first type that accepts it."""
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
    """The function that text names, bound with the keywords that it needs (`below`), or the record that it makes."""
    # A checkpoint's text never comes here: only a user's command line may import.
    chosen = imported(path, text) if ":" in text else words.get(text)
    if chosen is None:
        raise _unknown(path, text, words)
    # What every one of them needs is given by the caller.
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
    """Keywords that have no default and that text can give, with their annotations."""
    parameters = inspect.signature(function).parameters.values()
    without = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return {p.name: p.annotation for p in without if not SCALARS.isdisjoint(_kinds(p.annotation))}


def _unknown(path: str, text: str, words: Iterable[str]) -> ValueError:
    if now := hint(text) or hint(f"{path}={text}"):
        return ValueError(f"--{path} {text}: {now}")
    near = difflib.get_close_matches(text, words, n=1, cutoff=0)
    return ValueError(f"--{path} {text!r} is not known; the nearest is {near[0]!r} (one of {', '.join(words)})")


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
    # An empty path is a variable that is not set.
    return kind(text) if kind in (str, Path) and text else None


def usage(recipe: Any) -> str:
    """Every path with its value, its meaning, its bound and its choices, below the field that it belongs to; then the
    docstrings of the functions and records that the recipe holds, which explain their own keywords.
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
    """A value in help: a function by its name, as its keywords have lines of their own."""
    text = describe(next(iter(explained_by(value)), value))
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def explained_by(value: Any) -> list[Any]:
    """The function, or the record's class and its bases, whose docstrings explain a value's keywords."""
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
