"""The loop: task, prompts, rollout, rewards, advantages, likelihoods, corrector, update, weight sync."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Generator, Tensor

from dllm_rl.algorithms.advantages import informative
from dllm_rl.algorithms.mismatch import mismatch_metrics, symptom_metrics
from dllm_rl.diagnostics.batch_invariance import check_zero, zero_mismatch
from dllm_rl.distributed import local, reduce_metrics
from dllm_rl.launch import begin, catch_interrupt, draw_problems, evaluate_with, finish, prepare, save
from dllm_rl.learner import update
from dllm_rl.models.base import Policy
from dllm_rl.models.tokens import decode, encode
from dllm_rl.plan import plan
from dllm_rl.quantization.aligned import aligned
from dllm_rl.quantization.rollout_policy import check_version, quantized_copy, sync_weights
from dllm_rl.recipe import Recipe
from dllm_rl.rng import row_seeds, stream
from dllm_rl.tasks.base import Reward, score
from dllm_rl.types import Batch, Noise, Rollout


def train(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe; returns what its summary.json holds. Raises ValueError on one that cannot run, before any work."""
    if recipe.dry_run:
        print(text := plan(recipe))
        return {"plan": text}
    accelerator, log, folder = prepare(recipe)
    policy, reference, optimizer, start, history = begin(recipe, accelerator, log, folder)
    rollout_policy = (
        policy if recipe.rollout_quantization is None else quantized_copy(policy, recipe.rollout_quantization())
    )
    rollout_policy.version = policy.version
    interrupted, progress = catch_interrupt(accelerator), log.bar("training", recipe.num_steps, completed=start)

    for step in range(start, recipe.num_steps):
        problems = draw_problems(recipe.task, "train", recipe.seed, step, recipe.train_batch_size, accelerator)
        with log.stage("rollout"), arithmetic(recipe, accelerator):
            seeds = seeds_of(recipe, step, accelerator)
            rollout = sampled(recipe, policy, rollout_policy, problems, seeds, stream(recipe.seed, "rollout", step))
        with log.stage("reward"):
            graded = score(recipe.task, problems, decode(policy, rollout))
            rewards = gather_rewards(graded, recipe.num_generations, accelerator)  # (P, G)
            drawn = reward_metrics(rewards, graded, rollout, accelerator)
        if recipe.max_num_gen_batches > 1:
            rollout, rewards, again = draw_again(
                recipe, accelerator, log, policy, rollout_policy, rollout, rewards, step
            )
            drawn |= again
        advantages = recipe.advantages(rewards)  # (P, G)
        with log.stage("scoring"), arithmetic(recipe, accelerator), forward_of(recipe, policy, rollout_policy):
            live = live_rows(advantages, recipe, accelerator)
            part = rollout.rows(live)
            noise = draw_noise(recipe, step, rollout, advantages, accelerator).rows(live)  # shared by every policy
            old, old_scores = scored(recipe, policy, part, noise)
            behind = behaviour(recipe, policy, rollout_policy, part, noise, old)
            if recipe.zero_mismatch:
                check_zero(policy, rollout_policy, part, noise, old, behind, part.completion_mask)
            anchor = None if reference is None else scored(recipe, reference, part, noise)[0]
        with log.stage("update"), arithmetic(recipe, accelerator), forward_of(recipe, policy, rollout_policy):
            mismatch, weights, keep = weigh(recipe, accelerator, rollout, live, advantages, old, behind)
            shares = (advantages, old, old_scores, weights, keep, anchor)
            batch = live_batch(accelerator, rollout, part, noise, live, *shares)
            learning = update(policy, optimizer, accelerator, batch, recipe, step)
        with log.stage("sync"):
            sync_weights(policy, rollout_policy)

        metrics = drawn | mismatch | learning
        done = step + 1
        if recipe.eval_steps and done % recipe.eval_steps == 0:
            with log.stage("evaluation"):
                found = evaluate_with(recipe, policy, recipe.validation_task, accelerator)
            metrics |= {f"eval/{name}": value for name, value in found.items()}
        log.write(step, metrics)
        progress(metrics, show=done % recipe.logging_steps == 0 or done == recipe.num_steps)
        stop = interrupted()
        if stop or done % recipe.save_steps == 0 or done == recipe.num_steps:
            save(recipe, accelerator, log, done, policy, optimizer, history)
        if stop and done < recipe.num_steps:
            log.say(
                f"interrupted after step {done}; continue with --resume_from_checkpoint latest "
                f"--output_dir {recipe.directory}"
            )
            raise SystemExit(130)
    return finish(recipe, accelerator, log, policy, rollout_policy, history)


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


def draw_noise(recipe: Recipe, step: int, rollout: Rollout, advantages: Tensor, accelerator: Accelerator) -> Noise:
    """The step's masks; the generator is taken past the seeds of the rows that processes before this one hold."""
    generator = stream(recipe.seed, "noise", step)
    row_seeds(generator, accelerator.process_index * len(rollout.tokens))
    return recipe.likelihood.given(recipe.likelihood.draw(rollout, generator), local(advantages.flatten(), accelerator))


def forward_of(recipe: Recipe, policy: Policy, rollout_policy: Policy) -> AbstractContextManager:
    """With align_forward the learner's forward runs through the rollout's quantised operands."""
    align = recipe.corrector.align_forward and rollout_policy is not policy
    return aligned(policy, rollout_policy) if align else nullcontext()


@contextmanager
def arithmetic(recipe: Recipe, accelerator: Accelerator) -> Iterator[None]:
    """bf16 autocast where asked for; with zero_mismatch a row's result does not depend on its batch."""
    with accelerator.autocast(), zero_mismatch() if recipe.zero_mismatch else nullcontext():
        yield


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


def live_rows(advantages: Tensor, recipe: Recipe, accelerator: Accelerator) -> Tensor:
    """Indices of this process's rows in groups with a nonzero advantage: the others move nothing.

    With a KL term or an entropy bonus, or when no group is left, all rows count (mismatch is measured at every step).
    """
    live = (advantages != 0).any(-1)
    if recipe.beta or recipe.entropy_coeff or not live.any():
        live = torch.ones_like(live)
    return local(live.repeat_interleave(recipe.num_generations), accelerator).nonzero()[:, 0]


def scored(recipe: Recipe, policy: Policy, part: Rollout, noise: Noise) -> tuple[Tensor, Tensor]:
    """Log-prob contributions (R, T) of the live rows and their scores (N, R, T), nats."""
    scores = recipe.likelihood.scores(policy, part, noise, micro_batch_size=recipe.micro_batch_size)
    return recipe.likelihood.combine(scores, noise), scores


def behaviour(recipe: Recipe, policy, rollout_policy, part: Rollout, noise: Noise, old: Tensor) -> Tensor:
    """The rollout policy's side of the ratio (R, T) in the live rows, nats.

    An estimator that replays the sampler step by step would only compute again what the sampler recorded.
    """
    if recipe.likelihood.replays:
        return part.logprobs
    return old if rollout_policy is policy else scored(recipe, rollout_policy, part, noise)[0]


def weigh(
    recipe: Recipe,
    accelerator: Accelerator,
    rollout: Rollout,
    live: Tensor,
    advantages: Tensor,
    old: Tensor,
    behind: Tensor,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Mismatch metrics over the live rows of all processes, and this process's weights and keep mask (B, T)."""
    width, flat = rollout.tokens.shape[1], advantages.flatten()
    everywhere = []  # every process gathers as many rows, those that are not live as zeros
    for part in (old - behind, rollout.completion_mask[live], old, rollout.tokens[live]):
        rows = torch.zeros(rollout.tokens.shape, dtype=part.dtype, device=part.device)
        rows[live] = part
        everywhere.append(rows)
    padded = [accelerator.pad_across_processes(x, dim=1) for x in everywhere]
    log_mismatch, mask, old, tokens = (accelerator.gather(x) for x in padded)
    weights, keep, reasons = recipe.corrector.weigh(log_mismatch, flat, mask)
    metrics = mismatch_metrics(log_mismatch, mask, old=old, advantages=flat) | reasons
    # Of an estimate that is no log-probability of single tokens, repetition is all that can be said.
    exact = recipe.likelihood.replays or recipe.likelihood.attention == ("causal",)
    metrics |= symptom_metrics(tokens, mask, flat, old=old if exact else None)
    metrics["rollout_corr/rollout_rs_masked_fraction"] = 1 - (keep.sum() / mask.sum()).item()
    return metrics, local(weights, accelerator)[:, :width], local(keep, accelerator)[:, :width]


def live_batch(accelerator, rollout, part, noise, live, advantages, old, old_scores, weights, keep, anchor) -> Batch:
    """The live rows as a Batch; the loss's denominators count all rows, the live and the others."""
    others = torch.ones(len(rollout.tokens), dtype=torch.bool, device=old.device)
    others[live] = False
    tokens = keep[live].sum() + rollout.completion_mask[others].sum()
    counts = torch.stack([tokens, torch.tensor(len(others), device=old.device)])
    num_tokens, num_sequences = accelerator.reduce(counts, reduction="sum").tolist()
    return Batch(
        rollout=part,
        noise=noise,
        advantages=local(advantages.flatten(), accelerator)[live],
        old=old,
        old_scores=old_scores,
        weights=weights[live],
        keep=keep[live],
        reference=anchor,
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )


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
