"""The limit of labels that show Latin squares, against other ways to count; what the study's arms train on."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from small_sudoku import GRID

from dllm_rl.tasks.sudoku.solver import SOLVED, completions
from recipes.latin_sudoku import recipe, taught_latin
from recipes.studies import latin
from recipes.studies.latin_limit import LATIN, SUDOKU, fitting, greedy_limit, limit

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


def test_filtered_labels_are_right_and_a_round_adds_to_them(monkeypatch):
    taken, rounds = [], []

    def written(policy, count, seed, purpose, sampler):
        rounds.append(count)
        return [("1" + "0" * 15, GRID), ("1" + "0" * 15, CYCLIC)]

    def watched(policy, problems, **options):
        taken.extend(problem.solution for problem in problems)
        return solution_examples(policy, problems, **options)

    solution_examples = latin.solution_examples
    monkeypatch.setattr(latin, "written", written)
    monkeypatch.setattr(latin, "solution_examples", watched)
    policy = taught_latin(steps=0)
    arm = {"steps": 4, "learning_rate": 1e-3, "answers": 10, "sampler": None, "rounds": 2}
    looked = []
    told = latin.on_labels(policy, 0, arm | {"filtered": True}, looked.append)
    assert set(taken) == {GRID} and rounds == [5, 5] and looked == [1, 2, 3, 4]
    assert told == {"right, first": 0.5, "right, last": 0.5, "labels": 2}
    taken.clear()
    latin.on_labels(policy, 0, arm, looked.append)
    assert set(taken) == {GRID, CYCLIC}


def test_the_higher_mean_of_two_seeds_is_the_best_rate():
    tried = latin.RATES[latin.ONE]

    def reached(*rates):
        first = {
            (latin.at_rate(latin.ONE, rate), 100): {"after": each} for rate, each in zip(tried, rates, strict=True)
        }
        return first | {(latin.at_rate(latin.ONE, rate), 101): {"after": 0.5} for rate in tried}

    assert latin.better_two(reached(0.1, 0.3, 0.2), latin.ONE) == [2e-3, 4e-3]
    assert latin.best(reached(0.1, 0.3, 0.2), latin.ONE) == 2e-3
    equal = reached(0.1, 0.3, 0.2)
    equal[latin.at_rate(latin.ONE, 4e-3), 101] = {"after": 0.6}
    assert latin.best(equal, latin.ONE) == 2e-3  # of equal ones the lower
    equal[latin.at_rate(latin.ONE, 4e-3), 101] = {"after": 0.7}
    assert latin.best(equal, latin.ONE) == 4e-3


def test_the_clock_leaves_evaluations_out(monkeypatch):
    times = iter([0.0, 1.0, 9.0, 10.0])
    monkeypatch.setattr(latin, "time", SimpleNamespace(process_time=lambda: next(times)))
    clock = latin.Clock()
    clock.on_start(None)
    for step, metrics in enumerate(({}, {"eval/solve_rate": 0.5}, {}), start=1):
        clock.on_step(SimpleNamespace(step=step), metrics)
    assert clock.plain == [1.0, 1.0] and clock.rates == [(2, 0.5)]


def test_the_job_shows_latin_squares_and_pays_by_the_rules():
    assert recipe.task.reward_rule == recipe.eval_task.reward_rule == "rules"
    first, other = (taught_latin(seed=seed, steps=1).module.state_dict() for seed in (0, 1))
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert taught_latin(seed=0, steps=5, dry_run=True).module.num_parameters() > 0
