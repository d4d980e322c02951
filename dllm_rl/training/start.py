"""Starting and resuming a run."""

import inspect
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dllm_rl import manifest
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.run_folder import clear_folder, open_folder
from dllm_rl.diagnostics.batch_invariance import prepare_workspace
from dllm_rl.distributed.collectives import from_main, make_accelerator, versions
from dllm_rl.distributed.peers import Peers
from dllm_rl.distributed.sharding import sharding_of
from dllm_rl.distributed.stop import Stop, ended_by_launcher, how_to_continue, with_the_run
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import replacing
from dllm_rl.likelihoods.replay import check_replay
from dllm_rl.models.adapters.linear import add_lora
from dllm_rl.models.base import Policy, copied
from dllm_rl.models.checkpoint.adapters import load_adapter
from dllm_rl.models.forward.compiled import compile_blocks
from dllm_rl.models.forward.recompute import blocks_of
from dllm_rl.models.policy import load_policy, load_weights
from dllm_rl.monitoring.log import RunLog
from dllm_rl.monitoring.trackers import check_trackers, start_trackers
from dllm_rl.recipe import Recipe, Settings
from dllm_rl.tasks.base import Task
from dllm_rl.training.card import check_hub
from dllm_rl.training.cautions import cautions
from dllm_rl.training.prompts import check_prompts, choose
from dllm_rl.training.rehearsal import rehearse
from dllm_rl.training.rollouts import check_compiled, rollout_copy, wanted_parts
from dllm_rl.training.run import Run
from dllm_rl.training.saving import make_writer, protect, save
from dllm_rl.training.sharding import check_engine, check_sharding, first_home, on_main, share_out
from dllm_rl.training.warmup import warm_up


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
    log = open_log(recipe, accelerator, state["step"], [*notes, *told_of(recipe, folder)])
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
    """Give policy, optimiser and log what the checkpoint holds of them; returns what it holds of the history."""
    state = checkpoint.read_state(folder)
    policy.version = state["version"]
    log.seconds = state["stages"]
    checkpoint.load_optimizer(folder, policy, optimizer)
    kept = {key: state[key] for key in ("seconds", "eval_before", "warmup_steps")}
    return kept | {"checkpoint": str(folder)}


def launch(recipe: Settings) -> tuple[Accelerator, Stop, Peers | None]:
    """The launch's processes, what ends the run on a signal, and the watch over other processes (None: one process, or
    no watch). Raises ValueError where the processes cannot run the recipe."""
    ended_by_launcher()
    check_trackers(recipe)
    accelerator = make_accelerator(
        timeout=recipe.collective_timeout,
        log_with=recipe.trackers,
        directory=str(Path(recipe.directory) / "tensorboard"),
    )
    stop = Stop(seconds=recipe.stop_seconds, main=accelerator.is_main_process)
    peers = None
    if recipe.peer_timeout is not None and accelerator.num_processes > 1:
        peers = Peers(accelerator, seconds=recipe.peer_timeout, advice=f"this run ends; {how_to_continue(recipe)}")
        peers.hear = stop.hear_from_another
        with_the_run().enter_context(peers)
    stop.leave_at_once("stopped before the first step: nothing new was saved; start again with the same command")
    check_processes(recipe, accelerator)
    return accelerator, stop, peers


def open_log(recipe: Settings, accelerator: Accelerator, start: int, notes: Sequence[str]) -> RunLog:
    """The run's files and trackers, from step `start` on, and `notes` said."""
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
    return log


def told_of(recipe: Settings, folder: Path | None) -> list[str]:
    """What is said of a resume."""
    if not recipe.resume_from_checkpoint:
        return []
    return [f"resuming from {folder}" if folder else "no checkpoint yet: starting from the beginning"]


def check_processes(recipe: Settings, accelerator: Accelerator) -> None:
    """Raise ValueError where the launch cannot run the recipe."""
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


def fresh_policy(
    recipe: Recipe, policy: Policy, accelerator: Accelerator, log: RunLog, history: dict[str, Any]
) -> Policy:
    """The recipe's model, warmed up, with its adapters, and evaluated; `history` gets what the summary says of it."""
    with log.stage("warm-up"):
        history["warmup_steps"] = warm_up(
            recipe,
            policy,
            accelerator,
            log,
            partial(evaluate_with, recipe, policy, recipe.validation_task, accelerator),
        )
    if recipe.lora is not None and policy.lora is None:
        if history["warmup_steps"]:
            save_reference(recipe, policy, accelerator)
        add_lora(policy, recipe.lora())
    with log.stage("evaluation"):
        history["eval_before"] = evaluate_with(recipe, policy, recipe.eval_task, accelerator)
    log.say(f"before RL: {shown(history['eval_before'])} on {len(recipe.eval_task)} held-out problems")
    return policy


def resumed_policy(recipe: Recipe, folder: Path, state: dict[str, Any], accelerator: Accelerator) -> Policy:
    """The policy as a checkpoint left it: its adapters stand on the warmed-up weights, or, without a warm-up, on the
    recipe's model."""
    device, dtype = first_home(recipe, accelerator), getattr(torch, state["dtype"])
    if recipe.lora is None:
        return share_out(recipe, opened(recipe, folder, dtype, device), accelerator)
    base = Path(recipe.directory) / "reference"
    policy = opened(recipe, base, dtype, device) if state["warmup_steps"] else make_policy(recipe, device)
    load_adapter(policy, folder / "adapter")
    return share_out(recipe, policy, accelerator)


def make_policy(recipe: Settings, device: torch.device) -> Policy:
    """The recipe's model: a checkpoint, a copy of a policy, or what its function makes, from the run's seed where that
    takes one."""
    if isinstance(recipe.model, str):
        options: dict[str, Any] = {"dtype": recipe.dtype, "quantization": recipe.base_quantization}
        options["verify_checkpoint"] = recipe.verify_checkpoint
        policy: Policy = load_policy(recipe.model, device=device, **options)
    elif isinstance(recipe.model, Policy):
        policy = copied(recipe.model).to(device)
    else:
        seeded = "seed" in inspect.signature(recipe.model).parameters
        policy = (recipe.model(seed=recipe.seed) if seeded else recipe.model()).to(device)
    return configured(recipe, policy)


def configured(recipe: Settings, policy: Policy) -> Policy:
    """The policy with the recipe's settings of how it computes. Raises ValueError on one that it cannot have."""
    policy.float32_head, policy.gradient_checkpointing = recipe.float32_head, recipe.gradient_checkpointing
    for setting in ("gradient_checkpointing", "torch_compile"):
        if getattr(recipe, setting):
            blocks_of(policy.module, setting)
    check_replay(policy, recipe.router_replay)
    return policy


def opened(recipe: Settings, folder: Path, dtype: torch.dtype, device: torch.device) -> Policy:
    """The policy in a folder of this run; a module that is not transformers' is made anew as the recipe says."""
    # A folder of this run was verified when the run's folder was opened, or was written since.
    if (folder / "config.json").exists():
        return configured(recipe, load_policy(folder, dtype=dtype, device=device, verify_checkpoint="quick"))
    policy = make_policy(recipe, device)
    load_weights(policy, folder, verify_checkpoint="quick")
    return policy


def rehearsed(recipe: Recipe, accelerator: Accelerator) -> Policy:
    """The recipe's model, after a step was rehearsed with it, so that a bad setting is refused before any expensive
    work, and before a file is written that stays."""
    policy = make_policy(recipe, first_home(recipe, accelerator))
    recipe.likelihood.check(policy)
    wanted_parts(recipe)
    longest = check_prompts(recipe, policy)
    (problem,), _ = choose(recipe, policy, [longest])
    policy = share_out(recipe, policy, accelerator)
    rehearse(recipe, policy, problem, accelerator)
    return policy


def make_optimizer(recipe: Settings, policy: Policy) -> torch.optim.Optimizer:
    trainable = [p for p in policy.module.parameters() if p.requires_grad]
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return recipe.optim(trainable, lr=recipe.learning_rate, betas=betas, weight_decay=recipe.weight_decay)


def reference_policy(recipe: Recipe, policy: Policy, accelerator: Accelerator, *, fresh: bool) -> Policy | None:
    """The policy that RL started from, frozen, for the KL term; kept in the run's folder for a resumed run.

    With adapters it is the policy itself without them, not a copy.
    """
    if not recipe.beta:
        return None
    if recipe.lora is not None:
        return policy.reference()
    folder = Path(recipe.directory) / "reference"
    if fresh:
        save_reference(recipe, policy, accelerator)
    if fresh and sharding_of(policy.module) is None:
        reference = copied(policy)
    else:
        dtype, device = next(policy.module.parameters()).dtype, first_home(recipe, accelerator)
        reference = share_out(recipe, opened(recipe, folder, dtype, device), accelerator)
    reference.module.requires_grad_(False)
    return reference


def save_reference(recipe: Recipe, policy: Policy, accelerator: Accelerator) -> None:
    """Write the weights that RL starts from to the run's folder, whole or not at all, with a manifest."""
    saved = on_main(policy, accelerator)

    def write() -> None:
        with replacing(Path(recipe.directory) / "reference") as partial:
            saved.save_pretrained(partial)
            manifest.write(partial, step=None, processes=accelerator.num_processes, versions=versions())

    from_main(write, accelerator)


def evaluate_with(recipe: Recipe, policy: Policy, task: Task, accelerator: Accelerator) -> dict[str, float]:
    options = {"seed": recipe.seed, "batch_size": recipe.eval_batch_size, "accelerator": accelerator}
    return evaluate(policy, task, recipe.eval_sampler, reward_timeout=recipe.reward_timeout, **options).means


def shown(found: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.3f}"
        for name, value in found.items()
        if name in ("solve_rate", "cell_accuracy", "accuracy", "reward")
    )


def validate(run: Run[Recipe], step: int) -> dict[str, float]:
    """Metrics on the validation task every eval_steps; none in between."""
    recipe = run.recipe
    if not recipe.eval_steps or (step + 1) % recipe.eval_steps:
        return {}
    with run.log.stage("evaluation"):
        means = evaluate_with(recipe, run.policy, recipe.validation_task, run.accelerator)
    return {f"eval/{name}": value for name, value in means.items()}
