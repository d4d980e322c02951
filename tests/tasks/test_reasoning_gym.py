"""reasoning-gym's problems under our graders."""

import pytest

from dllm_rl.tasks import ReasoningGym, Task


@pytest.mark.parametrize("generator", ["mini_sudoku", "sudoku", "countdown", "gsm_symbolic"])
def test_reasoning_gym_under_our_graders(generator: str) -> None:
    task = ReasoningGym(generator, size=4, seed=3)
    assert isinstance(task, Task) and task.name == f"reasoning_gym/{generator}"
    for problem in task:
        assert task.reward(problem, problem.solution).value == 1.0
        assert task.reward(problem, "no answer").value == 0.0
    assert task[2] == ReasoningGym(generator, size=4, seed=3)[2] != ReasoningGym(generator, size=4, seed=4)[2]
    with pytest.raises(IndexError):
        task[4]


def test_reasoning_gyms_scorers_would_run_this_and_ours_do_not() -> None:
    task = ReasoningGym("countdown", size=1, settings='{"min_numbers": 3, "max_numbers": 3}')
    assert len(task[0].fields["numbers"]) == 3
    for text in ("__import__('os').abort()", "9**9**9**9"):
        assert task.reward(task[0], f"<answer>{text}</answer>").value == 0.0
    with pytest.raises(ValueError, match="generator='chess' must be one of 'mini_sudoku'"):
        ReasoningGym("chess")
