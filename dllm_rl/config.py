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
from dllm_rl.members import describe, full_name, function_of, import_function, members
from dllm_rl.presets import PRESETS, find_preset, print_preset, with_preset
from dllm_rl.recipe import CHOICES, RECORDS, Recipe, convert_value
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
        argv: Command-line arguments. None (default): the program's arguments, or none in an interactive session.

    Returns:
        The recipe with the overrides.

    Raises:
        SystemExit: After `--help` (status 0), or on an error (status 2).
    """
    arguments = list(([] if interactive() else sys.argv[1:]) if argv is None else argv)
    overrides = [word for word in arguments if word not in ("--help", "-h")]
    try:
        pairs = _pairs(list(overrides))
        if (preset := pairs.pop("preset", None)) is not None:  # before the other options, which override it
            recipe = apply_preset(recipe, preset)
        recipe = override(recipe, pairs) if pairs else recipe
        if overrides != arguments:  # help describes the recipe with the overrides
            print(escape_controls(usage(recipe), keep="\n"))
            raise SystemExit(0)
    except ValueError as error:
        print(f"error: {escape_controls(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None
    return recipe


def apply_preset(recipe: Any, name: str) -> Any:
    """Apply a preset of `dllm_rl.presets` to a recipe, and print one line that names it."""
    if not isinstance(recipe, Recipe):
        raise ValueError(f"--preset {name}: presets are for RL, and this is a {type(recipe).__name__}")
    changed_recipe = with_preset(recipe, name)
    settings, keywords = find_preset(name).for_task(recipe.task.name)
    print_preset(name, settings | keywords)
    return changed_recipe


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
    """Return a copy of a record or function with new values; `texts` maps their paths to the values as text.

    Each record is rebuilt and checked once, with all of its changes. Raises ValueError on an unknown path or an invalid
    value.
    """
    current = members(owner)
    settable_paths = paths(owner, prefix)
    nested_texts: dict[str, dict[str, str]] = {}
    for path, text in texts.items():
        name, dot, rest = path.partition(".")
        nested_texts.setdefault(name, {}).update({rest: text} if dot else {})
    changes = {}
    for name, nested in nested_texts.items():
        path = f"{prefix}{name}"
        if name in texts and path in settable_paths:
            # The new function comes first: nested paths are its keywords.
            value = _parse_value(path, current[name].annotation, texts[name], nested)
        elif name in current and name not in texts:
            value = current[name].value
        else:
            unknown_path = path if name in texts else f"{path}.{next(iter(nested))}"
            raise _no_field(owner, unknown_path, texts.get(name), settable_paths)
        changes[name] = override(value, nested, f"{path}.") if nested else value
    try:
        return _with_changes(owner, changes)
    except ValueError as error:
        message = str(error)
        if not any(name in message for name in changes):
            message = f"{', '.join(f'--{prefix}{name}' for name in changes)}: {message}"
        raise ValueError(message) from None


def _with_changes(owner: Any, changes: Mapping[str, Any]) -> Any:
    """Return a changed copy. A record with a factory is made again by it; a function becomes a new partial."""
    if getattr(owner, "factory", None) is not None:
        return _with_changes(owner.factory, changes)()
    if not isinstance(owner, partial) and not inspect.isfunction(owner):
        return dataclasses.replace(owner, **changes)
    function = owner if isinstance(owner, partial) else partial(owner)
    positional = [changes.get(str(position), argument) for position, argument in enumerate(function.args, 1)]
    keywords = {name: value for name, value in changes.items() if not name.isdecimal()}
    return partial(function.func, *positional, **(function.keywords | keywords))


def _no_field(owner: Any, path: str, text: str | None, settable_paths: Iterable[str]) -> ValueError:
    """Return the error for a path that text cannot set. It names the nearest path, or the recipe script to use."""
    if text and path in members(owner):
        # For example --task: the name of a task would determine neither its fields nor the sampler.
        script = Path(sys.argv[0])
        files = [file.name for file in script.parent.glob("*.py") if text in file.stem]
        nearest_file = difflib.get_close_matches(script.name, files, n=1, cutoff=0)
        location = f": {nearest_file[0]}" if nearest_file else "'s file"
        return ValueError(f"--{path} {text!r}: a {path} is chosen by its recipe{location}")
    nearest = difflib.get_close_matches(path, settable_paths, n=1, cutoff=0)  # cutoff 0: at any distance
    parent = path.rpartition(".")[0]
    remedy = f"the nearest is --{nearest[0]}" if nearest else f"--{parent} is {_short(owner)}, without fields"
    return ValueError(f"--{path} is not a field of the recipe; {remedy} (--help lists all)")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A value that text can set, with its help."""

    value: Any
    help: str
    choices: tuple[str, ...]  # empty: any text that one of the types accepts
    bound: Bound | None = None


def paths(owner: Any, prefix: str = "") -> dict[str, Setting]:
    """Return all settings below a record or a function that text can set, by path."""
    settings: dict[str, Setting] = {}
    for name, member in members(owner).items():
        path = f"{prefix}{name}"
        value_types = _value_types(member.annotation)
        words = _allowed_words(path, value_types)
        # Not model.seed: the model is made with the recipe's seed.
        if (words or not SCALARS.isdisjoint(value_types)) and path != "model.seed":
            settings[path] = Setting(member.value, member.help, tuple(words), member.bound)
        settings |= paths(member.value, f"{path}.")
    return settings


def _value_types(annotation: Any) -> tuple:
    """Return the types of a union; for any other annotation, the annotation in a tuple."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if union else (annotation,)


def _allowed_words(path: str, value_types: tuple) -> dict[str, Any]:
    """Return the allowed words and their values: the words of a Literal or names of functions, and "none" for None."""
    literals = [literal for literal in value_types if typing.get_origin(literal) is typing.Literal]
    words: dict[str, Any] = {word: word for literal in literals for word in typing.get_args(literal)}
    if not words and SCALARS.isdisjoint(value_types):
        words = CHOICES.get(path.rpartition(".")[2], {})
    return words | {"none": None} if words and types.NoneType in value_types else words


def _parse_value(path: str, annotation: Any, text: str, nested: Mapping[str, str] = types.MappingProxyType({})) -> Any:
    """Convert text to a value.

    The value is an allowed word, a function that an allowed word names (or the record that it makes), or a value of the
    first type that accepts the text.
    """
    value_types = _value_types(annotation)
    words = _allowed_words(path, value_types)
    if text == "none" and types.NoneType in value_types:
        return None
    if any(map(callable, words.values())):
        return _parse_function(path, value_types, words, text, nested)
    if text in words or annotation is str:
        return text
    for value_type in value_types:
        value = _parse_type(path, value_type, text)
        if value is not None:
            return value
    if words:
        raise _unknown(path, text, words)
    type_name = getattr(annotation, "__name__", str(annotation))
    raise ValueError(f"--{path} {text!r} is not a valid {type_name.replace('types.NoneType', 'none')}")


def _parse_function(
    path: str, value_types: tuple, words: Mapping[str, Any], text: str, nested: Mapping[str, str]
) -> Any:
    """Return the function that text names, bound with its required keywords (`nested`), or the record that it makes."""
    # This may import any module. Only text from a command line reaches this line, never text from a checkpoint.
    function = import_function(path, text) if ":" in text else words.get(text)
    if function is None:
        raise _unknown(path, text, words)
    # Arguments that all of these functions require are not settings: the library passes them at each call.
    required = [set(_required_keywords(choice)) for choice in words.values() if choice is not None]
    passed_by_caller = set.intersection(*required)
    keywords = {}
    for name, annotation in _required_keywords(function).items():
        if name in nested:
            keywords[name] = _parse_value(f"{path}.{name}", annotation, nested[name])
        elif name not in passed_by_caller:
            raise ValueError(f"--{path} {text} needs --{path}.{name}")
    bound_function = partial(function, **keywords) if keywords else function
    records = [kind for kind in value_types if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    record = records[0] if records else None
    if record is None:
        return bound_function
    result = convert_value(path, record, bound_function) if record in RECORDS else bound_function()
    if not isinstance(result, record):
        raise ValueError(f"--{path} {text!r} does not make a {record.__name__}; give a function that returns one")
    return result


def _required_keywords(function: Callable) -> dict[str, Any]:
    """Return the keywords without a default that text can set, with their annotations."""
    parameters = inspect.signature(function).parameters.values()
    required = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return {p.name: p.annotation for p in required if not SCALARS.isdisjoint(_value_types(p.annotation))}


def _unknown(path: str, text: str, words: Iterable[str]) -> ValueError:
    """Return the error for a word that is not allowed. It names the nearest word."""
    nearest = difflib.get_close_matches(text, words, n=1, cutoff=0)
    return ValueError(f"--{path} {text!r} is not known; the nearest is {nearest[0]!r} (one of {', '.join(words)})")


def _parse_type(path: str, value_type: Any, text: str) -> Any:
    """Convert text to a value of one type; None if the type does not accept the text."""
    if value_type is bool:
        return {"true": True, "false": False}.get(text)
    if typing.get_origin(value_type) is tuple and "," in text:
        return tuple(_parse_value(path, typing.get_args(value_type)[0], part) for part in text.split(","))
    if value_type in (int, float):
        try:
            value = value_type(text)
        except ValueError:
            return None
        return value if value_type is int or math.isfinite(value) else None
    # Empty text is invalid: it usually comes from an unset shell variable.
    return value_type(text) if value_type in (str, Path) and text else None


def usage(recipe: Any) -> str:
    """Format the help.

    It lists every path with its value, help text, bound and choices, grouped by field, and then the docstrings of the
    functions and records in the recipe.
    """
    settings = paths(recipe)
    lines = [f"usage: [accelerate launch] RECIPE.py [--FIELD VALUE ...]      recipe {recipe.name}", ""]
    if isinstance(recipe, Recipe):
        lines += [f"  --preset {' | '.join(PRESETS)}   a set of settings, which the other options override", ""]
    indent = partial(textwrap.fill, width=WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    for field in dataclasses.fields(recipe):
        field_settings = {path: setting for path, setting in settings.items() if path.partition(".")[0] == field.name}
        if field.name not in field_settings and field_settings:
            lines += [f"  {field.name} {_short(getattr(recipe, field.name))}", indent(field.metadata.get("help", ""))]
        for path, setting in field_settings.items():
            option = f"--{path} {_short(setting.value)}"
            help = f"{setting.help} ({setting.bound})".strip() if setting.bound else setting.help
            fits_one_line = len(option) <= 52 and len(help) <= WIDTH - 54
            lines.append(f"  {option:52}{help}".rstrip() if fits_one_line else f"  {option}")
            if help and not fits_one_line:
                lines.append(indent(help))
            if setting.choices:
                lines.append(indent(f"one of: {', '.join(setting.choices)}"))
    lines += ["", "Keywords, as the functions and records explain them:"]
    for owner in dict.fromkeys(_documented_owners(recipe)):
        lines += ["", f"  {full_name(owner)}", textwrap.indent(inspect.getdoc(owner) or "", " " * 6)]
    return "\n".join(lines)


def _short(value: Any) -> str:
    """Format a value for the help: a function by its name only, because its keywords have separate lines."""
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


def _documented_owners(owner: Any) -> Iterator[Any]:
    """Yield all functions and classes below an owner whose docstrings the help shows."""
    for member in members(owner).values():
        yield from explained_by(member.value)
        yield from _documented_owners(member.value)
