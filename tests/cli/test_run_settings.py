"""What commands read from a run's folder, and that nothing of its text is executed."""

import json
from functools import partial

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl import train
from dllm_rl.cli import run_settings
from dllm_rl.cli.main import main
from dllm_rl.cli.run_settings import read_call, sampler_of, task_of
from dllm_rl.members import describe
from dllm_rl.samplers.rules import threshold
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks import Sudoku


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    sampler = partial(unmask, max_new_tokens=16, diffusion_steps=None, commit=partial(threshold, tau=0.75))
    train(tiny_recipe(folder, num_steps=1, warmup_steps=0, eval_sampler=partial(sampler, suppress=(0, 2))))
    return folder


def test_evaluate_takes_task_and_sampler_from_the_run_and_finds_its_numbers(run, capsys):
    assert main(["evaluate", str(run), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    summary = json.loads((run / "summary.json").read_text())
    assert row["task"] == "sudoku" and row["n"] == summary["eval_problems"]
    assert row["commit"] == "threshold(tau=0.75)" and row["max_new_tokens"] == 16
    assert row["solve_rate"] == summary["eval_after"]["solve_rate"]
    assert row["cell_accuracy"] == pytest.approx(summary["eval_after"]["cell_accuracy"], rel=1e-12)


def test_an_option_replaces_the_runs_own(run, capsys):
    assert main(["evaluate", str(run), "--json", "--limit", "2", "--commit", "schedule", "--set", "seed=3"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["n"] == 2 and row["commit"] == "schedule"


def test_what_is_read_back_is_what_was_described(run):
    sampler = sampler_of(str(run))
    wanted = json.loads((run / "summary.json").read_text())["recipe"]
    assert describe(sampler) == wanted["eval_sampler"]
    name, settings = task_of(str(run))
    assert name == "sudoku" and describe(Sudoku(**settings)) == wanted["eval_task"]


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "Sudoku(split=open('x'))(1)",
        "Sudoku(*x)",
        "Sudoku(**{'split': 'test'})",
        "Sudoku(split=[x for x in y])",
        "DatasetTask(reward_funcs=(mine:reward))",
        "(" * 5000,
        "Sudoku",
        None,
    ],
)
def test_other_text_is_no_call(text):
    assert read_call(text) is None


def test_a_call_within_a_call_stays_a_name():
    assert read_call("f(a=g(b=1), c=h, d=(1, 2))") == ("f", {"a": ("g", {"b": 1}), "c": ("h", {}), "d": (1, 2)})


def test_a_model_that_names_no_task_needs_the_option(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "task" in capsys.readouterr().err


def test_a_scripts_task_is_named(monkeypatch):
    monkeypatch.setattr(run_settings, "recipe_of", lambda model: {"eval_task": "mine:Words(seed=1)"})
    with pytest.raises(ValueError, match="of a script, mine:Words"):
        task_of("run")
