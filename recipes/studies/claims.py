"""The tables of docs/results-and-limits.md: what of the claims of each study is shown, and what was solved.

python -m recipes.studies --write        the tables, from the stored results of the studies
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from dllm_rl.files import read_json
from recipes.studies.late import late_rollouts, several_updates
from recipes.studies.likelihoods import drawn_trained, league, training_order
from recipes.studies.paired import Study, by_arm, claimed_rows, contrast_rows, markdown, shown_side
from recipes.studies.quantized import (
    estimates,
    estimates_trained,
    int4_orders,
    int4_orders_controls,
    low_bits,
    low_bits_tuned,
    order_flips_controls,
    orders,
    orders_trained,
)

ROOT = Path(__file__).parents[2]
Rows = Sequence[Mapping[str, str]]
Asked = tuple[str, str, str]  # what was asked, its page, and the task, with the model if that was not made for the task
SUDOKU, FEW_CLUES, LATIN = (f"4x4 Sudoku{of}" for of in ("", " with few clues", " after Latin squares"))
SUMS = "sums, SmolLM2-135M"
LEAGUES, ORDERS = (f"likelihoods/README.md#{at}" for at in ("methods-in-equal-time", "in-which-order-to-train"))
TRAINED = "quantized/README.md#training-with-the-exact-likelihood"
GRADIENT = "quantized/README.md#the-gradient-exactly"
SEVERAL = "late/README.md#several-updates-per-rollout"
ESTIMATES = "quantized/README.md#training-where-the-likelihood-is-an-estimate"
DRAWN = "likelihoods/README.md#drawn-steps-noise-and-cost"
SHOWN, OPPOSITE, UNDECIDED = "shown", "opposite shown", "undecided"
OPPOSITES = {
    "does better than": "does worse than",
    "weights help": "weights do harm",
    "are above": "together are below",
    "is at most 0.05 lower": "is more than 0.05 lower",
    "is above": "is below",
    "leaves less": "leaves more",
    "leave less": "leave more",
    "leaves a larger": "leaves a smaller",
}


def outcome(row: Mapping[str, str]) -> str:
    """Of a row of a table of claims. A claim of harm holds below 0, and one that two arms differ on either side."""
    claim, side = row["stated before the runs"], shown_side(row)
    if not side:
        return UNDECIDED
    harm = re.search(r"\bharms?\b", claim) is not None
    return SHOWN if "differ" in claim or (side < 0) == harm else OPPOSITE


def opposite(claim: str) -> str:
    """What is found where the opposite of the claim is shown."""
    for said, found in OPPOSITES.items():
        if said in claim:
            return claim.replace(said, found)
    raise ValueError(f"add the words that turn {claim!r} round to OPPOSITES")


def numbers(rows: Rows) -> str:
    """Of how many seeds or models the tests of the claims are."""
    found = {int(row.get("seeds") or row["above 0"].rpartition(" of ")[2]) for row in rows}
    return " and ".join(map(str, sorted(found)))


def of_league() -> Rows:
    """Each league claims that the default of its time is above every other method."""
    rows = []
    for name, each in league.LEAGUES.items():
        for row in league.stored_rows(name):
            if row["method"] != each.default:
                claim = {"stated before the runs": f"the default of that time does better than: {row['method']}"}
                claim |= {"seeds": row["seeds"], "difference, 95 %": row["default beats it by"]}
                rows.append(claim | {"Holm's p": row["Holm's p"]})
    return rows


def by_study() -> dict[Asked, Rows]:
    """By study its rows; Holm's correction is over a study, or over each of its parts."""

    def contrasts(study: Study, path: Path, part: str | None = None) -> Rows:
        stored = read_json(path)
        return contrast_rows(study, by_arm(stored[part] if part else stored))

    def claimed(claims: Callable[..., Mapping[str, Sequence[float]]], runs: Iterable[dict[str, Any]]) -> Rows:
        return claimed_rows(claims(by_arm(runs)))

    long = read_json(int4_orders.STORED)["runs"]
    sums = low_bits_tuned.whole(by_arm(read_json(low_bits_tuned.STORED)["runs"]))
    parts = orders_trained.families(by_arm(read_json(orders_trained.STORED))).values()
    estimated = estimates_trained.whole_families(by_arm(read_json(estimates_trained.STORED)))
    drawn = drawn_trained.whole_families(by_arm(read_json(drawn_trained.STORED)))
    exact = estimates.whole_families(read_json(estimates.STORED))
    studies: dict[Asked, Sequence[Rows]] = {
        ("the exact gradient, by order and format", GRADIENT, SUDOKU): [
            claimed_rows(orders.claims(read_json(orders.STORED)))
        ],
        ("the exact gradient, other models", GRADIENT, f"{SUDOKU}; Countdown"): [
            order_flips_controls.claim_rows(read_json(order_flips_controls.STORED))
        ],
        ("training by order and format", TRAINED, SUDOKU): [claimed_rows(part) for part in parts],
        ("training with an estimated likelihood", ESTIMATES, SUDOKU): [claimed_rows(part) for part in estimated],
        ("the exact gradient with an estimated likelihood", GRADIENT, SUDOKU): [claimed_rows(part) for part in exact],
        ("longer training on INT4 rollouts", TRAINED, SUDOKU): [
            claimed(int4_orders.claims, long),
            claimed(int4_orders_controls.claims, [*long, *read_json(int4_orders_controls.STORED)]),
        ],
        (
            "INT4 rollouts, each arm at its own learning rate",
            TRAINED,
            SUMS,
        ): [contrast_rows(low_bits_tuned.STUDY, sums)],
        ("INT4 rollouts, at one learning rate", TRAINED, SUMS): [contrasts(low_bits.STUDY, low_bits.STORED)],
        ("late rollouts", "late/README.md", SUDOKU): [
            contrasts(late_rollouts.STUDY, late_rollouts.STORED, "runs"),
        ],
        ("several updates of a late rollout", SEVERAL, SUDOKU): [
            contrasts(several_updates.STUDY, several_updates.STORED, "runs")
        ],
        (
            "published methods in equal time",
            LEAGUES,
            f"{SUDOKU}; {FEW_CLUES}; Countdown",
        ): [of_league()],
        ("training with drawn steps", DRAWN, SUDOKU): [claimed_rows(part) for part in drawn],
        ("training orders", ORDERS, f"{LATIN}; Countdown"): [
            claimed_rows(training_order.claims(training_order.by_key(read_json(training_order.STORED))))
        ],
    }
    found = {study: [row for rows in families for row in rows] for study, families in studies.items()}
    return {study: rows for study, rows in found.items() if rows}


def grouped(claims: Iterable[str]) -> str:
    """The claims as one cell; those that begin alike, up to the last colon, are one entry with each end once."""
    entries: dict[str, dict[str, None]] = {}
    for claim in claims:
        begin, colon, end = claim.rpartition(": ")
        entries.setdefault(begin + colon, {})[end] = None
    return "; ".join(begin + ", ".join(ends) for begin, ends in entries.items()) or "-"


def claim_rows() -> list[dict[str, str]]:
    table = []
    for study, rows in by_study().items():
        outcomes = [outcome(row) for row in rows]
        row = named(study) | {"seeds or models": numbers(rows), "claims": str(len(rows))}
        row |= {each: str(outcomes.count(each)) for each in (SHOWN, OPPOSITE, UNDECIDED)}
        wrong = [row["stated before the runs"] for row, each in zip(rows, outcomes, strict=True) if each == OPPOSITE]
        table.append(row | {"what is shown instead of the claim": grouped(map(opposite, wrong))})
    return table


STORED: dict[Asked, Sequence[Path]] = {
    ("training by order and format", TRAINED, SUDOKU): [orders_trained.STORED],
    ("training with an estimated likelihood", ESTIMATES, SUDOKU): [estimates_trained.STORED],
    ("longer training on INT4 rollouts", TRAINED, SUDOKU): [
        int4_orders.STORED,
        int4_orders_controls.STORED,
    ],
    (
        "INT4 rollouts, each arm at its own learning rate",
        TRAINED,
        SUMS,
    ): [low_bits_tuned.STORED],
    ("INT4 rollouts, at one learning rate", TRAINED, SUMS): [low_bits.STORED],
    ("late rollouts", "late/README.md", SUDOKU): [late_rollouts.STORED],
    ("several updates of a late rollout", SEVERAL, SUDOKU): [several_updates.STORED],
    ("published methods in equal time", LEAGUES, SUDOKU): [
        path for name, path in league.STORED.items() if name.startswith("sudoku")
    ],
    ("published methods in equal time", LEAGUES, FEW_CLUES): [
        path for name, path in league.STORED.items() if name.startswith("few_clues")
    ],
    ("training with drawn steps", DRAWN, SUDOKU): [drawn_trained.STORED],
    ("published methods in equal time", LEAGUES, "Countdown"): [league.STORED["countdown"]],
}


def solved_rows() -> list[dict[str, str]]:
    """The shares solved before and after RL of the studies that stored both of each run: the means of the arms."""

    def span(values: Iterable[float], digits: int = 3) -> str:
        ends = dict.fromkeys(f"{f(values):.{digits}f}" for values in [list(values)] for f in (min, max))
        return " to ".join(ends)

    table = []
    for study, paths in STORED.items():
        runs, cpus = defaultdict(list), []
        for path in paths:
            stored = read_json(path)
            for run in stored if isinstance(stored, list) else stored["runs"]:
                if "before" in run or run.get("diverged"):
                    runs[path.stem, run["arm"]].append(run)
                    cpus.append(run.get("machine", run).get("cpu", "not recorded"))
        row = named(study) | {"seeds": span(map(len, runs.values()), 0)}
        row["before RL"] = span(mean(run["before"] for run in its if "before" in run) for its in runs.values())
        row["after RL, by arm"] = span(mean(run["after"] for run in its) for its in runs.values())
        unknown = "not recorded" if len(set(cpus)) == 1 else "not recorded for some runs"
        names = dict.fromkeys(unknown if cpu == "not recorded" else cpu for cpu in sorted(cpus))
        row["processor"] = ", ".join(names)
        row["each seed"] = ", ".join(f"[{path.name}](../{path.relative_to(ROOT).as_posix()})" for path in paths)
        table.append(row)
    return table


def named(study: Asked) -> dict[str, str]:
    what, page, task = study
    return {"study": f"[{what}](../recipes/studies/{page})", "task": task}


def page_tables() -> dict[str, str]:
    return {"claims": markdown(claim_rows()), "solved": markdown(solved_rows())}
