"""A training step against its own matrix products: what is left to gain without other mathematics.

    python -m benchmarks.limit --json benchmarks/results/limit-cpu.json

Processor seconds of whole steps (rollout, rewards, scoring, update, sync), of all operators of one of them that return
a new tensor, without Python and autograd, and of its matrix products alone; and of whole steps whose blocks, the
learner's too, inductor compiles, so that elementwise operators are fused. All in turns, one thread, the fastest of
`--repeats`. Rewards are made to differ, so that all rows train.

`memory` is the peak of a step above what is held before it, each in a process of its own: with one graph of scoring
kept, and with the default, which keeps more while all graphs have at most 256 MiB. `outside` is what a denoising step
of one row takes outside the module's forward: a rollout of STEPS steps, less as many forwards of the same shape.
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Varied, fastest, in_fresh_process, machine, seconds_and_peak, table, write_json
from benchmarks.sampler import PRODUCTS, Kept
from dllm_rl import Confidence, Float8WeightOnly, MaxProb, Policy, Recipe, Unmask, tiny_masked_lm
from dllm_rl.frontend.grpo import grpo_recipe
from dllm_rl.models.forward.blocks import blocks_of
from dllm_rl.training.start import start
from dllm_rl.training.trainer import take_step
from dllm_rl.types.rollouts import Prompts
from recipes import latin_sudoku

STEPS = 16
PARTS = ("step", "operators", "products", "step, compiled")


def readme_example(more_characters: str = "", max_new_tokens: int = 2) -> Recipe:
    """The example of README's first section."""
    rows = [{"prompt": f"{a}{b}=", "answer": f"{b}{a}"} for a in "12345678" for b in "12345678"]

    def reward(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        return [sum(a == b for a, b in zip(*pair, strict=False)) / 2 for pair in zip(completions, answer, strict=True)]

    model = tiny_masked_lm(characters="12345678=" + more_characters)
    return grpo_recipe(model, rows, reward, max_new_tokens=max_new_tokens)


def jobs() -> dict[str, Recipe]:
    """The recipe of each arm."""
    example = readme_example()
    squares = replace(latin_sudoku.recipe, model=partial(latin_sudoku.taught_latin, steps=1))
    return {
        "README's example": example,
        "README's example, FP8 rollouts": replace(example, rollout_quantization=Float8WeightOnly()),
        "Latin squares without replay": replace(squares, replay=None),
    }


def memory_jobs() -> dict[str, Recipe]:
    """The recipes whose peaks are measured."""
    timed = jobs()
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 20_992))) + "".join(map(chr, range(0xAC00, 0xAC00 + 11_172)))
    large = readme_example(many, max_new_tokens=16)
    return {name: timed[name] for name in ("README's example", "Latin squares without replay")} | {"32k tokens": large}


def taking_steps(recipe: Recipe, folder: str, *, compiled: bool = False) -> Callable[[], object]:
    """A function that takes the next step of a run, whose first step was taken; `compiled`: the first four."""
    changes = {"task": Varied(recipe.task), "output_dir": folder, "num_steps": 10**6}
    run = start(recipe.replace(**changes, log={"report_to": None, "completions_steps": 0}), None, ())
    step = map(partial(take_step, run), count()).__next__
    if compiled:  # with gradients, too, which `torch_compile` leaves eager
        for module in {run.policy.module, run.rollout_policy.module}:
            for block in blocks_of(module, "compiled"):
                block.compile(dynamic=True)
    for _ in range(4 if compiled else 1):
        step()  # the first one also allocates the optimizer's state
    return step


def started(recipe: Recipe, folder: str) -> tuple[Callable[[], object], Kept, Kept]:
    """A function that takes the next step of a run, and the operators and products of one step."""
    step = taking_steps(recipe, folder)
    with Kept("") as operators:
        step()
    with Kept(*PRODUCTS) as products:
        step()
    return step, operators, products


def measured(recipes: dict[str, Recipe], repeats: int) -> list[dict[str, Any]]:
    """For each arm the seconds of a step, of its operators and its products, the ratios, and the number of products."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: (*started(recipe, f"{folder}/{i}"), taking_steps(recipe, f"{folder}/compiled-{i}", compiled=True))
            for i, (name, recipe) in enumerate(recipes.items())
        }
        turns = {(name, part): run for name, each in runs.items() for part, run in zip(PARTS, each, strict=True)}
        seconds = fastest(turns, repeats)
    rows = []
    for name, (_, _, products, _) in runs.items():
        step, operators, alone, fused = (seconds[name, part] for part in PARTS)
        row = {"arm": name} | {f"{part}, s": round(seconds[name, part], 4) for part in PARTS}
        row |= {"ratio": round(step / alone, 2), "operators / products": round(operators / alone, 2)}
        rows.append(row | {"ratio, compiled": round(fused / alone, 2), "products": len(products.calls)})
    return rows


def peak(*, arm: str, max_retained_graphs: int | None, repeats: int, device: str) -> dict[str, float]:
    """Seconds and peak memory of a step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        step = taking_steps(replace(memory_jobs()[arm], max_retained_graphs=max_retained_graphs), folder)
        return seconds_and_peak(step, device, repeats=repeats)


def memory(repeats: int) -> list[dict[str, Any]]:
    """For each job the peak of a step in MiB, with one graph kept and by default, and their ratio."""
    rows = []
    for arm in memory_jobs():
        one, default = (
            in_fresh_process(peak, arm=arm, max_retained_graphs=number, repeats=repeats, device="cpu")["peak_mib"]
            for number in (1, None)
        )
        rows.append({"arm": arm, "one graph, MiB": one, "default, MiB": default, "ratio": round(default / one, 2)})
    return rows


def outside(repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of a denoising step outside the module's forward, by model and rank."""
    rows = []
    models = {
        "README's example": (tiny_masked_lm(characters="12345678="), 3),
        "Latin squares": (latin_sudoku.taught_latin(steps=1), 17),
    }
    for model, (policy, length) in models.items():
        prompts = Prompts.from_ids([[5] * length], pad_id=policy.pad_id, seeds=[0])
        unrecorded = replace(prompts, reads_order=False)
        tokens = torch.full((1, length + STEPS), 5)
        arms: dict[str, Callable[[], object]] = {"forward": partial(forwards, policy, tokens)}
        for name, rank, given in (
            ("MaxProb", MaxProb(), prompts),
            ("Confidence, without the order's log-probs", Confidence(), unrecorded),
            ("Confidence", Confidence(), prompts),
        ):
            sampler = Unmask(max_new_tokens=STEPS, temperature=1.0, rank=rank)
            arms[name] = partial(sampler, policy, given, torch.Generator())
        for run in arms.values():
            run()
        best = fastest(arms, repeats)
        forward = best.pop("forward")
        for name, seconds in best.items():
            apart, alone = (round(each / STEPS * 1e3, 2) for each in (seconds - forward, forward))
            rows.append({"model": model, "rank": name, "outside, ms": apart, "forward, ms": alone})
    return rows


@torch.no_grad()
def forwards(policy: Policy, tokens: Tensor) -> None:
    for _ in range(STEPS):
        policy.module(input_ids=tokens, attention_mask=torch.ones_like(tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="where to write the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(jobs(), arguments.repeats)
    peaks = memory(arguments.repeats)
    small = outside(10 * arguments.repeats)
    print(table(rows), table(peaks), table(small), sep="\n\n")
    write_json(arguments.json, {"machine": machine("cpu"), "rows": rows, "memory": peaks, "outside": small})


if __name__ == "__main__":
    main()
