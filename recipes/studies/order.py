"""Which order learns best, and does the order's part of the likelihood help? Claims stated before the runs.

Every arm trains its seed's one warmed-up model, unquantized and on-policy, one update per rollout, 120 steps. Arms
differ in how training rollouts are ranked; all evaluations are greedy, ranked by `MaxProb`.

    max_prob, random         no gradient of the order: its probability is 0 or 1, or depends on no weight
    confidence, noisy        `Trajectory()` scores tokens and order; noisy is `PlackettLuce` at the task's TAU
    ..., tokens alone        the same rollouts, scored by trajectory(include_order=False)

TAU has the best mean on seeds 100 to 102 among TAUS (`tune`), on the study's own held-out problems; the other arms have
nothing to choose. The contrasts below were written before the runs; Holm's correction counts those of one task.

    python -m recipes.studies.order sudoku            4x4, two steps a completion; or countdown, three steps: run what
                                                      is missing, write order_sudoku.json, print the tables
    python -m recipes.studies.order sudoku tune       run the temperatures, then print their table
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dllm_rl import MaxProb, NoCorrection, Recipe, Trajectory
from dllm_rl.files import read_json
from dllm_rl.samplers.rules import Confidence, PlackettLuce, RandomOrder
from recipes import countdown_tiny, sudoku_unique
from recipes.studies.paired import Contrast, Study, by_arm, main, tables, tune, which

RECIPES = {"sudoku": sudoku_unique.recipe, "countdown": countdown_tiny.recipe}
METRICS = {"sudoku": "solve_rate", "countdown": "accuracy"}
TAUS = (0.1, 0.3, 1.0)
TAU = {"sudoku": 1.0, "countdown": 1.0}
SEEDS = {"sudoku": 10, "countdown": 5}
STORED = {task: Path(__file__).with_name(f"order_{task}.json") for task in RECIPES}  # every run

CONTRASTS = (
    Contrast("a noisy order learns more than max_prob's", "noisy", "max_prob"),
    Contrast("a noisy order learns more than a random one", "noisy", "random"),
    Contrast("the noisy order's part helps", "noisy", "noisy, tokens alone"),
    Contrast("confidence's part helps", "confidence", "confidence, tokens alone"),
)


def arm(recipe: Recipe, rank: Any, include_order: bool = True) -> dict[str, Any]:
    return {"sampler": recipe.sampler.replace(rank=rank), "likelihood": Trajectory(include_order=include_order)}


def study_of(task: str) -> Study:
    base = replace(RECIPES[task], corrector=NoCorrection(), rollout_quantization=None)
    noisy = PlackettLuce(temperature=TAU[task])
    arms = {
        "max_prob": arm(base, MaxProb()),
        "random": arm(base, RandomOrder()),
        "noisy": arm(base, noisy),
        "noisy, tokens alone": arm(base, noisy, False),
        "confidence": arm(base, Confidence()),
        "confidence, tokens alone": arm(base, Confidence(), False),
    }
    return Study(
        name=f"order-{task}",
        base=base,
        arms=arms,
        against={name: "max_prob" for name in arms if name != "max_prob"},
        metrics={"rollouts solved": f"rewards/{METRICS[task]}/mean", "gradient norm": "grad_norm"},
        seeds=SEEDS[task],
        num_steps=120,
        contrasts=CONTRASTS,
        metric=METRICS[task],
    )


STUDIES = {task: study_of(task) for task in RECIPES}


def temperatures_of(study: Study) -> Study:
    """The noisy arm at each of TAUS."""
    arms = {f"noisy {tau}": arm(study.base, PlackettLuce(temperature=tau)) for tau in TAUS}
    return replace(study, name=f"{study.name}-tune", arms=arms, against={}, contrasts=())


def page_tables() -> dict[str, str]:
    return {task: tables(study, by_arm(read_json(STORED[task]))) for task, study in STUDIES.items()}


if __name__ == "__main__":
    task = which(STUDIES)
    if sys.argv[1:] == ["tune"]:
        temperatures = temperatures_of(STUDIES[task])
        tune(temperatures, Path("runs") / temperatures.name)
    else:
        found = main(STUDIES[task], __doc__, stored=STORED[task])
        print(tables(STUDIES[task], found))
