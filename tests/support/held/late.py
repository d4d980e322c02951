"""The study of late rollouts, and whole runs of sudoku_tiny.py with a worker."""

from statistics import mean

from held import STUDIES, row, stored
from recipes.studies import lag_two, late_pretrained, late_rollouts, paired, several_updates

PAGE = f"{STUDIES}/late_rollouts.md"
STORED = stored("late_rollouts")
RESULTS = {(run["arm"], run["seed"]): run for run in STORED["runs"]}
STUDY = late_rollouts.at_rates(late_rollouts.STUDY, STORED["rates"])
CLAIMS = {each["stated before the runs"]: each for each in paired.contrast_rows(STUDY, RESULTS)}


def claimed(words: str) -> str:
    """The difference with its interval, and Holm's p, of the claim that has these words."""
    (each,) = (each for claim, each in CLAIMS.items() if words in claim)
    return f"{each['difference, 95 %']} (Holm's p {each[HOLM]})"


HOLM = "Holm's p"


def shown(words: str) -> bool:
    (each,) = (each for claim, each in CLAIMS.items() if words in claim)
    return float(each[HOLM]) < 0.05


def apart(arm: str, against: str) -> str:
    return paired.interval(paired.paired(RESULTS, arm, against))


def average(arm: str, column: str) -> float:
    return mean(run[column] for (name, _), run in RESULTS.items() if name == arm)


def rates() -> list[dict[str, str]]:
    return [{"arm": arm, "learning rate": f"{rate:g}"} for arm, rate in STORED["rates"].items()]


def costs() -> str:
    assert STORED["rates"]["lag 2"] == STORED["rates"]["lag 4"] == 1.25e-4 == STORED["rates"]["lag 0"] / 4
    two, four, eight, one = (claimed(f"a lag of {lag} costs") for lag in (2, 4, 8, 1))
    assert all(shown(f"a lag of {lag} costs") for lag in (2, 4, 8)) and not shown("a lag of 1 costs")
    again = {(run["arm"], run["seed"]): run for run in stored("lag_two")}
    claim, other = paired.contrast_rows(lag_two.STUDY, again)
    assert float(claim[HOLM]) < 0.05 < float(other[HOLM])
    slow = paired.interval(paired.paired(again, "lag 0", "lag 2"))
    return (
        f"**Lags of 2, 4 and 8 cost something**: {two}, {four} and {eight}, although each lag has its own learning "
        "rate, which falls from 5e-4 to 6.25e-5. The lag of 2 ran at 1.25e-4, the rate of lag 4. On seven of the seeds "
        f"[it was run again](lag_two.py), at both rates: at 2.5e-4 it costs {claim['difference, 95 %']} (stated before "
        f"the runs; Holm's p {claim[HOLM]}), at 1.25e-4 {slow}. That the higher rate is better is not shown: "
        f"{other['difference, 95 %']}. For a lag of 1 a cost is not shown: {one}."
    )


def clip() -> str:
    no_more = "the dual clip is above no corrector"
    assert shown(f"at a lag of 4 {no_more}") and shown(f"at a lag of 8 {no_more}")
    assert not shown(f"at a lag of 1 {no_more}")
    left = [apart("lag 0", f"lag {lag}, dual clip") for lag in (4, 8)]
    return (
        f"**The dual clip brings much of it back**: {claimed(f'at a lag of 4 {no_more}')} at a lag of 4 and "
        f"{claimed(f'at a lag of 8 {no_more}')} at a lag of 8. What is left of the cost is {left[0]} and {left[1]}. At "
        f"a lag of 1 its gain is not shown: {claimed(f'at a lag of 1 {no_more}')}."
    )


def tis() -> str:
    assert shown("TIS is above no") and shown("TIS is above its placebo") and shown("the dual clip is above TIS")
    assert not shown("AIS is above no")
    return (
        f"**TIS brings some of it back, and not by shrinking the step**: at a lag of 4 it beats no corrector by "
        f"{claimed('TIS is above no')} and its placebo by {claimed('TIS is above its placebo')}. The dual clip beats "
        f"TIS by {claimed('the dual clip is above TIS')}. AIS's gain is not shown: {claimed('AIS is above no')}."
    )


def ess() -> str:
    low, high = average("lag 8, dual clip", "ess"), average("lag 8", "ess")
    return (
        "**The ESS does not order arms that have different bounds and rates.** At a lag of 8 the dual clip's runs have "
        f"a mean ESS of {low:.2f}, and beat those without a correction, whose low rate keeps it at {high:.2f}. At "
        "equal rates and without a bound it [does tell harm](ess.md)."
    )


def unclaimed() -> str:
    gains = [apart(f"lag 4, {name}", "lag 4") for name in ("decoupled", "icepop", "tbpo")]
    return (
        f"Not claimed before, five seeds: at a lag of 4 decoupled PPO beats no corrector by {gains[0]} and IcePop by "
        f"{gains[1]}. Decoupled PPO is level with the dual clip: {apart('lag 4, dual clip', 'lag 4, decoupled')} in "
        "favor of the clip, on the five seeds that both have. "
        f"For TBPO's weight ({gains[2]}; its band cannot act with one update) and for TIS at a lag of 1 "
        f"({apart('lag 1, tis', 'lag 1')}) we saw no difference."
    )


def noise() -> str:
    again, fake = apart(late_rollouts.AGAIN, "lag 4"), apart("lag 4, placebo", "lag 4")
    return f"**Noise**: the same arm with other prompts and draws differs by {again}, the placebo by {fake}."


def staleness() -> str:
    times = average("lag 4", "k3 of staleness") / average("lag 4", "k3 of quantization")
    return (
        "The mismatch is the staleness's more than the quantization's (no arm with a lag was unquantized): at a lag of "
        f"4 without a correction the k3 divergence of staleness is {times:.0f} times that of FP8 "
        "(`mismatch_split/*`, one group a step)."
    )


def whole_runs():
    """Of sudoku_tiny.py with a worker, and without: benchmarks/late_runs.py."""
    found = stored("benchmarks/results/late-runs-cpu")
    _, two, late = (each["steps / one thread"] for each in found["arms"])
    told = f"take {two:.3f} of the time with two threads and {late:.3f} with a worker that has the second core"
    yield f"{STUDIES}/late_rollouts.md", told
    assert len({run["seed"] for run in found["runs"]}) == 3
    apart = [run["after"] for run in found["runs"] if run["arm"] == "late"]
    others = [run["after"] for run in found["runs"] if run["arm"] == "one thread"]
    assert mean(apart) > mean(others) - 0.05, "recipes/README.md: as much as sudoku_tiny.py"


def the_page():
    yield PAGE, paired.tables(STUDY, RESULTS, "ess", "least ess")
    for each in rates():
        yield PAGE, row(*each.values())
    for sentence in (costs, clip, tis, ess, unclaimed, noise, staleness):
        yield PAGE, sentence()
    best = STORED["rates"]
    assert best["lag 4, dual clip"] / best["lag 4"] == 8 and best["lag 8, dual clip"] / best["lag 8"] == 32
    assert {run["arm"] for run in STORED["runs"]} == set(STUDY.arms)


def updates():
    """The study of several updates per rollout: its tables, and what no claim of it shows."""
    found = stored("several_updates")
    study = late_rollouts.at_rates(several_updates.STUDY, found["rates"])
    results = {(run["arm"], run["seed"]): run for run in found["runs"]}
    yield PAGE, paired.tables(study, results, "ess", "least ess", "below the band", "above the band")
    assert {run["arm"] for run in found["runs"]} == set(study.arms) and set(found["rates"].values()) == {5e-4}
    claims = paired.contrast_rows(study, results)
    assert min(float(each[HOLM]) for each in claims) > 0.5
    apart = [
        paired.interval(paired.paired(results, arm, "none")) for arm in ("dual clip", "tbpo", "wide tbpo", "wide qarl")
    ]
    yield (
        PAGE,
        f"**We saw no difference** between no correction and the dual clip ({apart[0]}), TBPO with its digest's band "
        f"({apart[1]}), with a wide one ({apart[2]}) and QaRL with a wide one ({apart[3]}).",
    )
    shares = [
        mean(run[side] for (arm, _), run in results.items() if arm == "tbpo")
        for side in ("below the band", "above the band")
    ]
    yield PAGE, f"outside it lie {sum(shares):.2f} of the tokens"


def pretrained():
    """A lag, and int4, of SmolLM2 as a diffusion model."""
    study, runs = late_pretrained.STUDY, {(run["arm"], run["seed"]): run for run in stored("late_pretrained")}
    assert {(arm, seed) for arm in study.arms for seed in range(study.fewer.get(arm, 3))} == set(runs)
    columns = ("arm", "after", "ess", "least ess", "difference, 95 %")
    yield PAGE, paired.markdown(paired.arm_rows(study, runs, ["after", "least ess"]), columns)
    yield PAGE, paired.markdown(late_pretrained.quarters(runs))
    least = min(run["least ess"] for (arm, _), run in runs.items() if arm == "FP8")
    yield f"{STUDIES}/mismatch.md", f"(a step of a later run fell to {least:.3f})"
    (begun,) = {run["before"] for run in runs.values()}

    def after(arm):
        return [run["after"] for (name, _), run in sorted(runs.items()) if name == arm]

    def ends(arm):
        *first, last = (f"{each:.2f}" for each in after(arm))
        return f"{', '.join(first)} and {last}" if first else last

    assert max(after("lag 4")) < min(begun, *after("lag 4, dual clip"))
    told = f"From {begun:.2f} its three seeds end at {ends('lag 4')}; without a lag they end at {ends('FP8')}."
    yield PAGE, f"**A lag of four updates without a correction makes the model worse than it was.** {told}"
    yield PAGE, f"**The dual clip holds**: {ends('lag 4, dual clip')}."
    yield PAGE, f"TIS, with its token weights up to 2, ends at {ends('lag 4, tis')}"
    yield PAGE, f"One seed at a quarter of the rate, without a correction, ends at {ends('lag 4, slow')}."
    yield PAGE, f"**int4 is another matter than FP8**: {ends('int4')}, with TIS {ends('int4, tis')}"
    yield PAGE, f"the three seeds end at {ends('FP8')}, and the one unquantized seed ends at {ends('unquantized')}."
    quarter = {row["arm"]: list(row.values())[1:] for row in late_pretrained.quarters(runs)}
    yield PAGE, f"Under FP8 it is {quarter['FP8'][0]} in the first twelve steps and {quarter['FP8'][3]} in the last."
