"""Single runs of a study are repeated beside the stored ones, at the rates that the stored runs had."""

import dataclasses
import sys

import pytest
from tiny_recipe import with_changes

from dllm_rl.files import write_json
from recipes.studies import paired, repeat
from recipes.studies.late import late_rollouts

FAKE = dataclasses.replace(late_rollouts.STUDY, base=with_changes(late_rollouts.STUDY.base, sft_warmup_steps=0))
FAKE = dataclasses.replace(FAKE, base=dataclasses.replace(FAKE.base, model="none"), arms={"a": {}, "b": {}}, fewer={})


def left_by(study, root, num_steps, arm, seed):
    if arm == "b":
        raise ValueError("no such model")
    paired.keep(root, {"arm": arm, "seed": seed, "num_steps": num_steps, "after": seed / 8, "s": 90.0})


@pytest.fixture
def fake(monkeypatch):
    stored = [{"arm": arm, "seed": 2, "num_steps": 80, "after": 0.5, "s": 120.0} for arm in "ab"]
    monkeypatch.setattr(repeat, "STUDIES", {"late_rollouts": lambda *_: repeat.of_study(FAKE, stored, left_by)})
    return stored


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["repeat", "late_rollouts", *words])
    repeat.main()


def test_a_run_stands_beside_the_stored_one(fake, tmp_path, monkeypatch, capsys):
    before = late_rollouts.STORED.read_bytes()
    run(monkeypatch, "--arms", "a", "--seeds", "2", "3", "--output_dir", str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["| a | 2 | 0.250 | 0.500 | 1.5 |", "| a | 3 | 0.375 | - | 1.5 |"]
    assert late_rollouts.STORED.read_bytes() == before
    changed = {"arm": "a", "seed": 2, "num_steps": 80, "after": 0.75, "s": 60.0}
    write_json(paired.result_path(tmp_path, "a", 2), changed)
    run(monkeypatch, "--arms", "a", "--output_dir", str(tmp_path))  # the first stored seed, which is there already
    assert "| a | 2 | 0.750 | 0.500 | 1.0 |" in capsys.readouterr().out


def test_a_run_that_fails_and_an_unknown_arm_are_said(fake, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="seed 2 of 'b' failed"):
        run(monkeypatch, "--arms", "b", "--output_dir", str(tmp_path))
    with pytest.raises(SystemExit):
        run(monkeypatch, "--arms", "c", "--output_dir", str(tmp_path))
    assert "late_rollouts has no arm 'c', but 'a', 'b'" in capsys.readouterr().err


def test_without_arms_they_are_listed(fake, monkeypatch, capsys):
    run(monkeypatch)
    assert "| a | 2 to 2 | 0.500 | 2.0 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", repeat.STUDIES)
def test_every_stored_run_can_be_repeated(name, tmp_path):
    runs = repeat.runs_of(name)
    assert {arm for arm, _ in runs.stored} == set(runs.arms)
    paths = {runs.path(tmp_path, arm, seed) for arm, seed in runs.stored}
    assert len(paths) == len(runs.stored)


@pytest.mark.parametrize("name", ["late_rollouts", "low_bits_tuned", "training_order"])
def test_a_run_is_repeated_at_its_stored_rate(name, tmp_path, monkeypatch):
    """These studies stored the rate of every run."""
    jobs = []
    monkeypatch.setattr(paired, "run_all", lambda made, *_: jobs.extend(made))
    runs = repeat.runs_of(name)
    pairs = [pair for pair in runs.stored if pair[1] == min(seed for _, seed in runs.stored)]
    runs.run(tmp_path, pairs)
    if name == "training_order":
        rates = {(f"{job.args[1]}: {job.args[2]}", job.args[4]): job.args[3] for _, job in jobs}
        stored = {pair: runs.stored[pair]["rate"] for pair in pairs}
    else:
        made = [job.args for _, job in jobs if len(job.args) == 5]  # the others warm up
        rates = {(arm, seed): study.arms[arm]["learning_rate"] for study, _, _, arm, seed in made}
        stored = {pair: runs.stored[pair]["learning_rate"] for pair in pairs}
    assert rates == stored
