"""The study of scaffolds: what the tuning on instance 0 showed."""

from statistics import mean

from held import DOCS, STUDIES, stored
from recipes.studies.scaffolds import ARMS, ELITE, GENETIC, INFILL, NUMBERS, POLICY


def missing():
    done, all_runs = len(stored("scaffolds")), len(ARMS) * len(NUMBERS)
    if done < all_runs:
        yield f"{STUDIES}/scaffolds.md", f"**{done} of {all_runs} runs are there, and no claim is decided.**"


def novelty():
    """The shares of new sequences on one wild type, without and with it, and that the ten best were no better."""
    runs = [run for run in stored("novelty") if run["arm"] == "wild type"]
    by_weight = {weight: [run for run in runs if run["weight"] == weight] for weight in (0.0, 0.05)}
    without, with_it = ([round(100 * run["new"]) for run in of] for of in by_weight.values())
    yield (
        f"{DOCS}/protein-dna.md",
        f"{min(with_it)} to {max(with_it)} % of sequences were new, not {min(without)} to {max(without)} %",
    )
    tops = [[run["top"] for run in of] for of in by_weight.values()]
    assert len(tops[0]) == len(tops[1]) == 3 and max(tops[1]) <= min(tops[0])


def tuning():
    runs = stored("scaffolds_tuned")
    policy = next(run for run in runs if run["arm"] == f"policy {POLICY['learning_rate']:g}, 40 x 64")
    worth = policy["worth"]
    yield f"{STUDIES}/scaffolds.md", f"one sample was worth about {worth} calls of search,"
    yield f"{STUDIES}/scaffolds.md", f"at most {policy['calls']:,} calls"
    scaffolds = round(policy["calls"] / worth, -2)
    yield (
        f"{DOCS}/protein-dna.md",
        f"after {policy['calls']:,} calls, one sample on a new scaffold was worth about {worth}",
    )
    yield f"{DOCS}/protein-dna.md", f"pays from about {scaffolds:g} scaffolds on"
    assert policy["pretrained_best"] < policy["one"] < policy["search"]

    areas = {}
    for run in runs:
        if "area" in run:
            areas.setdefault(run["arm"], []).append(run["area"])
    means = {arm: mean(values) for arm, values in areas.items()}
    learned, frozen = (means[f"infilling {rate}, {INFILL['masked']}, 1"] for rate in ("0.001", "1e-12"))
    assert abs(learned - frozen) < 0.01
    search = means[f"elites {ELITE['chain']}, {ELITE['masked']}"]
    genetic = means[f"genetic {GENETIC['mutation']:g}"]
    assert search == max(means.values()) and genetic == max(v for arm, v in means.items() if arm.startswith("genetic"))
    assert search > learned == max(v for arm, v in means.items() if "infilling 0" in arm)
