"""Objects of users as text: the same in every process, or refused."""

import re
from dataclasses import replace
from functools import partial

import pytest
from tiny_recipe import tiny_recipe

from dllm_rl.checkpoints.resume import check_names
from dllm_rl.members import describe


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
    one.calls += 7  # what changes in a run is no setting
    assert text == describe(Bonus(2, ["a", "b"], "secret")) == describe(one)
    assert re.fullmatch(r"\w+:Bonus\(weight=2, words=#\w{12}, key=#\w{12}, then=None\)", text.split(".")[-1]), text
    others = [Bonus(3, ["a", "b"], "secret"), Bonus(2, ["a", "c"], "secret"), Bonus(2, ["a", "b"], "other")]
    others.append(Bonus(2, ["a", "b"], "secret", then=Bonus(1, [], "")))
    assert len({text, *map(describe, others)}) == 5
    for wrapped in (one.method, partial(Bonus.method, one), [one], {"a": one}, (1, {"b": [one]})):
        assert " at 0x" not in describe(wrapped)
    assert describe(one.method).endswith(".method")


def test_what_has_no_text_is_refused_before_a_run(tmp_path):
    recipe = tiny_recipe(tmp_path)
    check_names(recipe)
    check_names(replace(recipe, lr_schedule=Bonus(1, [], "")))
    with pytest.raises(ValueError, match="lr_schedule="):
        check_names(replace(recipe, lr_schedule=Bonus(object(), [], "")))
