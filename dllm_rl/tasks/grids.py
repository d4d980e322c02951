"""The 288 solved 4x4 Sudoku grids, their fixed split, and every completion of a 4x4 puzzle.

A grid or puzzle is a string of 16 characters, row by row; in a puzzle 0 is a blank.
"""

from functools import lru_cache
from hashlib import sha256
from itertools import permutations
from typing import Literal

Split = Literal["train", "validation", "test"]
SPLIT_SIZES: dict[Split, int] = {"test": 88, "validation": 24, "train": 176}


def _solved_grids() -> tuple[str, ...]:
    """All solved grids, in lexicographic order: rows are stacked, keeping columns and 2x2 boxes free of repeats."""
    rows = ["".join(row) for row in permutations("1234")]
    grids = [""]
    for _ in range(4):
        grids = [grid + row for grid in grids for row in rows if _fits(grid, row)]
    return tuple(grids)


def _fits(grid: str, row: str) -> bool:
    if any(digit in grid[column::4] for column, digit in enumerate(row)):
        return False
    if len(grid) % 8 == 4:  # the row closes two boxes: each is this row's and the last row's two cells
        above = grid[-4:]
        return all(len(set(above[c : c + 2] + row[c : c + 2])) == 4 for c in (0, 2))
    return True


SOLVED = _solved_grids()
assert len(SOLVED) == 288

# _HOLDS[cell][digit] is a set of grids as the bits of one integer: those with that digit in that cell (0: all of them).
_HOLDS = tuple(
    {"0": (1 << 288) - 1}
    | {digit: sum(1 << i for i, grid in enumerate(SOLVED) if grid[cell] == digit) for digit in "1234"}
    for cell in range(16)
)


def _split() -> dict[Split, tuple[str, ...]]:
    """A fixed split, the same for every seed, so that no choice of seeds can train on a test solution."""
    shuffled = iter(sorted(SOLVED, key=lambda grid: sha256(grid.encode()).digest()))
    parts = {name: tuple(sorted(next(shuffled) for _ in range(size))) for name, size in SPLIT_SIZES.items()}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 288, "splits share a solution"
    return parts


SPLITS = _split()


def count_completions(puzzle: str) -> int:
    """How many solved grids agree with the givens of a puzzle of 16 characters 0-4."""
    return _agreeing(puzzle).bit_count()


@lru_cache(maxsize=65536)
def completions(puzzle: str) -> tuple[str, ...]:
    """Every solved grid that agrees with the puzzle's givens, in lexicographic order.

    Errors: ValueError when the puzzle is not 16 characters 0-4 or has no completion.
    """
    if len(puzzle) != 16 or not set(puzzle) <= set("01234"):
        raise ValueError(f"puzzle={puzzle!r} must be 16 characters 0-4, row by row, 0 for a blank")
    bits = _agreeing(puzzle)
    if not bits:
        raise ValueError(f"puzzle={puzzle!r} has no valid completion")
    found = []
    while bits:
        lowest = bits & -bits
        found.append(SOLVED[lowest.bit_length() - 1])
        bits ^= lowest
    return tuple(found)


def _agreeing(puzzle: str) -> int:
    bits = -1
    for holds, digit in zip(_HOLDS, puzzle, strict=True):
        bits &= holds[digit]
    return bits
