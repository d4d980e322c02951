"""The tables of the README from the stored results of the studies: `python -m recipes.studies --write` writes them."""

from collections.abc import Sequence
from statistics import mean

from dllm_rl.files import read_json
from recipes.studies import int4_orders, int4_orders_controls, late_rollouts, low_bits_tuned, orders
from recipes.studies.order_flips import bias
from recipes.studies.paired import Results, by_arm, interval, markdown, paired

TIS = "TIS"
PERMUTED = "control: the importance weights of TIS, shuffled over the tokens"
HALF = "control: half the learning rate"
Row = tuple[str, str, str, str | None]  # rollouts, correction, arm, the arm that it is compared with


def order() -> str:
    """The share of the gradient's bias, by order and format."""
    models = read_json(orders.STORED)
    rows = []
    for copied in ("FP8", "INT4", "NVFP4"):
        row = {"rollouts": f"{copied} weights"}
        for name, head in (("random", "random order"), ("max_prob", "most confident first")):
            for weights, what in (("none", "no correction"), ("tis", "TIS")):
                row[f"{head}, {what}"] = f"{mean(bias(model, name, copied, weights) for model in models):.2f}"
        rows.append(row)
    return markdown(rows)


def solved(results: Results, rows: Sequence[Row]) -> str:
    """The solve rates after training, with their start, and the paired differences."""
    table = []
    for rollouts, correction, arm, other in rows:
        runs = [run for (name, _), run in sorted(results.items()) if name == arm]
        difference = interval(paired(results, arm, other)) if other else ""
        table.append(
            {
                "rollouts": rollouts,
                "correction": correction,
                "solved": interval([run["after"] for run in runs]),
                "difference": difference,
            }
        )
    return markdown(table)


def page_tables() -> dict[str, str]:
    int4 = "INT4 weights"
    low_bits = by_arm(read_json(low_bits_tuned.STORED)["runs"])
    sudoku = by_arm([*read_json(int4_orders_controls.STORED), *read_json(int4_orders.STORED)["runs"]])
    late = by_arm(read_json(late_rollouts.STORED)["runs"])
    names = [name for name, _ in sudoku]
    permuted = next(name for name in names if "permuted" in name)
    half = next(name for name in names if "half" in name)
    return {
        "order": order(),
        "pretrained": solved(
            low_bits,
            [
                ("unquantized", "none", "unquantized", None),
                ("FP8 weights", "none", "FP8", "unquantized"),
                (int4, "none", "int4", "unquantized"),
                (int4, TIS, "int4, tis", "int4"),
                (int4, "AIS, with our own lambda", "int4, ais", "int4"),
                (int4, "aligned forward (QaRL)", "int4, aligned", "int4"),
                (int4, PERMUTED, "int4, permuted tis", "int4"),
                (int4, HALF, "int4 at half the rate", "int4"),
            ],
        ),
        "from scratch": solved(
            sudoku,
            [
                ("unquantized", "none", "random: unquantized", None),
                (int4, "none", "random: int4", "random: unquantized"),
                (int4, TIS, "random: int4, tis", "random: int4"),
                (int4, PERMUTED, permuted, "random: int4"),
                (int4, HALF, half, "random: int4"),
            ],
        ),
        "late": solved(
            late,
            [
                ("newest weights", "none", "lag 0", None),
                ("weights four updates old", "none", "lag 4", "lag 0"),
                ("weights four updates old", TIS, "lag 4, tis", "lag 4"),
                ("weights four updates old", "dual clip of the ratio to the sampler", "lag 4, dual clip", "lag 4"),
            ],
        ),
    }
