"""How much of the bias of quantized rollouts do token weights remove, by order of unmasking? Claims before the runs.

All is exact, as in order_flips.py: trained models of 4x4 Sudoku with five blanks, one cell a step, all outcomes in all
orders enumerated, and the mean gradient of a quantized copy's rollouts compared with the gradient of the learner's own
expected reward. Biases are in lengths of the true gradient of their order. Twenty models that no study has had (seeds
30 to 49), three puzzles of their own each.

orders     max_prob, a function of the weights; random and left_to_right, which do not depend on them
copies     FP8 (e4m3, weights alone), FP8 with inputs (W8A8, a scale per token), INT4 (groups of 32, weights alone),
           NVFP4 (weights alone), NVFP4 with inputs (W4A4)
weights    none; tis (cap 2); ais, with the lambda of this library, as the paper's formula was not available: nearly
           inert where the mismatch is small (0.2 at 0.007 nats); cis, whose cap falls from 3.3 to 1.01 as the token's
           probability p rises, 1 + 2.3 max(1 - p, 0.005), read from a summary of arXiv 2609.32444; aligned: the copy's
           own gradient at its own weights

The claims, two-sided, by flipping the signs of the models' numbers, Holm's correction over all 26:

1. For each copy, in random order and left to right: TIS leaves less bias than no corrector (10 claims).
2. For each copy with quantized weights alone, in both orders: TIS leaves less than a third of it (6 claims).
3. For each copy and both orders: TIS leaves a smaller share of it than under max_prob. Shares are compared by their
   logarithms, as the share of a small bias may be any number (10 claims).

Known before the runs: order_flips.json, order_flips_controls.json, and pilots that stored nothing here: six models with
FP8 (max_prob 0.119 without a corrector, 0.055 with TIS; random order 0.145, 0.012), and three with the formats of four
bits (random order: INT4 0.407, 0.058, NVFP4 0.571, 0.066, with inputs 0.647, 0.182; left to right: 0.282, 0.044, 0.382,
0.074, 0.527, 0.213; max_prob: 0.865, 0.783, 0.638, 0.505, 0.611, 0.429), in which TIS was below none in every model in
both orders without weights.

    python -m recipes.studies.quantized.orders            run what is missing, orders.json, the tables
    python -m recipes.studies.quantized.orders --report   run nothing
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dllm_rl import NVFP4, FakeQuantize, Float8WeightOnly, Int4WeightOnly, Scheme
from dllm_rl.files import read_json, write_json
from dllm_rl.quantization.rollout_policy import quantized_copy
from recipes.studies.paired import claimed_rows, interval, markdown, verdict
from recipes.studies.quantized.order_flips import PUZZLES, Model, Setting, bias, canvases, measured, trained
from recipes.sudoku_tiny import few_clues

STORED = Path(__file__).with_suffix(".json")  # by model: rewards, lengths, flips, and every bias
SEEDS = range(30, 50)
ORDERS = ("random", "left_to_right", "max_prob")
NAMES = {"random": "random", "left_to_right": "left to right", "max_prob": "`MaxProb`"}  # of the orders, in tables
COPIES: dict[str, Scheme] = {
    "FP8": Float8WeightOnly(dequantized=True),
    "FP8 with inputs": FakeQuantize(weight="e4m3", activation="e4m3"),
    "INT4": Int4WeightOnly(),
    "NVFP4": NVFP4(),
    "NVFP4 with inputs": NVFP4(inputs=True),
}
ROUNDS = (("none", "tis", "ais"), ("cis", "aligned"))  # those of the claims in all models first


def run_model(seed: int, weights: Sequence[str]) -> dict[str, Any]:
    """Train the model of a seed, and measure it on puzzles of its own."""
    policy, steps = trained(seed)
    task = few_clues(split="test", clues=(11, 11), unique=True, size=PUZZLES * SEEDS.stop)
    every = [canvases(task[PUZZLES * seed + i].fields["puzzle"], policy) for i in range(PUZZLES)]
    copies = {name: quantized_copy(policy, scheme) for name, scheme in COPIES.items()}
    chosen = [Setting(*each) for each in product(ORDERS, COPIES, weights)]
    return {"seed": seed, "steps": steps, **measured(policy, copies, every, chosen, directions=0)}


def is_whole(model: Model) -> bool:
    """Whether the model has the second round, too."""
    return str(Setting(ORDERS[0], "FP8", ROUNDS[1][0])) in model["settings"]


LESS, THIRD, SHARE = "less than none", "less than a third", "a smaller share than under max_prob (logarithms)"


def claim(order: str, copied: str, what: str) -> str:
    return f"{order}, {copied}: TIS leaves {what}"


def claims(models: Sequence[Model]) -> Mapping[str, list[float]]:
    """By claim the number of each model that is above 0 where it holds."""
    found: dict[str, list[float]] = {}

    def left(model: Model, order: str, copied: str) -> float:
        """The share of the bias that TIS leaves."""
        return bias(model, order, copied, "tis") / bias(model, order, copied, "none")

    for order, copied in product(("random", "left_to_right"), COPIES):
        none, tis = ([bias(model, order, copied, weights) for model in models] for weights in ("none", "tis"))
        found[claim(order, copied, LESS)] = [a - b for a, b in zip(none, tis, strict=True)]
        if "inputs" not in copied:
            thirds = [a / 3 - b for a, b in zip(none, tis, strict=True)]
            found[claim(order, copied, THIRD)] = thirds
        found[claim(order, copied, SHARE)] = [
            log(left(model, "max_prob", copied)) - log(left(model, order, copied)) for model in models
        ]
    return found


def named_rows() -> list[dict[str, str]]:
    """The first columns of a table: every order and copy."""
    return [
        {"order": NAMES[order], "copy": copied.replace(" with inputs", ", inputs too")}
        for order, copied in product(ORDERS, COPIES)
    ]


def error_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By order and copy: the error without a correction and with TIS, the share of it that TIS leaves (of the means),
    and the share of steps that write another cell than the learner would."""
    rows = named_rows()
    for row, (order, copied) in zip(rows, product(ORDERS, COPIES), strict=True):
        none, tis = ([bias(model, order, copied, weights) for model in models] for weights in ("none", "tis"))
        row |= {"error, no correction": interval(none), "error, TIS": interval(tis)}
        row["TIS leaves"] = f"{mean(tis) / mean(none):.2f}"
        flips = [model["flips"][copied] for model in models]
        row["steps that write another cell"] = interval(flips) if order == "max_prob" else "0"
    return rows


def correction_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By order and copy: the error under each of the weights."""
    heads = {
        "none": "no correction",
        "tis": "TIS",
        "cis": "CIS",
        "ais": "AIS (our lambda)",
        "aligned": "aligned forward",
    }
    rows = named_rows()
    for row, (order, copied) in zip(rows, product(ORDERS, COPIES), strict=True):
        row |= {
            head: interval([bias(model, order, copied, weights) for model in models]) for weights, head in heads.items()
        }
    return rows


def claim_rows(models: Sequence[Model]) -> list[dict[str, str]]:
    """By order and copy: whether each of its claims is shown, and the p of Holm's correction over all claims."""
    row_of = {row["stated before the runs"]: row for row in claimed_rows(claims(models))}
    heads = {
        LESS: "less error than no correction",
        THIRD: "less than a third of that error",
        SHARE: "a smaller share left than under `MaxProb`",
    }
    rows = [row for row in named_rows() if row["order"] != NAMES["max_prob"]]
    for row, (order, copied) in zip(rows, product(("random", "left_to_right"), COPIES), strict=True):
        for what, head in heads.items():
            found = row_of.get(claim(order, copied, what))
            row[head] = ", p ".join([verdict(found), found["Holm's p"]]) if found else "-"
            row[head] = row[head].replace("p 0.000", "p < 0.001")
    return rows


def page_tables() -> dict[str, str]:
    """The tables of README.md and appendix.md, by name."""
    models = read_json(STORED)
    rows = {"errors": error_rows, "claims": claim_rows, "corrections": correction_rows}
    return {name: markdown(rows_of(models)) for name, rows_of in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of orders.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = read_json(STORED) if STORED.exists() else []
    if not options.report:
        for seed in SEEDS:
            if seed not in {model["seed"] for model in models}:
                models.append(run_model(seed, ROUNDS[0]))
                write_json(STORED, models)
        for model in models:
            if not is_whole(model):
                model["settings"] |= run_model(model["seed"], ROUNDS[1])["settings"]
                write_json(STORED, models)
    whole = sum(map(is_whole, models))
    if whole < len(SEEDS):
        print(f"{whole} of {len(SEEDS)} models: no claim is read before the last")
        return
    for rows in (error_rows(models), correction_rows(models), claimed_rows(claims(models))):
        print(markdown(rows))


if __name__ == "__main__":
    main()
