"""Which functions and objects are the same, by what a run computes with them."""

import functools
import importlib
import itertools
import json
import sys

import pytest

from dllm_rl.identity import digest_of_code, digest_of_rows, digest_of_value
from dllm_rl.tasks import Countdown, Sudoku


def code_of(source: str, name: str = "f"):
    """The digest of the code of `name`, which the source defines."""
    module: dict = {"__name__": "mine"}
    exec(compile(source, "mine.py", "exec"), module)
    return digest_of_code(module[name])


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
}
SAME = {
    "what the code remembers in a default": (
        "def f(c, seen={}):\n  seen[c] = 1\n  return c",
        "def f(c, seen={'a': 1}):\n  seen[c] = 1\n  return c",
    ),
    "what a nested function remembers in a default": (
        "def f(c, seen=[]):\n  def g(t): seen.append(t)\n  return map(g, c)",
        "def f(c, seen=['a']):\n  def g(t): seen.append(t)\n  return map(g, c)",
    ),
    "a comment, a place and names": (
        "def f(c): return [t for t in c]",
        "\n\ndef f(c):  # mine\n  return [u for u in c]",
    ),
    "a docstring": ("def f(c):\n  'a'\n  return 1", "def f(c):\n  'b'\n  return 1"),
    "a function that is not used": ("def f(c): return 1", "def g(): return 2\ndef f(c): return 1"),
    "a list that the function fills": (
        "K = []\ndef f(c):\n  K.append(c)\n  return 1",
        "K = [1]\ndef f(c):\n  K.append(c)\n  return 1",
    ),
    "a table that it fills": ("K = {}\ndef f(c):\n  K[c] = 1", "K = {1: 1}\ndef f(c):\n  K[c] = 1"),
    "a table of counts": (
        "K = {}\ndef f(c):\n  for t in c: K[t if t else 1] += len(t)",
        "K = {1: 1}\ndef f(c):\n  for t in c: K[t if t else 1] += len(t)",
    ),
    "a table of lists": ("K = {}\ndef f(c, t): K[c][t].append(1)", "K = {1: 1}\ndef f(c, t): K[c][t].append(1)"),
    "a table of which it deletes": ("K = {}\ndef f(c): del K[c]", "K = {1: 1}\ndef f(c): del K[c]"),
    "an object's table that it fills": (TABLES, TABLES.replace("'b': 2", "'b': 3")),
    "a counter": ("K = 0\ndef f(c):\n  global K\n  K += 1", "K = 9\ndef f(c):\n  global K\n  K += 1"),
    "an object's counter": (CLASS, f"{CLASS}f([])"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_code_that_computes_something_else_is_told_apart(name):
    first, second = map(code_of, DIFFERENT[name])
    assert first and second and first != second


@pytest.mark.parametrize("name", SAME)
def test_what_changes_no_number_is_not_told_apart(name):
    first, second = map(code_of, SAME[name])
    assert first == second is not None


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
calls = 0
def score(text):
    global calls
    calls += 1
    return SIGN * len(text)
def unused(text): return {sign}
"""


@pytest.mark.parametrize("package", [False, True])
def test_code_counts_what_it_reads_of_the_users_modules(tmp_path, monkeypatch, package):
    """Through the module's name, as in `import rules; rules.score(text)`; of a package, also without an __init__."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine").mkdir()
    folder, name = (tmp_path / "mine", "mine.rules") if package else (tmp_path, "rules")
    digests = []
    for sign, uses in zip((1, 1, -1, -1, 2, 2, 3), [*["score"] * 3, *["SIGN"] * 2, *["calls"] * 2], strict=True):
        (folder / "rules.py").write_text(RULES.format(sign=sign))
        for module in ("mine", "mine.rules", "rules"):
            sys.modules.pop(module, None)
        importlib.invalidate_caches()
        source = f"import math, {name}\ndef f(c): return math.sqrt({name}.{uses}" + ("(c))" if uses == "score" else ")")
        digests.append(code_of(source))
        assert code_of(f"{source}  # again") == digests[-1]
    same = [first == second for first, second in itertools.pairwise(digests)]
    assert same == [True, False, False, False, False, True]
