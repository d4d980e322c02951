"""Start a new run, or resume one from a checkpoint."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

import torch
from accelerate import Accelerator

from dllm_rl.algorithms.losses import is_per_token
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.resume import MEMORY_SETTINGS, changes_since, contents_of, default_settings
from dllm_rl.checkpoints.run_folder import clear_folder, open_folder
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.decoding.vocabulary import begin_ids
from dllm_rl.distributed.collectives import check_same, from_main, make_accelerator
from dllm_rl.distributed.peers import Peers
from dllm_rl.distributed.stop import Stop, how_to_continue, run_exit_stack
from dllm_rl.likelihoods.estimators import EXACT
from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.loading import num_parameters
from dllm_rl.models.forward.batch_invariance import prepare_workspace
from dllm_rl.models.forward.blocks import compile_blocks
from dllm_rl.monitoring.json_lines import is_continued
from dllm_rl.monitoring.log import RunLog, check_trackers, start_trackers
from dllm_rl.recipe import Recipe
from dllm_rl.records import describe, describe_json
from dllm_rl.screen import line_of
from dllm_rl.step.collect import component_reward_weights, fitting_indices
from dllm_rl.step.context import StepFeature, gives_token_advantages
from dllm_rl.supervised.examples import check_no_blanks
from dllm_rl.tasks.base import check_not_empty
from dllm_rl.tasks.user_code import AFTER_USER_CODE, process_restored
from dllm_rl.training.any_recipe import AnyRecipe
from dllm_rl.training.cautions import bf16_warnings, cautions, launch_warnings, learning_rate_warnings
from dllm_rl.training.hooks import before_first_step
from dllm_rl.training.hub import check_hub
from dllm_rl.training.late_rollouts.schedule import RAY_WORKERS, AsyncRollouts, WorkerPool
from dllm_rl.training.make_step import make_step, run_features
from dllm_rl.training.policies import (
    RolloutCopy,
    build_policy,
    check_low_bit,
    digest_of_base,
    digest_of_teacher,
    initialize_run,
    make_optimizer,
    reference_policy,
    resumed_policy,
    teacher_policy,
)
from dllm_rl.training.prompts import check_prompts, reward_history
from dllm_rl.training.rehearsal import rehearse
from dllm_rl.training.run import Run
from dllm_rl.training.saving import install_emergency_saves, load_states, make_writer, save
from dllm_rl.training.sharded_learner import (
    check_launch_config,
    check_processes,
    loading_device,
    shard_policy,
)
from dllm_rl.training.validation import check_metric_names, validation_interval

# Settings that may differ between the processes: what the main process alone uses, and what may name the process's own
# device, folder or server. Weights and rows are compared.
OF_A_PROCESS = (
    *("output_dir", "resume_from_checkpoint", "log", "rollout_engine"),
    *("model", "teacher", "task", "validation_task", "eval_task"),
)


def start(recipe: Recipe, pool: WorkerPool | None = None, features: Sequence[StepFeature] = ()) -> Run[Recipe]:
    """Prepare a run up to its first step: check the recipe, load the policies, and restore the state of a resumed run.

    Raises:
        ValueError: The recipe cannot run.
    """
    # 1. Check everything that needs no model, and connect the processes. Until step 6, a stop signal ends the process
    # immediately.
    if recipe.zero_mismatch:
        prepare_workspace()
    check_features(features, recipe)
    check_hub(recipe.saves.push_to_hub)
    for field in ("task", "validation_task", "eval_task"):
        check_not_empty(field, getattr(recipe, field))
    check_metric_names(recipe)
    if recipe.warmup.steps and not recipe.resume_from_checkpoint:
        check_no_blanks([recipe.task[0]])  # the model may be a function that trains for minutes
    validation_interval(recipe)  # raises ValueError if a metric that is needed would never be measured
    if recipe.late is None or os.environ.get("RANK", "0") != "0":
        pool = None  # only the main process talks to the workers
    elif pool is None:
        pool = resolve_name(RAY_WORKERS)(recipe)  # the workers import torch while this process builds the model
    elif not isinstance(pool, WorkerPool):
        methods = "set_up, submit, ready, forget, wait, mend"
        raise ValueError(f"pool={type(pool).__name__} lacks a method of WorkerPool; it needs {methods}")
    accelerator, stop, peers = launch(recipe)
    check_same_recipe(recipe, accelerator)

    # 2. A new run rehearses a step. No file has been overwritten before that, in case the rehearsal refuses the recipe.
    resume_folder, saved_state, notes = from_main(partial(open_folder, recipe), accelerator)
    contents = contents_of(recipe)  # before any of the code runs
    if not resume_folder:
        policy, base = load_and_rehearse(recipe, accelerator, features)
        teacher = teacher_policy(recipe, policy, accelerator)

    # 3. Open the run's files. From now on, the other processes can read which stage this process is in.
    log = open_log(recipe, accelerator, peers, saved_state, notes)
    weights_dtype = recipe.dtype if isinstance(recipe.model, str) else None
    bf16 = bf16_warnings(weights_dtype, recipe.bf16, accelerator.device.type)
    for caution in [*cautions(recipe), *bf16, *launch_warnings(weights_dtype, recipe.bf16)]:
        log.say(f"warning: {caution}")

    # 4. Set up the state before the first step. A resumed run reads all of it from one checkpoint: weights, adapters,
    # optimizer, log and state.
    if resume_folder:
        policy = resumed_policy(recipe, resume_folder, saved_state, accelerator)
        teacher = teacher_policy(recipe, policy, accelerator)
        teacher_digest = digest_of_teacher(recipe, teacher, saved_state, accelerator)
        check_prompts(recipe, policy)
        optimizer = make_optimizer(recipe, policy)
        state = restore(recipe, resume_folder, saved_state, contents, policy, optimizer, log)
    else:
        teacher_digest = digest_of_teacher(recipe, teacher, None, accelerator)
        state = initialize_run(recipe, policy, accelerator, log, base=base, contents=contents)
        optimizer = make_optimizer(recipe, policy)
    state = replace(state, teacher=teacher_digest)

    model_size = num_parameters(recipe.model if isinstance(recipe.model, str) else policy)
    for caution in learning_rate_warnings(recipe.learning_rate, model_size):
        log.say(f"warning: {caution}")

    # 5. Make the other policies. The rollout policy is the learner, or a copy of it; the reference has the weights that
    # RL started from.
    engine = recipe.rollout_engine or RolloutCopy(recipe=recipe)
    rollout_policy = engine.load(policy)
    rollout_policy.weights_version = policy.weights_version
    if recipe.torch_compile:
        compile_blocks(rollout_policy)
    reference = reference_policy(recipe, policy, accelerator, fresh=resume_folder is None)
    teacher = reference if recipe.teacher is not None and recipe.teacher.is_reference else teacher
    step = make_step(
        recipe,
        accelerator=accelerator,
        policy=policy,
        rollout_policy=rollout_policy,
        reference=reference,
        history=reward_history(len(recipe.task), resume_folder if recipe.prompt_source.uses_history else None),
        features=(*run_features(recipe, teacher), *features),
        log=log,
    )
    if resume_folder is not None and (unused := load_states(step, resume_folder)):
        log.say(f"warning: no feature of this run takes the checkpoint's state of {', '.join(unused)}: was it renamed?")
    run = Run(
        recipe=recipe,
        accelerator=accelerator,
        log=log,
        policy=policy,
        rollout_policy=rollout_policy,
        step=step,
        engine=engine,
        optimizer=optimizer,
        state=state,
        stop=stop,
        writer=make_writer(policy, in_thread=recipe.saves.in_background, timeout=recipe.limits.collective_timeout),
        progress=log.view("training", recipe.num_steps, completed=state.logged_steps),
        checkpoint=str(resume_folder or ""),
    )
    if recipe.late is not None:
        run.async_rollouts = AsyncRollouts(recipe, step, pool)
        run.async_rollouts.begin(state.step, resume_folder)

    # 6. Save the first checkpoint. From now on, there is always a complete step to save if the run ends early.
    if not resume_folder:
        save(run)
    install_emergency_saves(run, peers)
    before_first_step(run)
    return run


def check_features(features: Sequence[StepFeature], recipe: Recipe) -> None:
    """Raise ValueError for two features of one name, whose states would be one file, for advantages of tokens under a
    loss of rows, or for rows of earlier steps beside rollout workers.
    """
    names = [type(feature).__name__ for feature in features]
    if doubles := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"features: {min(doubles)} appears twice, and checkpoints name a feature by its class")
    for feature in features:
        name, loss = type(feature).__name__, recipe.resolved_loss
        if gives_token_advantages(feature) and not is_per_token(loss):
            raise ValueError(
                f"features: {name} gives each token its advantage, and loss={describe(loss)} treats a row's tokens "
                "together: use PPOClip, CISPO or Reinforce, or leave it out"
            )
        if (
            gives_token_advantages(feature)
            and recipe.max_staleness
            and not (recipe.likelihood.exact_for_sampler or recipe.trains_all_groups)
        ):
            raise ValueError(
                f"features: {name} gives tokens advantages in every group, and with "
                f"late.max_staleness={recipe.max_staleness} and likelihood={recipe.likelihood.name!r} workers score "
                f"only groups whose rewards differ: use {EXACT}, or late.max_staleness=0"
            )
        if recipe.late is not None and feature.max_staleness:
            raise ValueError(
                f"features: {name} adds rows of earlier steps (max_staleness={feature.max_staleness}), and those of "
                f"workers (late.workers={recipe.late.workers}) are late too: use late=None, or leave it out"
            )


def restore(
    recipe: AnyRecipe,
    folder: Path,
    state: TrainingState,
    contents: dict[str, str],
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    log: RunLog,
) -> TrainingState:
    """Restore the policy's version, the optimizer and the log from a checkpoint; return the checkpoint's state with the
    recipe of this run.
    """
    policy.weights_version = state.version
    log.seconds, log.step_seconds = state.stages, dict(state.unlogged_seconds)
    log.begun -= state.seconds  # as if the run had never paused
    settings, stored = recipe.settings(), default_settings(type(recipe)) | state.recipe
    checkpoint.load_optimizer(folder, policy, optimizer, may_be_empty=stored.get("num_iterations") == 0)
    changes = changes_since(stored, settings, state.step)
    for change in changes:
        before, after = describe_json(change["before"]), describe_json(change["after"])
        rounds = "; from here on the run's numbers round otherwise" if change["field"] in MEMORY_SETTINGS else ""
        log.say(f"{change['field']} changes after step {state.step}: {before} -> {after}{rounds}")
        log.write_change(change)
    begin = begin_ids(policy)
    if begin != (state.begin_ids or []):  # another tokenizer, or a run that began when prompts had no such ids
        before, after = (policy.tokenizer.decode(ids) or "nothing" for ids in (state.begin_ids or [], begin))
        log.say(f"note: prompts of plain text began with {before} up to step {state.step}; they begin with {after} now")
    for name in sorted(contents.keys() & state.contents.keys()):
        if contents[name] != state.contents[name]:
            log.say(f"{name} changes after step {state.step}: {state.contents[name]} -> {contents[name]}")
    all_changes = [*(state.changes or []), *changes] or None
    return replace(state, recipe=settings, contents=contents, begin_ids=begin, changes=all_changes)


def launch(recipe: AnyRecipe) -> tuple[Accelerator, Stop, Peers | None]:
    """Connect the processes; return the accelerator, the handler of stop signals, and the watchdog over the other
    processes. The watchdog is None for a single process, or if `peer_timeout` is None.

    Raises:
        ValueError: The launch or its number of processes does not fit the recipe.
    """
    check_trackers(recipe.log.trackers)
    directory = str(Path(recipe.directory) / "tensorboard")
    with launch_errors_in_one_line():
        check_launch_config()  # first, since Accelerate raises ImportError if DeepSpeed is requested but not installed
        accelerator = make_accelerator(
            timeout=recipe.limits.collective_timeout, log_with=recipe.log.trackers, directory=directory
        )
    stop = Stop(seconds=recipe.limits.stop_seconds, main=accelerator.is_main_process)
    AFTER_USER_CODE.append(stop.arm)
    run_exit_stack().callback(AFTER_USER_CODE.remove, stop.arm)
    peers = None
    if recipe.limits.peer_timeout is not None and accelerator.num_processes > 1:
        peers = Peers(
            accelerator,
            seconds=recipe.limits.peer_timeout,
            advice=f"this run ends; {how_to_continue(recipe.directory)}",
        )
        peers.hear = stop.hear_from_another
        run_exit_stack().enter_context(peers)  # on exit, also by an error, tells the other processes that this one ends
    stop.leave_at_once("stopped before the first step: nothing new was saved; start again with the same command")
    check_processes(recipe, accelerator.num_processes)
    return accelerator, stop, peers


@contextmanager
def launch_errors_in_one_line() -> Iterator[None]:
    """In the block, end a process that a launcher started with status 2, and print a ValueError in one line of one
    process: the launcher prints a traceback of its own, and those of all processes would bury the message.
    """
    try:
        yield
    except ValueError as error:
        is_launched = any(name in os.environ for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"))
        if not is_launched or os.environ.get("DLLM_RL_TRACEBACK") == "1":
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {line_of(error)}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def check_same_recipe(recipe: AnyRecipe, accelerator: Accelerator) -> None:
    """Raise ValueError if the settings or rows differ between the processes, as after a shuffle without a seed: each
    would train a model of its own. User code may differ, such as a reward model on the process's device.
    """
    if accelerator.num_processes == 1:
        return
    values = {name: describe_json(value) for name, value in recipe.settings().items() if name not in OF_A_PROCESS}
    if isinstance(recipe, Recipe):
        values["log.completions_steps"] = str(recipe.log.completions_steps)  # all processes gather the table
        for name in ("substeps", "coeff"):
            values[f"teacher.{name}"] = str(getattr(recipe.teacher, name, None))
    values["callbacks"] = ", ".join(type(callback).__name__ for callback in recipe.callbacks)
    for name in ("task", "validation_task", "eval_task"):
        if (task := getattr(recipe, name, None)) is not None:
            values[name] = f"{len(task)} problems of {task.name}, {task.version}, {getattr(task, 'rows', None)}"
    check_same(values, accelerator)


def open_log(
    recipe: AnyRecipe,
    accelerator: Accelerator,
    peers: Peers | None,
    saved_state: TrainingState | None,
    notes: Sequence[str],
) -> RunLog:
    """Open the run's files and trackers, connect `peers` to the log, and print `notes`. The log of a resumed run
    continues at the step of `saved_state`.
    """
    directory = Path(recipe.directory)
    if recipe.overwrite_output_dir and not recipe.resume_from_checkpoint:
        from_main(partial(clear_folder, directory), accelerator)
    first_step = saved_state.logged_steps if saved_state else 0
    changed = from_main(partial(changed_logs, directory, saved_state), accelerator)
    log = RunLog(
        directory,
        start=first_step,
        main=accelerator.is_main_process,
        sampled=saved_state.step if saved_state else 0,
        completions=isinstance(recipe, Recipe) and recipe.log.completions_steps > 0,
        held_out=isinstance(recipe, Recipe),
        trackers=start_trackers(recipe, accelerator, start=first_step),
    )
    log.record.exact = not isinstance(recipe, Recipe) or recipe.likelihood.exact_ratios
    run_exit_stack().callback(log.close)  # also after an error or a stop
    for note in [*notes, *changed]:
        log.say(note)
    if peers is not None:
        peers.stage, log.entering = lambda: log.place, peers.tell_stage
    return log


def changed_logs(directory: Path, state: TrainingState | None) -> list[str]:
    """Return a warning for each log of the run in `directory` that no longer has the rows of its checkpoint `state`."""
    if state is None or not checkpoint.folder_of(directory / "checkpoints", state.step).exists():
        return []  # a new run, or one that continues another folder's
    return [
        f"warning: {directory / name}.jsonl was cut or changed after the checkpoint of step {state.step}, from which "
        "the run goes on: rows of earlier steps may be missing there, and in pictures and tables of them"
        for name, (size, digest) in state.logs.items()
        if not is_continued(directory / f"{name}.jsonl", size, digest)
    ]


def load_and_rehearse(
    recipe: Recipe, accelerator: Accelerator, features: Sequence[StepFeature] = ()
) -> tuple[Policy, str | None]:
    """Load the recipe's model and rehearse a step, so that a wrong setting is refused before the run trains or writes a
    file. Return the policy, and the digest of its weights if they get adapters.
    """
    policy = build_policy(recipe, loading_device(recipe.shard_size, accelerator))
    base = digest_of_base(recipe, policy, accelerator)
    check_low_bit(recipe, policy)
    recipe.likelihood.check_policy(policy)
    component_reward_weights(recipe)  # raises ValueError if the advantages take them and there are none
    longest_index = check_prompts(recipe, policy)
    problem = recipe.task[int(fitting_indices(recipe, policy, torch.tensor([longest_index])))]
    policy = shard_policy(
        policy, accelerator, shard_size=recipe.shard_size, lora=recipe.lora, timeout=recipe.limits.collective_timeout
    )
    with process_restored():
        rehearse(recipe, policy, problem, accelerator, features)
    return policy, base
