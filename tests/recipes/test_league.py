"""The league's own weights, its arms, its tuning and its table, from made-up results: nothing trained."""

import json

import pytest
import torch

from dllm_rl import OneStep, Trajectory
from dllm_rl.decoding.tokens import encode
from dllm_rl.rng import generator_for
from dllm_rl.types import group_sizes
from recipes.studies import league, paired


def test_wd1_by_hand():
    # R - mean is (0.5, -0.5): softmax 0.7311 and 0.2689, the other sign's the other way round; twice 0.4621.
    rewards, group = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 3.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    first, equal, last = league.WD1()(rewards, group).split(group_sizes(group))
    assert first.tolist() == pytest.approx([0.92423, -0.92423], abs=1e-5)
    assert equal.eq(0).all() and last.sum().item() == pytest.approx(0, abs=1e-6)


def test_one_segment_is_one_step():
    """So the league has one row for both."""
    recipe = league.study_of("sudoku").base
    policy = recipe.model()
    prompts = encode(policy, [recipe.task[0]], num_generations=4, seeds=list(range(4)))
    rollout = recipe.sampler(policy, prompts, generator_for(0, "rollout"))
    scores = []
    for likelihood in (OneStep(prompt_mask=0.0), Trajectory(num_segments=1)):
        noise = likelihood.draw_views(rollout, generator_for(0, "noise"))
        scores.append(likelihood.logprobs(policy, rollout, noise))
    assert torch.equal(*scores) and scores[0].abs().sum() > 1


def test_steps_follow_from_the_cost():
    assert league.steps_of({"d1, one update": 0.4}, "d1, one update, 1e-3", 12.0) == 30
    assert league.steps_of({"d1, one update": 60.0}, "d1, one update, 1e-3", 12.0) == 1


def test_a_cost_is_the_lesser_median_of_two_rounds(tmp_path, monkeypatch):
    """Steps of 1, 2, 3 ... seconds, longer from run to run, the first two of eight left out: 5.5 in the first run."""
    trained = []
    monkeypatch.setattr(league, "warm_up", lambda *_: tmp_path)
    monkeypatch.setattr("dllm_rl.training.trainer.train", trained.append)
    steps = lambda _: [{"step_time": float(len(trained) + i)} for i in range(8)]  # noqa: E731
    monkeypatch.setattr("dllm_rl.monitoring.plots.read_metrics", steps)
    study = league.study_of("sudoku")
    league.measure(study, tmp_path)
    league.measure(study, tmp_path)  # everything is there
    assert [recipe.num_steps for recipe in trained] == [8] * 2 * 2 * len(league.LEAGUES["sudoku"].methods)
    found = json.loads((tmp_path / "costs.json").read_text())
    assert found.keys() == {league.same_cost(arm) for arm in study.arms}
    assert (found["d1, one update"], found["d1, all updates"]) == (5.5, 6.5)


def test_a_new_methods_cost_is_scaled_to_the_machine_of_the_stored_ones(tmp_path, monkeypatch):
    """A stored method takes 4 s a step here and 2 s there; the new one 6 s here, so 3 s there."""
    trained = []
    monkeypatch.setattr(league, "warm_up", lambda *_: tmp_path)
    monkeypatch.setattr("dllm_rl.training.trainer.train", trained.append)
    seconds = lambda _: [{"step_time": (6.0, 4.0)[len(trained) % 2]}] * 8  # noqa: E731
    monkeypatch.setattr("dllm_rl.monitoring.plots.read_metrics", seconds)
    study = league.study_of("sudoku")
    names = list(dict.fromkeys(map(league.same_cost, study.arms)))
    (tmp_path / "costs.json").write_text(json.dumps(dict.fromkeys(names[:-1], 2.0)))
    league.measure(study, tmp_path)
    assert json.loads((tmp_path / "costs.json").read_text()) == dict.fromkeys(names[:-1], 2.0) | {names[-1]: 3.0}
    assert len(trained) == 4


def test_the_best_two_of_the_first_seed_are_tried_again():
    rates = {"a, one update, 2e-4": 0.3, "a, one update, 5e-4": 0.5, "a, all updates, 1e-4": 0.4, "b, x, 1": 0.1}
    first = {(arm, 100): {"after": rate} for arm, rate in rates.items()}
    shortlist = {"a": ["a, one update, 5e-4", "a, all updates, 1e-4"], "b": ["b, x, 1"]}
    assert league.shortlist(first) == shortlist
    more = {(arm, seed): {"after": 0.2} for arms in shortlist.values() for arm in arms for seed in (101, 102)}
    more["a, all updates, 1e-4", 101] = {"after": 0.45}
    assert league.best(first | more) == {"a": "a, all updates, 1e-4", "b": "b, x, 1"}


def test_the_table_has_the_best_method_first(tmp_path):
    """A run that diverged has a rate and no seconds."""
    run = {"before": 0.25, "num_steps": 70, "s": 20.0}
    ours = {(f"{league.DEFAULT}, one update, 5e-4", seed): run | {"after": 0.4 + seed / 10} for seed in (0, 1)}
    lost = {("d1, all updates, 1e-4", seed): {"after": 0.0, "num_steps": 7} for seed in (0, 1)}
    rows = paired.markdown(league.rows_of("sudoku", lost | ours)).splitlines()[2:]
    assert rows[0] == f"| {league.DEFAULT} | 0.450±0.635 | - | - | one update, 5e-4 | 70 | 20 |"
    assert rows[1] == "| d1 | 0.000±0.000 | 0.450±0.635 | 0.500 | all updates, 1e-4 | 7 | - |"
    assert league.told("sudoku", lost).endswith("| d1 | 0.000±0.000 | - | - | 7 | - | all updates, 1e-4 |\n")
    league.draw("sudoku", lost | ours, tmp_path / "league.png")
    assert (tmp_path / "league.png").stat().st_size > 5_000


def test_committed_runs_that_are_put_back_are_not_repeated(tmp_path, monkeypatch):
    """With --restore nothing is left to run, and the JSON is the same."""
    monkeypatch.chdir(tmp_path)
    parts = json.loads(league.STORED["sudoku"].read_text())
    (tmp_path / "written.json").write_text(json.dumps(parts | {"stale": 1}))
    monkeypatch.setattr(league, "STORED", {"sudoku": tmp_path / "written.json"})
    monkeypatch.setattr(league, "warm_up", lambda *_: tmp_path)  # where a cost is measured: of none
    monkeypatch.setattr(league, "run_all", lambda jobs, root, workers: [job() for _, job in jobs])
    left = []
    monkeypatch.setattr(paired, "run_all", lambda jobs, root, workers: left.extend(name for name, _ in jobs))
    monkeypatch.setattr("sys.argv", ["league", "sudoku", "--restore"])
    league.main()
    assert not left
    assert json.loads((tmp_path / "written.json").read_text()) == parts

    one = next((tmp_path / "runs/league-sudoku/results").glob("wd1*_3.json"))
    one.unlink()
    monkeypatch.setattr("sys.argv", ["league", "sudoku"])
    league.main()
    assert len(left) == 2 and left[0] == "warm-3" and left[1] == one.stem
