"""The loop: task, prompts, rollout, rewards, advantages, likelihoods, corrector, update, weight sync."""

from dllm_rl.distributed.stop import leaving_nothing_behind
from dllm_rl.quantization.rollout_policy import sync_weights
from dllm_rl.recipe import Recipe
from dllm_rl.screen import escape_controls
from dllm_rl.training.arithmetic import learner_forward
from dllm_rl.training.balance import balance
from dllm_rl.training.completion_log import log_completions
from dllm_rl.training.dry_run.plan import plan
from dllm_rl.training.finish import Summary, finish
from dllm_rl.training.learner import correct, draw_noise, measured_groups, score, update
from dllm_rl.training.rollouts import collect
from dllm_rl.training.saving import checkpoint_if_due
from dllm_rl.training.start import start
from dllm_rl.training.validation import validate


@leaving_nothing_behind
def train(recipe: Recipe) -> Summary:
    """Run a recipe; returns its summary with the trained policy. Raises ValueError before any work on a bad recipe."""
    if recipe.dry_run:
        print(escape_controls(text := plan(recipe), keep="\n"))
        return Summary({"plan": text})
    run = start(recipe)  # fresh, or from a checkpoint
    policy, rollout_policy, accelerator, log = run.policy, run.rollout_policy, run.accelerator, run.log

    for step in range(run.state.step, recipe.num_steps):
        sampled, answers, rewards, parts, sampling = collect(recipe, rollout_policy, step, accelerator, log)
        advantages = recipe.advantages(rewards, **parts)  # (P, G), of all processes
        groups = measured_groups(recipe, advantages, step)  # those to learn from, and a sample of the others

        with log.stage("scoring"), learner_forward(recipe, policy, rollout_policy, accelerator):
            moved = balance(recipe, sampled, advantages, groups, accelerator, pad_id=policy.pad_id)
            rollout, advantages, groups = moved  # so that all processes finish together
            noise = draw_noise(recipe, rollout, advantages, groups, step, accelerator)  # shared by every policy
            logps = score(recipe, rollout, noise, policy=policy, rollout_policy=rollout_policy, reference=run.reference)
        with log.stage("update"), learner_forward(recipe, policy, rollout_policy, accelerator):
            batch, mismatch = correct(recipe, rollout, noise, logps, advantages, accelerator, groups=groups)
            learning = update(policy, run.optimizer, batch, accelerator, **recipe.update_settings(step))
        with log.stage("sync"):
            synced = sync_weights(policy, rollout_policy)

        metrics = sampling | mismatch | learning | synced | validate(run, step)
        log.write(step, metrics)
        log_completions(run, step, answers, sampled, rollout, noise=noise, logps=logps, advantages=advantages)
        run.progress(metrics, show=(step + 1) % recipe.logging_steps == 0 or step + 1 == recipe.num_steps)
        checkpoint_if_due(run, step)  # every save_steps, after the last step, and on a signal, which ends the run here
    return finish(run)
