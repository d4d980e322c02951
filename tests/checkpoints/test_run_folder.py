"""A run's folder: whose it is, and what a resume may change."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
from sft_toys import tiny_sft
from tiny_recipe import tiny_recipe

from dllm_rl import manifest, tis
from dllm_rl.checkpoints.run_folder import _check_recipe, defaults, renamings
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.recipe import Recipe
from dllm_rl.supervised.recipe import SFT
from dllm_rl.supervised.train import fine_tune
from dllm_rl.training import warmup
from dllm_rl.training.trainer import train


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^output_dir='.*/file/run' cannot be written \(Not a directory\); give"):
        train(tiny_recipe(tmp_path / "file" / "run"))


def files_of(run):
    return [run / "checkpoints" / "step-000001" / name for name in ("model.safetensors", "optimizer.pt")]


def test_the_same_command_starts_again_after_a_stop_in_the_warm_up(tmp_path, monkeypatch, capfd):
    settings = {"num_steps": 1, "sft_warmup_steps": 2, "sft_warmup_eval_steps": 9}
    train(tiny_recipe(tmp_path / "whole", **settings))
    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(warmup, "warmup_step", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit, match="143"):
            train(tiny_recipe(stopped, **settings))
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
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny_recipe(tmp_path))


FILES = [".lock", "metrics.jsonl", "completions.jsonl", "summary.json", "training.png", "checkpoints/latest"]


@pytest.mark.parametrize("name", FILES)
def test_a_fifo_in_a_runs_folder_is_refused_before_it_is_opened(tmp_path, name):
    path = tmp_path / "run" / name
    for more in ({}, {"resume_from_checkpoint": "latest"}, {"overwrite_output_dir": True}):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # a folder of nothing but the lock's file is deleted, whatever that is
            os.mkfifo(path)
        with pytest.raises(ValueError, match=rf"{name} is no regular file; remove it, or give another output_dir"):
            train(tiny_recipe(tmp_path / "run", **more))


@pytest.mark.parametrize("name", ["checkpoints", "reference"])
def test_a_file_in_place_of_a_folder_is_refused_before_any_step(tmp_path, name):
    (tmp_path / name).write_text("")
    for more in ({}, {"resume_from_checkpoint": "latest"}):
        with pytest.raises(ValueError, match=rf"{name} is no folder; remove it, or give another output_dir"):
            train(tiny_recipe(tmp_path, **more))


def test_a_reference_of_another_run_is_refused(tmp_path):
    train(tiny_recipe(tmp_path / "a", beta=0.1, num_steps=1))
    train(tiny_recipe(tmp_path / "b", beta=0.1, num_steps=1, seed=1))
    shutil.rmtree(tmp_path / "a" / "reference")
    shutil.copytree(tmp_path / "b" / "reference", tmp_path / "a" / "reference")
    with pytest.raises(ValueError, match="reference is that of another run"):
        train(tiny_recipe(tmp_path / "a", beta=0.1, num_steps=1, resume_from_checkpoint="latest"))
    shutil.rmtree(tmp_path / "a" / "reference")
    with pytest.raises(ValueError, match=r"reference: manifest\.json is missing"):
        train(tiny_recipe(tmp_path / "a", beta=0.1, num_steps=1, resume_from_checkpoint="latest"))


def test_a_checkpoint_from_before_a_setting_existed_had_its_default(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=1))
    file = tmp_path / "checkpoints/step-000001/state.json"
    state = json.loads(file.read_text())
    del state["recipe"]["gradient_checkpointing"]
    file.write_text(json.dumps(state))
    manifest.write(file.parent, step=1, processes=1, versions={})
    again = {"num_steps": 2, "lr_schedule_steps": 1, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="gradient_checkpointing=True differs from the checkpoint's False"):
        train(tiny_recipe(tmp_path, **again, gradient_checkpointing=True))
    # What does not touch training may be another one.
    train(tiny_recipe(tmp_path, **again, num_mismatch_groups=3, eval_steps=1, eval_batch_size=2))


MAY_CHANGE = {
    **{"output_dir": "elsewhere", "resume_from_checkpoint": "latest", "overwrite_output_dir": True, "dry_run": True},
    **{"eval_steps": 1, "eval_batch_size": 2, "num_mismatch_groups": 3},
    **{"save_steps": 7, "save_total_limit": 3, "verify_checkpoint": "quick", "on_save_error": "continue"},
    **{"async_save": True, "logging_steps": 3, "log_completions_steps": 1, "report_to": None, "push_to_hub": "me/it"},
    **{"stop_seconds": 1.0, "reward_timeout": None, "collective_timeout": 60.0, "peer_timeout": 60.0},
    **{"num_steps": 9, "lr_schedule_steps": 5, "max_prompt_length": 20, "shard_size": 0},
}


@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_changes_no_number_of_the_steps_before_may_change_on_a_resume(name):
    """The rates of the first two steps are the same in a schedule of 4 steps and in one of 5."""
    recipe = tiny_recipe("x", num_steps=2, lr_schedule_steps=4)
    state = TrainingState(step=1, version=1, dtype="float32", recipe=recipe.settings())
    changed = replace(recipe, **{name: MAY_CHANGE[name]})
    assert getattr(changed, name) != getattr(recipe, name)
    _check_recipe(changed, state)
    with pytest.raises(ValueError, match="seed=1 differs from the checkpoint's 0"):
        _check_recipe(replace(changed, seed=1), state)


@pytest.mark.parametrize(
    ("before", "now", "changed"),
    [
        ("old:loss", "new:loss", ("old:loss", "new:loss")),
        ("old:loss(a=1, b=old:inner(c=2))", "new:loss(a=1, b=new:inner(c=2))", ("old:loss", "new:loss")),
        ("script:first", "script:second", ("script:first", "script:second")),
        ("a.b:<lambda>", "a.c:<lambda>", ("a.b:<lambda>", "a.c:<lambda>")),
        ("old:loss(a=1)", "new:loss(a=2)", None),
        ("tis(cap=2.0)", "none()", None),
        (1, "new:loss", None),
    ],
)
def test_a_renamed_script_is_named(before, now, changed):
    assert renamings(before, now)[:1] == ([changed] if changed else [])
    recipe = tiny_recipe("x")
    state = TrainingState(step=1, version=1, dtype="float32", recipe=recipe.settings() | {"name": before})
    with pytest.raises(ValueError, match="name") as caught:
        _check_recipe(replace(recipe, name=str(now)), state)
    assert all(name in str(caught.value) for name in changed or ())


def test_a_folder_that_holds_a_run(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=1))
    with pytest.raises(ValueError, match="already holds a run"):
        train(tiny_recipe(tmp_path, num_steps=1))
    train(tiny_recipe(tmp_path, num_steps=1, overwrite_output_dir=True))


def test_a_resume_with_another_recipe(tmp_path):
    train(tiny_recipe(tmp_path, num_steps=1))
    with pytest.raises(ValueError, match=r"learning_rate=0\.1 differs from the checkpoint's"):
        train(tiny_recipe(tmp_path, learning_rate=0.1, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match=r"corrector=.*tis\(cap=2\.0.* differs from the checkpoint's"):
        train(tiny_recipe(tmp_path, corrector=tis(), resume_from_checkpoint="latest"))


def test_a_checkpoint_of_another_kind_of_run_is_refused_as_such(tmp_path):
    """Also where a field that both kinds have differs, and with no word of damage."""
    rl = tiny_recipe(tmp_path / "rl", num_steps=1, adam_beta2=0.99)
    train(rl)
    supervised = tiny_sft(tmp_path / "sft", num_steps=1)
    fine_tune(supervised)
    with pytest.raises(ValueError, match=r"of another kind of run, without .*, task, .*; give its folder as model"):
        train(replace(rl, output_dir=str(tmp_path / "sft"), resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="of another kind of run, without dataset"):
        fine_tune(replace(supervised, output_dir=str(tmp_path / "rl"), resume_from_checkpoint="latest"))


def test_defaults_are_the_records_own():
    assert defaults(SFT)["max_length"] == 1024 and "max_length" not in defaults(Recipe)
    assert "dataset" not in defaults(SFT), "it has none"


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("dllm_rl.files.fcntl.lockf", refuse)
    train(tiny_recipe(tmp_path / "run", num_steps=1))
    assert "has no locks: see to it that no other run writes there" in capsys.readouterr().out
