"""What records and functions hold, by name and as text."""

import os
import subprocess
import sys
from functools import partial

import pytest

from dllm_rl.algorithms.losses import ppo_clip, token_mean
from dllm_rl.likelihoods import estimators as likelihoods
from dllm_rl.members import describe, described, flattened
from recipes.studies.surrogates import gdsd
from recipes.sudoku_unique import recipe as main_job


def test_describe_fills_in_defaults():
    assert describe(partial(ppo_clip, epsilon=0.1)) == "ppo_clip(epsilon=0.1, epsilon_high=None, delta=None)"
    assert describe(token_mean) == "token_mean"
    text = described(main_job)
    assert text["corrector"] == "no_correction()" and "0x" not in str(text)
    assert "temperature=1.0" in text["sampler"] and "max_new_tokens=16" in text["sampler"]


@pytest.mark.parametrize("make", [likelihoods.coupled, likelihoods.one_step])
def test_different_estimators_are_described_differently(make):
    assert describe(make()) != describe(likelihoods.trajectory())


def test_a_function_of_ones_own_is_not_described_as_the_librarys_of_its_name():
    """A resume compares the texts, and must not take one for the other."""

    def mine(mean):
        return mean

    mine.__name__ = token_mean.__name__
    assert describe(token_mean) == "token_mean"
    assert describe(mine) == f"{__name__}:token_mean"
    assert describe(partial(mine)) == f"{__name__}:token_mean()"
    assert describe((gdsd,)) == "(recipes.studies.surrogates:gdsd)"


def test_a_function_of_the_started_script_has_the_name_that_an_import_gives(tmp_path):
    """A run started as a script resumes from code that imports the recipe."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "mine.py").write_text(
        "from dllm_rl.members import describe\ndef reward(): pass\nprint(describe(reward))\n"
    )
    for command in (["scripts/mine.py"], ["-m", "scripts.mine"], ["-c", "import scripts.mine"]):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout == "scripts.mine:reward\n", done.stderr


def test_of_a_partial_of_a_partial_the_outer_keyword_counts():
    inner = partial(dict, a=1, b=1)
    vars(inner)  # Python then keeps the two apart
    outer = partial(inner, a=2)
    assert outer.func is inner and flattened(outer).keywords == {"a": 2, "b": 1}
