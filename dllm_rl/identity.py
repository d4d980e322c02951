"""Digests of whole values: the rows of a data set, a reward function with its constants, a tokenizer, tensors.

A digest is the same in every process. Equal content has equal digests: a list and a tuple of the same items, and a dict
in any order. Nothing is sampled, and nothing is compared by its printed form.
"""

import copyreg
import dis
import functools
import inspect
import json
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import file_digest, sha256
from numbers import Number
from pathlib import Path
from pickle import PicklingError
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

MAX_BITS = 2**13  # of an integer that is written as text: Python writes no more than 4300 decimal digits
THREADS = 4  # hashlib releases the interpreter's lock
# Methods of containers that change them: what a function changes is its state, and no setting.
_CHANGING_METHODS = {
    *("append", "extend", "insert", "remove", "pop", "popitem", "clear", "update", "setdefault", "add", "discard"),
    *("appendleft", "popleft", "sort", "reverse", "difference_update", "intersection_update"),
}
_STORING = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF", "STORE_ATTR", "DELETE_ATTR"}
# Modules whose objects are data. An object of another library, such as a client or a model, counts by its class.
_DATA_MODULES = {
    *("builtins", "collections", "datetime", "decimal", "enum", "fractions", "functools", "numpy", "pathlib", "re"),
    *("torch", "types", "uuid"),
}
_LIBRARY_FOLDERS = (*(f"{sysconfig.get_path(kind)}/" for kind in ("stdlib", "platstdlib")), f"{Path(__file__).parent}/")
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")  # of whatever environment


def digest_of_value(value: Any) -> str:
    """Return 64 hex digits that identify a value by its whole content; an object's is what a pickle of it would have.

    Functions and classes of the user's count by their code, as in `digest_of_code`. An object that cannot be pickled
    counts by its class and its attributes.
    """
    return _Digest(data=True).of(value).hex()


def digest_of_rows(rows: Iterable[Mapping[Any, Any]]) -> str:
    """Return 64 hex digits that identify all rows and their order."""
    digest = sha256()
    for row in rows:
        try:  # a row of JSON values takes two microseconds this way
            line = json.dumps(row, sort_keys=True, default=_as_json)
        except (TypeError, ValueError, RecursionError):  # keys that are not text, or a list that contains itself
            line = digest_of_value(row)
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _as_json(value: Any) -> dict[str, str]:
    return {"sha256 of a value": digest_of_value(value)}


def digest_of_code(value: Any) -> str | None:
    """Return a text that identifies the user's code in a value: its functions, classes, and what they refer to.

    Code is a function's bytecode, with its constants, defaults, closure, and the functions, classes and constants of
    its module that it uses. Names of local variables, comments and positions in the file do not count, nor does what
    the code itself changes, such as a counter. Code of the standard library and of installed packages counts by its
    name.

    Returns:
        The Python version, whose bytecode it is, and sixteen hex digits. None: the value has no code of the user's.
    """
    digest = _Digest(data=False)
    result = digest.of(value).hex()[:16]
    return f"{sys.implementation.cache_tag} {result}" if digest.has_code else None


def digest_of_files(folder: Path, names: Iterable[str]) -> str:
    """Return 64 hex digits that identify all bytes of these files of a folder, and their names."""

    def digest(name: str) -> bytes:
        with (folder / name).open("rb") as file:
            return file_digest(file, "sha256").digest()

    ordered = sorted(names)
    with ThreadPoolExecutor(THREADS) as pool:
        return _of_parts(ordered, pool.map(digest, ordered))


def digest_of_tensors(tensors: Mapping[str, Any], read: Callable[[Any], Any] = lambda tensor: tensor) -> str:
    """Return 64 hex digits that identify all bytes of these tensors, their names, shapes and dtypes.

    Each tensor is passed through `read` when its turn comes, so that few copies exist at a time.
    """
    ordered = sorted(tensors)
    return _of_parts(ordered, (_Digest(data=True).of(read(tensors[name])) for name in ordered))


def _of_parts(names: Iterable[str], digests: Iterable[bytes]) -> str:
    parts = [name.encode() + b"\0" + part for name, part in zip(names, digests, strict=True)]
    return sha256(b"".join(parts)).hexdigest()


def _hashed(kind: str, *parts: Any) -> bytes:
    """Return a digest of parts of bytes, each of which has a fixed length or stands alone."""
    digest = sha256(f"{kind}\0".encode())
    for part in parts:
        digest.update(part)
    return digest.digest()


# `datasets.fingerprint.Hasher`, which pickles with dill, does not serve here: an object of a script's class that held a
# set had another digest under another PYTHONHASHSEED, and so had a function after a global that it counts in changed.
class _Digest:
    """Digests of one value's parts. `data`: whether objects of every library count by their content."""

    def __init__(self, *, data: bool) -> None:
        self.data = data
        self.has_code = False
        self.active: list[int] = []  # ids of the values around the current one
        self.known: dict[int, tuple[Any, bytes]] = {}  # of functions and classes; with them, so that no id is reused

    def of(self, value: Any) -> bytes:
        if value is None or isinstance(value, str | bytes | bytearray | Number):
            return self.of_scalar(value)
        if id(value) in self.active:
            return _hashed("the value", str(len(self.active) - self.active.index(id(value))).encode())
        if id(value) in self.known:
            return self.known[id(value)][1]
        self.active.append(id(value))
        try:
            result = self.of_compound(value)
        finally:
            self.active.pop()
        if isinstance(value, FunctionType | type):
            self.known[id(value)] = value, result
        return result

    def of_scalar(self, value: Any) -> bytes:
        if isinstance(value, bytes | bytearray):
            return _hashed("bytes", value)
        if isinstance(value, str):
            return _hashed("text", value.encode("utf-8", "surrogatepass"))
        if hasattr(value, "dtype"):  # a number of NumPy, which is told apart from Python's by its dtype
            return _hashed(str(value.dtype), repr(value.item()).encode())
        is_long = isinstance(value, int) and value.bit_length() > MAX_BITS
        return _hashed(type(value).__qualname__, (hex(value) if is_long else repr(value)).encode())

    def of_compound(self, value: Any) -> bytes:
        if isinstance(value, list | tuple):
            return _hashed("list", *map(self.of, value))
        if isinstance(value, set | frozenset):
            return _hashed("set", *sorted(map(self.of, value)))
        if type(value) is dict:
            return self.of_mapping(value)
        if isinstance(value, FunctionType | MethodType | CodeType | type | functools.partial):
            return self.of_code(value)
        if isinstance(value, ModuleType | BuiltinFunctionType):
            return _hashed("name", full_name(value).encode())
        if hasattr(value, "detach") and hasattr(value, "layout"):
            return self.of_tensor(value)
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            kind = f"array of {value.dtype.str if value.dtype.names is None else value.dtype.descr}, {value.shape}"
            return _hashed(kind, value.tobytes())
        return self.of_object(value)

    def of_mapping(self, value: Mapping[Any, Any]) -> bytes:
        return _hashed("dict", *sorted(self.of(name) + self.of(part) for name, part in value.items()))

    def of_tensor(self, value: Any) -> bytes:
        plain = value.detach().cpu()
        try:
            numbers = plain.numpy(force=True)
        except TypeError:  # NumPy has no bfloat16 and no float8; float32 holds their numbers exactly
            numbers = plain.float().numpy(force=True)
        return _hashed(f"tensor of {value.dtype}, {tuple(value.shape)}", memoryview(numbers.ravel()).cast("B"))

    def of_object(self, value: Any) -> bytes:
        """Return the digest of an object: of its class, and of what a pickle of it would have."""
        kind = type(value)
        wrapped = getattr(value, "__wrapped__", None)  # the function around which a library's object is
        if callable(wrapped) and not is_of_user(kind):
            return _hashed("object", full_name(kind).encode(), self.of(wrapped))
        if not self.data and not is_of_user(kind) and kind.__module__.partition(".")[0] not in _DATA_MODULES:
            fields = getattr(kind, "__dataclass_fields__", {}).values()  # settings, as of a loss or a task
            parts = {each.name: getattr(value, each.name, None) for each in fields if each.repr}
            return _hashed("object", full_name(kind).encode(), self.of_mapping(parts))
        state = self.of_mapping(self.settings_of(value)) if is_of_user(kind) else self.of_reduced(value)
        return _hashed("object", self.of(kind), state)

    def of_reduced(self, value: Any) -> bytes:
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            reduced = value.__reduce_ex__(2) if reduce is None else reduce(value)
        except (TypeError, ValueError, AttributeError, RuntimeError, PicklingError):  # it cannot be pickled
            return self.of_mapping(_attributes(value))
        if isinstance(reduced, str):
            return _hashed("name", reduced.encode())
        lists: list[Any] = [[*part] if isinstance(part, Iterator) else part for part in reduced]
        if len(lists) > 4 and lists[4] is not None:
            lists[4] = dict(lists[4])  # items of a dict, in any order
        return self.of(lists)

    def settings_of(self, value: Any) -> dict[str, Any]:
        """Return the attributes of a user's object, without those that its methods change."""
        attributes = _attributes(value)
        items: dict[str, Any] = {"items of the container": [*value]} if isinstance(value, list | tuple) else {}
        items |= {"items of the container": dict(value)} if isinstance(value, dict) else {}
        if self.data:
            return attributes | items
        methods = [
            code
            for base in type(value).__mro__
            for name, member in vars(base).items()
            if name not in ("__init__", "__new__", "__post_init__") and is_of_user(base)
            for code in _codes_of(member)
        ]
        computed = {name for base in type(value).__mro__ for name, member in vars(base).items() if _is_cached(member)}
        settings = {name: part for name, part in attributes.items() if name not in computed}
        return {name: part for name, part in settings.items() if _is_setting(name, part, methods)} | items

    def of_code(self, value: Any) -> bytes:
        if isinstance(value, functools.partial):
            return _hashed("partial", self.of(value.func), self.of(value.args), self.of(value.keywords))
        if isinstance(value, MethodType):
            return _hashed("method", self.of(value.__self__), self.of(value.__func__))
        if isinstance(value, CodeType):
            parts = [self.of(_without_docstring(value)), self.of(value.co_names), value.co_code]
            return _hashed("code", *parts, repr(_parameters_of(value)).encode())
        if not is_of_user(value):
            return _hashed("name", full_name(value).encode(), self.of(getattr(value, "__wrapped__", None)))
        self.has_code = True
        return self.of_function(value) if isinstance(value, FunctionType) else self.of_class(value)

    def of_function(self, function: FunctionType) -> bytes:
        codes = [*_codes_in(function.__code__)]
        free = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
        used = {name: _content(cell) for name, cell in free.items()}
        for code in codes:
            for step in dis.get_instructions(code):
                if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in function.__globals__:
                    used[step.argval] = function.__globals__[step.argval]
        used = {name: part for name, part in used.items() if _is_setting(name, part, codes)}
        used |= _attributes_of_modules(used.values(), codes)
        defaults = _defaults_of(function)
        defaults = {name: part for name, part in defaults.items() if _is_setting(name, part, codes)}
        return _hashed("function", self.of(function.__code__), self.of_mapping(defaults), self.of_mapping(used))

    def of_class(self, kind: type) -> bytes:
        members = {}
        for name, member in vars(kind).items():
            if name.startswith("_abc_") or name in ("__doc__", "__module__", "__dict__", "__weakref__", "__slots__"):
                continue
            functions = [each for each in _functions_of(member) if each.__code__.co_filename != "<string>"]
            is_plain = isinstance(member, str | bytes | Number | tuple | frozenset | list | dict | set | type(None))
            if functions:
                members[name] = functions
            elif is_plain and not name.startswith("__"):
                members[name] = member
        codes = [code for functions in members.values() for code in _codes_of(functions)]
        members = {name: part for name, part in members.items() if _is_setting(name, part, codes)}
        bases = [base for base in kind.__bases__ if base is not object]
        return _hashed("class", full_name(kind).encode(), self.of(bases), self.of_mapping(members))


def is_of_user(value: Any) -> bool:
    """Return whether a function or class is the user's: of neither Python, an installed package nor this library."""
    if isinstance(value, FunctionType):
        file = value.__code__.co_filename
    else:
        module = sys.modules.get(value.__module__)
        file = getattr(module, "__file__", None) or ""
        if not file:  # a built-in module, or a notebook
            return value.__module__ not in sys.builtin_module_names
    return not _is_of_library(file)


def _is_of_library(file: str) -> bool:
    return file.startswith((*_LIBRARY_FOLDERS, "<frozen")) or _INSTALLED.search(file) is not None


def full_name(value: Any) -> str:
    """Return MODULE.NAME of a function, class or module."""
    name = getattr(value, "__qualname__", getattr(value, "__name__", ""))
    return f"{getattr(value, '__module__', '')}.{name}"


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for base in type(value).__mro__ for name in _names(getattr(base, "__slots__", ()))]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _is_cached(member: Any) -> bool:
    return isinstance(member, functools.cached_property)


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_setting(name: str, value: Any, codes: Iterable[CodeType]) -> bool:
    """Return whether none of the code assigns to the name, or, of a container or an object, may change its items."""
    is_fixed = isinstance(value, str | bytes | Number | tuple | frozenset | FunctionType | type | ModuleType)
    for code in codes:
        steps = [(step.opname, step.argval) for step in dis.get_instructions(code)]
        if any(opname in _STORING and argval == name and argval not in code.co_cellvars for opname, argval in steps):
            return False
        if not is_fixed and name in _changed_in(code):
            return False
    return True


@functools.lru_cache(maxsize=1024)
def _changed_in(code: CodeType) -> frozenset[str]:
    """Return the names in what the code changes in place: X of X[key] = value, del X[key] and X.append(value)."""
    steps = [part for step in dis.get_instructions(code) for part in _parts_of(step)]
    found: set[str] = set()
    for index, (kind, name, _) in enumerate(steps):
        end = index
        if kind in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            if steps[index - 1][0] == "SWAP":  # X[key] += value copies X and the key before it reads the item
                copies = [i for i in range(1, index) if steps[i][0] == steps[i - 1][0] == "COPY"]
                end = copies[-1] - 1 if copies else index
            end = _start_of_expression(steps, end)  # of the key
        elif not (kind in ("LOAD_METHOD", "LOAD_ATTR") and name in _CHANGING_METHODS):
            continue
        start = _start_of_expression(steps, end)
        if any("JUMP" in kind for kind, _, _ in steps[start:index]):  # an expression such as `a if b else c`
            start, end = 0, len(steps)
        found |= {name for kind, name, _ in steps[start:end] if isinstance(name, str) and kind != "LOAD_CONST"}
    return frozenset(found)


def _parts_of(step: dis.Instruction) -> list[tuple[str, Any, int]]:
    """Return (operation, name or argument, change of the stack's height) of an instruction.

    Those that stand for two, such as LOAD_FAST_LOAD_FAST, become two.
    """
    if isinstance(step.argval, tuple) and "_FAST" in step.opname:
        kinds = re.findall("LOAD|STORE", step.opname)
        return [(kind, name, 1 if kind == "LOAD" else -1) for kind, name in zip(kinds, step.argval, strict=True)]
    return [(step.opname, step.argval, dis.stack_effect(step.opcode, step.arg, jump=False))]


def _start_of_expression(steps: list[tuple[str, Any, int]], end: int) -> int:
    """Return the index at which the expression begins whose value is on top of the stack before the step `end`."""
    missing = 1
    while missing > 0 and end > 0:
        end -= 1
        missing -= steps[end][2]
    return end


def _defaults_of(function: FunctionType) -> dict[str, Any]:
    """Return the default values of a function's parameters, by name."""
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    return dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True)) | (
        function.__kwdefaults__ or {}
    )


def _attributes_of_modules(values: Iterable[Any], codes: list[CodeType]) -> dict[str, Any]:
    """Return what the code may read of the user's modules among the values, as MODULE.NAME."""
    found: dict[str, Any] = {}
    names = {name for code in codes for name in code.co_names}
    modules = [value for value in values if _is_module_of_user(value)]
    for module in modules:  # which grows by the modules of packages
        for name in sorted(names & vars(module).keys()):
            part = vars(module)[name]
            if f"{module.__name__}.{name}" not in found and _is_setting(name, part, codes):
                found[f"{module.__name__}.{name}"] = part
                modules += [part] if _is_module_of_user(part) else []
    return found


def _is_module_of_user(value: Any) -> bool:
    if not isinstance(value, ModuleType):
        return False
    places = [getattr(value, "__file__", None), *getattr(value, "__path__", ())]  # of a package the folders
    return any(place and not _is_of_library(place) for place in places)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable without a value yet
        return None


def _functions_of(member: Any) -> list[FunctionType]:
    """Return the functions in a member of a class, such as those of a property."""
    parts = [member, *(getattr(member, name, None) for name in ("__func__", "fget", "fset", "func"))]
    parts += member if isinstance(member, list) else []
    functions = (inspect.unwrap(part) for part in parts if isinstance(part, FunctionType))
    return [function for function in functions if isinstance(function, FunctionType)]  # torch wraps some of C


def _codes_of(member: Any) -> list[CodeType]:
    return [code for function in _functions_of(member) for code in _codes_in(function.__code__)]


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    """Yield code and the code of the functions that it defines."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes_in(constant)


def _parameters_of(code: CodeType) -> tuple[Any, ...]:
    count = code.co_argcount + code.co_kwonlyargcount
    return code.co_varnames[:count], code.co_argcount, code.co_posonlyargcount, code.co_flags


def _without_docstring(code: CodeType) -> list[Any]:
    """Return a function's constants. The first one is its docstring, if it is text that no instruction loads."""
    loaded = {step.arg for step in dis.get_instructions(code) if step.opcode in dis.hasconst}
    return [constant if index in loaded else None for index, constant in enumerate(code.co_consts)]


def rows_in_order(dataset: Any, batch_size: int = 1000) -> Iterator[dict[Any, Any]]:
    """Yield the rows of a data set; of a `datasets.Dataset`, many at a time, which is twenty times as fast."""
    if not hasattr(dataset, "column_names"):
        yield from (dict(dataset[index]) for index in range(len(dataset)))
        return
    for start in range(0, len(dataset), batch_size):
        columns = dataset[start : start + batch_size]
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
