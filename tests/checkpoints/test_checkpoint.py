"""Checkpoints: whole or absent, a bounded number, and continuing bit for bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from run_outputs import assert_same_weights, metrics_of, weights_of
from tiny_recipe import tiny_recipe

from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.models.base import trainable_parameters
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.monitoring.json_lines import current_rows
from dllm_rl.training.policies import make_optimizer
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def test_resume_continues_bit_for_bit(tmp_path):
    changes = {"sft_warmup_steps": 1, "num_iterations": 2, "beta": 0.01, "save_steps": 1, "save_total_limit": 9}
    changes |= {"num_steps": 2, "lr_schedule_steps": 2, "train_batch_size": 2, "report_to": None}
    summary = train(tiny_recipe(tmp_path, **changes))
    rows, folder = metrics_of(tmp_path), tmp_path / "checkpoints"
    whole = {2: weights_of(summary), 1: weights_of({"checkpoint": str(folder / "step-000001")})}
    for step in (1, 0):
        changes |= {"num_steps": step + 1, "resume_from_checkpoint": str(folder / f"step-00000{step}")}
        again = weights_of(train(tiny_recipe(tmp_path, **changes)))
        assert all(torch.equal(again[name], weight) for name, weight in whole[step + 1].items()), f"resumed at {step}"
        assert metrics_of(tmp_path) == rows[: step + 1], f"resumed at {step}"


def test_an_optimizer_other_than_adamw_gets_its_state_and_the_weight_decay_of_the_resumed_recipe(tmp_path):
    policy = tiny_masked_lm(characters="01", hidden_size=16, num_layers=1)
    weights = trainable_parameters(policy.module)
    first = torch.optim.SGD(weights, lr=1e-3, momentum=0.9, weight_decay=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    first.step()
    torch.save(first.state_dict(), tmp_path / "optimizer.pt")
    resumed = torch.optim.SGD(weights, lr=1e-3, momentum=0.5, weight_decay=0.3)
    checkpoint.load_optimizer(tmp_path, policy, resumed)
    (group,) = resumed.param_groups
    assert (group["weight_decay"], group["momentum"]) == (0.3, 0.9)
    moments = ((each.state[weight]["momentum_buffer"] for each in (first, resumed)) for weight in weights)
    assert all(torch.equal(saved, loaded) for saved, loaded in moments)


EVERY = {"num_steps": 3, "save_steps": 1, "save_total_limit": 9, "train_batch_size": 2}


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A run of three steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("three_steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllm_rl.training.start.rehearse", lambda *_: None)
        train(tiny_recipe(folder, **EVERY))
    return folder


@pytest.fixture
def run(three_steps, tmp_path):
    return Path(shutil.copytree(three_steps, tmp_path / "run"))


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=2, save_steps=1, save_total_limit=2))
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path / "checkpoints")] == [1, 2]


def state_of(folder: Path) -> dict:
    return json.loads((folder / "state.json").read_text())


def test_resuming_from_an_older_checkpoint_sets_the_later_ones_aside(run, capsys):
    folder, before = run / "checkpoints", {}
    for step, path in checkpoint.list_checkpoints(folder):
        before[step] = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
    # Two steps in all: with the abandoned 2 and 3 still in place, a limit of 1 would delete the step 2 just written.
    resume = {"num_steps": 2, "lr_schedule_steps": 3, "save_total_limit": 1}
    summary = train(tiny_recipe(run, **EVERY | resume, resume_from_checkpoint=str(folder / "step-000001")))
    assert summary["checkpoint"] == str(folder / "step-000002") and state_of(Path(summary["checkpoint"]))["step"] == 2
    assert [step for step, _ in checkpoint.list_checkpoints(folder)] == [2]
    said = capsys.readouterr().out.replace("\n", "")
    for step in (2, 3):
        aside = folder / f"step-00000{step}.set-aside"
        assert str(aside) in said
        assert {file.name: file.read_bytes() for file in aside.iterdir() if file.is_file()} == before[step]
    # One that was set aside can be gone on from, and another of its step is set aside in turn, under a free name.
    train(tiny_recipe(run, **EVERY, resume_from_checkpoint="latest"))
    again = {"resume_from_checkpoint": str(folder / "step-000002.set-aside")}
    summary = train(tiny_recipe(run, **EVERY, **again))
    assert [step for step, _ in checkpoint.list_checkpoints(folder)] == [3]
    assert summary["checkpoint"] == str(folder / "step-000003")
    assert {path.name for path in folder.glob("*-2")} == {"step-000002.set-aside-2", "step-000003.set-aside-2"}


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_names_the_checkpoint_that_it_evaluates(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=3, save_steps=1, save_total_limit=9))
    folder = tmp_path / "checkpoints"
    summary = train(
        tiny_recipe(tmp_path, num_steps=2, lr_schedule_steps=3, resume_from_checkpoint=str(folder / "step-000002"))
    )
    assert summary["checkpoint"] == str(folder / "step-000002")
    assert checkpoint.locate("latest", folder) == folder / "step-000002"


@pytest.mark.slow
def test_resuming_the_newest_sets_nothing_aside(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=2, save_steps=1))
    train(tiny_recipe(tmp_path, num_steps=3, lr_schedule_steps=2, save_steps=1, resume_from_checkpoint="latest"))
    assert not list((tmp_path / "checkpoints").glob("*set-aside*"))


def test_a_half_written_folder_is_no_checkpoint(run):
    (run / "checkpoints" / ".partial-000009-1").mkdir()
    assert checkpoint.locate("latest", run / "checkpoints").name == "step-000003"
    with pytest.raises(ValueError, match="is not a checkpoint folder"):
        checkpoint.locate(str(run / "checkpoints" / ".partial-000009-1"), run / "checkpoints")


def test_a_checkpoint_that_does_not_exist_is_answered_with_those_that_do(run):
    kept = r"step-000009' does not exist; give a checkpoint, or 'latest'; \S*checkpoints has .*step-000003"
    with pytest.raises(ValueError, match=kept):
        checkpoint.locate(str(run / "checkpoints" / "step-000009"), run / "checkpoints")


def test_a_write_that_fails_leaves_the_old_checkpoint(run, monkeypatch):
    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        again = {"num_steps": 4, "lr_schedule_steps": 3, "save_total_limit": 1, "resume_from_checkpoint": "latest"}
        train(tiny_recipe(run, **EVERY | again))
    assert [step for step, _ in checkpoint.list_checkpoints(run / "checkpoints")] == [0, 1, 2, 3]


def test_room_is_needed_for_as_much_as_the_last_checkpoint_took(tmp_path, monkeypatch):
    """A tokenizer and a card count too: more than the weights say may not fit."""
    recipe = tiny_recipe(tmp_path)
    policy = recipe.model()
    state = TrainingState.first(recipe.settings(), policy)
    older = tmp_path / "step-000000" / "tokenizer.json"
    older.parent.mkdir()
    with older.open("wb") as file:
        file.truncate(10**8)  # no byte is written
    room = namedtuple("room", "total used free")
    optimizer = make_optimizer(recipe, policy)
    content = checkpoint.Checkpoint(policy=policy, optimizer=optimizer, state=replace(state, step=1))
    save = partial(checkpoint.save, tmp_path, content, keep_last=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room(10**9, 0, 10**8))
    with pytest.raises(OSError, match=r"step-000001 was not saved: the disk is full; it takes 101\.\d MB, 100\.0 MB"):
        save()
    needed = 10**8 + 2**20 + sum(p.nbytes for p in policy.module.state_dict().values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room(10**9, 0, needed))
    assert save() == tmp_path / "step-000001"


PROGRAM = """
import sys
sys.path[:0] = {path!r}
from tiny_recipe import tiny_recipe
from dllm_rl.training.trainer import train
train(tiny_recipe({directory!r}, num_steps=40, save_steps=3, sft_warmup_steps=10, resume_from_checkpoint={resume!r}))
"""


def start(directory: Path, *, resume: str | None = None) -> subprocess.Popen:
    tests = Path(__file__).parents[1]
    path = [str(tests / "support"), str(tests.parent)]
    code = PROGRAM.format(path=path, directory=str(directory), resume=resume)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(process: subprocess.Popen) -> None:
    out, _ = process.communicate()
    assert process.returncode == 0, out


def steps_done(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return len(current_rows(path)) if path.exists() else 0


@pytest.mark.nightly
@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(kills, tmp_path):
    finished(start(tmp_path / "whole"))
    chance = random.Random()
    for number in range(kills):
        process, directory = start(tmp_path / f"run{number}"), tmp_path / f"run{number}"
        # Past the first checkpoint of the loop, so that an optimizer's state is what must come back.
        wanted = chance.randint(4, 36)
        while steps_done(directory) < wanted:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        finished(start(directory, resume="latest"))
        ends = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "whole", directory)]
        assert_same_weights(*ends)
        assert metrics_of(tmp_path / "whole") == metrics_of(directory), f"killed after step {wanted}"


@pytest.mark.slow
def test_interrupt_saves_and_says_how_to_resume(tmp_path):
    process = start(tmp_path / "run")
    while not steps_done(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 130 and "resume_from_checkpoint='latest'" in out
    finished(start(tmp_path / "run", resume="latest"))
