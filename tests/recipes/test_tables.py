"""The stored results of the studies agree with themselves; that the documents have them is tests/test_numbers.py's."""

from statistics import mean, stdev

import pytest
from held import stored
from held.mismatch import rounded_runs

from recipes.studies import fp8_sums, league, paired


@pytest.mark.parametrize("name", ["mismatch", "mismatch_ar", "kernel_noise"])
def test_the_intervals_are_those_of_the_seeds(name):
    """The seeds are rounded to two or three digits, and so move the mean and the spread a little."""
    for row in stored(name)["arms"]:
        seeds = [float(value) for value in row["each seed"].split(", ")]
        center, half = map(float, row["after"].split("±"))
        rounded = 0.5 * 10 ** -len(row["each seed"].split(", ")[0].split(".")[1]) + 0.0006
        assert len(seeds) == int(row["seeds"])
        assert center == pytest.approx(mean(seeds), abs=rounded)
        width = paired.student_t(len(seeds)) / len(seeds) ** 0.5
        assert half == pytest.approx(
            width * stdev(seeds), abs=0.0006 + width * rounded * (len(seeds) / (len(seeds) - 1)) ** 0.5
        )


@pytest.mark.parametrize("name", ["mismatch", "mismatch_ar"])
def test_the_differences_are_those_of_the_rounded_seeds(name):
    runs = rounded_runs(name)
    for row in stored(name)["contrasts"]:
        if row["of"] == "after":  # the quantized nets' seeds are not stored
            again = mean(paired.paired(runs, row["arm"], row["less"]))
            assert float(row["difference, 95 %"].split("±")[0]) == pytest.approx(again, abs=0.01)


def test_an_earlier_league_had_what_is_left_out_below_the_default():
    rows = {row["method, its setting"].split(",")[0]: row for row in stored("league_countdown_first")["results"]}
    for method in set(league.LEAGUES["sudoku"].methods).difference(league.LEAGUES["countdown"].methods):
        apart, half = map(float, rows[method]["default less it"].split("±"))
        assert apart > half > 0


def test_tbpos_band_never_acts_in_the_study_of_real_fp8():
    assert {study.base.num_iterations for study in fp8_sums.STUDIES.values()} == {1}
    assert not any("num_iterations" in changes for changes in fp8_sums.study.arms.values())
