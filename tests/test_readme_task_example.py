"""The README's example of a new task, executed as it stands there."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from dllm_rl import Reward

EXAMPLE = Path(__file__).with_name("readme_task_example.py")
SHORT = "--warmup_steps 5 --num_steps 2 --train_batch_size 8 --num_generations 4 --logging_steps 1"


def test_the_example_trains_on_its_own_task(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *SHORT.split(), "--output_dir", str(tmp_path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["eval_problems"] == 303 and summary["warmup_steps"] == 5
    assert set(summary["eval_after"]) == {"reward", "parsed", "accuracy"}
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1] and all(0 < row["reward"] < 1 for row in rows)
    assert "sorting, seed 0" in capsys.readouterr().out


def test_its_task_by_hand():
    tasks = runpy.run_path(str(EXAMPLE))["recipe"]
    problem = tasks.task[1001]
    assert (problem.prompt, problem.solution) == ("3003=", "0033")
    assert tasks.task.reward(problem, "0033") == Reward(1.0, True, {"accuracy": 1.0})
    assert tasks.task.reward(problem, "003") == Reward(0.75, False, {"accuracy": 0.0})
    assert not set(tasks.task.numbers) & set(tasks.eval_task.numbers)
    assert not set(tasks.validation_task.numbers) & set(tasks.eval_task.numbers)


def test_the_readme_shows_this_very_text():
    readme = EXAMPLE.parents[1] / "README.md"
    if not readme.exists() or "class Sorting" not in readme.read_text():
        pytest.skip("the README does not show this example yet")
    assert EXAMPLE.read_text() in readme.read_text()
