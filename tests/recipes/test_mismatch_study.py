"""The mismatch study's plan and table, from made-up results: numbers worked by hand, nothing trained."""

import json

import pytest

from recipes.studies import mismatch, mismatch_report


def result(arm, seed, learner, quantised, *, level="int3", diverged=False, lam=None, solved=(0.2, 0.4)):
    curves = {name: [0.5, 0.5] for name in mismatch.KEPT}
    curves |= {"solve rate": list(solved), "max |log ratio|": [1.0, 3.0], "ess": [0.9, 0.6]}
    curves["lambda"] = lam or [None, None]
    numbers = {"learner": learner, "quantised": quantised, "before": 0.25, "diverged": diverged, "num_steps": 2}
    names = {"family": "diffusion", "level": level, "arm": arm, "seed": seed}
    return names | numbers | {"machine": {"versions": {"torch": "2"}}, "curves": curves}


def test_interval_is_students():
    # Mean 0.5, sample deviation 0.1, three values: 4.303 * 0.1 / sqrt 3 = 0.2484.
    assert mismatch_report.interval([0.4, 0.5, 0.6]) == "0.500 ± 0.248"
    assert mismatch_report.interval([0.4]) == "0.400"


def test_a_row_of_the_table():
    runs = [result("none", 0, 0.2, 0.3), result("none", 1, 0.4, 0.3, solved=(0.4, 0.6))]
    cells = mismatch_report.row("none", runs).strip("| ").split(" | ")
    # Learner 0.2 and 0.4: deviation 0.1414, 12.706 * 0.1414 / sqrt 2 = 1.271. The first ends below its start of 0.25.
    assert cells[:4] == ["none", "2", "0.300 ± 1.271", "0.300 ± 0.000"]
    assert cells[4] == "0.20 / 0.30, 0.40 / 0.30"
    assert cells[5:8] == ["0.400", "3.00", "0.60"]
    assert cells[-1] == "1 of 2"


def test_the_net_that_is_trained_decides_whether_a_run_collapsed():
    assert mismatch_report.row("aligned", [result("aligned", 0, 0.1, 0.9)]).endswith("0 of 1 |")
    assert mismatch_report.row("tis", [result("tis", 0, 0.1, 0.9)]).endswith("1 of 1 |")
    assert mismatch_report.row("tis", [result("tis", 0, 0.9, 0.9, diverged=True)]).endswith("1 of 1 |")


def test_lambda_is_shown_where_it_was_logged():
    assert "| 0.25 / 0.25 |" in mismatch_report.row("ais-alarm", [result("ais-alarm", 0, 0.5, 0.5, lam=[0.2, 0.3])])


def test_unquantised_runs_stand_beside_every_level(tmp_path):
    results = [result("unquantised", 0, 0.9, 0.9, level="-"), result("none", 0, 0.1, 0.1)]
    results.append(result("none", 0, 0.2, 0.2, level="five_level"))
    for i, one in enumerate(results):
        (tmp_path / f"{i}.json").write_text(json.dumps(one))
    mismatch_report.write(tmp_path, tmp_path, order=list(mismatch.ARMS))
    table = (tmp_path / "mismatch.md").read_text()
    assert table.count("| unquantised | 1 | 0.900 |") == 2
    assert table.index("diffusion, int3") < table.index("| none | 1 | 0.100 |") < table.index("diffusion, five_level")
    assert (tmp_path / "mismatch.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="holds no result yet"):
        mismatch_report.write(tmp_path / "nothing", tmp_path, order=[])


def test_the_plan_asks_for_the_telling_arms_first_and_for_each_run_once():
    runs = mismatch.plan(3, ["diffusion", "autoregressive"], ["int3", "five_level"], None)
    assert len(runs) == len(set(runs)) == 3 * (1 + 12 * 2) + 3 * (1 + 4 * 2)
    assert runs[:2] == [("diffusion", "-", "unquantised", 0), ("diffusion", "int3", "none", 0)]
    assert ("autoregressive", "int3", "tbpo", 0) not in runs
    assert mismatch.plan(1, ["diffusion"], ["ramp"], ["none"]) == [("diffusion", "ramp", "none", 0)]
