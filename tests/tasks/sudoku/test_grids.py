"""The 288 solved grids against brute force, their split, and completions."""

from random import Random

import pytest
from small_sudoku import brute_force, valid

from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.tasks.sudoku.graders import score
from dllm_rl.tasks.sudoku.grids import SOLVED, SPLITS, completions, is_completion


def test_the_288_grids_are_all_and_only_the_solved_ones() -> None:
    assert len(SOLVED) == len(set(SOLVED)) == 288
    assert all(valid(grid) for grid in SOLVED)
    # Relabelling digits gives 24 first rows, and 3 and 4 in the first box can stand in 2 orders: 288 / 48 with 1234/34.
    assert len(brute_force("1234341200000000")) + len(brute_force("1234342100000000")) == 288 // (24 * 2)


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
    with pytest.raises(ValueError, match="no valid completion"):
        completions("11" + "0" * 14)
    with pytest.raises(ValueError, match="16 characters"):
        completions("1")


WEIGHTS = {"solved_weight": 1.0, "match_weight": 4.0}


# Well-known puzzles with the least number of givens a 9x9 can have, and two that are hard to search.
PUZZLES9 = [
    "000000010400000000020000000000050407008000300001090000300400200050100000000806000",
    "000000010400000000020000000000050604008000300001090000300400200050100000000807000",
    "000000012000035000000600070700000300000400800100000000000120000080000040050000600",
    "800000000003600000070090200050007000000045700000100030001000068008500010090000400",
    "000000000000003085001020000000507000004000100090000000500000073002010000000040009",
]


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
