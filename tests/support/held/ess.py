"""Does the ESS tell which runs are harmed: the page's table and sentences."""

from held import STUDIES
from recipes.studies.ess import SCORES, auc_row, groups, rows
from recipes.studies.paired import markdown

PAGE = f"{STUDIES}/ess.md"
TWINS, FORMATS = "reward less the twin's", "4x4 Sudoku, formats, no corrector"


def ess_and_harm():
    yield PAGE, markdown(rows())
    found = groups()
    none, clip = found["- bound: none"], found["- bound: two-sided clip"]
    low = [trial.loss for trial in clip if trial.ess < 0.7]
    assert (len(low), sum(loss < 0 for loss in low)) == (3, 2)
    yield PAGE, "of the three trials with a mean ESS below 0.70, two end above their twins."
    assert {auc_row(none)[score] for score in SCORES} == {"1.00"}
    lags, formats = (auc_row(found[name]) for name in ("4x4 Sudoku, lags 1 to 8, all bounds", FORMATS))
    told = [f"{each[TWINS]} and {each['ESS']}" for each in (lags, formats)]
    yield PAGE, f"Its AUC and the ESS's are {told[0]} over all lags, {told[1]} over formats."
    many = [auc_row(trials) for name, trials in found.items() if name == FORMATS or name.startswith(("4x4", "- bound"))]
    assert all(float(each[TWINS]) >= float(each["ESS"]) for each in many)
    yield PAGE, f"which are known by name ({formats['ESS']} against {formats['known before']});"
