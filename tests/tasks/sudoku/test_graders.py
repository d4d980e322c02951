"""Sudoku's rewards, worked by hand, and on hostile texts."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from linear import linear_time
from small_sudoku import GRID, brute_force, valid

from dllm_rl.tasks import Problem, Sudoku
from dllm_rl.tasks.sudoku.graders import by_rules, first_cells, score, sudoku_d1_training, units
from dllm_rl.tasks.sudoku.solver import SOLVED, completions

FIELDS = {"puzzle": "1234341200430021", "solution": "1234341221434321"}


@pytest.mark.parametrize(
    ("completion", "value", "parsed"),
    [
        ("<answer>1234341221434321</answer>", 1.0, True),
        ("<answer>row: 1 2 3 4, 3 4 1 2, 2 1 4 3, 4 3 2 1.</answer>", 1.0, True),  # the digits alone are read
        ("<answer>1234341221434321", 0.0, False),  # no closing tag
        ("1234341221434321", 0.0, False),
        ("<answer>123434122</answer>", 0.25, True),  # padded
        ("<answer>2222222222222222</answer><answer>1234341221434321</answer>", 1.0, True),
        ("<answer>1234341221434321</answer><answer>2</answer>", 0.0, True),
        ("<answer></answer>", 0.0, True),
    ],
)
def test_d1s_sudoku_training_reward(completion: str, value: float, parsed: bool) -> None:
    for graded in (
        sudoku_d1_training(FIELDS, completion),
        Sudoku(reward_rule="d1", prompt_format="text").reward(Problem("", FIELDS), completion),
    ):
        assert (graded.value, graded.parsed) == (value, parsed)


WEIGHTS = {"solved_weight": 1.0, "match_weight": 4.0}


def problem(puzzle: str) -> Problem:
    return Problem(prompt="", fields={"puzzle": puzzle})


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


TASKS = (Sudoku(), Sudoku(prompt_format="text"))


@given(st.one_of(st.text(), st.text(alphabet="1234 .\n0<answer>/", max_size=60)))
@settings(max_examples=40, deadline=None)
def test_any_text_gets_a_finite_grade(text: str) -> None:
    for task in TASKS:
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


ONE_CLUE = "1" + "0" * 15


@pytest.mark.parametrize(
    ("cells", "kept", "whole", "digits", "solved", "parsed"),
    [
        (GRID, 1, 12, 48, 1, True),
        ("2" + GRID[1:], 0, 12, 48, 0, True),  # the given is lost, and counted as put back
        ("1" * 16, 1, 0, 12, 0, True),  # one digit in each of the twelve units
        (GRID[:15] + "2", 1, 9, 45, 0, True),  # last row 4322, last column 4232, last box 4322
        (GRID[:15], 1, 9, 45, 0, False),
        ("1" + "5" * 15, 1, 0, 3, 0, False),  # the given is in one row, one column and one box
        ("", 0, 0, 3, 0, False),
    ],
)
def test_the_reward_by_rules_worked_by_hand(
    cells: str, kept: int, whole: int, digits: int, solved: int, parsed: bool
) -> None:
    graded = by_rules(ONE_CLUE, cells)
    assert graded.breakdown == {
        "givens_kept": kept,
        "units": whole / 12,
        "digits": digits / 48,
        "solve_rate": solved,
    }
    assert graded.value == pytest.approx(solved + 2 * kept + whole / 12 + 2 * digits / 48, abs=1e-12)
    assert graded.parsed is parsed
    task = Sudoku(clues=1, unique=False, reward_rule="rules")
    spaced = "\n".join(cells[i : i + 4] for i in range(0, 16, 4)) + "\nmore" * (len(cells) == 16)
    assert task.reward(problem(ONE_CLUE), spaced) == graded


@pytest.mark.parametrize("puzzle", ["0" * 16, ONE_CLUE, "1000000000300000", "1200000000000004", PUZZLE])
def test_the_rules_accept_the_completions_and_no_other_grid(puzzle: str) -> None:
    """On all 288 grids, against what the solver lists; a puzzle of few clues has many right answers."""
    right = [grid for grid in SOLVED if by_rules(puzzle, grid).breakdown["solve_rate"] == 1.0]
    assert tuple(right) == completions(puzzle)
    assert all(by_rules(puzzle, grid).value < 6 for grid in SOLVED if grid not in right)


def test_the_rules_agree_with_brute_force() -> None:
    """Every one of the 4^6 ways to fill six blanks: the reward is whole for the valid grids alone."""
    puzzle = "1234" + "000000" + GRID[10:]
    blanks = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    found = []
    for number in range(4 ** len(blanks)):
        grid = list(puzzle)
        for place, cell in enumerate(blanks):
            grid[cell] = "1234"[number // 4**place % 4]
        graded = by_rules(puzzle, "".join(grid))
        assert (graded.value == 6) == valid("".join(grid)) == graded.breakdown["solve_rate"]
        found += ["".join(grid)] if graded.value == 6 else []
    assert tuple(sorted(found)) == brute_force(puzzle)


def test_the_rules_of_9x9() -> None:
    assert len(units(9)) == 27 and all(len(unit) == 9 for unit in units(9))
    assert units(9)[-1] == (60, 61, 62, 69, 70, 71, 78, 79, 80)
    puzzle, solution = Sudoku(side=9, clues=50)[0].fields.values()
    assert by_rules(puzzle, solution).value == 6
    blank = puzzle.index("0")
    wrong = solution[:blank] + ("1" if solution[blank] != "1" else "2") + solution[blank + 1 :]
    assert by_rules(puzzle, wrong).value == pytest.approx(2 + 24 / 27 + 2 * 240 / 243, abs=1e-12)
