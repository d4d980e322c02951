"""The rules of the study of replay: equal diversity by hand, the reward without boxes, and the budget's count."""

import json

import pytest

from recipes.studies import reuse
from recipes.studies.reuse import TASKS, RowsAndColumns, arms_of, at_equal_diversity, best_rates


def curve(*points):
    temperatures = reuse.TEMPERATURES
    assert len(points) == len(temperatures)
    found = {}
    for t, (answers, rate) in zip(temperatures, points, strict=True):
        found |= {f"answers@{t:g}": answers, f"full@{t:g}": rate}
    return found


LINE = curve((0.9, 0.1), (0.7, 0.3), (0.5, 0.5), (0.3, 0.7), (0.1, 0.9))  # rate = 1 - answers


def test_equal_curves_do_not_differ():
    assert at_equal_diversity(LINE, LINE) == 0
    fewer = curve((0.8, 0.2), (0.6, 0.4), (0.6, 0.4), (0.4, 0.6), (0.2, 0.8))  # the same line, other temperatures
    assert at_equal_diversity(fewer, LINE) == pytest.approx(0)


def test_a_sharper_model_on_the_same_curve_is_no_better():
    """Its rate at temperature 1 is 0.4 higher, and all of that is less diversity."""
    sharper = curve((0.5, 0.5), (0.3, 0.7), (0.2, 0.8), (0.15, 0.85), (0.1, 0.9))
    assert sharper["full@1"] - LINE["full@1"] == pytest.approx(0.4)
    assert at_equal_diversity(sharper, LINE) == pytest.approx(0)


def test_levels_are_of_the_common_range():
    """Levels 0.5, 0.45, 0.4, 0.35, 0.3; the other has 0.6 + (0.5 - level) / 2 there, by hand."""
    other = curve((0.5, 0.6), (0.5, 0.6), (0.4, 0.65), (0.3, 0.7), (0.3, 0.7))
    expected = sum(0.6 + (0.5 - x) / 2 - (1 - x) for x in (0.5, 0.45, 0.4, 0.35, 0.3)) / 5
    assert at_equal_diversity(other, LINE) == pytest.approx(expected)
    assert at_equal_diversity(LINE, other) == pytest.approx(-expected)


def test_curves_without_a_common_range_are_compared_at_their_ends():
    low = curve(*[(0.2, 0.4)] * 5)
    high = curve((0.9, 0.1), (0.8, 0.2), (0.7, 0.3), (0.6, 0.35), (0.5, 0.5))
    assert at_equal_diversity(high, low) == pytest.approx(0.1)


def test_the_reward_without_boxes_knows_rows_and_columns_alone():
    task = RowsAndColumns(split="train", clues=(1, 3), unique=False, infill=True, reward_rule="rules")
    problem = task[0]
    puzzle, solution = problem.fields["puzzle"], problem.fields["solution"]
    assert task.reward(problem, solution).value == 6
    # Rows shifted by one: a Latin square whose boxes are wrong. It is right if it has the givens.
    latin = "1234234134124123"
    for square in (latin, latin[::-1]):
        kept = all(given in ("0", cell) for given, cell in zip(puzzle, square, strict=True))
        assert (task.reward(problem, square).value == 6) == kept
    rows_alone = "1234" * 4  # eight units, four of them complete; digits of the columns: one each
    given = [cell == clue for cell, clue in zip(rows_alone, puzzle, strict=True) if clue != "0"]
    if all(given):
        assert task.reward(problem, rows_alone).value == pytest.approx(2 + 0.5 + 2 * 20 / 32)


@pytest.mark.parametrize("name", TASKS)
def test_every_arm_is_a_recipe(name):
    from dataclasses import replace

    for phases in arms_of(TASKS[name], reuse.FIRST).values():
        for changes in phases:
            replace(TASKS[name].base, **changes)


def test_the_best_rate_has_the_highest_mean_over_both_seeds():
    def run(value):
        return {"full@1": value, "few@0": value}

    results = {("latin", f"GRPO at {rate:g}", seed): run(value) for rate, seed, value in (
        (2.5e-4, 100, 0.9), (2.5e-4, 101, 0.1), (5e-4, 100, 0.6), (5e-4, 101, 0.6), (1e-3, 100, 0.99),
    )}  # fmt: skip
    assert best_rates(results, "latin")[reuse.GRPO] == 5e-4, "a rate with one seed does not count"


@pytest.mark.slow
def test_a_run_of_an_arm_ends_at_its_budget(tmp_path, monkeypatch):
    """A step of replay: 128 rows in four steps, without a gradient, and at most 512 rows with one."""
    arms = reuse.arms_of(TASKS["latin"], reuse.FIRST)
    monkeypatch.setattr(reuse, "arms_of", lambda task, rates: arms)
    monkeypatch.setattr(reuse, "BUDGET", 1500)
    reuse.run_one("latin", tmp_path, reuse.RAFT, reuse.FIRST, 100, "RAFT")
    found = json.loads((tmp_path / "results" / "RAFT_100.json").read_text())
    assert found["steps, 0"] == 2 and 1500 <= found["used, 0"] <= 2 * (128 * 4 + 16 * 2 + 3 * 512)
    assert 0 < found["full@0"] <= 1 and 0 < found["answers@1"] <= 1
