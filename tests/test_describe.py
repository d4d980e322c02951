"""Settings as text: records with all their fields, objects of users the same in every process, or refused."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl.algorithms.losses import PPOClip, TokenMean
from dllm_rl.checkpoints.resume import check_names
from dllm_rl.records import describe, to_json
from recipes.sudoku_unique import recipe as main_job


class Bonus:
    def __init__(self, weight, words, key, then=None):
        self.weight = weight
        self.words = words
        self.key = key
        self.then = then
        self.calls = 0

    def __call__(self, *arguments):
        return 0.0

    def method(self):
        return 0.0


def test_an_object_is_its_class_and_what_its_constructor_got():
    one = Bonus(2, ["a", "b"], "secret")
    text = describe(one)
    one.calls += 7  # what changes in a run is not a setting
    assert text == describe(Bonus(2, ["a", "b"], "secret")) == describe(one)
    assert re.fullmatch(r"[\w.]+\.Bonus\(weight=2, words=#\w{12}, key=#\w{12}, then=None\)", text), text
    others = [Bonus(3, ["a", "b"], "secret"), Bonus(2, ["a", "c"], "secret"), Bonus(2, ["a", "b"], "other")]
    others.append(Bonus(2, ["a", "b"], "secret", then=Bonus(1, [], "")))
    assert len({text, *map(describe, others)}) == 5
    for wrapped in (one.method, partial(Bonus.method, 1, "x", key=2.5), [one], {"a": one}, (1, {"b": [one]})):
        assert " at 0x" not in describe(wrapped)
    assert describe(one.method).endswith(".method")
    assert describe(partial(Bonus.method, 1, "x", key=2.5)) == f"{__name__}.method(1, 'x', key=2.5)"


def test_what_has_no_text_is_refused_before_a_run(tmp_path):
    recipe = tiny_recipe(tmp_path)
    check_names(recipe.settings())
    check_names(replace(recipe, lr_schedule=Bonus(1, [], "")).settings())
    with pytest.raises(ValueError, match="lr_schedule="):
        check_names(replace(recipe, lr_schedule=Bonus(object(), [], "")).settings())


def test_a_record_is_described_with_its_defaults():
    assert describe(PPOClip(epsilon=0.1)) == "PPOClip(epsilon=0.1, epsilon_high=None, delta=None)"
    assert describe(TokenMean()) == "TokenMean()"
    settings = main_job.settings()
    assert settings["corrector"] == {"class_path": "NoCorrection", "init_args": {}} and "0x" not in str(settings)
    sampler = settings["sampler"]["init_args"]
    assert (sampler["temperature"], sampler["max_new_tokens"]) == (1.0, 16)


def test_a_method_of_ones_own_is_not_described_as_the_librarys_of_its_name():
    """A resume compares the texts, and must not take one for the other."""

    def mine(mean):
        return mean

    class Mine(TokenMean):
        pass

    mine.__name__ = Mine.__name__ = "TokenMean"
    assert describe(TokenMean()) == "TokenMean()"
    assert describe(mine) == f"{__name__}.TokenMean"
    assert describe(partial(mine)) == f"{__name__}.TokenMean()"
    assert describe((mine,)) == f"({__name__}.TokenMean,)"
    assert describe(Mine()) == f"{__name__}.TokenMean()"
    assert to_json(Mine())["class_path"] == f"{__name__}.TokenMean"


def test_a_function_of_the_started_script_has_the_name_that_an_import_gives(tmp_path):
    """A run started as a script resumes from code that imports the recipe."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "mine.py").write_text(
        "from dllm_rl.records import describe\ndef reward(): pass\nprint(describe(reward))\n"
    )
    for command in (["scripts/mine.py"], ["-m", "scripts.mine"], ["-c", "import scripts.mine"]):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
        done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.stdout == "scripts.mine.reward\n", done.stderr
