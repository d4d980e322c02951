"""Studies can go on: each arm is a recipe of today, an arm runs, and a study prints what it stored."""

import dataclasses
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from runpy import run_path

import pytest
from tiny_recipe import with_changes

import recipes.studies
from dllm_rl.files import read_json
from dllm_rl.training.late_rollouts.schedule import InProcessPool
from recipes.studies import paired
from recipes.studies.paired import Study

FOLDER = Path(recipes.studies.__path__[0])
SCRIPTS = [path for path in sorted(FOLDER.rglob("*.py")) if not path.stem.startswith("__")]


def module_of(path):
    return import_module(".".join(("recipes.studies", *path.relative_to(FOLDER).with_suffix("").parts)))


def studies():
    """Every study of a module of recipes/studies, or of a dict there; what a module has from another is that one's."""
    found = {}
    for path in SCRIPTS:
        name = path.stem
        for key, value in vars(module_of(path)).items():
            each = value if isinstance(value, dict) else {"": value}
            found |= {f"{name}.{key} {k}".strip(): study for k, study in each.items() if isinstance(study, Study)}
    return {study.name: study for study in found.values()}


STUDIES = studies()


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_is_a_recipe(name):
    for changes in STUDIES[name].arms.values():
        with_changes(STUDIES[name].base, **{k: v for k, v in changes.items() if k != "features"})


@pytest.mark.parametrize("name", STUDIES)
def test_an_arm_runs(name, tmp_path):
    """The last one, for a step, of a study whose models its recipe makes."""
    study = STUDIES[name]
    if not paired.by_seed(study.base):
        pytest.skip("its model is downloaded, or left by another run")
    few = {"train_batch_size": 2, "num_generations": 4, "report_to": None, "log_completions_steps": 0}
    few |= {"sft_warmup_steps": min(2, study.base.warmup.steps), "output_dir": str(tmp_path)}
    for task in ("validation_task", "eval_task"):
        if hasattr(getattr(study.base, task), "size"):
            few[task] = dataclasses.replace(getattr(study.base, task), size=4)
    arm = list(study.arms)[-1]
    if study.arms[arm].get("rollout_engine", study.base.rollout_engine) is not None:
        pytest.importorskip("xllamacpp")
    arms = {arm: {key: value for key, value in study.arms[arm].items() if key not in few and key != "num_steps"}}
    short = dataclasses.replace(study, base=with_changes(study.base, **few), arms=arms)
    paired.run_one(short, tmp_path, 1, arm, 0, InProcessPool())  # a busy machine may keep Ray from starting in time
    (found,) = paired.load(tmp_path).values()
    assert 0 <= found["after"] <= 1


# Of a picture, and no study's results.
OF_PICTURES = {"orders_trained_curves"}


def files_below(folder):
    """By path, what changes where a file is written or a folder is made."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.stat().st_mtime_ns for path in found if path.is_dir() or path.suffix != ".pyc"}


def reports():
    """By stored JSON: its study, and the word that chooses it there, if it is not named as the study."""
    for stem in sorted({path.stem for path in FOLDER.rglob("*.json")} - OF_PICTURES):
        parents = ("_".join(stem.split("_")[:end]) for end in range(stem.count("_") + 1, 0, -1))
        script = next(path for name in parents for path in SCRIPTS if path.stem == name)
        word = stem[len(script.stem) + 1 :]
        yield pytest.param(script, [word] if word else [], id=stem)


@pytest.mark.parametrize(("script", "words"), list(reports()))
def test_a_report_needs_the_study_and_its_json_alone(script, words, tmp_path, monkeypatch, capsys):
    for path in (script, *script.parent.glob(f"{script.stem}*.json")):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path) | files_below(FOLDER)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    monkeypatch.setattr(sys, "argv", [script.stem, *words, "--report"])
    run_path(str(tmp_path / script.name), run_name="__main__")
    assert re.search(r"\d\.\d|[1-9]\d* (of|trials)", capsys.readouterr().out)
    assert files_below(tmp_path) | files_below(FOLDER) == before


def test_the_command_of_a_folder_runs_all_its_parts():
    """Whoever adds a table to `page_tables` of a new part names the part in `__main__`, too."""
    parts = [path for path in SCRIPTS if path.parent != FOLDER and "def page_tables" in path.read_text()]
    assert len(parts) > 10
    left_out = [path for path in parts if not re.search(rf"\b{path.stem}\b", (path.parent / "__main__.py").read_text())]
    assert not left_out


def test_pictures_are_drawn_from_the_stored_runs(tmp_path):
    """Only a run draws them."""
    from recipes.studies.quantized import low_bits

    low_bits.picture(paired.by_arm(read_json(low_bits.STORED)), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_every_claim_of_the_studies_of_training_stands_in_a_table():
    """The tables name claims in their own words: one that they do not know would be left out, or found nowhere."""
    from recipes.studies.quantized import readme

    made = {(task, claim) for task, claims in readme.families().values() for claim in claims}
    named = {(case.task, claim) for case in readme.cases() for claim in case.claimed.values()}
    ends = ("", ", greedy", ", temperature 1")
    found = {(task, claim + end) for task, claim in (*named, *readme.OTHER_CLAIMS.values()) for end in ends} & made
    assert found == made


@pytest.mark.parametrize(
    ("claim", "found", "p", "outcome"),
    [
        ("A is above B", "0.10±0.05", "0.049", "shown"),
        ("A is above B", "-0.10±0.05", "0.049", "opposite shown"),
        ("A is above B", "-0.10±0.05", "0.050", "undecided"),
        ("A harms", "-0.10±0.05", "0.010", "shown"),
        ("levels harm", "0.10±0.05", "0.010", "opposite shown"),
        ("A is harmed less", "0.10±0.05", "0.010", "shown"),
        ("A and B differ", "-0.10±0.05", "0.010", "shown"),
    ],
)
def test_what_became_of_a_claim(claim, found, p, outcome):
    from recipes.studies import claims

    row = {"stated before the runs": claim, "difference, 95 %": found, "above 0": "9 of 10", "Holm's p": p}
    assert claims.outcome(row) == outcome


def test_claims_that_begin_alike_are_one_entry():
    from recipes.studies.claims import grouped

    assert grouped(["A is above: B", "A is above: C", "D: E", "F", "A is above: B"]) == "A is above: B, C; D: E; F"
    assert grouped([]) == "-"


def test_the_opposite_of_a_claim_is_said_as_a_finding():
    from recipes.studies.claims import opposite

    assert opposite("A does better than B under C") == "A does worse than B under C"
    assert opposite("A and B are above C") == "A and B together are below C"
    with pytest.raises(ValueError, match="'A wins'"):
        opposite("A wins")


def test_seeds_of_claims_are_those_of_their_tests():
    from recipes.studies.claims import numbers

    assert numbers([{"seeds": "10"}, {"above 0": "3 of 5"}, {"seeds": "5"}]) == "5 and 10"


def test_the_claims_of_each_study_are_counted():
    """Whoever tests claims by Holm's correction adds the study to `claims.by_study`."""
    from recipes.studies import claims

    with_claims = {path.stem for path in SCRIPTS if re.search(r"\b(Contrast|claimed_rows|holm)\(", path.read_text())}
    others = {"paired", "readme", "claims"}  # of no study
    others |= {"order_flips"}  # another test
    assert with_claims - others <= set(vars(claims))
