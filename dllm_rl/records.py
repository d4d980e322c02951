"""Records of settings: frozen dataclasses that a script makes, a command line changes, and a run stores as JSON.

Every method of the library (a corrector, a loss, a sampler, ...) is a record: subclass the method's base class, write
its settings as fields, and it has a constructor that checks them, equality, a repr that can be pasted, options on the
command line and a form in JSON.
"""

import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

Made = TypeVar("Made", bound="Record")
SelfRecord = TypeVar("SelfRecord", bound="Record")  # beartype refuses typing.Self
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]{4,}")

# The numbers that float32, in which losses and distributions are computed, holds with all its digits. A smaller one
# would count as 0 or lose digits, a larger one as infinity.
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
INT64_MAX = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Bound:
    """The range of a number. A number that is not finite, or that float32 or int64 cannot hold, is never in range."""

    at_least: int | float | None = None
    above: int | float | None = None
    at_most: int | float | None = None
    below: int | float | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError if the value is outside the range. None is always valid."""
        if value is None:
            return
        if not issubclass(type(value), Real):  # mypy does not narrow Real to a number
            raise ValueError(f"{name}={value!r} must be a number")
        low = -math.inf if self.above is None else self.above
        high = math.inf if self.below is None else self.below
        inside = low < value < high  # NaN and the infinities fail here
        inside &= self.at_least is None or value >= self.at_least
        inside &= self.at_most is None or value <= self.at_most
        if not inside:
            verb = "lie" if str(self).startswith("in") else "be"
            is_finite = -math.inf < value < math.inf
            raise ValueError(f"{name}={value} must {verb} {self}" + ("" if is_finite else ", and be finite"))
        if isinstance(value, Integral):
            if abs(int(value)) > INT64_MAX:
                raise ValueError(f"{name}={value} must be an integer of 64 bits, at most {INT64_MAX}")
        elif value and not FLOAT32_MIN <= abs(value) <= FLOAT32_MAX:
            may_be_zero = low < 0 if self.at_least is None else self.at_least <= 0
            limits = f"{FLOAT32_MIN:.2g} to {FLOAT32_MAX:.2g}" + (", or 0" if may_be_zero else "")
            raise ValueError(f"{name}={value} must be a number that float32 can hold: {limits}")

    def __str__(self) -> str:
        """Format as `at least 1`, `above 0` or `in [0, 1)`."""
        low = f"({self.above}" if self.at_least is None else f"[{self.at_least}"
        if self.at_most is not None:
            return f"in {low}, {self.at_most}]"
        if self.below is not None:
            return f"in {low}, {self.below})"
        return f"above {self.above}" if self.at_least is None else f"at least {self.at_least}"


def option(*, default: Any = dataclasses.MISSING, help: str = "", **bound: int | float) -> Any:
    """Make a field of a record whose numbers have a range.

    Args:
        default: Default value. Without one, the field must be given.
        help: Text of the command line's help; without it, the help shows the field's line in the class's docstring.
        **bound: `at_least`, `above`, `at_most`, `below`: the range that the constructor checks.
    """
    return dataclasses.field(default=default, metadata={"help": help, "bound": Bound(**bound) if bound else None})


def nearest_hint(text: str, names: Iterable[str], form: str = "{}") -> str:
    """Return "; the nearest is NAME" for the error message about an unknown name, or "" if no name is near.

    Letters may be of either case. `form` formats the name.
    """
    by_text = {name.lower(): name for name in names}
    nearest = difflib.get_close_matches(text.lower(), by_text, n=1)
    return f"; the nearest is {form.format(by_text[nearest[0]])}" if nearest else ""


def fields_of_group(annotation: Any) -> list[str]:
    """Return the fields of the record class of a setting, if it has no other class; [] otherwise."""
    base = record_type(annotation)
    return [*annotations_of(base)] if base is not None and [*subclasses(base).values()] == [base] else []


def folders_beside(path: str | Path) -> str:
    """Return "; PARENT has a, b; the nearest is a" for the error message about a folder that is missing, or "" without
    such a parent. A run deletes its old checkpoints, so those that it still has are the last ones.
    """
    path = Path(path)
    try:
        names = sorted(each.name for each in path.parent.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError:  # there is no such folder, or it cannot be read
        return ""
    if not names:
        return ""
    return f"; {path.parent} has {', '.join(['...'] * (len(names) > 5) + names[-5:])}{nearest_hint(path.name, names)}"


def check_is_folder(path: str | Path, what: str) -> None:
    """Raise ValueError unless a path is a folder; `what` is what the user must give, such as "a run's folder"."""
    if not Path(path).is_dir():
        problem = "is not a folder" if Path(path).exists() else "does not exist"
        raise ValueError(f"{path} {problem}; give {what}{folders_beside(path)}")


def with_nearest(name: str, known: Iterable[str]) -> str:
    """Return an unknown name for an error message, with the nearest of the known names if one is near."""
    hint = nearest_hint(name, known).removeprefix("; ")
    return f"{name} ({hint})" if hint else name


@typing.dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(option,))
class Record:
    """Base of all methods and settings. A subclass is a frozen dataclass with keyword arguments only.

    The constructor checks each field's type and range, raises ValueError with a line for each wrong one, and calls
    `check`. A field whose type is a record accepts the values that the record's `convert` knows, such as a function.
    """

    GROUPED: typing.ClassVar[Mapping[str, str]] = {}  # flat names of settings, and their path: of the group's record

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        dataclasses.dataclass(frozen=True, kw_only=True, repr=False)(cls)

    def __new__(cls, *_: Any, **settings: Any) -> "Record":
        known = [setting.name for setting in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if unknown := [cls._unknown(name) for name in settings if name not in known]:
            kind = cls.__name__
            raise ValueError(f"not settings of {kind}: {', '.join(unknown)}; help({kind}) lists all")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        annotations, problems = annotations_of(type(self)), []
        for setting in dataclasses.fields(self):  # type: ignore[arg-type]
            value, bound = getattr(self, setting.name), setting.metadata.get("bound")
            try:
                object.__setattr__(self, setting.name, fit(setting.name, annotations[setting.name], value, bound))
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        self.check()

    def check(self) -> None:
        """Raise ValueError if settings cannot be combined. Override it; the constructor calls it last."""

    @classmethod
    def convert(cls, value: Any) -> Any:
        """Return the record that another value stands for; None if it is not such a value.

        A function stands for the `FunctionRecord` among the subclasses, if there is one.
        """
        wrapper = next((kind for kind in cls.__subclasses__() if issubclass(kind, FunctionRecord)), None)
        is_function = callable(value) and not isinstance(value, Record)
        return wrapper(function=value) if wrapper is not None and is_function else None

    def replace(self: SelfRecord, **changes: Any) -> SelfRecord:
        """Return a copy with other values of some fields. A dictionary changes fields of the record in a field:
        `recipe.replace(log={"steps": 1})`.
        """
        annotations = annotations_of(type(self))
        for name in annotations.keys() & changes.keys():
            base = record_type(annotations[name])
            if base is not None and isinstance(changes[name], dict) and "class_path" not in changes[name]:
                before = getattr(self, name)
                changes[name] = make_record(base, changes[name]) if before is None else before.replace(**changes[name])
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    @classmethod
    def _unknown(cls, name: str) -> str:
        """Return an unknown field's name for an error message, with the path of the setting, or the nearest field."""
        if name in cls.GROUPED:
            return f"{name} (it is {cls.GROUPED[name]})"
        return with_nearest(name, [setting.name for setting in dataclasses.fields(cls)])  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return _format_call(type(self), {f.name: getattr(self, f.name) for f in dataclasses.fields(self)})  # type: ignore[arg-type]


class FunctionRecord(Record):
    """Base of a record that a plain function stands for. A call of the record calls the function.

    Derive from it and from the record's own base, as `FunctionLoss` does.

    Args:
        function: Function to call.
    """

    function: Callable[..., Any]

    @property
    def name(self) -> str:
        """Name of the function, for messages."""
        return getattr(self.function, "__name__", describe(self.function))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.function(*arguments, **keywords)


def annotations_of(record: Any) -> dict[str, Any]:
    """Return the types of a record's fields by name."""
    return _types_of_fields(record)


@functools.cache
def _types_of_fields(record: type) -> dict[str, Any]:
    hints = typing.get_type_hints(record)
    return {name: kind for name, kind in hints.items() if typing.get_origin(kind) is not typing.ClassVar}


def union_members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union; for any other annotation, the annotation in a tuple."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    return typing.get_args(annotation) if is_union else (annotation,)


def record_type(annotation: Any) -> type[Record] | None:
    """Return the record class among the types of a union; None if there is none."""
    kinds = union_members(annotation)
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Record)), None)


def fit(name: str, annotation: Any, value: Any, bound: Bound | None = None) -> Any:
    """Return a value as a field of this type stores it: a list as a tuple, a path as text, a function as its record,
    and a number, such as NumPy's, as Python's.

    Raises:
        ValueError: The value has the wrong type or is out of range; the message names the field, value and remedy.
    """
    kinds = union_members(annotation)
    optional = types.NoneType in kinds
    if isinstance(value, str | Path) and str in kinds and str(value).startswith("~/"):
        value = str(Path(value).expanduser())
    if isinstance(value, Path) and str in kinds:
        return str(value)
    if (value is None and optional) or annotation is Any:
        return value
    base = record_type(annotation)
    if base is not None:
        return _fit_record(name, base, kinds, value)
    origins = [typing.get_origin(kind) or kind for kind in kinds]
    if tuple in origins and not (isinstance(value, Integral) and int in kinds):
        items = typing.get_args(kinds[origins.index(tuple)]) or (Any, ...)
        if not isinstance(value, tuple | list):
            raise ValueError(f"{name}={value!r} must be a tuple")
        if items[-1] is ...:
            items = items[:1] * len(value)
        if len(value) != len(items):
            raise ValueError(f"{name}={value!r} must have {len(items)} values")
        return tuple(fit(f"{name}[{i}]", *pair, bound) for i, pair in enumerate(zip(items, value, strict=True)))
    if dict in origins and len({*origins} - {types.NoneType}) == 1 and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must be a dictionary")
    words = [word for kind in kinds if typing.get_origin(kind) is typing.Literal for word in typing.get_args(kind)]
    if words and value not in words and not any(kind in (int, float, bool, str) for kind in kinds):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, words))}")
    if Callable in origins and str not in kinds and not callable(value):
        raise ValueError(f"{name}={value!r} must be a function")
    if isinstance(value, str) and not value and str in kinds:  # for example from an unset variable in a script
        raise ValueError(f"{name}='' is empty; give a name" + (", or none" if optional else ""))
    protocols = tuple(kind for kind in kinds if getattr(kind, "_is_protocol", False))
    is_other = isinstance(value, type) or not isinstance(value, protocols)
    if protocols and not {*kinds} - {*protocols} and is_other:
        raise ValueError(
            f"{name}={describe(value)} is not of type {protocols[0].__name__}; give an object of a class like it"
        )
    if not words:
        check_scalar(name, kinds, value)
    if isinstance(value, Real) and not isinstance(value, bool):
        value = int(value) if isinstance(value, Integral) else float(value)
    if bound is not None:
        bound.check(name, value)
    return value


def check_scalar(name: str, kinds: tuple[Any, ...], value: Any) -> None:
    """Raise ValueError if all types of a field are scalars (number, bool, text) and the value has another type."""
    accepted_types = {bool: bool, int: Integral, float: Real, str: str | Path}
    scalars = [kind for kind in kinds if kind in accepted_types]
    if value is None and types.NoneType in kinds:
        return
    if {*kinds} == {types.NoneType}:
        raise ValueError(f"{name}={describe(value)} is of type {type(value).__name__}; give none")
    if not scalars or len(scalars) + (types.NoneType in kinds) < len(kinds):
        return
    is_wrong_flag = isinstance(value, bool) and bool not in kinds
    if is_wrong_flag or not any(isinstance(value, accepted_types[kind]) for kind in scalars):
        expected = " or ".join(kind.__name__ for kind in scalars)
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; give {expected}")


def _fit_record(name: str, base: type[Record], kinds: tuple[Any, ...], value: Any) -> Any:
    """Return the record that a value is, names (the class's name, as on the command line) or becomes."""
    if isinstance(value, (base, *(kind for kind in kinds if isinstance(kind, type)))):
        return value
    if isinstance(value, type) and issubclass(value, base):
        raise ValueError(f"{name}={value.__name__} is a class; give an object: {name}={value.__name__}(...)")
    if isinstance(value, str | dict):
        return from_json(base, value, name)
    if (converted := base.convert(value)) is not None:
        return converted
    known = [*subclasses(base)]
    remedy = f"{base.__name__}(...)" if known == [base.__name__] else f"one of {', '.join(known)}, or one of your own"
    raise ValueError(f"{name}={describe(value)} is not of type {base.__name__}; give {remedy}")


def subclasses(base: type[Record]) -> dict[str, type[Record]]:
    """Return the classes of the library that a field of type `base` may hold, by name.

    A class is known once its module is imported. The module or package of `base` imports those of its subclasses, but
    for the subclasses that connect to other programs: `dllm_rl.config` imports these for the command line.
    """
    found = {
        record.__name__: record
        for record in _all_subclasses(base)
        if record is not base
        and record.__module__.partition(".")[0] == "dllm_rl"
        and not record.__name__.startswith("_")
    }
    return found or {base.__name__: base}  # a class without subclasses, such as Lora


def _all_subclasses(base: type[Record]) -> Iterator[type[Record]]:
    yield base
    for record in base.__subclasses__():
        yield from _all_subclasses(record)


def subclass_named(base: type[Record], text: str, name: str) -> type[Record]:
    """Return the class that text names: a class of the library, or MODULE.NAME of one that is already imported.

    Raises:
        ValueError: There is no such class; the message has the nearest name.
    """
    known = subclasses(base)
    classes: list[type[Record]] = [*known.values(), *_all_subclasses(base)]
    for record in classes:
        if text in (record.__name__ if record.__name__ in known else "", f"{record.__module__}.{record.__qualname__}"):
            return record
    if [*known.values()] == [base]:
        fields = ", ".join(f"{name}.{field}" for field in annotations_of(base))
        raise ValueError(f"{name}={text!r} is not known; set the fields of {base.__name__}: {fields}")
    # Classes around a function, which text cannot give, are left out.
    kinds = {name: map(typing.get_origin, required_settings(record).values()) for name, record in known.items()}
    names = [name for name, origins in kinds.items() if Callable not in [*origins]] or [*known]
    raise ValueError(f"{name}={text!r} is not known{nearest_hint(text, names)} ({', '.join(names)})")


def required_settings(record: type[Record]) -> dict[str, Any]:
    """Return the types of the fields without a default, by name."""
    annotations = annotations_of(record)
    settings = dataclasses.fields(record)  # type: ignore[arg-type]
    return {f.name: annotations[f.name] for f in settings if f.default is dataclasses.MISSING}


def unchecked(value: Any, **fields: Any) -> Any:
    """Return a copy of a frozen dataclass with other fields, which is not checked and has no cached attributes.

    Use it for defaults that options may still override.
    """
    copied = object.__new__(type(value))
    for field in dataclasses.fields(value):
        if field.init:
            object.__setattr__(copied, field.name, fields.get(field.name, getattr(value, field.name)))
    return copied


def describe(value: Any) -> str:
    """Format a setting as text that can be pasted: records as NAME(field=value), functions by their name.

    Use it to print a setting in a message.
    """
    if isinstance(value, functools.partial):
        settings = repr(value).removeprefix(f"functools.partial({value.func!r}").removeprefix(", ")
        return f"{describe(value.func)}({settings}"
    if inspect.isfunction(value) or inspect.isbuiltin(value) or isinstance(value, type):
        return full_name(value)
    if inspect.ismethod(value):
        return f"{describe(value.__self__)}.{value.__name__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, Record):  # with functions by their name
        return _format_call(type(value), {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.repr})
    text = repr(value)
    if isinstance(value, tuple | list) and (any(map(callable, value)) or ADDRESS.search(text)):
        return f"({', '.join(map(describe, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict) and ADDRESS.search(text):
        return f"{{{', '.join(f'{describe(key)}: {describe(part)}' for key, part in value.items())}}}"
    return _describe_object(value) if ADDRESS.search(text) and hasattr(value, "__dict__") else text


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


def _format_call(function: Any, values: Mapping[str, Any]) -> str:
    return f"{full_name(function)}({', '.join(f'{name}={describe(value)}' for name, value in values.items())})"


def full_name(target: Any) -> str:
    """Return the NAME of a function or class, or MODULE.NAME outside of this library."""
    # With the module, because a resume must distinguish functions of the same name.
    module = target.__module__ or "builtins"  # builtin functions of torch have no module
    if module.partition(".")[0] == "dllm_rl":
        return target.__name__
    module = _main_module_name() if module == "__main__" else module
    return f"{module}.{target.__name__}"


def _main_module_name() -> str:
    """Return the module name under which other code imports the running script; __main__ in a notebook."""
    import os

    main = sys.modules["__main__"]
    if main.__spec__ is not None:  # python -m
        return main.__spec__.name
    file = getattr(main, "__file__", None)
    if file is None:
        return "__main__"
    try:
        path = Path(os.path.relpath(file)).with_suffix("")
    except FileNotFoundError:  # the working directory has been deleted
        return Path(file).stem
    return path.name if ".." in path.parts else ".".join(path.parts)


def without_folders(stored: Any) -> str:
    """Return a setting that `to_json` returned as text, in which the running script appears without its folders: these
    are relative to the working directory. Only the script's own folders are left out, not those of another module.
    """
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "__main__").resolve()
    folders = script.parts[1:-1]
    relative = "|".join(re.escape(".".join(folders[i:])) for i in range(len(folders)))
    return re.sub(rf"(?<![\w.])(?:{relative})\.(?={re.escape(script.stem)}\.)", "", json.dumps(stored))


def to_json(value: Any) -> Any:
    """Return a setting as JSON: a record as {"class_path": NAME, "init_args": {...}}, a function as its name.

    Other frozen dataclasses, such as tasks, are stored in the same way, without the fields that their repr leaves out.

    `from_json` reads records back; this is also the form that `--config FILE` reads.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        stored = [f.name for f in dataclasses.fields(value) if f.repr]  # type: ignore[arg-type]
        values = {name: to_json(getattr(value, name)) for name in stored}
        return {"class_path": full_name(type(value)), "init_args": values}
    if isinstance(value, tuple | list):
        return [to_json(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return describe(value)


def describe_json(stored: Any) -> str:
    """Format what `to_json` returned as text that can be pasted, as `describe` does. No class of it is needed."""
    if isinstance(stored, dict) and stored.keys() == {"class_path", "init_args"}:
        settings = ", ".join(f"{name}={describe_json(value)}" for name, value in stored["init_args"].items())
        return f"{stored['class_path']}({settings})"
    if isinstance(stored, list):
        return f"({', '.join(map(describe_json, stored))}{',' if len(stored) == 1 else ''})"
    return repr(stored)


def from_json(base: type[Record], value: Any, name: str) -> Any:
    """Return the record that `to_json` stored, or of the class that a text names. Only imported classes are made.

    Raises:
        ValueError: The value is not such a record, or its class or a function in it is defined in a script.
    """
    stored = {"class_path": value, "init_args": {}} if isinstance(value, str) else value
    is_record = isinstance(stored, dict) and stored.keys() == {"class_path", "init_args"}
    if not is_record or not isinstance(stored["init_args"], dict):
        raise ValueError(
            f'{name}={value!r} is not of type {base.__name__}; give a name, or {{"class_path": .., "init_args": ..}}'
        )
    record = subclass_named(base, str(stored["class_path"]), name)
    return make_record(record, stored["init_args"])


def make_record(record: type[Made], settings: Mapping[str, Any]) -> Made:
    """Make a record of settings by name, which may be in the form of `to_json`.

    Raises:
        ValueError: A setting is unknown, missing, or has a wrong value.
    """
    known = annotations_of(record)
    for name in settings:
        if name not in known:
            remedy = f"{nearest_hint(name, known, '{!r}')} ({', '.join(known)})" if known else "; it has no settings"
            raise ValueError(f"{name}={settings[name]!r} is not a setting of {record.__name__}{remedy}")
    if missing := sorted(required_settings(record).keys() - settings.keys()):
        raise ValueError(f"{record.__name__} needs {', '.join(missing)}")
    defaults = {f.name: f.default for f in dataclasses.fields(record)}  # type: ignore[arg-type]
    # The default of a setting may be a function, which is stored as its name.
    stored = {name: value for name, value in settings.items() if value != to_json(defaults[name])}
    return record(**stored)
