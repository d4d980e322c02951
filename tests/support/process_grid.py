"""The same run on 1 to 4 processes, each holding the learner whole or a part of it: diffusion and AR, all weights and
LoRA, inner iterations and dynamic sampling, micro-batches of one group and of all rows.

    PYTHONPATH=.:tests/support python tests/support/process_grid.py FOLDER [STEPS]

runs all of it on a CPU, with groups evened out however few rows that moves, and prints, of every launch, the largest
differences from one process that takes all rows at once. A subset of it is in tests/training/test_sharded_learner.py.
"""

import itertools
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from ranks import run_ranks
from run_outputs import metrics_of, weights_of
from sharded import trained
from tiny_recipe import OddPuzzles, tiny_recipe, tiny_recipe_ar
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dllm_rl import Lora
from dllm_rl.models.base import gather_if_sharded
from dllm_rl.step import balance

LAUNCHES = {1: (1,), 2: (1, 0), 3: (1, 0), 4: (1, 0, 2)}
MODELS = {"diffusion": tiny_recipe, "ar": tiny_recipe_ar}
TRAINED = {"full": {}, "lora": {"lora": Lora()}}
METHODS = {
    "iterations": {"num_iterations": 2},
    "dynamic": {"task": OddPuzzles(), "max_num_gen_batches": 3},
}
ROWS = {"all": None, "group": 2}
BATCH = {"train_batch_size": 12, "num_generations": 2, "learning_rate": 1e-3, "save_steps": 10**6}
BATCH |= {"log_completions_steps": 50}
FLOOR = 1e-3  # of a metric's size, below which its differences are taken as they are


def recipes(folder, *, steps, shard_size):
    """By name, in folders of their own."""
    found = {}
    for names in itertools.product(MODELS, TRAINED, METHODS, ROWS):
        model, trains, method, rows = names
        settings = BATCH | {"num_steps": steps, "shard_size": shard_size, "micro_batch_size": ROWS[rows]}
        settings |= TRAINED[trains] | METHODS[method] | {"report_to": None, "collective_timeout": 600.0}
        found["-".join(names)] = MODELS[model](folder / "-".join(names), **settings)
    return found


def run_all(folder, steps, sizes, *only):
    """What each process of a launch runs: of `sizes`, one after the other, all recipes or those of the names `only`. It
    leaves its rollouts, and the main one the gradients of every update."""
    rank, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    for size in sizes:
        made = recipes(Path(folder) / f"{count}-{size}", steps=steps, shard_size=size)
        for name in only or made:
            gradients = []

            def keep(optimizer, *_, gradients=gradients):
                parts = [
                    gather_if_sharded(p.grad).flatten() for group in optimizer.param_groups for p in group["params"]
                ]
                gradients.append(torch.cat(parts))

            hook = register_optimizer_step_pre_hook(keep)
            with traveling() as traveled:
                _, seen = trained(made[name])
            hook.remove()
            there = Path(made[name].directory)
            torch.save(seen, there / f"rollouts-{rank}.pt")
            if rank == "0":
                torch.save(torch.stack(gradients), there / "gradients.pt")
                (there / "traveled.json").write_text(json.dumps(traveled))


@contextmanager
def traveling():
    """Every swap that makes two processes' shares more even is made, however small; yields how many, call by call."""
    found, plan_swaps = [], balance.plan_swaps

    def counted(*arguments):
        plan = plan_swaps(*arguments)
        found.append(len(plan))
        return plan

    with mock.patch.object(balance, "plan_swaps", counted), mock.patch.object(balance, "MIN_SAVING", 0):
        yield found


def differences(one, other):
    """Of two runs' folders, the largest by kind; those of metrics and gradients as a share of their largest number."""
    rows = [metrics_of(folder) for folder in (one, other)]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]], "the same metrics at every step"
    largest = {name: max(abs(row[name]) for row in rows[0] if name in row) for name in set().union(*rows[0])}
    apart = {
        name: max(abs(a[name] - b[name]) for a, b in zip(*rows, strict=True) if name in a) / max(size, FLOOR)
        for name, size in largest.items()
    }
    worst = max(apart, key=lambda name: apart[name])
    a, b = (torch.load(folder / "gradients.pt") for folder in (one, other))
    first, second = (weights_of(json.loads((folder / "summary.json").read_text())) for folder in (one, other))
    tokens, at_first, logprobs = rollouts_apart(one, other)
    return {
        "loss": apart["loss"],
        "metrics": apart[worst],
        "gradients": ((a - b).abs().amax(1) / a.abs().amax(1)).max().item(),
        "weights": max((first[name] - second[name]).abs().max().item() for name in first),
        "tokens": tokens,
        "first log-probs": at_first,
        "log-probs": logprobs,
    }, worst


def rollouts_apart(one, other):
    """How many tokens of all rollouts differ, and by how much log-probs do at most: in the first step, which the same
    weights make, and in all."""
    runs = []
    for folder in (one, other):
        paths = sorted(folder.glob("rollouts-*.pt"))
        ranks = [torch.load(path) for path in paths]
        runs.append([[torch.cat(parts) for parts in zip(*step, strict=True)] for step in zip(*ranks, strict=True)])
    count, apart = 0, []
    for (tokens, logprobs), (others, theirs) in zip(*runs, strict=True):
        assert tokens.shape == others.shape, "as many tokens"
        count += int((tokens != others).sum())
        apart.append((logprobs - theirs).abs().max().item())
    return count, apart[0], max(apart)


def main(folder, steps):
    table = {}
    for processes, sizes in LAUNCHES.items():
        run_ranks(f"import process_grid as g; g.run_all({folder!r}, {steps}, {sizes})", processes)
        for size in sizes:
            found = {}
            for name in recipes(Path(folder), steps=steps, shard_size=1):
                base = Path(folder) / "1-1" / name.replace("-group", "-all")
                found[name], worst = differences(base, Path(folder) / f"{processes}-{size}" / name)
                numbers = ", ".join(f"{kind} {value:.1e}" for kind, value in found[name].items())
                print(f"{processes} processes, shard_size {size}, {name}: {numbers}; {worst}", flush=True)
            table[processes, size] = {kind: max(each[kind] for each in found.values()) for kind in found[name]}
    print("\n| processes | shard_size | " + " | ".join(found[name]) + " |")
    for (processes, size), row in table.items():
        print(f"| {processes} | {size} | " + " | ".join(f"{value:.1e}" for value in row.values()) + " |")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 10)
