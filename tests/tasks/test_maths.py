"""GSM8K and MATH500: loaders of the published formats, normalisation, numbers, and the wall around math-verify."""

import json
from fractions import Fraction

import pytest

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
from dllm_rl.tasks.math.graders import reference_number
from dllm_rl.tasks.math.latex import normalise, rational, same_in_d1
from dllm_rl.tasks.rows import load_rows, load_split

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
    assert len(GSM8K(split="train", path=folder, size=1000)) == len(tasks["train"])

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
        ("xy=5", "5"),
        ("xyz=5", "xyz=5"),  # no name is so long
        ("\\tfrac34", "\\frac{3}{4}"),
        ("\\dfrac{3}4", "\\frac{3}4"),
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


def test_no_task_imports_torch(monkeypatch) -> None:
    import subprocess
    import sys

    code = "import sys, dllm_rl.tasks.protocols; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
