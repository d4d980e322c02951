"""The sandbox: right programs pass, wrong ones do not, and no hostile one gets out or stays."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep

import pytest
from hostile_programs import CHEATS, HOSTILE, STOPPED

from dllm_rl.tasks.code import sandbox

RIGHT = "def f(x):\n    return x + 1"
TESTS = "assert f(1) == 2\nassert f(5) == 6"
ROOT = Path(__file__).parents[3]
FOLDER = Path(sandbox.__file__).parent  # there a process imports it alone
DEFAULT = ("fork bomb", "100 GB", "sleep", "1 GB of output", "a file outside", "tcp", "a signal to its group", "ptrace")
try:
    sandbox.require()
    MISSING = ""
except ValueError as error:
    MISSING = str(error)
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=MISSING)


@pytest.fixture
def marker(tmp_path, monkeypatch) -> str:
    """An empty folder that the sandbox has too, so that its path is in the command line of all processes in there."""
    monkeypatch.setattr(sandbox, "FOLDERS", [*sandbox.FOLDERS, str(tmp_path)])
    return str(tmp_path)


def living(marker: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [int(path.parent.name)] * (marker.encode() in path.read_bytes())
        except OSError:  # it has ended
            continue
    return sorted(found)


def attack_all(names, marker: str) -> None:
    facts = f"HOME = {str(Path.home())!r}\nREPOSITORY = {str(ROOT)!r}\nOUTSIDE = {marker!r}\n"

    def attack(name: str) -> tuple[bool, str]:
        code, expected = HOSTILE[name]
        program = f"{facts}def f(): return 'out'\n{code}"
        return sandbox.run("", program, "assert f() == 'out'", "f", 1 if expected == STOPPED else 60)

    with ThreadPoolExecutor(4) as pool:
        ended = dict(zip(names, pool.map(attack, names), strict=True))
    assert [name for name, (passed, _) in ended.items() if passed] == []
    unlike = {name: said[-300:] for name, (_, said) in ended.items() if not re.search(HOSTILE[name][1], said)}
    assert unlike == {}  # each met its own limit
    assert os.listdir(marker) == []
    while living(marker):
        sleep(0.01)
    assert sandbox.run("", RIGHT, TESTS, "f", 60) == (True, "")


@needs_sandbox
def test_eight_hostile_programs_end_in_their_limits_and_leave_nothing(marker) -> None:
    attack_all(DEFAULT, marker)


@pytest.mark.slow
@needs_sandbox
def test_sixty_hostile_programs_end_in_their_limits_and_leave_nothing(marker) -> None:
    assert len(HOSTILE) >= 60
    attack_all(HOSTILE, marker)


@pytest.mark.repeated(every=3)
@needs_sandbox
@pytest.mark.parametrize("name", CHEATS)
def test_a_program_that_pretends_does_not_pass(name) -> None:
    assert not sandbox.run("", CHEATS[name], TESTS, "f", 60)[0]


@needs_sandbox
def test_right_programs_pass_and_wrong_ones_do_not() -> None:
    """Plain data of each kind, a name of the prelude on both sides, an error, a number of calls, output."""
    values = [None, True, 3, -0.5, 1j, "a\n'\u2028é", b"\0", [1, (2,)], {1: {2}}, set(), {"k": []}]
    code = "from collections import Counter\ndef f(x):\n    print(x)\n    return Counter(x) if x == 'aab' else x"
    tests = (
        f"for x in {values!r}:\n    assert f(x) == x and type(f(x)) is type(x)\nassert f('aab') == {{'a': 2, 'b': 1}}"
    )
    tests += "\nassert f(x=float('inf')) == float('inf') and f(float('nan')) != 0"
    assert sandbox.run("", code, tests, "f", 60)[0]
    loud = "def f(x):\n    for i in range(9000): print('debug line', i)\n    return x + 1"  # more than `run` returns
    assert sandbox.run("", loud, TESTS, "f", 60)[0]
    for stream in ("sys.stdout.buffer.write(b'a')", "sys.stdout.reconfigure(line_buffering=True)"):
        assert sandbox.run("", f"import sys\n{stream}\n{RIGHT}", TESTS, "f", 60)[0]
    prelude = "import math\ndef double(x):\n    return 2 * x"
    assert sandbox.run(prelude, f"{prelude}\ndef f(x): return double(x)", "assert f(x := 2) == double(x)", "f", 60)[0]
    for wrong in ("def f(x): return x + 2", "def f(x): return 1 / 0", "def g(x): return x + 1", "def f(): return 2"):
        assert not sandbox.run("", wrong, TESTS, "f", 60)[0]
    assert not sandbox.run("", RIGHT, "f(1)\nassert False", "f", 60)[0]
    assert not sandbox.run("", RIGHT, "import sys\nsys.exit(0)", "f", 60)[0]  # tests that end early prove nothing


CHANGES = """
def f(what, *x, **named):
    match what:
        case "sort":
            x[0].sort()
        case "pop":
            return x[0].pop()
        case "reverse":
            x[0].reverse()
        case "append to both":
            x[0].append(1)
            return x[0] is x[1], len(x[1])
        case "return":
            return x[0][0], x[0]
        case "update":
            named["d"]["new"] = {"a": [1]}
            del named["d"]["old"]
            named["s"].add(frozenset({3}))
        case "fail":
            x[0].clear()
            raise KeyError(2**80)
        case "knot":
            x[0].append(x[0])
        case "others":
            x[0].rotate(1)
            x[1][0] = 7
            x[2].update("ab")
            x[3].move_to_end("a")
            x[4]["new"].append(1)
"""
CHANGED = """
a = [3, 1, 2]
f("sort", a)
assert a == [1, 2, 3]
assert f("pop", a) == 3 and a == [1, 2]
first, second = [1], [2]
rows = [first, second]
f("reverse", rows)
assert rows == [[2], [1]] and rows[0] is second and rows[1] is first and first == [1]
assert f("append to both", first, first) == (True, 2) and first == [1, 1]
inner, outer = f("return", rows)
assert inner is second and outer is rows
d, s = {"old": 1, "kept": 2}, {1}
f("update", d=d, s=s)
assert list(d.items()) == [("kept", 2), ("new", {"a": [1]})] and s == {1, frozenset({3})}
try:
    f("fail", a)
    assert False
except KeyError as error:
    assert error.args == (2**80,) and a == []
f("knot", a)
assert a[0] is a and len(a) == 1
from collections import *
x = deque([1, 2, 3], maxlen=3), bytearray(b"ab"), Counter("a"), OrderedDict(a=1, b=2), defaultdict(list)
f("others", *x)
assert x == (deque([3, 1, 2]), b"\\x07b", {"a": 2, "b": 1}, OrderedDict(b=2, a=1), {"new": [1]}) and x[0].maxlen == 3
assert f("pop", [(1, [2])]) == (1, [2])
"""


@needs_sandbox
def test_a_function_changes_the_arguments_of_its_caller() -> None:
    """Objects of every mutable kind, which stay the same objects, also where an error follows."""
    assert sandbox.run("", CHANGES, CHANGED, "f", 60) == (True, "")
    grows = "def f(x):\n    x.append(1)\n    return x[:-1]"
    for tests, passes in (("assert f(x) == [5] and x == [5, 1]", True), ("assert f(x) == [5] and x == [5]", False)):
        assert sandbox.run("", grows, f"x = [5]\n{tests}", "f", 60)[0] is passes


@needs_sandbox
def test_plain_data_of_derived_and_immutable_classes_is_passed() -> None:
    prelude = """
import collections, datetime, decimal, enum, fractions
Point = collections.namedtuple("Point", "x y")
class Color(enum.IntEnum):
    RED = 3
"""
    code = """
Point = collections.namedtuple("Point", "x y")
Other = collections.namedtuple("Other", "z")
def f(x):
    if x == "other":
        return Other(Point(1, [2]))
    if x == "odd":
        return Color.RED, type("T", (str,), {})("t"), collections.defaultdict(lambda: 0, a=1), {}.fromkeys("a")
    if isinstance(x, Point):
        assert type(x) is Point
        return x.y
    return x
"""
    tests = """
D = datetime.datetime(2020, 2, 29, 1)
values = [
    10**5000, -(2**53), 2**53 - 1, 1j, -0.0, b"\\xff\\0", "\\ud800", frozenset({1, (2, frozenset())}), range(3, 9, 2),
    collections.Counter("aab"), collections.OrderedDict(b=1, a=2), collections.deque([1], maxlen=2), bytearray(b"a"),
    fractions.Fraction(1, 3), decimal.Decimal("1.10"), D, D.date(), D.time(), D - D,
    datetime.timezone(D - D, "x"), D.replace(tzinfo=datetime.timezone.utc), {(1, 2): [None, True]},
    int, (str, KeyError), {bool: type},
]
for x in values:
    y = f(x)
    assert y == x and type(y) is type(x) and repr(y) == repr(x), type(x)
assert f(Point(1, (2, 3))) == (2, 3)
other = f("other")
assert other.z.x == 1 and type(other.z) is Point and other._fields == ("z",)
assert f("odd") == (3, "t", {"a": 1}, {"a": None}) and type(f("odd")[0]) is int
assert f(collections.defaultdict(list))["new"] == []
""".replace("repr(y) == repr(x)", "(type(x) is int or repr(y) == repr(x))")
    assert sandbox.run(prelude, f"{prelude}{code}", tests, "f", 60) == (True, "")
    refused = {"lambda: 1": "function", "iter([1])": "list_iterator", "{1: object()}": "object", "Color": "EnumType"}
    for argument, said in (refused | {"len": "builtin_function_or_method"}).items():
        tests = f"try: f({argument})\nexcept Exception: pass"  # what cannot be passed is no error of the function
        passed, output = sandbox.run(prelude, "def f(x): return x", tests, "f", 60)
        assert not passed and f"an argument is not plain data (TypeError('{said} is not plain data'))" in output


@needs_sandbox
def test_a_result_may_be_read_once_or_show_a_dict() -> None:
    code = """
def f(kind, x):
    match kind:
        case "generator": return (each for each in x)
        case "map": return map(str, x)
        case "keys": return x.keys()
        case "values": return x.values()
        case "items": return x.items()
        case "endless": return iter(int, 1)
        case "raises": return (1 / each for each in x)
"""
    tests = """
made = f("generator", [[1], 2])
assert list(made) == [[1], 2] and list(made) == [] and f("generator", [1]) != [1]
assert sorted(f("map", {2, 1})) == ["1", "2"]
d = {"a": 1, "b": 1}
assert f("keys", d) == {"a", "b"} and list(f("values", d)) == [1, 1] and f("items", d) == {("a", 1), ("b", 1)}
"""
    assert sandbox.run("", code, tests, "f", 60) == (True, "")
    assert not sandbox.run("", code, "f('raises', [0])", "f", 60)[0]
    assert not sandbox.run("", code, "next(f('endless', 0))", "f", 2)[0]


@needs_sandbox
def test_the_program_sees_the_interpreter_alone() -> None:
    code = """import os, sys
def f(): return sorted(os.listdir("/")), [*os.environ], sys.stdin.closed, os.getcwd(), os.path.exists(sys.executable)
"""
    folders = sorted({folder.split("/")[1] for folder in filter(os.path.isdir, sandbox.FOLDERS)})
    worked, said = sandbox.run("", code, f"assert f() == ({folders!r}, ['LC_CTYPE'], False, '/', False), f()", "f", 60)
    assert worked, said


@pytest.mark.slow
@needs_sandbox
def test_the_sandbox_ends_without_its_caller(marker) -> None:
    """The caller is killed; process 1 has its own alarm."""
    program = (
        "import sys\nfrom dllm_rl.tasks.code import sandbox\n"
        "sandbox.FOLDERS = [*sandbox.FOLDERS, sys.argv[1]]\nprint(flush=True)\n"
        "sandbox.run('', 'import time\\ntime.sleep(1000)', 'f()', 'f', 1)"
    )
    caller = subprocess.Popen([sys.executable, "-c", program, marker], stdout=subprocess.PIPE, cwd=ROOT)
    caller.stdout.readline()
    while len(living(marker)) < 4:  # the caller, unshare, and the two in the namespace
        sleep(0.01)
    inner = living(marker)[-1]
    for kind in ("user", "mnt", "net", "pid", "ipc", "uts"):
        assert os.readlink(f"/proc/{inner}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
    caller.kill()
    caller.communicate()
    while living(marker):
        sleep(0.01)


def test_without_the_tools_one_line_says_so(monkeypatch) -> None:
    monkeypatch.setattr(os, "defpath", "/nowhere")
    with pytest.raises(ValueError, match=r"No such file or directory: 'prlimit'.*use 'static'"):
        sandbox.require()


@needs_sandbox
def test_without_namespaces_one_line_says_so() -> None:
    """In a namespace that allows no further one, as where an administrator forbids them."""
    program = "import sandbox\ntry: sandbox.require()\nexcept ValueError as error: print(error)"
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    assert done.stdout == (
        "the sandbox needs Linux 5.12, unshare and user namespaces "
        "(unshare: unshare failed: No space left on device); use 'static'\n"
    )


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0 or not os.path.exists("/usr/bin/python3"), reason="needs root and another Python")
def test_an_ordinary_user_has_the_sandbox_too() -> None:
    program = "import sandbox\nsandbox.require()\nprint(sandbox.run('', 'open(\"/x\", \"w\")', 'f()', 'f')[1])"
    with TemporaryDirectory() as folder:  # pytest's own is closed to others
        os.chmod(folder, 0o755)
        shutil.copy(sandbox.__file__, folder)
        user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "/usr/bin/python3", "-c", program]
        done = subprocess.run(user, capture_output=True, text=True, cwd=folder)
    assert "Read-only file system: '/x'" in done.stdout, done.stderr


HEADERS = {"x86_64": "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "aarch64": "/usr/include/asm-generic/unistd.h"}
NAMES = (
    "execve execveat clone clone3 socket socketpair ptrace process_vm_readv process_vm_writev pidfd_getfd unshare "
    "setns shmget semget msgget add_key request_key keyctl bpf perf_event_open userfaultfd io_uring_setup memfd_create"
)


@pytest.mark.parametrize("machine", HEADERS)
def test_the_numbers_of_the_refused_calls_are_those_of_the_kernel_s_headers(machine) -> None:
    if not os.path.exists(HEADERS[machine]):
        pytest.skip(f"without {HEADERS[machine]}")
    known = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", Path(HEADERS[machine]).read_text()))
    names = NAMES.split() + ["fork", "vfork"] * (machine == "x86_64")
    architecture = {"x86_64": 62, "aarch64": 183}[
        machine
    ] | 0xC0000000  # AUDIT_ARCH_*: ELF machine, 64 bits, little end
    assert sandbox.DENIED[machine].split() == [str(architecture), *map(known.get, names)]


@needs_sandbox
def test_it_works_where_no_process_may_leave_a_core():
    """A hard limit of 0, which only the capability sys_resource could raise."""
    drop = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource"] if os.getuid() == 0 else []
    script = "import sandbox; sandbox.require()"
    command = ["prlimit", "--core=0:0", *drop, sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stderr


KNOWN = """
class Negative(ValueError):
    def __init__(self, number, why='no'):
        super().__init__(f'{number}: {why}')
        self.number = number
"""
OWN = "class Own(KeyError, ValueError): pass\n"


@pytest.mark.repeated(every=3)
@needs_sandbox
@pytest.mark.parametrize(
    ("prelude", "raises", "expected", "passes"),
    [
        # Name of what the program raises, of what the tests catch, and whether Python would catch it.
        ("", "ValueError('x')", "ValueError", True),
        ("", "NameError('x')", "ValueError", False),
        ("", "TypeError('x')", "TypeError", True),
        ("", "IndexError('x')", "LookupError", True),
        ("", "LookupError('x')", "IndexError", False),
        ("", "ZeroDivisionError()", "(OverflowError, ArithmeticError)", True),
        ("", "SyntaxError('x')", "ValueError", False),
        ("", "UnicodeDecodeError('ascii', b'x', 0, 1, 'why')", "UnicodeError", True),
        ("", "FileNotFoundError(2, 'no', 'a.txt')", "OSError", True),
        ("", "StopIteration(3)", "StopIteration", True),
        ("", "SystemExit(0)", "SystemExit", True),
        ("", "SystemExit(0)", "Exception", False),
        ("", "KeyboardInterrupt()", "KeyboardInterrupt", True),
        ("import json\n", "json.JSONDecodeError('x', 'y', 0)", "ValueError", True),
        ("import json\n", "ValueError()", "json.JSONDecodeError", False),
        ("import decimal\n", "decimal.InvalidOperation()", "ArithmeticError", True),
        (KNOWN, "Negative(-1)", "ValueError", True),
        (KNOWN, "ValueError(-1)", "Negative", False),
        ("", f"exec({OWN!r}, globals()) or Own()", "KeyError", True),
        ("", f"exec({OWN!r}, globals()) or Own()", "TypeError", False),
    ],
)
def test_tests_catch_what_python_would_catch(prelude, raises, expected, passes) -> None:
    """The same tests in one process, where program and tests share their classes, give the expected verdict."""
    code = f"{prelude}def f(x):\n    raise {raises}"
    tests = f"try:\n    f(1)\nexcept {expected}:\n    pass\nelse:\n    raise AssertionError"
    try:
        exec(f"{code}\n{tests}", {"__name__": "program"})
        caught = True
    except BaseException:
        caught = False
    assert caught == passes
    passed, said = sandbox.run(prelude, code, tests, "f", 60)
    assert passed == passes, said


@needs_sandbox
def test_an_exception_has_its_built_in_class_and_its_arguments() -> None:
    code = (
        f"import json\n{KNOWN}{OWN}"
        + """
def f(x):
    if x == 0: raise Negative(-1)
    if x == 1: raise KeyError('a')
    if x == 2: json.loads('{')
    if x == 3: raise Own(lambda: x)
    if x == 4: raise ValueError('a', 1)
    return x
"""
    )
    tests = """
found = []
for x in range(6):
    try:
        found.append(f(x))
    except Exception as error:
        found.append((type(error), str(error) if x != 3 else ''))
message = 'Expecting property name enclosed in double quotes: line 1 column 2 (char 1)'
assert found == [
    (ValueError, '-1: no'), (KeyError, "'a'"), (ValueError, message), (KeyError, ''), (ValueError, "('a', 1)"), 5
], found
"""
    passed, said = sandbox.run(KNOWN, code, tests, "f", 60)
    assert passed, said


RAISED = {
    "open('/nothing')": "(e.errno, e.filename, e.filename2)",
    "raise OSError(1, 'no', 'a', None, 'b')": "(str(e), e.args, e.filename, e.filename2)",
    "raise OSError(5, 'no')": "(type(e), str(e), e.filename)",
    "raise BlockingIOError(1, 'no', 5)": "e.characters_written",
    "b'\\xff'.decode()": "(str(e), e.encoding, e.object, e.start, e.end, e.reason)",
    "compile('a b', 'n', 'exec')": "(str(e), e.msg, e.filename, e.lineno, e.offset, e.text)",
    "import nothing_here": "(str(e), e.name, e.path)",
    "undefined": "(str(e), e.name)",
    "''.other": "(str(e), e.name, e.obj)",
    "raise KeyError((1, None), [2], {3: b'x'})": "e.args",
    "raise SystemExit": "e.code",
    "raise ValueError('a') from KeyError('b')": "(type(e.__cause__), e.__cause__.args, e.__suppress_context__)",
    "try: {}[1]\n    except KeyError: raise ValueError from None": "(type(e.__context__), e.__suppress_context__)",
    "e = ValueError()\n    e.add_note('n')\n    raise e": "e.__notes__",
    "raise ExceptionGroup('g', [ValueError(1), KeyError(x)])": "(e.message, [(type(x), x.args) for x in e.exceptions])",
    "x = [x]\n    raise ValueError([object()], x, x)": "(e.args[1:], e.args[1] is e.args[2])",
}  # fmt: skip


@needs_sandbox
def test_built_in_exceptions_keep_their_attributes() -> None:
    """The expected values are those of the same program in this process."""
    code = "def f(number, x=1):\n" + "".join(
        f"  if number == {number}:\n    {raised}\n" for number, raised in enumerate(RAISED)
    )
    namespace: dict = {}
    exec(code, namespace)
    tests = ""
    for number, seen in enumerate(RAISED.values()):
        try:
            namespace["f"](number)
        except BaseException as e:
            expected = eval(seen, {"e": e})
        tests += f"try:\n    f({number})\nexcept BaseException as e:\n    found = {seen}\n"
        tests += f"assert repr(found) == {repr(expected)!r}, found\n"
    passed, said = sandbox.run("", code, tests, "f", 60)
    assert passed, said


@needs_sandbox
def test_exceptions_are_plain_data() -> None:
    """They are results and arguments; one that is its own cause, or has a long chain of them, ends."""
    code = """
def f(x):
    if x == "new":
        return ValueError([1]), StopIteration(x)
    if isinstance(x, ValueError):
        return type(x), x.args
    if x == 1 or x == 0:
        error = TypeError("t")
        error.__cause__ = error
        raise error
    if x < 0:
        try: f(x + 1)
        except Exception as error: raise IndexError(x) from error
    try:
        raise KeyError(x)
    except KeyError:
        if x < 300: f(x + 1)
        raise
"""
    tests = """
error, stop = f("new")
assert type(error) is ValueError and error.args == ([1],) and stop.value == "new"
assert f(ValueError('x', (1,))) == (ValueError, ('x', (1,)))
for number, kind in ((1, TypeError), (2, KeyError), (-60, IndexError)):
    try:
        f(number)
    except kind as raised:
        assert raised.args == {1: ('t',), 2: (300,), -60: (-60,)}[number]
    else:
        assert False
"""
    passed, said = sandbox.run("", code, tests, "f", 60)
    assert passed, said


@needs_sandbox
@pytest.mark.parametrize(
    "code",
    [
        "def f(x):\n    return object()",
        "def f(x):\n    return lambda: x",
        "import os\ndef f(x):\n    os._exit(0)",
        "raise ValueError",
    ],
)
def test_tests_that_catch_everything_do_not_catch_the_end_of_the_program(code) -> None:
    assert not sandbox.run("", code, "try:\n    f(1)\nexcept BaseException:\n    pass", "f", 60)[0]


@needs_sandbox
def test_a_class_of_the_program_does_not_replace_a_function_of_the_tests() -> None:
    code = "class isinstance(ValueError): pass\ndef f(x):\n    if x == 0: raise isinstance\n    return 'text'"
    tests = "try:\n    f(0)\nexcept ValueError:\n    pass\nassert isinstance(f(1), {})"
    assert sandbox.run("", code, tests.format("str"), "f", 60)[0]
    assert not sandbox.run("", code, tests.format("int"), "f", 60)[0]
