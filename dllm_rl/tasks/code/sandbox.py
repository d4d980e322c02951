"""Run a program and its tests in new namespaces (unshare, prlimit of util-linux), without network, files or processes.

In the sandbox, this file runs as process 1, which runs the tests. Its child, forked before the tests are read, runs the
program. The tests call the program's function through pipes and receive plain data (`Shared`), or an exception of the
built-in class that the function's exception has or is derived from, with the attributes of this class. What the
function changes in its arguments is changed in the tests' objects, too. So the program sees neither the tests nor the
token that proves that they passed, and no object of the program is compared. Two attacks remain possible: recognizing
calls and replying without computing, and a bug of the kernel. Each of the two processes may use the full memory
limit.
"""

import builtins
import ctypes
import importlib
import json
import os
import re
import signal
import struct
import subprocess
import sys
import types
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import suppress
from typing import Any

SECONDS = 5  # limit of a program and its tests, in wall time and in processor time
OUTPUT = 1 << 16  # bytes that `run` returns
LIMITS = ["--as=536870912", f"--fsize={OUTPUT << 8}", "--nofile=32", "--msgqueue=0"]
SPACES = ["--user", "--map-root-user", "--mount", "--net", "--pid", "--ipc", "--uts", "--fork", "--kill-child"]
FOLDERS = dict.fromkeys(("/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib"))  # of the interpreter
ROOT = b"/sys"  # mount point of the new root: exists on every machine, contains nothing of the interpreter
# By machine: the kernel's number of the architecture, then the numbers of the refused system calls. They are execve,
# execveat, clone, clone3, socket (a virtual machine's socket to its host ignores namespaces), socketpair, ptrace,
# process_vm_readv, process_vm_writev, pidfd_getfd, unshare, setns, shmget, semget, msgget, add_key, request_key,
# keyctl, bpf, perf_event_open, userfaultfd, io_uring_setup, memfd_create; on x86-64 also fork and vfork.
DENIED = {
    "x86_64": "3221225534 59 322 56 435 41 53 101 310 311 438 272 308 29 64 68 248 249 250 321 298 323 425 319 57 58",
    "aarch64": "3221225655 221 281 220 435 198 199 117 270 271 438 97 268 194 190 186 217 218 219 280 241 282 425 279",
}


def run(prelude: str, code: str, tests: str, entry_point: str, seconds: int = SECONDS) -> tuple[bool, str]:
    """Run the code and its tests, after the prelude.

    Returns:
        Whether the code defines the function `entry_point` and the tests pass with it; and its output, or the reason
        why the program was stopped.

    Raises:
        OSError: prlimit is missing.
    """
    import resource  # local: Windows lacks it

    token = os.urandom(16).hex()
    request = json.dumps((prelude, code, tests, entry_point, token)).encode()
    # A core dump limit of 1 byte prevents dumps, even if the kernel pipes them to a program. A hard limit of 0 stays 0.
    core = min(1, resource.getrlimit(resource.RLIMIT_CORE)[1] % 2**64)  # -1 means no limit
    command = [
        "prlimit",
        *LIMITS,
        f"--core={core}",
        f"--cpu={seconds}",
        "unshare",
        *SPACES,
        sys.executable,
        "-I",
        "-S",
        __file__,
    ]
    command += [str(seconds), *filter(os.path.isdir, FOLDERS)]
    with os.fdopen(os.memfd_create("output"), "rb") as output:
        try:
            process = subprocess.run(command, input=request, stdout=-1, stderr=output, env={}, timeout=seconds)
        except subprocess.TimeoutExpired:
            return False, f"stopped after {seconds} s"
        output_text = os.pread(output.fileno(), OUTPUT, 0).decode(errors="replace")
    return (process.returncode, process.stdout) == (0, token.encode()), output_text


def before_function(prelude: str, entry_point: str) -> str:
    """Return a prelude, up to the function `entry_point` if it ends within it, as a prompt may that a body follows."""
    try:
        compile(prelude, "prelude", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return re.split(rf"^(?:@.*\n)*def {re.escape(entry_point)}\b", prelude, maxsplit=1, flags=re.MULTILINE)[0]
    return prelude


def require() -> None:
    """Raise ValueError if a correct program does not pass in the sandbox."""
    try:
        passed, output_text = run("", "def f(x):\n    return x", "assert f(1) == 1", "f", 60)
    except (OSError, AttributeError) as error:  # AttributeError: no memfd, so not Linux
        passed, output_text = False, str(error)
    if not passed:
        reason = output_text.strip().rpartition("\n")[2]
        raise ValueError(f"the sandbox needs Linux 5.12, unshare and user namespaces ({reason}); use 'static'")


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library. Raises OSError if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[name](*arguments) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def enter(folders: list[str]) -> None:
    """Change to a root with only the folders, all read-only; the old root is unreachable."""
    call("mount", b"sandbox", ROOT, b"tmpfs", 0, b"size=1m")
    for folder in map(os.fsencode, folders):
        os.makedirs(ROOT + folder, exist_ok=True)
        call("mount", folder, ROOT + folder, None, 0x5000, None)  # MS_BIND | MS_REC: a bind mount of everything below
    call("syscall", 442, -100, ROOT, 0x8000, struct.pack("4Q", 7, 0, 0, 0), 32)  # mount_setattr: all read-only
    os.chdir(ROOT)
    call("pivot_root", b".", b".")
    call("umount2", b".", 2)
    os.chdir("/")


def confine() -> None:
    """Drop all capabilities, forbid new privileges, and refuse the system calls of DENIED by a seccomp filter."""
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    call("prctl", 38, 1, 0, 0, 0)
    architecture, *numbers = map(int, DENIED[os.uname().machine].split())
    # Instructions of the kernel's filter language (BPF): (code, jump if true, jump if false, value).
    refuse = (6, 0, 0, 0x50001)  # fail with EPERM
    # A call of another architecture kills the process; call numbers from 1 << 30 belong to x32 and are refused.
    instructions = [
        (32, 0, 0, 4),
        (21, 1, 0, architecture),
        (6, 0, 0, 1 << 31),
        (32, 0, 0, 0),
        (53, 0, 1, 1 << 30),
        refuse,
    ]
    for number in numbers:
        instructions += [(21, 0, 1, number), refuse]
    instructions.append((6, 0, 0, 0x7FFF0000))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in instructions))
    call("prctl", 22, 2, struct.pack("HP", len(instructions), ctypes.addressof(code)))


_KINDS = (Counter, OrderedDict, defaultdict, dict, list, set, bytearray, deque)  # a derived class before its base
MUTABLE: dict[str, Any] = {kind.__name__: kind for kind in _KINDS}
MAX_CHAIN = 10  # exceptions that are attributes of one another, such as the cause of a cause
CLASSES = {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type)}
_DESCRIPTORS = types.MemberDescriptorType, types.GetSetDescriptorType
# Immutable classes, by module and name. `__reduce__` gives the arguments that make an equal object.
VALUES = (
    ("builtins", "range"),
    ("fractions", "Fraction"),
    ("decimal", "Decimal"),
    *(("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
)
# Results whose items are passed, and make an object of the same kind: what is read once, or shows a dict.
SERIES: dict[str, tuple[Any, Any]] = {
    "keys": (KeysView, lambda items: dict.fromkeys(items).keys()),
    "values": (ValuesView, lambda items: dict(enumerate(items)).values()),
    "items": (ItemsView, lambda items: dict(items).items()),
    "iterator": (Iterator, iter),
}


class Shared:
    """Plain data of one call as JSON, for both processes.

    Plain data are None, numbers, texts, bytes, the containers of MUTABLE, tuples (named ones, too), frozensets,
    Python's built-in classes, exceptions and VALUES. An object of a derived class becomes one of its plain base class.
    A mutable object is written once and then referred to by its index, so that the reply can change the caller's
    objects and return them.

    Args:
        namespace: Names of the process, among which named tuples have their class.
    """

    def __init__(self, namespace: Mapping[str, Any]) -> None:
        self.namespace = namespace
        self.objects: list[Any] = []
        self.indices: dict[int, int] = {}  # of an object's id
        self.chain = 0  # exceptions that are being packed

    def pack(self, value: Any) -> Any:
        """Return a value as JSON. Raises TypeError if it is not plain data."""
        if value is None or isinstance(value, bool | float | str):
            return value
        if isinstance(value, int):  # JSON and Python limit the decimal digits of integers
            return value if abs(value) < 1 << 53 else ["int", hex(value)]
        if isinstance(value, complex):
            return ["complex", value.real, value.imag]
        if isinstance(value, bytes):
            return ["bytes", value.decode("latin-1")]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return ["namedtuple", type(value).__name__, list(value._fields), *map(self.pack, value)]
        if isinstance(value, tuple | frozenset):
            return ["tuple" if isinstance(value, tuple) else "frozenset", *map(self.pack, value)]
        if id(value) in self.indices:
            return ["shared", self.indices[id(value)]]
        for name, kind in MUTABLE.items():
            if isinstance(value, kind):
                self._share(value)
                return [name, self._extra(value), *self._contents(value)]
        if type(value) is type and CLASSES.get(value.__name__) is value:
            return ["class", value.__name__]
        if isinstance(value, BaseException):
            return self._pack_error(value)
        key = type(value).__module__, type(value).__name__
        if key in VALUES:
            return ["value", *key, *map(self.pack, value.__reduce__()[1])]
        raise TypeError(f"{type(value).__name__} is not plain data")

    def pack_result(self, value: Any) -> Any:
        """Return the result of a call as JSON, which may also be one of SERIES: the caller reads it, and nobody else.

        As an argument it is refused, because what the function reads of it would be left for the caller.
        """
        for name, (series, _) in SERIES.items():
            if isinstance(value, series):
                return [name, *map(self.pack, value)]
        return self.pack(value)

    def unpack(self, packed: Any) -> Any:
        """Return the value that `pack` wrote. Raises an exception of some kind if nothing wrote it so."""
        if not isinstance(packed, list):
            return packed
        kind, *parts = packed
        match kind:
            case "shared":
                return self.objects[parts[0]]
            case "int":
                return int(parts[0], 16)
            case "complex":
                return complex(*parts)
            case "bytes":
                return parts[0].encode("latin-1")
            case "tuple":
                return tuple(map(self.unpack, parts))
            case "frozenset":
                return frozenset(map(self.unpack, parts))
            case "namedtuple":
                name, fields, *items = parts
                return self._tuple_class(name, fields)._make(map(self.unpack, items))
            case "class":
                return CLASSES[parts[0]]
            case "error":
                return self._unpack_error(*parts)
            case "value":
                module, name, *items = parts
                if (module, name) not in VALUES:
                    raise ValueError(f"{module}.{name} is not one of VALUES")
                return getattr(importlib.import_module(module), name)(*map(self.unpack, items))
            case _ if kind in SERIES:
                return SERIES[kind][1]([*map(self.unpack, parts)])
        extra, *contents = parts
        value: Any
        if kind == "deque":
            value = deque(maxlen=extra)
        elif kind == "defaultdict":
            value = defaultdict(vars(builtins)[extra] if extra else None)
        else:
            value = MUTABLE[kind]()
        self._share(value)
        self._fill(value, contents)
        return value

    def pack_objects(self) -> list[Any]:
        """Return the contents of the objects that are shared so far, as JSON."""
        return [self._contents(value) for value in self.objects[:]]

    def unpack_objects(self, packed: list[Any]) -> None:
        """Change the contents of the shared objects to those of the other process."""
        for value, contents in zip(self.objects[: len(packed)], packed, strict=True):
            self._fill(value, contents)

    def _pack_error(self, error: BaseException) -> Any:
        """Return an exception as JSON: the name of its built-in class, its arguments and its attributes."""
        kind = next(kind for kind in type(error).__mro__ if CLASSES.get(kind.__name__) is kind)
        values: dict[str, Any] = {name: getattr(error, name, None) for name in _attributes(kind)}
        self.chain += 1
        try:
            arguments = [self._pack_or(part, lambda part: str(part)) for part in error.args]
            if issubclass(kind, BaseExceptionGroup):  # it cannot be made without the exceptions that it contains
                arguments = [*map(self.pack, (values.pop("message"), list(values.pop("exceptions") or ())))]
            attributes = {name: self._pack_or(value, lambda _: None) for name, value in values.items()}
        finally:
            self.chain -= 1
        return [
            "error",
            kind.__name__,
            arguments,
            {name: each for name, each in attributes.items() if each is not None},
        ]

    def _pack_or(self, value: Any, otherwise: Callable[[Any], Any]) -> Any:
        """Return a part of an exception as JSON; that of another value where it is not plain data."""
        num_objects = len(self.objects)
        try:
            if self.chain > MAX_CHAIN:
                raise TypeError("a chain of exceptions without an end")
            return self.pack(value)
        except (TypeError, ValueError, RecursionError):
            for lost in self.objects[num_objects:]:
                del self.indices[id(lost)]
            del self.objects[num_objects:]
            return otherwise(value)

    def _unpack_error(self, name: str, arguments: list[Any], attributes: dict[str, Any]) -> BaseException:
        kind: Any = CLASSES[name]
        if not issubclass(kind, BaseException):
            raise ValueError(f"{name} is not an exception")
        parts = tuple(map(self.unpack, arguments))
        # Not `__init__`, which of some classes needs other arguments; and `OSError` would choose a derived class.
        error: BaseException = kind.__new__(kind, *parts if issubclass(kind, BaseExceptionGroup) else ())
        error.args = parts
        for attribute in filter(attributes.__contains__, _attributes(kind)):
            setattr(error, attribute, self.unpack(attributes[attribute]))
        return error

    def _tuple_class(self, name: str, fields: list[str]) -> Any:
        """Return the class of a named tuple: the one of this process, if its fields are equal."""
        known = self.namespace.get(name)
        is_tuple = isinstance(known, type) and issubclass(known, tuple)
        return known if is_tuple and list(getattr(known, "_fields", ())) == fields else namedtuple(name, fields)

    def _share(self, value: Any) -> None:
        self.indices[id(value)] = len(self.objects)
        self.objects.append(value)  # also keeps it alive, so that no other object gets its id

    def _extra(self, value: Any) -> Any:
        """Return what makes an empty object equal but for its contents."""
        if isinstance(value, deque):
            return value.maxlen
        factory: Any = getattr(value, "default_factory", None)
        is_builtin = isinstance(factory, type) and vars(builtins).get(factory.__name__) is factory
        return factory.__name__ if is_builtin else None

    def _contents(self, value: Any) -> list[Any]:
        return list(map(self.pack, value.items() if isinstance(value, dict) else value))

    def _fill(self, value: Any, contents: list[Any]) -> None:
        """Replace the contents of an object, which no class of the tests may redefine."""
        items = list(map(self.unpack, contents))
        kind = next(kind for kind in MUTABLE.values() if isinstance(value, kind))
        kind.clear(value)
        if isinstance(value, dict):
            for key, item in items:
                kind.__setitem__(value, key, item)  # `Counter.update` would add
        elif isinstance(value, set):
            set.update(value, items)
        else:
            kind.extend(value, items)


def _attributes(kind: type[BaseException]) -> list[str]:
    """Return the names of what the exceptions of a built-in class have besides their arguments."""
    described = (name for base in kind.__mro__ for name, value in vars(base).items() if isinstance(value, _DESCRIPTORS))
    own = ("__notes__", "__context__", "__cause__", "__suppress_context__")  # a cause is set before it is suppressed
    return [*(name for name in described if not name.startswith("__")), *own]


# `exec` below runs an untrusted program. It must run only after `enter`, where nothing of the machine is reachable.
def serve(requests: Any, replies: Any) -> None:
    """In the child, run the program, then reply to calls of its function with [objects, whether it raised, data].

    The data is what the function returned, or the exception. `objects` are the contents of the mutable
    objects among the call's arguments.
    """
    code, entry_point = json.loads(requests.readline())
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(code, namespace)
    for line in requests:
        shared = Shared(namespace)
        arguments, keywords = shared.unpack(json.loads(line))
        try:
            raised, value = False, namespace[entry_point](*arguments, **keywords)
        except BaseException as error:
            raised, value = True, error
        try:
            reply = json.dumps([shared.pack_objects(), raised, shared.pack_result(value)])
        except (TypeError, ValueError, RecursionError) as error:
            reply = str(error)
        print(reply, file=replies, flush=True)


def judge(requests: Any, replies: Any) -> str:
    """In process 1, run the tests, which raise if one fails, and return the token."""
    prelude, code, tests, entry_point, token = json.load(sys.stdin)
    print(json.dumps((code, entry_point)), file=requests, flush=True)
    namespace: dict[str, Any] = {"__name__": "tests"}

    def function(*arguments: Any, **keywords: Any) -> Any:
        shared = Shared(namespace)
        reason = "an argument is not plain data"
        try:
            call_text = json.dumps(shared.pack((arguments, keywords)))
            with suppress(BrokenPipeError):  # the program has ended: there is no reply to read
                print(call_text, file=requests, flush=True)
            line = replies.readline(1 << 24)
            reason = f"a reply is not plain data: {line[:200]!r}" if line else "the program ended without a reply"
            objects, raised, packed = json.loads(line)
            shared.unpack_objects(objects)
            value = shared.unpack(packed)
            assert not raised or isinstance(value, BaseException)
        except Exception as problem:  # of any kind: a program may write any reply
            print(f"{reason} ({problem!r})", file=sys.stderr, flush=True)
            os._exit(1)  # an exception could be one that the tests expect
        if raised:
            raise value
        return value

    exec(before_function(prelude, entry_point), namespace)
    namespace[entry_point] = function
    exec(tests, namespace)
    return token


def main() -> None:
    enter(sys.argv[2:])
    os.setsid()  # a signal to the old group would leave the namespace
    signal.signal(signal.SIGALRM, lambda *_: os._exit(1))
    signal.alarm(int(sys.argv[1]) + 1)  # in case the caller was killed
    verdict_fd = os.dup(1)
    os.dup2(2, 1)
    request_in, request_out = os.pipe()
    reply_in, reply_out = os.pipe()
    child = os.fork()
    for fd in (request_in, reply_out) if child else (0, verdict_fd, request_out, reply_in):
        os.close(fd)
    confine()
    if child:
        os.write(verdict_fd, judge(os.fdopen(request_out, "w"), os.fdopen(reply_in)).encode())
    else:
        serve(os.fdopen(request_in), os.fdopen(reply_out, "w"))
    os._exit(0)


if __name__ == "__main__":
    main()
