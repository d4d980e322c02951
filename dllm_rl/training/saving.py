"""Save a run: what a checkpoint contains, which processes write it, and when."""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.optimizer_shards import AllGather, part_of, run_in_lockstep
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.collectives import collective, from_main
from dllm_rl.distributed.peers import Peers, is_collective_error
from dllm_rl.distributed.sharding import sharding_of
from dllm_rl.distributed.stop import Stopped, how_to_continue, run_exit_stack
from dllm_rl.models.base import Policy
from dllm_rl.models.merge import host_copy
from dllm_rl.step.context import StepContext, StepFeature
from dllm_rl.tasks.user_code import process_restored
from dllm_rl.training.any_recipe import AnyRecipe
from dllm_rl.training.prompts import history_files
from dllm_rl.training.results import summarize_stop
from dllm_rl.training.run import CheckpointWriter, Run
from dllm_rl.training.sharded_learner import gather_on_main

Write = Callable[..., Path]


@collective
def make_writer(policy: Policy, *, in_thread: bool = False, timeout: float = 0.0) -> CheckpointWriter:
    """Make the writer of a learner's checkpoints. The run does not end before the writer's last write is complete.

    `timeout`: seconds of a collective of a sharded learner's writer.
    """
    group = None
    if sharding_of(policy.module) is not None:
        # A separate process group: the collectives of the writer thread must not mix with those of a training step.
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    writer = CheckpointWriter(in_thread=in_thread, group=group)
    run_exit_stack().callback(writer.close)
    return writer


def save(run: Run[AnyRecipe]) -> None:
    """Write a checkpoint of the run's state, after waiting for the previous write.

    Raises:
        OSError: The write failed.
    """
    wait_for_checkpoint(run)
    merged = is_merged(run, run.state)
    if sharding_of(run.policy.module) is not None:
        run.writer.run(_sharded_write(run))
    else:
        from_main(
            lambda: run.writer.run(_main_process_write(run, copies=run.recipe.saves.in_background)), run.accelerator
        )
    if not run.recipe.saves.in_background:  # in the background, an error of the write is raised in a later step
        wait_for_checkpoint(run)
        if is_merged(run, run.state) != merged:  # an `on_save` stopped the run: this checkpoint is the last one
            save(run)


@collective
def wait_for_checkpoint(run: Run[AnyRecipe]) -> None:
    """Wait until the checkpoint in progress is written, and call the callbacks' `on_save`."""
    is_sharded = sharding_of(run.policy.module) is not None
    folder = run.writer.wait() if is_sharded else from_main(run.writer.wait, run.accelerator)
    if folder:
        run.checkpoint = str(folder)

        def call_callbacks() -> str | None:
            for callback in run.recipe.callbacks:
                with process_restored():
                    callback.on_save(run.control, folder)
            return run.control.stop_reason

        if run.recipe.callbacks:
            run.control.stop_reason = from_main(call_callbacks, run.accelerator)


def write_checkpoint(run: Run[AnyRecipe]) -> None:
    """Write a checkpoint of an unsharded learner now; call it only in the main process."""
    with run.writer.main_only:
        run.writer.wait()
        _main_process_write(run)()


def can_save_without_peers(run: Run[AnyRecipe]) -> bool:
    """Return whether this process can save the last complete step without the others: no update has changed the weights
    since, no aligned forward is active, and the learner is not sharded.
    """
    # An update increments the policy's version before it changes a weight; `run.state` gets the new version when the
    # update is complete.
    is_unchanged = run.policy.weights_version == run.state.version
    # During an aligned forward the layers hold the rollout's weights, which a copy of the module would then contain.
    is_aligned = getattr(run.policy.module, "is_aligned", False)
    return is_unchanged and not is_aligned and sharding_of(run.policy.module) is None


def save_on_overdue_stop(run: Run[AnyRecipe]) -> None:
    """Save the last complete step and end the process. Called if a step does not end in time after a stop signal, and
    on a second Ctrl-C; another one during the save ends the process at once.
    """
    if not can_save_without_peers(run):
        return
    run.stop.disarm()
    run.stop.is_leaving = True
    steps_done = run.state.step
    if run.accelerator.is_main_process:
        run.writer.wait()
        if steps_done != run.saved:
            write_checkpoint(run)
    place = "in the step after" if run.state.unlogged is None else "after the update of"
    run.stop.leave(f"stopped {place} step {steps_done}, which is saved; {how_to_continue(run.recipe.directory)}")


def save_on_peer_loss(run: Run[AnyRecipe]) -> None:
    """Save a copy of the last complete step. Called in another thread of the main process if a process died."""
    if not can_save_without_peers(run):
        return
    with run.writer.main_only, torch.no_grad():
        state = run.state
        if state.step == run.saved:
            return
        copies = copy_to_host(run.policy, run.optimizer)
        # If this is False, training continued during the copy, and the copy may mix two steps.
        if run.state is state and can_save_without_peers(run):
            try:
                run.writer.wait()
                _write(run, state.step, _bind_save(run, state, *copies))
            except (OSError, ValueError, RuntimeError, ArithmeticError) as error:
                print(f"error: step {state.step} was not saved: {error}", file=sys.stderr, flush=True)


def save_on_error(run: Run[AnyRecipe], kind: object, error: BaseException | None, traceback: object) -> None:
    """Save the last complete step, from which a resume continues, and add a note to the error. Called when the run
    ends; does nothing if it ends without an error. A run that a signal has stopped gets its summary and its plot.
    """
    if error is None:
        return
    if isinstance(error, Stopped):
        summarize_stop(run, error)
        return
    recipe = run.recipe
    steps_done = run.state.step
    done = "was complete" if run.state.unlogged is None else "was updated"
    stage = f", whose last stage was {run.log.entered}" if run.log.entered else ""
    note = f"process {run.accelerator.process_index}{stage}: failed after step {steps_done} {done}"
    if run.accelerator.num_processes > 1 and is_collective_error(error):
        note += (
            ": another process ended (its message says why), or kept this one waiting for "
            f"collective_timeout={recipe.limits.collective_timeout:g} s"
        )
    directory = Path(recipe.directory) / "checkpoints"
    try:
        # The step may be saved already.
        is_saved = checkpoint.folder_of(directory, steps_done).exists()
        if run.accelerator.is_main_process and can_save_without_peers(run) and not is_saved:
            write_checkpoint(run)
    except (OSError, ValueError, RuntimeError, ArithmeticError) as save_error:
        note += f", and saving it failed too: {save_error}"
    if run.accelerator.is_main_process:
        saved = dict(checkpoint.list_checkpoints(directory))
        if steps_done not in saved:
            note += f" and is not saved; the newest checkpoint is {saved[max(saved)].name if saved else 'missing'}"
    if run.without_state:
        note += f"; the checkpoint has no state of {', '.join(type(feature).__name__ for feature in run.without_state)}"
    error.add_note(f"{note}; fix the cause and {how_to_continue(recipe.directory)}")


def _main_process_write(run: Run[AnyRecipe], *, copies: bool = False) -> Callable[[], Path]:
    """Return a function that writes the checkpoint; call it in the main process. With `copies`, copy weights and
    optimizer state to the host now, so that training can continue during the write.
    """
    policy, optimizer = copy_to_host(run.policy, run.optimizer) if copies else (run.policy, run.optimizer)
    return partial(_write, run, run.state.step, _bind_save(run, run.state, policy, optimizer))


@collective
def _sharded_write(run: Run[AnyRecipe]) -> Callable[[], Path]:
    """Return a function that writes this process's part of a sharded learner's checkpoint. Every process
    must call the returned function, too.
    """
    full_policy = gather_on_main(run.policy, run.accelerator)
    shard = part_of(run.policy, run.optimizer, copy=run.recipe.saves.in_background)
    is_main = run.accelerator.is_main_process
    step = run.state.step
    assert shard is not None or not is_main, "the main process belongs to the first replica"
    write = _bind_save(run, run.state, full_policy, shard) if is_main and shard is not None else None

    def write_shard(all_gather: AllGather) -> Path:
        if write is None:
            checkpoint.save_part(step, shard, all_gather)
        return all_gather(None if write is None else write(swap=all_gather))[0]

    return partial(_write, run, step, partial(run_in_lockstep, write_shard, run.writer.gather))


@torch.no_grad()
def copy_to_host(policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[Policy, torch.optim.Optimizer]:
    """Copy to the host everything that a checkpoint saves."""
    host_policy = host_copy(policy)
    parameters = zip(policy.module.parameters(), host_policy.module.parameters(), strict=True)
    copies: dict[int, Any] = {id(parameter): host_parameter for parameter, host_parameter in parameters}
    for value in tree_leaves([*optimizer.state.values()]):
        if isinstance(value, Tensor):
            copies[id(value)] = value.detach().to("cpu", copy=True)
    copied = copy.deepcopy({"state": optimizer.state, "param_groups": optimizer.param_groups}, copies)
    host_optimizer = type(optimizer).__new__(type(optimizer))
    host_optimizer.__dict__ |= optimizer.__dict__ | copied
    return host_policy, host_optimizer


def _bind_save(
    run: Run[AnyRecipe], state: TrainingState, policy: Policy, optimizer: checkpoint.SavedOptimizer
) -> Write:
    """Return `checkpoint.save` with its arguments bound to a state of the run. Call it now or in the writer thread."""
    recipe = run.recipe
    logs = run.log.flush()  # its rows must be on disk before the checkpoint
    state = replace(state, seconds=time.perf_counter() - run.log.begun, stages=dict(run.log.seconds), logs=logs)
    files = {} if run.step is None else history_files(run.step.history, state.step)
    files |= feature_states(run)
    if run.async_rollouts is not None:
        files |= run.async_rollouts.files(state.step)
    content = checkpoint.Checkpoint(
        policy=policy,
        optimizer=optimizer,
        state=state,
        base=base_of_adapters(recipe.model, state.warmup_steps),
        base_digest=state.base if isinstance(recipe.model, str) and not state.warmup_steps else None,
        merged=is_merged(run, state),
        processes=run.accelerator.num_processes,
        files=files,
    )
    folder = Path(recipe.directory) / "checkpoints"
    return partial(checkpoint.save, folder, content, keep_last=recipe.saves.total_limit)


def feature_states(run: Run[AnyRecipe]) -> dict[str, bytes]:
    """Return the files of the features' states. A feature whose `state` raises ends the run; the checkpoint that is
    written then has all else.
    """
    states: dict[str, bytes] = {}
    if run.step is None:
        return states
    for feature in run.step.features:
        if feature in run.without_state:
            continue
        run.without_state.append(feature)
        data = feature.state(run.step)
        run.without_state.remove(feature)
        if data is not None:
            states[state_file(feature)] = data
    return states


def state_file(feature: StepFeature) -> str:
    """Return the name of a feature's file in a checkpoint."""
    return f"{type(feature).__name__}.state"


def load_states(context: StepContext, folder: Path) -> list[str]:
    """Load the states of the features that a checkpoint has. A feature without a state starts over.

    Returns:
        The classes whose states the checkpoint has and that are not among the features.

    Raises:
        ValueError: A file is damaged, or its feature has other settings.
    """
    for feature in context.features:
        path = folder / state_file(feature)
        if path.exists():
            try:
                feature.load_state(context, path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{path} cannot be loaded: {error}; or take an earlier checkpoint") from None
    return sorted({path.stem for path in folder.glob("*.state")} - {type(each).__name__ for each in context.features})


def base_of_adapters(model: object, warmup_steps: int) -> str | None:
    """Return the location of the base of a recipe's adapters: a hub id or a path; None if a function or a policy is the
    base. After a warm-up it is the run's reference folder, relative to the adapters' folder.
    """
    if warmup_steps:
        return "../../../reference"
    if not isinstance(model, str):
        return None
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def is_merged(run: Run[AnyRecipe], state: TrainingState) -> bool:
    """Return whether the checkpoint of a state contains full weights (with adapters merged).

    Every checkpoint does, unless the recipe `saves_only_adapters`; then only the last checkpoint does, and the best one
    if the run ends with it.
    """
    recipe = run.recipe
    if not recipe.saves_only_adapters:
        return True
    is_last = state.step >= recipe.num_steps or run.control.stop_reason is not None
    return is_last or (recipe.loads_best and state.best_step == state.step)


def _write(run: Run[AnyRecipe], step: int, write: Write) -> Path:
    """Write and return the checkpoint of a step."""
    folder = write()
    run.saved = step
    return folder


def install_emergency_saves(run: Run[AnyRecipe], peers: Peers | None) -> None:
    """From now on, save the last complete step if a step does not end in time after a stop signal, if another process
    dies, or if the run raises an error.
    """
    run.stop.last_words = None  # from now on a signal waits for the end of the step
    run.stop.overdue = partial(save_on_overdue_stop, run)
    run.log.entered = ""
    if peers is not None and run.accelerator.is_main_process:
        peers.save = partial(save_on_peer_loss, run)
    run_exit_stack().push(partial(save_on_error, run))


def check_folder(run: Run[AnyRecipe]) -> None:
    """Raise OSError if the run's folder was removed or renamed: the log would be written outside of output_dir."""
    directory = Path(run.recipe.directory)
    if run.accelerator.is_main_process and not (directory / "metrics.jsonl").exists():
        raise OSError(
            f"output_dir={str(directory)!r} was removed or renamed during the run; step "
            f"{run.state.step} is saved there again. Put the folder back, or {how_to_continue(run.recipe.directory)}"
        )


def checkpoint_if_due(run: Run[AnyRecipe], metrics: dict[str, float]) -> None:
    """Save a checkpoint after a step, whose metrics are given, if one is due: every saves.steps, after the last step or
    a new best step, at a callback's request, and on a stop signal. After a stop signal, end the process with the
    signal's exit status.
    """
    recipe = run.recipe
    steps_done = run.state.step
    signum = run.stop.agreed(run.accelerator)
    is_due = (
        steps_done % recipe.saves.steps == 0 or steps_done == recipe.num_steps or run.control.stop_reason is not None
    )
    is_due |= run.control.save_requested
    run.control.save_requested = False
    value = metrics.get(f"eval/{recipe.best_metric}")
    is_best = value is not None and recipe.is_better(value, run.state.best_value)
    if is_best:
        run.state = replace(run.state, best_step=steps_done, best_value=value)
        is_due = True
    run.writer.check()  # raises an error of the writer thread
    check_folder(run)
    if signum or is_due:
        save(run)
    if signum:
        wait_for_checkpoint(run)
        run.stop.leave(f"interrupted after step {steps_done}; {how_to_continue(recipe.directory)}")
    run.log.entered = ""
