"""Runs side by side: what their job says of each."""

from pathlib import Path

from tiny_recipe import tiny_recipe

from dllm_rl.callbacks import RunControl
from dllm_rl.cli import arms
from dllm_rl.files import write_json
from dllm_rl.records import describe


def test_what_prints_an_arm_is_no_setting_in_which_arms_or_their_seeds_differ(tmp_path, capsys):
    first, second = (arms.OnScreen(name, (tmp_path / name).open("w")) for name in "ab")
    assert describe((first,)) == describe((second,))
    first.on_evaluate(RunControl(tmp_path, step=2, num_steps=3), {"eval/reward": 0.5})
    first._screen.close()
    assert (tmp_path / "a").read_text() == "a: 2 of 3 steps, reward 0.500\n"


def test_an_arm_that_does_not_learn_is_named(tmp_path, monkeypatch, capsys):
    dead = [{"name": "constant reward", "state": "not learning", "text": "it was always\x1b 0"}]

    def trained(placed):
        for name, arm in placed.items():
            Path(arm.directory).mkdir(parents=True)
            write_json(Path(arm.directory) / "summary.json", {"problems": dead if name == "a" else []})

    monkeypatch.setattr(arms, "train_side_by_side", trained)
    monkeypatch.setattr(arms, "compare", sorted)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(arms.forkserver, "ensure_running", lambda: None)
    recipe = tiny_recipe(tmp_path, sft_warmup_steps=0)
    assert arms.train_arms({"a": recipe, "b": recipe}, output_dir=str(tmp_path / "job")) == ["a", "b"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "a: not learning, constant reward: it was always\u241b 0" and "b: " not in printed[-2]
