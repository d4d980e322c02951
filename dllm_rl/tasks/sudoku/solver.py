"""Find all solutions of a Sudoku, as an exact cover: 9x9 puzzles in milliseconds.

A grid or puzzle is a string of 16 or 81 characters, row by row; in a puzzle 0 is a blank, and the other digits are the
givens (or clues). A solution of a puzzle is also called its completion.

A candidate is a digit in a cell, numbered cell * side + digit - 1. A constraint is a set of candidates of which a
solved grid has exactly one: a cell, or a digit in a row, column or box. Sets of candidates are the bits of an integer.
"""

from collections.abc import Iterator
from functools import lru_cache, reduce
from hashlib import sha256
from itertools import islice
from math import isqrt
from operator import or_
from random import Random

from dllm_rl.tasks.rows import Split

MAX_COMPLETIONS = 64  # largest number of solutions listed for a 9x9 puzzle, which may have billions
SPLIT_SIZES: dict[Split, int] = {"test": 88, "validation": 24, "train": 176}


def solutions(puzzle: str, rng: Random | None = None) -> Iterator[str]:
    """Yield every solution once, in a fixed order, or in random order with `rng`; none if the givens break a rule."""
    side = isqrt(len(puzzle))
    constraints, conflicts, constraint_numbers = _cover(isqrt(side))
    candidates = (1 << side**3) - 1
    open_constraints = dict(enumerate(constraints))
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            candidate = cell * side + int(digit) - 1
            if not candidates >> candidate & 1:  # an earlier given excludes it
                return
            candidates &= ~conflicts[candidate]
            for number in constraint_numbers[candidate]:
                del open_constraints[number]
    for chosen in _search(candidates, open_constraints, side, rng):
        yield "".join(str(candidate % side + 1) for candidate in _bit_positions(chosen))


def is_unique(puzzle: str) -> bool:
    """Return whether a puzzle has exactly one solution."""
    return len(list(islice(solutions(puzzle), 2))) == 1


@lru_cache(maxsize=2)
def _cover(box: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return (constraints, conflicts, constraint_numbers) of a grid with `box` cells per box side.

    For each candidate, `conflicts` has the candidates that it excludes, and `constraint_numbers` its four constraints.
    """
    side = box * box
    sets: dict[tuple, int] = {}
    for row in range(side):
        for column in range(side):
            for digit in range(side):
                bit = 1 << ((row * side + column) * side + digit)
                for key in (
                    ("cell", row, column),
                    ("row", row, digit),
                    ("column", column, digit),
                    ("box", row // box * box + column // box, digit),
                ):
                    sets[key] = sets.get(key, 0) | bit
    constraints = tuple(sets.values())
    constraint_numbers: list[tuple[int, ...]] = []
    conflicts = []
    for candidate in range(side**3):
        candidate_bit = 1 << candidate
        constraint_numbers.append(
            tuple(number for number, constraint in enumerate(constraints) if constraint & candidate_bit)
        )
        conflicts.append(reduce(or_, map(constraints.__getitem__, constraint_numbers[-1])) & ~candidate_bit)
    return constraints, tuple(conflicts), tuple(constraint_numbers)


def _search(candidates: int, open_constraints: dict[int, int], side: int, rng: Random | None) -> Iterator[int]:
    """Yield every subset of the candidates that satisfies all open constraints (number -> constraint)."""
    _, conflicts, constraint_numbers = _cover(isqrt(side))
    while True:
        fewest = 1 << 30
        tightest = 0
        for constraint in open_constraints.values():
            count = (candidates & constraint).bit_count()
            if count < fewest:
                fewest = count
                tightest = constraint
                if count < 2:  # a forced move or an unsatisfiable constraint: none is tighter
                    break
        if not tightest:
            yield candidates
            return
        if fewest != 1:  # if it is 0, `choices` is empty, and nothing more is yielded
            break
        forced = (candidates & tightest).bit_length() - 1
        candidates &= ~conflicts[forced]
        for number in constraint_numbers[forced]:
            del open_constraints[number]
    choices = list(_bit_positions(candidates & tightest))
    if rng is not None:  # Only random() is used: Python promises its sequence for a seed, in every version.
        choices.sort(key=lambda _: rng.random())
    for choice in choices:
        still_open = open_constraints.copy()
        for number in constraint_numbers[choice]:
            del still_open[number]
        yield from _search(candidates & ~conflicts[choice], still_open, side, rng)


def _bit_positions(bits: int) -> Iterator[int]:
    """Yield the positions of the bits that are 1, lowest first."""
    while bits:
        lowest_bit = bits & -bits
        yield lowest_bit.bit_length() - 1
        bits ^= lowest_bit


def random_grid(rng: Random) -> str:
    """Return a solved 9x9 grid. The distribution is not uniform over all grids."""
    return next(solutions("0" * 81, rng))


def random_unique_puzzle(solution: str, clues: int, rng: Random) -> str | None:
    """Return a 9x9 puzzle with `clues` givens that has only this solution.

    Replace cells of the solution by blanks in random order until `clues` digits remain. A cell keeps its digit if the
    puzzle would otherwise have another solution. Return None if more than `clues` digits remain at the end.
    """
    order = sorted(range(81), key=lambda _: rng.random())
    # First try to blank up to 40 cells at once, because nearly all puzzles with 41 givens or more have one solution.
    at_once = order[: min(81 - clues, 40)]
    puzzle = "".join("0" if cell in at_once else digit for cell, digit in enumerate(solution))
    if not is_unique(puzzle):
        puzzle = solution
    for cell in order:
        if 81 - puzzle.count("0") == clues:
            return puzzle
        blanked = puzzle[:cell] + "0" + puzzle[cell + 1 :]
        if puzzle[cell] != "0" and is_unique(blanked):
            puzzle = blanked
    return puzzle if 81 - puzzle.count("0") == clues else None


SOLVED = tuple(sorted(solutions("0" * 16)))
assert len(SOLVED) == 288

# _GRIDS_WITH[cell][digit]: the solved 4x4 grids with this digit in this cell (0: all grids), as the bits of an integer.
# A puzzle's solutions are the AND over its cells, which makes repeated drawing of puzzles cheap.
_GRIDS_WITH = [dict.fromkeys("1234", 0) | {"0": (1 << 288) - 1} for _ in range(16)]
for _index, _grid in enumerate(SOLVED):
    for _grids_with_digit, _digit in zip(_GRIDS_WITH, _grid, strict=True):
        _grids_with_digit[_digit] |= 1 << _index


# The same split for every seed, so that no choice of seeds trains on a test solution.
_SHUFFLED = iter(sorted(SOLVED, key=lambda grid: sha256(grid.encode()).digest()))
SPLITS = {name: tuple(sorted(islice(_SHUFFLED, size))) for name, size in SPLIT_SIZES.items()}


@lru_cache(maxsize=65536)
def completions(puzzle: str) -> tuple[str, ...]:
    """Return every solution of a puzzle; for 9x9 at most MAX_COMPLETIONS.

    Raises ValueError if the puzzle is malformed or has no solution.
    """
    digits = {16: "01234", 81: "0123456789"}.get(len(puzzle))
    if digits is None or not set(puzzle) <= set(digits):
        raise ValueError(f"puzzle={puzzle!r} must be 16 characters 0-4 or 81 characters 0-9, row by row, 0 for a blank")
    if len(puzzle) == 81:
        grids = tuple(islice(solutions(puzzle), MAX_COMPLETIONS))
    else:
        bits = agreeing(puzzle)
        grids = tuple(grid for index, grid in enumerate(SOLVED) if bits >> index & 1)
    if not grids:
        raise ValueError(f"puzzle={puzzle!r} has no solution")
    return grids


def is_completion(puzzle: str, cells: str) -> bool:
    """Return whether the cells are a solution: digits without blanks that have every given and obey every rule."""
    if len(puzzle) == 16:
        return cells in completions(puzzle)
    # Only ASCII: isdigit is also true for digits of other scripts, which the solver would read as numbers.
    if len(cells) != 81 or "0" in cells or not (cells.isascii() and cells.isdigit()):
        return False
    return all(given in ("0", cell) for given, cell in zip(puzzle, cells, strict=True)) and any(solutions(cells))


def agreeing(puzzle: str) -> int:
    """Return the solved 4x4 grids that agree with a puzzle's givens, as bits."""
    bits = -1  # every bit is 1
    for grids_with_digit, digit in zip(_GRIDS_WITH, puzzle, strict=True):
        bits &= grids_with_digit[digit]
    return bits
