"""4x4 Sudoku against brute force, and its reward against values worked by hand."""

import os
import subprocess
import sys
from itertools import product
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import linear_time

from dllm_rl.tasks.base import Problem, Task
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.tasks.sudoku.graders import first_cells, score
from dllm_rl.tasks.sudoku.grids import SOLVED, SPLITS, completions

GRID = "1234341221434321"
WEIGHTS = {"solved_weight": 1.0, "match_weight": 4.0}
UNITS = (
    [[4 * r + c for c in range(4)] for r in range(4)]
    + [[4 * r + c for r in range(4)] for c in range(4)]
    + [[4 * (r + i) + c + j for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
)


def valid(grid: str) -> bool:
    return all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)


def brute_force(puzzle: str) -> tuple[str, ...]:
    """Every way to fill the blanks, tried."""
    blanks = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    found = []
    for filling in product("1234", repeat=len(blanks)):
        grid = list(puzzle)
        for cell, digit in zip(blanks, filling, strict=True):
            grid[cell] = digit
        if valid("".join(grid)):
            found.append("".join(grid))
    return tuple(sorted(found))


def problem(puzzle: str) -> Problem:
    return Problem(prompt="", fields={"puzzle": puzzle})


def test_the_288_grids_are_all_and_only_the_solved_ones() -> None:
    assert len(SOLVED) == len(set(SOLVED)) == 288
    assert all(valid(grid) for grid in SOLVED)
    # Relabelling digits gives 24 first rows, and 3 and 4 in the first box can stand in 2 orders: 288 / 48 with 1234/34.
    assert len(brute_force("1234341200000000")) + len(brute_force("1234342100000000")) == 288 // (24 * 2)


def test_splits_are_disjoint_by_solution_and_cover_everything() -> None:
    assert {name: len(grids) for name, grids in SPLITS.items()} == {"train": 176, "validation": 24, "test": 88}
    assert sorted(sum(SPLITS.values(), ())) == sorted(SOLVED)
    for split, grids in SPLITS.items():
        for seed in (0, 7):
            task = Sudoku(split=split, size=300, seed=seed)
            assert {task[i].fields["solution"] for i in range(300)} <= set(grids)


@pytest.mark.parametrize("blanks", range(8))
def test_completions_agree_with_brute_force(blanks: int) -> None:
    rng = Random(blanks)
    for _ in range(8 if blanks < 6 else 2):
        puzzle = list(rng.choice(SOLVED))
        for cell in rng.sample(range(16), blanks):
            puzzle[cell] = "0"
        assert completions("".join(puzzle)) == brute_force("".join(puzzle))


def test_completions_of_nothing_and_of_the_impossible() -> None:
    assert completions("0" * 16) == SOLVED
    with pytest.raises(ValueError, match="no valid completion"):
        completions("11" + "0" * 14)
    with pytest.raises(ValueError, match="16 characters"):
        completions("1")


@pytest.mark.parametrize("clues", [4, 8, (10, 12), 16])
def test_unique_problems(clues: int | tuple[int, int]) -> None:
    task = Sudoku(clues=clues, size=60, seed=3)
    low, high = (clues, clues) if isinstance(clues, int) else clues
    counts = set()
    for index in range(60):
        puzzle, solution = task[index].fields["puzzle"], task[index].fields["solution"]
        counts.add(16 - puzzle.count("0"))
        assert completions(puzzle) == (solution,)
        assert task[index].prompt == puzzle.replace("0", ".") + "="
        assert task[index].solution == solution
        assert task.reward(task[index], solution).value == 5.0
    assert counts == set(range(low, high + 1))


def test_problems_with_several_completions() -> None:
    task = Sudoku(clues=(0, 5), unique=False, size=200)
    several = [len(completions(task[i].fields["puzzle"])) for i in range(200)]
    assert max(several) == 288 and min(several) == 1
    assert all(task[i].fields["solution"] in completions(task[i].fields["puzzle"]) for i in range(200))


def test_a_problem_depends_on_seed_split_and_index_only() -> None:
    code = (
        "from dllm_rl.tasks.sudoku import Sudoku\n"
        "print([Sudoku(size=50, seed=5, split=s)[i].prompt for s in ('train', 'test') for i in range(50)])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "4242")
    }
    here = [Sudoku(size=50, seed=5, split=s)[i].prompt for s in ("train", "test") for i in reversed(range(50))]
    assert printed == {f"{here[49::-1] + here[:49:-1]}\n".encode()}
    assert Sudoku(size=9)[8] == Sudoku(size=90)[8] != Sudoku(size=90, seed=1)[8]


def test_the_problems_themselves_are_pinned() -> None:
    """A change here changes what every stored result was measured on: `version` must change with it."""
    assert [Sudoku(size=3)[i].prompt for i in range(3)] == [
        ".1434...321414.2=",
        "231.41233.41.4..=",
        "231.4.3..24334.1=",
    ]


# GRID's puzzle with the last two rows' outer cells blank: 12, 13 (values 4, 3) and 8, 9 (values 2, 1).
PUZZLE = "1234341200430021"


def cells(correct: int) -> dict[str, float]:
    """The counts of a grade of PUZZLE, which has four empty cells."""
    return {"correct_cells": float(correct), "empty_cells": 4.0}


def test_reward_worked_by_hand() -> None:
    assert completions(PUZZLE) == (GRID,)
    task = Sudoku()
    right = task.reward(problem(PUZZLE), GRID)
    assert (right.value, right.parsed) == (1 + 4 * 16 / 16, True)
    assert right.breakdown == {"solve_rate": 1.0, "cell_accuracy": 1.0, **cells(4), "givens_kept": 1.0}

    one_wrong = task.reward(problem(PUZZLE), GRID[:8] + "3" + GRID[9:])  # an empty cell
    assert (one_wrong.value, one_wrong.parsed) == (4 * 15 / 16, True)
    assert one_wrong.breakdown == {"solve_rate": 0.0, "cell_accuracy": 3 / 4, **cells(3), "givens_kept": 1.0}

    given_broken = task.reward(problem(PUZZLE), "2" + GRID[1:])
    assert given_broken.value == 4 * 15 / 16
    assert given_broken.breakdown == {"solve_rate": 0.0, "cell_accuracy": 1.0, **cells(4), "givens_kept": 11 / 12}

    copied = task.reward(problem(PUZZLE), PUZZLE)  # zeros are no digits of the game
    assert (copied.value, copied.parsed) == (4 * 12 / 16, False)
    assert copied.breakdown == {"solve_rate": 0.0, "cell_accuracy": 0.0, **cells(0), "givens_kept": 1.0}

    weighted = Sudoku(solved_weight=2.0, match_weight=0.5)
    assert weighted.reward(problem(PUZZLE), GRID).value == 2.5
    assert weighted.reward(problem(PUZZLE), GRID[:15] + "x").value == 0.5 * 15 / 16


def test_a_valid_grid_of_another_puzzle_is_not_solved() -> None:
    other = next(grid for grid in SOLVED if grid[0] != "1")
    assert Sudoku().reward(problem(PUZZLE), other).breakdown["solve_rate"] == 0.0


def test_the_best_of_several_completions_counts() -> None:
    first, second = "1234341221434321", "1234341223414123"
    puzzle = "1234341200000000"
    assert set(completions(puzzle)) >= {first, second}
    for grid in completions(puzzle):
        assert score(puzzle, grid, **WEIGHTS).breakdown["solve_rate"] == 1.0
    cells = second[:15] + "1"  # 15 of second, fewer of every other
    best = max(sum(a == b for a, b in zip(cells, grid, strict=True)) for grid in brute_force(puzzle))
    assert best == 15 and score(puzzle, cells, **WEIGHTS).value == 4 * 15 / 16
    assert score(puzzle, cells, **WEIGHTS).breakdown["cell_accuracy"] == 7 / 8


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("", ""),
        ("   \n\t", ""),
        (" 12 34\n34 12 21 43 43 21", GRID),
        ("1 2 3 4 3 4 1 2 2 1 4 3 4 3 2 1 4 4 4", GRID),
        (GRID + "9999", GRID),
        ("1" * 40, "1" * 16),
        ("a b", "ab"),
        ("\u0661\u2003\u0662", "\u0661\u0662"),
    ],
)
def test_first_cells(text: str, cells: str) -> None:
    assert first_cells(text, 16) == cells


HOSTILE = ["", "<|endoftext|>" * 9, "\uff11\uff12\uff13\uff14" * 4, "\x00" * 16, "\u0966" * 16, "\ud800", "\u0663" * 99]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_without_digits_scores_nothing(text: str) -> None:
    reward = Sudoku().reward(problem(PUZZLE), text)
    assert (reward.value, reward.parsed) == (0.0, False)
    zero = dict.fromkeys(("solve_rate", "cell_accuracy", "givens_kept"), 0.0)
    assert reward.breakdown == {**zero, **cells(0)}


def test_an_unreadable_character_costs_its_own_cell_only() -> None:
    assert Sudoku().reward(problem(PUZZLE), "x" + GRID[1:]).value == 4 * 15 / 16
    assert Sudoku().reward(problem(PUZZLE), "x" + GRID[1:]).parsed is False
    assert Sudoku().reward(problem(PUZZLE), GRID[:10]).value == 4 * 10 / 16
    assert Sudoku().reward(problem(PUZZLE), GRID[:15] + "2").parsed is True
    assert Sudoku().reward(problem(PUZZLE), GRID[:15] + "5").parsed is False  # no digit of the game


def test_text_prompts_read_the_last_answer_block() -> None:
    task = Sudoku(prompt_format="text", size=5)
    asked = task[0]
    lines = asked.fields["puzzle"].replace("0", ".")
    assert asked.prompt[0]["role"] == "user"
    assert "\n".join(lines[i : i + 4] for i in (0, 4, 8, 12)) in asked.prompt[0]["content"]
    assert task.reward(asked, asked.solution).breakdown["solve_rate"] == 1.0
    assert task.reward(asked, "<answer>1</answer> then " + asked.solution).breakdown["solve_rate"] == 1.0
    assert task.reward(asked, asked.solution + "<answer>?</answer>").breakdown["solve_rate"] == 0.0
    assert task.reward(asked, asked.solution.removesuffix("</answer>")).breakdown["solve_rate"] == 1.0
    assert task.reward(asked, asked.fields["solution"]).value == 0.0  # no block
    assert Sudoku(prompt_format="text", chat=False)[0].prompt == Sudoku(prompt_format="text")[0].prompt[0]["content"]


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
    with pytest.raises(ValueError, match=r"lacks \{puzzle\}"):
        Sudoku(prompt_format=tmp_path / "bad.txt")
    with pytest.raises(ValueError, match="neither a template"):
        Sudoku(prompt_format="no such file")


@pytest.mark.parametrize(
    "bad",
    [
        {"split": "dev"},
        {"clues": 3},
        {"clues": (12, 10)},
        {"clues": 17},
        {"clues": 25, "side": 9},
        {"side": 5},
        {"unique": False, "side": 9, "clues": 30},
        {"size": 0},
        {"reward_rule": "d1", "side": 9, "clues": 30},
        {"opening": "<reasoning>"},
        {"shots": -1, "prompt_format": "text"},
        {"shots": 1},
    ],
)
def test_bad_settings_name_the_field(bad: dict) -> None:
    with pytest.raises(Exception, match=next(iter(bad))):
        Sudoku(**bad)


def test_the_task_protocol_and_its_bounds() -> None:
    task = Sudoku(size=4)
    assert isinstance(task, Task) and len(task) == 4 and len(list(task)) == 4
    with pytest.raises(IndexError):
        task[4]


@given(st.one_of(st.text(), st.text(alphabet="1234 .\n0<answer>/", max_size=60)))
@settings(max_examples=300, deadline=None)
def test_any_text_gets_a_finite_grade(text: str) -> None:
    for task in (Sudoku(), Sudoku(prompt_format="text")):
        reward = task.reward(problem(PUZZLE), text)
        stripped = "".join(text.split())[:16]
        assert 0.0 <= reward.value <= 5.0
        assert reward.breakdown["empty_cells"] == 4.0
        assert all(0.0 <= n <= 1.0 for name, n in reward.breakdown.items() if name not in cells(0))
        assert reward.breakdown["correct_cells"] == 4.0 * reward.breakdown["cell_accuracy"]
        if task.prompt_format == "compact":
            assert reward.breakdown["solve_rate"] == (stripped == GRID)
            assert reward.parsed == (len(stripped) == 16 and set(stripped) <= set("1234"))
            assert reward.value == (stripped == GRID) + sum(map(str.__eq__, stripped, GRID)) / 4


@pytest.mark.parametrize("piece", ["1", " ", "1 ", "<answer>", "</answer>", "\u2003x", "é"])
def test_a_million_characters_take_linear_time(piece: str) -> None:
    text = piece * (10**6 // len(piece))
    for task in (Sudoku(), Sudoku(prompt_format="text")):
        with linear_time():
            task.reward(problem(PUZZLE), text)


def test_worked_examples_come_from_train_solutions() -> None:
    plain, shown = (Sudoku(split="test", prompt_format="text", shots=shots, size=40) for shots in (0, 3))
    for index in range(40):
        assert shown[index].fields == plain[index].fields == Sudoku(split="test")[index].fields
        examples, _, asked = shown[index].prompt[0]["content"].partition("Your puzzle:\n")
        assert asked == plain[index].prompt[0]["content"].partition("exactly once; ")[2].partition("\n\n")[2]
        solved = [part[:19].replace("\n", "") for part in examples.split("Solved:\n")[1:]]
        assert len(solved) == len(set(solved) & set(SPLITS["train"])) == 3 or len(set(solved)) < 3
        assert set(solved) <= set(SPLITS["train"])
    train = Sudoku(prompt_format="text", shots=3, size=200)
    for problem in train:
        solution = problem.fields["solution"]
        assert "\n".join(solution[i : i + 4] for i in (0, 4, 8, 12)) not in problem.prompt[0]["content"]
    assert len({problem.prompt[0]["content"].partition("Your puzzle")[0] for problem in train}) > 150


def test_stored_puzzles(tmp_path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(f"Puzzle,Solution\n{PUZZLE},{GRID}\n{PUZZLE.replace('0', '.')},{GRID}\n")
    task = Sudoku(path=path)
    assert len(task) == 2 and task[0].fields == task[1].fields == {"puzzle": PUZZLE, "solution": GRID}
    assert task[0].prompt == PUZZLE.replace("0", ".") + "="
    for row, message in ((f"{PUZZLE},{GRID[:15]}2", "is no completion"), (f"{PUZZLE[1:]},{GRID}", "16 characters")):
        bad = tmp_path / f"{len(message)}.csv"
        bad.write_text(f"Puzzle,Solution\n{PUZZLE},{GRID}\n{row}\n")
        with pytest.raises(ValueError, match=f"line 3: .*{message}"):
            len(Sudoku(path=bad))
