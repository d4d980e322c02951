"""What parallel decoding and approximate caches cost: solve rate, mismatch against an exact learner, work.

    python benchmarks/sampler_quality.py CHECKPOINT [--json FILE]

CHECKPOINT is a model of compact 4x4 Sudoku. The solve rate is that of greedy completions. The mismatch is of sampled
ones (temperature 1): log-ratio of the exact model's replay to the recorded log-prob, per token, and the effective
sample size of its exponential.
"""

import argparse
import json
import re
import time
from functools import partial
from pathlib import Path

import torch

from dllm_rl.algorithms.mismatch import mismatch_metrics
from dllm_rl.likelihoods.estimators import trajectory
from dllm_rl.models.base import Policy
from dllm_rl.models.policy import load_policy
from dllm_rl.models.tokens import decode, encode
from dllm_rl.rng import generator_for
from dllm_rl.samplers.cache import dual_cache, prefix_cache
from dllm_rl.samplers.rules import entropy, entropy_bound, factor, max_prob, threshold
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks.base import grade
from dllm_rl.tasks.sudoku import Sudoku

LINES = {
    "a token a step": {},
    "schedule, 4 steps": {"num_steps": 4},
    "schedule, 2 steps": {"num_steps": 2},
    "threshold 0.99": {"commit": partial(threshold, tau=0.99)},
    "threshold 0.9": {"commit": partial(threshold, tau=0.9)},
    "threshold 0.7": {"commit": partial(threshold, tau=0.7)},
    "threshold 0.5": {"commit": partial(threshold, tau=0.5)},
    "factor 1": {"commit": partial(factor, f=1.0)},
    "entropy bound 0.1": {"rank": entropy, "commit": partial(entropy_bound, gamma=0.1)},
    "blocks of 8": {"block_size": 8},
    "blocks of 8, prefix cache": {"block_size": 8, "cache": prefix_cache()},
    "blocks of 8, prefix cache, refresh 4": {"block_size": 8, "cache": prefix_cache(refresh=4)},
    "blocks of 8, dual cache": {"block_size": 8, "cache": dual_cache()},
    "blocks of 8, dual cache, refresh 4": {"block_size": 8, "cache": dual_cache(refresh=4)},
    "blocks of 8, dual cache, refresh 1": {"block_size": 8, "cache": dual_cache(refresh=1)},
}


def measure(policy: Policy, size: int, seeds: int, clues: tuple[int, int], options: dict) -> dict:
    """Means over `seeds` sets of `size` puzzles; forwards are those that a row takes part in."""
    positions, forward = [], policy.module.base_model.forward
    policy.module.base_model.forward = lambda *a, **k: positions.append(k["input_ids"].numel()) or forward(*a, **k)
    rates, forwards, mismatch, seconds = [], 0.0, {}, 0.0
    for seed in range(seeds):
        task = Sudoku(split="test", clues=clues, size=size, seed=seed)
        problems = [task[i] for i in range(size)]
        prompts = encode(policy, problems)
        began = time.perf_counter()
        greedy = unmask(policy, prompts, generator_for(seed), max_new_tokens=16, **options)
        seconds += time.perf_counter() - began
        rates.append(sum(r.breakdown["solve_rate"] for r in grade(task, problems, decode(policy, greedy))) / size)
        forwards += float((greedy.unmask_step.amax(-1) + 1).double().mean()) / seeds
        columns = sum(positions)
        drawn = unmask(
            policy, prompts, generator_for(seed), max_new_tokens=16, **{"rank": max_prob} | options, temperature=1.0
        )
        exact = trajectory()
        replay = exact.logprobs(policy, drawn, exact.draw(drawn, torch.Generator()))
        metrics = mismatch_metrics(replay - drawn.logprobs, drawn.completion_mask)
        for name in ("abs_log_ratio_mean", "abs_log_ratio_max", "rollout_is_eff_sample_size"):
            mismatch[name] = mismatch.get(name, 0.0) + metrics[f"rollout_corr/{name}"] / seeds
        positions.clear()
    policy.module.base_model.forward = forward
    rate = sum(rates) / seeds
    return {
        "solve_rate": rate,
        "solve_rates": rates,
        "forwards_per_row": forwards,
        "body_positions_per_row": columns / size,
        "seconds": seconds / seeds,
        **mismatch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--size", type=int, default=500, help="puzzles in a set")
    parser.add_argument("--seeds", type=int, default=3, help="sets")
    parser.add_argument("--clues", type=int, nargs=2, default=(10, 12))
    parser.add_argument("--only", default="", help="a regular expression that names the lines to run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    policy = load_policy(arguments.checkpoint)
    lines = {}
    print(
        f"{'':38} {'solved':>7} {'forwards':>8} {'positions':>9} {'seconds':>8} {'|log rho|':>9} {'max':>7} {'ESS':>6}"
    )
    for name, options in LINES.items():
        if not re.search(arguments.only, name):
            continue
        row = lines[name] = measure(policy, arguments.size, arguments.seeds, tuple(arguments.clues), options)
        print(
            f"{name:38} {row['solve_rate']:7.1%} {row['forwards_per_row']:8.2f} {row['body_positions_per_row']:9.0f} "
            f"{row['seconds']:8.2f} {row['abs_log_ratio_mean']:9.2e} {row['abs_log_ratio_max']:7.3f} "
            f"{row['rollout_is_eff_sample_size']:6.3f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                vars(arguments) | {"checkpoint": Path(arguments.checkpoint).name, "json": None, "lines": lines},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
