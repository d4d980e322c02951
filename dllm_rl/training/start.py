"""Starting and resuming a run."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.run_folder import clear_folder, open_folder
from dllm_rl.diagnostics.batch_invariance import prepare_workspace
from dllm_rl.distributed.collectives import from_main, make_accelerator
from dllm_rl.distributed.peers import Peers
from dllm_rl.distributed.stop import Stop, ended_by_launcher, how_to_continue, with_the_run
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.compiled import compile_blocks
from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.trackers import check_trackers, start_trackers
from dllm_rl.recipe import Recipe, Settings
from dllm_rl.training.cautions import cautions
from dllm_rl.training.model_card import check_hub
from dllm_rl.training.policies import (
    check_compiled,
    fresh_policy,
    make_optimizer,
    make_policy,
    reference_policy,
    resumed_policy,
    rollout_copy,
)
from dllm_rl.training.prompts import check_prompts, choose
from dllm_rl.training.rehearsal import rehearse
from dllm_rl.training.rollouts import wanted_parts
from dllm_rl.training.run import Run
from dllm_rl.training.saving import make_writer, protect, save
from dllm_rl.training.sharded_learner import check_engine, check_sharding, first_home, share_out


def start(recipe: Recipe) -> Run[Recipe]:
    """A run at its first step: fresh, warmed up and evaluated, or as a checkpoint left it. Raises ValueError."""
    if recipe.zero_mismatch:
        prepare_workspace()
    check_compiled(recipe)
    check_hub(recipe)
    accelerator, stop, peers = launch(recipe)
    folder, notes = from_main(partial(open_folder, recipe), accelerator)
    made = None if folder else rehearsed(recipe, accelerator)  # before anything is written or deleted
    from_main(partial(clear_folder, recipe), accelerator)
    state: dict[str, Any] = checkpoint.read_state(folder) if folder else {"step": 0}
    log = open_log(recipe, accelerator, state["step"], notes, folder)
    if peers is not None:
        peers.follow(log)
    for caution in cautions(recipe):
        log.say(f"warning: {caution}")
    history = new_history(state["step"])
    if folder:
        policy = resumed_policy(recipe, folder, state, accelerator)
        check_prompts(recipe, policy)
        optimizer = make_optimizer(recipe, policy)
        history |= restore(folder, policy, optimizer, log)
    else:
        assert made is not None, "a run without a checkpoint begins with the recipe's model"
        policy = fresh_policy(recipe, made, accelerator, log, history)
        optimizer = make_optimizer(recipe, policy)
    rollout_policy = rollout_copy(recipe, policy)
    rollout_policy.version = policy.version
    if recipe.torch_compile:
        compile_blocks(rollout_policy, mode=recipe.torch_compile_mode)
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        log=log,
        policy=policy,
        rollout_policy=rollout_policy,
        reference=reference_policy(recipe, policy, accelerator, fresh=folder is None),
        optimizer=optimizer,
        first_step=state["step"],
        history=history,
        stop=stop,
        writer=make_writer(recipe, accelerator),
        progress=log.view("training", recipe.num_steps, curve="reward", completed=state["step"]),
    )
    if not folder:
        save(run, 0)
    protect(run, peers)
    return run


def new_history(step: int) -> dict[str, Any]:
    return {"begun": time.perf_counter(), "seconds": 0.0, "whole": step, "warmup_steps": 0, "checkpoint": ""}


def restore(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, log: RunLog) -> dict[str, Any]:
    """Load policy version, optimiser and log from the checkpoint; returns its part of the history."""
    state = checkpoint.read_state(folder)
    policy.version = state["version"]
    log.seconds = state["stages"]
    checkpoint.load_optimizer(folder, policy, optimizer)
    kept = {key: state[key] for key in ("seconds", "eval_before", "warmup_steps")}
    return kept | {"checkpoint": str(folder)}


def launch(recipe: Settings) -> tuple[Accelerator, Stop, Peers | None]:
    """The processes, the stop on a signal, and the watch over other processes (or None). Raises ValueError."""
    ended_by_launcher()
    check_trackers(recipe)
    directory = str(Path(recipe.directory) / "tensorboard")
    accelerator = make_accelerator(timeout=recipe.collective_timeout, log_with=recipe.trackers, directory=directory)
    stop = Stop(seconds=recipe.stop_seconds, main=accelerator.is_main_process)
    peers = None
    if recipe.peer_timeout is not None and accelerator.num_processes > 1:
        peers = Peers(accelerator, seconds=recipe.peer_timeout, advice=f"this run ends; {how_to_continue(recipe)}")
        peers.hear = stop.hear_from_another
        with_the_run().enter_context(peers)
    stop.leave_at_once("stopped before the first step: nothing new was saved; start again with the same command")
    check_processes(recipe, accelerator)
    return accelerator, stop, peers


def open_log(
    recipe: Settings, accelerator: Accelerator, start: int, notes: Sequence[str], folder: Path | None
) -> RunLog:
    """The run's files and trackers from step `start` on; prints `notes`, and on a resume `folder`, the checkpoint."""
    log = RunLog(
        Path(recipe.directory),
        start=start,
        main=accelerator.is_main_process,
        patient=recipe.on_save_error == "continue",
        completions=recipe.log_completions_steps > 0,
        trackers=start_trackers(recipe, accelerator, start=start),
    )
    for note in notes:
        log.say(note)
    if recipe.resume_from_checkpoint:
        log.say(f"resuming from {folder}" if folder else "no checkpoint yet: starting from the beginning")
    return log


def check_processes(recipe: Settings, accelerator: Accelerator) -> None:
    """Raise ValueError if the launch cannot run the recipe."""
    check_engine()
    check_sharding(recipe, accelerator.num_processes)
    count, fields = accelerator.num_processes, ["train_batch_size"]
    fields += ["warmup_batch_size"] * (recipe.warmup_steps > 0)
    for name in fields:
        size = getattr(recipe, name)
        if size % count:
            least = size // count * count
            raise ValueError(
                f"{name}={size} must be a multiple of the {count} processes; nearest that are: "
                f"{f'{least}, ' if least else ''}{least + count}"
            )


def rehearsed(recipe: Recipe, accelerator: Accelerator) -> Policy:
    """The recipe's model after a rehearsed step: a bad setting is refused before any work and before any file."""
    policy = make_policy(recipe, first_home(recipe, accelerator))
    recipe.likelihood.check(policy)
    wanted_parts(recipe)
    longest = check_prompts(recipe, policy)
    (problem,), _ = choose(recipe, policy, [longest])
    policy = share_out(recipe, policy, accelerator)
    rehearse(recipe, policy, problem, accelerator)
    return policy
