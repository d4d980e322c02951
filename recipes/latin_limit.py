"""What exact probabilities reach where labels show Latin squares and only the reward knows the boxes: 0.548.

    python -m recipes.latin_limit

Labels are all 576 squares whose rows and columns hold 1, 2, 3 and 4 once, equally often. A model that knows their exact
probabilities, and writes one cell a step at temperature 1, draws each square that fits the clues equally often: in
whichever order it writes, the chance of a square is the product of its conditional probabilities. So it solves a puzzle
with probability (Sudokus that fit) / (Latin squares that fit), where a Sudoku is a square whose boxes hold each digit
once, too. There are no ties, and nothing is drawn.

At temperature 0 (the likeliest digit of all blank cells first, ties at random) the same probabilities solve 0.619.
"""

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from itertools import permutations

ROWS = ["".join(row) for row in permutations("1234")]
BOXES = [[top + left + step for step in (0, 1, 4, 5)] for top in (0, 8) for left in (0, 2)]
LATIN = [""]
for _ in range(4):  # row by row, so that few squares are looked at
    LATIN = [rows + row for rows in LATIN for row in ROWS if not any(row[i] in rows[i::4] for i in range(4))]
SUDOKU = [square for square in LATIN if all(len({square[cell] for cell in box}) == 4 for box in BOXES)]


def fitting(puzzle: str, squares: Iterable[str]) -> int:
    """How many of the squares have every digit of the puzzle, in which 0 is a blank."""
    return sum(all(clue in ("0", digit) for clue, digit in zip(puzzle, square, strict=True)) for square in squares)


def limit(puzzles: list[str]) -> Fraction:
    """The mean over puzzles of the share of fitting Latin squares that are Sudokus."""
    rates = {puzzle: Fraction(fitting(puzzle, SUDOKU), fitting(puzzle, LATIN)) for puzzle in set(puzzles)}
    return sum((rates[puzzle] for puzzle in puzzles), Fraction(0)) / len(puzzles)


@cache
def greedy(squares: tuple[str, ...]) -> Fraction:
    """How likely the likeliest digit, cell by cell, leads to a Sudoku, where the clues leave these squares."""
    if len(squares) == 1:
        return Fraction(squares[0] in SUDOKU)
    counts = Counter((cell, digit) for square in squares for cell, digit in enumerate(square))
    counts = Counter({each: count for each, count in counts.items() if count < len(squares)})  # certain cells are free
    likeliest = [each for each, count in counts.items() if count == max(counts.values())]
    ties = Counter(cell for cell, _ in likeliest)  # first among cells, then among a cell's digits
    chances = [Fraction(1, len(ties) * ties[cell]) for cell, _ in likeliest]
    left = [tuple(square for square in squares if square[cell] == digit) for cell, digit in likeliest]
    return sum((chance * greedy(each) for chance, each in zip(chances, left, strict=True)), Fraction(0))


def greedy_limit(puzzles: list[str]) -> Fraction:
    """The mean over puzzles of what exact probabilities solve at temperature 0, one cell a step, ties at random."""
    fits = [[square for square in LATIN if fitting(puzzle, [square])] for puzzle in puzzles]
    return sum((greedy(tuple(each)) for each in fits), Fraction(0)) / len(puzzles)


if __name__ == "__main__":
    from recipes.sudoku_tiny import few_clues

    task = few_clues(split="test", size=400)
    puzzles = [task[i].fields["puzzle"] for i in range(len(task))]
    print(f"{len(LATIN)} Latin squares, {len(SUDOKU)} of them Sudokus")
    print(f"exact probabilities solve {float(limit(puzzles)):.4f} of {len(puzzles)} puzzles, one cell a step")
    print(f"at temperature 0: {float(greedy_limit(puzzles)):.4f}")
