"""The league's own weights, its arms and its table, from made-up results: nothing trained."""

import json
from dataclasses import replace

import pytest
import torch

from recipes.studies import league


def test_wd1_by_hand():
    # R - mean is (0.5, -0.5): softmax 0.7311 and 0.2689, the other sign's the other way round; twice 0.4621.
    assert league.wd1(torch.tensor([[1.0, 0.0]]))[0].tolist() == pytest.approx([0.92423, -0.92423], abs=1e-5)
    assert league.wd1(torch.ones(2, 4)).eq(0).all()
    assert league.wd1(torch.tensor([[3.0, 1.0, 2.0]])).sum().item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("task", league.TASKS)
def test_every_method_is_a_recipe_in_every_setting(task):
    study = league.study_of(task, 5)
    assert len(study.arms) == len(league.METHODS) * len(league.GRID) == 60
    made = {arm: replace(study.base, **changes) for arm, changes in study.arms.items()}
    in_order = {arm for arm, recipe in made.items() if recipe.sampler.keywords.get("block_size") == 1}
    assert in_order == {f"JustGRPO, {setting}" for setting in league.GRID}
    assert {recipe.eval_sampler for recipe in made.values()} == {study.base.eval_sampler}
    quantised = {arm.split(", ")[0] for arm, recipe in made.items() if recipe.rollout_quantization is not None}
    assert quantised == {"random order with FP8 and AIS"}
    assert {recipe.train_batch_size * recipe.num_generations for recipe in made.values()} == {128}


def test_steps_follow_from_the_cost(tmp_path):
    (tmp_path / "costs.json").write_text(json.dumps({"d1, lr 1e-3": 0.4}))
    assert league.steps_of(tmp_path, "d1, lr 1e-3", 30) == 75


def test_a_cost_is_the_lesser_median_of_two_rounds(tmp_path, monkeypatch):
    """Steps of 1, 2, 3 ... seconds, longer from run to run, the first two of eight left out: 5.5 in the first run."""
    trained = []
    monkeypatch.setattr(league, "warm_up", lambda *_: tmp_path)
    monkeypatch.setattr("dllm_rl.training.loop.train", trained.append)
    steps = lambda _: [{"step_time": float(len(trained) + i)} for i in range(8)]  # noqa: E731
    monkeypatch.setattr("dllm_rl.monitoring.plots.read_metrics", steps)
    study = league.study_of("sudoku", 5)
    league.costs(study, tmp_path)
    league.costs(study, tmp_path)  # everything is there
    assert [recipe.num_steps for recipe in trained] == [8] * 2 * 2 * len(league.METHODS)
    assert {recipe.learning_rate for recipe in trained} == {5e-4}
    assert {recipe.num_iterations for recipe in trained} == {1, 2}
    found = json.loads((tmp_path / "costs.json").read_text())
    assert found.keys() == study.arms.keys()
    assert found["d1, lr 1e-4"] == found["d1, lr 1e-3"] == found["d1, lr 5e-4"] == 5.5
    assert found["d1, lr 5e-4, two updates"] == 6.5


def test_the_table_has_the_best_method_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(league, "__file__", str(tmp_path / "league.py"))
    run = {"before": 0.25, "area": 0.3, "s": 40.0, "num_steps": 70}
    found = {
        f"{arm}, lr 1e-3": {seed: run | {"after": after + seed / 10} for seed in (0, 1)}
        for arm, after in (("a", 0.2), (league.DEFAULT, 0.4))
    }
    league.report(league.study_of("sudoku", 2), "sudoku", found)
    rows = [line for line in capsys.readouterr().out.splitlines() if "lr 1e-3" in line]
    assert rows[0] == f"| {league.DEFAULT}, lr 1e-3 | 2 | 0.450±0.635 | 0.400, 0.500 | - | 0.300 | 70 | 40 |"
    assert rows[1] == "| a, lr 1e-3 | 2 | 0.250±0.635 | 0.200, 0.300 | 0.200±0.000 | 0.300 | 70 | 40 |"
    assert (tmp_path / "league_sudoku.png").stat().st_size > 5_000


def test_a_run_that_diverged_has_a_rate_and_no_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(league, "__file__", str(tmp_path / "league.py"))
    run = {"before": 0.25, "after": 0.4, "area": 0.3, "s": 40.0, "num_steps": 70}
    lost = {"after": 0.0, "area": 0.1, "num_steps": 70}
    found = {f"{league.DEFAULT}, lr 1e-3": {0: lost, 1: run}, "a, lr 1e-3": {0: run | {"before": 0.35}, 1: lost}}
    found["b, lr 1e-3"] = {seed: {"after": 0.0, "num_steps": 70} for seed in (0, 1)}
    league.report(league.study_of("sudoku", 2), "sudoku", found)
    lines = capsys.readouterr().out.splitlines()
    assert sum("| 0.200 | 70 | 40 |" in line for line in lines) == 2
    assert any(line.startswith("| b, ") and line.endswith("| - | 70 | - |") for line in lines)
    assert lines[-1].startswith("before RL: 0.300±")
