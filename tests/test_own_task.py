"""recipes/examples/own_task.py: a task of one's own trains."""

import json
import runpy
import sys

import pytest
from readme import README

from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.tasks import Reward

SHORT = "--warmup.steps 5 --num_steps 2 --train_batch_size 8 --num_generations 4 --log.steps 1"


@pytest.fixture
def program():
    return str(README.parent / "recipes/examples/own_task.py")


@pytest.mark.slow
def test_the_example_trains_on_its_own_task(program, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, *SHORT.split(), "--output_dir", str(tmp_path)])
    runpy.run_path(program, run_name="__main__")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval_problems"] == 303 and summary["warmup_steps"] == 5
    assert set(summary["eval_after"]) == {"reward", "parsed", "accuracy"}
    rows = current_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1] and all(0 < row["reward"] < 1 for row in rows)
    assert "sorting, seed 0" in capsys.readouterr().out


def test_its_task_by_hand(program):
    names = runpy.run_path(program)
    tasks = names["recipe"]
    assert names["held_out"]() == tasks.eval_task  # what `dllm-rl evaluate --task` makes
    problem = tasks.task[1001]
    assert (problem.prompt, problem.solution) == ("3003=", "0033")
    assert tasks.task.reward(problem, "0033") == Reward(1.0, True, {"accuracy": 1.0})
    assert tasks.task.reward(problem, "003") == Reward(0.75, False, {"accuracy": 0.0})
    assert not set(tasks.task.numbers) & set(tasks.eval_task.numbers)
    assert not set(tasks.validation_task.numbers) & set(tasks.eval_task.numbers)
