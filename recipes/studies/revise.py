"""Does RL of a sampler that revises beat RL of a plain one in as many forwards? 4x4 Sudoku, claims stated before.

Every arm trains its seed's one model, warmed up with corrupted tokens, and is evaluated greedily by its own sampler.
An arm's name ends with the forwards n of a completion. Nothing is quantized; all arms have one learning rate, 8 prompts
of 8 completions, 100 steps, and one update per rollout.

    plain           16 / n cells a step; none is drawn again
    edits           the same; each written cell is drawn again with probability RATE in each step (`SoftEdit`).
                    `Trajectory()` scores every writing
    edits, elbo     the same rollouts, scored by the ELBO() of the final grid with n samples, which ignores edits, as
                    published work does: the control of exact events
    plain to edits  trained as `plain`, evaluated as `edits`: the control of training with edits

RATE has the best mean of "edits, 4" on seeds 100 to 102 among RATES (`tune`), on the study's own held-out puzzles;
`plain` has nothing to choose. The contrasts below were written before the runs of `main`. After them "plain, elbo" was
added, of which nothing is claimed: ELBO() also draws other masks than Trajectory(), with edits or without.

    python -m recipes.studies.revise                  run what is missing, then write revise.json, print the tables
    python -m recipes.studies.revise tune             run the rates, then print their table
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_rl import ELBO, NoCorrection, SoftEdit
from dllm_rl.files import read_json
from recipes.studies.paired import Contrast, Study, by_arm, main, tables, tune
from recipes.sudoku_revise import recipe, unmask_in_four

FORWARDS = (2, 4, 8)
RATE = 0.2
RATES = (0.05, 0.1, 0.2, 0.4)
STORED = Path(__file__).with_suffix(".json")  # every run

base = replace(
    recipe,
    corrector=NoCorrection(),
    rollout_quantization=None,
    train_batch_size=8,
    sampler=unmask_in_four.replace(temperature=1.0),
    eval_sampler=unmask_in_four.replace(temperature=0.0),  # which the warm-up's target is of
)


def arm(forwards: int, *, rate: float = 0.0, at_end: float | None = None, **changes: Any) -> dict[str, Any]:
    """Changes for n forwards, edits at `rate`, and at another rate in evaluations."""
    made: dict[str, Any] = {"max_retained_graphs": forwards, **changes}
    for name, share in (("sampler", rate), ("eval_sampler", rate if at_end is None else at_end)):
        commit = {"commit": SoftEdit(rate=share)} if share else {}
        made[name] = getattr(base, name).replace(diffusion_steps=forwards, **commit)
    return made


ARMS: dict[str, dict[str, Any]] = {}
for n in FORWARDS:
    ARMS[f"plain, {n}"] = arm(n)
    ARMS[f"edits, {n}"] = arm(n, rate=RATE)
    ARMS[f"edits, elbo, {n}"] = arm(n, rate=RATE, likelihood=ELBO(num_samples=n))
    ARMS[f"plain, elbo, {n}"] = arm(n, likelihood=ELBO(num_samples=n))
ARMS["plain to edits, 8"] = arm(8, at_end=RATE)
PLAIN = [f"plain, {n}" for n in FORWARDS]

study = Study(
    name="revise",
    base=base,
    arms=ARMS,
    against={name: f"plain, {name.split(', ')[-1]}" for name in ARMS if name not in PLAIN},
    metrics={"rollouts solved": "rewards/solve_rate/mean", "gradient norm": "grad_norm"},
    seeds=10,
    num_steps=100,
    contrasts=(
        *(Contrast(f"edits gain at {n} forwards", f"edits, {n}", f"plain, {n}") for n in FORWARDS),
        *(Contrast(f"exact events gain at {n}", f"edits, {n}", f"edits, elbo, {n}") for n in FORWARDS),
        Contrast("training with edits gains at 8", "edits, 8", "plain to edits, 8"),
    ),
)
rates = replace(study, name="revise-rates", arms={f"rate {r}": arm(4, rate=r) for r in RATES}, against={}, contrasts=())


def page_tables() -> dict[str, str]:
    return {"arms and claims": tables(study, by_arm(read_json(STORED)))}


if __name__ == "__main__":
    if sys.argv[1:] == ["tune"]:
        tune(rates, Path("runs/revise-rates"))
    else:
        found = main(study, __doc__, stored=STORED)
        print(tables(study, found))
