"""The picture of the README, and the tables of quantized_rollouts.md, which has the picture, too.

python -m recipes.studies --write        the tables, from the stored results of the studies
python -m recipes.studies.readme         the picture
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import Any

from dllm_rl.files import read_json, replacing
from dllm_rl.monitoring.plots import default_style
from recipes.studies import int4_orders, int4_orders_controls, late_rollouts, low_bits_tuned, orders, orders_trained
from recipes.studies.order_flips import bias
from recipes.studies.paired import Contrast, Results, by_arm, half_width, holm, interval, markdown, paired, sign_flip

PICTURE = Path(__file__).with_suffix(".png")
FORMATS = ("FP8", "INT4", "NVFP4")
ORDERS = {"random": "random", "left_to_right": "left to right", "max_prob": "MaxProb"}
STYLES: dict[str, dict[str, Any]] = {  # of the picture, by correction; the first two also in its first panel
    "none": {"color": "#d9772b", "marker": "o", "label": "no correction"},
    "TIS": {"color": "#3b7dd8", "marker": "s", "label": "TIS"},
    "shuffled TIS": {"color": "#888888", "marker": "x", "label": "shuffled TIS, a control"},
    "dual clip": {"color": "#2f9e6e", "marker": "D", "label": "dual clip"},
}


def counted(differences: Sequence[float]) -> str:
    """The mean with its interval, and how many of the seeds are above zero."""
    return f"{interval(differences)} ({sum(each > 0 for each in differences)} of {len(differences)})"


@dataclass(frozen=True)
class Case:
    """Runs that train on the rollouts of a copy, with paired seeds."""

    copy: str
    task: str
    results: Results
    best: str  # the arm whose rollouts are the best, usually those of the model itself
    plain: str  # the arm without a correction
    corrected: Mapping[str, str] = field(default_factory=dict)  # by correction its arm
    zero: str = ""  # of the picture: what `best` is, if it is not rollouts of the model itself

    def gain(self, column: str, correction: str, over: str = "none") -> str:
        arm, other = ({"none": self.plain, **self.corrected}.get(name) for name in (correction, over))
        return counted(paired(self.results, arm, other, column)) if arm and other else "-"


def cases() -> list[Case]:
    short = by_arm(read_json(orders_trained.STORED))
    long = by_arm([*read_json(int4_orders.STORED)["runs"], *read_json(int4_orders_controls.STORED)])
    sums = by_arm(read_json(low_bits_tuned.STORED)["runs"])
    late = by_arm(read_json(late_rollouts.STORED)["runs"])

    def sudoku(scheme: str, order: str = "random") -> Mapping[str, str]:
        return {"TIS": f"{order}: {scheme}, tis", "shuffled TIS": f"{order}: {scheme}, permuted"}

    def nvfp4(order: str, name: str) -> Case:
        arms = (f"{order}: unquantized", f"{order}: nvfp4", sudoku("nvfp4", order))
        return Case("NVFP4", f"Sudoku, {name}", short, *arms)

    own, mine = "random: unquantized", "unquantized"
    int4 = {"TIS": "random: int4, tis", "shuffled TIS": "random: int4, permuted tis"}
    of_sums = {name: f"int4, {arm}" for name, arm in (("TIS", "tis"), ("shuffled TIS", "permuted tis"), ("AIS", "ais"))}
    of_lag = {name: f"lag 4, {arm}" for name, arm in (("TIS", "tis"), ("shuffled TIS", "placebo"))}
    of_lag["dual clip"] = "lag 4, dual clip"
    of_sums["aligned forward"] = "int4, aligned"
    return [
        Case("FP8", "Sudoku", short, own, "random: fp8", sudoku("fp8")),
        Case("FP8, inputs too", "Sudoku", short, own, "random: fp8 with inputs", sudoku("fp8 with inputs")),
        Case("FP8", "sums", sums, mine, "FP8"),
        nvfp4("random", "main job"),
        nvfp4("left_to_right", "left to right"),
        nvfp4("max_prob", "`MaxProb`"),
        Case("INT4", "Sudoku", short, own, "random: int4", sudoku("int4")),
        Case("INT4", "Sudoku, longer", long, own, "random: int4", int4),
        Case(
            "INT4",
            "Sudoku, longer, `MaxProb`",
            long,
            "max_prob: unquantized",
            "max_prob: int4",
            {"TIS": "max_prob: int4, tis"},
        ),
        Case("INT4", "sums", sums, mine, "int4", of_sums),
        Case("FP8, four updates old", "Sudoku, `MaxProb`", late, "lag 0", "lag 4", of_lag, "\n(0: new FP8)"),
    ]


def training(column: str) -> str:
    """What quantized or old rollouts cost, and what a correction gains: differences of paired seeds."""
    rows = []
    for case in cases():
        if not all(column in run for (arm, _), run in case.results.items() if arm == case.plain):
            continue
        others = [f"{name} {case.gain(column, name)}" for name in case.corrected if name not in ("TIS", "shuffled TIS")]
        ess = mean(run["ess"] for (arm, _), run in case.results.items() if arm == case.plain)
        row = {"rollouts of a copy in": case.copy, "task": case.task}
        row |= {"ESS": f"{ess:.3f}"} if column == "after" else {}
        own = [run for (arm, _), run in case.results.items() if arm == case.best]
        row |= {"solved before RL": interval([run["before"] for run in own])} if column == "after" else {}
        row["solved after own rollouts"] = interval([run[column] for run in own])
        rows.append(
            row
            | {
                "cost without a correction": counted(paired(case.results, case.best, case.plain, column)),
                "gain of TIS": case.gain(column, "TIS"),
                "gain of shuffled TIS": case.gain(column, "shuffled TIS"),
                "TIS less shuffled TIS": case.gain(column, "TIS", "shuffled TIS"),
                "gain of others": ", ".join(others) or "-",
            }
        )
    return markdown(rows)


def together(claims: Sequence[str]) -> str:
    """The claims as one cell; two that differ in the decoding alone are one entry."""
    entries = []
    for claim in claims:
        what, _, how = claim.rpartition(", ")
        if how == "greedy" and f"{what}, temperature 1" in claims:
            entries.append(f"{what}, greedy and at temperature 1")
        elif how != "temperature 1" or f"{what}, greedy" not in claims:
            entries.append(claim)
    return "; ".join(entries) or "-"


def claims() -> str:
    """Of each study of training, how many of its claims are shown after Holm's correction, and which."""

    def of(contrasts: Sequence[Contrast], results: Results) -> dict[str, list[float]]:
        return {each.claim: paired(results, each.arm, each.against, each.column) for each in contrasts}

    short = orders_trained.families(by_arm(read_json(orders_trained.STORED)))
    long = by_arm(read_json(int4_orders.STORED)["runs"])
    controlled = long | by_arm(read_json(int4_orders_controls.STORED))
    sums = by_arm(read_json(low_bits_tuned.STORED)["runs"])
    late = by_arm(read_json(late_rollouts.STORED)["runs"])
    of_studies: dict[str, Mapping[str, Sequence[float]]] = {
        "[NVFP4, random order: the full-precision model](orders_trained.md#nvfp4)": short["nvfp4, the learner"],
        "[NVFP4, random order: the four-bit copy](orders_trained.md#nvfp4)": short["nvfp4, the copy"],
        "[FP8 and INT4, random order](orders_trained.md#fp8-and-int4)": short["formats"],
        "[NVFP4, other orders](orders_trained.md#left-to-right-and-under-maxprob)": short["orders"],
        "[the order, without quantization](orders_trained.md#the-order-by-itself)": short["the order by itself"],
        "[INT4, longer, both orders](order_flips.md#training-in-both-orders)": int4_orders.claims(long),
        "[INT4, longer, random order: controls](order_flips.md#training-in-both-orders)": int4_orders_controls.claims(
            controlled
        ),
        "[sums, random order](low_bits.md#at-rates-tuned-for-each-arm)": of(low_bits_tuned.STUDY.contrasts, sums),
        "[old FP8 copies, `MaxProb`](late_rollouts.md)": of(late_rollouts.CLAIMS, late),
    }
    rows = []
    for study, found in of_studies.items():
        tests = dict(zip(found, holm([sign_flip(values) for values in found.values()]), strict=True))
        names = {claim: claim.removeprefix("random: ") for claim in tests}
        shown = [
            ("" if mean(found[claim]) > 0 else "the opposite of ") + names[claim]
            for claim, p in tests.items()
            if p < 0.05
        ]
        row = {"claims about": study, "claims": str(len(found)), "shown": str(len(shown))}
        undecided = [names[claim] for claim, p in tests.items() if p >= 0.05]
        rows.append(row | {"which are shown": together(shown), "which are undecided": together(undecided)})
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
        names = [f"{fill(case.copy, 11)}\n{fill(case.task, 11)}{case.zero}".replace("`", "") for case in rows]
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
        "training": training("after"),
        "training at temperature 1": training("sampled"),
        "claims in training": claims(),
    }


if __name__ == "__main__":
    draw(PICTURE)
