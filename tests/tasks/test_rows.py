"""Files of every format, with their broken lines, and data sets that are absent."""

import json
from random import Random

import pytest

from dllm_rl.tasks import GSM8K
from dllm_rl.tasks.rows import as_range, check_settings, drawn, load_rows, load_split

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
        ("a.jsonl", b'{"question": "q", "answer": "#### many"}\n', "line 1: answer='#### many' is no number"),
        ("a.json", b'{"question": 1}', "must hold a list of objects"),
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


def test_a_number_is_drawn_from_an_inclusive_range() -> None:
    rng = Random(0)
    assert {drawn((2, 4), rng) for _ in range(50)} == {2, 3, 4} and drawn(3, rng) == 3
    assert as_range(3) == (3, 3) and as_range((2, 4)) == (2, 4)


def test_the_first_fault_is_the_one_that_is_named() -> None:
    check_settings((False, "a"))
    with pytest.raises(ValueError, match=r"^b$"):
        check_settings((False, "a"), (True, "b"), (True, "c"))
