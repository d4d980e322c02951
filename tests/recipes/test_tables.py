"""The documents' tables of the studies are those of the stored results, and the intervals those of the stored seeds."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest

from dllm_rl.members import describe
from recipes.studies import estimators, experts, fp8_sums, league, lengths, order, paired, rates

STUDIES = Path(paired.__file__).parent


def stored(name):
    return json.loads((STUDIES / f"{name}.json").read_text())


def by_arm(runs):
    return {(run["arm"], run["seed"]): run for run in runs}


def runs_of(name):
    return by_arm(stored(name))


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
    contrasts = stored("mismatch")["contrasts"]
    claims, _, _, _, causal, *_ = tables_of("mismatch")
    assert [(row["difference, 95 %"], row["p"]) for row in claims] == [
        (row["difference, 95 %"], row["Holm's p"]) for row in contrasts
    ]
    arms, contrasts = (stored("mismatch_ar")[part] for part in ("arms", "contrasts"))
    assert [(row["arm"], row["after"], row["ESS"]) for row in causal] == [
        (row["arm"], row["after"], row["ESS"]) for row in arms
    ]
    told = [(row["difference, 95 %"].split(" ")[0], row["p"]) for row in causal[1:]]
    assert told == [(row["difference, 95 %"], row["Holm's p"]) for row in contrasts]


def test_rounding_as_small_as_a_kernels():
    plain, noisy = stored("kernel_noise")["arms"]
    told = (STUDIES / "mismatch.md").read_text()
    assert f"({noisy['after']} against {plain['after']} unquantised" in told
    assert f"**Harm is not shown: +{noisy['difference, 95 %']}**" in told


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
    best = rates.best(tuning)
    assert best.pop("five levels: AIS") == 1.25e-4 and set(best.values()) == {2.5e-4, 5e-4}


def test_lengths():
    results = runs_of("lengths")
    assert len(results) == 98 and {arm for arm, _ in results} == set(lengths.study.arms)
    assert lengths.told(results) in (STUDIES / "mismatch.md").read_text()


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
    assert f"Two segments less eight: {paired.interval(paired.paired(runs, 'two segments', league.DEFAULT))}." in told
    for other, claim in (("wd1", "less wd1:"), ("one step", "less `one step` are")):
        apart = paired.paired(runs, "two segments", other)
        assert f"{claim} {paired.interval(apart)} (exact p {paired.sign_flip(apart):.3f}, not claimed before)" in told


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
            assert row["less no replay, 95 %"] == f"+{apart}"


@pytest.mark.parametrize("task", order.STUDIES)
def test_orders(task):
    study = order.STUDIES[task]
    results = runs_of(f"order_{task}")
    assert paired.tables(study, results) in (STUDIES / "order.md").read_text()
    assert all({claim.arm, claim.against} <= set(study.arms) for claim in study.contrasts)
    for name, changes in study.arms.items():
        assert ("with_order" in describe(changes["likelihood"])) != name.endswith("tokens alone")
        assert changes["sampler"].func is study.base.sampler.func


def test_ess_of_the_converted_model():
    found = json.loads((STUDIES.parent / "results.json").read_text())["smollm2_diffusion_ess"]
    ess, apart = found["ESS"], found["mean abs log-ratio, nats"]
    told = f"an ESS of {min(ess):.3f} to {max(ess):.3f} under this FP8 (mean {mean(ess):.3f}, {mean(apart):.3f} nats;"
    assert told in (STUDIES / "mismatch.md").read_text()
