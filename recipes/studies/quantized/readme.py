"""The picture of the README, and the tables of README.md beside this file, which has the picture, too.

python -m recipes.studies --write        the tables, from the stored results of the studies
python -m recipes.studies.quantized.readme         the picture
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from textwrap import fill
from typing import Any

from dllm_rl.files import read_json, replacing
from dllm_rl.monitoring.plots import default_style
from recipes.studies.late import late_rollouts
from recipes.studies.paired import (
    Contrast,
    Results,
    benjamini_hochberg,
    by_arm,
    claimed_rows,
    counted,
    half_width,
    interval,
    markdown,
    paired,
    share,
    shown_side,
    sign_flip,
    verdict,
)
from recipes.studies.quantized import int4_orders, int4_orders_controls, low_bits_tuned, orders, orders_trained
from recipes.studies.quantized.order_flips import bias
from recipes.studies.quantized.orders import NAMES

PICTURE = Path(__file__).with_suffix(".png")
FORMATS = ("FP8", "INT4", "NVFP4")
ORDERS = {order: name.replace("`", "") for order, name in NAMES.items()}  # in the picture
STYLES: dict[str, dict[str, Any]] = {  # of the picture, by correction; the first two also in its first panel
    "none": {"color": "#d9772b", "marker": "o", "label": "no correction"},
    "TIS": {"color": "#3b7dd8", "marker": "s", "label": "TIS"},
    "shuffled TIS": {"color": "#888888", "marker": "x", "label": "shuffled TIS, a control"},
    "dual clip": {"color": "#2f9e6e", "marker": "D", "label": "dual clip"},
}


BETTER = {  # the claims about TIS, in the words of the page: as the studies end their own
    "TIS is better than no correction": "is above no corrector",
    "TIS is better than shuffled TIS": "is above its permuted weights",
    "TIS is better than no correction at half the learning rate": "is above half the rate",
}
COSTS = "the rollouts cost something"


@dataclass(frozen=True)
class Case:
    """Runs that train on the rollouts of a copy, with paired seeds."""

    copy: str
    task: str
    order: str
    results: Results
    best: str  # the arm whose rollouts are the best, usually those of the model itself
    plain: str  # the arm without a correction
    corrected: Mapping[str, str]  # by correction its arm
    claimed: Mapping[str, str]  # by claim in the words of the page: the claim of the study
    zero: str = ""  # of the picture: what `best` is, if it is not rollouts of the model itself

    @property
    def named(self) -> dict[str, str]:
        return {"rollouts": self.copy, "task": self.task, "order": self.order}

    def runs(self, arm: str) -> list[dict[str, Any]]:
        return [run for (name, _), run in sorted(self.results.items()) if name == arm]

    def share(self, arm: str | None, column: str) -> str:
        return interval([run[column] for run in self.runs(arm)]) if arm else "-"

    def gain(self, column: str, correction: str, over: str = "none") -> str:
        arm, other = ({"none": self.plain, **self.corrected}.get(name) for name in (correction, over))
        return counted(paired(self.results, arm, other, column)) if arm and other else "-"


SHUFFLED, HALF = "shuffled TIS", "no correction, half the learning rate"
SHORT, LONGER, SUMS, LATE = "Sudoku, short", "Sudoku, longer", "sums", "Sudoku, late"


def runs_of_studies() -> dict[str, Results]:
    """By task its runs."""
    return {
        SHORT: by_arm(read_json(orders_trained.STORED)),
        LONGER: by_arm([*read_json(int4_orders.STORED)["runs"], *read_json(int4_orders_controls.STORED)]),
        SUMS: by_arm(read_json(low_bits_tuned.STORED)["runs"]),
        LATE: by_arm(read_json(late_rollouts.STORED)["runs"]),
    }


def cases() -> list[Case]:
    studies = runs_of_studies()

    def short(copy: str, scheme: str, order: str = "random") -> Case:
        plain = f"{order}: {scheme}"
        arms = {"TIS": f"{plain}, tis", SHUFFLED: f"{plain}, permuted"}
        if plain == "random: nvfp4":
            arms[HALF] = orders_trained.HALF
        claimed = {better: f"{plain}, tis {ends}" for better, ends in BETTER.items() if order != "max_prob"}
        return Case(copy, SHORT, NAMES[order], studies[SHORT], f"{order}: unquantized", plain, arms, claimed)

    def longer(order: str, corrected: Mapping[str, str], claimed: Mapping[str, str]) -> Case:
        arms = (f"{order}: unquantized", f"{order}: int4", {"TIS": f"{order}: int4, tis", **corrected})
        return Case("INT4", LONGER, NAMES[order], studies[LONGER], *arms, claimed)

    none, shuffled, half = BETTER
    of_longer = {none: "random order: TIS is above no corrector"}
    of_longer |= {better: f"TIS {BETTER[better]}" for better in (shuffled, half)}
    of_sums = {"TIS": "tis", SHUFFLED: "permuted tis", "AIS": "ais", "aligned forward": "aligned"}
    of_late = {"TIS": "tis", SHUFFLED: "placebo", "dual clip": "dual clip"}
    return [
        short("FP8", "fp8"),
        short("FP8, inputs too", "fp8 with inputs"),
        Case("FP8", SUMS, "random", studies[SUMS], "unquantized", "FP8", {}, {}),
        short("NVFP4", "nvfp4"),
        short("NVFP4", "nvfp4", "left_to_right"),
        short("NVFP4", "nvfp4", "max_prob"),
        short("INT4", "int4"),
        longer(
            "random",
            {SHUFFLED: int4_orders_controls.PERMUTED, HALF: int4_orders_controls.HALF},
            of_longer,
        ),
        longer(
            "max_prob",
            {},
            {COSTS: "MaxProb: unquantized is above INT4", none: "MaxProb: TIS is above no corrector"},
        ),
        Case(
            "INT4",
            SUMS,
            "random",
            studies[SUMS],
            "unquantized",
            "int4",
            {name: f"int4, {arm}" for name, arm in of_sums.items()} | {HALF: low_bits_tuned.HALF},
            {COSTS: "INT4 costs something"} | {better: f"TIS {ends}" for better, ends in BETTER.items()},
        ),
        Case(
            "FP8, four updates old",
            LATE,
            "`MaxProb`",
            studies[LATE],
            "lag 0",
            "lag 4",
            {name: f"lag 4, {arm}" for name, arm in of_late.items()},
            {
                COSTS: "a lag of 4 costs something",
                none: "at a lag of 4 TIS is above no corrector",
                shuffled: "at a lag of 4 TIS is above its placebo",
            },
            "\n(0: new FP8)",
        ),
    ]


def measured(column: str) -> list[Case]:
    """The cases whose models were evaluated so."""
    return [case for case in cases() if all(column in run for run in case.runs(case.plain))]


def solved(column: str) -> str:
    """The share of the held-out problems that each arm solves."""
    rows = []
    for case in measured(column):
        row = case.named
        if column == "after":
            row["before training"] = case.share(case.best, "before")
        row |= {
            "own rollouts": case.share(case.best, column),
            "no correction": case.share(case.plain, column),
            "TIS": case.share(case.corrected.get("TIS"), column),
            SHUFFLED: case.share(case.corrected.get(SHUFFLED), column),
        }
        if column == "after":
            row["ESS"] = f"{mean(run['ess'] for run in case.runs(case.plain)):.3f}"
        rows.append(row)
    return markdown(rows)


def differences(column: str) -> str:
    """What the rollouts of a copy cost, and what a correction gains: differences of paired seeds."""
    return markdown(
        [
            case.named
            | {
                "cost without a correction": counted(paired(case.results, case.best, case.plain, column)),
                "gain of TIS": case.gain(column, "TIS"),
                f"gain of {SHUFFLED}": case.gain(column, SHUFFLED),
                f"TIS minus {SHUFFLED}": case.gain(column, "TIS", SHUFFLED),
            }
            for case in measured(column)
        ]
    )


def other_arms() -> str:
    """The arms that only some of the cases have."""
    return markdown(
        [
            {"arm": name}
            | case.named
            | {
                "solved": case.share(arm, "after"),
                "minus no correction": case.gain("after", name),
                "TIS minus this arm": case.gain("after", "TIS", name),
                "minus no correction, at temperature 1": (
                    case.gain("sampled", name) if "sampled" in case.runs(arm)[0] else "-"
                ),
            }
            for name in (HALF, "AIS", "aligned forward", "dual clip")
            for case in cases()
            if (arm := case.corrected.get(name))
        ]
    )


def copies() -> str:
    """What the four-bit copy of a trained model solves, greedily."""
    rows = []
    for case in cases():
        if case.copy in ("NVFP4", "INT4"):
            tis, deployed = case.corrected["TIS"], "quantized"
            apart = [run[deployed] - run["after"] for run in case.runs(case.plain)]
            rows.append(
                case.named
                | {
                    "trained without a correction": case.share(case.plain, deployed),
                    "trained with TIS": case.share(tis, deployed),
                    "gain of TIS": counted(paired(case.results, tis, case.plain, deployed)),
                    "copy minus full precision, no correction": counted(apart),
                }
            )
    return markdown(rows)


def families() -> dict[str, tuple[str, Mapping[str, Sequence[float]]]]:
    """By name of a group of claims, as a link: its task, and by claim what is above zero where it holds. Holm's
    correction is over a group."""

    def of(contrasts: Sequence[Contrast], results: Results) -> dict[str, list[float]]:
        return {each.claim: paired(results, each.arm, each.against, each.column) for each in contrasts}

    studies = runs_of_studies()
    short, long = orders_trained.families(studies[SHORT]), studies[LONGER]
    return {
        "Sudoku, short: NVFP4, random order": (SHORT, short["nvfp4, the learner"]),
        "Sudoku, short: the NVFP4 copy": (SHORT, short["nvfp4, the copy"]),
        "Sudoku, short: FP8 and INT4": (SHORT, short["formats"]),
        "Sudoku, short: NVFP4, other orders": (
            SHORT,
            short["orders"],
        ),
        "Sudoku, short: the order, own rollouts": (
            SHORT,
            short["the order by itself"],
        ),
        "Sudoku, longer: INT4": (LONGER, int4_orders.claims(long)),
        "Sudoku, longer: controls": (
            LONGER,
            int4_orders_controls.claims(long),
        ),
        "sums": (
            SUMS,
            of(low_bits_tuned.STUDY.contrasts, studies[SUMS]),
        ),
        "[Sudoku, late](../late/README.md)": (LATE, of(late_rollouts.CLAIMS, studies[LATE])),
    }


def verdicts() -> dict[tuple[str, str], str]:
    """By task and claim what was found, with Holm's p."""
    found = {}
    for task, claims in families().values():
        for row in claimed_rows(claims):
            word, p = verdict(row) if shown_side(row) else "undecided", row["Holm's p"]
            found[task, row["stated before the runs"]] = f"{word} ({p})"
    return found


def by_decoding(found: Mapping[tuple[str, str], str], task: str, claim: str | None) -> dict[str, str]:
    """What was found of a claim, by decoding; one without a decoding in its name is about greedy decoding."""
    return {
        "greedy": found.get((task, f"{claim}, greedy")) or found.get((task, str(claim)), "-"),
        "temperature 1": found.get((task, f"{claim}, temperature 1"), "-"),
    }


def claims_of_cases() -> str:
    """Which claims about the cost and about TIS are shown."""
    found, rows = verdicts(), []
    for case in cases():
        row = case.named
        for words in (COSTS, *BETTER):
            both = by_decoding(found, case.task, case.claimed.get(words))
            late = both["temperature 1"]
            row[words] = both["greedy"] if late == "-" else f"{both['greedy']}; at temperature 1 {late}"
        if case.claimed:
            rows.append(row)
    return markdown(rows)


OTHER_CLAIMS = {  # in the words of the page: task, the claim of the study
    "Without a correction, the NVFP4 copy is better than the full-precision model.": (
        SHORT,
        "without a corrector the copy is above the learner",
    ),
    "The NVFP4 copy is better with TIS than without.": (SHORT, "the copy with TIS is above the copy without"),
    "With NVFP4, TIS minus shuffled TIS is larger in random order than under `MaxProb`.": (
        SHORT,
        "TIS gains more over its permuted weights in random order than under MaxProb",
    ),
    "On own rollouts, random order is better than `MaxProb`.": (SHORT, "unquantized, random order is above MaxProb"),
    "INT4 with TIS costs less in random order than under `MaxProb`.": (
        LONGER,
        "INT4 with TIS loses less in random order",
    ),
    "AIS is better than no correction.": (SUMS, "AIS is above no corrector"),
    "The INT4 copy is better with the aligned forward than with no correction.": (
        SUMS,
        "the aligned forward's INT4 weights are above those of no corrector",
    ),
    "A lag of 1 costs something.": (LATE, "a lag of 1 costs something"),
    "A lag of 2 costs something.": (LATE, "a lag of 2 costs something"),
    "A lag of 8 costs something.": (LATE, "a lag of 8 costs something"),
    "At a lag of 1, the dual clip is better than no correction.": (
        LATE,
        "at a lag of 1 the dual clip is above no corrector",
    ),
    "At a lag of 4, the dual clip is better than no correction.": (
        LATE,
        "at a lag of 4 the dual clip is above no corrector",
    ),
    "At a lag of 8, the dual clip is better than no correction.": (
        LATE,
        "at a lag of 8 the dual clip is above no corrector",
    ),
    "At a lag of 4, the dual clip is better than TIS.": (LATE, "at a lag of 4 the dual clip is above TIS"),
    "At a lag of 4, AIS is better than no correction.": (LATE, "at a lag of 4 AIS is above no corrector"),
}


def other_claims() -> str:
    found = verdicts()
    return markdown(
        [
            {"task": task, "claim": words} | by_decoding(found, task, claim)
            for words, (task, claim) in OTHER_CLAIMS.items()
        ]
    )


def counts() -> str:
    """By group of claims how many there are, how many are shown, and how many of these and of all are kept if all
    groups are one, by Benjamini and Hochberg at 5 %."""
    found, groups = verdicts(), families()
    p_values = [sign_flip(values) for _, claims in groups.values() for values in claims.values()]
    kept = iter(benjamini_hochberg(p_values))
    rows = []
    for name, (task, claims) in groups.items():
        shown = [found[task, claim].startswith("shown") for claim in claims]
        stays = [next(kept) for _ in claims]
        both = [a and b for a, b in zip(shown, stays, strict=True)]
        rows.append([name, *map(str, (len(claims), sum(shown), sum(both), sum(stays)))])
    rows.append(["all", *(str(sum(int(row[column]) for row in rows)) for column in range(1, 5))])
    heads = ("group", "claims", "shown", "of these kept", "kept in all")
    return markdown([dict(zip(heads, row, strict=True)) for row in rows])


def won_back() -> str:
    """Of INT4 in random order what TIS gains of the cost, and what it leaves."""
    rows = []
    for column, how in {"after": "greedy", "sampled": "temperature 1"}.items():
        for case in measured(column):
            if (case.copy, case.order) == ("INT4", "random"):
                tis = case.corrected["TIS"]
                part = share(case.results, tis, case.plain, case.best, column)
                rows.append({"task": case.task, "decoding": how, "TIS wins back of the cost": part})
                rows[-1]["own rollouts minus TIS"] = counted(paired(case.results, case.best, tis, column))
    return markdown(rows)


def stored_runs() -> str:
    """By study its runs, the trials of its learning rates, and the time of both."""
    rows = []
    for study, task in {
        orders_trained: SHORT,
        int4_orders: LONGER,
        int4_orders_controls: f"{LONGER}, controls",
        low_bits_tuned: SUMS,
        late_rollouts: LATE,
    }.items():
        kept, name = read_json(study.STORED), study.STORED.stem
        runs, trials = (kept["runs"], kept["tuning"]) if isinstance(kept, dict) else (kept, [])
        rows.append(
            {
                "task": task,
                "command": f"`python -m {study.__name__}`",
                "data": f"[{name}.json]({'../late/' if study is late_rollouts else ''}{name}.json)",
                "runs": str(len(runs)),
                "hours": f"{sum(run['s'] for run in runs) / 3600:.1f}",
                "minutes of one run": f"{median(run['s'] for run in runs) / 60:.1f}",
                "trials of learning rates": str(len(trials)),
                "hours of trials": f"{sum(run['s'] for run in trials) / 3600:.1f}" if trials else "-",
            }
        )
    return markdown(rows)


def point(axis: Any, place: float, values: Sequence[float], style: str) -> None:
    """Draw the mean and its 95 % interval."""
    axis.errorbar([place], [mean(values)], [half_width(values)], linestyle="", capsize=3, **STYLES[style])


def draw(path: Path) -> None:
    """The error of the gradient by order and format, and what a trained model loses to the rollouts of a copy."""
    models = read_json(orders.STORED)
    with replacing(path) as partial, default_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 8.5), layout="constrained")
        exact, after = figure.subplots(2, 1)
        places = {(order, copy): 4 * i + j for i, order in enumerate(ORDERS) for j, copy in enumerate(FORMATS)}
        for shift, weights, name in ((-0.14, "none", "none"), (0.14, "tis", "TIS")):
            for (order, copy), place in places.items():
                point(exact, place + shift, [bias(model, order, copy, weights) for model in models], name)
        labels = {
            place: f"{copy}\n\n{ORDERS[order]}" if copy == "INT4" else copy for (order, copy), place in places.items()
        }
        exact.set_xticks(list(labels), list(labels.values()), fontsize=8)
        exact.set(title="Error of the policy gradient", ylabel="length, relative to the true gradient", ylim=(0, None))
        exact.set_xlabel("format of the copy, and order of unmasking")

        rows = cases()
        for place, case in enumerate(rows):
            arms = {"none": case.plain} | {name: arm for name, arm in case.corrected.items() if name in STYLES}
            for index, (name, arm) in enumerate(arms.items()):
                shift = 0.2 * (index - (len(arms) - 1) / 2)
                point(after, place + shift, paired(case.results, arm, case.best), name)
        after.axhline(0, color="black", linewidth=0.8)
        tasks = [case.task.replace(", short", "").replace(", late", "") for case in rows]
        tasks = [
            task if case.order == "random" else f"{task}, {case.order.replace('`', '')}"
            for task, case in zip(tasks, rows, strict=True)
        ]
        names = [f"{fill(case.copy, 11)}\n{fill(task, 11)}{case.zero}" for task, case in zip(tasks, rows, strict=True)]
        after.set_xticks(range(len(rows)), names, fontsize=8)
        after.set(
            title="Held-out problems solved after training", ylabel="share, minus that of training on own rollouts"
        )
        for axis in (exact, after):
            axis.grid(alpha=0.3, axis="y")
        found = dict(zip(*after.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=len(found))
        figure.savefig(partial, dpi=110, format="png")


def page_tables() -> dict[str, str]:
    return {
        "runs": stored_runs(),
        "solved": solved("after"),
        "differences": differences("after"),
        "solved at temperature 1": solved("sampled"),
        "differences at temperature 1": differences("sampled"),
        "won back": won_back(),
        "other arms": other_arms(),
        "copies": copies(),
        "claims": claims_of_cases(),
        "other claims": other_claims(),
        "groups of claims": counts(),
    }


if __name__ == "__main__":
    draw(PICTURE)
