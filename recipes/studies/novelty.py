"""Does a reward for new texts keep a loop from repeating itself? Three seeds of instance 0, tuning: nothing is claimed.

"wild type": `grpo` with an `Oracle` fills in 8 of 32 residues of one natural sequence; "elites": infilling as mutation,
../elites.py. 2,000 calls of the Ehrlich function of instance 0, at most 200 steps of 16 x 8 sequences. `new` is the
share of the sequences that cost a call, without the step that the budget cuts; `last_5` that of the last five steps;
`top` the mean of the ten best.

    pip install pytorch-holo==0.0.5
    python -m recipes.studies.novelty    # run what is missing; minutes on one core
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from dllm_rl import Oracle, Problem, Reward, Trajectory, grpo, train
from dllm_rl.files import read_json, write_json
from dllm_rl.monitoring.json_lines import json_objects
from dllm_rl.rng import generator_for
from recipes.elites import Elites, infilling
from recipes.scaffolds import LENGTH, chat, in_four, natural, score, taught, text_of

BUDGET, WEIGHTS, SEEDS = 2000, (0.0, 0.05, 0.2), (0, 1, 2)
STORED, RUNS = Path(__file__).with_suffix(".json"), Path("runs/novelty")
ARMS: dict[str, dict[str, Any]] = {
    "wild type": {"learning_rate": 3e-3},
    "wild type, beta": {"learning_rate": 3e-3, "beta": 0.05},
    "elites": {"learning_rate": 3e-3},
    "elites, high rate": {"learning_rate": 1e-2},
}


class NewElites(Elites):
    """Elites whose reward has the novelty added."""

    weight = 0.0

    def rewards(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Reward]:
        graded = super().rewards(problems, completions)
        new: Any = self.oracle.novelty(completions=list(completions))
        return [
            Reward(None if each.value is None else each.value + self.weight * number, each.parsed)
            for each, number in zip(graded, new, strict=True)
        ]


def measured(completions: Sequence[Any]) -> list[float]:
    return score(0, [completion[0]["content"] for completion in completions])


def run(arm: str, weight: float, seed: int) -> dict[str, Any]:
    folder = RUNS / f"{arm}-{weight}-{seed}"
    settings = ARMS[arm] | {"seed": seed, "num_steps": 200, "eval_steps": 0, "output_dir": str(folder)}
    settings |= {"report_to": None, "save_steps": 1000, "train_batch_size": 16, "overwrite_output_dir": True}
    (folder / "oracle.jsonl").unlink(missing_ok=True)  # of a run that did not finish
    if arm.startswith("elites"):
        recipe = infilling(0, partial(taught, 0, seed=seed), budget=BUDGET, **settings)
        oracle = recipe.callbacks[0]
        elites = NewElites(oracle, chat, length=LENGTH, seed=seed)
        elites.weight = weight
        train(recipe.replace(task=elites, callbacks=[oracle, elites]))
    else:
        residues = text_of(natural(0, 1, generator_for(0, "wild type"))[0])
        free = {*torch.randperm(LENGTH, generator=generator_for(0, "places"))[:8].tolist()}
        row = {"prompt": chat("".join("_" if i in free else residue for i, residue in enumerate(residues)))}
        options = {"diffusion_steps": in_four.diffusion_steps, "rank": in_four.rank, "suppress": in_four.suppress}
        oracle = Oracle(measured, budget=BUDGET, batch_size=64)
        grpo(
            taught(0, seed=seed),
            [row],
            [oracle, oracle.novelty],
            reward_weights=[1.0, weight],
            blank="_",
            sampler_options=options,
            likelihood=Trajectory(),
            max_retained_graphs=4,
            **settings,
        )
    steps = [*json_objects(folder / "metrics.jsonl")]
    values = [row["reward"] for row in json_objects(folder / "oracle.jsonl")]
    whole = steps[:-1] if len(values) == BUDGET else steps
    new = [1 - step["oracle/frac_repeated"] for step in whole]
    found = {
        "steps": len(steps),
        "calls": len(values),
        "new": round(fmean(new), 4),
        "last_5": round(fmean(new[-5:]), 4),
    }
    return {"arm": arm, "weight": weight, "seed": seed} | found | {"best": max(values), "top": top(values)}


def top(values: Sequence[float]) -> float:
    return fmean(sorted(values, reverse=True)[:10])


def main() -> None:
    results = read_json(STORED) if STORED.exists() else []
    done = {(each["arm"], each["weight"], each["seed"]) for each in results}
    for arm in ARMS:
        for weight in WEIGHTS:
            for seed in SEEDS:
                if (arm, weight, seed) not in done:
                    results.append(run(arm, weight, seed))
                    write_json(STORED, results)
    for arm in ARMS:
        for weight in WEIGHTS:
            runs = [each for each in results if (each["arm"], each["weight"]) == (arm, weight)]
            numbers = "  ".join(f"{key} {fmean(each[key] for each in runs):.3f}" for key in ("new", "calls", "top"))
            print(f"{arm}, weight {weight}: {numbers}")


if __name__ == "__main__":
    main()
