"""Studies can go on: each arm is a recipe of today, and what is missing beside finished runs is run."""

import dataclasses
from importlib import import_module
from pkgutil import iter_modules

import pytest

import recipes.studies
from recipes.studies import paired
from recipes.studies.paired import Study
from recipes.sudoku_unique import recipe

pytestmark = pytest.mark.slow


def left_by(study, root, num_steps, arm, seed):
    paired.keep(root, {"arm": arm, "seed": seed, "num_steps": num_steps})


def test_what_is_missing_beside_finished_runs_is_run(tmp_path):
    base = dataclasses.replace(recipe, model="a model", sft_warmup_steps=0)
    plain = Study("plain", base, {"none": {}, "tis": {}}, {}, {}, seeds=2, num_steps=180)
    left_by(plain, tmp_path, 180, "none", 0)
    pairs = [("none", 0), ("tis", 0), ("none", 1)]
    paired.run_missing(plain, tmp_path, pairs, num_steps=lambda _: 180, workers=1, run=left_by)
    assert paired.load(tmp_path).keys() == set(pairs)


def studies():
    """Every study of a module of recipes/studies, or of a dict there."""
    found = {}
    for name in sorted(module.name for module in iter_modules(recipes.studies.__path__)):
        for key, value in vars(import_module(f"recipes.studies.{name}")).items():
            each = value if isinstance(value, dict) else {"": value}
            found |= {f"{name}.{key} {k}": study for k, study in each.items() if isinstance(study, Study)}
    return found


def test_every_arm_of_every_study_is_a_recipe():
    wrong, found = [], studies()
    assert len(found) > 15
    for name, each in found.items():
        for arm, changes in each.arms.items():
            try:
                dataclasses.replace(each.base, **{k: v for k, v in changes.items() if k != "features"})
            except ValueError as error:
                wrong.append(f"{name}, {arm}: {error}")
    assert not wrong, "\n".join(wrong)
