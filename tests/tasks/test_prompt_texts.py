"""Prompts from templates, and the opening of the assistant's turn."""

import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from readme import README

from dllm_rl.evaluation.grading import grade_file
from dllm_rl.tasks.countdown import Countdown
from dllm_rl.tasks.math import GSM8K, MATH500
from dllm_rl.tasks.protocols import under_protocol
from dllm_rl.tasks.sudoku import Sudoku

EXAMPLES = README.parent / "recipes" / "examples"


def test_opening_begins_the_assistants_turn() -> None:
    asked = Countdown(prompt_format="{numbers}: {target}", opening="<reasoning>")[0]
    assert asked.prompt[-1] == {"role": "assistant", "content": "<reasoning>"} and len(asked.prompt) == 2
    for without_turn in ({"prompt_format": "text", "chat": False}, {"prompt_format": "compact"}):
        with pytest.raises(ValueError, match="opening"):
            Countdown(opening="<reasoning>", **without_turn)


METRICS = {Sudoku: "solve_rate", Countdown: "accuracy"}
PROTOCOLS = {Sudoku: ("strict", "d1"), Countdown: ("strict",)}  # d1 reads Countdown's expression in a box


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(
    "opening", ["", "<reasoning>", "<answer>", "<answer>\n", "<reasoning>\n</reasoning>\n<answer>\n"]
)
@pytest.mark.parametrize("rule", ["own", "d1"])
@pytest.mark.parametrize("kind", METRICS)
def test_what_an_opening_began_is_graded_in_training_evaluation_and_from_a_file(kind, rule, opening, tmp_path) -> None:
    """A solution, without what the opening has of it, is right; the same with other digits is not."""
    task = kind(prompt_format="text", opening=opening, reward_rule=rule, size=1)
    problem = task[0]
    right = problem.solution
    if "<answer>" in opening:  # what a model writes behind it
        right = right.removeprefix("<answer>").lstrip("\n")
    wrong = re.sub(r"\d", "4", right)
    metric = METRICS[kind]
    for completion, solved in ((right, 1.0), (wrong, 0.0)):
        assert task.reward(problem, completion).breakdown[metric] == solved
        row = problem.fields | {"prompt": problem.prompt, "completion": completion}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        for protocol in PROTOCOLS[kind]:
            under = under_protocol(task, protocol)
            assert under.reward(problem, completion).breakdown[metric] == solved
            assert grade_file(tmp_path / "rows.jsonl", task=task.name, protocol=protocol)[metric] == solved


def test_an_opened_turn_may_be_in_the_template(tmp_path) -> None:
    """A prompt of messages counts, whether `opening` or the template has them."""
    messages = [{"role": "user", "content": "{puzzle}"}, {"role": "assistant", "content": "<answer>"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    task = Sudoku(prompt_format=tmp_path / "chat.json")
    assert task.reward(task[0], f"{task[0].fields['solution']}</answer>").breakdown["solve_rate"] == 1
    for prompt in ("<answer>", [], None, ["<answer>"], messages[:1], [*messages, messages[0]], [{"role": "assistant"}]):
        assert Sudoku.opened_layout(prompt) == ""


@pytest.mark.parametrize("kind", [Sudoku, Countdown])
def test_d1s_reward_of_compact_answers_is_refused(kind) -> None:
    """It would be 0 for the solution, too."""
    with pytest.raises(ValueError, match=r"prompt_format='compact'.*use prompt_format='text'"):
        kind(reward_rule="d1")
    task = kind(reward_rule="d1", prompt_format="text", size=1)
    assert task.reward(task[0], task[0].solution).value == 1


def test_templates(tmp_path) -> None:
    asked = Sudoku(prompt_format="Solve {puzzle}, {x} \\boxed{}", chat=False)[0]
    assert asked.prompt.startswith("Solve ") and asked.prompt.endswith(", {x} \\boxed{}")
    (tmp_path / "words.txt").write_text("Bitte: {puzzle}")
    (tmp_path / "chat.json").write_text(
        '[{"role": "user", "content": "Q {puzzle}"}, {"role": "assistant", "content": "<reasoning>"}]'
    )
    (tmp_path / "bad.txt").write_text("nothing")
    assert Sudoku(prompt_format=tmp_path / "words.txt")[0].prompt[0]["content"].startswith("Bitte: ")
    chat = Sudoku(prompt_format=str(tmp_path / "chat.json"))[0].prompt
    assert chat[0]["content"].count("\n") == 3 and chat[1] == {"role": "assistant", "content": "<reasoning>"}
    in_a_line = Sudoku(prompt_format="Fill in {cells}.", chat=False)[0]
    assert in_a_line.prompt == f"Fill in {in_a_line.fields['puzzle']}." and "0" in in_a_line.prompt
    with pytest.raises(ValueError, match=r"lacks \{puzzle\} or \{cells\}; it needs \{puzzle\} or \{cells\}$"):
        Sudoku(prompt_format=tmp_path / "bad.txt")
    with pytest.raises(ValueError, match="neither a template"):
        Sudoku(prompt_format="no such file")


def test_the_prompts_and_puzzles_that_the_page_writes_are_d1s(tmp_path, monkeypatch) -> None:
    """In a stand-in for d1's folder: its modules have an instruction each, and prompts are joined as in its code."""
    names = {"sudoku": "SUDOKU", "countdown": "CTD", "gsm8k": "GSM", "math500": "MATH500"}
    words = {name: f"\nDo {name} in \\boxed{{}}. \n" for name in names}
    for name, constant in names.items():
        module = SimpleNamespace(**{f"{constant}_SYSTEM_PROMPT": words[name]})
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "eval").mkdir()
    (tmp_path / "dataset").mkdir()
    monkeypatch.chdir(tmp_path / "eval")
    puzzles = [problem.fields for problem in Sudoku(size=500)]
    lines = [f"{each['puzzle']},{each['solution']}" for each in puzzles]
    (tmp_path / "dataset" / "4x4_test_sudoku.csv").write_text("\n".join(["Puzzle,Solution", *lines]))
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(EXAMPLES / "d1_prompts.py"))

    task = Sudoku(path="sudoku.csv", prompt_format="sudoku.txt", opening="<reasoning>")
    np.random.seed(42)  # as d1's evaluation draws
    drawn = np.random.choice(500, 256, replace=False)
    assert [each.fields for each in task] == [puzzles[i] for i in drawn]
    puzzle = puzzles[drawn[0]]["puzzle"]
    asked = f"{words['sudoku']}\n\nSolve the following Sudoku puzzle: {puzzle}\n"
    assert task[0].prompt == [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "<reasoning>"},
    ]
    Path("one.jsonl").write_text('{"input": "30,100,93", "output": "23"}')
    (asked,) = Countdown(path="one.jsonl", prompt_format="countdown.txt")[0].prompt
    assert asked["content"] == f"{words['countdown']}\n\nNumbers: {[30, 100, 93]}\nTarget: 23"
    Path("one.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2", "problem": "1 + 2?"}')
    for name, task, question in (("gsm8k", GSM8K, "1 + 1?"), ("math500", MATH500, "1 + 2?")):
        (asked,) = task(path="one.jsonl", split="test", prompt_format=f"{name}.txt")[0].prompt
        assert asked["content"] == f"{words[name]}\n\n{question}"
