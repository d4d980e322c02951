"""Which functions and objects are the same, by what a run computes with them."""

import functools
import importlib
import json
import linecache
import sys
import tempfile
from pathlib import Path

import pytest

from dllm_rl.identity import digest_of_code, digest_of_rows, digest_of_value
from dllm_rl.tasks import Countdown, Sudoku


def module_of(source: str) -> dict:
    """The names that a file of this text defines. Each file is another one."""
    file = Path(tempfile.mkdtemp()) / "mine.py"
    file.write_text(source)
    module: dict = {"__name__": "mine", "__file__": str(file)}
    exec(compile(source, str(file), "exec"), module)
    return module


def code_of(source: str):
    """The digest of the code of `f`, which the source defines."""
    return digest_of_code(module_of(source)["f"])


CLASS = """
class Grader:
    scale = 1.0
    def __init__(self, best): self.best, self.calls = best, 0
    def help(self, text): return self.best - len(text)
    def __call__(self, completions):
        self.calls += 1
        return list(map(self.help, completions))
f = Grader(2)
"""
TABLES = """
class Grader:
    def __init__(self, table, seen): self.table, self.seen = table, seen
    def __call__(self, completions):
        self.seen[completions] += self.table[completions]
        self.seen.pop(self.table['a'])
        return self.table['a']
f = Grader({'a': 1}, {'b': 2})
"""
CONTAINER = "class Table(dict):\n  def __call__(self, c): return len(c)\nf = Table()"
LIST = """
class Seen(list):
    def __init__(self, best): self.best = best
    def __call__(self, completions): return self.best
f = Seen(2)
"""
EXCEPTION = """
import functools
class Failed(Exception):
    def reward(self): return 1
def g(completions, state): return state.reward()
f = functools.partial(g, state=Failed())
"""
DIFFERENT = {
    "a sign": ("def f(c): return [len(t) for t in c]", "def f(c): return [-len(t) for t in c]"),
    "a constant": ("def f(c): return [1.0]", "def f(c): return [2.0]"),
    "an integer and a float": ("def f(c): return 1", "def f(c): return 1.0"),
    "a returned sign": ("def f(c): return -300", "def f(c): return 300"),
    "a set": ("def f(c): return c in {1, 2}", "def f(c): return c in {1, 3}"),
    "a called function": ("def f(c): return max(c)", "def f(c): return min(c)"),
    "a default": ("def f(c, k=1): return k", "def f(c, k=-1): return k"),
    "a keyword's default": ("def f(c, *, k=1): return k", "def f(c, *, k=-1): return k"),
    "a helper": ("g = lambda t: t\ndef f(c): return g(c)", "g = lambda t: -t\ndef f(c): return g(c)"),
    "a helper's helper": (
        "def h(t): return t\ndef g(t): return h(t)\ndef f(c): return g(c)",
        "def h(t): return -t\ndef g(t): return h(t)\ndef f(c): return g(c)",
    ),
    "a number of the module": ("K = 1\ndef f(c): return K", "K = -1\ndef f(c): return K"),
    "a table of the module": ("K = {'a': 1}\ndef f(c): return K[c]", "K = {'a': 2}\ndef f(c): return K[c]"),
    "a closure": ("def m(k):\n  return lambda c: k\nf = m(1)", "def m(k):\n  return lambda c: k\nf = m(2)"),
    "a nested function": ("def f(c): return map(lambda t: t, c)", "def f(c): return map(lambda t: -t, c)"),
    "a pattern": (
        "import re\nP = re.compile('a')\ndef f(c): return P",
        "import re\nP = re.compile('b')\ndef f(c): return P",
    ),
    "a partial": (
        "from functools import partial\ndef g(c, k): return k\nf = partial(g, k=1)",
        "from functools import partial\ndef g(c, k): return k\nf = partial(g, k=2)",
    ),
    "a table of a function that fills a list of its own": (
        "K = {'a': 1}\ndef f(c):\n  out = []\n  for t in c: out.append(K[t])\n  return out",
        "K = {'a': -1}\ndef f(c):\n  out = []\n  for t in c: out.append(K[t])\n  return out",
    ),
    "a table of a function that counts": (
        "K = {'a': 1}\ndef f(c):\n  n = {}\n  for t in c: n[t] += K[t]; n[K[t]] = 1; del n[K[0]]\n  return n",
        "K = {'a': -1}\ndef f(c):\n  n = {}\n  for t in c: n[t] += K[t]; n[K[t]] = 1; del n[K[0]]\n  return n",
    ),
    "an object's table, beside one that it fills": (TABLES, TABLES.replace("'a': 1", "'a': -1")),
    "an object's setting": (CLASS, CLASS.replace("(2)", "(3)")),
    "an object's method": (CLASS, CLASS.replace("self.best - ", "self.best + ")),
    "a class's number": (CLASS, CLASS.replace("1.0", "-1.0")),
    "a method of a dict that is called": (CONTAINER, CONTAINER.replace("len(c)", "-len(c)")),
    "a setting of a list that is called": (LIST, LIST.replace("(2)", "(3)")),
    "a method of an object that a partial has, whose constructor is a builtin's": (
        EXCEPTION,
        EXCEPTION.replace("return 1", "return 2"),
    ),
}
SAME = {
    "a comment and a place": ("def f(c): return [t for t in c]", "\n\ndef f(c):  # mine\n  return [t for t in c]"),
    "a docstring": ("def f(c):\n  'a'\n  return 1", "def f(c):\n  'b'\n  return 1"),
    "a function that is not used": ("def f(c): return 1", "def g(): return 2\ndef f(c): return 1"),
    "how the file starts a run": ("def f(c): return 1\nstr(5)", "def f(c): return 1\nrun = str(6)\nstr(run)"),
    "the number of steps beside a lambda": ("f, steps = [lambda c: 1, 50]", "f, steps = [lambda c: 1, 60]"),
    "steps around a function": (
        "def main(steps):\n  def f(c): return 1\n  return f\nf = main(5)",
        "def main(steps):\n  def f(c): return 1\n  return f\nf = main(6)",
    ),
    "an object's table that it fills": (TABLES, TABLES.replace("'b': 2", "'b': 3")),
    "an object's counter": (CLASS, f"{CLASS}f([])"),
    "the items of a list that is called": (LIST, f"{LIST}f.append(1)"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_code_that_computes_something_else_is_told_apart(name):
    first, second = map(code_of, DIFFERENT[name])
    assert first and second and first != second


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_number_is_not_told_apart(name):
    first, second = map(code_of, SAME[name])
    assert first == second is not None


def cases(text: str) -> dict[str, str]:
    """The programs of a text, each below its name."""
    parts = [part.partition("\n") for part in text.strip().removeprefix("# ").split("\n# ")]
    return {name: program for name, _, program in parts}


# Functions `f` with a state that they, or `other` beside them, change.
STATES = cases("""
# namespace
from types import SimpleNamespace
U = SimpleNamespace(calls=0)
def f(c):
    U.calls += 1
    return c
# namespace read
from types import SimpleNamespace
U = SimpleNamespace(calls=0)
def f(c):
    return U.calls
def other(c):
    U.calls += 1
def f2(c):
    other(c)
    return f(c)
# helper fills
L = []
def rec(log, x):
    log.append(x)
def f(c):
    rec(L, c)
    return len(L)
# callback fills
L = []
def other(x):
    L.append(x)
def f(c):
    return len(L)
# lambda fills
def make():
    seen = []
    def f(c):
        note = lambda text: seen.append(text)
        return note(c)
    return f
f = make()
# alias
L = []
add = L.append
def f(c):
    L.append(c)
    return c in L
# alias local
L = []
def f(c):
    out = L
    out.append(c)
    return c
# heap
import heapq
H = []
def f(c):
    heapq.heappush(H, c)
# nested
S = {"n": {"k": 0}}
def f(c):
    S["n"]["k"] += 1
    return c
# nested alias
S = {"n": []}
def f(c):
    seen = S["n"]
    seen.append(c)
    return c
# nested loop
S = [{"n": 0}, {"n": 0}]
def f(c):
    for s in S:
        s["n"] += 1
    return c
# counter
from collections import Counter
C = Counter()
def f(c):
    C.update([c])
    return C[c]
# defaultdict
from collections import defaultdict
C = defaultdict(list)
def f(c):
    C[c].append(1)
    return c
# iter
import itertools
I = itertools.count()
def f(c):
    return next(I)
# random
import random
R = random.Random(0)
def f(c):
    return R.random()
# closure nonlocal
def make():
    n = 0
    def f(c):
        nonlocal n
        n += 1
        return c
    return f
f = make()
# closure helper
def make():
    seen = []
    def rec(x):
        seen.append(x)
    def f(c):
        rec(c)
        return len(seen)
    return f
f = make()
# judge
class J:
    def __init__(self):
        self.used = []
        self.n = 0
        self.cost = {}
    def ask(self, x):
        self.used.append(x)
        self.n += 1
        self.cost[x] = 1
        return len(self.used)
j = J()
def f(c):
    return j.ask(c)
# judge outside
class J:
    calls = 0
    def ask(self, x):
        return x
j = J()
def f(c):
    j.calls += 1
    return j.ask(c)
# judge dataclass
from dataclasses import dataclass, field
@dataclass
class J:
    used: list = field(default_factory=list)
    n: int = 0
    def __call__(self, c):
        self.used.append(c)
        self.n += 1
        return c
f = J()
# judge setattr
class J:
    def __init__(self):
        self.n = 0
    def __call__(self, c):
        setattr(self, "n", self.n + 1)
        return c
f = J()
# judge dict
class J:
    def __init__(self):
        self.n = 0
    def __call__(self, c):
        self.__dict__["n"] = self.n + 1
        return c
f = J()
# judge reset
class J:
    def __init__(self):
        self.reset()
    def reset(self):
        self.n = 0
    def __call__(self, c):
        self.n += 1
        return c
f = J()
# judge lru
import functools
@functools.lru_cache
def g(x):
    return x
def f(c):
    return g(c)
# class counter
class J:
    n = 0
    seen = []
    def __call__(self, c):
        J.n += 1
        J.seen.append(c)
        return c
f = J()
# partial
from functools import partial
def g(c, log):
    log.append(c)
f = partial(g, log=[])
# partial pos
from functools import partial
def g(log, c):
    log.append(c)
f = partial(g, [])
# function attribute
def f(c):
    f.calls = getattr(f, "calls", 0) + 1
    return c
# global object
class S:
    pass
s = S()
s.n = 0
def f(c):
    s.n += 1
    return c
# augmented
L = []
def f(c):
    global L
    L += [c]
    return c
# attribute augmented
class J:
    def __init__(self):
        self.l = []
    def __call__(self, c):
        self.l += [c]
        return c
f = J()
# user list
class L(list):
    pass
l = L()
def f(c):
    l.append(c)
    return c
# user dict
class L(dict):
    def note(self, c):
        self[c] = 1
l = L()
def f(c):
    l.note(c)
    return c
# thread local
import threading
l = threading.local()
def f(c):
    l.x = 1
    return c
# queue
import queue
q = queue.Queue()
def f(c):
    q.put(c)
    return c
# bytearray
b = bytearray()
def f(c):
    b.extend(b"x")
    return c
# warm reassign
K = None
def f(c):
    global K
    if K is None:
        K = {"a": 1}
    return K
# tuple of list
T = ([],)
def f(c):
    T[0].append(c)
    return c
# list in slots
class J:
    __slots__ = ("l",)
    def __init__(self):
        self.l = []
    def __call__(self, c):
        self.l.append(c)
        return c
f = J()
# wrapped decorator
import functools
def counted(g):
    @functools.wraps(g)
    def w(c):
        w.calls += 1
        return g(c)
    w.calls = 0
    return w
@counted
def f(c):
    return c
# rng
import numpy as np
R = np.random.default_rng(0)
def f(c):
    return R.random()
# np array
import numpy as np
A = np.zeros(3)
def f(c):
    A[0] += 1
    return c
# torch
import torch
A = torch.zeros(3)
G = torch.Generator()
def f(c):
    A.add_(1)
    torch.rand(1, generator=G)
    return c
# deque
from collections import deque
D = deque(maxlen=3)
def f(c):
    D.append(c)
    return c
# globals()
N = 0
def f(c):
    globals()["N"] += 1
    return N
# setattr outside
class J:
    n = 0
j = J()
def f(c):
    setattr(j, "n", j.n + 1)
    return j.n
# type self
class J:
    n = 0
    def __call__(self, c):
        type(self).n += 1
        return self.n
f = J()
# lazy
class J:
    def __init__(self):
        self._model = None
    def __call__(self, c):
        if self._model is None:
            self._model = {"a": len}
        return c
f = J()
# dict counts
U = {"calls": 0, "by": {}}
def f(c):
    U["calls"] += 1
    U["by"][c] = U["by"].get(c, 0) + 1
    return c
# list of objects
class J:
    def __init__(self):
        self.n = 0
    def go(self):
        self.n += 1
L = [J(), J()]
def f(c):
    for j in L:
        j.go()
    return c
# for target
class J:
    def __init__(self):
        self.i = 0
    def __call__(self, c):
        for self.i in range(3):
            pass
        return c
f = J()
# slice
L = [1, 2, 3]
def f(c):
    L[:] = L[1:]
    return c
# shuffle
import random
L = [1, 2, 3, 4]
def f(c):
    random.shuffle(L)
    return c
# return it
L = []
def get():
    return L
def f(c):
    get().append(c)
    return c
# decorated class
import functools
class Count:
    def __init__(self, g):
        functools.update_wrapper(self, g)
        self.g = g
        self.calls = 0
    def __call__(self, c):
        self.calls += 1
        return self.g(c)
@Count
def f(c):
    return c
# async
SEEN = {}
async def f(c):
    SEEN[c] = 1
    return c
def other(c):
    try:
        f(c).send(None)
    except StopIteration:
        pass
# static
class J:
    log = []
    @staticmethod
    def note(x):
        J.log.append(x)
    @classmethod
    def score(cls, c):
        cls.note(c)
        return c
f = J.score
# module
import torch
class M(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Linear(2, 2)
        self.k = 1
    def forward(self, c):
        self.eval()
        return self.k
f = M()
# tensor attribute
import torch
class J:
    def __init__(self):
        self.total = torch.zeros(())
    def __call__(self, c):
        self.total += 1
        return c
f = J()
""")
# Functions `f` that read an "x" which nothing changes.
READ = cases("""
# nested items
T = {"a": ["x"]}
def f(c):
    return [k for k, v in T.items() if any(w in c for w in v)]
# nested in
T = {"a": ["x"]}
def f(c):
    return c in T["a"]
# list loop
T = ["x"]
def f(c):
    out = []
    for t in T:
        out.append(t)
    return out
# get
T = {"a": "x"}
def f(c):
    out = {}
    out[c] = T.get(c)
    return out
# object
class C:
    def __init__(self, k):
        self.k = k
    def __call__(self, c):
        return self.k
f = C("x")
# other class stores
class D:
    def up(self):
        self.k = 1
class C:
    def __init__(self, k):
        self.k = k
    def __call__(self, c):
        return self.k
f = C("x")
# local of that name
T = ["x"]
def g(a):
    T = []
    T.append(a)
    return T
def f(c):
    return c in T
# sorted
T = ["x"]
def f(c):
    return sorted(T)
# star
T = ["x"]
def f(c):
    return max(*T)
# module loop
T = {}
for i in "ab":
    T[i] = "x"
def f(c):
    return T[c]
# frozen
from dataclasses import dataclass
@dataclass(frozen=True)
class S:
    k: str = "x"
s = S()
def f(c):
    return s.k
# frozenset
T = frozenset(["x"])
def f(c):
    return c in T
# partial
from functools import partial
def g(c, t):
    return t[0]
f = partial(g, t=["x"])
# closure table
def make(t):
    def f(c):
        return t[0]
    return f
f = make(["x"])
# default table
def f(c, t=["x"]):
    return t[0]
# enum
import enum
class E(enum.Enum):
    A = "x"
def f(c):
    return E.A
# enum value
import enum
class E(enum.Enum):
    A = "x"
e = E.A
def f(c):
    return e
# f string
T = ["x"]
def f(c):
    return f"{T}"
# unpack
T = ["x", "y"]
def f(c):
    a, b = T
    return a
# join
T = ["x"]
def f(c):
    return " ".join(T)
""")


@pytest.mark.parametrize("name", STATES)
def test_state_is_not_code(name):
    module = module_of(STATES[name])
    before = digest_of_code(module["f"])
    for _ in range(2):
        module.get("other", str)("x")
        module["f"]("x")
    assert before and digest_of_code(module["f"]) == before


@pytest.mark.parametrize("name", READ)
def test_what_a_function_reads_is_told_apart(name):
    digests = [code_of(source) for source in (READ[name], READ[name].replace('"x"', '"y"'))]
    assert digests[0] and digests[0] != digests[1]


def test_code_of_libraries_has_no_digest_and_an_endless_reference_ends():
    assert [*map(digest_of_code, (max, json.dumps, functools.partial(len), Sudoku(), 1, "a", None, [dict]))] == [
        None
    ] * 8
    assert code_of("def f(c): return f(c)") and code_of("def g(c): return f(c)\ndef f(c): return g(c)")
    endless: list = [1]
    endless.append(endless)
    assert digest_of_value(endless) != digest_of_value([1, [1]])


def test_integers_of_any_length_have_digests():
    """Python writes no number of more than 4300 digits, unless it is asked for its hexadecimal ones."""
    long = 10**5000
    assert len({digest_of_value(value) for value in (long, -long, long + 1, hex(long))}) == 4
    assert digest_of_rows([{"n": long}]) == digest_of_rows([{"n": 10**5000}]) != digest_of_rows([{"n": long + 1}])


@pytest.mark.parametrize(
    ("task", "before", "after"),
    [
        (Countdown, {"numbers": [1, 2, 3], "target": 6}, {"numbers": [1, 2, 3], "target": 5}),
        (
            Sudoku,
            {"puzzle": "0234341221434321", "solution": "1234341221434321"},
            {"puzzle": "1034341221434321", "solution": "1234341221434321"},
        ),
    ],
)
def test_an_edited_file_of_a_task_is_told_apart(tmp_path, task, before, after):
    found = []
    for row in (before, before, after):
        (tmp_path / "mine.jsonl").write_text(json.dumps(row) + "\n")
        found.append(digest_of_value(task(path=str(tmp_path / "mine.jsonl")).content))
    assert found[0] == found[1] != found[2]


RULES = """
SIGN = {sign}
def score(text): return SIGN * len(text)
"""


@pytest.mark.parametrize("name", ["rules", "mine.rules"])
@pytest.mark.parametrize("source", ["import math, {}\ndef f(c): return {}.score(c)", "from {} import score as f"])
def test_code_counts_what_it_reads_of_the_users_modules(tmp_path, monkeypatch, name, source):
    """Through the module's name, as in `import rules; rules.score(text)`; of a package, also without an __init__."""
    digests = []
    for number, sign in enumerate((1, 1, -1)):  # each in a folder of its own, since a process reads a file once
        file = (tmp_path / str(number) / name.replace(".", "/")).with_suffix(".py")
        file.parent.mkdir(parents=True)
        file.write_text(RULES.format(sign=sign))
        with monkeypatch.context() as patch:
            patch.syspath_prepend(tmp_path / str(number))
            for module in ("mine", "mine.rules", "rules"):
                sys.modules.pop(module, None)
            importlib.invalidate_caches()
            digests.append(code_of(source.format(name, name)))
    assert digests[0] and digests[0] == digests[1] != digests[2]


def test_a_run_keeps_the_code_that_it_began_with_if_its_file_is_edited():
    module = module_of("def f(c): return 1")
    before = digest_of_code(module["f"])
    Path(module["__file__"]).write_text("def f(c): return 2")
    linecache.checkcache()  # as a traceback does
    assert digest_of_code(module["f"]) == before


def test_names_of_another_cell_of_a_notebook_count_by_their_values():
    first = module_of("def f(c): return K, g(c)")
    digests = []
    for value, source in (
        (1, "def g(c): return c"),
        (1, "def g(c): return c"),
        (2, "def g(c): return c"),
        (1, "g = str"),
    ):
        first |= {"K": value, "g": module_of(source)["g"]}
        digests.append(digest_of_code(first["f"]))
    assert digests[0] == digests[1] and len(set(digests)) == 3
