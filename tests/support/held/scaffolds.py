"""The study of scaffolds: its tables, its findings, and what the tuning on instance 0 showed."""

from statistics import fmean, mean

from held import DOCS, STUDIES, stored
from recipes.studies.paired import interval, markdown
from recipes.studies.scaffolds import (
    ARMS,
    ELITE,
    GENETIC,
    INFILL,
    NUMBERS,
    POLICY,
    SHOWN,
    claim_rows,
    claims,
    instance_rows,
    values_of,
)

PAGE, PROTEIN = f"{STUDIES}/scaffolds.md", f"{DOCS}/protein-dna.md"
RUNS = {(run["arm"], run["seed"]): run for run in stored("scaffolds")}


def by_instance(arm, column):
    return [fmean(values_of(RUNS, arm, column, instance)) for instance in range(1, 6)]


def tables():
    assert {*RUNS} == {(arm, number) for arm in ARMS for number in NUMBERS}
    for claim in SHOWN:
        yield PAGE, markdown(instance_rows(RUNS, claim))
    yield PAGE, markdown(claim_rows(RUNS))


def findings():
    best, search, frozen, elite, genetic = claim_rows(RUNS)
    differences = [row["difference, 95 %"] for row in (best, search, frozen, elite, genetic)]
    assert len(claims()) == 5
    for text in differences:  # none holds: no interval is above 0
        value, half = map(float, text.split("±"))
        assert value < half
    one, before = interval(by_instance("policy", "one")), interval(by_instance("policy", "pretrained_one"))
    yield PAGE, f"takes one sample from {before} to {one}, about the pretrained model's best of 32: above it by"
    yield PAGE, f"above it by {differences[0]}, in {best['above 0']} runs"
    assert search["above 0"] == "0 of 25"
    worth = interval(by_instance("policy", "worth"), 0)
    by = [round(value) for value in by_instance("policy", "worth")]
    (calls,) = {run["calls"] for (arm, _), run in RUNS.items() if arm == "policy"}
    pays = round(calls / mean(by_instance("policy", "worth")), -2)
    for page, text in (
        (PAGE, f"one of its samples was worth {worth} calls of elite search, after {calls:,} calls"),
        (PAGE, f"is worth {worth} calls of search, by instance from {min(by)} to {max(by)}"),
        (PAGE, f"{calls:,} calls of training are paid back from about {pays:g} scaffolds on"),
        (PROTEIN, f"after {calls:,} calls, one sample was worth {worth} calls of search on a new scaffold"),
    ):
        yield page, text
    yield PAGE, f"without learning by {differences[2]} ({frozen['above 0']} runs)"
    above = differences[3].removeprefix("-")
    assert above != differences[3]
    yield PAGE, f"exactly what is feasible, is above it by {above};"
    value, half = map(float, differences[3].split("±"))
    assert value + half < 0
    yield PROTEIN, "Infilling by GRPO lost to search that mutates and crosses the best"
    value, half = map(float, worth.split("±"))
    least, most = (round(calls / (value + sign * half), -2) for sign in (1, -1))
    yield (
        PROTEIN,
        f"training was worth its calls only if some {pays:g} new scaffolds (by the interval {least:g} to {most:,g})",
    )
    yield PAGE, f"about {pays:g} new scaffolds or more, one sample each (by the interval {least:g} to {most:,g})"
    yield (
        "README.md",
        f"training was worth its calls from some {pays:g} new scaffolds ({least:g} to {most:,g}, unplanned)",
    )
    value, half = map(float, differences[4].split("±"))
    assert value < 0 < value + half
    yield PROTEIN, "Nor was it shown to be better than the same loop without learning."
    solved = {arm: sum(RUNS[arm, n]["solved"] is not None for n in NUMBERS) for arm in ARMS if arm != "policy"}
    yield (
        PAGE,
        f"elite search in {solved['elite search']} of 25 runs, by the genetic algorithm in {solved['genetic']}, by "
        f"infilling GRPO in {solved['infilling']}, and without learning in {solved['no learning']}.",
    )


def tuning():
    runs = stored("scaffolds_tuned")
    policy = next(run for run in runs if run["arm"] == f"policy {POLICY['learning_rate']:g}, 40 x 64")
    worth = policy["worth"]
    yield PAGE, f"one sample was worth about {worth} calls of search,"
    yield PAGE, f"at most {policy['calls']:,} calls"
    assert policy["pretrained_best"] < policy["one"] < policy["search"]

    areas = {}
    for run in runs:
        if "area" in run:
            areas.setdefault(run["arm"], []).append(run["area"])
    natural, even = ("{:.3f} and {:.3f}".format(*areas[f"elites {chain}, 8"]) for chain in ("natural", "uniform"))
    yield PAGE, f"(at natural frequencies its area was {natural}, not {even}, on two seeds of instance 0)"
    means = {arm: mean(values) for arm, values in areas.items()}
    learned, frozen = (means[f"infilling {rate}, {INFILL['masked']}, 1"] for rate in ("0.001", "1e-12"))
    assert abs(learned - frozen) < 0.01
    search = means[f"elites {ELITE['chain']}, {ELITE['masked']}"]
    genetic = means[f"genetic {GENETIC['mutation']:g}"]
    assert search == max(means.values()) and genetic == max(v for arm, v in means.items() if arm.startswith("genetic"))
    assert search > learned == max(v for arm, v in means.items() if "infilling 0" in arm)
    first = areas[f"genetic {GENETIC['mutation']:g}"][0]
    told = f"had, {learned:.3f} against {first:.3f}, and not by the genetic algorithm's mean of two, {genetic:.3f})"
    yield PAGE, f"(the fifth held on the one seed that both arms {told}"
