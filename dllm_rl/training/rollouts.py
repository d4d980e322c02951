"""Problems in, rollouts and rewards out: what a step learns from."""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.algorithms.advantages import informative
from dllm_rl.distributed import local, reduce_metrics
from dllm_rl.models.base import Policy
from dllm_rl.models.tokens import decode, encode
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.tasks.base import Reward, grade
from dllm_rl.training.learner import arithmetic
from dllm_rl.training.log import RunLog
from dllm_rl.types import Rollout


def collect(
    recipe: Recipe, rollout_policy: Policy, step: int, accelerator: Accelerator, log: RunLog
) -> tuple[Rollout, Float[Tensor, "P G"], dict[str, float]]:
    """This process's rollout, the rewards of all processes, and the metrics of both.

    With max_num_gen_batches > 1, DAPO's dynamic sampling [paper]: groups whose rewards are all equal are replaced by
    completions of other prompts, until there are none or that many draws were made. A place's prompt and seeds depend
    on (seed, step, draw) alone, so that any number of processes draws the same; DAPO pools the draws instead [ours].
    """
    every = torch.arange(recipe.train_batch_size // accelerator.num_processes, device=accelerator.device)
    rollout, graded, mine = sample_and_grade(recipe, rollout_policy, (step, 0), every, accelerator, log)
    rewards = accelerator.gather(mine)
    metrics, draws = reward_metrics(rewards, graded, rollout, accelerator), 1
    while draws < recipe.max_num_gen_batches and not informative(rewards).all():
        places = local(~informative(rewards), accelerator).nonzero()[:, 0]
        if len(places):
            part, _, mine[places] = sample_and_grade(recipe, rollout_policy, (step, draws), places, accelerator, log)
            group = torch.arange(recipe.num_generations, device=places.device)
            rows = rearrange(places[:, None] * recipe.num_generations + group, "p g -> (p g)")
            rollout = rollout.replaced(rows, part, pad_id=rollout_policy.pad_id)
        rewards, draws = accelerator.gather(mine), draws + 1
    if recipe.max_num_gen_batches > 1:
        metrics |= {
            "dynamic_sampling/draws": float(draws),
            "dynamic_sampling/frac_reward_zero_std": zero_std_fraction(rewards),
        }
    return rollout, rewards, metrics


def sample_and_grade(
    recipe: Recipe,
    rollout_policy: Policy,
    step_and_draw: tuple[int, int],
    places: Int[Tensor, " p"],
    accelerator: Accelerator,
    log: RunLog,
) -> tuple[Rollout, list[Reward], Float[Tensor, "p G"]]:
    """Rollout and rewards of the prompts at `places` of this process's share of a draw.

    A row's seed depends on (seed, step, draw, its place in the global batch).
    """
    step, draw = step_and_draw
    purpose, group, places = "train" if not draw else f"train, draw {draw}", recipe.num_generations, places.cpu()
    indices = draw_indices(len(recipe.task), recipe.train_batch_size, recipe.seed, purpose, step)
    problems = [recipe.task[i] for i in local(indices, accelerator)[places].tolist()]
    key = (recipe.seed, "rollout", step, *([draw] if draw else []))
    seeds = local(row_seeds(generator_for(*key), len(indices) * group), accelerator)
    seeds = rearrange(rearrange(seeds, "(p g) -> p g", g=group)[places], "p g -> (p g)")
    with log.stage("rollout"), arithmetic(recipe, accelerator):
        prompts = encode(rollout_policy, problems, group_size=group, seeds=seeds.tolist())
        rollout = recipe.sampler(rollout_policy, prompts, generator_for(*key))
        rollout = rollout.with_support(recipe.sampling_support)
    with log.stage("reward"):
        graded = grade(recipe.task, problems, decode(rollout_policy, rollout))
        values = reward_values(graded, accelerator.device)
    return rollout, graded, rearrange(values, "(p g) -> p g", g=group)


def draw_indices(num_problems: int, size: int, *key: object) -> Int[Tensor, " size"]:
    """Problems of a step, of all processes, with replacement: a pure function of the key."""
    return torch.randint(num_problems, (size,), generator=generator_for(*key))


def zero_std_fraction(rewards: Float[Tensor, "P G"]) -> float:
    """Fraction of the groups whose rewards are all equal."""
    return (~informative(rewards)).double().mean().item()


def reward_values(graded: Sequence[Reward], device: torch.device) -> Float[Tensor, " B"]:
    """The rewards as numbers. Raises FloatingPointError on one that is not finite."""
    values = torch.tensor([reward.value for reward in graded], dtype=torch.float32, device=device)
    if not values.isfinite().all():
        raise FloatingPointError(
            f"a reward is not finite: {next(r for r in graded if not abs(r.value) < float('inf'))}"
        )
    return values


def reward_metrics(
    rewards: Float[Tensor, "P G"], graded: Sequence[Reward], rollout: Rollout, accelerator: Accelerator
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
