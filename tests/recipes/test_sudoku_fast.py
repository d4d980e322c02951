"""recipes/sudoku_fast.py: what its reward pays for."""

import pytest

from dllm_rl.tasks.base import Cost, grade
from dllm_rl.tasks.sudoku.solver import completions
from recipes.sudoku_fast import CELLS, Fast, few_clues


def test_only_a_right_answer_is_paid_for_speed():
    plain = few_clues(split="train")
    task = Fast(plain, bonus=0.5)
    problem = task[0]
    solution = min(completions(problem.fields["puzzle"]))
    wrong = solution[:-1] + str(int(solution[-1]) % 4 + 1)
    texts = [solution, solution, wrong, wrong]
    graded = grade(task, [problem] * 4, texts, [Cost(forwards, CELLS) for forwards in (4, 16, 1, 16)])
    right, bad = (plain.reward(problem, text).value for text in (solution, wrong))
    assert [reward.value for reward in graded] == pytest.approx([right + 0.5 * 12 / 16, right, bad, bad])
    assert [reward.breakdown["forwards"] for reward in graded] == [4, 16, 1, 16]
    assert right > bad
