"""What does a reward teach that no label says? Labels show Latin squares; only the reward knows the boxes of a Sudoku.

Every arm of a seed starts from the same model, which 400 supervised steps on Latin squares have made, and goes on for
about the same processor time. It then fills the blank cells of 400 test puzzles, one cell a step, at temperature 1.
`latin_limit.py` counts what exact probabilities of the labels reach there: 0.548. Results: latin.md.

Claims, written before the runs (two-sided tests, Holm's correction over all of them):

1. GRPO in four steps is above the exact probabilities of the labels.
2. GRPO in four steps is above supervision on Latin squares for the same time.
3. GRPO in four steps is above supervision on the model's own greedy answers, which no rule has seen.
4. Supervision on the model's own answers that the rules call right, in one round, is above the exact
   probabilities, too.
5. GRPO in four steps is above these filtered answers. We do not know; the sign of the difference says which is better.
6. The same in four parallel steps at temperature 1.
7. Filtered answers in four rounds are above those in one round.

1 to 6 were written before any run, and 1, 3, 4, 5 and 6 were tested on the same ten seeds at rates that nobody had
tuned (1e-3 for GRPO, 2e-3 for labels). 7 was written before the runs of the other arms. Compared without a claim: GRPO
in two and in 16 steps, GRPO with FP8 rollouts.

Rates: GRPO in four has the best of 5e-4, 1e-3 and 2e-3, filtered answers in one round that of 1e-3, 2e-3 and 4e-3.
They are tried on seed 100, and the better two on seed 101, too, which the study does not take, on 400 validation
puzzles. The higher mean of `after` over both seeds wins, of equal ones the lower rate. 2.5e-4 was added for GRPO after
5e-4 had won on seed 100. For time, the other arms of labels take the rate of filtered answers in one round, and the
other arms of GRPO that of GRPO in four; FP8 has as many steps, too, so that quantization is all that differs. A stored
run whose rate is the best one stays, any other is run again. Arms without a claim have the first five seeds. The
numbers of steps take about 23 s of one core that has nothing else to do; FP8's take longer, since a CPU rounds and
multiplies in turn.

    python -m recipes.studies.latin tune            the three rates of each arm
    python -m recipes.studies.latin study           run what is missing, `--workers` at a time, then print the tables
    python -m recipes.studies.latin study --report  the tables of the stored runs below --output_dir
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dllm_rl import Callback, Float8WeightOnly, Policy, Trajectory, load_policy
from dllm_rl.algorithms.correctors import NoCorrection
from dllm_rl.algorithms.optimizers import LinearDecay
from dllm_rl.distributed.collectives import OneProcess
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import read_json, write_json
from dllm_rl.rng import generator_for
from dllm_rl.supervised.examples import solution_examples
from dllm_rl.supervised.trainer import SupervisedTrainer
from dllm_rl.tasks import Problem
from dllm_rl.tasks.rows import load_rows
from dllm_rl.tasks.sudoku.solver import is_completion
from recipes.latin_sudoku import any_latin, recipe
from recipes.studies import paired
from recipes.studies.few_clues import in_steps, written
from recipes.studies.latin_limit import limit
from recipes.studies.paired import (
    TUNED_ON,
    Contrast,
    Results,
    Study,
    arm_rows,
    contrast_rows,
    main,
    markdown,
    result_path,
    warm_up,
    which,
)
from recipes.sudoku_tiny import few_clues

STORED = Path(__file__).with_suffix(".json")
LIMIT, TAUGHT, OWN, ONE, ROUNDS = (
    "exact probabilities",
    "supervision",
    "own answers",
    "filtered answers, one round",
    "filtered answers, rounds",
)
GRPO, GRPO_2, GRPO_16, GRPO_FP8 = "GRPO in four", "GRPO in two", "GRPO in 16", "GRPO in four, FP8"
COLUMNS = ("arm", "seeds", "after", "greedy", "four", "four, greedy", "answers", "seconds")
CURVES = range(3)  # the seeds whose runs are evaluated on validation puzzles on the way
LOOKS = 6


drawn = partial(in_steps, temperature=1.0)  # by the number of parallel steps


segments = Trajectory(num_segments=2)  # what `dllm_rl.grpo` takes for four steps
unquantized = replace(recipe, rollout_quantization=None, corrector=NoCorrection(), replay=None, likelihood=segments)
base = replace(unquantized, name="latin", report_to=None, eval_steps=0, save_steps=10**6, log_completions_steps=0)


def on_labels(policy: Policy, seed: int, arm: Mapping[str, Any], look: Callable[[int], None]) -> dict[str, float]:
    """Supervised steps on what `arm` says; `look` is called after each.

    steps     of AdamW, on 64 squares each
    learning_rate  its height: the schedule is that of GRPO
    answers   the number of the model's own answers to train on; 0: Latin squares, drawn uniformly
    sampler   which writes them
    rounds    how often it writes an equal part of them; a step draws from all labels so far
    filtered  keep those that the rules call right
    """
    steps, answers, rounds = arm["steps"], arm.get("answers", 0), arm.get("rounds", 1)
    optimizer = torch.optim.AdamW(policy.module.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    trainer = SupervisedTrainer(policy=policy, processes=OneProcess(), like_rollouts=True)
    labels: list[tuple[str, str]] = []  # a puzzle, whose givens are never hidden, and the square that completes it
    right = []
    for step in range(steps):
        if answers and step * rounds % steps < rounds:  # the first step of a round
            fresh = written(policy, answers // rounds, seed, f"round at {step}", arm["sampler"])
            right.append(mean(is_completion(*label) for label in fresh))
            labels += [label for label in fresh if not arm.get("filtered") or is_completion(*label)]
        generator = generator_for(seed, "more", step)
        if labels:
            puzzles, squares = zip(
                *(labels[i] for i in torch.randint(len(labels), (64,), generator=generator).tolist()), strict=True
            )
        else:
            puzzles, squares = any_latin(generator)
        examples = solution_examples(policy, [Problem("", solution=square) for square in squares], max_new_tokens=16)
        for example, puzzle in zip(examples, puzzles, strict=True):
            example.learned[:] = torch.tensor([digit == "0" for digit in puzzle])
        rate = arm["learning_rate"] * LinearDecay()(step, steps)
        trainer.step(optimizer, examples, generator, learning_rate=rate, place=f"step {step}")
        look(step + 1)
    return {"right, first": right[0], "right, last": right[-1], "labels": len(labels)} if answers else {}


class Clock(Callback):
    """Processor seconds of GRPO's steps. A step with an evaluation counts as the mean of the others."""

    def on_start(self, run: Any) -> None:
        self.last = time.process_time()
        self.plain: list[float] = []
        self.rates: list[tuple[int, float]] = []

    def on_step(self, run: Any, metrics: Mapping[str, float]) -> None:
        now = time.process_time()
        if "eval/solve_rate" in metrics:
            self.rates.append((run.step, metrics["eval/solve_rate"]))
        else:
            self.plain.append(now - self.last)
        self.last = now


def rate(policy: Policy, sampler: Callable, split: str = "test", size: int = 400, **options: Any) -> float:
    policy.module.eval()
    found = evaluate(policy, few_clues(split=split, size=size), sampler, batch_size=512, **options).means["solve_rate"]
    policy.module.train()
    return found


def run_one(study: Study, root: Path, num_steps: int, name: str, seed: int) -> None:
    """Train an arm of a seed, and evaluate it; leaves `root`/results/....json.

    seconds   of the processor, one thread, behind the common start; without evaluations
    after     solve rate, one cell a step, temperature 1; the others: greedy, and in four steps. Of a seed that rates
              are tuned on: on validation puzzles
    answers   of 100 puzzles' four answers, the share of the right ones of a puzzle that differ from each other
    curve     (seconds, rate on 200 validation puzzles) on the way
    """
    path, arm = result_path(root, name, seed), study.arms[name]
    kept: dict[str, Any] = {"arm": name, "seed": seed} | {k: v for k, v in arm.items() if isinstance(v, int | float)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == LIMIT:
        write_json(path, kept | {"after": float(limit([problem.fields["puzzle"] for problem in puzzles()]))})
        return
    start = str(warm_up(study.base, seed, root / "warm" / str(seed)))
    every = max(1, -(-arm.get("steps", arm.get("num_steps", 0)) // LOOKS)) if seed in CURVES else 0
    if "num_steps" in arm:
        clock = Clock()
        settings = {
            "name": f"latin-{path.stem}",
            "model": start,
            "seed": seed,
            "output_dir": str(root / "runs" / path.stem),
        }
        few = few_clues(split="test", size=8)  # the trainer evaluates before and after RL: not used here
        settings |= {"eval_task": few, "eval_steps": every, "callbacks": [clock], "overwrite_output_dir": True}
        from dllm_rl.training.trainer import train

        policy = train(replace(study.base, **(settings | arm))).policy
        each = mean(clock.plain)
        kept |= {"seconds": each * arm["num_steps"], "curve": [(n * each, found) for n, found in clock.rates]}
    else:
        policy = load_policy(start)
        policy.module.train()
        began, looked, curve = time.process_time(), 0.0, []

        def look(step: int) -> None:
            nonlocal looked
            if every and step % every == 0 and step < arm["steps"]:
                now = time.process_time()
                curve.append((now - began - looked, rate(policy, drawn(16), "validation", 200)))
                looked += time.process_time() - now

        kept |= on_labels(policy, seed, arm, look)
        kept |= {"seconds": time.process_time() - began - looked, "curve": curve}
    if seed in TUNED_ON:
        write_json(path, kept | {"after": rate(policy, drawn(16), "validation")})
        return
    several = root / "runs" / f"{path.stem}_answers.jsonl"
    several.parent.mkdir(parents=True, exist_ok=True)
    kept["after"] = rate(policy, drawn(16))
    kept["four"] = rate(policy, drawn(4))
    kept["greedy"] = rate(policy, in_steps(16))
    kept["four, greedy"] = rate(policy, in_steps(4))
    rate(policy, drawn(16), samples=4, limit=100, completions=several)
    right: dict[int, list[str]] = {}
    for _, row in load_rows(several):
        if is_completion(row["puzzle"], row["completion"]):
            right.setdefault(row["evaluation"]["problem"], []).append(row["completion"])
    kept["answers"] = mean(len(set(squares)) / len(squares) for squares in right.values() if len(squares) > 1)
    several.unlink()
    write_json(path, kept)


def puzzles() -> list[Problem]:
    return [base.eval_task[i] for i in range(len(base.eval_task))]


def at_rate(arm: str, rate: float) -> str:
    return f"{arm} at {rate:g}"


def study(name: str, arms: dict[str, dict[str, Any]], **more: Any) -> Study:
    fewer = dict.fromkeys((GRPO_2, GRPO_16, GRPO_FP8), 5)
    against = {arm: LIMIT for arm in arms if arm != LIMIT}
    return Study(name, base, arms, against, {}, 10, 0, fewer, metric="solve_rate", **more)


OF_ITS_OWN = {"steps": 440, "answers": 1024, "sampler": drawn(16), "filtered": True}
SETTINGS: dict[str, dict[str, Any]] = {
    GRPO: {"num_steps": 100},
    ONE: OF_ITS_OWN,
    OWN: OF_ITS_OWN | {"filtered": False, "sampler": in_steps(16)},
    TAUGHT: {"steps": 500},
    ROUNDS: OF_ITS_OWN | {"rounds": 4},
    GRPO_FP8: {"num_steps": 100, "rollout_quantization": Float8WeightOnly},
    GRPO_2: {"num_steps": 130, "sampler": drawn(2), "likelihood": Trajectory()},
    GRPO_16: {"num_steps": 33, "sampler": drawn(16), "likelihood": Trajectory(num_segments=4)},
}
RATES = {GRPO: (2.5e-4, 5e-4, 1e-3, 2e-3), ONE: (1e-3, 2e-3, 4e-3)}
TUNED = {arm: 5e-4 if "num_steps" in settings else 2e-3 for arm, settings in SETTINGS.items()}
ARMS: dict[str, dict[str, Any]] = {LIMIT: {}} | {
    arm: each | {"learning_rate": TUNED[arm]} for arm, each in SETTINGS.items()
}
STUDY = study(
    "latin",
    ARMS,
    contrasts=(
        Contrast("GRPO in four steps is above the exact probabilities", GRPO, LIMIT),
        Contrast("GRPO in four steps is above supervision", GRPO, TAUGHT),
        Contrast("GRPO in four steps is above own answers", GRPO, OWN),
        Contrast("filtered answers are above the exact probabilities", ONE, LIMIT),
        Contrast("GRPO in four steps is above filtered answers", GRPO, ONE),
        Contrast("GRPO in four steps is above filtered answers", GRPO, ONE, "four"),
        Contrast("four rounds are above one round", ROUNDS, ONE),
    ),
)
TRIALS = {arm: {at_rate(arm, rate): rate for rate in rates} for arm, rates in RATES.items()}
TUNING = study(
    "latin-tuning",
    {
        trial: SETTINGS[arm] | {"learning_rate": rate}
        for arm, trials in TRIALS.items()
        for trial, rate in trials.items()
    },
)


def tables(results: Results) -> tuple[list[dict[str, str]], ...]:
    """The arms' rates, with 95 % intervals, the claims, and the tuning. What is computed has no interval, a claim
    of fewer than ten seeds no p, and an arm of fewer than five intervals of `after` alone."""
    rows = [{name: row[name] for name in COLUMNS} for row in arm_rows(STUDY, results, COLUMNS[2:])]
    for row in rows:
        row["seconds"] = f"{float(row['seconds'].split('±')[0]):.0f}" if row["seconds"] != "-" else "-"
        if int(row["seeds"]) < 5:  # too wide to say more than the means do
            row |= {name: row[name].split("±")[0] for name in COLUMNS[3:]}
    rows[0] = dict.fromkeys(COLUMNS, "-") | {"arm": LIMIT, "after": f"{results[LIMIT, 0]['after']:.3f}"}
    whole = [each for each in STUDY.contrasts if len(paired.paired(results, each.arm, each.against)) == STUDY.seeds]
    claims = contrast_rows(replace(STUDY, contrasts=tuple(whole)), results)
    fewer = [each for each in STUDY.contrasts if each not in whole]
    claims += [row | {"Holm's p": "-"} for row in contrast_rows(replace(STUDY, contrasts=tuple(fewer)), results)]
    columns = ("stated before the runs", "of", "difference, 95 %", "above 0", "Holm's p")
    return (
        rows,
        [{name: row[name] for name in columns} for row in claims],
        paired.trial_rows(TUNING, results, "arm and rate"),
    )


def picture(results: Results, path: Path) -> None:
    """Rates on validation puzzles against the share of a run's time, a line a run, and the limit of the labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 4.0), layout="constrained")
    axis.axhline(results[LIMIT, 0]["after"], color="black", linestyle="--", label="exact probabilities, test puzzles")
    for place, arm in enumerate(ARMS):
        runs = [run for (name, _), run in sorted(results.items()) if name == arm and run.get("curve")]
        for i, run in enumerate(runs):
            seconds, rates = zip(*run["curve"], strict=True)
            shares = [each / run["seconds"] for each in seconds]
            axis.plot(shares, rates, ".-", color=f"C{place}", label=None if i else arm)
    axis.set(xlabel="share of the time behind the common start", ylabel="validation puzzles solved", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def better_two(results: Results, arm: str) -> list[float]:
    """The rates of the arm that solve most on the first seed."""
    return [TRIALS[arm][trial] for trial in paired.better_two(results, TRIALS[arm])]


def best(results: Results, arm: str) -> float:
    """The rate of the arm that solves most on both seeds; of equal ones the lower."""
    return TRIALS[arm][paired.best_trial(results, TRIALS[arm])]


if __name__ == "__main__":
    stored = read_json(STORED) if STORED.exists() else []
    tuning = which(("tune", "study")) == "tune"
    fresh = (
        paired.tune_in_two_rounds(TUNING, Path("runs") / TUNING.name, TRIALS.values(), run_one)
        if tuning
        else main(STUDY, __doc__, run=run_one)
    )
    results = {(run["arm"], run["seed"]): run for run in stored} | dict(fresh)
    print(*map(markdown, tables(results)), sep="\n")
    write_json(STORED, list(results.values()))
    picture(results, STORED.with_suffix(".png"))
