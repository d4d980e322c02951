"""Tree rollouts: completions branch at a denoising step, and each node has its own advantage.

The rows of a group are roots x branches: `branches` adjacent rows share the tokens of the first `step` steps, which are
sampled once. Each row then continues by itself. A token's advantage is that of its node: the mean reward of the
completions below the node, minus the mean of its siblings. A row's own advantage would be biased for the shared tokens,
because its baseline contains rewards that these tokens cause.

A shared token is in the loss of `branches` rows, so that both levels are means over their nodes with the loss weight 1.
Counting a shared token once (`loss_weights` of 1 / branches) would divide the gradient of its level by `branches`.

Trees save forwards of the sampler, not of the learner, and their rows are not independent: on enumerated toys the
gradient of 2 roots x 2 branches has 1.4 to 2.8 times the variance of 4 independent rows, for 3/5 of the sampler's
forwards (tests/recipes/test_trees.py).

After d-TreeRPO, arXiv 2512.09675; a single branch and leave-one-out baselines are our choices.

OMP_NUM_THREADS=1 python -m recipes.examples.trees      half a minute on one core
"""

from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F

from dllm_rl import LeaveOneOut, MaxProb, Prompts, StepFeature, Trajectory, Unmask, option, tiny_masked_lm, train
from dllm_rl.algorithms.advantages import to_groups
from dllm_rl.decoding.prompts import encode
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.samplers.rules import order_probability
from dllm_rl.tasks import Problem, Reward
from dllm_rl.types.batch_record import BatchRecord
from dllm_rl.types.groups import group_sizes, starts_group
from recipes.sudoku_unique import recipe as base


class Tree(Unmask):
    """`Unmask` whose completions branch: `branches` adjacent rows of a group share the tokens of the first steps.

    Each row has the distribution of `Unmask`. Full attention only, without blocks and cache, for ranks and commit rules
    whose order does not depend on the drawn tokens, such as MaxProb or RandomOrder with Schedule.

    Args:
        branches: Rows that share their first tokens. It must divide the size of each group.
        step: Number of denoising steps before the branch.
    """

    branches: int = option(at_least=2)
    step: int = option(at_least=1)

    def check(self):
        super().check()
        for name in ("block_size", "cache", "approximate_early_exit", "compile_step"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r}: a tree is sampled without; leave {name} out")
        order = order_probability(self.rank, self.commit, greedy=self.temperature == 0)
        if order not in ("deterministic", "independent") or not self.commit.takes_highest:
            raise ValueError(
                f"rank={self.rank.name} with commit={self.commit.name}: a tree needs an order that does not depend on "
                "the drawn tokens, in a fixed number of steps; use MaxProb() or RandomOrder() with Schedule()"
            )
        if self.diffusion_steps is not None and self.step >= self.diffusion_steps:
            raise ValueError(f"step={self.step} must be below diffusion_steps={self.diffusion_steps}")

    @torch.no_grad()
    def __call__(self, policy, prompts, generator):
        sizes = sorted({*group_sizes(prompts.group)})
        if any(size % self.branches for size in sizes):
            raise ValueError(f"branches={self.branches} must divide the size of each group; the sizes are {sizes}")
        if policy.spec.attention != "full":
            raise ValueError(f"a tree needs full attention, and the policy's is {policy.spec.attention!r}")
        rows = torch.arange(len(prompts.tokens))
        seeds = row_seeds(generator, len(rows)) if prompts.seeds is None else prompts.seeds
        roots = replace(prompts, seeds=seeds).rows(rows[:: self.branches])
        start = super().__call__(policy, roots, generator, on_step=lambda so_far: so_far.forwards == self.step)
        start = start.rows(rows.to(policy.device) // self.branches)

        to_fill = torch.zeros_like(prompts.attention_mask) if prompts.infill_mask is None else prompts.infill_mask
        to_fill = F.pad(to_fill, (0, self.max_new_tokens), value=True).to(policy.device) & start.attention_mask
        is_open = to_fill & ~start.completion_mask
        if not is_open.any(-1).all():
            raise ValueError(f"step={self.step}: a completion has no more steps and cannot branch; use a smaller step")
        steps = None if self.diffusion_steps is None else self.diffusion_steps - self.step
        settings = {field.name: getattr(self, field.name) for field in fields(Unmask)}
        unmask = Unmask(**settings | {"max_new_tokens": 0, "diffusion_steps": steps})
        # ~seeds, because the first row's seed has already drawn the numbers of its first steps.
        canvas = Prompts(start.tokens, start.attention_mask, prompts.group, seeds=~seeds, infill_mask=is_open)
        rest = unmask(policy, canvas, generator)
        rest = replace(rest, unmask_step=rest.unmask_step + self.step)

        def merge(pair):
            first, last = pair
            mask = is_open[(..., *(None,) * (last.dim() - 2))]
            return last if last.dim() == 1 else torch.where(mask, last, first)

        merged = BatchRecord.merge_records([start, rest], merge)
        return replace(merged, forwards=start.forwards + rest.forwards)


class NodeAdvantages(StepFeature):
    """The advantage of each token is that of its node, by leave-one-out among the node's siblings.

    After the branch: the row's reward minus the mean of the other rows of its block. Before it: the block's mean reward
    minus the mean of the other blocks of its group.
    """

    def __init__(self, tree):
        self.tree = tree

    def token_advantages(self, context, samples, views):
        rewards, leave_one_out = samples.rewards, LeaveOneOut()
        block = torch.arange(len(rewards)) // self.tree.branches
        of_rows = leave_one_out(rewards, block)
        block_rewards = to_groups(rewards, block).nanmean(-1)
        of_blocks = leave_one_out(block_rewards, samples.group[starts_group(block)])[block]
        of_rows, of_blocks = samples.local(torch.stack([of_rows, of_blocks], -1), context.accelerator).unbind(-1)
        is_shared = samples.rollout.unmask_step < self.tree.step
        return torch.where(is_shared, of_blocks[:, None], of_rows[:, None])


@dataclass(frozen=True)
class Distinct:
    """After a digit, write the five others of 1 to 6, each once, in any order: "4=" is completed by "31265"."""

    size: int = 6
    name, version = "distinct", "1"

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        digit = str(index % 6 + 1)
        return Problem(f"{digit}=", fields={"digit": digit})

    def reward(self, problem, completion):
        found = ({*completion} & {*"123456"}) - {problem.fields["digit"]}
        return Reward(len(found) / 5, parsed=True, breakdown={"all_distinct": float(len(found) == 5)})


write = Unmask(max_new_tokens=5, diffusion_steps=5, temperature=1.0, rank=MaxProb(), suppress=(0, 2))
tree = Tree(**{field.name: getattr(write, field.name) for field in fields(write)}, branches=4, step=2)
recipe = base.replace(
    name="trees",
    model=partial(tiny_masked_lm, characters="123456=", hidden_size=64, num_layers=2),
    task=Distinct(),
    validation_task=Distinct(),
    eval_task=Distinct(size=600),
    sampler=tree,
    eval_sampler=write,
    likelihood=Trajectory(include_order=False),
    advantages=LeaveOneOut(),
    rollout_quantization=None,
    warmup={"steps": 0},
    train_batch_size=8,
    num_generations=16,
    max_retained_graphs=5,
    learning_rate=3e-3,
    num_steps=60,
)


def rows_run(policy, sampler):
    """Return the number of rows that the model computes for one group."""
    rows = []
    hook = policy.module.get_input_embeddings().register_forward_hook(lambda *call: rows.append(len(call[-1])))
    prompts = encode(policy, [recipe.task[0]], num_generations=[recipe.num_generations])
    sampler(policy, prompts, generator_for(0, "rows"))
    hook.remove()
    return sum(rows)


if __name__ == "__main__":
    summary = train(recipe, features=(NodeAdvantages(tree),))
    before, after = (summary[name]["reward"] for name in ("eval_before", "eval_after"))
    print(f"reward before {before:.3f}, after {after:.3f}")
    as_tree, flat = (rows_run(summary.policy, sampler) for sampler in (tree, write))
    print(f"rows that sampling a group of {recipe.num_generations} computes: {as_tree} as a tree, {flat} flat")
