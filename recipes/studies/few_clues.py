"""What does RL reach that supervision cannot, where many answers are right? Claims and findings: few_clues.md.

Every arm trains a model of its seed, which then fills the 400 test puzzles greedily in 1, 2, 4, 8 and 16 parallel
steps. "The ceiling" is what `recipes.perfect` reaches in as many steps. Runs are kept below --output_dir, and all of
them in few_clues.json, which later runs add to.

    python -m recipes.studies.few_clues              run what is missing, one after another, then print the tables
    python -m recipes.studies.few_clues --report     run nothing
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Generator

from dllm_rl import Autoregress, Causal, MaxProb, Policy, Recipe, Unmask, tiny_llama, tiny_masked_lm
from dllm_rl.decoding.tokens import encode, full_texts
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import read_json, write_json
from dllm_rl.rng import generator_for
from dllm_rl.tasks import Sudoku
from dllm_rl.tasks.rows import load_rows
from dllm_rl.tasks.sudoku.solver import completions
from recipes.perfect import ceiling
from recipes.studies.paired import by_arm, holm, interval, markdown, sign_flip
from recipes.sudoku_tiny import NO_DIGITS, few_clues, learn, taught
from recipes.sudoku_tiny import recipe as base

STORED = Path(__file__).with_suffix(".json")
STEPS = (1, 2, 4, 8, 16)
SEEDS = range(10, 20)  # the settings were chosen on seed 0
LONGER = 1700  # supervised steps that take about the processor time of RL
RL, RL_4, TAUGHT, CHOSEN, CAUSAL = "RL in two", "RL in four", "supervision", "a solver's answers", "autoregressive RL"
OWN = "own answers"  # not planned: a review ran three seeds, and kept their rates in two and four steps alone
Runs = Mapping[tuple[str, int], Mapping[str, Any]]  # (arm, seed) -> what its run left


def in_steps(steps: int, *, temperature: float = 0.0) -> Callable:
    write = Unmask(max_new_tokens=0, rank=MaxProb(), suppress=NO_DIGITS)
    return write.replace(diffusion_steps=steps, temperature=temperature)


def by_a_solver(task: Sudoku, generator: Generator) -> tuple[list[str], list[str]]:
    """64 puzzles of the task, and of each the first answer in a solver's list: a label that chooses among answers."""
    picked = torch.randint(len(task), (64,), generator=generator).tolist()
    puzzles = [task[i].fields["puzzle"] for i in picked]
    return puzzles, [completions(puzzle)[0] for puzzle in puzzles]


def taught_by_a_solver(*, seed: int, steps: int) -> Policy:
    """A model that learns ONE answer a puzzle, as long as `taught` learns drawn ones."""
    policy = tiny_masked_lm(characters="1234", seed=seed)
    learn(policy, steps, seed, partial(by_a_solver, few_clues(split="train")))
    return policy


def written(policy: Policy, count: int, seed: int, purpose: str, sampler: Callable) -> list[tuple[str, str]]:
    """`count` puzzles of the train split, drawn with replacement, and the model's answer to each."""
    task = base.task
    picked = torch.randint(len(task), (count,), generator=generator_for(seed, "puzzles", purpose)).tolist()
    answers = []
    policy.module.eval()
    for start in range(0, count, 512):
        problems = [task[i] for i in picked[start : start + 512]]
        rollout = sampler(policy, encode(policy, problems), generator_for(seed, purpose, start))
        answers += zip([problem.fields["puzzle"] for problem in problems], full_texts(policy, rollout), strict=True)
    policy.module.train()
    return answers


def taught_by_itself(*, seed: int, steps: int) -> Policy:
    """`taught`, then `steps` on its own greedy answers of one cell a step: nothing has checked them."""
    policy = taught(seed=seed)
    answers = written(policy, 4096, seed, "own answers", in_steps(16))

    def draw(generator: Generator) -> tuple[list[str], list[str]]:
        picked = torch.randint(len(answers), (64,), generator=generator).tolist()
        return [answers[i][0] for i in picked], [answers[i][1] for i in picked]

    learn(policy, steps, seed, draw)
    return policy


def causal_base() -> Recipe:
    """The same puzzles and reward for an autoregressive model, which writes behind the puzzle: 16 forwards, one a cell.
    Its warm-up is the library's, on answers drawn uniformly."""
    write = Autoregress(max_new_tokens=16, suppress=(0, 2))
    return replace(
        base,
        name="few-clues-ar",
        model=partial(tiny_llama, characters="1234.=", causal=True),
        task=replace(base.task, infill=False),
        validation_task=replace(base.validation_task, infill=False),
        eval_task=replace(base.eval_task, infill=False),
        sampler=write.replace(temperature=1.0),
        eval_sampler=write.replace(temperature=0.0),
        likelihood=Causal(),
        sft_warmup_steps=400,
        sft_warmup_target=1.0,
        sft_warmup_eval_steps=400,
    )


def supervised(model: Callable[..., Policy]) -> Recipe:
    return replace(base, model=partial(model, steps=LONGER), num_steps=0)


ARMS: dict[str, Callable[[], Recipe]] = {
    RL: lambda: base,
    RL_4: lambda: replace(base, sampler=in_steps(4, temperature=1.0), eval_sampler=in_steps(4), max_retained_graphs=4),
    TAUGHT: lambda: supervised(taught),
    CHOSEN: lambda: supervised(taught_by_a_solver),
    OWN: lambda: replace(base, model=partial(taught_by_itself, steps=700), num_steps=0),
    CAUSAL: causal_base,
}


def run_one(arm: str, seed: int, root: Path) -> dict[str, Any]:
    """Train and evaluate. `seconds`: of the processor, one thread, from the making of the model to the last step's
    evaluation; `rates` by the number of parallel steps."""
    recipe = ARMS[arm]()
    folder = root / "runs" / f"{arm.replace(' ', '-')}_{seed}"
    quiet = {"report_to": None, "eval_steps": 0, "save_steps": 10**6, "log_completions_steps": 0}
    recipe = replace(recipe, seed=seed, output_dir=str(folder), overwrite_output_dir=True, **quiet)
    from dllm_rl.training.trainer import train

    began = time.process_time()
    summary = train(recipe)
    kept: dict[str, Any] = {"arm": arm, "seed": seed, "seconds": time.process_time() - began}
    kept |= {when: summary[f"eval_{when}"]["solve_rate"] for when in ("before", "after", "after_quantized")}
    policy, task = summary.policy, recipe.eval_task
    samplers = {steps: in_steps(steps) for steps in STEPS}
    if arm == CAUSAL:
        samplers = {16: recipe.eval_sampler}
    kept["rates"] = {
        str(steps): evaluate(policy, task, sampler).means["solve_rate"] for steps, sampler in samplers.items()
    }
    return kept | diversity(policy, recipe)


def diversity(policy: Policy, recipe: Recipe) -> dict[str, float]:
    """Does the policy write one grid only? Of the first 100 test puzzles, eight answers each, as rollouts draw them:

    answers   different right grids of a puzzle, mean over the puzzles with a right answer
    possible  the same puzzles' right grids
    grids     different right grids over all puzzles, of 288
    """
    written = Path(recipe.directory) / "diversity.jsonl"
    evaluate(policy, recipe.eval_task, recipe.sampler, samples=8, limit=100, completions=written)
    right: dict[str, set[str]] = {}
    for _, row in load_rows(written):
        if row["completion"] in completions(row["puzzle"]):
            right.setdefault(row["puzzle"], set()).add(row["completion"])
    if not right:
        return {"answers": 0.0, "possible": 0.0, "grids": 0.0}
    return {
        "answers": mean(map(len, right.values())),
        "possible": mean(len(completions(puzzle)) for puzzle in right),
        "grids": float(len(set.union(*right.values()))),
    }


def of(runs: Runs, arm: str, steps: int) -> dict[int, float]:
    """An arm's solve rates by seed."""
    return {seed: run["rates"][str(steps)] for (name, seed), run in sorted(runs.items()) if name == arm}


def arm_rows(runs: Runs, ceilings: Mapping[int, float]) -> list[dict[str, str]]:
    """Solve rates by arm and number of steps, with 95 % intervals (Student's t); the ceiling first."""
    rows = [{"arm": "perfect supervision", "seeds": "-"} | {str(k): f"{ceilings[k]:.3f}" for k in STEPS}]
    rows[0]["CPU seconds"] = "-"
    for arm in ARMS:
        mine = [run for (name, _), run in sorted(runs.items()) if name == arm]
        if mine:
            row = {"arm": arm, "seeds": str(len(mine))}
            for k in STEPS:
                rates = [run["rates"][str(k)] for run in mine if str(k) in run["rates"]]
                row[str(k)] = interval(rates) if rates else "-"
            seconds = [run["seconds"] for run in mine if "seconds" in run]
            rows.append(row | {"CPU seconds": f"{mean(seconds):.0f}" if seconds else "-"})
    return rows


def claims(runs: Runs, ceilings: Mapping[int, float]) -> dict[str, list[float]]:
    """The differences by seed of each claim that is stated in few_clues.md."""
    found = {}
    for arm, steps, word in ((RL, 2, "two"), (RL_4, 4, "four")):
        rates, alone = of(runs, arm, steps), of(runs, TAUGHT, steps)
        found[f"in {word} steps RL is above the ceiling"] = [rate - ceilings[steps] for rate in rates.values()]
        both = sorted(rates.keys() & alone.keys())
        found[f"in {word} steps RL is above supervision"] = [rates[seed] - alone[seed] for seed in both]
    return found


def claim_rows(runs: Runs, ceilings: Mapping[int, float]) -> list[dict[str, str]]:
    """By claim: the difference with its 95 % interval, the seeds above 0, and the exact p by flipping signs."""
    found = {claim: values for claim, values in claims(runs, ceilings).items() if values}
    adjusted = holm([sign_flip(values) for values in found.values()])
    return [
        {
            "stated before the runs": claim,
            "seeds": str(len(values)),
            "difference, 95 %": interval(values),
            "above 0": f"{sum(value > 0 for value in values)} of {len(values)}",
            "Holm's p": f"{p:.3f}",
        }
        for (claim, values), p in zip(found.items(), adjusted, strict=True)
    ]


def diversity_rows(runs: Runs) -> list[dict[str, str]]:
    rows = []
    for arm in ARMS:
        mine = [run for (name, _), run in sorted(runs.items()) if name == arm and "answers" in run]
        if mine:
            row = {"arm": arm} | {name: f"{mean(run[name] for run in mine):.1f}" for name in ("answers", "possible")}
            rows.append(row | {"grids": f"{mean(run['grids'] for run in mine):.0f}"})
    return rows


def picture(runs: Runs, ceilings: Mapping[int, float], path: Path) -> None:
    """Solve rates against the number of parallel steps: the arms' means, and each run as a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7.0, 4.0), layout="constrained")
    axis.plot(STEPS, [ceilings[k] for k in STEPS], "k--", label="perfect supervision")
    for i, arm in enumerate(ARMS):
        mine = [run["rates"] for (name, _), run in sorted(runs.items()) if name == arm]
        taken = [k for k in STEPS if mine and str(k) in mine[0]]
        means = [mean(rates[str(k)] for rates in mine) for k in taken]
        (line,) = axis.plot(taken, means, "o-", color=f"C{i}", label=f"{arm} ({len(mine)})")
        for rates in mine:
            axis.plot(taken, [rates[str(k)] for k in taken], ".", color=line.get_color(), alpha=0.4)
    axis.set_xscale("log", base=2)
    axis.set_xticks(STEPS, map(str, STEPS))
    axis.set(xlabel="parallel steps", ylabel="held-out puzzles solved", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", title="arm (seeds)", framealpha=0.5)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def puzzles() -> list[str]:
    return [problem.fields["puzzle"] for problem in map(base.eval_task.__getitem__, range(len(base.eval_task)))]


def page_tables() -> dict[str, str]:
    stored = read_json(STORED)
    results, ceilings = by_arm(stored["runs"]), {int(steps): rate for steps, rate in stored["ceiling"].items()}
    return {
        "arms": markdown(arm_rows(results, ceilings)),
        "claims": markdown(claim_rows(results, ceilings)),
        "diversity": markdown(diversity_rows(results)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/few_clues"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of few_clues.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = options.output_dir / "results"
    stored_runs = read_json(STORED)["runs"] if STORED.exists() else []
    found = [*stored_runs, *map(read_json, sorted(results.glob("*.json")))]
    runs = by_arm(found)
    missing = [(arm, seed) for seed in options.seeds for arm in options.arms if (arm, seed) not in runs]
    for arm, seed in missing if not options.report else ():
        runs[arm, seed] = run_one(arm, seed, options.output_dir)
        results.mkdir(parents=True, exist_ok=True)
        write_json(results / f"{arm.replace(' ', '-')}_{seed}.json", runs[arm, seed])
    ceilings = {steps: ceiling(puzzles(), steps) for steps in STEPS}
    for rows in (arm_rows(runs, ceilings), claim_rows(runs, ceilings), diversity_rows(runs)):
        print(markdown(rows))
    if not options.report:
        picture(runs, ceilings, STORED.with_suffix(".png"))
        stored = {"ceiling": {str(steps): rate for steps, rate in ceilings.items()}, "runs": list(runs.values())}
        write_json(STORED, stored)


if __name__ == "__main__":
    main()
