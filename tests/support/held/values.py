"""The study of value models: its tables and its findings."""

from held import STUDIES, row, runs_of, stored
from recipes.studies import paired, reuse, values

PAGE, HOLM = f"{STUDIES}/values.md", "Holm's p"
RUNS = runs_of("values")


def the_page():
    bonus = reuse.TASKS["latin"].base.entropy_coeff
    yield PAGE, f"four denoising steps in two segments, entropy bonus {bonus}."
    for table in values.tables(RUNS):
        yield PAGE, paired.markdown(table)
    for arm, (gae_lambda, rate) in values.CHOSEN.items():
        assert values.TRIALS[arm][paired.best_trial(RUNS, values.TRIALS[arm])] == (gae_lambda, rate)


def the_toy():
    rows = stored("values_toy")
    for policy in ("early", "late"):
        for kind in ("none", "exact", "noisy"):
            found = [each for each in rows if (each["policy"], each["values"]) == (policy, kind)]
            found.sort(key=lambda each: -each["gae_lambda"])
            cells = [f"{each['bias']:.2f}/{each['rmse']:.2f}/{each['efficiency']:.2f}" for each in found]
            yield PAGE, row(f"{policy}, {kind}", *cells)


def findings():
    mean, half = map(float, paired.interval(paired.paired(RUNS, values.VALUE, values.GRPO)).split("±"))
    yield PAGE, f"(between {mean - half:.3f} and {mean + half:+.3f} of the solve rate)"
    four = paired.interval(paired.paired(RUNS, values.VALUE, values.GRPO, "four"))
    (claim,) = (row for row in values.tables(RUNS)[1] if row["stated before the runs"].endswith("four steps"))
    p_values = f"Its p is {claim['p']}, and {claim[HOLM]} after Holm's correction"
    yield PAGE, f"the value head solved {four.removeprefix('-')} less than GRPO. {p_values}"
    seconds = [run["seconds"] for run in RUNS.values() if run["seed"] < 10]
    yield PAGE, f"# {sum(seconds) / 60:.0f} minutes of one core"
