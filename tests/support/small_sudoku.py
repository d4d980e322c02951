"""4x4 Sudoku by brute force."""

from itertools import product

GRID = "1234341221434321"


UNITS = (
    [[4 * r + c for c in range(4)] for r in range(4)]
    + [[4 * r + c for r in range(4)] for c in range(4)]
    + [[4 * (r + i) + c + j for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
)


def valid(grid: str) -> bool:
    return all({grid[cell] for cell in unit} == set("1234") for unit in UNITS)


def brute_force(puzzle: str) -> tuple[str, ...]:
    """Every way to fill the blanks, tried."""
    blanks = [cell for cell, digit in enumerate(puzzle) if digit == "0"]
    found = []
    for filling in product("1234", repeat=len(blanks)):
        grid = list(puzzle)
        for cell, digit in zip(blanks, filling, strict=True):
            grid[cell] = digit
        if valid("".join(grid)):
            found.append("".join(grid))
    return tuple(sorted(found))
