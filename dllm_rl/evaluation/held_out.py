"""held_out.jsonl: a run's held-out evaluations problem by problem, which `compare` reads."""

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from dllm_rl.evaluation.evaluate import task_facts
from dllm_rl.evaluation.results import Evaluation
from dllm_rl.identity import digest_of_code, digest_of_value, full_name
from dllm_rl.tasks.base import Task


def held_out_row(
    step: int, evaluation: Evaluation, task: Task, settings: Mapping[str, Any], *, is_test: bool
) -> dict[str, Any]:
    """Return a line of held_out.jsonl.

    Args:
        step: Number of updates before the evaluation.
        evaluation: The graded completions, one for each problem.
        task: The task that they belong to.
        settings: The recipe's settings as JSON.
        is_test: Whether the task is the recipe's `eval_task`, and not another `validation_task`.

    Returns:
        {"step", "task": "eval_task" or "validation_task",
         "metrics": {NAME: a value for each problem: a number; [numerator, denominator] of a ratio such as
             cell_accuracy; null if a reward function returned None},
         "problems": digest of the problems, "grading": digests of what computes each metric, "recipe": settings}
    """
    metrics: dict[str, list[Any]] = {}
    for name, sums in evaluation.sums.items():
        fractions = [sums.get(answer.problem) for answer in evaluation.answers]
        metrics[name] = [each if each is None or each[1] != 1 else each[0] for each in fractions]
    contents = "".join(answer.content for answer in evaluation.answers)
    return {
        "step": step,
        "task": "eval_task" if is_test else "validation_task",
        "metrics": metrics,
        "problems": sha256(contents.encode()).hexdigest()[:16],
        "grading": grading_of(task),
        "recipe": json.loads(json.dumps(dict(settings)), parse_constant=str),  # an infinite setting is a text here
    }


def grading_of(task: Task) -> dict[str, str]:
    """Return texts that are equal for two tasks if they compute the same metrics: that of the reward, and one for each
    reward function. A metric without a text of its own has that of the reward.
    """
    graders: dict[str, str] | None = getattr(task, "graders", None)
    if graders is not None:  # a data set's, whose name and rows say nothing about its grading
        return graders | {"reward": digest_of_value([graders, getattr(task, "reward_weights", None)])[:16]}
    facts = task_facts(task)
    whole = [
        full_name(type(task)),
        digest_of_code(task),
        *(facts[name] for name in ("version", "protocol", "settings")),
    ]
    return {"reward": digest_of_value(whole)[:16]}
