"""Sudoku graders by protocol. Fields: `puzzle`, 16 or 81 digits with 0 for a blank, and a reference `solution`."""

import re
from collections.abc import Mapping
from functools import lru_cache
from math import isqrt
from operator import eq
from typing import Any

from dllm_rl.tasks.answers import SPECIAL_TOKENS, cut, last_answer, last_closed_answer
from dllm_rl.tasks.base import Grader, Reward
from dllm_rl.tasks.rows import text_of
from dllm_rl.tasks.sudoku.solver import MOST_COMPLETIONS, completions, is_completion

_FENCED = re.compile(r"```([\d\s]++)```")  # ++ does not backtrack: linear time on any text


def sudoku_strict(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade by the rules of the game: any valid completion of the puzzle is right [ours]. The value is solve_rate.

    The grid is the first 16 (9x9: 81) non-blank characters of the last `<answer>` block, or of a text without one.
    """
    block = last_answer(completion)
    puzzle = fields["puzzle"]
    cells = first_cells(completion if block is None else block, len(puzzle))
    return score(puzzle, cells, solved_weight=1.0, match_weight=0.0)


def sudoku_d1(fields: Mapping[str, Any], completion: str) -> Reward:
    """Grade as in d1's evaluation [paper], 4x4 only.

    The value is the share of empty cells that agree with the reference; solve_rate is [ours].
    """
    found = d1_candidate(completion)
    return _against_reference(fields, first_cells(found, 16), parsed=bool(found))


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
    """Return the text that d1 reads as the grid, stripped: the first of five readings that is not blank, else ""."""
    opened = text.find("<answer>")
    closed = text.find("</answer>")
    if opened >= 0:
        fenced = _FENCED.search(text, opened)  # digits and blanks in a ``` fence
        if fenced and (found := fenced[1].strip()):
            return found
        if found := cut(text, opened + len("<answer>"), closed=True).strip():
            return found
    if closed >= 0:
        if found := cut(text, closed + len("</answer>"), SPECIAL_TOKENS).strip():
            return found
        for piece in text.split("</answer>")[:-1]:
            if len(piece) >= 16 and len(found := piece.rstrip()[-16:]) == 16 and found.isdecimal():
                return found
    # The first standalone 16-digit number.
    alone = re.search(r"(?<!\w)\d{16}(?!\w)", text)
    return alone[0] if alone else ""


def first_cells(text: str, count: int) -> str:
    """Return the first `count` characters of the text that are not white space."""
    # More splits than count - 1 cannot change the first `count` characters.
    return "".join(text.split(None, count - 1))[:count]


def first_digits(text: str, count: int) -> str:
    """Return the first `count` digits of the text, or all digits if there are fewer."""
    enough = re.match(rf"(?:\D*+\d){{{count}}}", text)  # digits after the last one that counts are not collected
    return "".join(re.findall(r"\d", enough[0] if enough else text))


def score(puzzle: str, cells: str, *, solved_weight: float, match_weight: float) -> Reward:
    """Compare the cells with every valid completion and score the best match. `parsed`: all cells are digits of the
    game.
    """
    grids = completions(puzzle)
    # A 9x9 puzzle may have more completions than are listed: in that case the rules decide.
    solved = cells in grids or (len(grids) == MOST_COMPLETIONS and is_completion(puzzle, cells))
    # Every completion has the same givens, so the best match over all cells is the best over the empty cells.
    size = len(puzzle)
    empty = puzzle.count("0")
    matching = size if solved else max(sum(map(eq, cells, grid)) for grid in grids)
    kept = sum(cell == given for cell, given in zip(cells, puzzle, strict=False) if given != "0")
    breakdown = {
        "solve_rate": float(solved),
        "cell_accuracy": (matching - kept) / empty if empty else 1.0,  # share of the cells that the puzzle leaves empty
        "correct_cells": float(matching - kept),
        "empty_cells": float(empty),
        "givens_kept": kept / (size - empty) if empty < size else 1.0,
    }
    parsed = solved or (len(cells) == size and not cells.strip("1234" if size == 16 else "123456789"))
    return Reward(solved_weight * solved + match_weight * matching / size, parsed, breakdown)


def by_rules(puzzle: str, cells: str) -> Reward:
    """Grade only by the rules of the game. The value, from 0 to 6, is solve_rate + 2 givens_kept + units + 2 digits.

    - givens_kept: Share of the clues that the grid has in the puzzle's places.
    - units: Share of rows, columns and boxes with every digit once.
    - digits: Share of the digits of all units that occur, any number of times.
    - solve_rate: 1 if every clue is present and every unit complete.

    Units and digits are counted with the puzzle's clues restored: otherwise changing a clue could earn a unit.
    """
    size = len(puzzle)
    side = isqrt(size)
    cells = cells.ljust(size, ".")  # a missing cell has no digit
    filled = [cell if given == "0" else given for given, cell in zip(puzzle, cells, strict=True)]
    wanted = set("123456789"[:side])
    found = [len(wanted.intersection(map(filled.__getitem__, unit))) for unit in units(side)]
    clues = size - puzzle.count("0")
    kept = sum(cell == given for cell, given in zip(cells, puzzle, strict=True) if given != "0")
    breakdown = {
        "givens_kept": kept / clues if clues else 1.0,
        "units": found.count(side) / len(found),
        "digits": sum(found) / (len(found) * side),
    }
    solved = float(kept == clues and found.count(side) == len(found))
    value = solved + 2 * breakdown["givens_kept"] + breakdown["units"] + 2 * breakdown["digits"]
    return Reward(value, wanted.issuperset(cells), breakdown | {"solve_rate": solved})


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
        raise ValueError(f"solution={solution!r} does not complete puzzle={puzzle!r} by the rules")
    if protocol == "spg" and len(valid) > 1:
        raise ValueError(f"puzzle={puzzle!r} has {len(valid)} completions; protocol spg has unique ones only")
    return {"puzzle": puzzle, "solution": solution}
