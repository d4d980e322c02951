"""The study of speed as a reward: its arms, the number that it compares, and its page."""

import json

import pytest

from recipes.studies import fast
from recipes.studies.paired import interval, markdown, paired, tables


def test_the_solve_rate_at_a_budget_lies_on_the_line():
    points = [{"forwards": 3.0, "solved": 0.9}, {"forwards": 1.0, "solved": 0.5}]  # in any order
    assert fast.within(points, 1.5) == pytest.approx(0.6)
    assert fast.within(points, 0.5) == 0.5 and fast.within(points, 9) == 0.9


def test_the_page_has_the_tables_of_the_stored_runs():
    results = {(run["arm"], run["seed"]): run for run in json.loads(fast.STORED.read_text())}
    assert set(results) == {(arm, seed) for arm in fast.ARMS for seed in fast.SEEDS}
    for run in results.values():
        assert run["after"] == pytest.approx(fast.within(run["frontier"], fast.BUDGET))
    page = fast.STORED.with_suffix(".md").read_text()
    assert markdown(fast.frontier_rows(results)) in page and tables(fast.study, results) in page
    for claim in fast.CLAIMS:
        assert interval(paired(results, claim.arm, claim.against)) in page.split("| tau |")[0], "the first lines say it"
