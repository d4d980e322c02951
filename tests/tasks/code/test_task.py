"""Problems in the forms of HumanEval and MBPP, code from completions, and the reward that runs nothing."""

import json
import sys
from dataclasses import replace
from threading import Barrier

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import linear_time

from dllm_rl.tasks import Code, Task
from dllm_rl.tasks.code import sandbox
from dllm_rl.tasks.code.task import NUM_PARALLEL, program, sandboxed, static

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\ndef half(x):\n    return x / 2\n\ndef area(r: float, k=1):\n    """k times pi r**2"""\n',
    "entry_point": "area",
    "canonical_solution": "    return k * math.pi * r**2\n",
    "test": "def check(candidate):\n    assert abs(candidate(2.0) - 12.57) < half(1)\n    assert candidate(0, 3) == 0",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function to count letters.",
    "code": "from collections import Counter\ndef low(s): return s.lower()\ndef letters(s): return Counter(low(s))",
    "test_list": ["assert letters('aB') == {'a': 1, 'b': 1}", "assert letters('') == {}"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
SANITIZED = {key: MBPP[key] for key in ("task_id", "code", "test_list")} | {
    "prompt": MBPP["text"],
    "test_imports": ["import math"],
}
FIELDS = {"prelude": "", "entry_point": "f", "arguments": 2, "tests": ""}
try:
    sandbox.require()
    MISSING = ""
except ValueError as error:
    MISSING = str(error)


def task_of(tmp_path, *rows, **settings) -> Code:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"  # a file that was read is remembered
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Code(path=path, **settings)


def test_problems_of_both_forms(tmp_path) -> None:
    task = task_of(tmp_path, HUMANEVAL, MBPP, SANITIZED)
    assert isinstance(task, Task) and len(task) == 3
    assert task[0].prompt[0]["content"].endswith(f"and nothing else.\n\n{HUMANEVAL['prompt']}")
    assert task[0].fields == {
        "prelude": HUMANEVAL["prompt"],
        "entry_point": "area",
        "arguments": 2,
        "tests": f"{HUMANEVAL['test']}\ncheck(area)",
    }
    tests = "\n".join(MBPP["test_list"])
    assert task[1].prompt[0]["content"].endswith(f"count letters.\nIt must pass these tests:\n{tests}")
    assert task[1].fields == {"prelude": "", "entry_point": "letters", "arguments": 1, "tests": tests}
    assert task[2].fields["prelude"] == "import math\n"
    for problem in task:
        graded = task.reward(problem, problem.solution)
        assert (graded.value, graded.parsed) == (1.0, True)
        assert task.reward(problem, "").value < 1.0
    plain = task_of(tmp_path, HUMANEVAL, prompt_format="{question}", chat=False)[0]
    assert plain.prompt == HUMANEVAL["prompt"]


@pytest.mark.parametrize("drop", ["prompt", "test", "canonical_solution", "code", "test_list", "text"])
def test_a_row_of_another_form_is_refused_by_its_line(tmp_path, drop) -> None:
    row = {key: value for key, value in (HUMANEVAL if drop in HUMANEVAL else MBPP).items() if key != drop}
    with pytest.raises(ValueError, match=r"0\.jsonl, line 2: no problem in the form of HumanEval or MBPP"):
        len(task_of(tmp_path, MBPP, row))
    with pytest.raises(ValueError, match="line 1: no problem"):
        len(task_of(tmp_path, MBPP | {"code": "def f("}))
    with pytest.raises(ValueError, match="line 1: no problem"):  # no test calls a function of the solution
        len(task_of(tmp_path, MBPP | {"test_list": ["assert g(1)"]}))


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("def f(a, b):\n    return a\n", "\ndef f(a, b):\n    return a\n"),
        ("A:\n```python\ndef f(a): return 1\n```\n```\ndef f(a): pass\n```\n\n```\nf(1)\n```", "\ndef f(a): pass\n"),
        ("def f(a): return 1\n```\nThat is all.", "\ndef f(a): return 1\n"),  # the prompt's opening has the fence
        ("    return 1\n\ndef g(): pass\n", "    return 1\n"),
        ("```py\n    return 1\n```\nas asked", "    return 1\n"),
        ("Sure:\n```python\n    return 1\n```", "    return 1\n"),  # the sentence before the fence is no code
        ("    return 1\n<|endoftext|>def f(a): return 2", "    return 1\n"),
        ("    return fg\nprint(f(1))", "    return fg"),
        ("```python \ndef f(a): return 1\n```", "\ndef f(a): return 1\n"),
        ("```python\r\ndef f(a): return 1\r\n```", "\ndef f(a): return 1\r\n"),
        ("```python3.11\ndef f(a): return 1\n```", "\ndef f(a): return 1\n"),
        ("```{python}\ndef f(a): return 1\n```", "\ndef f(a): return 1\n"),
        ("``` python\ndef f(a): return 1\n```", "\ndef f(a): return 1\n"),
        ("So:\n~~~  Python3 \r\ndef f(a): return 1\n~~~", "\ndef f(a): return 1\n"),
        ("    py = 1\n    return py\n", "    py = 1\n    return py\n"),
        ("1. So:\n   ```python\n   def f(a):\n       return 1\n   ```", "\ndef f(a):\n    return 1\n"),
        ("~~~python\ndef f(a): return 1\n~~~\nok", "\ndef f(a): return 1\n"),
        ("````md\n```\n````\n```python copy=1\ndef f(a): return 1\n```", "\ndef f(a): return 1\n"),
        ("````python\ndef f(a): return '```'\n````", "\ndef f(a): return '```'\n"),
        ("```python\nK = 1\n# ```\n# f\n# ```\ndef f(a): pass\n```", "\nK = 1\n# ```\n# f\n# ```\ndef f(a): pass\n"),
        ("", ""),
        ("``````", ""),
    ],
)  # fmt: skip
def test_the_code_of_a_completion(completion, code) -> None:
    assert program(FIELDS | {"prelude": "P"}, completion) == "P" + code


TRIPLE = "def triple(number):\n    return 3 * number\n"
FUTURE = "from __future__ import annotations"


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize(
    ("prelude", "completion", "value"),
    [
        ("import re\n", f'"""\n{FUTURE}\n"""\n# so\nfrom __future__ import (annotations,\n division)\n{TRIPLE}', 1.0),
        (f'"""Text."""\n{FUTURE}\nimport math\n', f"from __future__ import division; import re\n{TRIPLE}", 1.0),
        ("import math\n", f"```python\nimport re\n{FUTURE}\n{TRIPLE}```", 0.0),  # no Python either: too late
        ("@str\ndef triple(number):\n    # three times\n", f"```python\nimport re\n{TRIPLE}```", 1.0),
        ("def triple(number):\n    return (\n", f"```python\n{TRIPLE}```", 1.0),
        ("def triple(number): pass\n\ndef by(n):\n    return 3 * n\n", "```\ndef triple(n): return by(n)\n```", 1.0),
        ("", '```\ndef triple(n):\n    """\n   ```\n    def triple(n): 1\n   ```\n    """\n    return n * 3\n```', 1.0),
        ("def triple(n):\n", '    """It is\n    ```\n    3 * n\n    ```\n    """\n    return 3 * n\n```\nDone.', 1.0),
    ],
)  # fmt: skip
def test_right_programs_of_any_form_pass(prelude, completion, value) -> None:
    tests = "assert triple(2) == 6 and triple(-1) == -3"
    fields = {"prelude": prelude, "entry_point": "triple", "arguments": 1, "tests": tests}
    assert sandboxed(fields, completion).value == value, program(fields, completion)


GOOD = "import math\ndef f(a, b=1):\n    return [math.sqrt(x) for x in a] + [b]"


@pytest.mark.parametrize(
    ("code", "failed"),
    [
        (GOOD, set()),
        ("class A:\n    def __init__(self, x): self.x = x\ndef f(a, b):\n    yield A(a).x", set()),
        ("from collections import Counter as C\ndef f(a, /, b, *c):\n    return C(a)", set()),
        ("def f(a, b):\n    try: return a\n    except ValueError as e: return e", set()),
        ("def f(a, b):\n    match a:\n        case [x, *_]: return x\n        case y: return (lambda z: z)(y)", set()),
        ("def f(a, b): return '\\d'", set()),
        ("def f(a, b): pass", {"signature"}),  # an empty body returns nothing
        ("def f(a): return a", {"signature"}),
        ("def f(a, b, c): return a", {"signature"}),
        ("def g(a, b): return a", {"signature"}),
        ("def f(a, b): return c", {"names"}),
        ("from math import *\ndef f(a, b): return sqrt(a)", {"names"}),
        ("def f(a, b): return dict(c=a)[c]", {"names"}),
        ("def f(a, b):\n    match a:\n        case [x, *rest]: return rest", set()),
        ("def f(a, b):\n    match a:\n        case {'x': x, **rest}: return rest", set()),
        ("async def g(a): return a\ndef f(a, b): return g(a)", set()),
        ("def f(*numbers): return sum(numbers)", set()),
        ("def f(a, b, c, *more): return a", {"signature"}),
        ("def f(a, b): yield from a", set()),
        ("def f(a, b, *, c=1): return a", set()),
        ("def f(a, b, *, c): return a", {"signature"}),
        ("import os\ndef f(a, b): return os", {"allowed"}),
        ("import collections, os.path as p\ndef f(a, b): return p", {"allowed"}),
        ("from subprocess import run\ndef f(a, b): return run", {"allowed"}),
        ("from .math import run\ndef f(a, b): return run", {"allowed"}),
        ("def f(a, b): return eval(a)", {"allowed"}),
        ("def f(a, b):\n    g = open\n    return g(a)", {"allowed"}),
        ("def f(a, b): return a.__class__.__bases__", {"allowed"}),
        ("import os\ndef f(a): return c", {"signature", "names", "allowed"}),
        ("def f(a, b) return a", {"parses", "signature", "names", "allowed"}),
        ("def f(a, b): return '\\d'\n" + "#" * 20_000, {"parses", "signature", "names", "allowed"}),  # too long
    ],
)
def test_the_four_checks(code, failed, recwarn) -> None:
    graded = static(FIELDS, code)
    assert {name for name, value in graded.breakdown.items() if not value} == failed
    assert graded.value == 1 - len(failed) / 4 and graded.parsed == ("parses" not in failed)
    assert not recwarn.list


PIECES = [
    "```",
    "```python\n",
    "def f(a, b):\n",
    "    return ",
    "\n",
    " ",
    "(",
    ")",
    "[" * 300,
    "lambda: " * 200,
    "eval(",
]
PIECES += [
    "import os",
    "import math\n",
    "x",
    "\\",
    "'",
    '"""',
    "\x00",
    "\ud800",
    "\t",
    "-" * 5000,
    "a." * 3000,
    "9" * 5000,
]
PIECES += ["def f(", "match a:", "f'{", "async ", "class ", "<|eot_id|>", "\f", "\u2028", "1+" * 4000, "not " * 3000]
SEEN: list[tuple] = []
WATCHING: list[bool] = []


def _listen(event: str, arguments: tuple) -> None:
    if arguments[:1] == ("<unknown>",):  # the interpreter looks for a file of this name to show an error's line
        return
    if WATCHING and event.startswith(("exec", "import", "open", "os.", "subprocess.", "socket.", "ctypes.")):
        SEEN.append((event, *arguments))


@pytest.mark.slow
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=12), wild=st.text(max_size=20))
@settings(max_examples=1000, deadline=None)
def test_a_thousand_hostile_completions_run_nothing_and_do_not_pass(pieces, wild) -> None:
    if not SEEN and not WATCHING:
        sys.addaudithook(_listen)
    WATCHING.append(True)
    graded = static(FIELDS, "".join(pieces) + wild)
    WATCHING[:] = [False]
    WATCHING.clear()
    assert SEEN == []
    assert 0.0 <= graded.value < 1.0
    assert graded.parsed or graded.value == 0.0


@pytest.mark.slow
def test_a_million_characters_take_linear_time() -> None:
    for piece in PIECES:
        with linear_time():
            assert static(FIELDS, piece * (10**6 // len(piece))).value < 1.0


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_the_sandbox_s_reward_is_the_tests(tmp_path) -> None:
    task = task_of(tmp_path, HUMANEVAL, MBPP, SANITIZED, reward_rule="sandbox")
    problems = list(task) * 2
    wrong = ["    return 1.0\n", "```python\ndef letters(s):\n    return {}\n```", "no idea"]
    graded = task.rewards(problems, [problem.solution for problem in task] + wrong)
    assert [reward.value for reward in graded] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert [dict(reward.breakdown) for reward in graded[2:4]] == [{"accuracy": 1.0}, {"accuracy": 0.0}]
    assert [reward.parsed for reward in graded] == [True] * 5 + [False]
    assert task.reward(problems[0], "    return k * 3.141592653589793 * r * r\n").value == 1.0


@pytest.mark.repeated(first_only=True)
@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize(
    "begun", ["", "    # twice the half of x\n", '    """Twice."""\n', "    y = half(x)\n    return (\n"]
)
def test_a_prompt_ends_anywhere_in_the_function(tmp_path, begun) -> None:
    """The tests see what the prompt defines before the function."""
    end = "        2 * y)\n" if "(\n" in begun else "    return half(x) * 2\n"
    row = HUMANEVAL | {"prompt": f"def half(x):\n    return x / 2\n\ndef f(x):\n{begun}", "entry_point": "f"}
    row |= {"canonical_solution": end, "test": "def check(candidate):\n    assert candidate(half(6)) == 3"}
    task = task_of(tmp_path, row, reward_rule="sandbox")
    assert [task.reward(task[0], text).value for text in (end, end.replace("2", "4"))] == [1.0, 0.0]


def test_each_program_runs_once_and_several_run_at_a_time(tmp_path, monkeypatch) -> None:
    together = Barrier(NUM_PARALLEL, timeout=60)  # a lonely run would wait for the others, and raise
    ran = []

    def run(prelude: str, *rest: object) -> tuple[bool, str]:
        if prelude:  # not the sandbox's own trial
            together.wait()
            ran.append(rest)
        return "return 0" not in str(rest), ""

    monkeypatch.setattr(sandbox, "run", run)
    task = task_of(tmp_path, HUMANEVAL, reward_rule="sandbox")
    texts = [f"    return {i} + {tmp_path.name!r}\n" for i in range(NUM_PARALLEL)]
    assert [each.value for each in task.rewards([task[0]] * NUM_PARALLEL, texts)] == [0.0, *[1.0] * (NUM_PARALLEL - 1)]
    assert task.reward(task[0], texts[0]).value == 0.0 and len(ran) == NUM_PARALLEL


def test_by_default_all_rows_of_a_file_are_the_test_split(tmp_path) -> None:
    """The published files are test sets. As a train split a tenth of the rows would be held out."""
    rows = [MBPP | {"text": f"Problem {i}"} for i in range(100)]
    task = task_of(tmp_path, *rows)
    assert task.split == "test" and len(task) == 100
    train = {problem.prompt[0]["content"] for problem in replace(task, split="train")}
    validation = {problem.prompt[0]["content"] for problem in replace(task, split="validation")}
    assert 75 < len(train) < 100 and len(train) + len(validation) == 100 and not train & validation


def test_the_sandbox_is_never_the_default(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "run", None)
    task = task_of(tmp_path, HUMANEVAL)
    assert task.reward_rule == "static" and task.reward(task[0], task[0].solution).breakdown.keys() == {
        "parses", "signature", "names", "allowed",
    }  # fmt: skip
    with pytest.raises(TypeError):
        task_of(tmp_path, HUMANEVAL, reward_rule="sandbox")
