"""What README promises: its test command is CI's, its examples run."""

import runpy
from pathlib import Path

from readme import README, example

from dllm_rl import Recipe


def test_ci_runs_the_readmes_test_command():
    command = Path(__file__).parents[1].joinpath(".ci", "run").read_text().strip().splitlines()[-1]
    assert command.endswith("-m pytest") and f"    {command}\n" in README.read_text()


def test_the_example_recipe_is_one(tmp_path):
    (tmp_path / "mine.py").write_text(example("Use it"))
    recipe = runpy.run_path(str(tmp_path / "mine.py"))["recipe"]
    assert isinstance(recipe, Recipe) and len(recipe.eval_task) == 400


def test_every_file_it_links_to_is_there():
    import re

    root = README.parent
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("http") or (root / target).exists(), target
