"""Make the samples of a step: sample completions of its problems and grade them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.algorithms.advantages import has_unequal_rewards, takes_component_rewards
from dllm_rl.device import send
from dllm_rl.distributed.collectives import (
    Metrics,
    gather_objects,
    gather_on_host,
    local,
    reduce_metrics,
    sum_over,
    waited,
)
from dllm_rl.members import describe
from dllm_rl.models.tokens import chosen_ids, costs_of, encode, graded_texts
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.tasks.base import Problem, Reward, addends, grade
from dllm_rl.training.context import StepContext
from dllm_rl.training.forwards import arithmetic
from dllm_rl.training.prompts import choose, prompt_indices
from dllm_rl.training.samples import Samples
from dllm_rl.types import Rollout


@dataclass(frozen=True)
class Answer:
    """A graded completion of a rollout's row."""

    problem: Problem
    completion: str
    reward: Reward
    num_tokens: int  # tokens that the policy chose
    length: int  # tokens up to and including the end token
    ends: bool  # whether it has an end token
    prompt_length: int  # tokens of its prompt
    forwards: int  # model calls that its row took part in


def collect(run: StepContext[Recipe], step: int) -> tuple[Samples, list[Answer], dict[str, float]]:
    """Sample and grade a step's problems; return the samples, this process's answers, and metrics.

    With max_num_gen_batches > 1, groups of equal rewards are redrawn with other prompts until their rewards differ or
    that many draws are done (DAPO's dynamic sampling [paper]). Each group is redrawn separately [ours]; DAPO pools the
    draws. `run.history` receives all groups of the step, also the groups that a later draw replaces.

    The metric num_tokens is TRL's: tokens of the run so far, over all processes, of each completion and its prompt.
    Completions that dynamic sampling replaces count too.
    """
    recipe, accelerator, log, history = run.recipe, run.accelerator, run.log, run.history
    every = torch.arange(recipe.train_batch_size // accelerator.num_processes)
    indices = prompt_indices(recipe, history, step)
    rollout, answers, mine, replaced = draw_and_grade(run, step, 0, indices, every)
    with log.stage("waiting"):  # for the other processes' rollouts and rewards
        lost = waited("rollout", accelerator)
        (graded_all,) = gather_on_host([mine], accelerator)
    if history is not None:
        history.add(step, indices, graded_all)
    rewards = graded_all[..., 0]
    metrics = reward_metrics(rewards, answers, accelerator) | reduce_metrics(lost, accelerator)
    if recipe.max_prompt_length is not None:
        share = (torch.tensor(float(replaced)), torch.tensor(float(len(mine))))
        metrics |= reduce_metrics({"frac_prompts_too_long": share}, accelerator)
    draws = 1
    tokens = tokens_of(answers)
    while draws < recipe.max_num_gen_batches and not has_unequal_rewards(graded_all).all():
        equal = ~has_unequal_rewards(graded_all)
        indices = prompt_indices(recipe, history, step, draws)
        places = local(equal, accelerator).nonzero()[:, 0]
        if len(places):  # this process may have no group to redraw while another process has some
            part, others, mine[places], _ = draw_and_grade(run, step, draws, indices, places)
            tokens += tokens_of(others)
            group = torch.arange(recipe.num_generations)
            rows = rearrange(places[:, None] * recipe.num_generations + group, "p g -> (p g)")
            for row, answer in zip(rows.tolist(), others, strict=True):
                answers[row] = answer
            (rows,) = send(accelerator.device, rows)
            rollout = rollout.replace_rows(rows, part, pad_id=run.rollout_policy.pad_id)
        (graded_all,) = gather_on_host([mine], accelerator)
        if history is not None:
            history.add(step, indices[equal], graded_all[equal])
        draws += 1
    rewards = graded_all[..., 0]
    # The last step's total is in the log's last row; after a resume only in the main process, which writes the log.
    before = log.last.get("num_tokens", 0.0)
    metrics["num_tokens"] = before + sum_over(torch.tensor(tokens, dtype=torch.double), accelerator).item()
    if recipe.max_num_gen_batches > 1:
        metrics["dynamic_sampling/draws"] = float(draws)
        metrics["dynamic_sampling/frac_reward_zero_std"] = zero_std_fraction(rewards)
    advantages = compute_advantages(recipe, rewards, parts_of(recipe, graded_all))
    samples = Samples(rollout, rewards, advantages, torch.ones(len(rewards), dtype=torch.double))
    return samples, answers, metrics | compiled_graphs(recipe)


def tokens_of(answers: Sequence[Answer]) -> int:
    return sum(answer.prompt_length + answer.num_tokens for answer in answers)


def compiled_graphs(recipe: Recipe) -> dict[str, float]:
    """Return how many graphs this process has compiled, if rollouts are compiled. A growing number means new shapes."""
    if not (recipe.torch_compile or getattr(recipe.sampler, "keywords", {}).get("compile_step")):
        return {}
    from torch._dynamo.utils import counters  # already imported here; in other runs the import would take a second

    return {"rollout/compiled_graphs": float(counters["stats"]["unique_graphs"])}


def draw_and_grade(
    run: StepContext[Recipe],
    step: int,
    draw: int,
    indices: Int[Tensor, " P"],  # of the draw's prompts, over all processes
    places: Tensor,
) -> tuple[Rollout, list[Answer], Float[Tensor, "p G K"], int]:
    """Call `sample_and_grade` for this process's prompts at `places` of a draw; also return how many prompts were
    replaced as too long.
    """
    recipe, accelerator = run.recipe, run.accelerator
    problems, replaced = choose(recipe, run.rollout_policy, local(indices, accelerator)[places].tolist())
    key = (recipe.seed, "rollout", step, *([draw] if draw else []))
    seeds = local(row_seeds(generator_for(*key), len(indices) * recipe.num_generations), accelerator)
    mine = rearrange(seeds, "(p g) -> p g", g=recipe.num_generations)[places]  # a seed per place, not per prompt drawn
    rollout, answers, values = sample_and_grade(run, problems, mine, key)
    return rollout, answers, values, replaced


def sample_and_grade(
    run: StepContext[Recipe],
    problems: Sequence[Problem],
    seeds: Int[Tensor, "p G"],  # of the rows
    key: tuple[object, ...],  # seeds the sampler's generator
) -> tuple[Rollout, list[Answer], Float[Tensor, "p G K"]]:
    """Sample a group of completions per problem; return the rollout, the answers and the rewards (value, then
    `wanted_parts`).
    """
    recipe, rollout_policy = run.recipe, run.rollout_policy
    group = recipe.num_generations
    with run.log.stage("rollout"), arithmetic(recipe, run.accelerator):
        prompts = encode(rollout_policy, problems, group_size=group, seeds=seeds.flatten().tolist())
        # Each row has a seed, so that the split does not change the result.
        batches = prompts.split(recipe.rollout_batch_size or prompts.num_rows)
        pieces = [recipe.sample(rollout_policy, batch, generator_for(*key)) for batch in batches]
        rollout = pieces[0] if len(pieces) == 1 else Rollout.concatenate(pieces, pad_id=rollout_policy.pad_id)
        if recipe.rollout_engine is None and not rollout.logprobs.isfinite().all():
            raise FloatingPointError(
                f"the rollout's logits are not finite at weights_version={rollout.weights_version}: the weights have "
                f"diverged; use a learning_rate below {recipe.learning_rate:g}, or an earlier checkpoint"
            )
    with run.log.stage("reward"):
        chosen = chosen_ids(rollout)
        completions = graded_texts(rollout_policy, rollout, problems, chosen)
        costs = costs_of(rollout_policy, rollout, chosen)
        graded = grade(recipe.task, problems, completions, costs, timeout=recipe.reward_timeout)
        names = tuple(wanted_parts(recipe))
    prompt_lengths = prompts.lengths
    answers = []
    values = []
    for row, (completion, reward) in enumerate(zip(completions, graded, strict=True)):
        place = row // group
        before_end = costs[row].tokens
        ends = before_end < len(chosen[row])
        sizes = (len(chosen[row]), before_end + ends, ends, prompt_lengths[place], costs[row].forwards)
        answers.append(Answer(problems[place], completion, reward, *sizes))
        parts = [reward.breakdown.get(name, math.nan) for name in names]  # NaN: does not apply
        values.append(list(map(float, [reward.value, *parts])))  # `grade` has checked that they fit fp32
    return rollout, answers, rearrange(torch.tensor(values, dtype=torch.float32), "(p g) k -> p g k", g=group)


def compute_advantages(recipe: Recipe, rewards: Float[Tensor, "P G"], parts: dict[str, Tensor]) -> Float[Tensor, "P G"]:
    """Compute the recipe's advantages, by default (R - mean) / (std + 1e-4).

    Raises:
        ValueError: The advantages have another shape than the rewards or are not finite. The message names the
            function.
    """
    advantages = recipe.advantages(rewards, **parts)
    shape = tuple(getattr(advantages, "shape", ()))
    if shape != tuple(rewards.shape) or not advantages.isfinite().all():
        wrong = f"of shape {shape}" if shape != tuple(rewards.shape) else "that are not finite"
        name = describe(recipe.advantages)
        raise ValueError(f"advantages={name} gave numbers {wrong} for rewards of shape {tuple(rewards.shape)}")
    return advantages


def parts_of(recipe: Recipe, graded: Float[Tensor, "P G K"]) -> dict[str, Tensor]:
    """Return the extra arguments of the recipe's advantages: the component rewards and their weights, or nothing."""
    weights = wanted_parts(recipe)
    parts = rearrange(graded[..., 1:], "p g k -> k p g")
    return {"parts": parts, "weights": torch.tensor(list(weights.values()))} if weights else {}


def wanted_parts(recipe: Recipe) -> dict[str, float]:
    """Return the task's reward weights by name if the advantages use component rewards, else nothing.

    Raises:
        ValueError: The advantages use component rewards and the task has no reward weights.
    """
    function = recipe.advantages
    if not takes_component_rewards(function):
        return {}
    weights = getattr(recipe.task, "reward_weights", None)
    if not weights:
        raise ValueError(
            f"advantages={getattr(function, 'func', function).__name__} takes each reward on its own, and task "
            f"{recipe.task.name!r} has no `reward_weights` (name in the breakdown -> weight); give it those, or use "
            "group_relative"
        )
    return dict(weights)


def zero_std_fraction(rewards: Float[Tensor, "P G"]) -> float:
    return (~has_unequal_rewards(rewards)).double().mean().item()


def reward_metrics(
    rewards: Float[Tensor, "P G"], answers: Sequence[Answer], accelerator: Accelerator
) -> dict[str, float]:
    """Return TRL's reward and length metrics over all processes. A completion without a metric does not count in its
    mean.

    completions/mean_length: tokens up to and including the end token.

    completions/clipped_ratio: share of completions without an end token.

    completions/distinct_ratio: distinct texts of a group / its completions, mean over groups; 1/G if all completions of
    each prompt are the same.
    """
    added = [addends(answer.reward) for answer in answers]
    mine = sorted({name for each in added for name in each} - {"reward", "parsed"})
    names = sorted(set(gather_objects(mine, accelerator)))  # all processes reduce the same names, in the same order
    lengths = torch.tensor([answer.length for answer in answers])
    pairs: Metrics = {"parsed": total(added, "parsed")}
    pairs["completions/mean_length"] = (lengths.sum(), torch.tensor(len(lengths)))
    clipped = sum(not answer.ends for answer in answers)
    pairs["completions/clipped_ratio"] = (torch.tensor(clipped), torch.tensor(len(lengths)))
    group = rewards.shape[1]
    distinct = sum(len({a.completion for a in answers[i : i + group]}) for i in range(0, len(answers), group))
    pairs["completions/distinct_ratio"] = (torch.tensor(distinct), torch.tensor(len(lengths)))
    pairs["completions/mean_forwards"] = (torch.tensor(sum(a.forwards for a in answers)), torch.tensor(len(lengths)))
    for name in names:
        pairs[f"rewards/{name}/mean"] = total(added, name)
    means = reduce_metrics(pairs, accelerator)
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),  # a batch of one has 0, not NaN
        "frac_reward_zero_std": zero_std_fraction(rewards),
        **means,
    }


def total(added: Sequence[dict[str, tuple[float, float]]], name: str) -> tuple[Tensor, Tensor]:
    """Sum a metric's numerators, and its denominators, over the completions that have the metric."""
    pairs = [each[name] for each in added if name in each]
    above = sum(pair[0] for pair in pairs)
    below = sum(pair[1] for pair in pairs)
    return torch.tensor(above, dtype=torch.float64), torch.tensor(below, dtype=torch.float64)
