"""GSM8K and MATH500: loaders of the published formats, normalisation, numbers, and the wall around math-verify."""

import json
import os
import signal
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from dllm_rl.cli import main as cli
from dllm_rl.tasks import GSM8K, MATH500, Task
from dllm_rl.tasks.answers import (
    FARTHEST,
    LONGEST,
    MOST_BOXES,
    d1_box,
    exact_number,
    first_boxed_number,
    last_box,
    last_number,
)
from dllm_rl.tasks.loading import load_rows, load_split
from dllm_rl.tasks.math import verify as math_check
from dllm_rl.tasks.math.graders import math500_math_verify, reference_number
from dllm_rl.tasks.math.latex import normalise, rational, same_in_d1
from dllm_rl.tasks.protocols import under_protocol

TRAIN = [
    {
        "question": f"Ann has {n} apples and eats one. How many?",
        "answer": f"{n} - 1 = <<{n}-1={n - 1}>>{n - 1}\n#### {n - 1:,}",
    }
    for n in range(990, 1050)
]
TEST = [{"question": "What is 40 + 2?", "answer": "40 + 2 = 42\n#### 42"}]
MATH = [
    {
        "problem": "Halve 1.",
        "solution": "It is $\\boxed{\\frac{1}{2}}$.",
        "answer": "\\frac{1}{2}",
        "subject": "Algebra",
    },
    {"problem": "Double 3.", "solution": "It is $\\boxed{5}$, plus one.", "answer": "6"},
    {"problem": "Square 3.", "solution": "It is $\\boxed{9}$.", "level": "Level 1"},
]


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    write_lines(tmp_path / "train.jsonl", TRAIN)
    write_lines(tmp_path / "test.jsonl", TEST)
    return tmp_path


def test_gsm8k_splits(folder) -> None:
    tasks = {split: GSM8K(split=split, path=folder) for split in ("train", "validation", "test")}
    assert all(isinstance(task, Task) for task in tasks.values())
    asked = {split: {problem.prompt[0]["content"] for problem in task} for split, task in tasks.items()}
    assert len(asked["train"] | asked["validation"]) == len(tasks["train"]) + len(tasks["validation"]) == len(TRAIN)
    assert not asked["train"] & asked["validation"] and 0 < len(tasks["validation"]) < 20
    assert len(GSM8K(split="train", path=folder, size=3)) == 3

    problem = tasks["test"][0]
    assert problem.fields == {"answer": "42"} and problem.prompt[0]["content"].endswith("What is 40 + 2?")
    assert problem.solution == "<reasoning>\n40 + 2 = 42\n</reasoning>\n<answer>\n42\n</answer>\n"
    for rule, value in (("own", 1.0), ("d1", 4.0), ("espo", 1.0)):
        task = GSM8K(split="test", path=folder / "test.jsonl", reward_rule=rule)
        assert task.reward(problem, problem.solution).value == value
        assert task.reward(problem, "no idea").value == 0.0
    with pytest.raises(IndexError):
        tasks["test"][1]


def test_gsm8k_prompts(folder) -> None:
    path = folder / "test.jsonl"
    assert GSM8K(split="test", path=path, prompt_format="Q: {question} {x}", chat=False)[0].prompt == (
        "Q: What is 40 + 2? {x}"
    )
    opened = GSM8K(split="test", path=path, opening="<reasoning>\n")[0]
    assert opened.prompt[-1] == {"role": "assistant", "content": "<reasoning>\n"}
    assert opened.solution.startswith("40 + 2")  # the opening is the prompt's, not the completion's


def test_math500_from_its_published_form(tmp_path) -> None:
    task = MATH500(path=write_lines(tmp_path / "test.jsonl", MATH))
    assert [problem.fields["answer"] for problem in task] == ["\\frac{1}{2}", "6", "9"]
    assert all(task.reward(problem, problem.solution).value == 1.0 for problem in task)
    assert task[0].solution.endswith("<answer>\n\\boxed{\\frac{1}{2}}\n</answer>\n")
    with pytest.raises(ValueError, match="split='train' needs path="):
        MATH500(split="train")
    both = [MATH500(split=split, path=tmp_path / "test.jsonl") for split in ("train", "validation")]
    assert sum(map(len, both)) == 3


def test_every_file_format(tmp_path) -> None:
    from datasets import Dataset

    lines = write_lines(tmp_path / "a.jsonl", TEST)
    (tmp_path / "b.json").write_text(json.dumps(TEST))
    Dataset.from_list(TEST).to_parquet(str(tmp_path / "c.parquet"))
    (tmp_path / "d.csv").write_text('question,answer\nWhat is 40 + 2?,"40 + 2 = 42\n#### 42"\n')
    for path in (lines, tmp_path / "b.json", tmp_path / "c.parquet", tmp_path / "d.csv"):
        assert [row for _, row in load_rows(path)] == TEST
        assert GSM8K(split="test", path=path)[0].fields == {"answer": "42"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"question": "q", "answer": "#### 1"}\n{"question"', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b"\n[1]\n", "a.jsonl, line 2: must be a JSON object"),
        ("a.jsonl", b'{"question": "\xff"}\n', "a.jsonl, line 1: not JSON in UTF-8"),
        ("a.jsonl", b'{"question": "q"}\n', "a.jsonl, line 1: a GSM8K row needs"),
        ("a.jsonl", b'{"question": "q", "answer": "#### many"}\n', "line 1: answer='#### many' is no number"),
        ("a.json", b'{"question": 1}', "must hold a list of objects"),
        ("a.txt", b"", "must end in one of"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        len(GSM8K(split="test", path=tmp_path / name))


def test_absent_data_says_what_to_give(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="no file"):
        len(GSM8K(split="test", path=tmp_path / "absent.jsonl"))
    with pytest.raises(ValueError, match=r"exactly one test file .* found: none"):
        len(GSM8K(split="test", path=tmp_path))

    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "test-00000-of-00001.jsonl", TEST)
    with pytest.raises(ValueError, match=r"found: main/test-00000.*, socratic/test-00000"):
        len(GSM8K(split="test", path=tmp_path))

    import datasets

    def absent(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        ValueError, match=r"openai/gsm8k \(split test\) is not here .*Couldn't reach the hub\); give path="
    ):
        load_split(None, "test", ("openai/gsm8k", "main"))


def test_published_data_through_datasets(monkeypatch) -> None:
    import datasets

    calls = []

    def fake(name, configuration, split):
        calls.append((name, configuration, split))
        return datasets.Dataset.from_list(TEST)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    load_split.cache_clear()
    assert [row for _, row in load_split(None, "test", ("openai/gsm8k", "main"))] == TEST
    assert calls == [("openai/gsm8k", "main", "test")]
    load_split.cache_clear()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", Fraction(42)),
        ("-42", Fraction(-42)),
        ("+1,234.50.", Fraction(2469, 2)),
        ("$-5", Fraction(-5)),
        ("-$5", Fraction(-5)),
        ("\\$5", Fraction(5)),
        (".5", Fraction(1, 2)),
        ("-$-5", None),
        ("12,34", None),
        ("1,2345", None),
        ("1e3", None),
        ("5 %", None),
        ("\u0665", None),
        ("", None),
        ("nan", None),
        ("1" * 101, None),
    ],
)
def test_exact_numbers(text: str, value: Fraction | None) -> None:
    assert exact_number(text) == value


def test_reference_numbers() -> None:
    assert reference_number("so 3\n#### 1,000") == 1000 and reference_number(18.5) == Fraction(37, 2)
    with pytest.raises(ValueError, match="no number"):
        reference_number("#### x")


def test_numbers_in_text() -> None:
    assert last_number("12 and -7.") == -7.0 and last_number("1.2.3") == 3.0 and last_number("1e2") == 100.0
    assert last_number("none") is None and last_number("1 2" + " " * FARTHEST) is None
    assert first_boxed_number("\\boxed{3 \\boxed{4}") == 3.0
    assert first_boxed_number("\\boxed{x \\boxed{4}") == 4.0
    assert first_boxed_number("\\boxed{3\n\\boxed{4}") == 4.0  # the first is not closed within its line
    assert first_boxed_number("\\boxed{3\n} \\boxed{x}") is None
    assert first_boxed_number("\\boxed{3") is None and first_boxed_number("") is None
    assert first_boxed_number("\\boxed{" + "x" * FARTHEST + "1} \\boxed{2}") == 2.0
    for skipped in ("\\boxed{}", "\\boxed{x}", "\\boxed{\n"):
        assert first_boxed_number(skipped * (MOST_BOXES - 1) + "\\boxed{2}") == 2.0
        assert first_boxed_number(skipped * MOST_BOXES + "\\boxed{2}") is None


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("no box", "no box"),
        ("", ""),
        ("\\boxed{1} \\boxed{2}", "2"),
        ("\\boxed{a{b}c} d}", "a{b}c"),
        ("\\boxed{1} \\boxed{2", None),
        ("\\boxed", None),
        ("\\boxed{}", ""),
        ("\\boxed 1$ \\boxed{2} \\boxed 3$4$", "3"),
        ("\\boxed{2} \\boxed", None),
        ("\\boxed\n{2} 3", "\\boxed\n{2}"),
        ("\\boxed }{2} {{3}}", "}{2} {{3}}"),  # a space behind the command: all of it
        ("\\boxed}{2} {{3}}", "\\boxed}{2} {{3}"),  # -1, 0, -1, 0, 1, 0: zero at a closing brace
        ("\\fbox{1}", "\\fbox{1}"),
        ("\\fbox{1} \\boxed{2}", "2"),
        ("\\boxed{" + "x" * FARTHEST + "}", None),
    ],
)
def test_d1s_last_box(text: str, content: str | None) -> None:
    assert d1_box(text) == content


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("\\frac12", "\\frac{1}{2}", True),
        ("\\frac1{23}", "\\frac{1}{23}", True),
        ("\\frac12+\\frac3", "\\frac12+\\frac3", True),
        ("\\frac12+\\frac3", "\\frac{1}{2}+\\frac3", False),  # a short \\frac leaves every \\frac as it is
        ("\\sqrt2\\sqrt{3}", "\\sqrt{2}\\sqrt{3}", True),
        ("\\sqrt 3", "\\sqrt{3}", False),  # the space goes into the root
        ("3/4", "\\frac{3}{4}", True),
        ("3/04", "\\frac{3}{4}", False),
        ("x/4 ", "x/4 ", True),  # no integers: as they are
        ("x/4 ", "x/4", False),
        ("1/2/3", " 1/2/3", True),  # two slashes: no fraction
        ("5\\text{ cm}", "5", True),
        ("5\\text{ cm}\\text{ or}", "5", False),
        ("x=.5", ".5", False),  # ".5" behind a name gets no zero
        (".5", "0.5", True),
        ("", "\\!", True),
        ("1" + " " * LONGEST, "1", False),
    ],
)
def test_sameness_in_d1(answer: str, reference: str, same: bool) -> None:
    assert same_in_d1(answer, reference) == same


def test_boxes_are_balanced() -> None:
    assert last_box("\\boxed{a{b}c} d}") == "a{b}c"
    assert last_box("\\boxed{1} \\boxed{2") is None
    assert last_box("\\fbox{1}") == "1" and last_box("\\fbox{1}", names=("\\boxed",)) is None
    assert last_box("\\boxed{" + "x" * LONGEST + "}") is None


@pytest.mark.parametrize(
    ("answer", "same"),
    [
        ("\\frac{a}12", "\\frac{a}12"),  # a braced numerator is left alone
        ("\\frac1{23}", "\\frac{1}{23}"),
        ("\\frac12+\\frac34", "\\frac{1}{2}+\\frac{3}{4}"),
        ("\\sqrt2\\sqrt{3}", "\\sqrt{2}\\sqrt{3}"),
        ("3/4", "\\frac{3}{4}"),
        ("-3/4", "\\frac{-3}{4}"),
        ("03/4", "03/4"),
        ("a/4", "a/4"),
        ("x=0.5", "\\frac{1}{2}"),
        ("x=.5", ".5"),
        ("a=b=c", "a=b=c"),
        ("10\\\\text{ m}", "10"),
        ("", ""),
        ("\\frac", "\\frac"),
        ("\\sqrt", "\\sqrt"),
    ],
)
def test_normalisation(answer: str, same: str) -> None:
    assert normalise(answer) == same


def test_rationals() -> None:
    assert rational("-\\frac{3}{6}") == Fraction(-1, 2) == rational("-0.5") == rational("\\frac{-1}{2}")
    assert rational("\\frac{1}{0}") is None and rational("\\pi") is None
    assert rational("1/3") == Fraction(1, 3)


def test_math_verify_within_its_wall(worker) -> None:
    assert math_check.equal("x^2-1", "(x-1)(x+1)")
    first = worker.process
    assert math_check.equal("x^2-1", "(x-1)(x+2)") is False
    for hostile in ("9^{9^{9^{9}}}", "((((((((1))))))))", "\\int e^{-x^2} \\sin x dx", "{" * 150, "1\n2", "x" * 301):
        assert math_check.equal("2", hostile) is None
        assert math_check.equal("\\sqrt{2}+1", "1+\\sqrt 2")  # each answer belongs to its own question
        math_check.equal.cache_clear()
    for hostile in ("}{", "\ud800", "\x00", "\\input{/etc/passwd}", "__import__('os')"):
        assert not math_check.equal("2", hostile)
    assert worker.process is first


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_math_verify_ends_a_comparison_by_its_processor_time(worker) -> None:
    """The kernel's account of the whole worker: start, one comparison without an end, and what follows it."""
    math_check.equal("2", "3")
    before = _processor_seconds(worker.process.pid)
    for power in range(20):
        assert math_check.equal("2", f"9^{{9^{{9^{{{power + 9}}}}}}}") is None
    assert (_processor_seconds(worker.process.pid) - before) / 20 < 0.05


LATEX = [
    *[
        "x^2 - 1",
        "(x-2)(x+2)(x^2+4)",
        "\\frac{2}{3}x^3",
        "[\\pi^2/8, 5\\pi^2/4]",
        "(5,\\frac{\\pi}{4}*3)",
        "1,-2",
        "2^{100}",
        "5 r^5",
    ],
    *[
        "-\\frac12\\le x\\le 3",
        "(-\\infty,2)\\cup(3,\\infty)",
        "1\\pm\\sqrt8",
        "\\{1,2\\}",
        "120^\\circ",
        "\\log_2 8",
        "y = 2x + 3",
    ],
    *[
        "\\begin{pmatrix} 1 & \\frac12 \\\\ x^2 & 4 \\end{pmatrix}",
        "\\sin 2x\\cos x",
        "x^{}",
        "((1)",
        "1 2 3",
        "\\frac{1}{}",
        "a=b=c^2",
    ],
]


@pytest.mark.parametrize("latex", LATEX)
def test_parsing_in_two_stages_gives_what_one_gives(latex: str, monkeypatch) -> None:
    """SLL prediction first changes no result: neither where it succeeds nor where it must start again."""
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from math_verify.parser import extract_latex, parse_latex_cached

    from dllm_rl.tasks.math import verify_worker as math_worker

    found, plain, runs = [], _Latex2Sympy.create_parser, []

    def counted(converter, text):
        runs.append(text)
        return plain(converter, text)

    for create_parser in (plain, math_worker.two_stages(counted)):
        monkeypatch.setattr(_Latex2Sympy, "create_parser", create_parser)
        extract_latex.cache_clear()
        parse_latex_cached.cache_clear()
        found.append(repr(math_worker.read.__wrapped__(latex)))
    assert found[0] == found[1] and runs
    if latex in LATEX[:4]:  # where SLL alone would fail
        assert len(runs) == 2


@pytest.mark.skipif(not Path(f"/proc/self/task/{os.getpid()}/children").exists(), reason="needs /proc/PID/task")
def test_a_worker_without_a_question_dies_unnoticed(worker) -> None:
    """Its end must not pass for the answer to the next question."""
    assert math_check.equal("2", "1+1")
    pid = worker.process.pid
    child = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    os.kill(child, signal.SIGKILL)
    assert math_check.equal("2", "3-1") is True and math_check.equal("2", "3-2") is False
    assert worker.process.pid == pid


def test_an_undecided_answer_is_wrong_and_says_so(worker) -> None:
    graded = math500_math_verify({"answer": "2"}, "\\boxed{9^{9^{9^{9}}}}")
    assert graded.parsed and graded.value == 0 and graded.breakdown == {"accuracy": 0.0, "undecided": 1.0}
    graded = math500_math_verify({"answer": "2"}, "\\boxed{1 + 1}")
    assert graded.value == 1 and graded.breakdown == {"accuracy": 1.0, "undecided": 0.0}


@pytest.fixture
def worker() -> Iterator[math_check._Worker]:
    math_check.equal.cache_clear()
    math_check._WORKER.stop()
    yield math_check._WORKER
    math_check._WORKER.stop()


def _processor_seconds(pid: int) -> float:
    """Of a process and the children that it has waited for [proc(5): utime, stime, cutime, cstime]."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def test_math_verify_does_not_share_a_child_with_a_fork(monkeypatch) -> None:
    math_check.equal.cache_clear()
    assert math_check.equal("2x", "x+x")
    mine = math_check._WORKER.process
    monkeypatch.setattr(math_check._WORKER, "parent", os.getpid() + 1)  # as a forked process sees it
    assert math_check.equal("3x", "x+x+x")
    assert math_check._WORKER.process is not mine
    mine.kill()
    mine.wait()
    math_check._WORKER.stop()


def test_without_math_verify_the_protocol_says_what_to_install(monkeypatch, tmp_path, capsys) -> None:
    """Before any work: when the task is made, and when a protocol is named."""
    monkeypatch.setattr(math_check, "find_spec", lambda name: None)
    (tmp_path / "rows.jsonl").write_text('{"completion": "\\\\boxed{x+x}", "answer": "2x"}\n')
    with pytest.raises(ImportError, match=r"pip install 'dllm_rl\[math\]'"):
        MATH500(path="unused.jsonl", reward_rule="espo")
    for protocol in ("math-verify", "espo"):
        with pytest.raises(ImportError, match="math-verify"):
            under_protocol(MATH500(path="unused.jsonl"), protocol)
    command = ["grade", "--task", "math500", "--protocol", "math-verify", str(tmp_path / "rows.jsonl")]
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: grading by math-verify needs") and err.count("\n") == 1


def test_no_task_imports_torch(monkeypatch) -> None:
    import subprocess
    import sys

    code = "import sys, dllm_rl.tasks.protocols; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
