"""The loop: task -> prompts -> rollout -> rewards -> advantages -> likelihoods -> corrector -> update -> weight sync."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dllm_rl.aligned import aligned
from dllm_rl.evaluation import score
from dllm_rl.launch import begin, catch_interrupt, draw_problems, evaluate_with, finish, prepare, save
from dllm_rl.learner import update
from dllm_rl.mismatch import mismatch_metrics
from dllm_rl.policies import Policy
from dllm_rl.quantize import quantized_copy, sync_weights
from dllm_rl.recipe import Recipe
from dllm_rl.tasks.base import Reward
from dllm_rl.text import decode, encode, stream
from dllm_rl.types import Batch, Noise, Rollout, row_seeds


def train(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe; returns what its summary.json holds. Raises ValueError on one that cannot run, before any work."""
    accelerator, log, folder = prepare(recipe)
    policy, reference, optimizer, start, history = begin(recipe, accelerator, log, folder)
    rollout_policy = policy if recipe.rollout_quantization is None else quantized_copy(policy, recipe.rollout_quantization())
    rollout_policy.version = policy.version
    interrupted, progress = catch_interrupt(accelerator), log.bar("training", recipe.num_steps, completed=start)

    for step in range(start, recipe.num_steps):
        problems = draw_problems(recipe.task, "train", recipe.seed, step, recipe.train_batch_size, accelerator)
        with log.stage("rollout"), accelerator.autocast():
            prompts = encode(policy, problems, group_size=recipe.num_generations, seeds=seeds_of(recipe, step, accelerator))
            rollout = recipe.sampler(rollout_policy, prompts, stream(recipe.seed, "rollout", step))
            check_version(rollout, policy)
        with log.stage("reward"):
            graded = score(recipe.task, problems, decode(policy, rollout))
            rewards = gather_rewards(graded, recipe.num_generations, accelerator)                    # (P, G)
            advantages = recipe.advantages(rewards)                                                  # (P, G)
        with log.stage("scoring"), accelerator.autocast():
            live = live_rows(advantages, recipe, accelerator)
            noise = recipe.likelihood.draw(rollout, noise_stream(recipe, step, accelerator))         # shared by every policy
            with forward(recipe, policy, rollout_policy):
                old, old_scores = scored(recipe, policy, rollout, noise, live)
            behind = old if rollout_policy is policy else scored(recipe, rollout_policy, rollout, noise, live)[0]
            anchor = None if reference is None else scored(recipe, reference, rollout, noise, live)[0]
        with log.stage("update"), accelerator.autocast():
            mismatch, weights, keep = weigh(recipe, accelerator, rollout, live, advantages, old - behind)
            batch = live_batch(accelerator, rollout, noise, live, advantages, old, old_scores, weights, keep, anchor)
            with forward(recipe, policy, rollout_policy):
                learning = update(policy, optimizer, accelerator, batch, recipe, step)
        with log.stage("sync"):
            sync_weights(policy, rollout_policy)

        metrics = reward_metrics(rewards, graded, rollout, accelerator) | mismatch | learning
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
            log.say(f"interrupted after step {done}; continue with --resume_from_checkpoint latest --output_dir {recipe.directory}")
            raise SystemExit(130)
    return finish(recipe, accelerator, log, policy, rollout_policy, history)


def forward(recipe: Recipe, policy: Policy, rollout_policy: Policy) -> AbstractContextManager:
    """The learner's forward inside the block: through the rollout's quantised operands where the corrector aligns it."""
    if recipe.corrector.align_forward and rollout_policy is not policy:
        return aligned(policy, rollout_policy)
    return nullcontext()


def seeds_of(recipe: Recipe, step: int, accelerator: Accelerator) -> list[int]:
    """Seeds of this process's rows: a row's seed depends on (seed, step, its place in the global batch)."""
    rows = recipe.train_batch_size * recipe.num_generations
    seeds = row_seeds(stream(recipe.seed, "rollout", step), rows).tolist()
    share = rows // accelerator.num_processes
    return seeds[accelerator.process_index * share : (accelerator.process_index + 1) * share]


def noise_stream(recipe: Recipe, step: int, accelerator: Accelerator) -> torch.Generator:
    """The generator of the step's masks, past the seeds of the rows that processes before this one hold."""
    generator = stream(recipe.seed, "noise", step)
    share = recipe.train_batch_size * recipe.num_generations // accelerator.num_processes
    row_seeds(generator, accelerator.process_index * share)
    return generator


def check_version(rollout: Rollout, policy: Policy) -> None:
    """Raise RuntimeError when the rollout was made by other weights than the learner's present ones."""
    if rollout.weights_version != policy.version:
        raise RuntimeError(f"weights_version={rollout.weights_version} of the rollout is not the learner's {policy.version}: sync first")


def local(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """This process's share of a tensor whose first axis runs over the global batch."""
    return rows.chunk(accelerator.num_processes)[accelerator.process_index]


def gather_rewards(graded: Sequence[Reward], group_size: int, accelerator: Accelerator) -> Tensor:
    """Rewards (P, G) of all processes."""
    values = torch.tensor([reward.value for reward in graded], dtype=torch.float32, device=accelerator.device)
    if not values.isfinite().all():
        raise FloatingPointError(f"a reward is not finite: {[r for r in graded if not abs(r.value) < float('inf')][0]}")
    return accelerator.gather(values.view(-1, group_size))


def live_rows(advantages: Tensor, recipe: Recipe, accelerator: Accelerator) -> Tensor:
    """Indices of this process's rows in groups with a nonzero advantage: the others move nothing.

    With a KL term, or when no group is left, all rows count (mismatch is measured at every step).
    """
    live = (advantages != 0).any(-1)
    if recipe.beta or not live.any():
        live = torch.ones_like(live)
    return local(live.repeat_interleave(recipe.num_generations), accelerator).nonzero()[:, 0]


def scored(recipe: Recipe, policy: Policy, rollout: Rollout, noise: Noise, live: Tensor) -> tuple[Tensor, Tensor]:
    """Log-prob contributions (B, T) and their scores (N, B, T), nats; zero in rows that are not live."""
    scores = torch.zeros(noise.weight.shape, device=noise.weight.device)
    scores[:, live] = recipe.likelihood.scores(
        policy, rollout.rows(live), noise.rows(live), micro_batch_size=recipe.micro_batch_size
    )
    return recipe.likelihood.combine(scores, noise), scores


def weigh(
    recipe: Recipe, accelerator: Accelerator, rollout: Rollout, live: Tensor, advantages: Tensor, log_mismatch: Tensor
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Mismatch metrics over the live rows of all processes, and this process's weights and keep mask (B, T)."""
    mask = torch.zeros_like(rollout.completion_mask)
    mask[live] = rollout.completion_mask[live]
    width = mask.shape[1]
    together = [accelerator.gather(accelerator.pad_across_processes(x, dim=1)) for x in (log_mismatch, mask)]
    weights, keep, reasons = recipe.corrector.weigh(together[0], advantages.flatten(), together[1])
    metrics = mismatch_metrics(*together, advantages=advantages.flatten()) | reasons
    metrics["rollout_corr/rollout_rs_masked_fraction"] = 1 - (keep.sum() / together[1].sum()).item()
    return metrics, local(weights, accelerator)[:, :width], local(keep, accelerator)[:, :width]


def live_batch(accelerator, rollout, noise, live, advantages, old, old_scores, weights, keep, anchor) -> Batch:
    """The live rows as a Batch; the loss's denominators count all rows, the live and the others."""
    others = torch.ones(len(old), dtype=torch.bool, device=old.device)
    others[live] = False
    counts = torch.stack([keep[live].sum() + rollout.completion_mask[others].sum(), torch.tensor(len(old), device=old.device)])
    num_tokens, num_sequences = accelerator.reduce(counts, reduction="sum").tolist()
    return Batch(
        rollout=rollout.rows(live),
        noise=noise.rows(live),
        advantages=local(advantages.flatten(), accelerator)[live],
        old=old[live],
        old_scores=old_scores[:, live],
        weights=weights[live],
        keep=keep[live],
        reference=None if anchor is None else anchor[live],
        num_tokens=num_tokens,
        num_sequences=num_sequences,
    )


def reward_metrics(rewards: Tensor, graded: Sequence[Reward], rollout: Rollout, accelerator: Accelerator) -> dict[str, float]:
    """TRL's reward and length metrics over all processes."""
    names = sorted(graded[0].breakdown)
    rows = [[float(reward.parsed), *(reward.breakdown[name] for name in names)] for reward in graded]
    lengths = rollout.completion_mask.sum(-1, keepdim=True).double().cpu()
    totals = torch.cat([torch.tensor(rows, dtype=torch.float64), lengths], dim=1).sum(0).to(accelerator.device)
    parsed, *means, length = (accelerator.reduce(totals, reduction="sum") / rewards.numel()).tolist()
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        "frac_reward_zero_std": (rewards == rewards[:, :1]).all(-1).double().mean().item(),
        "parsed": parsed,
        **{f"rewards/{name}/mean": mean for name, mean in zip(names, means, strict=True)},
        "completions/mean_length": length,
        "num_tokens": length * rewards.numel(),
    }
