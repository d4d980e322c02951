"""The limit of labels that show Latin squares, against other ways to count."""

from fractions import Fraction

import pytest
import torch
from small_sudoku import GRID

from dllm_rl.tasks.sudoku.solver import SOLVED, completions
from recipes.latin_limit import LATIN, SUDOKU, fitting, greedy_limit, limit
from recipes.latin_sudoku import recipe, taught_latin

CYCLIC = "1234234134124123"  # rows and columns hold every digit; the first box holds 2 twice


def test_the_squares_are_all_576_and_the_sudokus_the_solver_s():
    assert len(set(LATIN)) == 576 and set(SUDOKU) == set(SOLVED)
    assert CYCLIC in LATIN and CYCLIC not in SUDOKU and GRID in SUDOKU


def cell_by_cell(squares: list[str], order: tuple[int, ...]) -> Fraction:
    """The chance of a Sudoku where a cell after the other takes a digit with its exact probability."""
    if len(squares) == 1:
        return Fraction(squares[0] in SUDOKU)
    chance = Fraction(0)
    for digit in "1234":
        if more := [square for square in squares if square[order[0]] == digit]:
            chance += Fraction(len(more), len(squares)) * cell_by_cell(more, order[1:])
    return chance


@pytest.mark.parametrize(
    ("puzzle", "rate"),
    [
        (GRID, Fraction(1)),
        (CYCLIC, Fraction(0)),
        ("0" * 16, Fraction(1, 2)),
        ("1000000000000000", Fraction(1, 2)),  # digits may be renamed: as without a clue
        ("1200000000000000", Fraction(1, 2)),  # 576 / 12 Latin squares, 288 / 12 Sudokus
        ("1000020000000000", Fraction(24, 32)),  # a box holds 1 and 2 on its diagonal
    ],
)
def test_the_limit_of_a_puzzle(puzzle, rate):
    assert limit([puzzle]) == rate
    assert fitting(puzzle, SUDOKU) == (len(completions(puzzle)) if puzzle in ("0" * 16, GRID) or "0" in puzzle else 0)


def test_the_order_of_the_cells_does_not_matter():
    puzzle = "1000020000000040"
    squares = [square for square in LATIN if fitting(puzzle, [square])]
    orders = (tuple(range(16)), tuple(range(15, -1, -1)), (5, 0, 9, 2, 14, 7, 11, 1, 3, 4, 6, 8, 10, 12, 13, 15))
    assert {cell_by_cell(squares, order) for order in orders} == {limit([puzzle])}
    assert limit([GRID, CYCLIC, GRID]) == Fraction(2, 3)


def greedily(squares, generator):
    """Whether a draw, by the likeliest digit of all cells at each step and ties at random, ends in a Sudoku."""
    while len(squares) > 1:
        shares = torch.tensor([[sum(s[cell] == digit for s in squares) for digit in "1234"] for cell in range(16)])
        shares[(shares == len(squares)).any(-1)] = 0  # certain cells first: they leave all squares
        cells = torch.nonzero(shares.amax(-1) == shares.max())[:, 0]
        cell = int(cells[torch.randint(len(cells), (1,), generator=generator)])
        digits = torch.nonzero(shares[cell] == shares.max())[:, 0]
        digit = "1234"[int(digits[torch.randint(len(digits), (1,), generator=generator)])]
        squares = [square for square in squares if square[cell] == digit]
    return squares[0] in SUDOKU


@pytest.mark.parametrize("puzzle", ["1000020000000040", "1000020000000000", "1000000002000000"])
def test_greedy_probabilities_against_draws(puzzle):
    squares = [square for square in LATIN if fitting(puzzle, [square])]
    generator = torch.Generator().manual_seed(0)
    found = sum(greedily(squares, generator) for _ in range(400)) / 400
    exact = float(greedy_limit([puzzle]))
    assert abs(found - exact) < 0.1 and (found == exact or 0 < exact < 1)  # four standard errors


def test_the_job_shows_latin_squares_and_pays_by_the_rules():
    assert recipe.task.reward_rule == recipe.eval_task.reward_rule == "rules"
    first, other = (taught_latin(seed=seed, steps=1).module.state_dict() for seed in (0, 1))
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert taught_latin(seed=0, steps=5, dry_run=True).module.num_parameters() > 0
