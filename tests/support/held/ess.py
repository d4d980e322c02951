"""Does the ESS tell which runs are harmed: the page's table and sentences."""

from held import STUDIES
from recipes.studies.ess import auc, groups, rows
from recipes.studies.paired import markdown

PAGE = f"{STUDIES}/ess.md"


def ess_and_harm():
    yield PAGE, markdown(rows())
    found = groups()
    none, clip = found["- bound: none"], found["- bound: two-sided clip"]
    low = [trial.loss for trial in clip if trial.ess < 0.7]
    assert (len(low), sum(loss < 0 for loss in low)) == (3, 2)
    yield PAGE, "of the three trials with a mean ESS below 0.70, two end above their twins."
    assert auc(none, lambda trial: trial.ess) == auc(none, lambda trial: -trial.known) == 1
