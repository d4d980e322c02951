"""What does the exact likelihood of a model that renoises buy? A small DiffusionGemma, 4x4 Sudoku. Claims before runs.

Every arm starts from its seed's one warmed-up model, and trains for the processor time that 120 steps of "exact" take,
on one thread. An arm's number of steps is that time over the time of one of its steps, measured first. Rollouts are
unquantized and take four steps. All arms have one learning rate, 5e-4, which was chosen for "exact" on seed 0. All are
evaluated by the authors' sampler in four steps, on 400 held-out puzzles.

    exact            `Trajectory()`: every draw of every step, as it was drawn; every draw is accepted
    full             the same, and the gradient goes back through the self-conditioning
    one step         the answer's tokens in one forward, from the noise that the canvas began with: what d1's estimate
                     is for masks
    bound of 0.1     `Trajectory()`, but rollouts accept as the authors' sampler does. Which draws are accepted is a
                     function of the weights that no gradient sees

Of seed 0 it was known before that "exact" is above "bound of 0.1" (0.405 and 0.340 after 240 steps, FP8). The claims,
on seeds 10 to 19, are those of `CLAIMS`.

    python -m recipes.studies.renoising               costs, runs, renoising.json, the tables
    python -m recipes.studies.renoising --report      run nothing
"""

import argparse
import math
import os
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Generator

from dllm_rl import Trajectory
from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods.estimators import LikelihoodEstimator
from dllm_rl.likelihoods.renoising import RenoiseView, renoise_record
from dllm_rl.likelihoods.views import View, ViewFeature
from dllm_rl.models.base import Policy
from dllm_rl.types import Renoised, Rollout, Views
from recipes.renoise_sudoku import recipe, renoise_in_four
from recipes.studies.paired import (
    Clock,
    Contrast,
    Study,
    arm_rows,
    by_arm,
    contrast_rows,
    load,
    markdown,
    run_all,
    run_missing,
    tables,
)

STORED = Path(__file__).with_suffix(".json")  # costs and every run
SEEDS = range(10, 20)
STEPS = 120  # of "exact"
TIMED = 12  # steps, of which the first two are left out
EXACT, FULL, ONE_STEP, BOUND = "exact", "full", "one step", "bound of 0.1"


class FromNoise(RenoiseView):
    """A view of one forward: the answer's tokens, given the noise that their canvas began with."""

    def logprobs(self, policy: Policy, rollout: Rollout) -> torch.Tensor:
        return super().logprobs(policy, self._one_step(rollout))

    def backward(self, policy: Policy, rollout: Rollout, vector: torch.Tensor) -> None:
        super().backward(policy, self._one_step(rollout), vector)

    def _one_step(self, rollout: Rollout) -> Rollout:
        part = renoise_record(rollout)
        drawn = torch.where(part.block >= 0, rollout.tokens, -1).int()[..., None]
        made = Renoised(part.block, part.seen[..., :1], drawn, torch.zeros_like(part.logprobs[..., :1]), (1.0,))
        return replace(rollout, renoised=made)


@dataclass(frozen=True)
class OneStep(ViewFeature):
    is_per_token: ClassVar[bool] = True

    def apply_to(self, view: View, number: int) -> View:
        return FromNoise(view.masked, view.scored)


class OneStepLikelihood(LikelihoodEstimator):
    supported_attention = ("encoder_decoder",)
    is_random = False

    def draw_views(self, rollout: Rollout, generator: Generator) -> Views:
        scored = renoise_record(rollout).block >= 0
        return Views(torch.zeros_like(scored)[None], scored.float()[None], features=(OneStep(),))


one_step = OneStepLikelihood()
every_draw = renoise_in_four.replace(answer="drawn", entropy_bound=math.inf)
base = replace(recipe, rollout_quantization=None, sampler=every_draw, likelihood=Trajectory())
ARMS: dict[str, dict[str, Any]] = {
    EXACT: {},
    FULL: {"likelihood": Trajectory(self_conditioning="full")},
    ONE_STEP: {"likelihood": one_step},
    BOUND: {"sampler": renoise_in_four.replace(answer="drawn")},
}
CLAIMS = (
    Contrast("the exact likelihood is above one step", EXACT, ONE_STEP),
    Contrast("the gradient through the self-conditioning helps", FULL, EXACT),
    Contrast("accepting every draw is above the authors' bound", EXACT, BOUND),
)
study = Study(
    name="renoising",
    base=base,
    arms=ARMS,
    against={FULL: EXACT, ONE_STEP: EXACT, BOUND: EXACT},
    metrics={"rollouts solved": "rewards/solve_rate/mean", "gradient norm": "grad_norm"},
    seeds=len(SEEDS),
    num_steps=STEPS,
    contrasts=CLAIMS,
)


def cost(arm: str, folder: Path) -> None:
    """Write the processor seconds of a step of the arm, from a model that knows nothing."""
    from dllm_rl.training.trainer import train

    clock = Clock()
    made = replace(base, **ARMS[arm])
    timed = {"sft_warmup_steps": 0, "num_steps": TIMED, "eval_steps": 0, "report_to": None, "seed": 100}
    timed |= {"eval_task": replace(base.eval_task, size=8), "output_dir": str(folder / "timed" / arm.replace(" ", "-"))}
    train(replace(made, callbacks=[clock], overwrite_output_dir=True, **timed))
    folder.joinpath("costs").mkdir(parents=True, exist_ok=True)
    write_json(folder / "costs" / f"{arm}.json", {"arm": arm, "s": mean(clock.seconds[2:])})


def page_tables() -> dict[str, str]:
    return {"arms and claims": tables(study, by_arm(read_json(STORED)["runs"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs") / study.name)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of renoising.json")
    options = parser.parse_args()
    root = options.output_dir
    if options.report:
        stored = read_json(STORED)
        costs, results = stored["seconds of a step"], by_arm(stored["runs"])
    else:
        untimed = [arm for arm in ARMS if not (root / "costs" / f"{arm}.json").exists()]
        run_all(((f"cost-{arm}", partial(cost, arm, root)) for arm in untimed), root, workers=1)
        costs = {arm: read_json(root / "costs" / f"{arm}.json")["s"] for arm in ARMS}
        steps = {arm: round(STEPS * costs[EXACT] / costs[arm]) for arm in ARMS}
        runs = [(arm, seed) for seed, arm in product(SEEDS, ARMS)]
        run_missing(study, root, runs, num_steps=steps.__getitem__, workers=options.workers)
        results = load(root)
        if len(results) == len(runs):
            write_json(STORED, {"seconds of a step": costs, "runs": list(results.values())})
    print(markdown([{"arm": arm, "seconds of a step": f"{seconds:.3f}"} for arm, seconds in costs.items()]))
    print(markdown(arm_rows(study, results)))
    print(markdown(contrast_rows(study, results)))


if __name__ == "__main__":
    main()
