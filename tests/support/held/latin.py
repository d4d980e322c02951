"""The study of Latin squares."""

from statistics import mean

from held import STUDIES, row, runs_of
from recipes.studies import latin, paired
from recipes.studies.latin_limit import limit

PAGE, README = f"{STUDIES}/latin.md", "README.md"
RUNS = runs_of("latin")
ROWS, CLAIMS, TUNING = latin.tables(RUNS)
RATES = {each["arm"]: each for each in ROWS}
APART = [each["difference, 95 %"] for each in CLAIMS]
TOLD = {
    "supervised on the model's own greedy answers, unchecked": latin.OWN,
    "GRPO": latin.GRPO,
    "supervised on its sampled answers that the rules call right": latin.ONE,
}


def the_page():
    exact = float(limit([problem.fields["puzzle"] for problem in latin.puzzles()]))
    yield PAGE, f"solves {exact:.3f} of the 400 test puzzles"
    assert {run["after"] for run in RUNS.values() if run["arm"] == latin.LIMIT} == {exact}
    yield PAGE, paired.markdown(ROWS)
    yield PAGE, paired.markdown(CLAIMS)
    right = mean(run["right, first"] for run in RUNS.values() if run["arm"] == latin.ONE)
    less, four = APART[3].removeprefix("-"), APART[4].removeprefix("-")
    assert APART[3].startswith("-") and APART[4].startswith("-") and not APART[1].startswith("-")
    assert all(float(each["Holm's p"]) < 0.05 for each in CLAIMS) and len(CLAIMS) == 5
    yield PAGE, f"is right (here {right:.2f})"
    yield PAGE, f"better than GRPO, by {less},"
    p = {each["Holm's p"] for each in CLAIMS}
    yield PAGE, f"Holm's p of each is {' or '.join(sorted(p))}."
    yield PAGE, f"**GRPO passes the limit** by {APART[0]}, with a reward alone."
    yield PAGE, f"**Own answers do not**: {RATES[latin.OWN]['after']}, {APART[1]} below GRPO."
    yield PAGE, f"**Filtered answers pass it by {APART[2]}**, and end {less} above GRPO; in four steps {four} above."


def the_first_page():
    yield README, row("exact probabilities of the labels (computed)", RATES[latin.LIMIT]["after"], "-", "-")
    for told, arm in TOLD.items():
        yield README, row(told, RATES[arm]["after"], RATES[arm]["four"], RATES[arm]["seconds"])
