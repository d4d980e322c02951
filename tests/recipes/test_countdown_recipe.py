"""The Countdown recipe, cut short: it runs, its splits share no set of numbers, and its reward is what it says."""

from dataclasses import replace
from functools import partial

import pytest

from dllm_rl.config import from_command_line
from dllm_rl.decoding.prompts import encode
from dllm_rl.decoding.texts import decode
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.rng import generator_for
from dllm_rl.training.trainer import train
from recipes.countdown_tiny import recipe, small_numbers

SHORT = "--warmup.steps 2 --num_steps 2 --train_batch_size 2 --num_generations 4"
FEW = "--eval_task.size 8 --validation_task.size 8"


def test_it_runs(tmp_path):
    short = from_command_line(recipe, [*SHORT.split(), *FEW.split(), "--output_dir", str(tmp_path)])
    summary = train(replace(short, model=partial(recipe.model, num_layers=1)))
    assert summary["warmup_steps"] == 2 and summary["eval_problems"] == 8
    assert set(summary["eval_after"]) == {"reward", "parsed", "accuracy", "valid", "numbers_used"}
    rows = current_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]


def test_every_problem_can_be_read_and_answered_by_its_model():
    policy = recipe.model(hidden_size=16, num_layers=1, num_attention_heads=2)
    problems = [recipe.task[i] for i in range(40)]
    rollout = recipe.sampler(policy, encode(policy, problems), generator_for(0))
    assert rollout.forwards == 3 and len(decode(policy, rollout)) == 40
    for problem in problems:
        spelled = policy.tokenizer.encode(problem.solution, add_special_tokens=False)
        assert len(spelled) == recipe.max_new_tokens and policy.tokenizer.decode(spelled) == problem.solution
        assert recipe.task.reward(problem, problem.solution).value == 1.5


def test_reward_by_hand():
    task = small_numbers(split="train")
    problem = task[0]
    a, b, c = problem.fields["numbers"]
    wrong = next(
        f"{a}{x}{b}{y}{c}" for x in "+-" for y in "+-" if eval_signs(x, y, a, b, c) != problem.fields["target"]
    )
    assert task.reward(problem, wrong).value == pytest.approx(0.5)  # all numbers, another value
    assert task.reward(problem, str(a)).value == pytest.approx(0.5 / 3)
    assert task.reward(problem, "+").value == 0.0


def eval_signs(x, y, a, b, c):
    return a + (b if x == "+" else -b) + (c if y == "+" else -c)


def test_splits_share_no_numbers():
    numbers = lambda task: {tuple(sorted(task[i].fields["numbers"])) for i in range(min(len(task), 300))}  # noqa: E731
    train_on, steer_by, judge_by = map(numbers, (recipe.task, recipe.validation_task, recipe.eval_task))
    assert not train_on & steer_by and not train_on & judge_by and not steer_by & judge_by
    assert partial(small_numbers, split="test", size=400)() == recipe.eval_task
