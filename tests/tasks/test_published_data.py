"""The test files that d1 published, where DLLM_RL_DATA names a folder that has them."""

import os
from pathlib import Path

import pytest
from countdown_solver import solve

from dllm_rl.tasks import Countdown, Sudoku
from dllm_rl.tasks.protocols import under_protocol
from dllm_rl.tasks.sudoku.solver import SPLITS, completions

FOLDER = os.environ.get("DLLM_RL_DATA")
SUDOKU, COUNTDOWN = "d1_4x4_test_sudoku.csv", "d1_countdown_cd3_test.jsonl"


def stored(name: str) -> Path:
    if FOLDER is None:
        pytest.skip(f"DLLM_RL_DATA is not set: it would name the folder that holds {name}")
    if not (Path(FOLDER) / name).is_file():
        pytest.skip(f"DLLM_RL_DATA={FOLDER} holds no {name}")
    return Path(FOLDER) / name


def test_d1s_sudoku_puzzles() -> None:
    task = Sudoku(path=stored(SUDOKU), prompt_format="text")
    assert len(task) == 500 and len(Sudoku(path=stored(SUDOKU), size=7)) == 7
    puzzles = [problem.fields["puzzle"] for problem in task]
    assert {puzzle.count("0") for puzzle in puzzles} == {8}
    assert sum(len(completions(puzzle)) > 1 for puzzle in puzzles) == 124
    for protocol in ("d1", "strict"):
        graded = under_protocol(task, protocol)
        rewards = [graded.reward(problem, problem.solution) for problem in graded]
        assert all(reward.value == 1.0 and reward.breakdown["solve_rate"] == 1.0 for reward in rewards)
    # The best of the other completions is right by the rules and wrong by the reference.
    problem = next(problem for problem in task if len(completions(problem.fields["puzzle"])) > 1)
    other = next(grid for grid in completions(problem.fields["puzzle"]) if grid != problem.fields["solution"])
    assert under_protocol(task, "strict").reward(problem, other).value == 1.0
    assert under_protocol(task, "d1").reward(problem, f"<answer>{other}</answer>").value < 1.0


def test_d1s_countdown_problems() -> None:
    task = Countdown(path=stored(COUNTDOWN), prompt_format="text")
    assert len(task) == 256
    assert task[0].fields == {"numbers": [30, 100, 93], "target": 23}
    graded = under_protocol(task, "d1")
    for problem in graded:
        expression = solve(problem.fields["numbers"], problem.fields["target"])
        assert expression is not None  # every one of them can be solved
        box = f"\\boxed{{{expression}}}"
        for text in (f"<answer>{box}</answer>", f"so \\boxed{{{expression} = {problem.fields['target']}}}"):
            assert graded.reward(problem, text).value == 1.0
        assert graded.reward(problem, f"\\boxed{{{expression}+0}}").value == 0.0
        assert (
            graded.reward(problem, f"<answer>{expression}</answer>").value == 0.0
        )  # d1 reads all of a text without box


def test_what_the_8b_recipes_training_problems_share_with_them() -> None:
    """docs/evaluate.md has the first number: a grid learned by heart solves some of d1's puzzles."""
    from recipes.llada_8b import recipe_of

    published, ours = Sudoku(path=stored(SUDOKU), prompt_format="text"), recipe_of().task
    grids = set(SPLITS["train"])
    puzzles = {problem.fields["puzzle"] for problem in ours}
    assert len(grids) == 176 and sum(map(len, SPLITS.values())) == 288 and len(ours) == 10_000
    assert sum(problem.fields["solution"] in grids for problem in published) == 316
    assert sum(problem.fields["puzzle"] in puzzles for problem in published) == 2

    def asked(task: Countdown) -> list[tuple[tuple[int, ...], int]]:
        return [(tuple(sorted(each.fields["numbers"])), each.fields["target"]) for each in task]

    theirs = asked(Countdown(path=stored(COUNTDOWN), prompt_format="text"))
    trained = asked(recipe_of("countdown").task)
    problems, numbers = set(trained), {each for each, _ in trained}
    assert sum(each in problems for each in theirs) == 7 and sum(each in numbers for each, _ in theirs) == 17
