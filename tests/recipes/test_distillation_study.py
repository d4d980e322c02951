"""The recipe and the study of a teacher with more steps: what its arms change, and the page's tables."""

import pytest

from dllm_rl.files import read_json
from recipes.studies import distillation
from recipes.studies.few_clues import in_steps
from recipes.sudoku_distil import recipe
from recipes.sudoku_tiny import recipe as main_job


def test_the_teacher_is_the_students_start_and_the_rules_pay_nothing():
    assert recipe.teacher == "reference" and recipe.teacher_coeff == 1 and recipe.teacher_steps == 4
    assert recipe.task is main_job.task and recipe.model is main_job.model and recipe.sampler is main_job.sampler


def test_the_arms_are_what_their_names_say():
    arms = distillation.ARMS
    assert arms[distillation.RL] == {}  # the main job, with its own settings
    taught = [arms[name] for name in arms if name != distillation.RL]
    assert [each["teacher_steps"] for each in taught] == [4, 4, 8, 1]  # of the student's two: 8, 8, 16 and 2
    alike = {"teacher": "reference", "learning_rate": 1e-3, "entropy_coeff": 0.0}
    assert all(alike.items() <= each.items() for each in taught)
    assert [name for name in arms if "teacher_coeff" in arms[name]] == [distillation.BOTH]
    for claim in distillation.CLAIMS:
        assert {claim.arm, claim.against} <= set(arms)
    assert in_steps(16).keywords["diffusion_steps"] == 16


def test_the_page_states_the_claims_and_has_the_tables_of_the_stored_runs():
    page = distillation.STORED.with_suffix(".md").read_text()
    for number, claim in enumerate(distillation.CLAIMS, 1):
        assert f"{number}. {claim.claim.capitalize().replace('rl', 'RL')}." in page
    if not distillation.STORED.exists():
        assert "**Not yet run.**" in page
        pytest.skip("the study has not run")
    results = {(run["arm"], run["seed"]): run for run in read_json(distillation.STORED)["runs"]}
    assert len(results) == len(distillation.ARMS) * len(distillation.SEEDS)
    assert distillation.tables(results) in page and "Not yet run" not in page
