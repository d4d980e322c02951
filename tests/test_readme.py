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


def test_its_exit_statuses_are_those_of_the_code():
    import re
    import signal

    from dllm_rl.tasks.deadline import STATUS
    from dllm_rl.training.stop import SIGNALS

    rows = dict(
        re.findall(r"^\| ([\d, ]+) \| (.*?) \|", README.read_text().partition("| exit status |")[2], re.MULTILINE)
    )
    codes = next(row for row in rows if "," in row)
    named = [getattr(signal, name) for name in re.findall(r"SIG[A-Z0-9]+", rows.pop(codes))]
    assert [int(code) for code in codes.split(", ")] == [128 + number for number in named]
    assert set(named) == set(SIGNALS) and set(map(int, rows)) == {0, 1, 2, STATUS}
    assert "--reward_timeout" in rows[str(STATUS)]
