"""Sudoku as an exact cover, on the bits of integers: every completion of a puzzle of any side, 9x9 in milliseconds."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from math import isqrt
from random import Random


def solutions(puzzle: str, rng: Random | None = None) -> Iterator[str]:
    """Every completion, lazily, each once; in a fixed order, or in one drawn from rng.

    puzzle: side * side digits, row by row, 0 for a blank; side 4 or 9. Givens that break a rule have no completion.
    """
    side = isqrt(len(puzzle))
    demands, rivals = _cover(isqrt(side))
    alive, open_demands = (1 << side**3) - 1, list(demands)
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            candidate = cell * side + int(digit) - 1
            if not alive >> candidate & 1:
                return
            alive &= ~rivals[candidate]
            open_demands = [demand for demand in open_demands if not demand >> candidate & 1]
    for chosen in _search(alive, open_demands, rivals, rng):
        places = (place for place in range(side**3) if chosen >> place & 1)
        yield "".join(str(place % side + 1) for place in places)


def is_unique(puzzle: str) -> bool:
    return len(list(islice(solutions(puzzle), 2))) == 1


@lru_cache(maxsize=2)
def _cover(box: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(demands, rivals). A candidate is a digit in a cell, numbered cell * side + digit - 1.

    demands  sets of candidates, as bits, of which a solved grid holds exactly one: each cell has a digit; each row,
             column and box has each digit.
    rivals   for each candidate, those that it rules out.
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
    demands = tuple(sets.values())
    rivals = []
    for candidate in range(side**3):
        shared = 0
        for demand in demands:
            if demand >> candidate & 1:
                shared |= demand
        rivals.append(shared & ~(1 << candidate))
    return demands, tuple(rivals)


def _search(alive: int, demands: list[int], rivals: tuple[int, ...], rng: Random | None) -> Iterator[int]:
    while True:
        fewest, tightest = 1 << 30, 0
        for demand in demands:
            count = (alive & demand).bit_count()
            if count < fewest:
                fewest, tightest = count, demand
                if count < 2:
                    break
        if not tightest:
            yield alive
            return
        if fewest != 1:  # none leaves no choice below
            break
        forced = alive & tightest
        alive &= ~rivals[forced.bit_length() - 1]
        demands = [demand for demand in demands if not demand & forced]
    choices = []
    left = alive & tightest
    while left:
        choices.append(left & -left)
        left &= left - 1
    if rng is not None:
        choices.sort(key=lambda _: rng.random())
    for choice in choices:
        remaining = [demand for demand in demands if not demand & choice]
        yield from _search(alive & ~rivals[choice.bit_length() - 1], remaining, rivals, rng)


def random_grid(rng: Random) -> str:
    """A solved 9x9 grid; not uniform among all of them."""
    return next(solutions("0" * 81, rng))


def random_unique_puzzle(solution: str, clues: int, rng: Random) -> str | None:
    """The solution with cells blanked in a random order, each only if the puzzle stays unique, down to `clues` givens.

    None when no further cell of that order can go while there are more givens than that.
    """
    order = sorted(range(81), key=lambda _: rng.random())
    # The first half goes at once where it can: of the grids with 41 clues or more, nearly all are unique.
    ahead = min(81 - clues, 40)
    puzzle = _blank(solution, order[:ahead])
    if not is_unique(puzzle):
        ahead, puzzle = 0, solution
    for cell in order[ahead:]:
        if 81 - puzzle.count("0") == clues:
            break
        fewer = _blank(puzzle, [cell])
        if is_unique(fewer):
            puzzle = fewer
    return puzzle if 81 - puzzle.count("0") == clues else None


def _blank(grid: str, cells: list[int]) -> str:
    kept = list(grid)
    for cell in cells:
        kept[cell] = "0"
    return "".join(kept)
