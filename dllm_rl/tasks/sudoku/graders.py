"""Sudoku graders by protocol. Fields: `puzzle`, 16 or 81 digits with 0 for a blank, and a reference `solution`."""

import re
from collections.abc import Mapping
from operator import eq
from typing import Any

from dllm_rl.tasks.answers import last_answer, last_closed_answer, standalone_digits, until_end, until_special
from dllm_rl.tasks.base import Grader, Reward
from dllm_rl.tasks.rows import text_of
from dllm_rl.tasks.sudoku.grids import MOST_COMPLETIONS, completions, is_completion

_FENCED = re.compile(r"```([\d\s]++)```")


def sudoku_strict(fields: Mapping[str, Any], completion: str) -> Reward:
    """The rules of the game: any valid completion of the puzzle is right [ours].

    The grid is the first 16 (or 81) non-blank characters of the last `<answer>` block, or of the whole text when it has
    no such block. `parsed`: they are all digits of the game. Value: solve_rate.
    """
    block = last_answer(completion)
    puzzle = fields["puzzle"]
    cells = first_cells(completion if block is None else block, len(puzzle))
    return score(puzzle, cells, solved_weight=1.0, match_weight=0.0)


def sudoku_d1(fields: Mapping[str, Any], completion: str) -> Reward:
    """d1's evaluation [paper]: empty cells that agree with the reference solution. 4x4 only. Value: cell_accuracy.

    solve_rate, which d1 does not report, is ours: the same cells, judged by the rules.
    """
    found = d1_candidate(completion)
    return _against_reference(fields, first_cells(found, 16), parsed=bool(found))


def sudoku_d1_training(fields: Mapping[str, Any], completion: str) -> Reward:
    """d1's training reward [paper]: empty cells that agree with the reference, among the last answer block's digits."""
    block = last_closed_answer(completion)
    return _against_reference(fields, first_digits(block or "", 16), parsed=block is not None)


def _against_reference(fields: Mapping[str, Any], cells: str, *, parsed: bool) -> Reward:
    puzzle, cells = fields["puzzle"], cells.ljust(16, "0")
    empty = puzzle.count("0")
    triples = zip(puzzle, cells, fields["solution"], strict=True)
    correct = sum(cell == right for given, cell, right in triples if given == "0")
    accuracy = correct / empty if empty else 0.0
    rates = {"solve_rate": float(is_completion(puzzle, cells)), "cell_accuracy": accuracy}
    return Reward(accuracy, parsed, rates | {"correct_cells": float(correct), "empty_cells": float(empty)})


def d1_candidate(text: str) -> str:
    """The text that d1 takes for the grid, stripped; "" without one. The first non-blank of:

    1. digits and blanks in a ``` fence after the first <answer>;
    2. from the first <answer> to the first of <|eot_id|>, <|endoftext|> and </answer>;
    3. from the first </answer> to <|eot_id|>, <|endoftext|> or the end;
    4. the first 16 digits that stand before blanks and </answer>;
    5. the first standalone 16-digit number.
    """
    opened, closed = text.find("<answer>"), text.find("</answer>")
    if opened >= 0:
        fenced = _FENCED.search(text, opened)
        if fenced and (found := fenced[1].strip()):
            return found
        if found := (until_end(text, opened + len("<answer>")) or "").strip():
            return found
    if closed >= 0:
        if found := until_special(text, closed + len("</answer>")).strip():
            return found
        for piece in text.split("</answer>")[:-1]:
            if len(piece) >= 16 and len(found := piece.rstrip()[-16:]) == 16 and found.isdecimal():
                return found
    return standalone_digits(text, 16) or ""


def first_cells(text: str, count: int) -> str:
    """The first `count` characters of the text that are not white space."""
    # count - 1 splits leave the rest as the last piece: the pieces' first `count` characters are all that is asked for.
    return "".join(text.split(None, count - 1))[:count]


def first_digits(text: str, count: int) -> str:
    """The first `count` digits of the text, or all of them when it has fewer."""
    enough = re.match(rf"(?:\D*+\d){{{count}}}", text)
    return "".join(re.findall(r"\d", enough[0] if enough else text))


def score(puzzle: str, cells: str, *, solved_weight: float, match_weight: float) -> Reward:
    """Compares up to as many characters as the puzzle has cells with every valid completion.

    solve_rate     1 when they are a valid completion: every rule holds and the givens are kept.
    cell_accuracy  originally empty cells that agree with the best matching completion / empty cells (1 if none).
    correct_cells  the cells that cell_accuracy counts; empty_cells: what it divides them by.
    givens_kept    the same share over the given cells (1 if none).
    Value: solved_weight * solved + match_weight * (cells that agree with the best matching completion) / cells.
    """
    grids = completions(puzzle)
    solved = cells in grids or (len(grids) == MOST_COMPLETIONS and is_completion(puzzle, cells))
    # The givens are the same in every completion, so the best match over all cells is the best over the empties.
    size, empty = len(puzzle), puzzle.count("0")
    matching = size if solved else max(sum(map(eq, cells, grid)) for grid in grids)
    kept = sum(a == b for a, b in zip(cells, puzzle, strict=False) if b != "0")
    breakdown = {
        "solve_rate": float(solved),
        "cell_accuracy": (matching - kept) / empty if empty else 1.0,
        "correct_cells": float(matching - kept),
        "empty_cells": float(empty),
        "givens_kept": kept / (size - empty) if empty < size else 1.0,
    }
    digits = "1234" if size == 16 else "123456789"
    parsed = solved or (len(cells) == size and not cells.strip(digits))
    return Reward(solved_weight * solved + match_weight * matching / size, parsed, breakdown)


GRADERS: dict[str, Grader] = {"strict": sudoku_strict, "d1": sudoku_d1, "spg": sudoku_d1, "espo": sudoku_d1}


def read_fields(row: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """`puzzle` and `solution` of a stored row; a dot is a blank too. Errors: ValueError saying what is wrong."""
    puzzle, solution = text_of(row, "puzzle").replace(".", "0"), text_of(row, "solution")
    if protocol != "strict" and len(puzzle) != 16:
        raise ValueError(f"puzzle={puzzle!r}: protocol {protocol} is for 4x4, 16 characters; use strict for 9x9")
    valid = completions(puzzle)
    if not is_completion(puzzle, solution):
        raise ValueError(f"solution={solution!r} does not complete puzzle={puzzle!r} by the rules")
    if protocol == "spg" and len(valid) > 1:
        raise ValueError(f"puzzle={puzzle!r} has {len(valid)} completions; protocol spg has unique ones only")
    return {"puzzle": puzzle, "solution": solution}
