"""Is it the number of steps that decides whether TIS helps, or the causal order? Claims stated before the runs.

TIS brings back part of the harm of five levels for a diffusion model in 2 steps, and none for a causal one in 16. So
the diffusion model unmasks in 2, 4 and 8 steps here, training and evaluation alike, and the causal one writes 16. (A
claim of 16 steps, five seeds, was dropped when the first seeds ran: a run takes three minutes.)
In every setting the rollout's block matrices move a share of the way to their five levels; the share is that at which
the mean |log ratio| of the start is TARGET on seeds 100 to 102 (`tune` prints it). One update a rollout.

    python -m recipes.studies.lengths                 run what is missing, then print the tables
    python -m recipes.studies.lengths tune            print SHARES
    python -m recipes.studies.lengths --report        the tables of lengths.json
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from dllm_rl import TIS, NoCorrection
from dllm_rl.decoding.tokens import encode
from dllm_rl.files import read_json, write_json
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.models.base import Policy
from dllm_rl.models.policy import load_policy
from dllm_rl.models.rollout_engine import FunctionEngine, RolloutEngine
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.quantization.schemes import EmulatedLinear, FakeQuantize
from dllm_rl.rng import generator_for
from recipes.studies import mismatch, mismatch_ar
from recipes.studies.paired import (
    Contrast,
    Results,
    Study,
    by_arm,
    contrast_rows,
    interval,
    markdown,
    run_missing,
    tables,
    warm_up,
)
from recipes.studies.paired import load as load_results

STORED = Path(__file__).with_suffix(".json")  # every run
TARGET = 0.2  # nats
SHARES = {"2 steps": 0.96, "4 steps": 0.99, "8 steps": 0.97, "causal": 0.91}

# Arms of which nothing is claimed take fewer seeds than ten.
SEEDS = {f"{name}: unquantized": 5 for name in ("2 steps", "4 steps", "causal")}
SEEDS |= {"8 steps: unquantized": 3}


def blend(policy: Policy, rounded: Policy, share: float) -> None:
    """Move the copy's rounded matrices back, until they lie `share` of the way from the learner's."""
    with torch.no_grad():
        for name, layer in rounded.module.named_modules():
            if isinstance(layer, EmulatedLinear):
                layer.weight.lerp_(policy.module.get_submodule(name).weight, 1 - share)


def load(policy: Policy, *, share: float) -> Policy:
    rounded = quantized_copy(policy, FakeQuantize(weight="five_level"))
    blend(policy, rounded, share)
    return rounded


def sync(policy: Policy, rounded: Policy, *, share: float) -> dict[str, float]:
    sync_weights(policy, rounded)
    blend(policy, rounded, share)
    return {}


def blended(share: float) -> RolloutEngine:
    return FunctionEngine(load_fn=partial(load, share=share), sync_fn=partial(sync, share=share))


def arms_of(name: str) -> dict[str, dict[str, Any]]:
    changes: dict[str, Any] = {}
    if name != "causal":
        steps = {"diffusion_steps": int(name.split()[0])}
        changes = {key: getattr(mismatch.base, key).replace(**steps) for key in ("sampler", "eval_sampler")}
    engine = changes | {"rollout_engine": blended(SHARES[name])}
    return {
        f"{name}: unquantized": changes,
        f"{name}: none": engine,
        f"{name}: TIS": engine | {"corrector": TIS()},
    }


def against(arm: str) -> str:
    name, corrector = arm.split(": ")
    return f"{name}: {'none' if corrector == 'TIS' else 'unquantized'}"


def study_of(before: Study, names: Sequence[str]) -> Study:
    """The names' arms, trained as `before` says."""
    arms = {arm: changes for name in names for arm, changes in arms_of(name).items()}
    return replace(
        before,
        name="lengths",
        base=replace(before.base, rollout_quantization=None, corrector=NoCorrection(), max_retained_graphs=16),
        arms=arms,
        against={arm: against(arm) for arm in arms if "unquantized" not in arm},
        metrics=mismatch.study.metrics,
        seeds=10,
        fewer={arm: SEEDS[arm] for arm in SEEDS.keys() & arms},
        contrasts=tuple(Contrast(f"TIS helps: {name}", f"{name}: TIS", f"{name}: none") for name in names),
    )


DIFFUSION = study_of(mismatch.study, list(SHARES)[:-1])
CAUSAL = study_of(mismatch_ar.study, ["causal"])
study = replace(  # of whom the tables are
    DIFFUSION,
    arms=DIFFUSION.arms | CAUSAL.arms,
    against=DIFFUSION.against | CAUSAL.against,
    contrasts=DIFFUSION.contrasts + CAUSAL.contrasts,
)


def distance(study: Study, arm: str, start: Path, share: float) -> float:
    """Mean |log ratio| per token of 128 completions by the blended copy of the model at `start`, nats."""
    recipe = replace(study.base, **study.arms[arm])
    policy = load_policy(start)
    problems = [recipe.task[index] for index in range(128)]
    prompts = encode(policy, problems, num_generations=1, seeds=list(range(len(problems))))
    rollout = recipe.sampler(load(policy, share=share), prompts, generator_for(0, "distance"))
    noise = recipe.likelihood.draw_views(rollout, generator_for(0, "noise"))
    apart = recipe.likelihood.logprobs(policy, rollout, noise) - recorded(rollout, noise)
    return apart[rollout.completion_mask].abs().mean().item()


def tuned(study: Study, name: str, root: Path) -> float:
    """The share at which the mean distance of three starts is TARGET, by bisection to 0.01."""
    starts = [warm_up(study.base, seed, root / "warm" / str(seed)) for seed in (100, 101, 102)]
    low, high = 0.0, 2.0
    while high - low > 0.01:
        middle = (low + high) / 2
        far = mean(distance(study, f"{name}: none", start, middle) for start in starts)
        low, high = (low, middle) if far > TARGET else (middle, high)
    return round((low + high) / 2, 2)


def told(results: Results) -> str:
    """The table, as the document holds it."""
    rows = []
    claims = {row["arm"]: row for row in contrast_rows(study, results)}
    for name in SHARES:
        row = {"steps": name}
        for arm in (f"{name}: {each}" for each in ("unquantized", "none", "TIS")):
            runs = [run for (other, _), run in results.items() if other == arm]
            row[arm.split(": ")[1]] = interval([run["after"] for run in runs]) if runs else "-"
        claim = claims[f"{name}: TIS"]
        row |= {"TIS minus none": claim["difference, 95 %"], "Holm's p": claim["Holm's p"]}
        rows.append(row)
    return markdown(rows)


def go_on(root: Path) -> None:
    """Run what is missing, and write every run."""
    for part in (DIFFUSION, CAUSAL):
        runs = [(arm, seed) for seed, arm in product(range(study.seeds), part.arms) if seed < part.fewer.get(arm, 10)]
        steps = part.num_steps
        run_missing(part, root / part.base.name, runs, num_steps=lambda _, steps=steps: steps, workers=os.cpu_count())
    results = load_results(root / DIFFUSION.base.name) | load_results(root / CAUSAL.base.name)
    write_json(STORED, list(results.values()))


def page_tables() -> dict[str, str]:
    return {"steps": told(by_arm(read_json(STORED)))}


def main() -> None:
    root = Path("runs") / study.name
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="?", choices=("tune", "study"), default="study")
    parser.add_argument("--report", action="store_true", help=f"run nothing: the tables of {STORED.name}")
    options = parser.parse_args()
    if options.which == "tune" and not options.report:
        for name in SHARES:
            part = CAUSAL if name == "causal" else DIFFUSION
            print(name, tuned(part, name, root / part.base.name))
        return
    if not options.report:
        go_on(root)
    results = by_arm(read_json(STORED))
    print(tables(study, results, "mean abs log-ratio", "ESS"), told(results), sep="\n")


if __name__ == "__main__":
    main()
