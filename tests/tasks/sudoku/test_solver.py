"""The solver of Sudoku puzzles, 9x9 and 4x4, 9x9 problems, and the 288 solved 4x4 grids against brute force."""

from hashlib import sha256
from itertools import product
from random import Random

import pytest
from small_sudoku import brute_force, valid

from dllm_rl.tasks.rows import hashed_split
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.tasks.sudoku.graders import score
from dllm_rl.tasks.sudoku.solver import (
    MAX_COMPLETIONS,
    SOLVED,
    SPLITS,
    completions,
    is_completion,
    is_unique,
    random_grid,
    random_unique_puzzle,
    solutions,
)

WEIGHTS = {"solved_weight": 1.0, "match_weight": 4.0}


def valid9(grid: str) -> bool:
    rows = [grid[9 * r : 9 * r + 9] for r in range(9)]
    columns = [grid[c::9] for c in range(9)]
    boxes = [
        "".join(grid[9 * (r + i) + c : 9 * (r + i) + c + 3] for i in range(3)) for r in (0, 3, 6) for c in (0, 3, 6)
    ]
    return all(sorted(unit) == list("123456789") for unit in rows + columns + boxes)


# Well-known puzzles with the least number of givens a 9x9 can have, and two that are hard to search.
PUZZLES9 = [
    "000000010400000000020000000000050407008000300001090000300400200050100000000806000",
    "000000010400000000020000000000050604008000300001090000300400200050100000000807000",
    "000000012000035000000600070700000300000400800100000000000120000080000040050000600",
    "800000000003600000070090200050007000000045700000100030001000068008500010090000400",
    "000000000000003085001020000000507000004000100090000000500000073002010000000040009",
]


@pytest.mark.parametrize("puzzle", PUZZLES9)
def test_the_solver_solves_9x9_with_17_clues(puzzle: str) -> None:
    (grid,) = solutions(puzzle)
    assert valid9(grid) and all(given in ("0", digit) for given, digit in zip(puzzle, grid, strict=True))
    assert sum(digit != "0" for digit in PUZZLES9[0]) == 17
    assert is_unique(puzzle) and completions(puzzle) == (grid,)


def test_the_solver_agrees_with_the_288_grids() -> None:
    assert sorted(solutions("0" * 16)) == list(SOLVED)
    rng = Random(8)
    for _ in range(60):
        puzzle = list(rng.choice(SOLVED))
        for cell in rng.sample(range(16), rng.randint(0, 15)):
            puzzle[cell] = rng.choice("000000001")
        agreeing = [grid for grid in SOLVED if all(p in ("0", g) for p, g in zip(puzzle, grid, strict=True))]
        assert sorted(solutions("".join(puzzle))) == agreeing


def test_the_solver_finds_every_completion_of_a_9x9() -> None:
    """A rectangle of two digits in two rows, two columns and two boxes can be filled in two ways."""
    for seed in range(50):
        grid = random_grid(Random(seed))
        for r, s, c, d in product(range(9), repeat=4):
            crossed = grid[9 * r + c] == grid[9 * s + d] and grid[9 * r + d] == grid[9 * s + c]
            if r < s and c < d and crossed and (r // 3 == s // 3) != (c // 3 == d // 3):
                puzzle = list(grid)
                for cell in (9 * r + c, 9 * r + d, 9 * s + c, 9 * s + d):
                    puzzle[cell] = "0"
                found = list(solutions("".join(puzzle)))
                assert len(found) == len(set(found)) == 2 and grid in found and all(map(valid9, found))
                break
        else:
            continue
        break
    else:
        pytest.fail("no grid with such a rectangle")
    assert list(solutions("11" + "0" * 79)) == []
    assert len(completions("0" * 81)) == MAX_COMPLETIONS


def test_random_grids_and_puzzles_9x9() -> None:
    rng = Random(1)
    grids = [random_grid(rng) for _ in range(5)]
    assert len(set(grids)) == 5 and all(map(valid9, grids))
    puzzle = random_unique_puzzle(grids[0], 30, rng)
    assert puzzle is not None and 81 - puzzle.count("0") == 30 and list(solutions(puzzle)) == [grids[0]]
    assert random_unique_puzzle(grids[0], 17, rng) is None  # next to no grid has a puzzle of 17 at the first attempt
    assert random_unique_puzzle(grids[0], 81, rng) == grids[0]


class InOrder(Random):
    """Draws larger numbers each time, so that cells are blanked row by row."""

    drawn = 0

    def random(self) -> float:
        self.drawn += 1
        return self.drawn / 1000


def test_cells_are_blanked_from_the_first_on() -> None:
    """Three rows without a digit could change places, so that no first half goes at once; one row is unique."""
    puzzle = random_unique_puzzle(random_grid(Random(0)), 50, InOrder())
    assert puzzle is not None and puzzle[:9] == "0" * 9 and is_unique(puzzle)


def test_the_problems_of_a_seed_are_those_of_the_tasks_version() -> None:
    """A faster generator makes the same ones: their digest is of the time when each cell asked for two completions."""
    assert Sudoku.version == "1"
    parts = (("train", (28, 32), 8), ("test", (26, 26), 4))
    made = [Sudoku(side=9, clues=c, size=n, split=s, seed=3)[i] for s, c, n in parts for i in range(n)]
    digest = sha256("".join(problem.fields["puzzle"] for problem in made).encode()).hexdigest()
    assert digest[:16] == "8a00c41182c51c0d"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_9x9_problems(split: str) -> None:
    task = Sudoku(side=9, clues=(30, 40), split=split, size=4, seed=1)
    for problem in task:
        puzzle, solution = problem.fields["puzzle"], problem.fields["solution"]
        assert 30 <= 81 - puzzle.count("0") <= 40 and is_unique(puzzle) and hashed_split(solution) == split
        assert task.reward(problem, solution).value == 5.0
        wrong = task.reward(problem, solution[:80])
        assert wrong.value == pytest.approx(4 * 80 / 81) and not wrong.parsed
    assert task[3] == Sudoku(side=9, clues=(30, 40), split=split, size=9, seed=1)[3]
    asked = Sudoku(side=9, clues=40, prompt_format="text", split=split)[0]
    assert "9x9 Sudoku" in asked.prompt[0]["content"] and "3x3 boxes" in asked.prompt[0]["content"]


def test_the_288_grids_are_all_and_only_the_solved_ones() -> None:
    assert len(SOLVED) == len(set(SOLVED)) == 288
    assert all(valid(grid) for grid in SOLVED)
    # Relabelling digits gives 24 first rows, 3 and 4 in the first box can stand in 2 orders, and so can the last two
    # rows, of which one begins with 2: a 96th has 1234, 34 and 2 there.
    assert len(brute_force("1234341220000000")) + len(brute_force("1234342120000000")) == 288 // (24 * 2 * 2)


def test_splits_are_disjoint_by_solution_and_cover_everything() -> None:
    assert {name: len(grids) for name, grids in SPLITS.items()} == {"train": 176, "validation": 24, "test": 88}
    assert sorted(sum(SPLITS.values(), ())) == sorted(SOLVED)
    for split, grids in SPLITS.items():
        for seed in (0, 7):
            task = Sudoku(split=split, size=300, seed=seed)
            assert {task[i].fields["solution"] for i in range(300)} <= set(grids)


@pytest.mark.parametrize("blanks", range(8))
def test_completions_agree_with_brute_force(blanks: int) -> None:
    rng = Random(blanks)
    for _ in range(8 if blanks < 6 else 2):
        puzzle = list(rng.choice(SOLVED))
        for cell in rng.sample(range(16), blanks):
            puzzle[cell] = "0"
        assert completions("".join(puzzle)) == brute_force("".join(puzzle))


def test_completions_of_nothing_and_of_the_impossible() -> None:
    assert completions("0" * 16) == SOLVED
    with pytest.raises(ValueError, match="has no solution"):
        completions("11" + "0" * 14)
    with pytest.raises(ValueError, match="16 characters"):
        completions("1")


def test_is_completion() -> None:
    (grid,) = completions(PUZZLES9[0])
    assert is_completion(PUZZLES9[0], grid) and is_completion("0" * 81, grid)
    swapped = grid.translate(str.maketrans("12", "21"))
    assert not is_completion(PUZZLES9[0], swapped) and is_completion("0" * 81, swapped)
    only_a_one = "".join(digit if digit == "1" else "0" for digit in grid)
    assert is_completion(only_a_one, grid) and not is_completion(only_a_one, swapped)
    last = int(grid[80])
    for wrong in (grid[:80], *(grid[:80] + end for end in ("0", chr(0x660 + last), str(last % 9 + 1)))):
        assert not is_completion("0" * 81, wrong)
    assert score("0" * 81, swapped, **WEIGHTS).breakdown["solve_rate"] == 1.0  # beyond the listed completions
