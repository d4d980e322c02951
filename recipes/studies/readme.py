"""The tables of the README from the stored results of the studies: `python -m recipes.studies --write` writes them."""

from collections.abc import Sequence
from statistics import mean

from dllm_rl.files import read_json
from recipes.studies import int4_orders, int4_orders_controls, late_rollouts, low_bits_tuned, orders, orders_trained
from recipes.studies.order_flips import bias
from recipes.studies.paired import Results, by_arm, interval, markdown, paired

NVFP4, FP8 = "random: nvfp4", "random: fp8"
Row = tuple[str, str, str, str, str, str]  # copy, its arm, the arm without the copy, correction, its arm, control


def order() -> str:
    """The share of the gradient's bias, by order and format."""
    models = read_json(orders.STORED)
    rows = []
    for copied in ("FP8", "INT4", "NVFP4"):
        row = {"rollouts": f"{copied} weights"}
        for name, head in (("random", "random"), ("left_to_right", "left to right"), ("max_prob", "`MaxProb`")):
            errors = [mean(bias(model, name, copied, weights) for model in models) for weights in ("none", "tis")]
            row[f"{head}: without, with TIS"] = ", ".join(f"{error:.2f}" for error in errors)
        rows.append(row)
    return markdown(rows)


def arms(results: Results, task: str, rows: Sequence[Row]) -> list[dict[str, str]]:
    """What quantized or old rollouts cost in training, and what a correction gains. All are differences of paired
    seeds.
    """
    table = []
    for copy, plain, best, correction, corrected, shuffled in rows:
        gain, control = (interval(paired(results, arm, plain)) if arm else "-" for arm in (corrected, shuffled))
        table.append(
            {
                "trained on, and the order of sampling": task,
                "rollouts of": copy,
                "cost without a correction": interval(paired(results, best, plain)),
                "correction": correction or "-",
                "gain of the correction": gain,
                "gain of shuffled TIS": control,
            }
        )
    return table


def training() -> str:
    """The corrections in training: the main job, and three studies."""
    long = [*read_json(int4_orders.STORED)["runs"], *read_json(int4_orders_controls.STORED)]
    int4, max_prob, numbers, lag = "random: int4", "max_prob: int4", "int4", "lag 4"
    rows = arms(
        by_arm(read_json(orders_trained.STORED)),
        "4x4 Sudoku for 60 steps (the main job), random",
        [
            ("an NVFP4 copy", NVFP4, "random: unquantized", "TIS", f"{NVFP4}, tis", f"{NVFP4}, permuted"),
            ("an FP8 copy", FP8, "random: unquantized", "TIS", f"{FP8}, tis", f"{FP8}, permuted"),
        ],
    )
    rows += arms(
        by_arm(long),
        "4x4 Sudoku for 180 steps, random",
        [("an INT4 copy", int4, "random: unquantized", "TIS", f"{int4}, tis", f"{int4}, permuted tis")],
    )
    rows += arms(
        by_arm(long),
        "4x4 Sudoku for 180 steps, `MaxProb`",
        [("an INT4 copy", max_prob, "max_prob: unquantized", "TIS", f"{max_prob}, tis", "")],
    )
    rows += arms(
        by_arm(read_json(low_bits_tuned.STORED)["runs"]),
        "SmolLM2-135M on sums, random",
        [
            ("an FP8 copy", "FP8", "unquantized", "", "", ""),
            ("an INT4 copy", numbers, "unquantized", "TIS", "int4, tis", "int4, permuted tis"),
            ("an INT4 copy", numbers, "unquantized", "AIS", "int4, ais", ""),
            ("an INT4 copy", numbers, "unquantized", "aligned forward", "int4, aligned", ""),
        ],
    )
    rows += arms(
        by_arm(read_json(late_rollouts.STORED)["runs"]),
        "4x4 Sudoku for 80 steps, `MaxProb`",
        [
            ("an FP8 copy, four updates old", lag, "lag 0", "TIS", "lag 4, tis", "lag 4, placebo"),
            ("an FP8 copy, four updates old", lag, "lag 0", "dual clip", "lag 4, dual clip", ""),
        ],
    )
    return markdown(rows)


def page_tables() -> dict[str, str]:
    return {"order": order(), "training": training()}
