"""Every parser rule of every protocol, by hand: tests/golden/graded.jsonl holds a completion for each, each way."""

from pathlib import Path

import pytest
from graded import GRADED, fields_of
from sorting import Mini

from dllm_rl import tasks
from dllm_rl.tasks import Countdown, Sudoku
from dllm_rl.tasks.protocols import PROTOCOLS, TABLE, TASKS, find_grader, protocol_names, under_protocol


@pytest.mark.parametrize("row", GRADED, ids=lambda row: f"{row['task']}-{row['protocol']}-{row['rule']}")
def test_golden_grades(row: dict) -> None:
    """When a grade is meant to change, change the task's `version` too, and this file."""
    try:
        grader = find_grader(row["task"], row["protocol"])
    except ValueError as error:  # on a machine without a sandbox
        assert row["protocol"] == "sandbox"
        pytest.skip(str(error))
    graded = grader(fields_of(row), row["completion"])
    assert (graded.value, graded.parsed) == (row["value"], row["parsed"])
    assert dict(graded.breakdown) == row["breakdown"]
    assert TASKS[row["task"]].version == row["version"]


def test_the_table_has_a_line_for_each_task() -> None:
    rooms = {path.parent.name for path in Path(tasks.__file__).parent.glob("*/task.py")}
    assert {entry.task.__module__.split(".")[2] for entry in TABLE.values()} == rooms >= {"sudoku", "countdown"}
    assert all(entry.task.name == name for name, entry in TABLE.items())
    assert protocol_names() == ["strict", "d1", "spg", "espo", "dream", "math-verify", "sandbox"]


def test_every_protocol_has_a_right_and_a_wrong_completion() -> None:
    for task, protocols in PROTOCOLS.items():
        for protocol in protocols:
            values = {row["value"] for row in GRADED if (row["task"], row["protocol"]) == (task, protocol)}
            assert {0.0, 1.0} <= values, (task, protocol)


def test_unknown_names_are_refused_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="sudoku, countdown, gsm8k, math500"):
        find_grader("chess", "d1")
    with pytest.raises(ValueError, match="strict, d1, spg, espo, math-verify"):
        find_grader("math500", "strikt")
    with pytest.raises(ValueError, match="task='mini' has no protocols"):
        under_protocol(Mini(), "strict")


def test_a_task_under_a_protocol() -> None:
    task = under_protocol(Countdown(size=5, prompt_format="text"), "d1")
    assert (task.name, task.version, len(task)) == ("countdown", Countdown.version, 5)
    assert task[3].fields == Countdown(size=5, prompt_format="text")[3].fields
    assert task.reward(task[3], task[3].solution).value == 0.0  # its tags; d1 wants a box
    expression = task[3].solution.removeprefix("<answer>").removesuffix("</answer>")
    assert task.reward(task[3], f"\\boxed{{{expression}}}").value == 1.0
    grid = under_protocol(Sudoku(size=5), "strict")
    assert grid.reward(grid[0], grid[0].solution).breakdown["solve_rate"] == 1.0


@pytest.mark.parametrize(
    ("protocol", "asked", "answer"),
    [
        ("strict", "between <answer> and </answer>.", "<answer>(9-3)*4</answer>"),
        ("d1", "in \\boxed{}, between <answer> and </answer>.", "<answer>\\boxed{(9-3)*4}</answer>"),
        ("spg", "in \\boxed{}, between <answer> and </answer>.", "<answer>\\boxed{(9-3)*4}</answer>"),
        ("espo", "in \\boxed{}, between <answer> and </answer>.", "<answer>\\boxed{(9-3)*4}</answer>"),
        ("dream", "in one line without spaces, such as 86+28=114,114-18=96.", "9-3=6,6*4=24"),
    ],
)
def test_the_built_in_prompt_of_countdown_asks_for_what_the_protocol_reads(tmp_path, protocol, asked, answer):
    (tmp_path / "one.jsonl").write_text('{"input": "3,9,4", "output": "24"}')
    task = under_protocol(Countdown(path=tmp_path / "one.jsonl", prompt_format="text"), protocol)
    (message,) = task[0].prompt
    assert message["content"].endswith(asked)
    assert "exactly 24" in message["content"] and "3, 9, 4" in message["content"]
    assert task.reward(task[0], answer).value == 1.0
    mine = under_protocol(Countdown(prompt_format="{numbers} to {target}"), protocol)
    assert "<answer>" not in mine[0].prompt[0]["content"]  # a prompt of the user's stays
    assert under_protocol(Countdown(), protocol)[0] == Countdown()[0]
