"""The paired studies' arithmetic and the mismatch study's plan, from made-up results: by hand, nothing trained."""

from dataclasses import replace

import pytest

from recipes.studies import mismatch, mismatch_report, paired


def result(arm, seed, after, quantized=0.5, before=0.25, **metrics):
    found = {"arm": arm, "seed": seed, "num_steps": 60, "diverged": False, "torch": "2"}
    return found | {"before": before, "after": after, "quantized": quantized} | metrics


def keyed(*results):
    return {(each["arm"], each["seed"]): each for each in results}


def test_interval_is_students():
    # Mean 0.5, sample deviation 0.1, three values: 4.303 * 0.1 / sqrt 3 = 0.2484.
    assert paired.interval([0.4, 0.5, 0.6]) == "0.500±0.248"
    assert paired.interval([0.4]) == "0.400"


def test_sign_flip_counts_all_choices_of_signs():
    # Of the 8 choices for (1, 2, 3) two have a sum as far from 0 as 6; for (1, -2, 3) those with 2 or more: all but the
    # two that give 0 (1 + 2 - 3 and its mirror).
    assert paired.sign_flip([1, 2, 3]) == 2 / 8
    assert paired.sign_flip([1, -2, 3]) == 6 / 8
    assert paired.sign_flip([0.0, 0.0]) == 1
    assert paired.sign_flip([0.1] * 10) == 2 / 1024  # equal ones, whatever their rounding


def test_holm_by_hand():
    # 0.01 * 3; 0.02 * 2 = 0.04; 0.03 * 1 may not be below 0.04.
    assert paired.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert paired.holm([0.9, 0.6]) == [1.0, 1.0]


def test_pairs_are_the_seeds_that_both_arms_have():
    runs = keyed(result("a", 0, 0.5), result("a", 2, 0.7), result("b", 2, 0.4), result("b", 1, 0.9))
    assert paired.paired(runs, "a", "b") == pytest.approx([0.3])
    assert paired.paired(runs, "a", "b", "quantized") == [0.0]


def test_a_row_of_each_table():
    study = replace(
        mismatch.study,
        arms={"one: none": {}, "one: unquantized": {}, "one: TIS": {}},
        contrasts=(
            paired.Contrast("harm", "one: none", "one: unquantized"),
            paired.Contrast("not run", "one: TIS", "one: none"),
        ),
    )
    runs = keyed(
        *(result("one: none", seed, after, ESS=ess) for seed, after, ess in ((0, 0.2, 0.5), (1, 0.4, 0.7))),
        *(result("one: unquantized", seed, 0.5) for seed in (0, 1)),
    )
    rows = [line.strip("| ").split(" | ") for line in paired.markdown(paired.arm_rows(study, runs)).splitlines()]
    # Differences -0.3 and -0.1: deviation 0.1414, 12.706 * 0.1414 / sqrt 2 = 1.271.
    assert rows[2][:6] == ["one: none", "2", "0.300±1.271", "0.20, 0.40", "one: unquantized", "-0.200±1.271"]
    assert rows[0][8] == "ESS" and rows[2][8] == "0.6" and rows[3][8] == "-"
    assert [row[0] for row in rows[2:]] == ["one: none", "one: unquantized"]
    (row,) = paired.markdown(paired.contrast_rows(study, runs)).splitlines()[2:]
    # Both below 0: of four choices of signs two are as far; alone among the claims that were run, Holm leaves it.
    assert row.strip("| ").split(" | ")[4:] == ["2", "-0.200±1.271", "0 of 2", "0.500", "0.500"]


def test_the_figure_is_written(tmp_path):
    runs = keyed(*(result(arm, seed, 0.1 * seed) for arm in mismatch.ARMS for seed in range(3)))
    mismatch_report.draw(mismatch.study, runs, tmp_path / "mismatch.png")
    assert (tmp_path / "mismatch.png").stat().st_size > 10_000
