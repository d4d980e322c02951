"""Studies can go on, as each arm is a recipe of today and what is missing beside finished runs is run; and they print
what they stored."""

import dataclasses
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from runpy import run_path

import pytest

import recipes.studies
from dllm_rl.files import read_json
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


FOLDER = Path(recipes.studies.__path__[0])
# No command makes these any more; only pages tell of them.
OF_PAGES = {"gradients_removed", "league_countdown_first", "low_bits_first", "mismatch_first", "values_toy"}


# By study, how its picture is drawn from its JSON. Other tests draw those of league.py and mismatch.py.
PICTURES = {
    "reuse": lambda made, kept, path: made.picture({(run["task"], run["key"], run["seed"]): run for run in kept}, path),
    "estimators": lambda made, kept, path: made.draw(kept["measured"], path),
    "fast": lambda made, kept, path: made.plot(paired.by_arm(kept), path),
    "few_clues": lambda made, kept, path: made.picture(
        paired.by_arm(kept["runs"]), {int(steps): rate for steps, rate in kept["ceiling"].items()}, path
    ),
    "low_bits": lambda made, kept, path: made.picture(paired.by_arm(kept), path),
    "low_bits_tuned": lambda made, kept, path: made.picture(kept, path),
    "order_flips": lambda made, kept, path: made.picture(kept, path),
    "scaffolds": lambda made, kept, path: made.picture(made.by_arm(kept), path),
}


def files_below(folder):
    """By path, what changes where a file is written or a folder is made."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in found if path.is_dir() or path.suffix != ".pyc"}


def reports():
    """By stored JSON: its study, and the word that chooses it there, if it is not named as the study."""
    for stem in sorted({path.stem for path in FOLDER.glob("*.json")} - OF_PAGES):
        parents = ("_".join(stem.split("_")[:end]) for end in range(stem.count("_") + 1, 0, -1))
        study = next((name for name in parents if (FOLDER / f"{name}.py").exists()), stem)
        word = "tune" if stem == "scaffolds_tuned" else stem[len(study) + 1 :]
        yield pytest.param(study, [word] if word else [], id=stem)


@pytest.mark.parametrize(("study", "words"), list(reports()))
def test_a_report_needs_the_study_and_its_json_alone(study, words, tmp_path, monkeypatch, capsys):
    for path in (FOLDER / f"{study}.py", *FOLDER.glob(f"{study}*.json")):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path) | files_below(FOLDER)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(sys, "argv", [study, *words, "--report"])
    run_path(str(tmp_path / f"{study}.py"), run_name="__main__")
    assert re.search(r"\d\.\d|[1-9]\d* (of|trials)", capsys.readouterr().out)
    assert files_below(tmp_path) | files_below(FOLDER) == before


@pytest.mark.parametrize(("study", "draw"), list(PICTURES.items()))
def test_a_picture_is_drawn_from_the_stored_runs(study, draw, tmp_path):
    """Only a run draws it."""
    module = import_module(f"recipes.studies.{study}")
    draw(module, read_json(FOLDER / f"{study}.json"), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
