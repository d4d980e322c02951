"""The tables of the README from the stored results of the studies: `python -m recipes.studies --write` writes them."""

from collections.abc import Sequence
from statistics import mean

from dllm_rl.files import read_json
from recipes.studies import late_rollouts, low_bits_tuned, orders, orders_trained
from recipes.studies.order_flips import bias
from recipes.studies.paired import Results, by_arm, interval, markdown, paired

SHUFFLED = "shuffled TIS (control)"
Row = tuple[str, str, str, str | None]  # rollouts, correction, arm, the arm that it is compared with


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


def solved(results: Results, rows: Sequence[Row]) -> str:
    """The solve rates after training, and the paired differences from another row."""
    table = []
    numbers = {arm: number for number, (_, _, arm, _) in enumerate(rows, 1)}
    for rollouts, correction, arm, other in rows:
        runs = [run for (name, _), run in sorted(results.items()) if name == arm]
        row = {"row": str(numbers[arm]), "rollouts": rollouts, "correction": correction}
        row["solved"] = interval([run["after"] for run in runs])
        row["difference"] = f"{interval(paired(results, arm, other))} from row {numbers[other]}" if other else ""
        table.append(row)
    return markdown(table)


def main_job() -> str:
    """The arms of recipes/quantized_sudoku.py and their controls, on the seeds that have all of them."""
    rows: list[Row] = [
        ("the model itself", "none", "random: unquantized", None),
        ("an NVFP4 copy", "none", "random: nvfp4", "random: unquantized"),
        ("an NVFP4 copy", "TIS", "random: nvfp4, tis", "random: nvfp4"),
        ("an NVFP4 copy", SHUFFLED, "random: nvfp4, permuted", "random: nvfp4"),
        ("an NVFP4 copy", "half the learning rate (control)", orders_trained.HALF, "random: nvfp4"),
    ]
    stored = by_arm(read_json(orders_trained.STORED))
    planned = range(orders_trained.STUDY.seeds)
    whole = [seed for seed in planned if all((arm, seed) in stored for _, _, arm, _ in rows)]
    results = {key: run for key, run in stored.items() if key[1] in whole}
    before = interval([results["random: unquantized", seed]["before"] for seed in whole])
    heads = ["row", "rollouts of", "correction", "solved greedily", "solved at temperature 1", "difference"]
    heads += ["greedily", "at temperature 1"]
    lines = [["", "none: before RL", "", before, "", "", "", ""]]
    numbers = {arm: str(number) for number, (_, _, arm, _) in enumerate(rows, 1)}
    for rollouts, correction, arm, other in rows:
        line = [numbers[arm], rollouts, correction]
        line += [interval([results[arm, seed][column] for seed in whole]) for column in ("after", "sampled")]
        line.append(f"from row {numbers[other]}" if other else "")
        line += [interval(paired(results, arm, other, column)) if other else "" for column in ("after", "sampled")]
        lines.append(line)
    table = [dict(zip(heads, line, strict=True)) for line in lines]
    if len(whole) < len(planned):
        table = [row | {"seeds": f"{len(whole)} of {len(planned)}"} for row in table]
    return markdown(table)


def page_tables() -> dict[str, str]:
    int4, late_weights = "INT4 weights", "weights four updates old"
    low_bits = by_arm(read_json(low_bits_tuned.STORED)["runs"])
    late = by_arm(read_json(late_rollouts.STORED)["runs"])
    return {
        "main job": main_job(),
        "order": order(),
        "pretrained": solved(
            low_bits,
            [
                ("unquantized", "none", "unquantized", None),
                ("FP8 weights", "none", "FP8", "unquantized"),
                (int4, "none", "int4", "unquantized"),
                (int4, "TIS", "int4, tis", "int4"),
                (int4, "AIS", "int4, ais", "int4"),
                (int4, "aligned forward", "int4, aligned", "int4"),
                (int4, SHUFFLED, "int4, permuted tis", "int4"),
            ],
        ),
        "late": solved(
            late,
            [
                ("newest weights", "none", "lag 0", None),
                (late_weights, "none", "lag 4", "lag 0"),
                (late_weights, "TIS", "lag 4, tis", "lag 4"),
                (late_weights, "shuffled TIS (control)", "lag 4, placebo", "lag 4"),
                (late_weights, "dual clip", "lag 4, dual clip", "lag 4, tis"),
            ],
        ),
    }
