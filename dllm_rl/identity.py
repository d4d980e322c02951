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
# Methods of containers that change them; and those that only read them, which may hand out their items or not.
_CHANGING_METHODS = {
    *("append", "extend", "insert", "remove", "pop", "popitem", "clear", "update", "setdefault", "add", "discard"),
    *("appendleft", "popleft", "sort", "reverse", "difference_update", "intersection_update"),
}
_HANDING_OUT = {"get", "items", "values", "copy", "union", "intersection", "difference"}
_READING = {"keys", "index", "count", "issubset", "issuperset", "isdisjoint"}
_HANDING_OUT |= {"dict", "enumerate", "frozenset", "iter", "list", "map", "max", "min", "reversed", "set", "sorted"}
_HANDING_OUT |= {"tuple", "zip", "join", "choice"}
_READING |= {"all", "any", "bool", "len", "repr", "str", "sum"}
_ALL = 99  # levels of nested containers
# Modules whose objects cannot change. Of another library's object the class counts: its state, such as that of a
# generator of random numbers, of a counter or of a client, is none of the code's.
_CONSTANT_MODULES = {"datetime", "decimal", "enum", "fractions", "pathlib", "re", "uuid"}
_PLAIN_BASES = ("builtins", "abc", "typing", "enum")  # modules of bases that keep no state
_MAKING = ("__init__", "__new__", "__post_init__")  # methods that set what an object begins with
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
    its module that it uses. Names of local variables, comments and positions in the file do not count.

    State is not code. A number or a text counts unless a function of the user's assigns to its name, and a list, dict
    or set only if all of them do nothing but read it. "All" are the functions of the modules and notebooks that the
    value reaches, also those that it does not call. Other objects that can change, such as arrays, tensors and
    generators of random numbers, count by their class, and so does code of the standard library and of installed
    packages.

    Returns:
        The Python version, whose bytecode it is, and sixteen hex digits. None: the value has no code of the user's.
    """
    finding = _Digest(data=False)
    finding.of(value)
    if not finding.reached:
        return None
    digest = _Digest(data=False, functions=_functions_beside(finding.reached))
    return f"{sys.implementation.cache_tag} {digest.of(value).hex()[:16]}"


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
    """Digests of one value's parts.

    Args:
        data: Whether objects of every library count by their content.
        functions: The user's functions, whose state does not count. None: no state is known yet.
    """

    def __init__(self, *, data: bool, functions: "list[_Function] | None" = None) -> None:
        self.data = data
        self.functions = functions
        self.reached: list[_Function] = []  # the user's functions in the value
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
        if type(value) in (list, set) or isinstance(value, tuple | frozenset) or self.data:
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
        if not self.data:
            return self.of_object(value)
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
        if not self.data and not is_of_user(kind) and kind.__module__.partition(".")[0] not in _CONSTANT_MODULES:
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
        """Return the attributes of a user's object, without its state."""
        attributes = _attributes(value)
        if not self.data:
            kind = type(value)
            cached = {name for base in kind.__mro__ for name, member in vars(base).items() if _is_cached(member)}
            if not all(is_of_user(base) or base.__module__ in _PLAIN_BASES for base in kind.__mro__):
                # What only a library's base reads and changes, such as whether a module is training, is not known.
                functions = self.functions or []
                cached |= {name for name in attributes if not any(each.mentions(name) for each in functions)}
            return self.without_state({name: part for name, part in attributes.items() if name not in cached}, kind)
        items: dict[str, Any] = {"items of the container": [*value]} if isinstance(value, list | tuple) else {}
        items |= {"items of the container": dict(value)} if isinstance(value, dict) else {}
        return attributes | items

    def without_state(self, parts: dict[str, Any], of: Any) -> dict[str, Any]:
        """Return those of the named parts that no function changes. Of a container that some function may change, only
        the functions and classes in it remain.

        Args:
            parts: Values by name.
            of: Where the names are: "global" (of modules), a class (attributes of its objects), or the code of a
                function (its closure and defaults).
        """
        if self.data or self.functions is None:
            return parts
        remaining = {}
        for name, part in parts.items():
            if not self.is_state(name.rpartition(".")[2], part, of):
                remaining[name] = part
            elif codes := self.code_in(part):
                remaining[name] = codes
        return remaining

    def is_state(self, name: str, part: Any, of: Any) -> bool:
        functions, depth = self.functions or [], _depth(part)
        is_data = depth > 0 or isinstance(part, str | bytes | Number | None)
        if any(each.stores(name, of) or (is_data and each.stores_unnamed(of)) for each in functions):
            return True
        return depth > min((each.levels(name, of) for each in functions), default=_ALL) if depth else False

    def code_in(self, container: Any) -> set[bytes]:
        """Return the digests of the functions and classes in a container that may change; of no other value."""
        items = container.values() if isinstance(container, dict) else container if _depth(container) else ()
        return {self.of(item) for item in items if isinstance(item, FunctionType | MethodType | type)}

    def of_code(self, value: Any) -> bytes:
        if isinstance(value, functools.partial):
            args, given = value.args, value.keywords
            if isinstance(value.func, FunctionType) and is_of_user(value.func):
                code = value.func.__code__
                names = code.co_varnames[: code.co_argcount]
                given = self.without_state(dict(zip(names, args, strict=False)) | given, code)
                args = args[len(names) :]
            return _hashed("partial", self.of(value.func), self.of(args), self.of_mapping(given))
        if isinstance(value, MethodType):
            return _hashed("method", self.of(value.__self__), self.of(value.__func__))
        if isinstance(value, CodeType):
            parts = [self.of(_without_docstring(value)), self.of(value.co_names), value.co_code]
            return _hashed("code", *parts, repr(_parameters_of(value)).encode())
        if not is_of_user(value):
            return _hashed("name", full_name(value).encode(), self.of(getattr(value, "__wrapped__", None)))
        return self.of_function(value) if isinstance(value, FunctionType) else self.of_class(value)

    def of_function(self, function: FunctionType) -> bytes:
        self.reached.append(_Function(function))
        code = function.__code__
        closure = dict(zip(code.co_freevars, map(_content, function.__closure__ or ()), strict=True))
        used = {}
        for part in _codes_in(code):
            for step in dis.get_instructions(part):
                if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in function.__globals__:
                    used[step.argval] = function.__globals__[step.argval]
        names = {name for part in _codes_in(code) for name in part.co_names}
        used |= _attributes_of_modules([*used.values(), *closure.values()], names)
        parts = (self.without_state(_defaults_of(function) | closure, code), self.without_state(used, "global"))
        return _hashed("function", self.of(code), *map(self.of_mapping, parts))

    def of_class(self, kind: type) -> bytes:
        members: dict[str, Any] = {}
        for name, member in vars(kind).items():
            if name.startswith("_abc_") or name in ("__doc__", "__module__", "__dict__", "__weakref__", "__slots__"):
                continue
            functions = [each for each in _functions_of(member) if each.__code__.co_filename != "<string>"]
            is_plain = isinstance(member, str | bytes | Number | tuple | frozenset | list | dict | set | type(None))
            if functions:
                members[name] = functions
            elif is_plain and not name.startswith("__"):
                members |= self.without_state({name: member}, kind)
        bases = [base for base in kind.__bases__ if base is not object]
        return _hashed("class", full_name(kind).encode(), self.of(bases), self.of_mapping(members))


class _Function:
    """What a function of the user's, and those in it, may change by name.

    Args:
        function: The function.
        owner: The class whose method it is. None (default): none.
    """

    def __init__(self, function: FunctionType, owner: type | None = None) -> None:
        self.function, self.owner = function, owner
        self.codes = [*_codes_in(function.__code__)]

    def stores(self, name: str, of: Any) -> bool:
        """Return whether it assigns to the name (`_Digest.without_state`)."""
        kinds = self.kinds(of)
        return any((kind, name) in _uses(code)[0] for code in self.codes for kind in kinds)

    def stores_unnamed(self, of: Any) -> bool:
        """Return whether it may assign to any name, as by setattr."""
        if isinstance(of, type) and (self.owner is None or "own attribute" in self.kinds(of)):
            storing = {"setattr", "__setattr__", "vars", "__dict__"}
        else:
            storing = {"globals"} if of == "global" else set()
        return any(not storing.isdisjoint(code.co_names) for code in self.codes)

    def mentions(self, name: str) -> bool:
        """Return whether it loads or assigns to an attribute of this name."""
        keys = [(kind, name) for kind in ("attribute", "own attribute")]
        return any(key in uses for code in self.codes for uses in _uses(code) for key in keys)

    def levels(self, name: str, of: Any) -> int:
        """Return how many levels of a container of this name stay as they are: 0 or less: it may be changed itself."""
        kinds = self.kinds(of)
        return min((_uses(code)[1].get((kind, name), _ALL) for code in self.codes for kind in kinds), default=_ALL)

    def kinds(self, of: Any) -> tuple[str, ...]:
        """Return which of the function's names may be those of `of`."""
        if of == "global":
            return ("global", "attribute")
        if isinstance(of, CodeType):
            return ("local",) if of in self.codes or self.function.__code__.co_freevars else ()
        related = self.owner is not None and (issubclass(of, self.owner) or issubclass(self.owner, of))
        is_making = self.function.__name__ in _MAKING
        return ("attribute", "own attribute") if related and not is_making else ("attribute",)


def _functions_beside(reached: "list[_Function]") -> "list[_Function]":
    """Return these functions, and all of the user's in their modules."""
    namespaces = {id(each.function.__globals__): each.function.__globals__ for each in reached}
    values = [value for namespace in namespaces.values() for value in list(namespace.values())]
    kinds = {value for value in values if isinstance(value, type) and is_of_user(value)}
    kinds |= {base for kind in kinds for base in kind.__mro__ if is_of_user(base)}
    methods = [
        _Function(function, kind)
        for kind in sorted(kinds, key=full_name)
        for member in list(vars(kind).values())
        for function in _functions_of(member)
        if not (function.__code__.co_filename == "<string>" and function.__name__.startswith("__"))  # of dataclasses
    ]
    owned = {each.function.__code__ for each in methods}
    functions = [*(each.function for each in reached), *(value for value in values if isinstance(value, FunctionType))]
    functions = [inspect.unwrap(function) for function in functions]
    plain = {function.__code__: function for function in functions if isinstance(function, FunctionType)}
    return [*methods, *(_Function(each) for code, each in plain.items() if code not in owned and is_of_user(each))]


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


def _depth(value: Any) -> int:
    """Return how many levels of lists, dicts and sets a value has."""
    if type(value) not in (list, dict, set, bytearray) and not isinstance(value, tuple):
        return 0
    items = value.values() if isinstance(value, dict) else value
    return (not isinstance(value, tuple)) + max(map(_depth, items), default=0)


@functools.lru_cache(maxsize=4096)
def _uses(code: CodeType) -> tuple[frozenset[tuple[str, str]], dict[tuple[str, str], int]]:
    """Return the names that code assigns to, and for each name that it loads how many levels of a container of this
    name stay as they are. Each name has its kind: "global", "local", "attribute", or "own attribute", of `self`.
    """
    steps = [part for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG" for part in _parts_of(step)]
    is_changing = any(
        kind in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
        or (kind in ("LOAD_METHOD", "LOAD_ATTR") and name in _CHANGING_METHODS)
        for kind, name, _ in steps
    )
    own = code.co_varnames[:1]
    stored: set[tuple[str, str]] = set()
    levels: dict[tuple[str, str], int] = {}
    for index, (opname, name, _) in enumerate(steps):
        action, _, rest = opname.partition("_")
        is_own = "ATTR" in rest and index > 0 and steps[index - 1][1:2] == own and "FAST" in steps[index - 1][0]
        kinds = {"GLOBAL": "global", "NAME": "global", "ATTR": "attribute", "METHOD": "attribute"}
        kind = "own attribute" if is_own else kinds.get(rest, "local" if re.search("FAST|DEREF", rest) else "")
        makes_closure = "FAST" in rest and name in code.co_cellvars + code.co_freevars  # from Python 3.13 on
        if not kind or not isinstance(name, str) or makes_closure:
            continue
        if action in ("STORE", "DELETE") and "FAST" not in rest and not (kind == "local" and name in code.co_cellvars):
            stored.add((kind, name))
        elif action == "LOAD" and rest != "METHOD":
            found = _levels_after(steps, index)
            found = _ALL if found > 0 and not is_changing else found
            levels[kind, name] = min(found, levels.get((kind, name), _ALL))
    return frozenset(stored), levels


def _levels_after(steps: list[tuple[str, Any, int]], index: int) -> int:
    """Return how many levels of the value that the step `index` loads stay as they are in the step that takes it: 0 or
    less if it may be changed itself.
    """
    opname, name, _ = steps[index + 1] if index + 1 < len(steps) else ("", None, 0)
    if opname in ("CONTAINS_OP", "UNARY_NOT", "TO_BOOL", "IS_OP", "FORMAT_VALUE", "FORMAT_SIMPLE") or "JUMP" in opname:
        return _ALL
    if opname in ("GET_ITER", "UNPACK_SEQUENCE", "LIST_EXTEND", "DICT_MERGE", "CALL_FUNCTION_EX"):
        return 1
    if opname in ("LOAD_METHOD", "LOAD_ATTR"):
        return -_ALL if name in _CHANGING_METHODS else _ALL if name in _READING else int(name in _HANDING_OUT)
    if (
        opname in ("PRECALL", "CALL")
        and name == 1
        and steps[index - 1][0] in ("LOAD_GLOBAL", "LOAD_METHOD", "LOAD_ATTR")
    ):
        return _ALL if steps[index - 1][1] in _READING else int(steps[index - 1][1] in _HANDING_OUT)
    height = 0  # of the stack above the value
    for following in range(index + 1, len(steps)):
        opname, name, effect = steps[following]
        if height == 1 and opname in ("BINARY_SUBSCR", "BINARY_OP [", "BINARY_SLICE"):
            return 1 + _levels_after(steps, following)
        if height == 1 and opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            return -_ALL
        height += effect
        if height <= 0:
            break
    return 0


def _parts_of(step: dis.Instruction) -> list[tuple[str, Any, int]]:
    """Return (operation, name or argument, change of the stack's height) of an instruction.

    Those that stand for two, such as LOAD_FAST_LOAD_FAST, become two.
    """
    if isinstance(step.argval, tuple) and "_FAST" in step.opname:
        kinds = re.findall("LOAD|STORE", step.opname)
        return [
            (f"{kind}_FAST", name, 1 if kind == "LOAD" else -1) for kind, name in zip(kinds, step.argval, strict=True)
        ]
    opname = "BINARY_OP [" if step.opname == "BINARY_OP" and step.argrepr.startswith("[") else step.opname
    return [(opname, step.argval, dis.stack_effect(step.opcode, step.arg, jump=False))]


def _defaults_of(function: FunctionType) -> dict[str, Any]:
    """Return the default values of a function's parameters, by name."""
    positional = function.__code__.co_varnames[: function.__code__.co_argcount]
    defaults = function.__defaults__ or ()
    return dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True)) | (
        function.__kwdefaults__ or {}
    )


def _attributes_of_modules(values: Iterable[Any], names: set[str]) -> dict[str, Any]:
    """Return what code with these names may read of the user's modules among the values, as MODULE.NAME."""
    found: dict[str, Any] = {}
    modules = [value for value in values if _is_module_of_user(value)]
    for module in modules:  # which grows by the modules of packages
        for name in sorted(names & vars(module).keys()):
            part = vars(module)[name]
            if f"{module.__name__}.{name}" not in found:
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
