"""Runs with groups of unequal size and replayed rows, for one process and for two."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from tiny_recipe import SIZES as MODEL
from tiny_recipe import tiny_recipe
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dllm_rl import TIS, OneStep, Prompts, Rollout, Trajectory, Unmask, train
from dllm_rl.algorithms.prompt_sources import UniformPrompts
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.step import balance
from recipes.examples.replay import ReplayRows
from recipes.examples.unequal_groups import EqualPrompts

SIZES = (1, 5, 2, 6)
# In its first steps this model writes an even number of answers worth storing: two processes replay equally many rows.
EVEN = partial(tiny_masked_lm, **MODEL | {"num_layers": 2})


_NO_TOKENS = torch.zeros(0, 1, dtype=torch.long)
NO_ROWS = Rollout(_NO_TOKENS, _NO_TOKENS.bool(), _NO_TOKENS.bool(), _NO_TOKENS, _NO_TOKENS.float(), torch.arange(0))


class Given(UniformPrompts):
    """Groups of the sizes of SIZES, in another order at every step."""

    def group_sizes(self, history, prompts, num_generations, generator):
        return torch.tensor(SIZES).repeat(len(prompts) // len(SIZES))[torch.randperm(len(prompts), generator=generator)]


def unequal(directory, **changes):
    settings = {"prompt_source": Given(), "likelihood": Trajectory(include_order=False), "corrector": TIS()}
    settings |= {"num_steps": 3, "report_to": None, "save_steps": 1, "save_total_limit": 9}
    return tiny_recipe(directory, **(settings | changes))


def replay():
    return ReplayRows(capacity=12, num_rows=6)


def run(directory, **changes):
    """A run with both, whose main process leaves the gradients of every update; every swap that helps is made."""
    gradients_of_run(directory, (replay(), EqualPrompts()), **changes)


def drawn(directory):
    """A run that draws denoising steps."""
    steps = {"likelihood": Trajectory(variance_growth=1.0, include_order=False), "num_iterations": 2}
    gradients_of_run(directory, (EqualPrompts(),), **steps)


def gradients_of_run(directory, features, **changes):
    """A run whose main process leaves the gradients of every update; every swap that helps is made."""
    gradients, swaps, plan_swaps = [], [], balance.plan_swaps

    def keep(optimizer, *_):
        gradients.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))

    def counted(*arguments):
        swaps.extend(plan_swaps(*arguments))
        return swaps

    hook = register_optimizer_step_pre_hook(keep)
    with mock.patch.object(balance, "plan_swaps", counted), mock.patch.object(balance, "MIN_SAVING", 0):
        train(replace(unequal(directory, model=EVEN), **changes), features=features)
    hook.remove()
    if os.environ.get("RANK", "0") == "0":
        torch.save((torch.stack(gradients), len(swaps)), Path(directory) / "gradients.pt")


def gradients_of_shared_rows(policy, times=12):
    """The same gradient again and again, (parameters,): 160 completions whose fully masked views are one row."""
    prompts = Prompts.from_ids([[3, 4, 5]], pad_id=policy.pad_id, num_generations=160)
    rollout = Unmask(max_new_tokens=16, temperature=1.0)(policy, prompts, generator_for(0))
    views = OneStep(prompt_mask=0.0).draw_views(rollout, generator_for(1))
    vectors, found = torch.randn(views.coefficients.shape, generator=generator_for(2)), []
    for _ in range(times):
        policy.module.zero_grad()
        OneStep().backward(policy, rollout, views, vectors.to(policy.device))
        found.append(torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.grad is not None]))
    return found
