"""Cards: what is read, what differs, and hostile files, each refused in one line."""

import json

import pytest

from dllm_rl.evaluation.card import MAX_BYTES, differences, flat, read_card
from dllm_rl.tasks.protocols import published

CARD = {
    **{"task": "sudoku", "version": "1", "protocol": "d1", "split": "test", "seed": 0, "n": 256, "samples": 1},
    **{"quantization": "none", "max_new_tokens": 256, "diffusion_steps": 128, "block_size": 32, "temperature": 0.0},
    **{"rank": "confidence", "commit": "schedule", "cache": "none", "dtype": "bfloat16", "accuracy": 0.5},
    "settings": {"prompt_format": "d1.txt", "opening": "<reasoning>", "shots": 0, "clues": [10, 12]},
}


def read(tmp_path, content) -> list:
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_card(path)


def test_a_card_is_a_row_or_the_rows_of_a_sweep(tmp_path) -> None:
    (row,) = read(tmp_path, CARD)
    assert [row] * 2 == read(tmp_path, [CARD, CARD])
    assert row["max_new_tokens"] == 256 and row["settings.clues"] == [10, 12] and "accuracy" not in row


def test_the_paper_s_own_settings_differ_in_its_words_and_file_alone(tmp_path) -> None:
    (row,) = read(tmp_path, CARD)
    assert differences(row, [published("d1", "sudoku", 256)]) == [
        ("settings.prompt_format", "d1.txt", "the paper's text"),
        ("settings.path", "-", "the paper's file"),
    ]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"protocol": "strict"}, ("protocol", "strict", "d1 or spg or espo")),
        ({"diffusion_steps": 64}, ("diffusion_steps", "64", "128")),
        ({"diffusion_steps": None, "commit": "threshold=0.9"}, ("diffusion_steps", "-", "128")),
        ({"block_size": None}, ("block_size", "-", "32")),
        ({"temperature": 0.7}, ("temperature", "0.7", "0")),
        ({"rank": "entropy"}, ("rank", "entropy", "confidence or max_prob")),
        ({"quantization": "int4_weight_only"}, ("quantization", "int4_weight_only", "none")),
        ({"n": 500}, ("n", "500", "256")),
        ({"split": "train"}, ("split", "train", "test")),
        ({"max_new_tokens": 64, "diffusion_steps": 32}, ("max_new_tokens", "64", "128 or 256 or 512")),
        ({"settings": CARD["settings"] | {"opening": ""}}, ("settings.opening", "-", "<reasoning>")),
    ],
)
def test_each_setting_that_differs_is_named(change, line) -> None:
    row = CARD | change
    assert line in differences(flat(row), [published("d1", "sudoku", row["max_new_tokens"])])


def test_spg_gives_sudoku_three_examples_and_a_task_without_a_paper_is_refused() -> None:
    assert ("settings.shots", "0", "3") in differences(flat(CARD), [published("spg", "sudoku", 256)])
    assert published("d1", "math500", 512)["n"] == (500,) and published("spg", "gsm8k", 512)["n"] == (1319,)
    for protocol, task in [("strict", "sudoku"), ("d1", "chess"), ("espo", "sudoku")]:
        with pytest.raises(ValueError, match=f"no published settings of protocol={protocol!r} for task='{task}'"):
            published(protocol, task, 256)


def test_two_others_have_a_column_each_which_is_empty_where_nothing_is_set() -> None:
    others = [{"seed": (0,), "n": (256,)}, {"seed": (1, 2), "dtype": ("float32",)}]
    assert differences(flat(CARD), others) == [
        ("seed", "0", "0", "1 or 2"),
        ("dtype", "bfloat16", "", "float32"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([CARD, CARD | {"max_new_tokens": "256"}], "row 2: max_new_tokens is missing, of a wrong type"),
        (CARD | {"diffusion_steps": 1.5}, "row 1: diffusion_steps is"),
        (CARD | {"temperature": True}, "temperature is"),
        (CARD | {"n": [256]}, "n is"),
        (CARD | {"task": None}, "task is"),
        (CARD | {"task": "x" * 1001}, "task is"),
        (CARD | {"seed": int("9" * 1001)}, "seed is"),
        (CARD | {"settings": {"a": [[1]]}}, "settings.a is"),
        (CARD | {"settings": {"a": {}}}, "settings.a is"),
        (CARD | {"settings": {"a": ["x"] * 1000}}, "settings.a is"),
        (CARD | {"settings": {"a" * 5000: [[]]}}, "settings.aaa"),
        ([1], "row 1: task is missing"),
        ("3", "row 1: task is missing"),
        ("[" * 100_000, "is not JSON"),
        ("", "is not JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" + " " * MAX_BYTES + "]", "is larger than 16 MiB"),
    ],
    ids=range(17),
)
def test_a_hostile_card_is_refused(tmp_path, content, message) -> None:
    with pytest.raises(ValueError) as caught:
        read(tmp_path, content)
    assert message in str(caught.value) and len(str(caught.value)) < 1500


def test_a_card_that_is_not_there_or_no_file(tmp_path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ValueError, match=r"missing|not a regular file"):
            read_card(path)
