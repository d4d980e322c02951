"""The study of Latin squares, and its numbers on the first page."""

from statistics import mean

from held import STUDIES, row, runs_of
from recipes.studies import latin, paired
from recipes.studies.latin_limit import greedy_limit, limit

PAGE, README = f"{STUDIES}/latin.md", "README.md"
RUNS = runs_of("latin")
ROWS, CLAIMS, TUNING = latin.tables(RUNS)
RATES = {each["arm"]: each for each in ROWS}
APART = {(each["stated before the runs"], each["of"]): each["difference, 95 %"] for each in CLAIMS}
UNTUNED = latin.at_rate(latin.GRPO, 1e-3)
TOLD = {
    "GRPO": latin.GRPO,
    "supervised on its sampled answers that the rules call right": latin.ONE,
    "the same in four rounds": latin.ROUNDS,
}


def apart(arm, against, column="after"):
    return paired.interval(paired.paired(RUNS, arm, against, column))


def rate(arm):
    return paired.interval([run["after"] for (name, seed), run in sorted(RUNS.items()) if name == arm and seed < 10])


def the_page():
    puzzles = [problem.fields["puzzle"] for problem in latin.puzzles()]
    exact, different = float(limit(puzzles)), len(set(puzzles))
    yield PAGE, f"solves {exact:.3f} of the 400 test puzzles ({different} different)"
    yield README, f"400 held-out puzzles ({different} different)"
    assert {run["after"] for run in RUNS.values() if run["arm"] == latin.LIMIT} == {exact}
    for table in (ROWS, CLAIMS, TUNING):
        yield PAGE, paired.markdown(table)
    for arm, tuned in latin.TUNED.items():
        assert {run["learning_rate"] for (name, _), run in RUNS.items() if name == arm} <= {tuned}
        assert arm not in latin.RATES or latin.best(RUNS, arm) == tuned


def findings():
    right = mean(run["right, first"] for run in RUNS.values() if run["arm"] == latin.ONE)
    less, four = (
        APART["GRPO in four steps is above filtered answers", column].removeprefix("-") for column in ("after", "four")
    )
    limit_passed, own = (
        APART[f"GRPO in four steps is above {what}", "after"] for what in ("the exact probabilities", "own answers")
    )
    yield PAGE, f"is right (here {right:.2f})"
    yield PAGE, f"better than GRPO, by {less}."
    yield PAGE, f"**GRPO passes the exact probabilities** by {limit_passed}, with a reward alone"
    yield PAGE, f"{RATES[latin.OWN]['after']}, {own} below GRPO."
    filtered = APART["filtered answers are above the exact probabilities", "after"]
    yield PAGE, f"**Filtered answers pass it by {filtered}**, and end {less} above GRPO; in four steps {four} above."
    yield PAGE, f"1e-3 ends {apart(UNTUNED, latin.GRPO)} above the tuned 5e-4; it solved {rate(UNTUNED)}."
    more = [apart(latin.ROUNDS, latin.ONE, column) for column in ("after", "four")]
    yield PAGE, f"{more[0]} more than one round, and {more[1]} in four steps."
    two, sixteen = (apart(latin.GRPO, arm) for arm in (latin.GRPO_2, latin.GRPO_16))
    yield PAGE, f"ends {two} and {sixteen} below GRPO in four (5 and 5 seeds)"
    yield PAGE, f"unquantized ones end {apart(latin.GRPO, latin.GRPO_FP8)} above (5 seeds)."
    yield PAGE, f"**Supervision stays below them**: {RATES[latin.TAUGHT]['after']}."
    exact = RUNS[latin.LIMIT, 0]["after"]
    of_grpo, of_own = ([run for (name, _), run in RUNS.items() if name == arm] for arm in (latin.GRPO, latin.OWN))
    greedily = float(greedy_limit([problem.fields["puzzle"] for problem in latin.puzzles()]))
    assert all(run["after"] > exact and run["greedy"] > greedily for run in of_grpo[:10]) and len(of_own) == 10
    yield PAGE, "(10 of 10 seeds; at temperature 0, too)"
    yield PAGE, f"At temperature 0, with ties at random, it solves {greedily:.3f}."
    yield PAGE, f"- **Own answers do in {sum(run['after'] > exact for run in of_own)} of 10 seeds**"


def the_first_page():
    yield README, row("exact probabilities of the labels (computed)", RATES[latin.LIMIT]["after"])
    for told, arm in TOLD.items():
        yield README, row(told, RATES[arm]["after"])
        assert RATES[arm]["seeds"] == "10"
    seconds = [RATES[arm]["seconds"] for arm in TOLD.values()]
    yield README, f"each in {min(seconds)} to {max(seconds)} CPU seconds;"
    minutes = sum(run["seconds"] for run in RUNS.values() if "seconds" in run) / 60
    yield PAGE, f"the study: {minutes:.0f} minutes of one core"
