"""Files of every format, with their broken lines, and data sets that are absent."""

import json
import os
import pickle
from dataclasses import replace
from functools import partial
from random import Random

import pytest
from refusals import refuses

from dllm_rl.tasks import GSM8K, MATH500, Code, Countdown, Sudoku
from dllm_rl.tasks.protocols import under_protocol
from dllm_rl.tasks.rows import as_range, check_settings, draw_number, load_problems, load_rows

TEST = [{"question": "What is 40 + 2?", "answer": "40 + 2 = 42\n#### 42"}]


def write_lines(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


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
        ("a.jsonl", b'{"question": "q", "answer": "#### many"}\n', "line 1: answer='#### many' is not a number"),
        ("a.json", b'{"question": 1}', "must contain a list of objects"),
        ("a.json", b'[{"question": ', r"a\.json: not JSON in UTF-8"),
        ("a.json", b"[" * 200_000, r"a\.json: not JSON in UTF-8"),
        ("a.json", b"[\xff]", r"a\.json: not JSON in UTF-8"),
        (
            "a.csv",
            b"question,answer\nq,#### 1\n" + b"x" * 200_000 + b",#### 1\n",
            "after line 2: not CSV .*field limit",
        ),
        ("a.csv", b"question,answer\nq,#### 1\n\xff,#### 1\n", "not CSV in UTF-8 .*0xff"),
        ("a.parquet", b"PAR1" * 9, r"a\.parquet: not Parquet \("),
        ("a.txt", b"", "must end in one of"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    refuses(message, lambda: len(GSM8K(split="test", path=tmp_path / name)))


def test_absent_data_says_what_to_give(tmp_path, monkeypatch) -> None:
    refuses("no file", lambda: len(GSM8K(split="test", path=tmp_path / "absent.jsonl")))
    refuses(r"exactly one test file .* found: none", lambda: len(GSM8K(split="test", path=tmp_path)))

    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "test-00000-of-00001.jsonl", TEST)
    refuses(r"found: main/test-00000.*, socratic/test-00000", lambda: len(GSM8K(split="test", path=tmp_path)))

    import datasets

    def absent(*_, **__):
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(
        ValueError, match=r"openai/gsm8k \(split test\) is not on this machine .*Couldn't reach the hub\); set path"
    ):
        load_problems(None, "test", ("openai/gsm8k", "main"), lambda row: row)


def test_published_data_through_datasets(monkeypatch) -> None:
    import datasets

    calls = []

    def fake(name, configuration, split):
        calls.append((name, configuration, split))
        return datasets.Dataset.from_list(TEST)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load_problems(None, "test", ("openai/gsm8k", "main"), lambda row: row) == tuple(TEST)
    assert calls == [("openai/gsm8k", "main", "test")]


def test_a_number_is_drawn_from_an_inclusive_range() -> None:
    rng = Random(0)
    assert {draw_number((2, 4), rng) for _ in range(50)} == {2, 3, 4} and draw_number(3, rng) == 3
    assert as_range(3) == (3, 3) and as_range((2, 4)) == (2, 4)


def test_the_first_fault_is_the_one_that_is_named() -> None:
    check_settings((False, "a"))
    refuses(r"^b$", lambda: check_settings((False, "a"), (True, "b"), (True, "c")))


ROW = '"question": "a?", "answer": "#### 5"'
GRID = "1234341221434321"
NINE = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
PROGRAM = '"text": "w", "code": "def f(x):\\n    return x"'


@pytest.mark.parametrize(
    ("task", "name", "text", "part"),
    [
        (GSM8K, "a.csv", "question,answer\nHow many?,1,200\n", "line 2"),  # a cell too many
        (GSM8K, "a.csv", "question,answer\na?,5\nb?\n", "line 3"),  # a cell too few
        (GSM8K, "a.csv", "question,answer,answer\na?,5,7\n", "line 1"),
        (GSM8K, "a.csv", "question,answer,answer \na?,5,7\n", "line 1"),
        (GSM8K, "a.csv", ",question,answer\n0,a?,5\n", "line 1"),
        (GSM8K, "a.csv", "question;answer\na?;5\n", "line 2"),
        (GSM8K, "a.csv", 'question,answer\n"a?,5\nb?,6\n', "line 1"),  # the quote swallows all
        (GSM8K, "a.csv", "question,answer\n,5\n", "line 2"),
        (GSM8K, "a.csv", "question,answer\n", "no rows"),
        (GSM8K, "a.jsonl", "\ufeff\n", "no rows"),
        (GSM8K, "a.json", "[]", "no rows"),
        (GSM8K, "a.jsonl", f'{{{ROW}}}\n{{{ROW}, "answer": "#### 6"}}', "line 2"),
        (GSM8K, "a.jsonl", f'{{{ROW}, "about": {{"x": 1, "x": 2}}}}', "line 1"),
        (GSM8K, "a.json", f'[{{{ROW}, "\\u0061nswer": "6"}}]', "twice"),
        (MATH500, "a.jsonl", '{"problem": "p", "answer": "  "}', "line 1"),
        (MATH500, "a.jsonl", '{"problem": "p", "answer": NaN}', "line 1"),
        (MATH500, "a.jsonl", '{"problem": "p", "answer": true}', "line 1"),
        (Sudoku, "a.csv", f"Puzzle,puzzle,Solution\n{GRID},{GRID},{GRID}\n", "line 2"),
        (Sudoku, "a.jsonl", f'{{"puzzle": {GRID}, "solution": "{GRID}"}}', "line 1"),
        (Sudoku, "a.csv", f"Puzzle,Solution\n{GRID},{GRID}\n{NINE},{NINE}\n", "line 3"),
        (Code, "a.jsonl", f'{{{PROGRAM}, "test_list": "assert f(1) == 1"}}', "line 1"),
        (Code, "a.jsonl", f'{{{PROGRAM}, "test_list": ["assert f(1) == 1"], "test_imports": "import re"}}', "line 1"),
        (Code, "a.jsonl", f'{{{PROGRAM}, "test_list": ["assert f(1) == 1"], "text": null}}', "line 1"),
        *[
            (Countdown, "a.jsonl", f'{{"numbers": {numbers}, "target": {target}}}', "line 1")
            for numbers, target in (
                ("[3.7, 4]", 7),
                ("[3.0, 4]", 7),
                ('"1234"', 24),
                ("[true, 4]", 5),
                ("[3, [4]]", 7),
                ('["3", 4]', 7),
                ("[3, NaN]", 7),
                ("[3, null]", 7),
                ("[]", 7),
                ("[3, 4]", "true"),
                ("[3, 4]", "7.0"),
                ("[3, 4]", "1e400"),
                ("[3, 4]", '"7"'),
            )
        ],
        *[
            (Countdown, "a.jsonl", f'{{"input": {listed}, "output": {output}}}', "line 1")
            for listed, output in (
                ('"3,4.0"', '"7"'),
                ('"3;4"', '"7"'),
                ('"1_0,4"', '"14"'),
                ('"3,,4"', '"7"'),
                ("[3, 4]", '"7"'),
                ('"3,4"', "7.0"),
                ('"3,4"', "true"),
                ('"\\u0663,4"', '"7"'),
            )
        ],
        (Countdown, "a.csv", "input,output\n30,7,37\n", "line 2"),
    ],
)
def test_rows_that_no_grader_takes_are_refused_with_their_line(tmp_path, task, name, text, part) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    with pytest.raises(ValueError, match=f"{name}.*{part}"):
        task(path=str(path), **({} if task in (Sudoku, Countdown) else {"split": "test"}))[0]


def test_a_byte_order_mark_is_read_over(tmp_path) -> None:
    for name, text in (
        ("a.csv", "question,answer\r\na?,#### 5\r\n"),
        ("b.csv", '"question","answer"\na?,#### 5\n'),
        ("c.jsonl", f"{{{ROW}}}\n"),
        ("d.json", f"[{{{ROW}}}]"),
    ):
        (tmp_path / name).write_bytes(f"\ufeff{text}".encode())
        assert GSM8K(path=str(tmp_path / name), split="test")[0].fields == {"answer": "5"}
    (tmp_path / "prompt.txt").write_bytes("\ufeffQ: {question}".encode())
    template = str(tmp_path / "prompt.txt")
    task = GSM8K(path=str(tmp_path / "a.csv"), split="test", prompt_format=template, chat=False)
    assert task[0].prompt == "Q: a?"


def test_a_rule_that_does_not_fit_the_file_is_refused_when_the_task_is_made(tmp_path) -> None:
    nine, four = tmp_path / "nine.csv", tmp_path / "four.csv"
    nine.write_text(f"Puzzle,Solution\n0{NINE[1:]},{NINE}\n")
    four.write_text(f"Puzzle,Solution\n0{GRID[1:]},{GRID}\n{'0' * 16},{GRID}\n")  # the second has 288 completions
    refuses("reward_rule", lambda: Sudoku(path=str(nine), reward_rule="d1", prompt_format="text"))
    refuses("protocol", lambda: under_protocol(Sudoku(path=str(nine)), "d1"))
    refuses(r"problem 1 .*protocol", lambda: under_protocol(Sudoku(path=str(four)), "spg"))
    refuses("protocol", lambda: under_protocol(Sudoku(side=9, clues=60), "espo"))
    assert under_protocol(Sudoku(path=str(four), reward_rule="d1", prompt_format="text"), "d1").protocol == "d1"


HUMAN_EVAL = {
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    return x\n",
    "test": "def check(c):\n    assert c(1) == 1\n",
}
SOLVED = "1234341221434321"


def json_line(row) -> str:
    return json.dumps(row) + "\n"


@pytest.mark.parametrize(
    ("make", "before", "after", "field"),
    [
        (GSM8K, {"question": "q", "answer": "#### 5"}, {"question": "q", "answer": "#### 6"}, "answer"),
        (MATH500, {"problem": "q", "answer": "5"}, {"problem": "q", "answer": "6"}, "answer"),
        (Code, HUMAN_EVAL, HUMAN_EVAL | {"test": HUMAN_EVAL["test"].replace("c(1)", "c(2)")}, "tests"),
        (Countdown, {"numbers": [1, 2, 3], "target": 6}, {"numbers": [1, 2, 3], "target": 5}, "target"),
        (
            Sudoku,
            {"puzzle": "0" + SOLVED[1:], "solution": SOLVED},
            {"puzzle": SOLVED[:-1] + "0", "solution": SOLVED},
            "puzzle",
        ),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_a_new_task_reads_its_file_anew(tmp_path, make, before, after, field, in_folder) -> None:
    path = tmp_path / "test.jsonl"

    def write(row) -> None:  # of equal size at the equal time: no property of the file tells the two apart
        path.write_text(json_line(row))
        os.utime(path, (2_000_000_000, 2_000_000_000))

    takes_folder = make in (GSM8K, MATH500, Code)
    make_task = partial(make, split="test", path=str(tmp_path if in_folder and takes_folder else path))
    write(before)
    assert path.stat().st_size == len(json_line(after))
    old = make_task()
    first = old[0].fields[field]
    write(after)
    assert make_task()[0].fields[field] != first
    assert replace(old, size=1)[0].fields[field] != first
    assert (
        old[0].fields[field] == first == pickle.loads(pickle.dumps(old))[0].fields[field]
    )  # not in the midst of a run


@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_split_of_a_corrected_file_is_read_anew(tmp_path, split) -> None:
    rows = [{"question": str(number), "answer": "#### 1"} for number in range(50)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(map(json_line, rows)))
    size = len(GSM8K(path=path, split=split))
    path.write_text("".join(map(json_line, rows * 2)))
    assert len(GSM8K(path=path, split=split)) == 2 * size > 0


@pytest.mark.parametrize("suffix", ["txt", "json"])
def test_a_corrected_template_is_read_anew(tmp_path, suffix) -> None:
    path = tmp_path / f"template.{suffix}"
    for word in ("Make", "Reach"):
        text = f"{word} {{target}} from {{numbers}}"
        path.write_text(json.dumps([{"role": "user", "content": text}]) if suffix == "json" else text)
        assert Countdown(prompt_format=path)[0].prompt[0]["content"].startswith(word)
