"""Make the samples of a training step: draw its problems, replace prompts that are too long, sample completions and
grade them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.algorithms.advantages import Advantages, has_unequal_rewards
from dllm_rl.algorithms.prompt_sources import RewardHistory
from dllm_rl.decoding.prompts import encode, prompt_ids
from dllm_rl.decoding.support import with_support
from dllm_rl.decoding.texts import completion_token_ids, costs_of, texts_to_grade
from dllm_rl.device import copy_to_device
from dllm_rl.distributed.collectives import (
    SumsAndCounts,
    gather_objects,
    gather_on_host,
    reduce_metrics,
    sum_over,
    wait_metrics_of,
)
from dllm_rl.models.base import Policy
from dllm_rl.records import describe
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.samplers.sampler import check_rollout
from dllm_rl.step.context import StepContext
from dllm_rl.step.samples import Samples, rows_of_processes
from dllm_rl.step.settings import StepSettings
from dllm_rl.tasks.base import Problem, Reward, component_fractions, grade
from dllm_rl.tasks.user_code import process_restored
from dllm_rl.types.rollouts import Rollout


@dataclass(frozen=True)
class GradedCompletion:
    """The graded completion of one row of a rollout."""

    problem: Problem
    completion: str
    reward: Reward
    num_tokens: int  # number of tokens of its prompt and of the completion, including those after the end token
    length: int  # number of tokens up to and including the end token; of all tokens without an end token
    ends: bool  # whether it has an end token
    forwards: int  # number of forwards that its row took part in


def collect(context: StepContext, step: int) -> tuple[Samples, list[GradedCompletion], dict[str, float]]:
    """Sample and grade the completions of a step; return the samples, this process's completions, and metrics.

    With max_num_gen_batches > 1, a group whose rewards are all equal is replaced by a group of another prompt, until
    the rewards differ or max_num_gen_batches draws are done (DAPO's dynamic sampling [paper]). Each group is replaced
    separately [ours]; DAPO collects groups from all draws. `context.history` receives all groups of the step, including
    the replaced ones.

    The metric num_tokens is TRL's: the tokens of all prompts and completions so far in the context, over all processes.
    Completions that dynamic sampling replaces count too.
    """
    settings, accelerator, log, history = context.settings, context.accelerator, context.log, context.history
    drawn = prompt_indices(settings, history, step)
    # In every process those of all: the history has the prompts that are graded.
    indices = fitting_indices(settings, context.rollout_policy, drawn)
    sizes = draw_group_sizes(settings, history, indices, step)
    group = torch.arange(len(sizes)).repeat_interleave(sizes)
    counts = rows_of_processes(sizes, accelerator.num_processes)
    draw = partial(draw_and_grade, context, step, sizes=sizes)
    local_group = group.split(list(counts))[accelerator.process_index]
    reward_weights = component_reward_weights(settings)
    # The reward, and the components that have a weight: the others give no group an advantage.
    counted = torch.tensor([True, *map(bool, reward_weights.values())])
    rollout, graded, local_rewards = draw(0, indices, local_group.unique())
    with log.stage("waiting"):  # for the other processes' rollouts and rewards
        wait_metrics = wait_metrics_of("rollout", accelerator)
        # (B, K): the reward of each completion, then its components.
        (component_rewards,) = gather_on_host([local_rewards], accelerator, counts)
    if component_rewards[:, 0].isnan().all():  # on every process: a single None skips its completion
        raise RuntimeError(f"no completion of step {step} has a reward: every reward function returned None for each")
    if settings.prompt_source.uses_history:
        history.add(step, indices, component_rewards[:, counted], group)
    metrics = reward_metrics(component_rewards[:, 0], group, graded, local_group, accelerator)
    metrics |= reduce_metrics(wait_metrics, accelerator)
    if settings.max_prompt_length is not None:
        metrics["frac_prompts_too_long"] = (indices != drawn).double().mean().item()
    num_draws = 1
    num_tokens = sum(item.num_tokens for item in graded)
    while (
        num_draws < settings.max_num_gen_batches
        and not (is_mixed := has_unequal_rewards(component_rewards[:, counted], group)).all()
    ):
        redrawn = (~is_mixed).nonzero()[:, 0]
        drawn = prompt_indices(settings, history, step, num_draws)[redrawn]
        indices = indices.index_copy(0, redrawn, fitting_indices(settings, context.rollout_policy, drawn))
        local_redrawn = redrawn[torch.isin(redrawn, local_group)]
        if len(local_redrawn):  # another process may have groups to redraw even if this process has none
            redrawn_rollout, redrawn_graded, redrawn_rewards = draw(num_draws, indices, local_redrawn)
            rows = torch.isin(local_group, local_redrawn).nonzero()[:, 0]
            local_rewards[rows] = redrawn_rewards
            num_tokens += sum(item.num_tokens for item in redrawn_graded)
            for row, redrawn_completion in zip(rows.tolist(), redrawn_graded, strict=True):
                graded[row] = redrawn_completion
            (rows,) = copy_to_device(accelerator.device, rows)
            rollout = rollout.replace_rows(rows, redrawn_rollout, pad_id=context.rollout_policy.pad_id)
        (component_rewards,) = gather_on_host([local_rewards], accelerator, counts)
        if settings.prompt_source.uses_history:
            rows = torch.isin(group, redrawn)
            history.add(step, indices[redrawn], component_rewards[rows][:, counted], group[rows])
        num_draws += 1
    rewards = component_rewards[:, 0]
    # The total of the earlier steps is in the log's last row. After a resume, only the main process has that row. The
    # other processes' total is then too low, but only the main process writes the log.
    num_tokens_before = log.last.get("num_tokens", 0.0)
    step_tokens = sum_over(torch.tensor(num_tokens, dtype=torch.double), accelerator)
    metrics["num_tokens"] = num_tokens_before + step_tokens.item()
    if settings.max_num_gen_batches > 1:
        metrics["dynamic_sampling/draws"] = float(num_draws)
        metrics["dynamic_sampling/frac_reward_zero_std"] = (~has_unequal_rewards(rewards, group)).double().mean().item()
    components = component_arguments(component_rewards[:, 1:].T, reward_weights)
    advantages = compute_advantages(settings.advantages, rewards, group, components)
    metric_weights = torch.ones(len(rewards), dtype=torch.double)  # scoring sets them
    samples = Samples(rollout, group, rewards, advantages, metric_weights, counts)
    if settings.compiles_rollouts:
        from torch._dynamo.utils import counters  # slow, but already imported if torch compiled anything

        # Of this process. A growing number means that new shapes are compiled.
        metrics["rollout/compiled_graphs"] = float(counters["stats"]["unique_graphs"])
    return samples, graded, metrics


def draw_and_grade(
    context: StepContext,
    step: int,
    draw: int,
    indices: Int[Tensor, " P"],  # the draw's problems, over all processes
    groups: Int[Tensor, " p"],  # the groups of this process to draw
    *,
    sizes: Int[Tensor, " P"],
) -> tuple[Rollout, list[GradedCompletion], Float[Tensor, "b K"]]:
    """Call `sample_and_grade` for the prompts of some of this process's groups."""
    settings = context.settings
    problems = [settings.task[index] for index in indices[groups].tolist()]
    key = (settings.seed, "rollout", step, *([draw] if draw else []))
    # A row's seed depends on its number among the rows of all processes, not on how many groups are redrawn.
    seeds = row_seeds(generator_for(*key), int(sizes.sum())).split(sizes.tolist())
    row_seeds_of_groups = torch.cat([seeds[number] for number in groups.tolist()])
    return sample_and_grade(context, problems, sizes[groups].tolist(), row_seeds_of_groups, key)


def sample_and_grade(
    context: StepContext,
    problems: Sequence[Problem],
    sizes: Sequence[int],
    seeds: Int[Tensor, " b"],
    key: tuple[object, ...],
) -> tuple[Rollout, list[GradedCompletion], Float[Tensor, "b K"]]:
    """Sample and grade a group of completions per problem.

    Args:
        context: Settings and policies.
        problems: The problems.
        sizes: Number of completions of each problem.
        seeds: Seed of each of the b completions.
        key: Key of the sampler's generator (`rng.generator_for`).

    Returns:
        The rollout, the graded completions, and K rewards per completion: the reward, then the components named by
        `component_reward_weights`.

    Raises:
        ValueError: The sampler lacks rows, or does not fill the blanks.
        FloatingPointError: The rollout's log-probs are not finite.
    """
    settings, rollout_policy = context.settings, context.rollout_policy
    row_problems = [problem for problem, size in zip(problems, sizes, strict=True) for _ in range(size)]
    with context.log.stage("rollout"), context.arithmetic():
        reads_order = settings.likelihood.reads_order
        prompts = encode(rollout_policy, problems, num_generations=sizes, seeds=seeds.tolist(), reads_order=reads_order)
        # Each row has its own seed, so that the split into batches does not change the result. The generator is for
        # user-defined samplers that ignore the seeds; it is another one for each batch, of every process.
        batches = prompts.split(settings.rollout_batch_size or len(seeds))
        generators = [generator_for(*key, int(seeds[0]), number) for number in range(len(batches))]
        rollouts = list(map(partial(settings.sampler, rollout_policy), batches, generators))
        for batch, made in zip(batches, rollouts, strict=True):
            check_rollout(settings.sampler, rollout_policy, batch, made)
        rollouts = [with_support(made, settings.sampling_support) for made in rollouts]
        rollout = rollouts[0] if len(rollouts) == 1 else Rollout.concatenate(rollouts, pad_id=rollout_policy.pad_id)
        rollout = replace(rollout, group=copy_to_device(rollout.tokens.device, prompts.group)[0])
        if settings.samples_in_process and not rollout.logprobs.isfinite().all():
            raise FloatingPointError(
                f"the rollout's logits are not finite at weights_version={rollout.weights_version}: the weights have "
                f"diverged; use a learning_rate below {settings.learning_rate:g}, or an earlier checkpoint"
            )
    with context.log.stage("reward"):
        completion_ids = completion_token_ids(rollout)
        completions = texts_to_grade(rollout_policy, rollout, row_problems, completion_ids)
        costs = costs_of(rollout_policy, rollout, completion_ids)
        row_rewards = grade(settings.task, row_problems, completions, costs, timeout=settings.limits.reward_timeout)
    component_names = list(component_reward_weights(settings))
    graded = []
    reward_rows = []
    for row, (completion, reward, prompt_length) in enumerate(
        zip(completions, row_rewards, prompts.lengths, strict=True)
    ):
        num_before_end = costs[row].tokens  # without the end token
        ends = num_before_end < len(completion_ids[row])
        graded_completion = GradedCompletion(
            problem=row_problems[row],
            completion=completion,
            reward=reward,
            num_tokens=prompt_length + len(completion_ids[row]),
            length=num_before_end + ends,
            ends=ends,
            forwards=costs[row].forwards,
        )
        graded.append(graded_completion)
        # NaN marks a reward or a component that this completion lacks.
        component_rewards = [reward.breakdown.get(name, math.nan) for name in component_names]
        reward_rows.append([math.nan if reward.value is None else float(reward.value), *map(float, component_rewards)])
    # In fp64 up to the advantage: in fp32, rewards of -1,000,000.01 and -1,000,000.02 would be equal.
    return rollout, graded, torch.tensor(reward_rows, dtype=torch.float64)


def compute_advantages(
    function: Advantages,
    rewards: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    components: dict[str, Tensor],
) -> Float[Tensor, " B"]:
    """Compute the advantages, by default (R - mean) / (std + 1e-4), in the rewards' fp64, and return them in fp32.
    `components` are `component_arguments`.

    Raises:
        ValueError: The advantages have another shape than the rewards or are not finite. The message names the
            function.
    """
    # Copies: a rule that changes its arguments in place, such as `rewards -= rewards.mean()`, changes no samples.
    with process_restored():
        advantages = function(rewards.clone(), group.clone(), **{name: x.clone() for name, x in components.items()})
    advantages = advantages.float() if isinstance(advantages, Tensor) else advantages
    shape = tuple(getattr(advantages, "shape", ()))
    if shape != tuple(rewards.shape) or not advantages.isfinite().all():
        problem = f"of shape {shape}" if shape != tuple(rewards.shape) else "that are not finite"
        name = describe(function)
        lacking = f"; {int(rewards.isnan().sum())} of them are NaN: no reward" if rewards.isnan().any() else ""
        raise ValueError(
            f"advantages={name} gave numbers {problem} for rewards of shape {tuple(rewards.shape)}{lacking}"
        )
    return advantages


def component_arguments(parts: Float[Tensor, "K B"], weights: dict[str, float]) -> dict[str, Tensor]:
    """Return what advantages take beside rewards and groups: {} if `component_reward_weights` gives no weights."""
    return {"parts": parts, "weights": torch.tensor(list(weights.values()), dtype=parts.dtype)} if weights else {}


def component_reward_weights(settings: StepSettings) -> dict[str, float]:
    """Return the task's reward weights by name, if `advantages` take component rewards; {} otherwise.

    Raises:
        ValueError: The task has no reward weights.
    """
    if not settings.advantages.takes_component_rewards:
        return {}
    task = settings.task
    weights = getattr(task, "reward_weights", None)
    if not weights:
        raise ValueError(
            f"advantages={describe(settings.advantages)} takes each component reward, and task "
            f"{task.name!r} has no `reward_weights` (name in the breakdown -> weight); set them, or use "
            "GroupRelative()"
        )
    return dict(weights)


def reward_metrics(
    rewards: Float[Tensor, " B"],
    group: Int[Tensor, " B"],
    graded: Sequence[GradedCompletion],
    local_group: Int[Tensor, " b"],
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return TRL's reward and length metrics over all processes. A completion that lacks a metric is left out of that
    metric's mean.

    completions/mean_length: tokens up to and including the end token.

    completions/clipped_ratio: share of completions without an end token.

    completions/distinct_ratio: number of distinct texts of each group, over the number of all completions; 1/G if all G
    completions of each prompt are the same.
    """
    fractions = [component_fractions(item.reward) for item in graded]
    local_names = sorted({name for row in fractions for name in row})
    # Every process must reduce the same names, in the same order.
    names = sorted(set(gather_objects(local_names, accelerator)))
    count = torch.tensor(len(graded))
    graded_rewards = rewards[~rewards.isnan()]
    parsed = [float(item.reward.parsed) for item in graded if item.reward.value is not None]
    lengths = torch.tensor([item.length for item in graded])
    num_clipped = sum(not item.ends for item in graded)
    num_forwards = sum(item.forwards for item in graded)
    texts = [item.completion for item in graded]
    num_distinct = len(set(zip(local_group.tolist(), texts, strict=True)))
    sums_and_counts: SumsAndCounts = {
        "parsed": (torch.tensor(sum(parsed), dtype=torch.float64), torch.tensor(len(parsed))),
        "completions/mean_length": (lengths.sum(), count),
        "completions/clipped_ratio": (torch.tensor(num_clipped), count),
        "completions/distinct_ratio": (torch.tensor(num_distinct), count),
        "completions/mean_forwards": (torch.tensor(num_forwards), count),
    }
    for name in names:  # numerators and denominators, over the completions that have the metric
        pairs = torch.tensor([row[name] for row in fractions if name in row], dtype=torch.float64).view(-1, 2)
        sums_and_counts[f"rewards/{name}/mean"] = (pairs[:, 0].sum(), pairs[:, 1].sum())
    means = reduce_metrics(sums_and_counts, accelerator)
    return {
        "reward": graded_rewards.mean().item(),
        "reward_std": graded_rewards.std(correction=0).item(),  # correction=1 would give NaN for one completion
        "frac_reward_zero_std": (~has_unequal_rewards(rewards, group)).double().mean().item(),
        **means,
    }


def draw_indices(num_problems: int, size: int, *key: object) -> Int[Tensor, " size"]:
    """Draw a step's problems for all processes, with replacement. The same key gives the same problems."""
    return torch.randint(num_problems, (size,), generator=generator_for(*key))


def prompt_indices(
    settings: StepSettings, history: RewardHistory, step: int, draw: int = 0
) -> Int[Tensor, " train_batch_size"]:
    """Return the indices of a step's problems, over all processes, from `prompt_source`.

    Args:
        settings: Settings of the step.
        history: Graded completions of the run.
        step: Training step.
        draw: Index of the draw in the step. It is above 0 if dynamic sampling replaces groups.

    Raises:
        ValueError: The source did not return `train_batch_size` indices of the task.
    """
    source, count, size = settings.prompt_source, settings.train_batch_size, len(settings.task)
    purpose = f"train, draw {draw}" if draw else "train"
    indices = source.draw(history, count, generator_for(settings.seed, purpose, step))
    if not isinstance(indices, Tensor) or indices.shape != (count,) or indices.dtype != torch.long:
        name = f"prompt_source={describe(source)}"
        raise ValueError(f"{name} must return a tensor of train_batch_size={count} whole numbers")
    if indices.min() < 0 or indices.max() >= size:
        problem = f"prompt_source={describe(source)} gave the indices {int(indices.min())} to {int(indices.max())}"
        raise ValueError(f"{problem}, and task {settings.task.name!r} has the problems 0 to {size - 1}")
    return indices


def draw_group_sizes(
    settings: StepSettings, history: RewardHistory, indices: Int[Tensor, " P"], step: int
) -> Int[Tensor, " P"]:
    """Return the number of completions of each prompt of a step, over all processes, from `prompt_source`.

    Raises:
        ValueError: The source did not return a whole number of at least 1 for each prompt.
    """
    source = settings.prompt_source
    generator = generator_for(settings.seed, "group sizes", step)
    sizes = source.group_sizes(history, indices, settings.num_generations, generator)
    if not isinstance(sizes, Tensor) or sizes.shape != indices.shape or sizes.dtype != torch.long or sizes.min() < 1:
        problem = (
            f"group_sizes of prompt_source={describe(source)} must return a tensor of {len(indices)} whole numbers"
        )
        raise ValueError(f"{problem} from 1 on, one for each prompt")
    return sizes


def fitting_indices(settings: StepSettings, policy: Policy, indices: Int[Tensor, " P"]) -> Int[Tensor, " P"]:
    """Return the indices, with that of the task's next prompt that fits in place of each prompt that is longer than
    max_prompt_length.

    Raises:
        ValueError: No prompt fits.
    """
    task, max_prompt_length = settings.task, settings.max_prompt_length
    if max_prompt_length is None:
        return indices

    def fits(index: int) -> bool:
        problem = task[index]
        return len(prompt_ids(policy, problem.prompt, problem.blank)) <= max_prompt_length

    fitting = []
    for start in indices.tolist():
        following = ((start + k) % len(task) for k in range(len(task)))
        index = next(filter(fits, following), None)
        if index is None:
            raise ValueError(
                f"max_prompt_length={max_prompt_length}: every prompt of task {task.name!r} is longer; raise it"
            )
        fitting.append(index)
    return torch.tensor(fitting, dtype=torch.long)
