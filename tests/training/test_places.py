"""Where a run reads and writes: user code may change or delete the working directory, and what a run reads is not what
it deletes.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from dllm_rl import GroupRelative, Lora, PPOClip, RandomOrder, grpo, load_policy, tiny_masked_lm
from dllm_rl.models.checkpoint.adapters import load_adapter, save_adapter
from dllm_rl.models.lora import add_lora

pytestmark = pytest.mark.usefixtures("no_rehearsal")

ROWS = [{"prompt": f"{a}="} for a in "12345678"]
SETTINGS = {"max_new_tokens": 2, "train_batch_size": 2, "num_generations": 2, "eval_split": 2, "num_steps": 1}
SETTINGS |= {"report_to": "none"}


def policy(seed=0):
    return tiny_masked_lm(characters="12345678=", hidden_size=16, num_layers=1, seed=seed)


def reward(completions, **columns):
    return [float("1" in text) for text in completions]


class MovingAdvantages(GroupRelative):
    def __call__(self, rewards, group, **parts):
        os.chdir("/")
        return super().__call__(rewards, group, **parts)


class MovingLoss(PPOClip):
    def __call__(self, *args, **kwargs):
        os.chdir("/")
        return super().__call__(*args, **kwargs)


class MovingRank(RandomOrder):
    def __call__(self, uniforms):
        os.chdir("/")
        return super().__call__(uniforms)


def moved(seed=0):
    os.chdir("/")
    return policy()


def left_nowhere(completions, **columns):
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir(os.getcwd())
    return reward(completions)


MOVING = {
    "model": {"model": moved},
    "advantages": {"advantages": MovingAdvantages(), "lora": Lora(r=2)},
    "loss": {"loss": MovingLoss(), "lora": Lora(r=2)},
    "rank": {"sampler_options": {"rank": MovingRank()}},
    "reward": {"reward_funcs": left_nowhere},
}


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.repeated(first_only=True)
def test_user_code_that_moves_changes_no_place_of_the_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    policy().save_pretrained("base")
    arguments = {"model": "base", "train_dataset": ROWS, "reward_funcs": reward, "output_dir": "run"}
    grpo(**arguments | SETTINGS | MOVING[name])
    assert os.getcwd() == str(tmp_path)
    assert json.loads((tmp_path / "run/summary.json").read_text())["checkpoint"].startswith(str(tmp_path / "run"))
    assert load_policy("run/checkpoints/step-000001").complete("1=", max_new_tokens=2, diffusion_steps=1) is not None


def test_a_working_directory_that_was_deleted(tmp_path, monkeypatch):
    """A run in an absolute folder does not need one; else the message says what is missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    grpo(policy(), ROWS, reward, output_dir=str(tmp_path / "run"), **SETTINGS)
    for settings in ({"output_dir": "run"}, {}, {"output_dir": str(tmp_path / "run"), "resume_from_checkpoint": "x"}):
        with pytest.raises(ValueError, match="is relative to the working directory, which has been deleted; change to"):
            grpo(policy(), ROWS, reward, **settings | SETTINGS)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("setting", ["model", "teacher.model"])
def test_what_a_run_reads_is_not_deleted_by_it(tmp_path, monkeypatch, setting):
    """Also behind a link, and by a relative path."""
    monkeypatch.chdir(tmp_path)
    summary = grpo(policy(), ROWS, reward, output_dir="run", **SETTINGS)
    last = Path(summary["checkpoint"])
    (tmp_path / "link").symlink_to(last)
    for source in (str(last), "link", f"run/checkpoints/{last.name}"):
        model, more = (source, {}) if setting == "model" else (policy(), {"teacher": {"model": source}})
        with pytest.raises(
            ValueError, match=rf"{setting}='.*' belongs to the run in output_dir='.*', which .* would delete"
        ):
            grpo(model, ROWS, reward, output_dir="run", overwrite_output_dir=True, **more, **SETTINGS)
    shutil.copytree(last, tmp_path / "kept")
    model, more = ("kept", {}) if setting == "model" else (policy(), {"teacher": {"model": "kept"}})
    grpo(model, ROWS, reward, output_dir="run", overwrite_output_dir=True, **more, **SETTINGS)


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    made = policy()
    made.save_pretrained("~/saved")
    add_lora(made, Lora(r=2))
    save_adapter(made, "~/adapters")
    load_adapter(load_policy("~/saved"), "~/adapters")
    assert sorted(os.listdir(tmp_path / "home")) == ["adapters", "saved"] and not (tmp_path / "~").exists()
