"""Problems in, rollouts and rewards out: what a step learns from."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from dllm_rl.algorithms.advantages import informative
from dllm_rl.distributed import local, reduce_metrics
from dllm_rl.models.base import Policy
from dllm_rl.models.tokens import decode, encode
from dllm_rl.recipe import Recipe
from dllm_rl.rng import row_seeds, stream
from dllm_rl.tasks.base import Problem, Reward, Task, score
from dllm_rl.training.learner import arithmetic
from dllm_rl.types import Rollout


def draw_problems(task: Task, purpose: str, seed: int, step: int, size: int, accelerator: Accelerator) -> list[Problem]:
    """This process's share of the step's problems, a pure function of (seed, step)."""
    chosen = torch.randint(len(task), (size,), generator=stream(seed, purpose, step)).tolist()
    share = size // accelerator.num_processes
    return [task[i] for i in chosen[accelerator.process_index * share : (accelerator.process_index + 1) * share]]


def seeds_of(recipe: Recipe, step: int, accelerator: Accelerator, *draw: int) -> list[int]:
    """Seeds of this process's rows: a row's seed depends on (seed, step, draw, its place in the global batch)."""
    rows = recipe.train_batch_size * recipe.num_generations
    seeds = row_seeds(stream(recipe.seed, "rollout", step, *draw), rows).tolist()
    share = rows // accelerator.num_processes
    return seeds[accelerator.process_index * share : (accelerator.process_index + 1) * share]


def sampled(recipe: Recipe, policy, rollout_policy, problems: list, seeds: list[int], generator: Generator) -> Rollout:
    """The rollout policy's completions of the problems, num_generations each. Raises RuntimeError on stale weights."""
    prompts = encode(policy, problems, group_size=recipe.num_generations, seeds=seeds)
    rollout = recipe.sampler(rollout_policy, prompts, generator)
    check_version(rollout, policy)
    return rollout


def draw_again(
    recipe: Recipe, accelerator: Accelerator, log, policy, rollout_policy, rollout: Rollout, rewards: Tensor, step: int
) -> tuple[Rollout, Tensor, dict[str, float]]:
    """DAPO's dynamic sampling [paper]: other prompts in place of the groups whose rewards are all equal.

    Repeated until there are none, or max_num_gen_batches draws were made. A place's prompt and seeds depend on (seed,
    step, draw) alone, so that any number of processes draws the same; DAPO pools the draws instead [ours].
    """
    draws, group = 1, recipe.num_generations
    while draws < recipe.max_num_gen_batches and not informative(rewards).all():
        places = local(~informative(rewards), accelerator).nonzero()[:, 0]
        mine = local(rewards, accelerator).clone()
        if len(places):
            rows = (places[:, None] * group + torch.arange(group, device=places.device)).flatten()
            purpose = f"train, draw {draws}"
            problems = draw_problems(recipe.task, purpose, recipe.seed, step, recipe.train_batch_size, accelerator)
            problems = [problems[i] for i in places.tolist()]
            seeds = seeds_of(recipe, step, accelerator, draws)
            seeds = [seeds[i] for i in rows.tolist()]
            with log.stage("rollout"), arithmetic(recipe, accelerator):
                generator = stream(recipe.seed, "rollout", step, draws)
                part = sampled(recipe, policy, rollout_policy, problems, seeds, generator)
            with log.stage("reward"):
                graded = score(recipe.task, problems, decode(policy, part))
                mine[places] = reward_values(graded, mine.device).view(-1, group)
            rollout = rollout.replaced(rows, part, pad_id=policy.pad_id)
        rewards, draws = accelerator.gather(mine), draws + 1
    equal = zero_std_fraction(rewards)
    return rollout, rewards, {"dynamic_sampling/draws": float(draws), "dynamic_sampling/frac_reward_zero_std": equal}


def zero_std_fraction(rewards: Tensor) -> float:
    return (~informative(rewards)).double().mean().item()


def gather_rewards(graded: Sequence[Reward], group_size: int, accelerator: Accelerator) -> Tensor:
    """Rewards (P, G) of all processes."""
    return accelerator.gather(reward_values(graded, accelerator.device).view(-1, group_size))


def reward_values(graded: Sequence[Reward], device: torch.device) -> Tensor:
    """The rewards as numbers. Raises FloatingPointError on one that is not finite."""
    values = torch.tensor([reward.value for reward in graded], dtype=torch.float32, device=device)
    if not values.isfinite().all():
        raise FloatingPointError(
            f"a reward is not finite: {next(r for r in graded if not abs(r.value) < float('inf'))}"
        )
    return values


def reward_metrics(
    rewards: Tensor, graded: Sequence[Reward], rollout: Rollout, accelerator: Accelerator
) -> dict[str, float]:
    """TRL's reward and length metrics over all processes; a name's mean is over the rewards that have it."""
    mine = [sorted({name for reward in graded for name in reward.breakdown})]
    names = sorted({name for part in accelerator.gather_for_metrics(mine, use_gather_object=True) for name in part})
    columns = {"parsed": [float(reward.parsed) for reward in graded]}
    columns["completions/mean_length"] = rollout.completion_mask.sum(-1).tolist()
    for name in names:
        columns[f"rewards/{name}/mean"] = [r.breakdown[name] for r in graded if name in r.breakdown]
    pairs = {name: (torch.tensor(float(sum(c))), torch.tensor(float(len(c)))) for name, c in columns.items()}
    means = reduce_metrics(pairs, accelerator)
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "frac_reward_zero_std": zero_std_fraction(rewards),
        "num_tokens": means["completions/mean_length"] * rewards.numel(),
        **means,
    }


def check_version(rollout: Rollout, policy: Policy, *, stale_steps: int = 0) -> None:
    """Raise RuntimeError when a rollout was made by weights more than `stale_steps` updates behind the learner's."""
    behind = policy.version - rollout.weights_version
    if not 0 <= behind <= stale_steps:
        raise RuntimeError(
            f"weights_version={rollout.weights_version} of the rollout is {behind} updates behind the learner's "
            f"{policy.version}, and stale_steps={stale_steps} allows {stale_steps}: call sync_weights before sampling"
        )
