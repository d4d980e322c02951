"""The 288 solved 4x4 Sudoku grids, their fixed split, and the completions of a puzzle.

A grid or puzzle is a string of 16 or 81 characters, row by row; in a puzzle 0 is a blank.
"""

from functools import lru_cache
from hashlib import sha256
from itertools import islice

from dllm_rl.tasks.rows import Split
from dllm_rl.tasks.sudoku.solver import solutions

MOST_COMPLETIONS = 64  # listed for a 9x9 puzzle, which may have billions
SPLIT_SIZES: dict[Split, int] = {"test": 88, "validation": 24, "train": 176}


SOLVED = tuple(sorted(solutions("0" * 16)))
assert len(SOLVED) == 288

# _HOLDS[cell][digit]: the grids with this digit in this cell (0: all grids), as the bits of one integer.
# The bits make 4x4 puzzles with many draws cheap: a puzzle's completions are one AND per given.
_HOLDS = [dict.fromkeys("1234", 0) | {"0": (1 << 288) - 1} for _ in range(16)]
for _place, _grid in enumerate(SOLVED):
    for _holds, _digit in zip(_HOLDS, _grid, strict=True):
        _holds[_digit] |= 1 << _place


def _split() -> dict[Split, tuple[str, ...]]:
    """The same split for every seed, so that no choice of seeds trains on a test solution."""
    shuffled = iter(sorted(SOLVED, key=lambda grid: sha256(grid.encode()).digest()))
    parts = {name: tuple(sorted(islice(shuffled, size))) for name, size in SPLIT_SIZES.items()}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 288, "splits share a solution"
    return parts


SPLITS = _split()


def count_completions(puzzle: str) -> int:
    """How many of the 288 grids agree with the givens of a 4x4 puzzle."""
    return _agreeing(puzzle).bit_count()


@lru_cache(maxsize=65536)
def completions(puzzle: str) -> tuple[str, ...]:
    """Every solved grid that agrees with a puzzle's givens; of a 9x9 puzzle the first MOST_COMPLETIONS.

    Errors: ValueError when the puzzle is not 16 characters 0-4 or 81 characters 0-9, or has no completion.
    """
    digits = {16: "01234", 81: "0123456789"}.get(len(puzzle))
    if digits is None or not set(puzzle) <= set(digits):
        raise ValueError(f"puzzle={puzzle!r} must be 16 characters 0-4 or 81 characters 0-9, row by row, 0 for a blank")
    if len(puzzle) == 81:
        found = tuple(islice(solutions(puzzle), MOST_COMPLETIONS))
    else:
        bits = _agreeing(puzzle)
        found = tuple(grid for place, grid in enumerate(SOLVED) if bits >> place & 1)
    if not found:
        raise ValueError(f"puzzle={puzzle!r} has no valid completion")
    return found


def is_completion(puzzle: str, cells: str) -> bool:
    """Whether the cells are digits without blanks, keep every given and obey every rule."""
    if len(puzzle) == 16:
        return cells in completions(puzzle)
    # Only ASCII: isdigit is true of other scripts' digits, too, which the solver would read as numbers.
    if len(cells) != 81 or "0" in cells or not (cells.isascii() and cells.isdigit()):
        return False
    return all(given in ("0", cell) for given, cell in zip(puzzle, cells, strict=True)) and any(solutions(cells))


def _agreeing(puzzle: str) -> int:
    bits = -1  # all ones
    for holds, digit in zip(_HOLDS, puzzle, strict=True):
        bits &= holds[digit]
    return bits
