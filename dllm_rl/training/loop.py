"""The loop: task, prompts, rollout, rewards, advantages, likelihoods, corrector, update, weight sync."""

from typing import Any

from dllm_rl.quantization.rollout_policy import sync_weights
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls
from dllm_rl.training.dry_run import plan
from dllm_rl.training.failures import recorded
from dllm_rl.training.learner import correct, draw_noise, learner_forward, score, update
from dllm_rl.training.rollouts import collect
from dllm_rl.training.run import checkpoint_if_due, finish, start, validate


def train(recipe: Recipe, *, until: int | None = None) -> dict[str, Any]:
    """Run a recipe; returns what its summary.json holds. Raises ValueError, before any work, on one that cannot run.
    A replay runs it `until` a step, without a summary."""
    if recipe.dry_run:
        print(escape_controls(text := plan(recipe), keep="\n"))
        return {"plan": text}
    run = start(recipe)  # fresh, or from a checkpoint
    policy, rollout_policy, accelerator, log = run.policy, run.rollout_policy, run.accelerator, run.log
    sides = {"policy": policy, "rollout_policy": rollout_policy, "reference": run.reference}

    for step in range(run.first_step, recipe.num_steps if until is None else until):
        with recorded(run, step) as made:  # what a step that fails leaves behind
            rollout, rewards, sampling = collect(recipe, rollout_policy, step, accelerator, log)
            made |= {"rollout": rollout, "rewards": rewards}
            advantages = recipe.advantages(rewards)  # (P, G), of all processes
            with log.stage("scoring"), learner_forward(recipe, policy, rollout_policy, accelerator):
                noise = draw_noise(recipe, rollout, advantages, step, accelerator)  # masks, shared by every policy
                logps = score(recipe, rollout, noise, **sides)
            made |= {"noise": noise, "logps": logps}
            with log.stage("update"), learner_forward(recipe, policy, rollout_policy, accelerator):
                batch, mismatch = correct(recipe, rollout, noise, logps, advantages, accelerator)
                learning = update(policy, run.optimizer, batch, accelerator, **recipe.update_settings(step))
            with log.stage("sync"):
                sync_weights(policy, rollout_policy)
        metrics = sampling | mismatch | learning | validate(run, step)
        log.write(step, metrics)
        run.progress(metrics, show=(step + 1) % recipe.logging_steps == 0 or step + 1 == recipe.num_steps)
        checkpoint_if_due(run, step)  # every save_steps, after the last step, and on Ctrl-C, which ends the run here
    return finish(run) if until is None else {}
