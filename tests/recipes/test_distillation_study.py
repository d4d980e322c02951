"""The recipe and the study of a teacher with more steps: what its arms change, and the page's tables."""

import pytest

from dllm_rl.files import read_json
from recipes.studies import distillation


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
