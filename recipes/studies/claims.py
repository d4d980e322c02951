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
from recipes.studies import (
    distillation,
    engines,
    engines_ar,
    ess_by_length,
    ess_early,
    fast,
    few_clues,
    fp8_sums,
    int4_orders,
    int4_orders_controls,
    lag_two,
    late_pretrained,
    late_rollouts,
    league,
    lengths,
    low_bits,
    low_bits_tuned,
    mismatch,
    mismatch_ar,
    order,
    order_flips_controls,
    orders,
    orders_trained,
    rates,
    renoising,
    reuse,
    reuse_controls,
    revise,
    several_updates,
    training_order,
    values,
)
from recipes.studies.paired import Study, by_arm, claimed_rows, contrast_rows, markdown, shown_side

Rows = Sequence[Mapping[str, str]]
Asked = tuple[str, str, str]  # what was asked, its page, and the task, with the model if that was not made for the task
SUDOKU, FEW_CLUES, LATIN = (f"4x4 Sudoku{of}" for of in ("", " with few clues", " after Latin squares"))
SUMS = "sums, SmolLM2-135M"
SHOWN, OPPOSITE, UNDECIDED = "shown", "opposite shown", "undecided"
OPPOSITES = {
    "does better than": "does worse than",
    "weights help": "weights do harm",
    "are above": "together are below",
    "is at most 0.05 lower": "is more than 0.05 lower",
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
    taught = read_json(few_clues.STORED)
    ceilings = {int(steps): rate for steps, rate in taught["ceiling"].items()}
    parts = orders_trained.families(by_arm(read_json(orders_trained.STORED))).values()
    studies: dict[Asked, Sequence[Rows]] = {
        ("the exact gradient, by order and format", "orders", SUDOKU): [
            claimed_rows(orders.claims(read_json(orders.STORED)))
        ],
        ("the exact gradient, other models", "order_flips", f"{SUDOKU}; Countdown"): [
            order_flips_controls.claim_rows(read_json(order_flips_controls.STORED))
        ],
        ("training by order and format", "orders_trained", SUDOKU): [claimed_rows(part) for part in parts],
        ("longer training on INT4 rollouts", "order_flips", SUDOKU): [
            claimed(int4_orders.claims, long),
            claimed(int4_orders_controls.claims, [*long, *read_json(int4_orders_controls.STORED)]),
        ],
        ("INT4 rollouts, each arm at its own learning rate", "low_bits", SUMS): [
            contrast_rows(low_bits_tuned.STUDY, sums)
        ],
        ("INT4 rollouts, at one learning rate", "low_bits", SUMS): [contrasts(low_bits.STUDY, low_bits.STORED)],
        ("coarse formats, at one learning rate", "mismatch", SUDOKU): [read_json(mismatch.STORED)["contrasts"]],
        ("FP8 to five levels, each arm at its own learning rate", "mismatch", SUDOKU): [
            contrasts(rates.study, rates.STORED, "runs")
        ],
        ("five levels", "mismatch", f"{SUDOKU}, autoregressive"): [read_json(mismatch_ar.STORED)["contrasts"]],
        ("five levels, by the number of denoising steps", "mismatch", SUDOKU): [
            contrasts(lengths.study, lengths.STORED)
        ],
        ("FP8 rollouts, at two learning rates", "mismatch", f"{SUMS}, autoregressive"): [
            contrasts(fp8_sums.STUDIES[rate], path) for rate, path in fp8_sums.STORED.items()
        ],
        ("rollouts by llama.cpp", "mismatch", f"{SUDOKU}; {SUMS}, autoregressive"): [
            contrasts(each.study, each.STORED) for each in (engines, engines_ar)
        ],
        ("late rollouts", "late_rollouts", SUDOKU): [
            contrasts(late_rollouts.STUDY, late_rollouts.STORED, "runs"),
            contrasts(lag_two.STUDY, lag_two.STORED),
        ],
        ("several updates of a late rollout", "several_updates", SUDOKU): [
            contrasts(several_updates.STUDY, several_updates.STORED, "runs")
        ],
        ("the ESS of the first steps as a warning", "ess", f"{SUDOKU}; Countdown"): [
            ess_early.claim_rows(ess_early.trials(read_json(ess_early.STORED)))
        ],
        ("the ESS by the length of the answer", "ess_by_length", "texts, SmolLM2-135M"): [
            [row | {"seeds": "1"} for row in ess_by_length.claim_rows(ess_by_length.cells_of(ess_by_length.load()))]
        ],
        ("published methods in equal time", "league", f"{SUDOKU}; {FEW_CLUES}; Countdown"): [of_league()],
        ("noisy orders", "order", f"{SUDOKU}; Countdown"): [
            contrasts(study, order.STORED[task]) for task, study in order.STUDIES.items()
        ],
        ("training orders", "training_order", f"{LATIN}; Countdown"): [
            claimed_rows(training_order.claims(training_order.by_key(read_json(training_order.STORED))))
        ],
        ("right answers again", "reuse", f"{LATIN}; Countdown"): [
            reuse.claim_rows(reuse.by_key(read_json(reuse.STORED)))
        ],
        ("right answers again: controls", "reuse", LATIN): [
            claimed(reuse_controls.claims, read_json(reuse_controls.STORED))
        ],
        ("what RL reaches that supervision cannot", "few_clues", FEW_CLUES): [
            few_clues.claim_rows(by_arm(taught["runs"]), ceilings)
        ],
        ("a model as its own teacher", "distillation", FEW_CLUES): [
            contrasts(distillation.study, distillation.STORED, "runs")
        ],
        ("a reward for few forwards", "fast", "4x4 Sudoku, six to eight clues"): [contrasts(fast.study, fast.STORED)],
        ("a sampler that edits", "revise", SUDOKU): [contrasts(revise.study, revise.STORED)],
        ("a value model", "values", LATIN): [contrasts(values.STUDY, values.STORED)],
        ("DiffusionGemma's noise", "renoising", SUDOKU): [contrasts(renoising.study, renoising.STORED, "runs")],
    }
    return {study: [row for rows in families for row in rows] for study, families in studies.items()}


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
    ("training by order and format", "orders_trained", SUDOKU): [orders_trained.STORED],
    ("longer training on INT4 rollouts", "order_flips", SUDOKU): [int4_orders.STORED, int4_orders_controls.STORED],
    ("INT4 rollouts, each arm at its own learning rate", "low_bits", SUMS): [low_bits_tuned.STORED],
    ("INT4 rollouts, at one learning rate", "low_bits", SUMS): [low_bits.STORED],
    ("FP8 to five levels, each arm at its own learning rate", "mismatch", SUDOKU): [rates.STORED],
    ("five levels, by the number of denoising steps", "mismatch", SUDOKU): [lengths.STORED],
    ("FP8 rollouts, at two learning rates", "mismatch", f"{SUMS}, autoregressive"): [*fp8_sums.STORED.values()],
    ("rollouts by llama.cpp", "mismatch", SUDOKU): [engines.STORED],
    ("rollouts by llama.cpp", "mismatch", f"{SUMS}, autoregressive"): [engines_ar.STORED],
    ("late rollouts", "late_rollouts", SUDOKU): [late_rollouts.STORED, lag_two.STORED],
    ("late rollouts", "late_pretrained", SUMS): [late_pretrained.STORED],
    ("several updates of a late rollout", "several_updates", SUDOKU): [several_updates.STORED],
    ("published methods in equal time", "league", SUDOKU): [
        path for name, path in league.STORED.items() if name.startswith("sudoku")
    ],
    ("published methods in equal time", "league", FEW_CLUES): [
        path for name, path in league.STORED.items() if name.startswith("few_clues")
    ],
    ("published methods in equal time", "league", "Countdown"): [league.STORED["countdown"]],
    ("noisy orders", "order", SUDOKU): [order.STORED["sudoku"]],
    ("noisy orders", "order", "Countdown"): [order.STORED["countdown"]],
    ("a model as its own teacher", "distillation", FEW_CLUES): [distillation.STORED],
    ("a sampler that edits", "revise", SUDOKU): [revise.STORED],
    ("DiffusionGemma's noise", "renoising", SUDOKU): [renoising.STORED],
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
        row["each seed"] = ", ".join(f"[{path.name}](../recipes/studies/{path.name})" for path in paths)
        table.append(row)
    return table


def named(study: Asked) -> dict[str, str]:
    what, page, task = study
    return {"study": f"[{what}](../recipes/studies/{page}.md)", "task": task}


def page_tables() -> dict[str, str]:
    return {"claims": markdown(claim_rows()), "solved": markdown(solved_rows())}
