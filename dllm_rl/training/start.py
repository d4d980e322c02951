"""Starting and resuming a run."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.resume import changes_since
from dllm_rl.checkpoints.run_folder import clear_folder, open_folder
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.diagnostics.batch_invariance import prepare_workspace
from dllm_rl.distributed.collectives import from_main, make_accelerator
from dllm_rl.distributed.peers import Peers
from dllm_rl.distributed.stop import Stop, how_to_continue, with_the_run
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.blocks import compile_blocks
from dllm_rl.monitoring.log import RunLog, check_trackers, start_trackers
from dllm_rl.presets import num_parameters
from dllm_rl.recipe import Recipe, Settings
from dllm_rl.training.cautions import cautions, of_emulated_products, of_the_rate
from dllm_rl.training.distillation import teacher_policy
from dllm_rl.training.hooks import before_first_step
from dllm_rl.training.late_rollouts.ray_pool import ray_workers
from dllm_rl.training.late_rollouts.schedule import LateRollouts, Pool
from dllm_rl.training.model_card import check_hub
from dllm_rl.training.policies import (
    build_policy,
    check_compiled,
    engine_of,
    fresh_state,
    make_optimizer,
    reference_policy,
    resumed_policy,
)
from dllm_rl.training.prompts import check_prompts, check_tasks, choose, reward_history
from dllm_rl.training.rehearsal import rehearse
from dllm_rl.training.rollouts import wanted_parts
from dllm_rl.training.run import Run
from dllm_rl.training.saving import check_lock, make_writer, protect, save
from dllm_rl.training.sharded_learner import check_batches, check_launch_config, check_sharding, first_home, share_out
from dllm_rl.training.validation import check_best_model, validation_interval


def start(recipe: Recipe, pool: Pool | None = None) -> Run[Recipe]:
    """Return a run at its first step, fresh or restored from a checkpoint.

    Raises:
        ValueError: The recipe cannot run.
    """
    # 1. Check what needs no model, and join the processes. From here on a signal ends the process immediately.
    if recipe.zero_mismatch:
        prepare_workspace()
    check_compiled(recipe)
    check_hub(recipe)
    check_tasks(recipe)
    check_best_model(recipe, validation_interval(recipe))
    if pool is None or not recipe.rollout_workers:
        pool = ray_workers(recipe)  # the workers import torch while this process builds the model
    accelerator, stop, peers = launch(recipe)

    # 2. A new run rehearses a step. A recipe that is refused up to here has overwritten nothing.
    folder, saved, notes = from_main(partial(open_folder, recipe), accelerator)
    if not folder:
        policy = rehearsed(recipe, accelerator)
        teacher = teacher_policy(recipe, policy, accelerator)

    # 3. The run's files, and the watch: from here on the other processes can read the stage of this process.
    log = open_log(recipe, accelerator, peers, saved, notes)
    emulated = of_emulated_products(recipe, accelerator.device.type)
    for caution in [*cautions(recipe), *emulated]:
        log.say(f"warning: {caution}")

    # 4. The state of the first step. Weights, adapters, moments, log and record all come from the same checkpoint.
    if folder:
        policy = resumed_policy(recipe, folder, saved, accelerator)
        teacher = teacher_policy(recipe, policy, accelerator)
        check_prompts(recipe, policy)
        optimizer = make_optimizer(recipe, policy)
        state = restore(recipe, folder, saved, policy, optimizer, log)
    else:
        state = fresh_state(recipe, policy, accelerator, log)
        optimizer = make_optimizer(recipe, policy)

    parameters = num_parameters(recipe.model if isinstance(recipe.model, str) else policy)
    for caution in of_the_rate(recipe.learning_rate, parameters):
        log.say(f"warning: {caution}")

    # 5. The copies: the rollout's copy has the learner's version; the reference has the weights that RL started from.
    rollout_policy = engine_of(recipe).load(policy)
    rollout_policy.weights_version = policy.weights_version
    if recipe.torch_compile:
        compile_blocks(rollout_policy)
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        log=log,
        policy=policy,
        rollout_policy=rollout_policy,
        reference=reference_policy(recipe, policy, accelerator, fresh=folder is None),
        teacher=teacher,
        optimizer=optimizer,
        state=state,
        stop=stop,
        writer=make_writer(recipe, accelerator),
        progress=log.view(
            "training",
            recipe.num_steps,
            curve="reward",
            completed=state.step,
            exact=recipe.likelihood.exact_ratios,
        ),
        checkpoint=str(folder or ""),
        history=reward_history(recipe, folder),
    )
    if pool is not None:
        pool.set_up(run)
        run.late = LateRollouts(run, pool)
        run.late.begin(state.step, folder)

    # 6. The first checkpoint. From here on there is a complete step to save, whatever ends the run.
    if not folder:
        check_lock(run)
        save(run)
    protect(run, peers)
    before_first_step(run)
    return run


def restore(
    recipe: Settings, folder: Path, state: TrainingState, policy: Policy, optimizer: torch.optim.Optimizer, log: RunLog
) -> TrainingState:
    """Set policy version, optimizer and log to the checkpoint's; return its state with the recipe of this run."""
    policy.weights_version = state.version
    log.seconds = state.stages
    log.begun -= state.seconds  # as if the run had never paused
    checkpoint.load_optimizer(folder, policy, optimizer)
    changes = changes_since(recipe, state)
    for change in changes:
        log.say(f"{change['field']} changes after step {state.step}: {change['before']} -> {change['after']}")
        log.write_change(change)
    return replace(state, recipe=recipe.settings(), changes=[*(state.changes or []), *changes] or None)


def launch(recipe: Settings) -> tuple[Accelerator, Stop, Peers | None]:
    """Join the processes; return them with the handler of stop signals and the watch over other processes (or None).

    Raises:
        ValueError: The number of processes does not fit the recipe.
    """
    check_trackers(recipe)
    directory = str(Path(recipe.directory) / "tensorboard")
    accelerator = make_accelerator(timeout=recipe.collective_timeout, log_with=recipe.trackers, directory=directory)
    stop = Stop(seconds=recipe.stop_seconds, main=accelerator.is_main_process)
    peers = None
    if recipe.peer_timeout is not None and accelerator.num_processes > 1:
        peers = Peers(accelerator, seconds=recipe.peer_timeout, advice=f"this run ends; {how_to_continue(recipe)}")
        peers.hear = stop.hear_from_another
        with_the_run().enter_context(peers)  # the other processes are told of the end, also on errors
    stop.leave_at_once("stopped before the first step: nothing new was saved; start again with the same command")
    check_processes(recipe, accelerator)
    return accelerator, stop, peers


def open_log(
    recipe: Settings, accelerator: Accelerator, peers: Peers | None, saved: TrainingState | None, notes: Sequence[str]
) -> RunLog:
    """Open the run's files and trackers from the step of `saved` on, connect `peers` to the log, and print `notes`."""
    from_main(partial(clear_folder, recipe), accelerator)
    start = saved.step if saved else 0
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
    if peers is not None:
        peers.follow(log)
    return log


def check_processes(recipe: Settings, accelerator: Accelerator) -> None:
    check_launch_config()
    check_sharding(recipe, accelerator.num_processes)
    check_batches(recipe, accelerator.num_processes)


def rehearsed(recipe: Recipe, accelerator: Accelerator) -> Policy:
    """Return the recipe's model after a rehearsed step, so that a bad setting is refused before any work and before any
    file.
    """
    policy = build_policy(recipe, first_home(recipe, accelerator))
    recipe.likelihood.check(policy)
    wanted_parts(recipe)
    longest = check_prompts(recipe, policy)
    (problem,), _ = choose(recipe, policy, [longest])
    policy = share_out(recipe, policy, accelerator)
    rehearse(recipe, policy, problem, accelerator)
    return policy
