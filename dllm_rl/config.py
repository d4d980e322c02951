"""The command line of a recipe: jsonargparse reads `--learning_rate 1e-4 --corrector TIS --corrector.cap 3`.

A path is a field (`learning_rate`), or a field of the record in a field (`corrector.cap`, `sampler.commit.tau`).
"""

import dataclasses
import json
import os
import pkgutil
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from dllm_rl.presets import PRESETS, with_preset
from dllm_rl.recipe import Recipe
from dllm_rl.records import (
    Bound,
    Record,
    annotations_of,
    describe,
    fields_of_group,
    fit,
    nearest_hint,
    record_type,
    required_settings,
    subclass_named,
    subclasses,
    unchecked,
    union_members,
)
from dllm_rl.screen import escape_controls, interactive

Settings = TypeVar("Settings", bound=Any)  # a frozen dataclass, such as Recipe or a task
SCALARS = frozenset((bool, int, float, str))
NULLS = ("", "~", "null", "Null", "NULL")  # YAML's words for None
ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")  # octal, or minutes and seconds

jsonargparse.set_parsing_settings(subclasses_enabled=["is_pure_dataclass"])


def from_command_line(recipe: Settings, argv: list[str] | None = None) -> Settings:
    """Apply the command line's `--path value` to a recipe.

    Call it in a script, before `train`. `--help` lists the settings, `--corrector.help TIS` those of a class,
    `--config FILE` reads them from a YAML file, and `--print_config` writes such a file. If options are wrong, the
    process exits with status 2 and one line for each.

    Args:
        recipe: Recipe, or another frozen dataclass of settings.
        argv: Command-line arguments. None (default): the program's arguments, or none in an interactive session.

    Returns:
        The recipe with the overrides.

    Raises:
        SystemExit: After `--help` or `--print_config` (status 0), or on an error (status 2).
    """
    arguments = list(([] if interactive() else sys.argv[1:]) if argv is None else argv)
    if not arguments:
        return recipe
    try:
        changed = override(recipe, arguments)
    except ValueError as error:
        for line in str(error).split("\n"):
            print(f"error: {escape_controls(line)}", file=sys.stderr)
        raise SystemExit(2) from None
    if os.environ.get("RANK", "0") == "0":
        for line in kept_settings(changed, arguments):
            print(escape_controls(line))
    return changed


def kept_settings(changed: Any, arguments: Sequence[str]) -> Iterator[str]:
    """Yield a line for each class that an option names and whose settings are the recipe's, not the class's defaults.

    Args:
        changed: What `override` returned.
        arguments: Command-line arguments.
    """
    options = _with_files(_options(arguments))
    for path, text in options:
        part = changed
        for name in path.split("."):
            part = getattr(part, name, None)
        if text is None or "{" in text or not isinstance(part, Record):
            continue
        given = {other[len(path) + 1 :].split(".")[0] for other, _ in options if other.startswith(f"{path}.")}
        defaults = {f.name: f.default for f in dataclasses.fields(part) if f.default is not dataclasses.MISSING}  # type: ignore[arg-type]
        kept = [name for name, value in defaults.items() if name not in given and getattr(part, name) != value]
        if kept:
            values = ", ".join(f"{name}={describe(getattr(part, name))}" for name in kept)
            yield f"--{path} {text} keeps the recipe's {values}; another value: --{path}.{kept[0]}"


def override(recipe: Settings, arguments: Sequence[str]) -> Settings:
    """Return a copy of a recipe with the values of command-line arguments.

    Raises:
        ValueError: Options are unknown, or have values of a wrong type or out of range; with a line for each.
    """
    options = _with_files(_options(arguments))
    if (preset := dict(options).get("preset")) is not None:  # before the other options, which override it
        if not isinstance(recipe, Recipe):
            raise ValueError(f"--preset {preset}: presets are for RL, and this is a {type(recipe).__name__}")
        recipe = typing.cast(Any, with_preset(recipe, str(preset)))
        options = [(path, text) for path, text in options if path != "preset"]
    options = _with_classes(recipe, options)
    settable = _settable(recipe)
    words, problems = [], []
    for path, text in options:
        try:
            is_alone = path in ("help", "print_config")
            value = "" if is_alone else _check_option(recipe, settable, path, text or "", options)
            if (text, value) == ("none", "null"):  # jsonargparse would read --a.b.c=null as the text None
                path, *fields = path.split(".")
                for name in reversed(fields):
                    value = f'{{"{name}": {value}}}'
            words.append(f"--{path}" if is_alone else f"--{path}={value}")
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    unwritten = _tasks_of_a_script(recipe) if ("print_config", None) in options else set()
    if problems := [path for path, _ in options if path.split(".")[0] in unwritten]:
        raise ValueError(f"--{problems[0]}: --print_config leaves out the task, whose rows are not text: give it later")
    names = {path.split(".")[0] for path, _ in options}
    if names & {"help", "print_config"}:
        names |= settable.keys() - unwritten
    parser = make_parser(recipe, names)
    if ("help", None) in options:  # parsing would first check all defaults, which takes as long as the imports
        parser.print_help()
        raise SystemExit(0)
    try:
        parsed = vars(parser.parse_args(words))
    except jsonargparse.ArgumentError as error:
        raise ValueError(_one_line(str(error))) from None
    defaults, changes = parser.get_defaults(), {}
    for name in settable:
        if name in parsed and parsed[name] != defaults.get(name):
            try:
                changes[name] = _made(parsed[name], name)
            except ValueError as error:
                problems.append(str(error))
    try:
        changed = dataclasses.replace(recipe, **changes)
    except ValueError as error:
        message = str(error)
        is_named = any(name in message for name in changes) or not changes
        problems.append(message if is_named else f"{', '.join(changes)}: {message}")
    if problems:
        raise ValueError("\n".join(problems))
    return changed


def _made(value: Any, path: str) -> Any:
    """Return a setting that jsonargparse read, with records in place of their class_path and init_args."""
    if isinstance(value, list | tuple):
        return type(value)(_made(part, f"{path}[{i}]") for i, part in enumerate(value))
    if not isinstance(value, jsonargparse.Namespace):
        return value
    arguments = vars(value.init_args) if "init_args" in value else {}  # jsonargparse leaves out those of no settings
    settings = {name: _made(part, f"{path}.{name}") for name, part in arguments.items()}
    try:
        return pkgutil.resolve_name(value.class_path)(**settings)
    except ValueError as error:
        known = [f"{name}=" for name in settings]
        lines = [f"{path}{'.' if line.startswith(tuple(known)) else ': '}{line}" for line in str(error).split("\n")]
        raise ValueError("\n".join(lines)) from None


def make_parser(recipe: Any, names: Collection[str]) -> jsonargparse.ArgumentParser:
    """Return the parser of the settings of a recipe that have these names, as each costs milliseconds. The defaults are
    the recipe's values.
    """
    parser = jsonargparse.ArgumentParser(
        usage="[accelerate launch] RECIPE.py [--NAME VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    parser.add_argument("--config", action="config", help="YAML file of settings, as --print_config writes it")
    if isinstance(recipe, Recipe):  # `override` applies it
        text = f"set of settings, which the other options override: {', '.join(PRESETS)}"
        parser.add_argument("--preset", default=jsonargparse.SUPPRESS, help=text)
    for name, (annotation, default) in _settable(recipe).items():
        if name not in names:
            continue
        setting = next(field for field in dataclasses.fields(recipe) if field.name == name)
        bound: Bound | None = setting.metadata.get("bound")
        help = setting.metadata.get("help", "") + (f" ({bound})" if bound else "")
        if parts := fields_of_group(annotation):
            help += f": {', '.join(f'--{name}.{part}' for part in parts)}"
        parser.add_argument(f"--{name}", type=annotation, default=default, help=help)
    return parser


def _settable(recipe: Any) -> dict[str, tuple[Any, Any]]:
    """Return the fields of a recipe that text can set: the type to read, and the default."""
    settable = {}
    annotations = annotations_of(type(recipe))
    for field in dataclasses.fields(recipe):
        name, annotation, value = field.name, annotations[field.name], getattr(recipe, field.name)
        kinds = tuple(kind for kind in union_members(annotation) if _is_readable(kind))
        if dataclasses.is_dataclass(value) and not isinstance(value, Record):  # a task, whose type is a protocol
            kinds = (type(value),)
        if not set(kinds) - {types.NoneType}:
            continue
        is_readable_value = value is None or dataclasses.is_dataclass(value) or isinstance(value, (*SCALARS, tuple))
        default = _without_cached(value) if is_readable_value else jsonargparse.SUPPRESS
        settable[name] = (typing.Union[kinds], default)  # noqa: UP007
    return settable


def _tasks_of_a_script(recipe: Any) -> set[str]:
    """Return the names of the tasks with a value that text cannot write, such as the rows of a data set."""

    def is_writable(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(is_writable, value))
        return value is None or isinstance(value, (*SCALARS, Path, Record))

    tasks = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    return {
        name
        for name, task in tasks.items()
        if dataclasses.is_dataclass(task) and not isinstance(task, Record)
        if not all(is_writable(getattr(task, field.name)) for field in dataclasses.fields(task))
    }


def _without_cached(value: Any) -> Any:
    """Return a dataclass with its fields alone. jsonargparse would read attributes that it has cached as settings."""
    if not dataclasses.is_dataclass(value):
        return value
    names = [field.name for field in dataclasses.fields(value) if field.init]
    return unchecked(value, **{name: _without_cached(getattr(value, name)) for name in names})


def _is_readable(kind: Any) -> bool:
    """Return whether text can set a value of this type."""
    is_record = isinstance(kind, type) and issubclass(kind, Record)
    return kind in SCALARS or kind is types.NoneType or is_record or typing.get_origin(kind) in (typing.Literal, tuple)


def _options(arguments: Sequence[str]) -> list[tuple[str, str | None]]:
    """Split `--a 1 --b.c=2 --flag` into pairs (path, text), a class before its settings. A flag alone is true."""
    pairs: list[tuple[str, str | None]] = []
    words = list(arguments)
    while words:
        head = words.pop(0)
        if not head.startswith("--") and head != "-h":
            raise ValueError(f"{head!r} is not an option; options are written --name value")
        path, equals, text = head.lstrip("-").partition("=")
        is_alone = not equals and (not words or words[0].startswith("--"))
        if path in ("h", "help", "print_config"):
            pairs.append(("help" if path == "h" else path, None))
        elif is_alone:
            pairs.append((path, None if path.endswith(".help") else "true"))
        else:
            pairs.append((path, text if equals else words.pop(0)))
    return pairs


def _with_files(options: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Return options with those of each `--config FILE` before all others, which override them."""
    own = [(path, text) for path, text in options if path != "config"]
    merged: list[tuple[str, str | None]] = []
    for read in [*(_file_options(str(text)) for path, text in options if path == "config"), own]:
        before = {path: str(text).rpartition(".")[2] for path, text in merged}
        # Drop the settings of a class instead of which this file, or the command line, chooses another one.
        other = tuple(f"{path}." for path, text in read if before.get(path) not in (None, str(text).rpartition(".")[2]))
        merged = [(path, text) for path, text in merged if not path.startswith(other)] + read
    return sorted(merged, key=lambda pair: pair[0].count("."))


def _with_classes(recipe: Any, options: list[tuple[str, str | None]]) -> list[tuple[str, str | None]]:
    """Return options with the choice of a class before those of its fields, where a setting has no value yet and knows
    one class: `--lora.r 16` is `--lora Lora --lora.r 16`.
    """
    chosen = dict(options)
    for path, _ in options:
        names, value = path.split("."), recipe
        owner: Any = type(recipe)
        for depth, name in enumerate(names[:-1], start=1):
            annotation, value = annotations_of(owner).get(name), getattr(value, name, None)
            if names[-1] == "help" or not fields_of_group(annotation):
                break
            owner = record_type(annotation)
            if value is None:
                chosen.setdefault(".".join(names[:depth]), owner.__name__)
    return sorted(chosen.items(), key=lambda pair: pair[0].count("."))


def _file_options(file: str) -> list[tuple[str, str | None]]:
    """Read a YAML file as options, with each value as it is written there."""
    try:
        node = _composed(Path(file).read_text(encoding="utf-8"))
        settings = [*_flattened(node, "")] if isinstance(node, yaml.MappingNode) else None
    except OSError as error:
        raise ValueError(f"config={file!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"config={file!r} is not YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        raise ValueError(f"config={file!r} has no lines NAME: VALUE")
    options: dict[str, str | None] = {}
    lines: dict[str, int] = {}
    for path, line, value in settings:
        if path in lines:
            raise ValueError(f"config={file!r} sets {path} in lines {lines[path]} and {line}; leave one of them out")
        options[path], lines[path] = _text_of(value), line
    return list(options.items())


def _composed(text: str) -> Any:
    """Return YAML as nodes, in which each value is as it is written. Raises YAMLError."""
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(problem="tags are not read", problem_mark=event.start_mark)
    return yaml.compose(text, Loader=yaml.BaseLoader)


def _flattened(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield each setting's path, line and value. `class_path` is the value of the path of its mapping."""
    for key, value in node.value:
        name = str(key.value)
        if prefix and name == "init_args" and (isinstance(value, yaml.MappingNode) or value.value in NULLS):
            yield from _flattened(value, prefix) if isinstance(value, yaml.MappingNode) else ()
        elif isinstance(value, yaml.MappingNode):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            path = prefix[:-1] if prefix and name == "class_path" else f"{prefix}{name}"
            yield path, key.start_mark.line + 1, value


class _Null(str):
    """The text `none`, where a file has YAML's null: a setting without a value, and no text."""


def _text_of(node: yaml.Node) -> str:
    """Return a value as one writes it on the command line."""
    if isinstance(node, yaml.ScalarNode):
        return _Null("none") if node.style is None and node.value in NULLS else str(node.value)
    _write_in_one_line(node)
    return str(yaml.serialize(node, Dumper=yaml.BaseDumper, width=sys.maxsize)).rstrip("\n")


def _write_in_one_line(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode):
        node.style = node.style and '"'
    else:
        node.flow_style = True
        for part in node.value:
            for each in part if isinstance(part, tuple) else (part,):
                _write_in_one_line(each)


def read_value(text: str, annotation: Any, path: str) -> Any:
    """Return the value of this type that text on the command line stands for: None, a scalar, a list or a dictionary.

    A text, also one in a list, stays as it is written. So does a number that YAML 1.1 reads as a time or as octal: no
    number is meant. `path` is the name of the setting, for errors.

    Raises:
        ValueError: The text is not YAML.
    """
    kinds = union_members(annotation)
    if text == "none" and types.NoneType in kinds:
        return None
    if str in kinds or text in _words(kinds):
        return text
    try:
        node = _composed(text)
        return None if node is None else _value_of(node, annotation, path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}={text!r} is not YAML: {' '.join(str(error).split())}") from None


def _words(kinds: Sequence[Any]) -> list[Any]:
    return [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]


def _value_of(node: yaml.Node, annotation: Any, path: str) -> Any:
    """Return the value of a node. Dictionaries have the form class_path and init_args."""
    kinds = union_members(annotation)
    if isinstance(node, yaml.ScalarNode):
        text = str(node.value)
        if node.style is not None or ODD_NUMBER.fullmatch(text):
            return text
        is_text = str in kinds or text in _words(kinds)
        is_kept = is_text and not (int in kinds and text.lstrip("-").isdecimal())
        return text if is_kept else jsonargparse.get_loader("yaml")(text)
    if isinstance(node, yaml.SequenceNode):
        items = next((typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is tuple), (Any, ...))
        items = items[:1] * len(node.value) if items[-1] is ... else (*items, *[Any] * len(node.value))
        return [
            _value_of(part, item, f"{path}[{i}]") for i, (part, item) in enumerate(zip(node.value, items, strict=False))
        ]
    parts = {str(key.value): value for key, value in node.value}
    if len(parts) < len(node.value):
        raise ValueError(f"{path} has a setting twice: {', '.join(str(key.value) for key, _ in node.value)}")
    base, known = record_type(annotation), annotation if isinstance(annotation, Mapping) else {}
    if base is not None and "class_path" in parts:
        own = annotations_of(class_named(base, str(parts["class_path"].value), path))
        known = {"class_path": str, "init_args": own}
    return {name: _value_of(part, known.get(name, Any), f"{path}.{name}") for name, part in parts.items()}


def _check_option(
    recipe: Any,
    settings: Mapping[str, tuple[Any, Any]],
    path: str,
    text: str,
    options: Sequence[tuple[str, str | None]],
) -> str:
    """Return the text of an option as YAML: null for `none`, a list for `1,2`. `settings`: those of the recipe.

    Raises:
        ValueError: There is no such setting of the classes that the options choose, or the text is not a value of it.
    """
    *parents, last = path.split(".")
    owner, prefix, value = type(recipe), "", recipe
    base: Any = None
    settable = {name: annotation for name, (annotation, _) in settings.items()}
    for name in parents:
        base = _dataclass_of(settable.get(name))
        if base is None:
            _refuse(path, prefix, settable, owner)
        prefix += f"{name}."
        value = getattr(value, name, None)
        chosen = dict(options).get(prefix[:-1])
        if chosen is None and not isinstance(value, base) and issubclass(base, Record) and last != "help":
            classes = ", ".join(subclasses(base))
            raise ValueError(f"--{path} is a setting of a class: choose it by --{prefix[:-1]}, one of {classes}")
        owner = type(value) if isinstance(value, base) else base
        if chosen is not None and chosen != "none" and "{" not in chosen and issubclass(base, Record):
            owner = class_named(base, chosen, prefix[:-1])
        settable = {f.name: annotations_of(owner)[f.name] for f in dataclasses.fields(owner) if f.init}  # type: ignore[arg-type]
    if last == "help":  # of the class that is chosen, or of another one
        return _class_path(class_named(base, text, path) if text else owner)
    if last not in settable:
        _refuse(path, prefix, settable, owner)
    annotation = settable[last]
    kinds = union_members(annotation)
    if text == "none" and types.NoneType in kinds:
        return "null"
    if isinstance(text, _Null):
        raise ValueError(f"{path} has no value in the file; give one, and put a text such as '#4' or '~' in quotes")
    base = _dataclass_of(annotation)
    if base is not None and "{" not in text:
        if not issubclass(base, Record):
            module, _, name = text.rpartition(".")
            # jsonargparse writes the shortest path by which the library's class is imported.
            is_library = all(path.partition(".")[0] == "dllm_rl" for path in (module, base.__module__))
            if name == base.__name__ and (is_library or module in ("", base.__module__)):
                return _class_path(base)
            example = dataclasses.fields(base)[0].name
            raise ValueError(f"{path}={text!r}: a {last} is chosen by its recipe; set its fields: --{path}.{example}")
        record = class_named(base, text, path)
        required = required_settings(record).keys()
        given = {option.rpartition(".")[2] for option, _ in options if option.rpartition(".")[0] == path}
        if (missing := sorted(required - given)) and type(getattr(value, last, None)) is not record:
            raise ValueError(f"{path}={text} needs {', '.join(f'--{path}.{name}' for name in missing)}")
        return _class_path(record)
    if base is not None or any(record_type(item) is not None for kind in kinds for item in typing.get_args(kind)):
        read = read_value(text, annotation, path)
        return text if isinstance(read, str) else _json(read)
    origins = [typing.get_origin(kind) for kind in kinds]
    if tuple in origins and not text.startswith("[") and ("," in text or int not in kinds):
        text = f"[{text}]"
    if Callable in origins and str not in kinds:
        fit(path, annotation, import_named(text, path))
        return text
    read = read_value(text, annotation, path)
    if text or types.NoneType in kinds or issubclass(owner, Record):  # a text of a task may be empty
        setting = next(field for field in dataclasses.fields(owner) if field.name == last)
        fit(path, annotation, read, setting.metadata.get("bound"))
    if read and isinstance(read, str) and types.NoneType in kinds and re.match(r"\s*(#|---\s*$)", read):
        raise ValueError(f"{path}={text!r} would be read as none, like a comment of YAML; a path may be ./{text}")
    if read is None:
        return "null"
    return _json(read) if isinstance(read, list) else text


def _json(value: Any) -> str:
    return json.dumps(value).replace("Infinity", ".inf")  # as YAML writes it


def _dataclass_of(annotation: Any) -> Any:
    kinds = [kind for kind in union_members(annotation) if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds else None


def _class_path(record: type) -> str:
    return f"{record.__module__}.{record.__qualname__}"


def class_named(base: type[Record], text: str, path: str) -> type[Record]:
    """Return the class that text names: one of the library, or MODULE.NAME, which is imported."""
    if "." not in text:
        return subclass_named(base, text, path)
    found = import_named(text, path)
    if isinstance(found, type) and issubclass(found, base):
        return found
    raise ValueError(f"{path}={text!r} is not a subclass of {base.__name__}")


def import_named(text: str, path: str) -> Any:
    """Import the function or class MODULE.NAME or MODULE:NAME. Errors name the option `path`.

    This runs the module: the text is always of a command line or of its file of settings.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        # An installed command has its program's folder in sys.path instead. Appended, so that it shadows nothing.
        sys.path.append(os.getcwd())
    try:
        found = pkgutil.resolve_name(text)
    except (ImportError, ValueError, AttributeError) as error:
        form = "MODULE:NAME" if ":" in text else "MODULE.NAME"
        remedy = f"give {form}, with the module in the working folder or in PYTHONPATH"
        raise ValueError(f"{path}={text!r}: {error}; {remedy}") from None
    if not callable(found):
        raise ValueError(f"{path}={text!r} is neither a function nor a class")
    return found


def _refuse(path: str, prefix: str, settable: Mapping[str, Any], owner: type) -> typing.NoReturn:
    if not settable:
        raise ValueError(
            f"--{path} is not a setting of {owner.__name__}, which has none; choose another class by --{prefix[:-1]}"
        )
    listed = f"--{prefix}help {owner.__name__}" if prefix and issubclass(owner, Record) else "--help"
    name = path.removeprefix(prefix).partition(".")[0]
    grouped = getattr(owner, "GROUPED", {}).get(name)
    hint = f"; it is --{prefix}{grouped}" if grouped else nearest_hint(name, settable, f"--{prefix}{{}}")
    raise ValueError(f"--{path} is not a setting of {owner.__name__}{hint} ({listed} lists all)")


def _one_line(message: str) -> str:
    """Return an error of jsonargparse in one line, with the path of the setting first."""
    path = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    lines = [line.strip(" -") for line in message.split("\n") if 'Parser key "' not in line]
    return f"{path}: {' '.join(line for line in lines if line)}"
