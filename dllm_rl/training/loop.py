"""The loop: task, prompts, rollout, rewards, advantages, likelihoods, corrector, update, weight sync."""

from typing import Any

from dllm_rl.diagnostics.batch_invariance import check_zero
from dllm_rl.models.tokens import decode
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.recipe import Recipe
from dllm_rl.rng import stream
from dllm_rl.tasks.base import score
from dllm_rl.training.dry_run import plan
from dllm_rl.training.learner import (
    arithmetic,
    behaviour,
    draw_noise,
    forward_of,
    live_batch,
    live_rows,
    scored,
    update,
    weigh,
)
from dllm_rl.training.rollouts import draw_again, draw_problems, gather_rewards, reward_metrics, sampled, seeds_of
from dllm_rl.training.run import begin, catch_interrupt, evaluate_with, finish, prepare, save


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
