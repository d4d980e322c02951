"""The league, the leaderboard, and what other pages say of both."""

from statistics import mean, stdev

from dllm_rl.likelihoods.estimators import Sandwich
from held import STUDIES, by_arm, stored
from recipes.studies import league, paired
from recipes.studies.surrogates import GDSD
from recipes.sudoku_tiny import recipe as few_clues

PAGE = f"{STUDIES}/league.md"
DEFAULT, METHOD = league.DEFAULT, league.method_of


def runs_of(name):
    """The runs by method, whatever setting its trials chose."""
    return {(METHOD(run["arm"]), run["seed"]): run for run in stored(f"league_{name}")["runs"]}


def apart(name, arm, against):
    return paired.paired(runs_of(name), arm, against)


def tables():
    """Each table, where RL began, and that each method ran in the setting that its trials chose."""
    yield PAGE, f"entropy bonus (few clues: {few_clues.entropy_coeff}) of the task's recipe"
    for name in league.LEAGUES:
        parts, seconds = stored(f"league_{name}"), league.LEAGUES[name].seconds
        results, tuning = by_arm(parts["runs"]), by_arm(parts["tuning"])
        yield PAGE, league.told(name, results)
        assert set(league.best(tuning).values()) == {arm for arm, _ in results}
        for (arm, _), run in (tuning | results).items():
            assert run["num_steps"] == league.steps_of(parts["costs"], arm, seconds)
        began = {seed: run["before"] for (_, seed), run in results.items() if "before" in run}
        assert len(results) == 10 * len(league.best(tuning))
        yield PAGE, f"Before RL: {paired.interval(list(began.values()))}."


def settings_of_the_methods():
    """The table, and where it is not what the options of docs/method.md or the defaults are."""
    yield PAGE, league.settings()
    beta, psi = league.METHODS["SPG"]["likelihood"].beta, league.METHODS["GDSD"]["loss"].psi
    told = f"`beta` is {beta} here, as in its Sudoku runs, and {Sandwich().beta} by default;"
    yield PAGE, f"{told} GDSD's `psi` is {psi} here and {GDSD().psi} by default;"
    arms = [run["arm"] for name in league.LEAGUES for run in stored(f"league_{name}")["runs"]]
    assert all("one update" in arm for arm in arms if METHOD(arm) == "d1")
    yield PAGE, "d1 ran with one update per rollout in all of its rows, and not with its authors' eight."


def above_the_default():
    yield PAGE, league.above_the_default()
    assert "| sudoku-unique, 16 | 60 | four segments | 2 | two segments |" in league.above_the_default()
    seeds = [run["after"] for run in stored("league_sudoku_60_s")["runs"] if run["arm"].startswith("one step")]
    half = 2.262 * stdev(seeds) / 10**0.5  # Student's t of nine degrees of freedom
    (row,) = (row for row in league.stored_rows("sudoku_60_s") if row["method"] == "one step")
    assert len(seeds) == 10 and row["held-out rate, 95 %"] == f"{mean(seeds):.3f}±{half:.3f}"


def one_step_against_the_default():
    """One segment is one step; the default of these runs scores every step."""
    short, long = (apart(name, "one step", DEFAULT) for name in ("sudoku", "sudoku_60_s"))
    behind = [-each for each in long]
    assert mean(short) > 0 and mean(behind) > 0
    yield PAGE, f"`one step` beats the default by {paired.interval(short)}. Its groups share one forward per step."
    gains = [after - before for before, after in zip(short, long, strict=True)]
    gains = [-each for each in gains]
    told = f"{paired.interval(gains)} from 12 to 60 s (every seed, exact p {paired.sign_flip(gains):.3f};"
    assert min(gains) > 0
    yield PAGE, f"rises by {told}"


def eight_steps():
    name = "sudoku_8_steps"
    behind = [paired.interval(apart(name, arm, DEFAULT)) for arm in ("one step", "two segments", "wd1")]
    yield PAGE, "`one step` beats the default by {}, two segments by {}, wd1 by {}.".format(*behind)
    yield PAGE, f"Two segments beat eight by {behind[1]},"
    wd1, one = apart(name, "two segments", "wd1"), apart(name, "one step", "two segments")
    told = "{} (exact p {:.3f}, not claimed before)"
    yield PAGE, f"wd1 by {told.format(paired.interval(wd1), paired.sign_flip(wd1))}"
    yield PAGE, f"`one step` still beats two segments by {told.format(paired.interval(one), paired.sign_flip(one))}"


def four_steps():
    short, long = "sudoku_4_steps", "sudoku_4_steps_60_s"
    few = apart(short, "two sampled", "two segments")
    yield (
        PAGE,
        f"are {paired.interval([-each for each in few])} below two segments (exact p {paired.sign_flip(few):.3f}).",
    )
    middle = apart(long, "two segments", "one step")
    yield (
        PAGE,
        f"beat `one step` by {paired.interval(middle)} (exact p {paired.sign_flip(middle):.3f}, not claimed before)",
    )
    second = "few_clues_4_steps"
    even = apart(second, "two segments", "one step")
    told = f"({paired.interval(even)} in favor of two segments, exact p {paired.sign_flip(even):.3f})"
    yield PAGE, f"no difference between two segments and `one step` {told}"


def sixteen_steps():
    name, default = "sudoku_16_steps", "four segments"
    ahead = apart(name, "two segments", default)
    yield PAGE, f"two segments beat four by {paired.interval(ahead)}."
    second = apart("few_clues_16_steps", "two segments", default)
    yield PAGE, f"no difference** between two segments and four ({paired.interval(second)} in favor of two)."


def countdown():
    d1, other = (paired.interval(apart("countdown", DEFAULT, each)) for each in ("d1", "random order"))
    yield PAGE, f"beats d1 by {d1}. No other difference is shown (random order is behind by {other}, Holm's p 0.107);"


def what_equal_time_was():
    """The sentences before the league's tables: what runs took, and which rates they chose."""
    seconds, settings, steps = {}, {}, {}
    for name in league.LEAGUES:
        for arm, run in league.best(by_arm(stored(f"league_{name}")["tuning"])).items():
            settings[name, arm] = run.split(", ", 1)[1]
        for run in stored(f"league_{name}")["runs"]:
            seconds.setdefault((name, METHOD(run["arm"])), []).append(run["s"])
            steps[name, METHOD(run["arm"])] = run["num_steps"]
    took = {key: mean(each) for key, each in seconds.items()}

    def more(name, method):
        return 100 * (took[name, method] / took[name, DEFAULT] - 1)

    others = [more("sudoku", method) for method in league.LEAGUES["sudoku"].methods]
    assert min(others) == more("sudoku", "SPG") and max(others) == more("sudoku", "one step")
    yield PAGE, f"SPG took {-min(others):.0f} % less than the default, `one step` {max(others):.0f} % more."
    default, one_step = took["sudoku_60_s", DEFAULT], took["sudoku_60_s", "one step"]
    longer = f"{more('sudoku_60_s', 'one step'):.0f} %"
    yield PAGE, f"the default took {default:.0f} s and `one step` {one_step:.0f} s, {longer} more."
    yield PAGE, f"which took {longer} longer"
    four = [took["sudoku_4_steps_60_s", each] for each in (DEFAULT, "two segments", "one step")]
    yield PAGE, "the default took {:.0f} s, two segments {:.0f} s and `one step` {:.0f} s.".format(*four)
    eight = [each for (name, _), each in took.items() if name == "sudoku_8_steps"]
    yield PAGE, f"In 48 s all took {min(eight):.0f} to {max(eight):.0f} s."
    yield PAGE, f"`one step` took {more('countdown', 'one step'):.0f} % more than the default."
    few = {method: number for (name, method), number in steps.items() if name == "sudoku" and number < 20}
    assert set(few) == {"ESPO", "GDSD", "SPG", "JustGRPO"}
    yield PAGE, f"**Four rows of Sudoku in 12 s took {min(few.values())} to {max(few.values())} steps**"
    lowest = {"one update, 2e-4", "all updates, 1e-4"}
    at_the_edge = {
        name: [arm for (of, arm) in settings if of == name and settings[of, arm] in lowest] for name in league.LEAGUES
    }
    assert "one step" in at_the_edge["sudoku"] and at_the_edge["sudoku_60_s"] == ["one step"]
    assert len(at_the_edge["sudoku"]) == 6 and DEFAULT not in at_the_edge["sudoku"]
    assert len(at_the_edge["sudoku_8_steps"]) == 3 and DEFAULT in at_the_edge["sudoku_8_steps"]
