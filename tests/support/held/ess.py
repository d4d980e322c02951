"""Does the ESS tell which runs are harmed: the page's table, and sentences of other pages."""

from held import DOCS, STUDIES
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
    scores = [f"{auc(trials, lambda trial: trial.ess):.2f}" for trials in (none, clip)]
    assert scores[0] == f"{auc(none, lambda trial: -trial.known):.2f}" == "1.00"
    told = f"without a bound on the ratio it separates harmed runs from others (AUC {scores[0]}), under the dual clip"
    yield f"{DOCS}/mismatch.md", f"{told} less ({scores[1]})"
