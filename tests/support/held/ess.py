"""Does the ESS tell which runs are harmed: the page's table and sentences."""

from held import DOCS, STUDIES, stored
from recipes.studies import ess_early
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


def first_ten_steps():
    every = ess_early.trials(stored("ess_early"))
    for table in (ess_early.claim_rows, ess_early.auc_rows, ess_early.threshold_rows):
        yield PAGE, markdown(table(every))
    (found, p), (more, p_more) = ((row["found, 95 %"], row["Holm's p"]) for row in ess_early.claim_rows(every))
    value, width = found.split("±")
    auc = f"{float(value) + 0.5:.3f}±{width}"
    all_bounds, none, one_sided, two_sided = ess_early.threshold_rows(every)
    bounds = [f"{bound:.2f}" for bound in ess_early.THRESHOLDS]
    low, high = ([all_bounds[f"below {bound}, {kind}"] for kind in ("harmed", "others")] for bound in bounds)
    assert low[1].startswith("0 of ")
    yield PAGE, f"The claims, the bounds of {' and '.join(bounds)} and the scores were"
    yield PAGE, f"**Below {bounds[0]} no run was unharmed**, and"
    between = [row["ESS between seeds"] for row in ess_early.auc_rows(every) if row["bound"] == "all"]
    counts = [each["below 0.70, harmed"].partition(" of ")[2] for each in (none, one_sided, two_sided)]
    clipped = two_sided["below 0.95, others"].partition(" of ")[0]
    yield (
        PAGE,
        f"the AUC is {auc}. It is not shown to be above the AUC of lag times learning rate ({more}, "
        f"Holm's p {p_more}).",
    )
    yield (
        PAGE,
        f"and {low[0]} harmed ones are there. Below 0.95 are {high[0]} harmed and {high[1]} others, {clipped} of",
    )
    yield (
        PAGE,
        f"{counts[0]} of 48 runs are harmed without a bound, {counts[1]} with the one-sided clip, {counts[2]} with",
    )
    yield PAGE, f"the AUC is {between[0]} in 4x4 Sudoku and {between[1]} in Countdown."
    summary = f"{STUDIES}/quantized_rollouts.md"
    for page in (summary, f"{DOCS}/method.md"):
        yield (
            page,
            (
                "**ESS:** under a lag a low effective sample size of the first ten steps warns of runs that will end "
                f"badly (AUC {auc}; planned), not shown better than the lag times learning rate."
            ),
        )
    yield summary, f"it warns (AUC within a bound {auc}, Holm's p {p})."
    yield summary, f"Holm's p {p}). That it tells more is not shown ({more}, {p_more})."
    yield summary, f"Below 0.95 were {high[0]} harmed runs and {high[1]} others."
    yield summary, f"which seed is harmed: AUC {between[0]} in Sudoku, {between[1]} in Countdown."
    assert len(stored("ess_early")["Countdown"]) + len(stored("ess_early")["4x4 Sudoku"]) == 216
    yield summary, "**Claimed** of 216 new runs"
