"""A run's folder: whose it is, and what it may contain."""

import errno
import os
import shutil
import signal

import pytest
from refusals import refuses
from tiny_recipe import OddPuzzles, tiny_recipe, with_changes

from dllm_rl import Unmask
from dllm_rl.checkpoints.run_folder import why_forget_best
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.training import warmup
from dllm_rl.training.trainer import train

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^output_dir='.*/file/run' cannot be written \(Not a directory\); give"):
        train(tiny_recipe(tmp_path / "file" / "run"))


def files_of(run):
    return [run / "checkpoints" / "step-000001" / name for name in ("model.safetensors", "optimizer.pt")]


def test_the_same_command_starts_again_after_a_stop_in_the_warm_up(tmp_path, monkeypatch, capfd):
    settings = {"num_steps": 1, "sft_warmup_steps": 1, "sft_warmup_eval_steps": 9}
    train(tiny_recipe(tmp_path / "whole", **settings))
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(warmup, "solution_examples", lambda *_, **options: os.kill(os.getpid(), signal.SIGTERM))
        refuses("143", lambda: train(tiny_recipe(stopped, **settings)), SystemExit)
    assert "start again with the same command" in capfd.readouterr().out
    (stopped / "metrics.jsonl").write_text('{"warmup_step": 0, "warmup/loss": 2.5}\n')
    (stopped / "checkpoints" / ".step-000000.partial").mkdir(parents=True)
    train(tiny_recipe(stopped, **settings))
    assert "before its first step: starting from the beginning" in capfd.readouterr().out
    for one, other in zip(files_of(stopped), files_of(tmp_path / "whole"), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("left", ["checkpoints/step-000000", "summary.json", "metrics.jsonl"])
def test_a_run_with_a_step_is_not_started_again(tmp_path, left):
    if left.startswith("checkpoints"):
        (tmp_path / left).mkdir(parents=True)
    else:
        (tmp_path / left).write_text('{"step": 0, "reward": 1.0}\n')
    refuses("already contains a run", lambda: train(tiny_recipe(tmp_path)))


def test_a_reference_of_another_run_is_refused(tmp_path):
    train(tiny_recipe(tmp_path / "a", beta=0.1, num_steps=0))
    train(tiny_recipe(tmp_path / "b", beta=0.1, num_steps=0, seed=1))
    shutil.rmtree(tmp_path / "a" / "reference")
    shutil.copytree(tmp_path / "b" / "reference", tmp_path / "a" / "reference")
    with pytest.raises(ValueError, match="reference belongs to another run"):
        train(tiny_recipe(tmp_path / "a", beta=0.1, num_steps=1, resume_from_checkpoint="latest"))
    shutil.rmtree(tmp_path / "a" / "reference")
    with pytest.raises(ValueError, match=r"reference: manifest\.json is missing"):
        train(tiny_recipe(tmp_path / "a", beta=0.1, num_steps=1, resume_from_checkpoint="latest"))


def test_a_folder_that_holds_a_run(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=0))
    refuses("already contains a run", lambda: train(tiny_recipe(tmp_path, num_steps=1)))
    train(tiny_recipe(tmp_path, num_steps=0, overwrite_output_dir=True))


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("dllm_rl.files.fcntl.lockf", refuse)
    train(tiny_recipe(tmp_path / "run", num_steps=0))
    assert "has no locks: make sure that no other run writes there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, None),
        ({"eval_sampler": Unmask(max_new_tokens=2)}, "eval_sampler has changed"),
        ({"validation_task": OddPuzzles()}, "validation_task has changed"),
        ({"metric_for_best_model": "parsed"}, "saves.best.metric has changed"),
        ({"learning_rate": 0.5}, None),
    ],
)
def test_the_best_of_other_evaluations_no_longer_counts(tmp_path, changed, why):
    recipe = tiny_recipe(tmp_path, metric_for_best_model="reward")
    state = TrainingState(version=2, dtype="float32", best_step=1, best_value=0.5, recipe=recipe.settings())
    folder = tmp_path / "checkpoints" / "step-000002"
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    assert why_forget_best(with_changes(recipe, **changed), state, folder) == why
