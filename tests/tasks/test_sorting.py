"""The smallest task."""

from itertools import pairwise

from dllm_rl.tasks import Mini, Task


def test_mini() -> None:
    task = Mini(size=200)
    assert isinstance(task, Task) and len(list(task)) == 200
    for problem in task:
        asked, solution = problem.prompt.removesuffix("="), problem.solution
        assert sorted(asked) == list(solution) and all(a <= b for a, b in pairwise(solution))
        assert task.reward(problem, solution).value == 1.0
    problem = next(problem for problem in task if problem.solution == "".join(sorted(set(problem.solution))))
    for wrong in (1, 2, 3, 4):
        graded = task.reward(problem, "x" * wrong + problem.solution[wrong:])
        assert graded.value == 1 - wrong / 4 and graded.breakdown == {"accuracy": 0.0}
    assert task.reward(problem, problem.solution + "1").breakdown == {"accuracy": 0.0}
    assert task.reward(problem, problem.solution[:2]).value == 0.5
    assert task.reward(problem, "").parsed is False
