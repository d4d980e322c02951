"""Finish a run: final evaluation, summary.json and plot."""

import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

from dllm_rl.models.checkpoint.loading import has_known_family
from dllm_rl.recipe import Recipe
from dllm_rl.samplers import Sampler, decodes_in_engine
from dllm_rl.tasks.base import shown_prompt
from dllm_rl.tasks.datasets import num_problems_in_training
from dllm_rl.tasks.user_code import process_restored
from dllm_rl.training.any_recipe import AnyRecipe
from dllm_rl.training.hooks import load_best
from dllm_rl.training.hub import push_to_hub
from dllm_rl.training.policies import resumed_policy
from dllm_rl.training.results import as_returned, best_folder, summary_of, write_files
from dllm_rl.training.run import Run
from dllm_rl.training.summary import Summary
from dllm_rl.training.validation import (
    evaluate_held_out,
    evaluate_with,
    format_change,
    format_metrics,
    problems_evaluated,
)


def finish(run: Run[Recipe]) -> Summary:
    """Evaluate on held-out problems, write summary.json and the plot, and print the result. Call `take_steps` first."""
    recipe = run.recipe
    log = run.log
    eval_before = run.state.eval_before
    load_best(run, lambda folder, state: resumed_policy(recipe, folder, state, run.accelerator))
    with log.stage("evaluation"):
        eval_after = evaluate_held_out(recipe, run.policy, recipe.eval_task, run.accelerator, log, step_of_weights(run))
        eval_after_quantized = eval_after
        if not run.learner_samples:
            if run.engine is not None and run.rollout_policy.weights_version != run.policy.weights_version:
                run.engine.sync(run.policy, run.rollout_policy)  # the best one is loaded, or a feature skipped it
            rollout_recipe = recipe.replace(eval_sampler=_sampler_of_rollouts(recipe))
            assert run.step is not None, "of RL"
            with run.step.arithmetic():  # as in rollouts
                eval_after_quantized = evaluate_with(
                    rollout_recipe, run.rollout_policy, recipe.eval_task, run.accelerator
                )
    num_in_training = num_problems_in_training(recipe.task, recipe.eval_task)
    problems = problems_evaluated(len(recipe.eval_task), num_in_training)
    return write_summary(
        run,
        {
            "eval_before": eval_before,
            "eval_after": eval_after,
            "eval_after_quantized": eval_after_quantized,
            "eval_problems": len(recipe.eval_task),
            "eval_problems_in_training": num_in_training,
            "warmup_steps": run.state.warmup_steps,
        },
        result=result_text(run, eval_before, eval_after, problems),
        advice=_next_command(run),
    )


def result_text(run: Run[Recipe], before: dict[str, float], after: dict[str, float], problems: str) -> str:
    """Return what a run has reached on `problems`; of one without RL steps, that it was the warm-up."""
    warmup_steps = run.state.warmup_steps
    if run.state.step:
        steps = f"after {warmup_steps} warm-up and {run.state.step} RL steps"
        return f"{format_change(before, after)} on {problems}, {steps}"
    did = f"the warm-up alone, {warmup_steps} supervised steps and no RL" if warmup_steps else "no training"
    return f"{did}: {format_metrics(after)} on {problems}"


def step_of_weights(run: Run[Recipe]) -> int:
    """Return the number of updates of the weights that a run ends with, which may be those of its best checkpoint."""
    is_best = run.state.best_step is not None and run.checkpoint == str(best_folder(run))
    return run.state.best_step if is_best else run.state.step  # type: ignore[return-value]


def _sampler_of_rollouts(recipe: Recipe) -> Sampler:
    """Return the sampler that evaluates the rollout policy: that of an engine which decodes by itself is its own."""
    if recipe.rollout_engine is None or not decodes_in_engine(recipe.sampler):
        return recipe.eval_sampler
    try:
        return recipe.sampler.greedy()
    except ValueError:  # it has no temperature 0
        return recipe.sampler


def write_summary(run: Run[AnyRecipe], results: dict[str, Any], *, result: str, advice: str) -> Summary:
    """Write summary.json with `results`, draw the plot, and print `result` and `advice`. Call `wait_for_checkpoint`
    first.
    """
    run.log.close()
    recipe = run.recipe
    # The checkpoint is the one whose weights were evaluated.
    summary = summary_of(run, results, checkpoint=run.checkpoint, stop_reason=run.control.stop_reason)
    if run.accelerator.is_main_process:
        numbers_path, plot_path = write_files(run, summary)
        notes = [
            f"Problem:    {problem.state}, {problem.name}: {problem.text}\n" for problem in run.log.record.problems
        ]
        notes += [f"Stopped:    {run.control.stop_reason}\n"] if run.control.stop_reason else []
        plot_line = f"Picture:    {plot_path}\n" if plot_path else ""
        run.log.say(
            f"\n{recipe.name}, seed {recipe.seed}: {result} in {summary['seconds']:.0f} s.\n"
            f"{''.join(notes)}Checkpoint: {summary['checkpoint']}\n{plot_line}Numbers:    {numbers_path}\n{advice}"
        )
        if recipe.saves.push_to_hub is not None:
            folder = Path(run.checkpoint)
            try:
                run.log.say(f"Uploaded:   {push_to_hub(folder, recipe.saves.push_to_hub)}")
            except Exception as error:  # of any type, from the network or the hub: the run itself has succeeded
                run.log.say(f"warning: {folder} could not be uploaded to {recipe.saves.push_to_hub}: {error}")
        for callback in recipe.callbacks:
            with process_restored():
                callback.on_end(run.control, deepcopy(summary))
    run.accelerator.wait_for_everyone()
    return as_returned(run, summary)


def has_custom_module(run: Run[AnyRecipe]) -> bool:
    """Return whether `load_policy` opens the run's checkpoint only `into` the policy that the user makes."""
    return not isinstance(run.recipe.model, str) and not has_known_family(Path(run.checkpoint))


def _next_command(run: Run[Recipe]) -> str:
    """Return the command that samples the first held-out problem as the run's evaluation does, of the weights that were
    evaluated.
    """
    recipe = run.recipe
    # For a custom module, the user fills in the function that makes it.
    model_option = " --make_model MODULE:FUNCTION" if has_custom_module(run) else ""
    problem = recipe.eval_task[0]
    text = shown_prompt(problem)
    options = "" if isinstance(problem.prompt, str) else " --chat"
    if problem.blank is not None:
        options += f" --blank {shlex.quote(problem.blank)}"
    folder = Path(recipe.directory)
    if run.checkpoint == str(best_folder(run)) and run.state.best_step != run.state.step:
        folder = Path(run.checkpoint)  # the run's folder opens its last checkpoint
    return f"Sample:     dllm-rl sample {shlex.quote(str(folder))} {shlex.quote(text)}{options}{model_option}"
