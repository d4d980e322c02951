"""Sudoku as an exact cover, on the bits of integers: every completion of a puzzle, 9x9 in milliseconds."""

from collections.abc import Iterator
from functools import lru_cache, reduce
from itertools import islice
from math import isqrt
from operator import or_
from random import Random


def solutions(puzzle: str, rng: Random | None = None) -> Iterator[str]:
    """Every completion, lazily, each once; in a fixed order, or in an order drawn from rng.

    puzzle  16 or 81 digits, row by row, 0 for a blank. Givens that break a rule have no completion.
    """
    side = isqrt(len(puzzle))
    demands, rivals, met = _cover(isqrt(side))
    alive, unmet = (1 << side**3) - 1, dict(enumerate(demands))
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            candidate = cell * side + int(digit) - 1
            if not alive >> candidate & 1:
                return
            alive &= ~rivals[candidate]
            for number in met[candidate]:
                del unmet[number]
    for chosen in _search(alive, unmet, side, rng):
        places = (place for place in range(side**3) if chosen >> place & 1)
        yield "".join(str(place % side + 1) for place in places)


def is_unique(puzzle: str) -> bool:
    return len(list(islice(solutions(puzzle), 2))) == 1


@lru_cache(maxsize=2)
def _cover(box: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """(demands, rivals, met). A candidate is a digit in a cell, numbered cell * side + digit - 1.

    demands  sets of candidates, as bits; a solved grid has exactly one candidate of each set.
    rivals   for each candidate, the candidates that it rules out.
    met      for each candidate, the numbers of its four demands.
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
    found = ([n for n, demand in enumerate(demands) if demand >> candidate & 1] for candidate in range(side**3))
    met = tuple(map(tuple, found))
    shared = [reduce(or_, (demands[number] for number in numbers)) for numbers in met]
    rivals = tuple(those & ~(1 << candidate) for candidate, those in enumerate(shared))
    return demands, rivals, met


def _search(alive: int, unmet: dict[int, int], side: int, rng: Random | None) -> Iterator[int]:
    """Every choice of alive candidates that meets all unmet demands (number -> demand)."""
    _, rivals, met = _cover(isqrt(side))
    while True:
        fewest, tightest = 1 << 30, 0
        for demand in unmet.values():
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
        forced = (alive & tightest).bit_length() - 1
        alive &= ~rivals[forced]
        for number in met[forced]:
            del unmet[number]
    choices = list(_places(alive & tightest))
    if rng is not None:
        choices.sort(key=lambda _: rng.random())
    for choice in choices:
        rest = unmet.copy()
        for number in met[choice]:
            del rest[number]
        yield from _search(alive & ~rivals[choice], rest, side, rng)


def _places(bits: int) -> Iterator[int]:
    """The places of the ones, lowest first."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def random_grid(rng: Random) -> str:
    """A solved 9x9 grid; not uniform among all of them."""
    return next(solutions("0" * 81, rng))


def random_unique_puzzle(solution: str, clues: int, rng: Random) -> str | None:
    """The solution with cells blanked in a random order, each only if the puzzle stays unique, down to `clues` givens;
    None when more givens are left at the end of the order."""
    order = sorted(range(81), key=lambda _: rng.random())
    # The first half goes at once where it can: nearly all puzzles with 41 clues or more are unique.
    ahead = min(81 - clues, 40)
    whole = [9 * cell + int(digit) - 1 for cell, digit in enumerate(solution)]
    givens = [whole[cell] for cell in order[ahead:]]
    if _closed(_allowed(givens)).bit_count() != 81 and not is_unique(_blank(solution, order[:ahead])):
        ahead, givens = 0, whole
    for cell in order[ahead:]:
        if len(givens) == clues:
            break
        fewer = [given for given in givens if given != whole[cell]]
        if not _completes_otherwise(fewer, whole[cell]):
            givens = fewer
    kept = {given // 9 for given in givens}
    return _blank(solution, [cell for cell in range(81) if cell not in kept]) if len(kept) == clues else None


def _allowed(givens: list[int]) -> int:
    """The candidates of a 9x9 grid that the givens do not rule out."""
    alive, rivals = (1 << 729) - 1, _cover(3)[1]
    for given in givens:
        alive &= ~rivals[given]
    return alive


def _completes_otherwise(givens: list[int], own: int) -> bool:
    """Whether 9x9 givens have a completion with another digit in the cell of the candidate `own`: faster than a
    search for two completions."""
    alive, rivals = _allowed(givens), _cover(3)[1]
    others = alive & (0b111111111 << own // 9 * 9) & ~(1 << own)
    return any(_completes(alive & ~rivals[other]) for other in _places(others))


def _completes(alive: int) -> bool:
    """Whether candidates of a 9x9 grid contain a completion."""
    alive = _closed(alive)
    cells = [alive & (0b111111111 << place) for place in range(0, 729, 9)]
    choices = min((cell for cell in cells if cell & (cell - 1)), key=int.bit_count, default=0)
    if not choices:
        return alive != 0
    return any(_completes(alive & ~_cover(3)[1][choice]) for choice in _places(choices))


def _closed(alive: int) -> int:
    """The candidates of a 9x9 grid that are left after all forced moves; 0 when a demand has no candidate.

    It handles all demands of a kind at once: shifted onto one another, their bits show which have one candidate left.
    """
    rivals, placed = _cover(3)[1], 0
    while True:
        forced = 0
        for base, shifts, spread in _KINDS:
            once = twice = 0
            for shift in shifts:
                here = alive >> shift & base
                twice |= once & here
                once |= here
            if once != base:
                return 0
            forced |= alive & (once ^ twice) * spread
        forced &= ~placed
        if not forced:
            return alive
        placed |= forced
        while forced:
            low = forced & -forced
            forced ^= low
            alive &= ~rivals[low.bit_length() - 1]


def _kind(bases: list[int], shifts: list[int]) -> tuple[int, tuple[int, ...], int]:
    return sum(1 << base for base in bases), tuple(shifts), sum(1 << shift for shift in shifts)


# For cells, rows, columns and boxes: the first candidate (81 row + 9 column + digit) of each demand, and the distances
# of its nine candidates from the first.
_KINDS = (
    _kind([9 * cell for cell in range(81)], list(range(9))),
    _kind([81 * row + digit for row in range(9) for digit in range(9)], [9 * column for column in range(9)]),
    _kind([9 * column + digit for column in range(9) for digit in range(9)], [81 * row for row in range(9)]),
    _kind(
        [243 * r + 27 * c + digit for r in range(3) for c in range(3) for digit in range(9)],
        [81 * r + 9 * c for r in range(3) for c in range(3)],
    ),
)


def _blank(grid: str, cells: list[int]) -> str:
    kept = list(grid)
    for cell in cells:
        kept[cell] = "0"
    return "".join(kept)
