"""What README promises: its test command is CI's, its examples run."""

import runpy
from pathlib import Path

import pytest
import torch
from readme import README, example
from safetensors.torch import load_file

from dllm_rl import Recipe


def test_ci_runs_the_readmes_test_command():
    command = Path(__file__).parents[1].joinpath(".ci", "run").read_text().strip().splitlines()[-1]
    assert command.endswith("-m pytest") and f"    {command}\n" in README.read_text()


def test_the_example_recipe_is_one(tmp_path):
    (tmp_path / "mine.py").write_text(example("Use it"))
    recipe = runpy.run_path(str(tmp_path / "mine.py"))["recipe"]
    assert isinstance(recipe, Recipe) and len(recipe.eval_task) == 400


@pytest.mark.slow
def test_the_module_of_ones_own_is_trained_and_opened_again(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(example("Add a backbone").replace("num_steps=60", "num_steps=2, warmup_steps=2"))
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        made = runpy.run_path(str(tmp_path / "own.py"), run_name="__main__")
    saved = load_file(f"{made['summary']['checkpoint']}/model.safetensors")
    now = made["policy"].module.state_dict()
    assert saved.keys() == now.keys() and all(torch.equal(saved[name], now[name]) for name in saved)


def test_trls_users_are_served_in_twelve_lines(tmp_path, monkeypatch):
    block = example("Coming from TRL")
    assert len([line for line in block.splitlines() if line]) <= 12
    (tmp_path / "from_trl.py").write_text(block.replace("num_steps=100", "num_steps=2"))
    monkeypatch.chdir(tmp_path)
    summary = runpy.run_path(str(tmp_path / "from_trl.py"))["summary"]
    assert summary["eval_problems"] == 6 and summary["eval_after"].keys() >= {"reward", "turned"}


def test_every_file_it_links_to_is_there():
    import re

    root = README.parent
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("http") or (root / target).exists(), target
