"""held_out.jsonl of a run: the means of its rows are those that the run reports, also after a resume."""

from dataclasses import replace

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl.evaluation.compare import compare, fractions_of, mean_of, read_run
from dllm_rl.files import read_json
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def means(run, row):
    return {name: mean_of(fractions_of(run, row, name)) for name in row["metrics"]}


def test_rows_have_the_means_of_the_run_and_a_resume_repeats_them(tmp_path):
    sizes = {"train_batch_size": 1, "num_generations": 2, "rollout_quantization": None}
    recipe = tiny_recipe(tmp_path / "a", eval_steps=1, save_steps=1, save_total_limit=9, **sizes)
    recipe = replace(recipe, eval_task=replace(recipe.eval_task, size=3), validation_task=recipe.eval_task)
    train(recipe)
    run, summary = read_run(tmp_path / "a"), read_json(tmp_path / "a" / "summary.json")
    assert [(row["step"], row["task"]) for row in run.rows] == [
        *((0, "eval_task"), (1, "validation_task"), (2, "eval_task"), (2, "validation_task"))
    ]
    tests, validations = run.of_task("eval_task"), run.of_task("validation_task")
    assert [len(row["metrics"]["reward"]) for row in (tests[0], validations[0])] == [3, 8]
    assert means(run, tests[0]) == pytest.approx(summary["eval_before"])
    assert means(run, tests[-1]) == pytest.approx(summary["eval_after"])
    for row, logged in zip(validations, current_rows(tmp_path / "a" / "metrics.jsonl"), strict=True):
        assert means(run, row) == pytest.approx({name: logged[f"eval/{name}"] for name in row["metrics"]})
    train(replace(recipe, resume_from_checkpoint=str(tmp_path / "a" / "checkpoints" / "step-000001")))
    again = read_run(tmp_path / "a")
    assert [row["metrics"] for row in again.rows] == [row["metrics"] for row in run.rows]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "held_out.jsonl").write_bytes((tmp_path / "a" / "held_out.jsonl").read_bytes())
    (line,) = compare([tmp_path / "a", tmp_path / "b"]).sentences()
    assert "cannot say which of b and a is better" in line and line.endswith("on each of the 3 held-out problems.")
