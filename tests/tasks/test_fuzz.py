"""Every grader on hostile text: it never raises, its numbers stay in range, and its time stays linear and small.

A longer campaign: benchmarks/fuzz_graders.py.
"""

import math
import sys
from collections import Counter

import pytest
from graded import GRADED, fields_of
from hypothesis import given, note, settings
from hypothesis import strategies as st
from linear import linear_time
from repetitions import slow

from benchmarks import fuzz_graders
from dllm_rl.tasks.base import Reward
from dllm_rl.tasks.code.task import sandboxed
from dllm_rl.tasks.countdown.graders import countdown_d1_training
from dllm_rl.tasks.math.graders import gsm8k_d1_training
from dllm_rl.tasks.protocols import PROTOCOLS
from dllm_rl.tasks.sudoku.graders import sudoku_d1_training

FIELDS = {row["task"]: fields_of(row) for row in reversed(GRADED)}  # of the first row of a task
GRADERS = [
    *((name, grader) for name in FIELDS for grader in dict.fromkeys(PROTOCOLS[name].values())),
    ("sudoku", sudoku_d1_training),
    ("countdown", countdown_d1_training),
    ("gsm8k", gsm8k_d1_training),
]
GRADERS = [each for each in GRADERS if each[1] is not sandboxed]  # it runs what it is given: code/test_sandbox.py
NAMES = [grader.__name__ for _, grader in GRADERS]

PIECES = [
    *["<answer>", "</answer>", "<reasoning>\n", "\n</reasoning>\n", "<|eot_id|>", "<|endoftext|>", "```", "\n", " "],
    *["\\boxed{", "\\fbox{", "\\boxed", "{", "}", "\\frac", "\\sqrt", "\\text{ ", "\\left(", "\\times", "\\", "$", "="],
    *["1234341221434321", "1234", "42", "3*4+5", "9**9**9", "1/0", "((", "))", "-", "+", ".", ",", "####", "%"],
    *["The answer is ", "1e999", "nan", "\u0663", "\uff11", "\u2003", "\u00d7", "\x00", "\ud800", "x", "_"],
]
HOSTILE = st.one_of(st.lists(st.sampled_from(PIECES), max_size=24).map("".join), st.text(max_size=60))


def check(graded: Reward) -> None:
    assert math.isfinite(graded.value) and 0.0 <= graded.value <= 4.0
    assert all(math.isfinite(number) and 0.0 <= number <= 16.0 for number in graded.breakdown.values())
    assert graded.parsed or graded.breakdown.get("accuracy", 0.0) == 0.0 or "tags" in graded.breakdown
    assert graded.answer is None or (type(graded.answer) is str and (graded.parsed or not graded.answer))


@given(text=HOSTILE)
@settings(max_examples=80, deadline=None)
def test_no_text_raises_or_leaves_the_range(text: str) -> None:
    for name, (task, grader) in zip(NAMES, GRADERS, strict=True):
        note(name)
        check(grader(FIELDS[task], text))


VOTED = [(task, name) for task in ("gsm8k", "math500") for name in ("strict", "d1", "spg", "espo")][:-1]


@given(text=HOSTILE)
@settings(max_examples=80, deadline=None)
def test_the_right_answers_are_one_vote_and_no_wrong_answer_is_in_it(text: str) -> None:
    for task, protocol in VOTED:
        grader = PROTOCOLS[task][protocol]
        right = grader({"answer": "42"}, "\\boxed{42}")
        found = grader({"answer": "42"}, text)
        assert right.value == 1.0 and right.answer, (task, protocol)
        assert (found.value == 1.0) == (found.answer == right.answer), (task, protocol)
        assert found.parsed or found.answer == "", (task, protocol)


@pytest.mark.usefixtures("audited")
@pytest.mark.parametrize(("task", "grader"), GRADERS, ids=NAMES)
def test_no_text_is_compiled_executed_or_imported(task: str, grader) -> None:
    """The interpreter's own audit hook would see any of these, whoever asks for them."""
    grader(FIELDS[task], "\\boxed{2x}, so that every pattern is compiled and every child process started")
    code = ["__import__('os').abort()", "9**9**9", "open('/etc/passwd')", "(lambda: 3*4+5)()", "3*4+5", "42", "exit()"]
    code.append("def f(x=open('/')): 1")
    SEEN.clear()
    WATCHING.append(True)
    for text in code:
        for answer in (text, f"<answer>{text}</answer>", f"\\boxed{{{text}}}", f"{text} = 17", f"```{text}```"):
            grader(FIELDS[task], answer)
    WATCHING.clear()
    assert SEEN == []


WATCHING: list[bool] = []
SEEN: list[str] = []


def _listen(event: str, arguments: tuple) -> None:
    if not WATCHING or "<unknown>" in arguments[:2]:  # `ast.parse` runs nothing; an error's line is looked for there
        return
    if event.startswith(("exec", "compile", "import", "open", "os.", "subprocess.", "code.")):
        SEEN.append(event)


@pytest.fixture(scope="session")
def audited() -> None:
    """Have the interpreter call `_listen`. It does so until the process ends, and slows down all other tests."""
    sys.addaudithook(_listen)


LONG = [piece * (10**6 // len(piece)) for piece in PIECES] + [
    "<answer>" + " " * 10**6 + "</answer>",
    "<answer>" + "1" * 10**6 + "</answer>",
    "<answer>" + "(" * 10**6 + "</answer>",
    "\\boxed{" + "{" * 10**6 + "}",
    "\\boxed{" + "9" * 10**6 + "}",
    "```" + " " * 10**6 + "```",
    "<answer>```" + "1 " * (10**6 // 2) + "x",
    "\\boxed{1\n" * 10**5 + "}",
    "\\boxed{x\n" * 10**5 + "}",
    "\\boxed{}" * 10**5 + "\\boxed{42}",
    "1 " * (10**6 // 2) + "=1",
    "1=" * (10**6 // 2),
    "9**" * (10**6 // 3),
    "</answer>1" * 10**5,
    "1</answer>" * 10**5,
    "1" * 15 + (" " + "1" * 15) * (10**6 // 16),
    "The answer is -" * (10**6 // 15),
    "-" * 10**6 + "1",
    "\\frac1" * (10**6 // 6),
]


SOME = [each if number % 5 == 0 else slow(*each) for number, each in enumerate(GRADERS)]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "grader"), SOME, ids=NAMES)
@pytest.mark.repeated(first_only=True)
def test_a_million_characters_take_linear_time(task: str, grader) -> None:
    """That of math-verify's own processes is bounded otherwise, in math/test_math_verify.py."""
    for text in LONG:
        with linear_time():
            check(grader(FIELDS[task], text))


# Almost right answers. The puzzles are such that no piece of the campaign's texts is right, either.
NEARLY = {
    "sudoku": ["2143432134121243", "<answer>2143432134211234</answer>"],
    "countdown": ["<answer>7+90</answer>", "\\boxed{(90 - 7) + 8 = 97}", "90+8-1"],
}


@pytest.mark.nightly
@pytest.mark.parametrize("task", NEARLY)
def test_none_of_a_thousand_hostile_completions_crashes_or_passes(task: str, monkeypatch) -> None:
    own = {
        "countdown": {"numbers": [7, 8, 90], "target": 97},
        "sudoku": {"puzzle": "2143432134000030", "solution": "2143432134121234"},
    }
    monkeypatch.setitem(fuzz_graders.FIELDS, task, own[task])
    monkeypatch.setitem(fuzz_graders.RIGHT, task, NEARLY[task])
    graders = list(dict.fromkeys(PROTOCOLS[task].values()))
    for found in fuzz_graders.campaign(task, graders, 1000, 0, 1, Counter()):
        counts = {name: found[name] for name in ("count", "exceptions", "out_of_range", "right")}
        assert counts == {"count": 1000, "exceptions": 0, "out_of_range": 0, "right": 0}, found
