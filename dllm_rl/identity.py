"""Digests of whole values: the rows of a data set, a reward function with its constants, a tokenizer, tensors.

A digest is the same in every process. Equal content has equal digests: a list and a tuple of the same items, and a dict
in any order. Nothing is sampled, and nothing is compared by its printed form.
"""

import ast
import copyreg
import functools
import inspect
import json
import linecache
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date, time, timedelta
from enum import Enum
from hashlib import file_digest, sha256
from numbers import Number
from pathlib import Path, PurePath
from pickle import PicklingError
from symtable import SymbolTable, symtable
from textwrap import indent
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

MAX_BITS = 2**13  # of an integer that is written as text: Python writes no more than 4300 decimal digits
THREADS = 4  # hashlib releases the interpreter's lock
# Values whose content counts as a setting of code. Others, such as arrays and generators of random numbers, are state.
_SETTINGS = (str, bytes, Number, NoneType, Enum, PurePath, date, time, timedelta, re.Pattern)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_LIBRARY_FOLDERS = (*(f"{sysconfig.get_path(kind)}/" for kind in ("stdlib", "platstdlib")), f"{Path(__file__).parent}/")
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")  # of whatever environment


def digest_of_value(value: Any) -> str:
    """Return 64 hex digits that identify a value by its whole content; an object's is what a pickle of it would have.

    Functions and classes of the user's count by their code, as in `digest_of_code`. An object that cannot be pickled
    counts by its class and its attributes.
    """
    return _Digest().of(value).hex()


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
    """Return sixteen hex digits that identify the user's code in a value, and its settings. None: there is no code.

    Code is the source text of the value's functions and classes, and of the definitions in the user's files that they
    name, directly or through others. Comments, docstrings and places do not count, nor do calls that a file makes on
    its own lines. Code without a file, such as that of `python -c`, counts by its name alone.

    Settings are the arguments of partials, the variables of closures, and the arguments of a constructor that its
    object keeps under their names: numbers, text, dates, paths, patterns, and containers of these. State does not
    count: other values, and all that the code assigns to outside of a constructor, stores items in, or passes to a call
    whose result it drops, as in `seen.append(text)`, or that is all of a lambda.
    """
    code = _Code()
    code.read(value)
    if not code.found:
        return None
    settings = [
        (name, value)
        for name, value in code.settings
        if name not in code.changed and (isinstance(value, _SETTINGS) or f"in {name}" not in code.changed)
    ]
    return digest_of_value([code.found, sorted(code.named), settings])[:16]


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
    return _of_parts(ordered, (_Digest().of(read(tensors[name])) for name in ordered))


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
# set had another digest under another PYTHONHASHSEED.
class _Digest:
    """Digests of one value's parts."""

    def __init__(self) -> None:
        self.active: list[int] = []  # ids of the values around the current one

    def of(self, value: Any) -> bytes:
        if value is None or isinstance(value, str | bytes | bytearray | Number):
            return self.of_scalar(value)
        if id(value) in self.active:
            return _hashed("the value", str(len(self.active) - self.active.index(id(value))).encode())
        self.active.append(id(value))
        try:
            return self.of_compound(value)
        finally:
            self.active.pop()

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
        if isinstance(value, FunctionType | MethodType | type | functools.partial):
            return _hashed("code", (digest_of_code(value) or full_name(value)).encode())
        if isinstance(value, ModuleType | BuiltinFunctionType):
            return _hashed("name", full_name(value).encode())
        if hasattr(value, "detach") and hasattr(value, "layout"):
            return self.of_tensor(value)
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            kind = f"array of {value.dtype.str if value.dtype.names is None else value.dtype.descr}, {value.shape}"
            return _hashed(kind, value.tobytes())
        if not is_of_user(type(value)):
            return _hashed("object", self.of(type(value)), self.of_reduced(value))
        items: dict[str, Any] = {"items of the container": dict(value)} if isinstance(value, dict) else {}
        return _hashed("object", self.of(type(value)), self.of_mapping(_attributes(value) | items))

    def of_mapping(self, value: Mapping[Any, Any]) -> bytes:
        return _hashed("dict", *sorted(self.of(name) + self.of(part) for name, part in value.items()))

    def of_tensor(self, value: Any) -> bytes:
        plain = value.detach().cpu()
        try:
            numbers = plain.numpy(force=True)
        except TypeError:  # NumPy has no bfloat16 and no float8; float32 holds their numbers exactly
            numbers = plain.float().numpy(force=True)
        return _hashed(f"tensor of {value.dtype}, {tuple(value.shape)}", memoryview(numbers.ravel()).cast("B"))

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


class _Code:
    """The user's code that values reach, and its settings."""

    def __init__(self) -> None:
        self.found: list[str] = []  # source text of each function and class, in the order of the values
        self.named: set[str] = set()  # source text of the definitions that these name
        self.changed: set[str] = set()  # names of state
        self.settings: list[tuple[str, Any]] = []  # name, value
        self.seen: dict[Any, Any] = {}  # values by their ids, kept so that no id is used again; and names

    def read(self, value: Any) -> None:
        """Read the code in a value."""
        if isinstance(value, _SETTINGS) or id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if isinstance(value, list | tuple | set | frozenset | dict):
            items = value.values() if isinstance(value, dict) else value
            for item in sorted(items, key=full_name) if isinstance(value, set | frozenset) else items:
                self.read(item)
            if is_of_user(type(value)):
                self.read_object(value)
        elif isinstance(value, functools.partial):
            self.read(value.func)
            names = getattr(getattr(value.func, "__code__", None), "co_varnames", tuple(map(str, range(99))))
            self.give(dict(zip(names, value.args, strict=False)) | value.keywords)
        elif isinstance(value, MethodType):
            self.read(value.__self__)
            self.read(value.__func__)
        elif isinstance(value, FunctionType) and is_of_user(value):
            self.read_function(value)
        elif isinstance(value, type):
            if is_of_user(value):
                self.read_class(value)
        elif _is_module_of_user(value):
            for name in _parsed(value.__file__)[0] if getattr(value, "__file__", None) else ():
                self.follow(name, vars(value), value.__file__)
            self.read([part for part in vars(value).values() if _is_module_of_user(part)])
        elif is_of_user(type(value)):
            self.read_object(value)
        else:  # a record of a library, such as a loss or a task, which may hold the user's code
            self.read([getattr(value, name, None) for name in getattr(value, "__dataclass_fields__", ())])
        self.read(getattr(value, "__wrapped__", None))  # what a decorator has wrapped

    def read_object(self, value: Any) -> None:
        """Read the class of a user's object, and the arguments of its constructor that it keeps."""
        self.read_class(type(value))
        try:
            names: Iterable[str] = inspect.signature(type(value)).parameters
        except (TypeError, ValueError):  # the constructor is a builtin's, such as that of an exception
            names = ()
        self.give({name: part for name, part in _attributes(value).items() if name.lstrip("_") in names})

    def give(self, values: Mapping[str, Any]) -> None:
        """Read values by name, each of which may be a setting."""
        for name, value in sorted(values.items()):
            self.read(value)
            if _is_setting(value):
                self.settings.append((name, value))

    def read_class(self, kind: type) -> None:
        namespace = vars(sys.modules[kind.__module__]) if kind.__module__ in sys.modules else {}
        # A class of a notebook has its cell's file, which its methods know.
        files = [each.__code__.co_filename for each in vars(kind).values() if isinstance(each, FunctionType)]
        file = namespace.get("__file__") or next((each for each in files if each != "<string>"), "")
        nodes = [each for each in _parsed(file)[1] if isinstance(each, ast.ClassDef) and each.name == kind.__name__]
        self.found.append(self.text_of(nodes, namespace, file) or full_name(kind))

    def read_function(self, function: FunctionType) -> None:
        code, defaults = function.__code__, function.__defaults__ or ()
        nodes = [each for each in _parsed(code.co_filename)[1] if _first_line_and_name(each) == _place_of(code)]
        closure = dict(zip(code.co_freevars, map(_content, function.__closure__ or ()), strict=True))
        self.found.append(self.text_of(nodes, function.__globals__, code.co_filename, closure) or full_name(function))
        names = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        self.give(dict(zip(names, defaults, strict=True)) | (function.__kwdefaults__ or {}) | closure)

    def text_of(self, nodes: list[Any], namespace: dict[str, Any], file: str, known: Iterable[str] = ()) -> str:
        """Return the text of parts of a file; follow the names in it that are not known."""
        text = "\n".join(map(ast.unparse, nodes))
        self.changed |= _changed_names(nodes)
        # In a function that has the names of an enclosing one as its parameters.
        inside = f"def _({', '.join(known)}):\n" + indent(text or "pass", " ")
        for name in sorted(_global_names(symtable(inside, file, "exec"))):
            self.follow(name, namespace, file)
        return text

    def follow(self, name: str, namespace: dict[str, Any], file: str) -> None:
        """Read what a name of a module stands for: its definitions in the file, or the imported value."""
        if (file, name) in self.seen:
            return
        self.seen[file, name] = None
        nodes = _parsed(file)[0].get(name, [])
        self.named.add(self.text_of(nodes, namespace, file))
        if not nodes and name in namespace and not name.startswith("__"):
            self.give({name: namespace[name]})


@functools.lru_cache
def _parsed(file: str) -> tuple[dict[str, list[ast.AST]], list[Any]]:
    """Return the statements of a file by the names that they define, without imports; and all functions and classes.

    The file is read once: a run keeps the code that it began with if the file is edited meanwhile.
    """
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:  # a notebook's cell with a command of the shell
        return {}, []
    defined = [each for each in ast.walk(tree) if isinstance(each, (*_DEFINITIONS, ast.Lambda))]
    for each in defined:
        if not isinstance(each, ast.Lambda) and ast.get_docstring(each, clean=False) is not None:
            each.body = each.body[1:] or [ast.Pass()]
    statements: dict[str, list[ast.AST]] = {}
    for statement in tree.body:
        is_definition = isinstance(statement, _DEFINITIONS)
        for name in {statement.name} if is_definition else _stored_names(statement):  # type: ignore[attr-defined]
            statements.setdefault(name, []).append(statement)
    return statements, defined


def _first_line_and_name(node: Any) -> tuple[int, str]:
    lines = [node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))]
    return min(lines), getattr(node, "name", "<lambda>")


def _place_of(code: CodeType) -> tuple[int, str]:
    return code.co_firstlineno, code.co_name


def _global_names(table: SymbolTable) -> set[str]:
    """Return the names of its module that code uses."""
    names = {each.get_name() for each in table.get_symbols() if each.is_global()}
    return names.union(*map(_global_names, table.get_children()))


def _changed_names(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the names that code assigns to, except in constructors; as "in NAME" also those of which it sets items, or
    which it passes to a call whose result it drops.
    """
    names: set[str] = set()
    parts = [part for node in nodes for part in ast.walk(node)]
    making = [each for each in parts if getattr(each, "name", None) in ("__init__", "__new__", "__post_init__")]
    in_making = {id(part) for each in making for part in ast.walk(each)}
    for part in parts:
        if isinstance(part, ast.Global | ast.Nonlocal):
            names.update(part.names)
        elif isinstance(part, ast.Attribute) and not isinstance(part.ctx, ast.Load) and id(part) not in in_making:
            names.add(part.attr)
        elif isinstance(part, ast.Subscript) and not isinstance(part.ctx, ast.Load):
            names |= {f"in {name}" for name in _names(part.value)}
        dropped = part.value if isinstance(part, ast.Expr) else part.body if isinstance(part, ast.Lambda) else None
        if isinstance(dropped, ast.Call):
            plain = [each for each in dropped.args if isinstance(each, ast.Name | ast.Attribute)]
            names |= {f"in {name}" for each in [dropped.func, *plain] for name in _names(each)}
    return names


def _stored_names(node: ast.AST) -> set[str]:
    """Return the names that a statement assigns to, or of which it sets items."""
    stored = [each for each in ast.walk(node) if isinstance(getattr(each, "ctx", None), ast.Store | ast.Del)]
    return {name for each in stored for name in _names(each)}


def _names(node: ast.AST) -> set[str]:
    return {str(getattr(each, "id", getattr(each, "attr", ""))) for each in ast.walk(node)}


def _is_setting(value: Any) -> bool:
    if type(value) not in (list, tuple, set, frozenset, dict):
        return isinstance(value, _SETTINGS)
    return all(map(_is_setting, [*value, *value.values()] if isinstance(value, dict) else value))


def _is_module_of_user(value: Any) -> bool:
    if not isinstance(value, ModuleType):
        return False
    places = [getattr(value, "__file__", None), *getattr(value, "__path__", ())]  # of a package the folders
    return any(place and not _is_of_library(place) for place in places)


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
    slots = [name for base in type(value).__mro__ for name in vars(base).get("__slots__", ())]
    return {name: getattr(value, name) for name in slots if hasattr(value, name)} | getattr(value, "__dict__", {})


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable without a value yet
        return None


def rows_in_order(dataset: Any, batch_size: int = 1000) -> Iterator[dict[Any, Any]]:
    """Yield the rows of a data set; of a `datasets.Dataset`, many at a time, which is twenty times as fast."""
    if not hasattr(dataset, "column_names"):
        yield from (dict(dataset[index]) for index in range(len(dataset)))
        return
    for start in range(0, len(dataset), batch_size):
        columns = dataset[start : start + batch_size]
        yield from (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
