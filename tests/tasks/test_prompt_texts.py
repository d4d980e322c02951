"""Prompts from templates, and the opening of the assistant's turn."""

import pytest

from dllm_rl.tasks.countdown import Countdown
from dllm_rl.tasks.sudoku import Sudoku


def test_opening_begins_the_assistants_turn() -> None:
    asked = Countdown(prompt_format="{numbers}: {target}", opening="<reasoning>")[0]
    assert asked.prompt[-1] == {"role": "assistant", "content": "<reasoning>"} and len(asked.prompt) == 2
    for without_turn in ({"prompt_format": "text", "chat": False}, {"prompt_format": "compact"}):
        with pytest.raises(ValueError, match="opening"):
            Countdown(opening="<reasoning>", **without_turn)


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
