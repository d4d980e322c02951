"""The end of a run: evaluation, summary, picture, model card."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_rl.distributed import machine
from dllm_rl.files import write_json, write_text
from dllm_rl.models.base import Policy
from dllm_rl.recipe import Recipe
from dllm_rl.training import checkpoint, plots
from dllm_rl.training.card import card, push_to_hub
from dllm_rl.training.run import Run, evaluate_with, shown
from dllm_rl.training.saving import settle
from dllm_rl.training.stop import how_to_continue


class Summary(dict[str, Any]):
    """What summary.json holds, and in this process the policy that was trained, which no file or comparison sees."""

    def __init__(self, numbers: Mapping[str, Any], policy: Policy | None = None) -> None:
        super().__init__(numbers)
        self._policy = policy

    @property
    def policy(self) -> Policy:
        """As the last step left it, with its adapters. Raises ValueError after a dry run, which trains none."""
        if self._policy is None:
            raise ValueError("dry_run=True trains no policy; run without it")
        return self._policy


def finish(run: Run) -> Summary:
    """Evaluate on held-out problems, write summary.json and the picture, say in a paragraph what happened."""
    recipe, accelerator, log, history = run.recipe, run.accelerator, run.log, run.history
    policy, rollout_policy = run.policy, run.rollout_policy
    run.stop.leave_at_once(f"stopped after the last step, before the summary; {how_to_continue(recipe)}")
    with log.stage("evaluation"):
        after = evaluate_with(recipe, policy, recipe.eval_task, accelerator)
        quantized = (
            after if rollout_policy is policy else evaluate_with(recipe, rollout_policy, recipe.eval_task, accelerator)
        )
    settle(run)
    log.close()
    directory = Path(recipe.directory)
    summary = {
        "eval_before": history["eval_before"],
        "eval_after": after,
        "eval_after_quantized": quantized,
        "eval_problems": len(recipe.eval_task),
        "seconds": history["seconds"] + time.perf_counter() - history["begun"],
        "stages": {name: round(spent, 3) for name, spent in log.seconds.items()},
        "warmup_steps": history["warmup_steps"],
        "seed": recipe.seed,
        "num_processes": accelerator.num_processes,
        "checkpoint": history["checkpoint"],  # the one whose weights were evaluated
        "machine": machine(accelerator),
        "recipe": recipe.settings(),
    }
    if accelerator.is_main_process:
        write_json(directory / "summary.json", summary)
        measured = {"before RL": history["eval_before"], "after": after, "after, quantised": quantized}
        _describe(run, measured)
        picture = plots.plot(directory) if recipe.num_steps else None
        log.say(
            f"\n{recipe.name}, seed {recipe.seed}: {shown(history['eval_before'])}  ->  {shown(after)}  on "
            f"{len(recipe.eval_task)} held-out problems, after {history['warmup_steps']} warm-up and "
            f"{recipe.num_steps} RL steps in {summary['seconds']:.0f} s.\n"
            f"Checkpoint: {summary['checkpoint']}\nPicture:    {picture}\nNumbers:    {directory / 'summary.json'}\n"
            f"{_next_command(recipe, summary['checkpoint'])}"
        )
        if recipe.push_to_hub is not None:
            _upload(run)
    accelerator.wait_for_everyone()
    policy.module.zero_grad(set_to_none=True)
    return Summary(summary, policy)


def _describe(run: Run, measured: dict[str, dict[str, float]]) -> None:
    """Write the card of the checkpoint that was evaluated again, with what came of it."""
    folder = Path(run.history["checkpoint"])
    if not folder.is_dir():  # it was deleted meanwhile
        return
    step = checkpoint.read_state(folder)["step"]
    write_text(folder / checkpoint.CARD, card(run.recipe, step=step, evaluations=measured, metrics=run.log.last))


def _upload(run: Run) -> None:
    """To the hub, where that is asked for; the run has ended well if it fails."""
    folder, repo = Path(run.history["checkpoint"]), str(run.recipe.push_to_hub)
    try:
        run.log.say(f"Uploaded:   {push_to_hub(folder, repo)}")
    except Exception as error:  # of any kind: the network's, the hub's
        run.log.say(f"warning: {folder} could not be uploaded to {repo}: {error}")


def _next_command(recipe: Recipe, folder: str) -> str:
    """How to look at what was trained; of a module of the user's own, how to open it."""
    if not (Path(folder) / "config.json").exists():
        return "Open:       dllm_rl.load_weights(policy, folder), with a policy of the same module"
    problem = recipe.eval_task[0]
    text = problem.prompt if isinstance(problem.prompt, str) else problem.prompt[-1]["content"]
    gaps = "" if problem.blank is None else f" --blank {problem.blank!r} --max_new_tokens 0"
    return f"Sample:     dllm-rl sample {folder} {text!r}{gaps}"
