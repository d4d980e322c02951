"""4x4 Sudoku against brute force, and its reward against values worked by hand."""

import json
from random import Random

import pytest
from small_sudoku import GRID

from dllm_rl.tasks.base import Task
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.tasks.sudoku.solver import SPLITS, completions, random_grid


@pytest.mark.parametrize("clues", [4, 8, (10, 12), 16])
def test_unique_problems(clues: int | tuple[int, int]) -> None:
    task = Sudoku(clues=clues, size=60, seed=3)
    low, high = (clues, clues) if isinstance(clues, int) else clues
    counts = set()
    for index in range(60):
        puzzle, solution = task[index].fields["puzzle"], task[index].fields["solution"]
        counts.add(16 - puzzle.count("0"))
        assert completions(puzzle) == (solution,)
        assert task[index].prompt == puzzle.replace("0", ".") + "="
        assert task[index].solution == solution
        assert task.reward(task[index], solution).value == 5.0
    assert counts == set(range(low, high + 1))


def test_problems_with_several_completions() -> None:
    task = Sudoku(clues=(0, 5), unique=False, size=200)
    several = [len(completions(task[i].fields["puzzle"])) for i in range(200)]
    assert max(several) == 288 and min(several) == 1
    assert all(task[i].fields["solution"] in completions(task[i].fields["puzzle"]) for i in range(200))


@pytest.mark.parametrize("clues", [1, 2, 3])
def test_splits_share_no_puzzle_of_few_clues(clues: int) -> None:
    """One grid of each split agrees with the same puzzle of few clues, so that the grids' split does not do it."""
    drawn = {}
    for split in ("train", "validation", "test"):
        task = Sudoku(split=split, clues=clues, unique=False, size=600)
        drawn[split] = {problem.fields["puzzle"] for problem in task}
        assert {16 - puzzle.count("0") for puzzle in drawn[split]} == {clues}
        assert all(problem.fields["solution"] in SPLITS[split] for problem in task)
    assert sum(map(len, drawn.values())) == len(set.union(*drawn.values()))
    if clues == 1:  # 16 cells times 4 digits: the three splits' draws hold all of them
        assert len(set.union(*drawn.values())) == 64 and min(map(len, drawn.values())) >= 3


def test_the_puzzles_of_few_clues_are_pinned() -> None:
    """A change here changes what the few-clues study's stored results were measured on."""
    task = Sudoku(split="test", clues=(1, 3), unique=False, size=400)
    assert [task[i].fields["puzzle"] for i in range(3)] == ["0000000142000000", "0040003000000100", "0000000000100000"]


def test_infilling_shows_the_puzzle_itself() -> None:
    plain, filled = (Sudoku(clues=(1, 3), unique=False, infill=infill)[0] for infill in (False, True))
    assert plain.fields == filled.fields
    assert (plain.prompt, plain.blank) == (plain.fields["puzzle"].replace("0", ".") + "=", None)
    assert filled.prompt.replace(filled.blank, "0") == filled.fields["puzzle"]
    assert filled.solution is None and filled.prompt.count(filled.blank) == filled.fields["puzzle"].count("0")


def test_a_problem_depends_on_seed_split_and_index_only() -> None:
    """That it is the same in every process is in tasks/test_hash_seeds.py."""
    for split in ("train", "test"):
        task = Sudoku(size=50, seed=5, split=split)
        assert [task[i] for i in reversed(range(50))][::-1] == list(Sudoku(size=50, seed=5, split=split))
    assert Sudoku(size=9)[8] == Sudoku(size=90)[8] != Sudoku(size=90, seed=1)[8]


def test_the_problems_themselves_are_pinned() -> None:
    """A change here changes what every stored result was measured on: `version` must change with it."""
    assert [Sudoku(size=3)[i].prompt for i in range(3)] == [
        ".1434...321414.2=",
        "231.41233.41.4..=",
        "231.4.3..24334.1=",
    ]


# GRID's puzzle with the last two rows' outer cells blank: 12, 13 (values 4, 3) and 8, 9 (values 2, 1).
PUZZLE = "1234341200430021"


def test_text_prompts_read_the_last_answer_block() -> None:
    task = Sudoku(prompt_format="text", size=5)
    asked = task[0]
    lines = asked.fields["puzzle"].replace("0", ".")
    assert asked.prompt[0]["role"] == "user"
    assert "\n".join(lines[i : i + 4] for i in (0, 4, 8, 12)) in asked.prompt[0]["content"]
    assert task.reward(asked, asked.solution).breakdown["solve_rate"] == 1.0
    assert task.reward(asked, "<answer>1</answer> then " + asked.solution).breakdown["solve_rate"] == 1.0
    assert task.reward(asked, asked.solution + "<answer>?</answer>").breakdown["solve_rate"] == 0.0
    assert task.reward(asked, asked.solution.removesuffix("</answer>")).breakdown["solve_rate"] == 1.0
    assert task.reward(asked, asked.fields["solution"]).value == 0.0  # no block
    assert Sudoku(prompt_format="text", chat=False)[0].prompt == Sudoku(prompt_format="text")[0].prompt[0]["content"]


@pytest.mark.parametrize(
    "bad",
    [
        {"split": "dev"},
        {"clues": 3},
        {"clues": (12, 10)},
        {"clues": 17},
        {"clues": 25, "side": 9},
        {"side": 5},
        {"unique": False, "side": 9, "clues": 30},
        {"size": 0},
        {"reward_rule": "d1", "side": 9, "clues": 30},
        {"infill": True, "prompt_format": "text"},
        {"infill": True, "clues": (12, 16)},
        {"infill": True, "clues": 81, "side": 9},
        {"opening": "<reasoning>"},
    ],
)
def test_bad_settings_name_the_field(bad: dict) -> None:
    with pytest.raises(Exception, match=next(iter(bad))):
        Sudoku(**bad)


def test_a_complete_grid_of_a_file_is_refused_for_infilling_alone(tmp_path) -> None:
    (tmp_path / "a.csv").write_text(
        "Puzzle,Solution\n1234341221434320,1234341221434321\n1234341221434321,1234341221434321\n"
    )
    with pytest.raises(ValueError, match="line 3: puzzle='1234341221434321' has no empty cell, and infill=True"):
        Sudoku(path=tmp_path / "a.csv", infill=True)[0]
    assert len(Sudoku(path=tmp_path / "a.csv")) == 2


def test_the_task_protocol_and_its_bounds() -> None:
    task = Sudoku(size=4)
    assert isinstance(task, Task) and len(task) == 4 and len(list(task)) == 4
    with pytest.raises(IndexError):
        task[4]


def test_stored_puzzles(tmp_path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(f"Puzzle,Solution\n{PUZZLE},{GRID}\n{PUZZLE.replace('0', '.')},{GRID}\n")
    task = Sudoku(path=path)
    assert len(task) == 2 and task[0].fields == task[1].fields == {"puzzle": PUZZLE, "solution": GRID}
    assert task[0].prompt == PUZZLE.replace("0", ".") + "="
    assert [len(Sudoku(path=path, size=size)) for size in (1, 2, 3)] == [1, 2, 2]
    for row, message in ((f"{PUZZLE},{GRID[:15]}2", "is not a completion"), (f"{PUZZLE[1:]},{GRID}", "16 characters")):
        bad = tmp_path / f"{len(message)}.csv"
        bad.write_text(f"Puzzle,Solution\n{PUZZLE},{GRID}\n{row}\n")
        with pytest.raises(ValueError, match=f"line 3: .*{message}"):
            len(Sudoku(path=bad))


def test_a_solution_among_more_than_the_listed_ones_is_read(tmp_path) -> None:
    grid = random_grid(Random("x"))
    puzzle = "".join(digit if place % 4 == 0 else "0" for place, digit in enumerate(grid))
    assert grid not in completions(puzzle), "the first 64"
    (tmp_path / "a.jsonl").write_text(json.dumps({"puzzle": puzzle, "solution": grid}) + "\n")
    assert Sudoku(path=tmp_path / "a.jsonl", side=9, clues=26, reward_rule="rules")[0].fields["solution"] == grid
    wrong = grid[1:] + grid[0]
    (tmp_path / "b.jsonl").write_text(json.dumps({"puzzle": puzzle, "solution": wrong}) + "\n")
    with pytest.raises(ValueError, match="is not a completion of puzzle"):
        Sudoku(path=tmp_path / "b.jsonl", side=9, clues=26, reward_rule="rules")[0]
