"""Sudoku as an exact cover, on the bits of integers: every completion of a puzzle, 9x9 in milliseconds.

A grid or puzzle is a string of 16 or 81 characters, row by row; in a puzzle 0 is a blank.
"""

from collections.abc import Iterable, Iterator
from functools import lru_cache, reduce
from hashlib import sha256
from itertools import islice, product
from math import isqrt
from operator import or_
from random import Random

from dllm_rl.tasks.rows import Split

MOST_COMPLETIONS = 64  # completions listed for a 9x9 puzzle, which may have billions
SPLIT_SIZES: dict[Split, int] = {"test": 88, "validation": 24, "train": 176}


def solutions(puzzle: str, rng: Random | None = None) -> Iterator[str]:
    """Yield every completion once, in a fixed order or in an order drawn from rng; none if the clues break a rule."""
    side = isqrt(len(puzzle))
    demands, rivals, met = _cover(isqrt(side))
    alive = (1 << side**3) - 1
    unmet = dict(enumerate(demands))
    for cell, digit in enumerate(puzzle):
        if digit != "0":
            candidate = cell * side + int(digit) - 1
            if not alive >> candidate & 1:  # an earlier clue excludes it
                return
            alive &= ~rivals[candidate]
            for number in met[candidate]:
                del unmet[number]
    for chosen in _search(alive, unmet, side, rng):
        yield "".join(str(place % side + 1) for place in _places(chosen))


def is_unique(puzzle: str) -> bool:
    return len(list(islice(solutions(puzzle), 2))) == 1  # two are enough to know


@lru_cache(maxsize=2)
def _cover(box: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Return (demands, rivals, met) as bits of candidates: a digit in a cell, numbered cell * side + digit - 1."""
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
    demands = tuple(sets.values())  # a solved grid has exactly one candidate per demand
    met: list[tuple[int, ...]] = []  # the numbers of a candidate's four demands
    rivals = []  # the candidates that a candidate excludes
    for candidate in range(side**3):
        own = 1 << candidate
        met.append(tuple(number for number, demand in enumerate(demands) if demand & own))
        rivals.append(reduce(or_, map(demands.__getitem__, met[-1])) & ~own)
    return demands, tuple(rivals), tuple(met)


def _search(alive: int, unmet: dict[int, int], side: int, rng: Random | None) -> Iterator[int]:
    """Yield every choice of alive candidates that meets all unmet demands (number -> demand)."""
    _, rivals, met = _cover(isqrt(side))
    while True:
        fewest = 1 << 30
        tightest = 0
        for demand in unmet.values():
            count = (alive & demand).bit_count()
            if count < fewest:
                fewest = count
                tightest = demand
                if count < 2:  # nothing is tighter than a forced move or an unsatisfiable demand
                    break
        if not tightest:
            yield alive
            return
        if fewest != 1:  # 0 leaves no choice below
            break
        forced = (alive & tightest).bit_length() - 1
        alive &= ~rivals[forced]
        for number in met[forced]:
            del unmet[number]
    choices = list(_places(alive & tightest))
    if rng is not None:  # Only random() is used: Python promises its sequence for a seed, in every version.
        choices.sort(key=lambda _: rng.random())
    for choice in choices:
        rest = unmet.copy()
        for number in met[choice]:
            del rest[number]
        yield from _search(alive & ~rivals[choice], rest, side, rng)


def _places(bits: int) -> Iterator[int]:
    """Yield the positions of the ones, lowest first."""
    while bits:
        low = bits & -bits  # only the lowest one
        yield low.bit_length() - 1
        bits ^= low


def random_grid(rng: Random) -> str:
    """Return a solved 9x9 grid. The distribution is not uniform over all grids."""
    return next(solutions("0" * 81, rng))


def random_unique_puzzle(solution: str, clues: int, rng: Random) -> str | None:
    """Blank cells of the solution in random order while it stays unique, down to `clues`; None if more clues remain."""
    order = sorted(range(81), key=lambda _: rng.random())
    # The first half is blanked in one go if possible: nearly all puzzles with 41 clues or more are unique.
    ahead = min(81 - clues, 40)
    whole = [9 * cell + int(digit) - 1 for cell, digit in enumerate(solution)]
    givens = list(map(whole.__getitem__, order[ahead:]))
    if _closed(_allowed(givens)).bit_count() != 81 and not is_unique(_blank(solution, order[:ahead])):
        ahead = 0
        givens = whole
    for cell in order[ahead:]:
        if len(givens) == clues:
            break
        fewer = [given for given in givens if given != whole[cell]]
        if not _completes_otherwise(fewer, whole[cell]):
            givens = fewer
    kept = {given // 9 for given in givens}
    return _blank(solution, sorted(set(range(81)) - kept)) if len(kept) == clues else None


def _allowed(givens: list[int]) -> int:
    """Return the candidates of a 9x9 grid that the clues do not exclude."""
    alive = (1 << 729) - 1
    rivals = _cover(3)[1]
    for given in givens:
        alive &= ~rivals[given]
    return alive


def _completes_otherwise(givens: list[int], own: int) -> bool:
    """Return whether 9x9 clues complete with another digit in the cell of the candidate `own`."""
    alive = _allowed(givens)  # faster than a search for two completions
    others = alive & (0b111111111 << own // 9 * 9) & ~(1 << own)
    return any(_completes(alive & ~_cover(3)[1][other]) for other in _places(others))


def _completes(alive: int) -> bool:
    """Return whether candidates of a 9x9 grid contain a completion."""
    alive = _closed(alive)
    cells = [alive & (0b111111111 << place) for place in range(0, 729, 9)]
    choices = min((cell for cell in cells if cell & (cell - 1)), key=int.bit_count, default=0)  # two digits or more
    if not choices:
        return alive != 0
    return any(_completes(alive & ~_cover(3)[1][choice]) for choice in _places(choices))


def _closed(alive: int) -> int:
    """Return the candidates of a 9x9 grid that remain after all forced moves; 0 if a demand has no candidate."""
    rivals = _cover(3)[1]
    placed = 0
    while True:
        forced = 0
        for base, shifts, spread in _KINDS:
            once = twice = 0  # all demands of a kind together, shifted onto each other
            for shift in shifts:
                here = alive >> shift & base
                twice |= once & here  # before the next line: `once` must not contain this candidate yet
                once |= here
            if once != base:  # no candidate meets some demand
                return 0
            forced |= alive & (once ^ twice) * spread  # the product writes a demand's bit at all of its candidates
        forced &= ~placed
        if not forced:
            return alive
        placed |= forced
        while forced:
            low = forced & -forced
            forced ^= low
            alive &= ~rivals[low.bit_length() - 1]


def _sums(*ranges: range) -> list[int]:
    """Return every sum of one number of each range."""
    return list(map(sum, product(*ranges)))


def _kind(bases: Iterable[int], shifts: Iterable[int]) -> tuple[int, tuple[int, ...], int]:
    return sum(1 << base for base in bases), tuple(shifts), sum(1 << shift for shift in shifts)


# The first candidate (81 row + 9 column + digit) of each demand, and the distances of its nine candidates from it.
_KINDS = (
    _kind(range(0, 729, 9), range(9)),  # cells
    _kind(_sums(range(0, 729, 81), range(9)), range(0, 81, 9)),  # rows
    _kind(range(81), range(0, 729, 81)),  # columns
    _kind(_sums(range(0, 729, 243), range(0, 81, 27), range(9)), _sums(range(0, 243, 81), range(0, 27, 9))),  # boxes
)


def _blank(grid: str, cells: list[int]) -> str:
    kept = list(grid)
    for cell in cells:
        kept[cell] = "0"
    return "".join(kept)


SOLVED = tuple(sorted(solutions("0" * 16)))
assert len(SOLVED) == 288

# _HOLDS[cell][digit]: the grids with this digit in this cell (0: all grids), as the bits of one integer.
# The bits make 4x4 puzzles with many draws cheap: a puzzle's completions are one AND per given.
_HOLDS = [dict.fromkeys("1234", 0) | {"0": (1 << 288) - 1} for _ in range(16)]
for _place, _grid in enumerate(SOLVED):
    for _holds, _digit in zip(_HOLDS, _grid, strict=True):
        _holds[_digit] |= 1 << _place


# The same split for every seed, so that no choice of seeds trains on a test solution.
_SHUFFLED = iter(sorted(SOLVED, key=lambda grid: sha256(grid.encode()).digest()))
SPLITS = {name: tuple(sorted(islice(_SHUFFLED, size))) for name, size in SPLIT_SIZES.items()}


@lru_cache(maxsize=65536)
def completions(puzzle: str) -> tuple[str, ...]:
    """Return every completion of a puzzle; for 9x9 the first MOST_COMPLETIONS. Raises ValueError if malformed or
    unsolvable.
    """
    digits = {16: "01234", 81: "0123456789"}.get(len(puzzle))
    if digits is None or not set(puzzle) <= set(digits):
        raise ValueError(f"puzzle={puzzle!r} must be 16 characters 0-4 or 81 characters 0-9, row by row, 0 for a blank")
    if len(puzzle) == 81:
        found = tuple(islice(solutions(puzzle), MOST_COMPLETIONS))
    else:
        bits = agreeing(puzzle)
        found = tuple(grid for place, grid in enumerate(SOLVED) if bits >> place & 1)
    if not found:
        raise ValueError(f"puzzle={puzzle!r} has no valid completion")
    return found


def is_completion(puzzle: str, cells: str) -> bool:
    """Return whether the cells are digits without blanks, contain every clue and obey every rule."""
    if len(puzzle) == 16:
        return cells in completions(puzzle)
    # Only ASCII: isdigit is also true for digits of other scripts, which the solver would read as numbers.
    if len(cells) != 81 or "0" in cells or not (cells.isascii() and cells.isdigit()):
        return False
    return all(given in ("0", cell) for given, cell in zip(puzzle, cells, strict=True)) and any(solutions(cells))


def agreeing(puzzle: str) -> int:
    """Return the solved 4x4 grids that agree with a puzzle's clues, as bits."""
    bits = -1  # all ones
    for holds, digit in zip(_HOLDS, puzzle, strict=True):
        bits &= holds[digit]
    return bits
