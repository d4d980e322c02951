"""A training step against its own matrix products: what is left to gain without other mathematics.

    python -m benchmarks.limit --json benchmarks/results/limit-cpu.json

Processor seconds of whole steps (rollout, rewards, scoring, update, sync), of all operators of one of them that return
a new tensor, without Python and autograd, and of its matrix products alone; all in turns, one thread, the fastest of
`--repeats`. Rewards are made to differ, so that all rows train.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch

from benchmarks.measure import Varied, fastest, machine, table, write_json
from benchmarks.sampler import PRODUCTS, Kept
from dllm_rl import Float8WeightOnly, Recipe, tiny_masked_lm
from dllm_rl.frontend.grpo import grpo_recipe
from dllm_rl.training.start import start
from dllm_rl.training.trainer import take_step
from recipes import latin_sudoku

ALL_GRAPHS = 99
PARTS = ("step", "operators", "products")


def readme_example() -> Recipe:
    """The example of README's first section."""
    rows = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "12345678" for b in "12345678"]

    def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [sum(a == b for a, b in zip(*pair, strict=False)) / 2 for pair in zip(completions, answer, strict=True)]

    return grpo_recipe(tiny_masked_lm(characters="12345678="), rows, reward, max_new_tokens=2)


def jobs() -> dict[str, Recipe]:
    """The recipe of each arm."""
    example = readme_example()
    main_job = replace(latin_sudoku.recipe, model=partial(latin_sudoku.taught_latin, steps=1))
    return {
        "README's example": example,
        "README's example, all graphs kept": replace(example, max_retained_graphs=ALL_GRAPHS),
        "README's example, FP8 rollouts": replace(example, rollout_quantization=Float8WeightOnly()),
        "the main job without replay": replace(main_job, replay=None),
    }


def started(recipe: Recipe, folder: str) -> tuple[Callable[[], object], Kept, Kept]:
    """A function that takes the next step of a run, and the operators and products of one step."""
    changes = {"task": Varied(recipe.task), "output_dir": folder, "num_steps": 10**6, "report_to": "none"}
    run = start(replace(recipe, **changes, log_completions_steps=0), None, ())
    step = map(partial(take_step, run), count()).__next__
    step()  # the first one also allocates the optimizer's state
    with Kept("") as operators:
        step()
    with Kept(*PRODUCTS) as products:
        step()
    return step, operators, products


def measured(recipes: dict[str, Recipe], repeats: int) -> list[dict[str, Any]]:
    """For each arm the seconds of a step, of its operators and its products, the ratios, and the number of products."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: started(recipe, f"{folder}/{i}") for i, (name, recipe) in enumerate(recipes.items())}
        turns = {(name, part): run for name, each in runs.items() for part, run in zip(PARTS, each, strict=True)}
        seconds = fastest(turns, repeats)
    rows = []
    for name, (*_, products) in runs.items():
        step, operators, alone = (seconds[name, part] for part in PARTS)
        row = {"arm": name} | {f"{part}, s": round(seconds[name, part], 4) for part in PARTS}
        row |= {"ratio": round(step / alone, 2), "operators / products": round(operators / alone, 2)}
        rows.append(row | {"products": len(products.calls)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(jobs(), arguments.repeats)
    print(table(rows))
    write_json(arguments.json, {"machine": machine("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
