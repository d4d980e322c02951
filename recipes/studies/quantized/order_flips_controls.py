"""Does what order_flips.py found hold for other models, after RL and on Countdown, and is INT4's error like noise?

All is as there (exact sums, one token a step, `measured`), under `max_prob` and random order, in four cases:

fresh             twenty models of 4x4 Sudoku with other seeds (10 to 29), on five other puzzles each instead of three
after RL          the first ten of them after 60 steps of GRPO (`after_rl`: unquantized, `MaxProb`, every step scored),
                  on the same puzzles
after RL, random  the same, trained in random order
Countdown         ten models that write five tokens: three numbers of 1 to 4, added or subtracted, make a target, on
                  three problems each. They have learned right expressions until they solve half of the problems whose
                  numbers they have not seen; a seed that does not in 1000 steps is left out, and counted.

noise is a copy of fresh models whose linear layers have, in place of INT4's error, Gaussian noise of the same length in
each layer. It has no claim: its bias stands beside INT4's with the interval of the difference.

The claims, two-sided, by flipping the signs of the models' numbers. In a case, under INT4:

1. in random order TIS leaves less bias than in `max_prob` order (order_flips.py: 0.266±0.261 less, not claimed there);
2. most of the bias that exact token weights leave under `max_prob` comes from flips: it is more than twice the bias of
   the same copy in the learner's order (there: 8 of 10 models; as a mean of shares not shown).

Holm's correction over the two claims of the fresh models, which replicate, and apart from these over the six of the
other cases. Biases are in lengths of the true gradient of their case and order, which RL makes shorter: the lengths are
in the table, so that distances can be compared, too.

Known before the runs: order_flips.json.

    python -m recipes.studies.quantized.order_flips_controls
        run what is missing, order_flips_controls.json, the tables
    python -m recipes.studies.quantized.order_flips_controls --report  run nothing
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Generator

from dllm_rl import Int4WeightOnly, MaxProb, Policy, RandomOrder, Recipe, Trajectory, Unmask, evaluate
from dllm_rl.files import read_json, write_json
from dllm_rl.groups import Evaluation, Log
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.rng import generator_for
from dllm_rl.samplers.rules import Rank
from dllm_rl.tasks import task_from_dataset
from dllm_rl.tasks.countdown.graders import countdown_strict
from dllm_rl.training.trainer import train
from recipes.studies.paired import claimed_rows, interval, markdown, verdict_rows
from recipes.studies.quantized.order_flips import (
    BLANKS,
    ORDER_NAMES,
    PART,
    WEIGHT_NAMES,
    Canvases,
    Model,
    Setting,
    bias,
    canvases,
    measured,
    trained,
)
from recipes.sudoku_tiny import NO_DIGITS, few_clues, learn

STORED = Path(__file__).with_suffix(".json")  # a line a case and model
MODELS, SKIPPED = 10, 1000  # of a case that is trained further, or on sums; steps of a seed that is left out
SEEDS = {
    "fresh": range(10, 30),
    "after RL": range(10, 20),
    "after RL, random": range(10, 20),
    "Countdown": range(20),  # until ten have learned it
}
RANKS = {"after RL": MaxProb(), "after RL, random": RandomOrder()}
PUZZLES, PROBLEMS = 5, 3
CHOICES = "1234+-"  # of Countdown's answers
ONE_A_STEP = Unmask(max_new_tokens=0, diffusion_steps=BLANKS, rank=MaxProb(), temperature=1.0)


ROWS = tuple(product(("max_prob", "random"), ("INT4", "noise")))  # order and copy
WEIGHTS = ("none", "tis", "ais", "exact")


def copies_of(policy: Policy, case: str, seed: int) -> dict[str, Policy]:
    """INT4, and of fresh models Gaussian noise of its size."""
    quantized = quantized_copy(policy, Int4WeightOnly())
    return {"INT4": quantized} | ({"noise": noisy(policy, quantized, seed)} if case == "fresh" else {})


def measure(policy: Policy, case: str, seed: int, every: Sequence[Canvases]) -> dict[str, Any]:
    copies = copies_of(policy, case, seed)
    rows = [(order, copied) for order, copied in ROWS if copied in copies]
    chosen = [Setting(*row, weights) for row, weights in product(rows, WEIGHTS)]
    chosen += [Setting("max_prob", copied, "exact", "no flips") for copied in copies]
    chosen += [Setting("max_prob", "INT4", weights, "no flips") for weights in ("none", "tis")]
    return measured(policy, copies, every, chosen, directions=0)


@torch.no_grad()
def noisy(policy: Policy, quantized: Policy, seed: int) -> Policy:
    """The policy with noise: in each weight as long as the quantized copy's error."""
    made = copy(policy)
    made.module = deepcopy(policy.module)
    for name, weight in made.module.named_parameters():
        theirs = quantized.module.get_parameter(name)
        if type(theirs.data) is not torch.Tensor:  # torchao's
            noise = torch.randn(weight.shape, generator=generator_for(seed, "noise", name))
            error = theirs.dequantize().to(weight.dtype) - weight
            weight.add_(noise * (error.norm() / noise.norm()))
    return made


def after_rl(policy: Policy, rank: Rank, seed: int, folder: Path, num_steps: int = 60) -> Policy:
    """The model after steps of GRPO."""
    puzzles = partial(few_clues, clues=(11, 11), unique=True)
    sampler = ONE_A_STEP.replace(suppress=NO_DIGITS, rank=rank)
    recipe = Recipe(
        name="order-flips-rl",
        model=lambda: deepcopy(policy),
        task=puzzles(split="train"),
        validation_task=puzzles(split="validation", size=200),
        eval_task=puzzles(split="validation", size=200),
        sampler=sampler,
        eval_sampler=sampler,
        likelihood=Trajectory(),
        num_steps=num_steps,
        evaluation=Evaluation(steps=0),
        seed=seed,
        output_dir=str(folder),
        overwrite_output_dir=True,
        log=Log(report_to=None),
    )
    learner = train(recipe).policy
    learner.module.eval()
    return learner


def solve_rate(policy: Policy, puzzles: Sequence[str], is_right: Any) -> float:
    rows = [{"prompt": puzzle.replace("0", "_"), "puzzle": puzzle} for puzzle in puzzles]

    def right(completions: list[str], puzzle: list[str], **_: Any) -> list[float]:
        return [float(is_right(*each)) for each in zip(puzzle, completions, strict=True)]

    task = task_from_dataset(rows, reward_funcs=right, blank="_")
    others = set(range(len(policy.tokenizer))) - set(policy.tokenizer.convert_tokens_to_ids(list(CHOICES)))
    sampler = ONE_A_STEP.replace(suppress=tuple(sorted(others - {policy.spec.mask_id})))
    return evaluate(policy, task, sampler, batch_size=200).means["right"]


def sums() -> dict[str, list[str]]:
    """Countdown's problems, as a prompt of eleven tokens and five blanks, and the right answers of each."""
    found: dict[str, list[str]] = {}
    for a, first, b, second, c in product("1234", "+-", "1234", "+-", "1234"):
        target = int(a) + (int(b) if first == "+" else -int(b)) + (int(c) if second == "+" else -int(c))
        if 1 <= target <= 9:
            answer = a + first + b + second + c
            for x, y, z in sorted({(a, b, c), (b, c, a), (c, a, b), (a, c, b), (b, a, c), (c, b, a)}):
                found.setdefault(f"{x}, {y}, {z}> {target}=" + "0" * BLANKS, []).append(answer)
    return found


def is_right_sum(puzzle: str, answer: str) -> bool:
    """By the library's grader."""
    prompt, written = answer[:-BLANKS], answer[-BLANKS:]
    numbers = [int(number) for number in prompt.split(">")[0].split(",")]
    fields = {"numbers": numbers, "target": int(prompt.split(">")[1].rstrip("="))}
    return countdown_strict(fields, written).breakdown["accuracy"] == 1


def parts() -> tuple[list[str], list[str]]:
    """Countdown's problems to learn from, and the others, which have other sets of numbers."""
    problems = sorted(sums())
    sets = sorted({"".join(sorted(problem[:8:3])) for problem in problems})
    order = torch.randperm(len(sets), generator=generator_for(0, "sets")).tolist()
    held_out = {sets[i] for i in order[:4]}
    apart: tuple[list[str], list[str]] = ([], [])
    for problem in problems:
        apart["".join(sorted(problem[:8:3])) in held_out].append(problem)
    return apart


def trained_on_sums(seed: int) -> tuple[Policy, int]:
    """A model that solves half of the problems that it has not seen, and the supervised steps that this took; SKIPPED
    if it does not."""
    policy = tiny_masked_lm(
        characters=CHOICES + "56789,>= ", seed=seed, hidden_size=64, num_layers=2, intermediate_size=192
    )
    answers, (seen, held_out) = sums(), parts()

    def lesson(generator: Generator) -> tuple[list[str], list[str]]:
        def pick(of: list[str]) -> str:
            return of[int(torch.randint(len(of), (), generator=generator))]

        problems = [pick(seen) for _ in range(64)]
        return problems, [problem[:-BLANKS] + pick(answers[problem]) for problem in problems]

    for steps in range(PART, SKIPPED, PART):
        policy.module.train()
        learn(policy, PART, 1000 * seed + steps // PART, lesson)
        policy.module.eval()
        if solve_rate(policy, held_out, is_right_sum) >= 0.5:
            return policy, steps
    return policy, SKIPPED


def run_sudoku(seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A fresh model, before and after RL."""
    policy, steps = trained(seed)
    task = few_clues(split="test", clues=(11, 11), unique=True, size=1000)
    puzzles = [task[500 + PUZZLES * seed + i].fields["puzzle"] for i in range(PUZZLES)]
    for case in ("fresh", *RANKS):
        if seed in SEEDS[case]:
            learner = after_rl(policy, RANKS[case], seed, folder / case) if case in RANKS else policy
            every = [canvases(puzzle, learner) for puzzle in puzzles]
            yield {"case": case, "seed": seed, "steps": steps, **measure(learner, case, seed, every)}


def run_countdown(seed: int) -> Iterator[dict[str, Any]]:
    policy, steps = trained_on_sums(seed)
    _, held_out = parts()
    order = torch.randperm(len(held_out), generator=generator_for(seed, "problems")).tolist()
    every = [canvases(held_out[i], policy, CHOICES, is_right_sum) for i in order[:PROBLEMS]]
    found = measure(policy, "Countdown", seed, every) if steps < SKIPPED else {}
    yield {"case": "Countdown", "seed": seed, "steps": steps, **found}


def of_case(stored: Sequence[Model], case: str) -> list[Model]:
    """Its models that have learned their task."""
    return [model for model in stored if model["case"] == case and model["steps"] < SKIPPED]


CASE_NAMES = {  # in tables
    "fresh": "twenty new models",
    "after RL": "after RL in `MaxProb` order",
    "after RL, random": "after RL in random order",
    "Countdown": "Countdown",
}


def case_rows(stored: Sequence[Model]) -> list[dict[str, str]]:
    """By case and order under INT4: the expected reward, the median length of the true gradient, and the error that
    each of the weights leaves."""
    rows = []
    for case, order in product(SEEDS, ("max_prob", "random")):
        models = of_case(stored, case)
        row = {"models": CASE_NAMES[case], "order": ORDER_NAMES[order]}
        row["solved by the learner"] = interval([model["reward"][order] for model in models])
        row["gradient's length"] = f"{median(model['length'][order] for model in models):.3g}"
        for weights in WEIGHTS:
            row[WEIGHT_NAMES[weights]] = interval([bias(model, order, "INT4", weights) for model in models])
        rows.append(row)
    return rows


def flip_rows(stored: Sequence[Model]) -> list[dict[str, str]]:
    """By case under INT4 and `max_prob`: the share of flips, and the errors with them and without."""
    rows = []
    for case in SEEDS:
        models = of_case(stored, case)
        row = {"models": CASE_NAMES[case], "flips": interval([model["flips"]["INT4"] for model in models])}
        for weights in ("tis", "exact"):
            setting = ("max_prob", "INT4", weights)
            row[WEIGHT_NAMES[weights]] = interval([bias(model, *setting) for model in models])
            row[f"{WEIGHT_NAMES[weights]}, no flips"] = interval(
                [bias(model, *setting, "no flips") for model in models]
            )
        rows.append(row)
    return rows


def claims(stored: Sequence[Model], case: str) -> Mapping[str, list[float]]:
    """By claim the number of each model that is above 0 where it holds."""
    models = of_case(stored, case)
    exact = ("max_prob", "INT4", "exact")
    return {
        f"{case}: TIS leaves less bias in random order": [
            bias(model, "max_prob", "INT4", "tis") - bias(model, "random", "INT4", "tis") for model in models
        ],
        f"{case}: the bias is more than twice that without flips": [
            bias(model, *exact) - 2 * bias(model, *exact, "no flips") for model in models
        ],
    }


def families(stored: Sequence[Model]) -> list[dict[str, list[float]]]:
    """What was claimed of fresh models, and of the others."""
    fresh, *others = (claims(stored, case) for case in SEEDS)
    return [dict(fresh), {claim: values for case in others for claim, values in case.items()}]


def claim_rows(stored: Sequence[Model]) -> list[dict[str, str]]:
    return [row for family in families(stored) for row in claimed_rows(family)]


SAID = {
    "TIS leaves less bias in random order": "TIS leaves less error in random order than under `MaxProb`",
    "the bias is more than twice that without flips": "the error under `MaxProb` is more than twice that without flips",
}


def verdicts(stored: Sequence[Model]) -> list[dict[str, str]]:
    """`claim_rows` as the page has them."""

    def said(claim: str) -> str:
        case, what = claim.split(": ")
        return f"{CASE_NAMES[case]}: {SAID[what]}"

    return [row for family in families(stored) for row in verdict_rows(family, said, "models")]


def noise_rows(stored: Sequence[Model]) -> list[dict[str, str]]:
    """The error under INT4 and under noise of its size, without a claim."""
    models = of_case(stored, "fresh")
    rows = []
    for order, weights in product(("max_prob", "random"), WEIGHTS):
        int4, noise = ([bias(model, order, copied, weights) for model in models] for copied in ("INT4", "noise"))
        rows.append({"order": ORDER_NAMES[order], "correction": WEIGHT_NAMES[weights]})
        rows[-1] |= {"error, INT4": interval(int4), "error, noise": interval(noise)}
        rows[-1]["INT4 minus noise"] = interval([a - b for a, b in zip(int4, noise, strict=True)])
    return rows


def page_tables() -> dict[str, str]:
    models = read_json(STORED)
    rows = {"cases": case_rows, "flips": flip_rows, "claims": verdicts, "noise": noise_rows}
    return {name: markdown(of(models)) for name, of in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/order-flips-controls"), help="of RL's runs")
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of order_flips_controls.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stored = read_json(STORED) if STORED.exists() else []
    if not options.report:
        there = {(model["case"], model["seed"]) for model in stored}
        for seed in SEEDS["fresh"]:
            if any((case, seed) not in there for case in SEEDS if case != "Countdown" and seed in SEEDS[case]):
                stored = [model for model in stored if model["seed"] != seed or model["case"] == "Countdown"]
                for found in run_sudoku(seed, options.output_dir / f"seed{seed}"):
                    stored.append(found)
                    write_json(STORED, stored)
        for seed in SEEDS["Countdown"]:
            if ("Countdown", seed) not in there and len(of_case(stored, "Countdown")) < MODELS:
                stored += run_countdown(seed)
                write_json(STORED, stored)
    print("\n".join(page_tables().values()))


if __name__ == "__main__":
    main()
