"""Evaluation during a run: when, and under which names."""

from dataclasses import replace

from tiny_recipe import tiny_recipe

from dllm_rl.training.start import start
from dllm_rl.training.validation import evaluate_with, shown, validate


def test_it_is_every_eval_steps_on_the_validation_task(tmp_path):
    run = start(recipe := tiny_recipe(tmp_path))
    means = evaluate_with(recipe, run.policy, recipe.validation_task, run.accelerator)
    wanted = {f"eval/{name}": value for name, value in means.items()}  # greedy: the same each time
    assert "eval/solve_rate" in wanted
    for every, steps in ((0, []), (2, [1, 3]), (3, [2])):
        often = replace(run, recipe=replace(recipe, eval_steps=every))
        found = [validate(often, step) for step in range(4)]
        assert found == [wanted if step in steps else {} for step in range(4)]
    run.log.close()


def test_a_line_shows_what_a_task_is_judged_by():
    assert shown({"solve_rate": 0.25, "seconds": 3.0, "reward": 1.5}) == "solve_rate 0.250, reward 1.500"
