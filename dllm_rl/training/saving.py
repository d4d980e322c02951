"""Saving a run: the content of a checkpoint, the processes that write it, and when."""

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
from accelerate import Accelerator
from torch import Tensor
from torch.utils._pytree import tree_map_only

from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.optimizer_shards import Swap, in_step, part_of
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.collectives import from_main
from dllm_rl.distributed.peers import Peers, of_an_exchange
from dllm_rl.distributed.sharding import sharding_of
from dllm_rl.distributed.stop import LOCK, how_to_continue, with_the_run
from dllm_rl.files import keep_lock
from dllm_rl.manifest import CARD
from dllm_rl.models.base import Policy
from dllm_rl.models.merge import host_copy
from dllm_rl.recipe import Recipe, Settings
from dllm_rl.training.model_card import card
from dllm_rl.training.prompts import history_files
from dllm_rl.training.run import Run, Writer
from dllm_rl.training.sharded_learner import group_size, on_main

Write = Callable[..., Path]


def make_writer(recipe: Settings, accelerator: Accelerator) -> Writer:
    """Return the run's writer; the end of the run waits for it. Collective: every process must call it."""
    shared = group_size(recipe, accelerator.num_processes) > 1
    # A separate group: the collectives of the writing thread must not mix with the step's collectives.
    patience = timedelta(seconds=recipe.collective_timeout)
    writer = Writer(later=recipe.async_save, group=dist.new_group(backend="gloo", timeout=patience) if shared else None)
    with_the_run().callback(writer.close)
    return writer


def save(run: Run[Settings]) -> None:
    """Checkpoint the run's state after the previous write.

    Raises:
        OSError: The write failed, unless on_save_error is 'continue'.
    """
    settle(run)
    if sharding_of(run.policy.module) is not None:
        run.writer.run(_by_all(run))
    else:
        from_main(lambda: run.writer.run(_by_main(run, copied=run.recipe.async_save)), run.accelerator)
    if not run.recipe.async_save:  # with async_save a later step raises an error of the write
        settle(run)


def settle(run: Run[Settings]) -> None:
    """Wait for the checkpoint that is being written. Collective: every process must call it."""
    shared = sharding_of(run.policy.module) is not None
    folder = run.writer.wait() if shared else from_main(run.writer.wait, run.accelerator)
    if folder and str(folder) != run.checkpoint:
        run.checkpoint = str(folder)
        for callback in run.recipe.callbacks if run.accelerator.is_main_process else ():
            callback.on_save(run.control, folder)


def write_checkpoint(run: Run[Settings]) -> Path | None:
    """Write an unsharded learner in the main process; return None if the write failed and the run continues."""
    with run.writer.alone:
        run.writer.wait()
        return _by_main(run)()


def can_be_saved(run: Run[Settings]) -> bool:
    """Return whether this process can save the last complete step without the others: no update has changed the weights
    since, no aligned forward is active, the learner is not sharded, and the run still owns its folder.
    """
    # An update raises the version before it changes the first weight; the run's state follows at the step's end.
    unchanged = run.policy.weights_version == run.state.version
    # In an aligned forward the layers run the rollout's weights, and a copy of the module would contain these weights.
    aligned = any("forward" in vars(layer) for layer in run.policy.module.modules())
    return run.owns_folder and unchanged and not aligned and sharding_of(run.policy.module) is None


def save_at_once(run: Run[Settings]) -> None:
    """On an overdue stop, save the last complete step and end the process."""
    if not can_be_saved(run):
        return
    run.stop.disarm()
    done = run.state.step
    if run.accelerator.is_main_process:
        run.writer.wait()
        if done != run.saved:
            write_checkpoint(run)
    run.stop.leave(f"stopped in the step after step {done}, which is saved; {how_to_continue(run.recipe)}")


def save_alone(run: Run[Settings]) -> None:
    """If another process died, save a copy of the last complete step from another thread of the main process."""
    if not can_be_saved(run):
        return
    with run.writer.alone, torch.no_grad():
        state = run.state
        if state.step == run.saved:
            return
        copies = on_host(run.policy, run.optimizer)
        # If this fails, training continued during the copy, and the copy may mix two steps.
        if run.state is state and can_be_saved(run):
            try:
                run.writer.wait()
                _attempt(run, state.step, _prepared(run, state, *copies))
            except (OSError, ValueError, RuntimeError, ArithmeticError) as error:
                print(f"error: step {state.step} was not saved: {error}", file=sys.stderr, flush=True)


def save_on_error(run: Run[Settings], kind: object, error: BaseException | None, traceback: object) -> None:
    """On an error during or after a step, save the last complete step and add a note to the error. A resume continues
    from that step.
    """
    recipe = run.recipe
    done = run.state.step
    if not isinstance(error, Exception) or done == recipe.num_steps:  # after the last step there is no step to repeat
        return
    note = f"process {run.accelerator.process_index}: failed after step {done} was complete"
    if run.accelerator.num_processes > 1 and of_an_exchange(error):
        note += (
            ": another process ended, and its own message says why, or kept this one waiting for "
            f"collective_timeout={recipe.collective_timeout:g} s"
        )
    try:
        folder = checkpoint.folder_of(Path(recipe.directory) / "checkpoints", done)
        # The step may be saved already.
        if run.accelerator.is_main_process and can_be_saved(run) and not folder.exists():
            write_checkpoint(run)
    except (OSError, ValueError, RuntimeError, ArithmeticError) as other:
        note += f", and saving it failed too: {other}"
    error.add_note(f"{note}; fix the cause and {how_to_continue(recipe)}")


def _by_main(run: Run[Settings], *, copied: bool = False) -> Callable[[], Path | None]:
    """Return the main process's write. With `copied`, copy weights and optimizer state to the host now, so that
    training can continue during the write.
    """
    policy, optimizer = on_host(run.policy, run.optimizer) if copied else (run.policy, run.optimizer)
    return partial(_attempt, run, run.state.step, _prepared(run, run.state, policy, optimizer))


def _by_all(run: Run[Settings]) -> Callable[[], Path | None]:
    """Return this process's write of a sharded learner. Collective: every process must call it, and the write that it
    returns.
    """
    whole = on_main(run.policy, run.accelerator)
    part = part_of(run.policy, run.optimizer, copy=run.recipe.async_save)
    main = run.accelerator.is_main_process
    step = run.state.step
    assert part is not None or not main, "the main process is of the first replica"
    write = _prepared(run, run.state, whole, part) if main and part is not None else None

    def work(swap: Swap) -> Path:
        if write is None:
            checkpoint.save_part(step, part, swap)
        return swap(None if write is None else write(swap=swap))[0]

    return partial(_attempt, run, step, partial(in_step, work, run.writer.gather))


@torch.no_grad()
def on_host(policy: Policy, optimizer: torch.optim.Optimizer) -> tuple[Policy, checkpoint.OptimizerCopy]:
    """Copy to the host everything that a checkpoint saves."""
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to("cpu", copy=True)
        return copies[id(tensor)]

    twin: Any = type(policy).__new__(type(policy))
    twin.__dict__ |= policy.__dict__ | {"module": host_copy(policy.module)}
    fields = tree_map_only(Tensor, copied, optimizer.state_dict())
    places = dict(zip(policy.module.parameters(), twin.module.parameters(), strict=True))
    state = {places[p]: tree_map_only(Tensor, copied, held) for p, held in optimizer.state.items()}
    return twin, checkpoint.OptimizerCopy(state, fields)


def _prepared(run: Run[Settings], state: TrainingState, policy: Policy, optimizer: checkpoint.SavedOptimizer) -> Write:
    """Bind `checkpoint.save` to a state of the run, to be called now or in the writer thread."""
    recipe = run.recipe
    state = replace(state, seconds=time.perf_counter() - run.log.begun, stages=dict(run.log.seconds))
    run.log.flush()  # its rows must be on disk before the checkpoint
    files = history_files(run.history, state.step) | (run.late.files(state.step) if run.late is not None else {})
    if isinstance(recipe, Recipe):
        evaluations = {"before RL": state.eval_before}
        files[CARD] = card(recipe, step=state.step, evaluations=evaluations, metrics=run.log.last).encode()
    content = checkpoint.Checkpoint(
        policy=policy,
        optimizer=optimizer,
        state=state,
        base=base_of_adapters(recipe, state.warmup_steps),
        merged=is_merged(run, state),
        processes=run.accelerator.num_processes,
        files=files,
    )
    folder = Path(recipe.directory) / "checkpoints"
    return partial(checkpoint.save, folder, content, keep_last=recipe.save_total_limit)


def base_of_adapters(recipe: Settings, warmup_steps: int) -> str | None:
    """Return the path of the adapters' base, relative to their folder; None for a function's or a policy's base."""
    if warmup_steps:
        return "../../../reference"
    if not isinstance(recipe.model, str):
        return None
    return str(Path(recipe.model).resolve()) if Path(recipe.model).is_dir() else recipe.model


def adapters_alone(recipe: Settings) -> bool:
    """Return whether checkpoints before the last contain only adapters: their base is in a folder or on the hub."""
    return recipe.lora is not None and isinstance(recipe.model, str) and not recipe.save_merged


def is_merged(run: Run[Settings], state: TrainingState) -> bool:
    """Return whether a checkpoint contains full weights.

    Every checkpoint does if the run has no adapters or if their base is in no folder. Otherwise only checkpoints that
    the run may end with do.
    """
    recipe = run.recipe
    if not adapters_alone(recipe):
        return True
    last = state.step >= recipe.num_steps or run.control.stop_reason is not None
    return last or (recipe.load_best_model_at_end and state.best_step == state.step)


def _attempt(run: Run[Settings], step: int, write: Write) -> Path | None:
    """Write and return the checkpoint, or None if the write failed and the run continues."""
    try:
        folder = write()
    except OSError as error:
        if run.recipe.on_save_error == "stop":
            raise
        run.log.say(f"warning: {error.strerror}")
        return None
    run.saved = step
    return folder


def protect(run: Run[Settings], peers: Peers | None) -> None:
    """From here on, save the last complete step if a signal is overdue, a process dies, or a step fails."""
    run.stop.last_words = None  # a signal no longer ends the process immediately
    run.stop.overdue = partial(save_at_once, run)
    run.log.entered = ""
    if peers is not None and run.accelerator.is_main_process:
        peers.save = partial(save_alone, run)
    with_the_run().push(partial(save_on_error, run))


def check_folder(run: Run[Settings]) -> None:
    """Raise OSError if the run's folder was removed or renamed: its open files would continue to grow elsewhere."""
    directory = Path(run.recipe.directory)
    if run.accelerator.is_main_process and not (directory / "metrics.jsonl").exists():
        raise OSError(
            f"output_dir={str(directory)!r} was removed or renamed during the run; step "
            f"{run.state.step} is saved there anew. Put the folder back, or {how_to_continue(run.recipe)}"
        )


def check_lock(run: Run[Settings]) -> None:
    """Lock the run's folder again if the lock's file was removed.

    Raises:
        OSError: Another run has locked the folder meanwhile. The two runs would overwrite each other's checkpoints.
    """
    directory = Path(run.recipe.directory)
    try:
        if run.accelerator.is_main_process:
            keep_lock(directory / LOCK)
    except BlockingIOError as error:
        run.owns_folder = False
        raise OSError(
            f"output_dir={str(directory)!r}: {LOCK} was removed during the run, and another run now writes the "
            f"folder, {error.strerror}; this run saves nothing more. Give each its own output_dir"
        ) from None


def checkpoint_if_due(run: Run[Settings], step: int, metrics: dict[str, float]) -> None:
    """Save every save_steps, after the last step, after the best step, on a callback's request, and on a signal, which
    ends the process with the signal's status.
    """
    recipe = run.recipe
    done = step + 1
    signum = run.stop.agreed(run.accelerator)
    due = done % recipe.save_steps == 0 or done == recipe.num_steps or run.control.stop_reason is not None
    due |= run.control.save_requested
    run.control.save_requested = False
    run.state = replace(run.state, step=done, version=run.policy.weights_version)
    value = metrics.get(f"eval/{recipe.best_metric}")
    if value is not None and recipe.is_better(value, run.state.best_value):
        run.state = replace(run.state, best_step=done, best_value=value)
        due = True
    run.writer.check()  # an error of the writing thread ends the run here
    check_folder(run)
    check_lock(run)
    if signum or due:
        save(run)
    if signum:
        settle(run)
        run.stop.leave(f"interrupted after step {done}; {how_to_continue(recipe)}")
    run.log.entered = ""
