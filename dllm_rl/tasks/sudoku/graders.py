"""Sudoku graders by protocol.

Fields: `puzzle`, 16 or 81 digits with 0 for a blank, and a reference `solution`. The digits of a puzzle that are not
blank are its givens. A solution is a grid without blanks that has every given and obeys the rules of the game; a puzzle
may have several. A completion is the text of a model, except in the names `completions` and `is_completion` of the
solver, which are about solutions.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from math import isqrt
from operator import eq
from typing import Any

from dllm_rl.tasks.answers import SPECIAL_TOKENS, cut, last_answer, last_closed_answer
from dllm_rl.tasks.base import Grader, Reward
from dllm_rl.tasks.rows import text_of
from dllm_rl.tasks.sudoku.solver import MAX_COMPLETIONS, completions, is_completion

_FENCED = re.compile(r"```([\d\s]++)```")  # ++ does not backtrack: linear time on any text


def sudoku_strict(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade every solution of the puzzle as right, not only the reference [ours]. The value is solve_rate, 0 or 1.

    The grid is the first 16 (9x9: 81) characters, without white space, of the last `<answer>` block, or of the
    completion if it has no block.
    """
    block = last_answer(completion)
    puzzle = fields["puzzle"]
    cells = first_cells(completion if block is None else block, len(puzzle))
    return score(puzzle, cells, solved_weight=1.0, match_weight=0.0)


def sudoku_d1(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in d1's evaluation [paper], 4x4 only.

    The value is the share of empty cells that agree with the reference solution; solve_rate is [ours].
    """
    candidate = d1_candidate(completion)
    return _against_reference(fields, first_cells(candidate, 16), parsed=bool(candidate))


def sudoku_d1_training(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade by d1's training reward [paper]: d1's evaluation of the first 16 digits in the last answer block."""
    block = last_closed_answer(completion)
    return _against_reference(fields, first_digits(block or "", 16), parsed=block is not None)


def _against_reference(fields: Mapping[str, Any], cells: str, *, parsed: bool) -> Reward:
    puzzle = fields["puzzle"]
    cells = cells.ljust(16, "0")  # a missing cell is wrong
    empty = puzzle.count("0")
    triples = zip(puzzle, cells, fields["solution"], strict=True)
    correct = sum(cell == right for given, cell, right in triples if given == "0")
    accuracy = correct / empty if empty else 0.0
    rates = {"solve_rate": float(is_completion(puzzle, cells)), "cell_accuracy": accuracy}
    return Reward(accuracy, parsed, rates | {"correct_cells": float(correct), "empty_cells": float(empty)})


def d1_candidate(text: str) -> str:
    """Return the text that d1 reads as the grid, without white space at its ends; "" if there is none.

    d1 looks in five places, in the order of the code below. The first that has more than white space is the grid.
    """
    answer_start = text.find("<answer>")
    answer_end = text.find("</answer>")
    if answer_start >= 0:
        fenced = _FENCED.search(text, answer_start)  # only digits and white space in a ``` block
        if fenced and (candidate := fenced[1].strip()):
            return candidate
        if candidate := cut(text, answer_start + len("<answer>"), closed=True).strip():
            return candidate
    if answer_end >= 0:
        if candidate := cut(text, answer_end + len("</answer>"), SPECIAL_TOKENS).strip():
            return candidate
        for piece in text.split("</answer>")[:-1]:
            if len(piece) >= 16 and len(candidate := piece.rstrip()[-16:]) == 16 and candidate.isdecimal():
                return candidate
    # The first standalone 16-digit number.
    standalone = re.search(r"(?<!\w)\d{16}(?!\w)", text)
    return standalone[0] if standalone else ""


def first_cells(text: str, count: int) -> str:
    """Return the first `count` characters of the text that are not white space."""
    # count - 1 splits are enough: each of the resulting pieces begins with at least one of the wanted characters.
    return "".join(text.split(None, count - 1))[:count]


def first_digits(text: str, count: int) -> str:
    """Return the first `count` digits of the text, or all digits if there are fewer."""
    prefix = re.match(rf"(?:\D*+\d){{{count}}}", text)  # stops at the last digit that is needed
    return "".join(re.findall(r"\d", prefix[0] if prefix else text))


def score(puzzle: str, cells: str, *, solved_weight: float, match_weight: float) -> Reward:
    """Compare the cells with every solution of the puzzle, and score the best match.

    `parsed` is true if there are cells for the whole grid, and all are valid digits.
    """
    grids = completions(puzzle)
    # `completions` lists at most MAX_COMPLETIONS solutions of a 9x9 puzzle. If there may be more, check the rules.
    solved = cells in grids or (len(grids) == MAX_COMPLETIONS and is_completion(puzzle, cells))
    # Every solution has the same givens, so the best match over all cells is the best over the empty cells.
    size = len(puzzle)
    empty = puzzle.count("0")
    num_matching = size if solved else max(sum(map(eq, cells, grid)) for grid in grids)
    givens_kept = sum(cell == given for cell, given in zip(cells, puzzle, strict=False) if given != "0")
    breakdown = {
        "solve_rate": float(solved),
        "cell_accuracy": (num_matching - givens_kept) / empty if empty else 1.0,
        "correct_cells": float(num_matching - givens_kept),
        "empty_cells": float(empty),
        "givens_kept": givens_kept / (size - empty) if empty < size else 1.0,
    }
    parsed = solved or (len(cells) == size and not cells.strip("1234" if size == 16 else "123456789"))
    return Reward(solved_weight * solved + match_weight * num_matching / size, parsed, breakdown)


def by_rules(puzzle: str, cells: str) -> Reward:
    """Give partial credit for each rule of the game that the grid obeys, without comparing it with solutions.

    The value, from 0 to 6, is solve_rate + 2 givens_kept + units + 2 digits.

    - givens_kept: Share of the puzzle's givens that the grid has in the same cells.
    - units: Share of the units (rows, columns and boxes) that have every digit once.
    - digits: Share of all digits that a unit has at least once, as a mean over all units.
    - solve_rate: 1 if every given is present and every unit complete.

    Units and digits are counted after the puzzle's givens are restored. Otherwise changing a given could complete a
    unit.
    """
    size = len(puzzle)
    side = isqrt(size)
    cells = cells.ljust(size, ".")  # a missing cell has no digit
    filled = [cell if given == "0" else given for given, cell in zip(puzzle, cells, strict=True)]
    all_digits = set("123456789"[:side])
    digits_per_unit = [len(all_digits.intersection(map(filled.__getitem__, unit))) for unit in units(side)]
    num_givens = size - puzzle.count("0")
    num_givens_kept = sum(cell == given for cell, given in zip(cells, puzzle, strict=True) if given != "0")
    breakdown = {
        "givens_kept": num_givens_kept / num_givens if num_givens else 1.0,
        "units": digits_per_unit.count(side) / len(digits_per_unit),
        "digits": sum(digits_per_unit) / (len(digits_per_unit) * side),
    }
    solved = float(num_givens_kept == num_givens and digits_per_unit.count(side) == len(digits_per_unit))
    value = solved + 2 * breakdown["givens_kept"] + breakdown["units"] + 2 * breakdown["digits"]
    return Reward(value, all_digits.issuperset(cells), breakdown | {"solve_rate": solved})


@lru_cache(maxsize=2)
def units(side: int) -> tuple[tuple[int, ...], ...]:
    """Return the cells of every row, column and box."""
    box = isqrt(side)
    rows = [tuple(range(start, start + side)) for start in range(0, side * side, side)]
    corners = [row * side + column for row in range(0, side, box) for column in range(0, side, box)]
    boxes = [tuple(corner + row * side + column for row in range(box) for column in range(box)) for corner in corners]
    return (*rows, *zip(*rows, strict=True), *boxes)


GRADERS: dict[str, Grader] = {"strict": sudoku_strict, "d1": sudoku_d1, "spg": sudoku_d1, "espo": sudoku_d1}


def read_fields(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """Read `puzzle` and `solution` of a stored row; a dot is a blank too. Raises ValueError if they are malformed."""
    puzzle = text_of(row, "puzzle").replace(".", "0")
    solution = text_of(row, "solution")
    if protocol != "strict" and len(puzzle) != 16:
        raise ValueError(f"puzzle={puzzle!r}: protocol {protocol} is for 4x4, 16 characters; use strict for 9x9")
    valid = completions(puzzle)
    if not is_completion(puzzle, solution):
        raise ValueError(f"solution={solution!r} is not a solution of puzzle={puzzle!r}")
    if protocol == "spg" and len(valid) > 1:
        raise ValueError(
            f"puzzle={puzzle!r} has {len(valid)} solutions; protocol spg needs puzzles with exactly one solution"
        )
    return {"puzzle": puzzle, "solution": solution}
