"""The documents' tables of the studies are those of the stored results, and the intervals those of the stored seeds."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

from dllm_rl.members import describe
from recipes.smollm2_diffusion import recipe as converted
from recipes.studies import estimators, experts, fp8_sums, league, lengths, order, paired, rates

STUDIES = Path(paired.__file__).parent
PS = "Holm's p"


def stored(name):
    return json.loads((STUDIES / f"{name}.json").read_text())


def by_arm(runs):
    return {(run["arm"], run["seed"]): run for run in runs}


def runs_of(name):
    return by_arm(stored(name))


def mismatch_page():
    """docs/mismatch.md in one line."""
    return " ".join((STUDIES.parents[1] / "docs" / "mismatch.md").read_text().split())


def tables_of(name):
    """Each table's rows, by its head's cells."""
    tables, head = [], None
    for line in (STUDIES / f"{name}.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")] if line.startswith("|") else None
        if cells and head is None:
            head = cells
            tables.append([])
        elif cells and not set(line) <= set("|- "):
            tables[-1].append(dict(zip(head, cells, strict=True)))
        head = head if cells else None
    return tables


def two_digits(cell):
    """Of the studies whose seeds are stored with two digits: the cell with its numbers so."""
    return re.sub(r"\d\.\d{3,}", lambda number: f"{float(number[0]):.2f}", cell)


def p_value(cell):
    return "<0.01" if float(cell) < 0.005 else two_digits(cell)


def rounded_runs(name):
    """The stored rates of each arm, rounded to two digits, as runs."""
    runs = {}
    for row in stored(name)["arms"]:
        runs |= {(row["arm"], seed): {"after": float(rate)} for seed, rate in enumerate(row["each seed"].split(", "))}
    return runs


@pytest.mark.parametrize("name", ["mismatch", "mismatch_ar", "kernel_noise"])
def test_the_intervals_are_those_of_the_seeds(name):
    """The seeds are rounded to two or three digits, and so move the mean and the spread a little."""
    for row in stored(name)["arms"]:
        seeds = [float(value) for value in row["each seed"].split(", ")]
        centre, half = map(float, row["after"].split("±"))
        rounded = 0.5 * 10 ** -len(row["each seed"].split(", ")[0].split(".")[1]) + 0.0006
        assert len(seeds) == int(row["seeds"])
        assert centre == pytest.approx(mean(seeds), abs=rounded)
        width = paired.T[len(seeds)] / len(seeds) ** 0.5
        assert half == pytest.approx(
            width * stdev(seeds), abs=0.0006 + width * rounded * (len(seeds) / (len(seeds) - 1)) ** 0.5
        )


def test_mismatch():
    """The tables with two digits, and that the rounded seeds give the differences to within their rounding."""
    contrasts = stored("mismatch")["contrasts"]
    claims, _, _, _, causal, *_ = tables_of("mismatch")
    assert [(row["difference, 95 %"], row["p"]) for row in claims] == [
        (two_digits(row["difference, 95 %"]), p_value(row["Holm's p"])) for row in contrasts
    ]
    for name in ("mismatch", "mismatch_ar"):
        runs = rounded_runs(name)
        for row in stored(name)["contrasts"]:
            if row["of"] == "after":  # the quantised nets' seeds are not stored
                again = mean(paired.paired(runs, row["arm"], row["less"]))
                assert float(row["difference, 95 %"].split("±")[0]) == pytest.approx(again, abs=0.01)
    arms, contrasts = (stored("mismatch_ar")[part] for part in ("arms", "contrasts"))
    assert [(row["arm"], row["after"], row["log-ratio"], row["ESS"]) for row in causal] == [
        (row["arm"], *(two_digits(row[column]) for column in ("after", "mean abs log-ratio", "ESS"))) for row in arms
    ]
    told = [(row["difference, 95 %"].split(" ")[0], row["p"]) for row in causal[1:]]
    assert told == [(two_digits(row["difference, 95 %"]), p_value(row["Holm's p"])) for row in contrasts]


def test_findings_of_the_mismatch_study():
    told = (STUDIES / "mismatch.md").read_text()
    arms, runs = {row["arm"]: row for row in stored("mismatch")["arms"]}, rounded_runs("mismatch")
    none = arms["one: none"]
    apart, ess, order = (two_digits(none[column]) for column in ("mean abs log-ratio", "ESS", "same order"))
    assert f"Mean |log ratio| is {apart} nats and ESS {ess}." in told and f"on {order} of the positions" in told
    assert f"one warmed-up model: {two_digits(arms['start']['after'])} (ten seeds)" in told
    assert f"AIS's mean lambda is {two_digits(arms['one: AIS alarm']['lambda'])}," in told
    undone = paired.share(runs, "two: none", "two: none, no clip", "two: unquantised")
    assert f"A dual clip at 1.2 alone undoes {undone} of it" in told
    undone = paired.share(runs, "one: TIS", "one: none", "one: unquantised")
    assert f"it undoes {undone} of the harm" in told
    for arm, against, sentence in (
        ("one: TIS shuffled", "one: none", "between shuffled weights and none ({})"),
        ("one: TIS", "one: lambda 0.5", "TIS beats a fixed lambda of 0.5 by {}"),
        ("left: TIS", "left: none", "Left half first, TIS adds {} (five seeds)"),
    ):
        assert sentence.format(two_digits(paired.interval(paired.paired(runs, arm, against)))) in told


def test_the_claims_were_stated_after_an_earlier_study():
    arms = stored("mismatch_first")["arms"]
    assert {row["seeds"] for row in arms} == {"5"} == {str(len(row["each seed"].split(", "))) for row in arms}
    assert f"after {5 * len(arms)} runs of [an earlier study](mismatch_first.json) on seeds 0 to 4" in " ".join(
        (STUDIES / "mismatch.md").read_text().split()
    )


def test_rounding_as_small_as_a_kernels():
    plain, noisy = stored("kernel_noise")["arms"]
    told = (STUDIES / "mismatch.md").read_text()
    assert f"({two_digits(noisy['after'])} against {two_digits(plain['after'])} unquantised" in told
    assert f"**We saw no difference: {two_digits(noisy['difference, 95 %'])}**" in told
    assert f"mean |log ratio| {float(noisy['mean abs log-ratio']):.3f} nats" in told


def test_real_fp8():
    """The tables, and each seed's mean of both rates."""
    by_rate = {rate: runs_of(f"fp8_sums_{rate}") for rate in fp8_sums.STUDIES}
    assert {rate: len(runs) for rate, runs in by_rate.items()} == {"full": 60, "half": 60}
    told = (STUDIES / "mismatch.md").read_text()
    assert fp8_sums.told(by_rate) in told
    pairs = (("none", "unquantised"), *((arm, "none") for arm in ("TIS", "aligned", "AIS", "TBPO")))
    for arm, against in pairs:
        rates = (paired.paired(runs, arm, against) for runs in by_rate.values())
        apart = [mean(both) for both in zip(*rates, strict=True)]
        assert paired.interval(apart).removeprefix("-") in told
        p = f"{paired.sign_flip(apart):.3f}"
        assert p in told or arm == "TBPO"


def test_rates():
    """The tables, and that the trials chose what the text says."""
    tuning, results, more = (by_arm(stored("rates")[part]) for part in ("tuning", "runs", "equal"))
    assert (len(tuning), len(results), len(more)) == (204, 180, 50)
    told = (STUDIES / "mismatch.md").read_text()
    assert rates.told(results, more, rates.best(tuning)) in told
    assert f"Unquantised: {paired.interval([results['unquantised', seed]['after'] for seed in range(10, 20)])}." in told
    claims = {row["stated before the runs"]: row for row in paired.contrast_rows(rates.study, results)}
    harm, gain = claims["five levels harms"], claims["token TIS helps under five levels"]
    assert f"five levels still harm ({harm['difference, 95 %']}, Holm's p {harm[PS]})" in " ".join(told.split())
    assert f"beats no corrector by {gain['difference, 95 %']}, Holm's p {gain[PS]}: not significant" in told
    ais = claims["AIS does better than TIS under five levels"]["difference, 95 %"]
    assert f"**TIS beats AIS at five levels** by {ais.removeprefix('-')};" in told
    best = rates.best(tuning)
    assert best.pop("five levels: AIS") == 1.25e-4 and set(best.values()) == {2.5e-4, 5e-4}


def runs_at_rates():
    """The rates study's runs by arm and rate, and the arms' names at 2.5e-4 and at 5e-4."""
    parts = stored("rates")
    best = rates.best(by_arm(parts["tuning"]))
    runs = {(rates.at(run["arm"], best[run["arm"]]), run["seed"]): run for run in parts["runs"]}
    low, high = ({arm: rates.at(arm, rate) for arm in rates.ARMS} for rate in rates.EQUAL)
    return runs | by_arm(parts["equal"]), low, high


def ess_at(runs, at, format):
    return mean(runs[at[f"{format}: none"], seed]["ESS"] for seed in rates.TESTED_ON)


def loss_at(runs, at, format):
    """By seed: what the format costs without a corrector."""
    return paired.paired(runs, at["unquantised"], at[f"{format}: none"])


def test_what_a_rate_costs():
    """At 2.5e-4 and 5e-4, of every format without a corrector: the bullets below the tables of rates."""
    runs, low, high = runs_at_rates()
    told = (STUDIES / "mismatch.md").read_text()
    more = {}
    for format in ("int3", "five levels"):
        both = zip(loss_at(runs, high, format), loss_at(runs, low, format), strict=True)
        more[format] = paired.interval([at_high - at_low for at_high, at_low in both])
    costs = {name: paired.interval(loss_at(runs, at, "int4")) for name, at in (("low", low), ("high", high))}
    ess = {name: f"{ess_at(runs, at, 'int4'):.3f}" for name, at in (("low", low), ("high", high))}
    assert f"at 5e-4 (ESS {ess_at(runs, high, 'FP8'):.3f})" in told
    assert f"it loses {costs['high']} there, although its ESS is {ess['high']}" in told
    assert f"(2.5e-4: ESS {ess['low']}, a loss of {costs['low']})" in told
    assert f"int3 loses {more['int3']} more at 5e-4 than at 2.5e-4, five levels {more['five levels']} more" in told
    unquantised = paired.interval(paired.paired(runs, high["unquantised"], low["unquantised"]))
    five = paired.interval(paired.paired(runs, low["five levels: none"], high["five levels: none"]))
    assert f"It takes {unquantised} from unquantised rollouts and gives five levels {five}." in told


def test_which_corrector_under_one_rate_or_each_ones_own():
    """The numbers of docs/mismatch.md's table of correctors that are the rates study's."""
    told = mismatch_page()
    runs, low, high = runs_at_rates()
    int4, fewer = (paired.interval(loss_at(runs, at, "int4")) for at in (high, low))
    ess = f"{ess_at(runs, high, 'int4'):.3f}"
    assert f"int4 costs {int4} at the default learning rate of 5e-4, where its ESS is {ess}" in told
    assert f"FP8 {ess_at(runs, high, 'FP8'):.3f}, int4 {ess})" in told
    assert f"at 2.5e-4 (ESS {ess_at(runs, low, 'int4'):.3f}) it loses {fewer} |" in told
    int3 = f"{ess_at(runs, low, 'int3'):.2f}"
    assert f"Under int3 ({int3}) we saw no gain" in told and f"int3 harms at an ESS of {int3}." in told
    rows = paired.contrast_rows(rates.study, by_arm(stored("rates")["runs"]))
    claims = {row["stated before the runs"]: row for row in rows}
    gain = claims["token TIS helps under five levels"]
    assert f"beats no corrector by {gain['difference, 95 %']} (Holm's p {gain[PS]}: not significant)" in told
    ais = claims["AIS does better than TIS under five levels"]
    assert f"by {ais['difference, 95 %'].removeprefix('-')} where each takes its own rate ({ais[PS]})" in told


def test_which_corrector_in_the_first_study_and_under_real_fp8():
    """The table's other numbers."""
    told = mismatch_page()
    arms = {row["arm"]: row for row in stored("mismatch")["arms"]}
    first = {row["stated before the runs"]: row for row in stored("mismatch")["contrasts"]}
    assert f"in the first study by {two_digits(first['token TIS helps']['difference, 95 %'])} |" in told
    ais = first["AIS alarm does better than TIS"]
    apart = two_digits(ais["difference, 95 %"]).removeprefix("-")
    assert f"TIS beats AIS by {apart} at one rate (Holm's p {p_value(ais[PS])})" in told
    undone = paired.share(rounded_runs("mismatch"), "two: none", "two: none, no clip", "two: unquantised")
    assert f"It undoes {undone} of the harm" in told
    tis, none = (two_digits(arms[f"one: {arm}"]["quantised"]).split("±")[0] for arm in ("TIS", "none"))
    assert f"TIS lowers this net: {tis}, against {none} without" in told
    ess, apart = (two_digits(arms["one: none"][column]) for column in ("ESS", "mean abs log-ratio"))
    assert f"had ESS {ess} and {apart} nats of mean |log ratio|" in told
    causal = two_digits(stored("mismatch_ar")["contrasts"][0]["difference, 95 %"]).removeprefix("-")
    assert f"Five levels cost an autoregressive model {causal}," in told
    by_rate = [runs_of(f"fp8_sums_{rate}") for rate in fp8_sums.STUDIES]
    gains = [mean(paired.paired(found, arm, "none")) for found in by_rate for arm in ("TIS", "aligned")]
    assert f"[adds {min(gains):.2f} to {max(gains):.2f} there]" in told
    ess = mean(by_rate[0]["none", seed]["ESS"] for seed in range(10))
    assert f"an autoregressive model: {ess:.2f})" in told


def test_lengths():
    results = runs_of("lengths")
    assert len(results) == 98 and {arm for arm, _ in results} == set(lengths.study.arms)
    told = (STUDIES / "mismatch.md").read_text()
    assert lengths.told(results) in told
    apart = [
        f"{mean(results[f'{name}: none', seed]['mean abs log-ratio'] for seed in range(10)):.2f}"
        for name in lengths.SHARES
    ]
    assert f"grows to {apart[3]} nats (the others: {min(apart)} to {max(apart[:3])})" in told
    assert f"by {paired.interval(paired.paired(results, '4 steps: TIS', '4 steps: none'))} at 4 steps" in told


@pytest.mark.parametrize("name", league.LEAGUES)
def test_league(name):
    """The table, where RL began, and that each method ran in the setting that its trials chose."""
    told = (STUDIES / "league.md").read_text()
    parts, seconds = stored(f"league_{name}"), league.LEAGUES[name].seconds
    results, tuning = by_arm(parts["runs"]), by_arm(parts["tuning"])
    assert league.told(name, results) in told
    assert set(league.best(tuning).values()) == {arm for arm, _ in results}
    for (arm, _), run in (tuning | results).items():
        assert run["num_steps"] == league.steps_of(parts["costs"], arm, seconds)
    began = {seed: run["before"] for (_, seed), run in results.items() if "before" in run}
    assert len(results) == 10 * len(league.best(tuning))
    assert f"Before RL: {paired.interval(list(began.values()))}." in told


def test_the_leaderboard():
    """The whole table, and one row of it by hand from the seeds that the JSON holds."""
    told = (STUDIES.parents[1] / "docs" / "leaderboard.md").read_text()
    assert league.board() in told
    seeds = [run["after"] for run in stored("league_sudoku_60_s")["runs"] if run["arm"].startswith("one step")]
    half = 2.262 * stdev(seeds) / 10**0.5  # Student's t of nine degrees of freedom
    row = next(line for line in told.splitlines() if "league sudoku_60_s`" in line and "| one step |" in line)
    assert len(seeds) == 10 and f"| {mean(seeds):.3f}±{half:.3f} | 60 |" in row
    assert league.COMMITS.keys() == league.LEAGUES.keys()


def test_the_default_gains_on_one_step_with_the_length_of_training():
    apart = []
    for name in ("sudoku", "sudoku_60_s"):
        runs = {(league.method_of(run["arm"]), run["seed"]): run for run in stored(f"league_{name}")["runs"]}
        apart.append(paired.paired(runs, league.DEFAULT, "one step"))
    gains = [after - before for before, after in zip(*apart, strict=True)]
    told = f"{paired.interval(gains)} from 12 to 60 s (every seed, exact p {paired.sign_flip(gains):.3f};"
    assert told in (STUDIES / "league.md").read_text() and min(gains) > 0


def test_two_segments_in_eight_steps():
    runs = {(league.method_of(run["arm"]), run["seed"]): run for run in stored("league_sudoku_8_steps")["runs"]}
    told = (STUDIES / "league.md").read_text()
    assert f"Two segments beat eight by {paired.interval(paired.paired(runs, 'two segments', league.DEFAULT))}," in told
    for arm, other, claim in (
        ("two segments", "wd1", "wd1 by"),
        ("one step", "two segments", "`one step` still beats two segments by"),
    ):
        apart = paired.paired(runs, arm, other)
        assert f"{claim} {paired.interval(apart)} (exact p {paired.sign_flip(apart):.3f}, not claimed before)" in told
    behind = [paired.interval(paired.paired(runs, arm, league.DEFAULT)) for arm in ("one step", "two segments", "wd1")]
    assert "`one step` beats the default by {}, two segments by {}, wd1 by {}.".format(*behind) in told


def test_the_log_on_one_segment_against_every_step():
    told = " ".join((STUDIES.parents[1] / "docs" / "LOG.md").read_text().split())
    for name, sentence in (
        ("sudoku_8_steps", "one segment beats every step by {} in 48 s"),
        ("sudoku", "it beats every step by {} in 12 s"),
        ("sudoku_60_s", "(every step is {} above)"),
    ):
        runs = {(league.method_of(run["arm"]), run["seed"]): run for run in stored(f"league_{name}")["runs"]}
        apart = paired.interval(paired.paired(runs, "one step", league.DEFAULT))
        assert sentence.format(apart.removeprefix("-")) in told


def test_what_equal_time_was():
    """The sentences before the league's tables: what runs took, and which rates they chose."""
    told = " ".join((STUDIES / "league.md").read_text().split())
    seconds, settings, steps = {}, {}, {}
    for name in league.LEAGUES:
        for arm, run in league.best(by_arm(stored(f"league_{name}")["tuning"])).items():
            settings[name, arm] = run.split(", ", 1)[1]
        for run in stored(f"league_{name}")["runs"]:
            seconds.setdefault((name, league.method_of(run["arm"])), []).append(run["s"])
            steps[name, league.method_of(run["arm"])] = run["num_steps"]
    took = {key: mean(each) for key, each in seconds.items()}

    def more(name, method):
        return 100 * (took[name, method] / took[name, league.DEFAULT] - 1)

    others = [more("sudoku", method) for method in league.LEAGUES["sudoku"].methods]
    assert min(others) == more("sudoku", "SPG") and max(others) == more("sudoku", "one step")
    assert f"SPG took {-min(others):.0f} % less than the default, `one step` {max(others):.0f} % more." in told
    default, one_step = took["sudoku_60_s", league.DEFAULT], took["sudoku_60_s", "one step"]
    assert f"the default took {default:.0f} s and `one step` {one_step:.0f} s" in told
    assert told.count(f"{more('sudoku_60_s', 'one step'):.0f} % more") == 1
    assert f"which took {more('sudoku_60_s', 'one step'):.0f} % longer" in told
    eight = [each for (name, _), each in took.items() if name == "sudoku_8_steps"]
    assert f"In 48 s all took {min(eight):.0f} to {max(eight):.0f} s." in told
    assert f"`one step` took {more('countdown', 'one step'):.0f} % more than the default." in told
    few = {method: number for (name, method), number in steps.items() if name == "sudoku" and number < 20}
    assert set(few) == {"ESPO", "GDSD", "SPG", "JustGRPO"} and (min(few.values()), max(few.values())) == (2, 7)
    lowest = {"one update, 2e-4", "all updates, 1e-4"}
    at_the_edge = {
        name: [arm for (of, arm) in settings if of == name and settings[of, arm] in lowest] for name in league.LEAGUES
    }
    assert "one step" in at_the_edge["sudoku"] and at_the_edge["sudoku_60_s"] == ["one step"]
    assert len(at_the_edge["sudoku"]) == 6 and league.DEFAULT not in at_the_edge["sudoku"]
    assert len(at_the_edge["sudoku_8_steps"]) == 3 and league.DEFAULT in at_the_edge["sudoku_8_steps"]


def test_an_earlier_league_had_what_is_left_out_below_the_default():
    rows = {row["method, its setting"].split(",")[0]: row for row in stored("league_countdown_first")["results"]}
    for method in set(league.LEAGUES["sudoku"].methods).difference(league.LEAGUES["countdown"].methods):
        apart, half = map(float, rows[method]["default less it"].split("±"))
        assert apart > half > 0


def test_estimators():
    assert estimators.told(stored("estimators")["measured"]) in (STUDIES / "estimators.md").read_text()


def test_gradients():
    (table,) = tables_of("gradients")
    kept = {row["row"]: row for row in stored("gradients")["corrector, n = 128"]}
    for row in table:
        assert row == {"corrector": row["corrector"]} | {name: kept[row["corrector"]][name] for name in list(row)[1:]}


def test_experts():
    results = runs_of("experts")
    (table,) = tables_of("experts")
    for arm, row in zip(experts.study.arms, table, strict=True):
        values = [results[arm, seed]["after"] for seed in range(3)]
        assert row["seeds 0, 1, 2"] == ", ".join(f"{value:.3f}" for value in values)
        assert row["mean"] == f"{mean(values):.3f}"
        if arm in experts.study.against:
            apart = paired.interval(paired.paired(results, arm, experts.study.against[arm]))
            assert row["beats no replay by, 95 %"] == f"+{apart}"


@pytest.mark.parametrize("task", order.STUDIES)
def test_orders(task):
    study = order.STUDIES[task]
    results = runs_of(f"order_{task}")
    assert paired.tables(study, results) in (STUDIES / "order.md").read_text()
    assert all({claim.arm, claim.against} <= set(study.arms) for claim in study.contrasts)
    for name, changes in study.arms.items():
        assert ("order='given'" in describe(changes["likelihood"])) == name.endswith("tokens alone")
        assert changes["sampler"].func is study.base.sampler.func


def test_supervision_beats_rl_on_sudoku():
    results = json.loads((STUDIES.parent / "results.json").read_text())
    page = " ".join((STUDIES.parent / "README.md").read_text().split())
    supervised = results["sudoku_unique_longer"]["supervised only, about 90 CPU seconds"]
    runs = [row for row in results["sudoku"] if row["recipe"] == "sudoku_unique"]
    learned = [float(row["solve rate before -> after (quantised net)"].split()[2]) for row in runs]
    assert all(alone > after for alone, after in zip(supervised, learned, strict=True))
    told = [f"{a:.3f}, {b:.3f} and {c:.3f}" for a, b, c in (supervised, learned)]
    assert f"on all three seeds**: {told[0]} against {told[1]} (" in page
    least = min(int(row["seconds in all"]) for row in runs)
    assert f"RL takes at least {least} s on two threads, about {2 * least} CPU seconds." in page


def test_what_one_file_learns_is_what_was_stored():
    runs = json.loads((STUDIES.parent / "results.json").read_text())["one_file"]
    rates = ", ".join(run.replace(" -> ", "→") for run in runs["solve rate before -> after, seeds 0, 1, 2"])
    page = " ".join((STUDIES.parent / "README.md").read_text().split())
    assert f"before→after 100 RL steps, seeds 0, 1, 2: {rates}." in page


def test_ess_of_the_converted_model():
    found = json.loads((STUDIES.parent / "results.json").read_text())["smollm2_diffusion_ess"]
    ess, apart = found["ESS"], found["mean abs log-ratio, nats"]
    told = f"an ESS of {min(ess):.3f} to {max(ess):.3f} under this FP8 (mean {mean(ess):.3f}, {mean(apart):.3f} nats;"
    page = " ".join((STUDIES / "mismatch.md").read_text().split())
    assert told in page
    assert f"But they are {len(ess)} of the recipe's {converted.num_steps}:" in page
    assert f"from {ess[0]:.3f} to {ess[10]:.3f} at the eleventh" in page
    assert f"grows from {apart[0]:.3f} to {apart[11]:.3f} nats at the twelfth" in page


def test_tbpos_band_never_acts_in_the_study_of_real_fp8():
    assert {study.base.num_iterations for study in fp8_sums.STUDIES.values()} == {1}
    assert not any("num_iterations" in changes for changes in fp8_sums.study.arms.values())
