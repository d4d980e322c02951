"""A task's own solutions, as rows to be shown to a model."""

from dllm_rl.tasks.base import Task


def solved(task: Task) -> list[dict[str, object]]:
    """`prompt` and `completion` of every problem: what SFT takes for a data set."""
    problems = [task[i] for i in range(len(task))]
    return [{"prompt": problem.prompt, "completion": problem.solution} for problem in problems]
