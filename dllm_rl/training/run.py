"""Starting, resuming, checkpointing and finishing a run."""

import copy
import inspect
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from dllm_rl.config import described, described_defaults
from dllm_rl.distributed import catch_interrupt, machine, make_accelerator
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import write_json
from dllm_rl.models.base import Policy
from dllm_rl.models.lora import add_lora, load_adapter
from dllm_rl.models.policy import load_policy
from dllm_rl.models.tokens import decode, encode
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.tasks.base import Task, grade
from dllm_rl.training import checkpoint, plots
from dllm_rl.training.cautions import cautions
from dllm_rl.training.log import RunLog
from dllm_rl.training.prompts import check_prompts, choose
from dllm_rl.training.warmup import examples, warm_up

# Fields that may change between the parts of a resumed run: they do not touch what is computed, or only extend it.
FREE = {
    "output_dir",
    "resume_from_checkpoint",
    "overwrite_output_dir",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "num_steps",
    "dry_run",
    "reward_timeout",
    "collective_timeout",
    "max_prompt_length",
}


@dataclass(frozen=True)
class Run:
    """What a run owns from its start to its summary. It says how a run goes on; no mathematics takes it."""

    recipe: Recipe
    accelerator: Accelerator
    log: RunLog
    policy: Policy
    rollout_policy: Policy
    reference: Policy | None
    optimizer: torch.optim.Optimizer
    first_step: int
    history: dict[str, Any]
    interrupted: Callable[[], bool]
    progress: Callable[..., None]


def start(recipe: Recipe) -> Run:
    """A run at its first step: fresh, warmed up and evaluated, or as a checkpoint left it. Raises ValueError."""
    accelerator = make_accelerator(mixed_precision="bf16" if recipe.bf16 else "no", timeout=recipe.collective_timeout)
    check_processes(recipe, accelerator)
    folder = open_folder(recipe, accelerator)
    state = checkpoint.read_state(folder) if folder else {"step": 0}
    log = RunLog(Path(recipe.directory), start=state["step"], main=accelerator.is_main_process)
    if recipe.resume_from_checkpoint:
        log.say(f"resuming from {folder}" if folder else "no checkpoint yet: starting from the beginning")
    for caution in cautions(recipe):
        log.say(f"warning: {caution}")
    history: dict[str, Any] = {"begun": time.perf_counter(), "seconds": 0.0}
    if folder:
        policy = resumed_policy(recipe, folder, state, accelerator)
        check_prompts(recipe, policy)
        optimizer = make_optimizer(recipe, policy)
        checkpoint.load_optimizer(folder, optimizer)
        policy.version, log.seconds = state["version"], state["stages"]
        history |= {key: state[key] for key in ("seconds", "eval_before", "warmup_steps")}
    else:
        policy = fresh_policy(recipe, accelerator, log, history)
        optimizer = make_optimizer(recipe, policy)
    scheme = recipe.rollout_quantization
    rollout_policy = policy if scheme is None else quantized_copy(policy, scheme())
    rollout_policy.version = policy.version
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
        interrupted=catch_interrupt(accelerator),
        progress=log.bar("training", recipe.num_steps, completed=state["step"]),
    )
    if not folder:
        save(run, 0)
    return run


def check_processes(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raise ValueError where the launch cannot run the recipe."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"distributed_type={accelerator.distributed_type.value} is not supported by train(); use MULTI_GPU"
        )
    for name in ("train_batch_size", "warmup_batch_size"):
        if getattr(recipe, name) % accelerator.num_processes:
            raise ValueError(
                f"{name}={getattr(recipe, name)} must be a multiple of the {accelerator.num_processes} processes"
            )


def open_folder(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """Make the run's folder, or empty it where asked to; returns the checkpoint to resume from. Raises ValueError."""
    directory = Path(recipe.directory)
    held = [name for name in ("metrics.jsonl", "checkpoints", "summary.json") if (directory / name).exists()]
    folder = None
    if recipe.resume_from_checkpoint:
        folder = checkpoint.locate(recipe.resume_from_checkpoint, directory / "checkpoints")
    elif held and not recipe.overwrite_output_dir:
        raise ValueError(
            f"output_dir={str(directory)!r} already holds a run ({', '.join(held)}); give another, or "
            "--resume_from_checkpoint latest, or --overwrite_output_dir"
        )
    if folder:
        # A field that is newer than the checkpoint had no effect then, as its default has none.
        before = described_defaults(recipe) | checkpoint.read_state(folder)["recipe"]
        check_same_recipe(before, described(recipe))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if recipe.overwrite_output_dir and not recipe.resume_from_checkpoint:
            for name in [*held, "tensorboard", "training.png"]:
                path = directory / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        directory.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    return folder


def check_same_recipe(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError where two descriptions of recipes differ in a field that is not FREE."""
    changed = [name for name in now if name not in FREE and before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{name}={now[name]!r} differs from the checkpoint's {before.get(name)!r}; resume with the same recipe"
        )


def fresh_policy(recipe: Recipe, accelerator: Accelerator, log: RunLog, history: dict[str, Any]) -> Policy:
    """The recipe's model, warmed up, with its adapters, and evaluated; `history` gets what the summary says of it."""
    policy = make_policy(recipe).to(accelerator.device)
    smoke_test(recipe, policy)
    with log.stage("warm-up"):
        history["warmup_steps"] = warm_up(
            recipe,
            policy,
            accelerator,
            log,
            partial(evaluate_with, recipe, policy, recipe.validation_task, accelerator),
        )
    if recipe.lora is not None:
        if history["warmup_steps"] and accelerator.is_main_process:
            policy.save_pretrained(Path(recipe.directory) / "reference")
        add_lora(policy, recipe.lora())
    with log.stage("evaluation"):
        history["eval_before"] = evaluate_with(recipe, policy, recipe.eval_task, accelerator)
    log.say(f"before RL: {shown(history['eval_before'])} on {len(recipe.eval_task)} held-out problems")
    return policy


def resumed_policy(recipe: Recipe, folder: Path, state: dict[str, Any], accelerator: Accelerator) -> Policy:
    """The policy as a checkpoint left it."""
    if recipe.lora is None:
        return load_policy(folder, dtype=getattr(torch, state["dtype"]), device=accelerator.device)
    policy = adapter_base(recipe, warmed_up=state["warmup_steps"] > 0).to(accelerator.device)
    load_adapter(policy, folder / "adapter")
    return policy


def make_policy(recipe: Recipe) -> Policy:
    """The recipe's model: a checkpoint, or what its function makes, from the run's seed where that takes one."""
    if isinstance(recipe.model, str):
        return load_policy(recipe.model, dtype=recipe.dtype, quantization=recipe.base_quantization)
    seeded = "seed" in inspect.signature(recipe.model).parameters
    return recipe.model(seed=recipe.seed) if seeded else recipe.model()


def adapter_base(recipe: Recipe, *, warmed_up: bool) -> Policy:
    """What a resumed run's adapters stand on: the warmed-up weights, or the recipe's model without a warm-up."""
    policy = make_policy(recipe)
    if warmed_up:
        return load_policy(Path(recipe.directory) / "reference", dtype=next(policy.module.parameters()).dtype)
    return policy


def smoke_test(recipe: Recipe, policy: Policy) -> None:
    """Run one problem through sampling, grading and warm-up encoding, so that a bad setting fails before any expensive
    work."""
    recipe.likelihood.check(policy)
    check_prompts(recipe, policy)
    (problem,), _ = choose(recipe, policy, [0])
    rollout = recipe.sampler(policy, encode(policy, [problem]), generator_for(recipe.seed, "rehearsal"))
    grade(recipe.task, [problem], decode(policy, rollout), timeout=recipe.reward_timeout)
    if recipe.warmup_steps:
        examples(policy, [problem], max_new_tokens=recipe.max_new_tokens)


def make_optimizer(recipe: Recipe, policy: Policy) -> torch.optim.Optimizer:
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
        if accelerator.is_main_process:
            policy.save_pretrained(folder)
        reference = copy.copy(policy)
        reference.module = copy.deepcopy(policy.module)
    else:
        reference = load_policy(folder, dtype=next(policy.module.parameters()).dtype, device=accelerator.device)
    reference.module.requires_grad_(False)
    return reference


def evaluate_with(recipe: Recipe, policy: Policy, task: Task, accelerator: Accelerator) -> dict[str, float]:
    options = {"seed": recipe.seed, "batch_size": recipe.eval_batch_size, "accelerator": accelerator}
    return evaluate(policy, task, recipe.eval_sampler, reward_timeout=recipe.reward_timeout, **options).means


def shown(found: dict[str, float]) -> str:
    return ", ".join(
        f"{name} {value:.3f}"
        for name, value in found.items()
        if name in ("solve_rate", "cell_accuracy", "accuracy", "reward")
    )


def validate(run: Run, step: int) -> dict[str, float]:
    """Metrics on the validation task every eval_steps; none in between."""
    recipe = run.recipe
    if not recipe.eval_steps or (step + 1) % recipe.eval_steps:
        return {}
    with run.log.stage("evaluation"):
        means = evaluate_with(recipe, run.policy, recipe.validation_task, run.accelerator)
    return {f"eval/{name}": value for name, value in means.items()}


def checkpoint_if_due(run: Run, step: int) -> None:
    """Save every save_steps, after the last step, and on Ctrl-C; that ends the process with status 130."""
    recipe, done, stop = run.recipe, step + 1, run.interrupted()
    if stop or done % recipe.save_steps == 0 or done == recipe.num_steps:
        save(run, done)
    if stop and done < recipe.num_steps:
        run.log.say(
            f"interrupted after step {done}; continue with --resume_from_checkpoint latest "
            f"--output_dir {recipe.directory}"
        )
        raise SystemExit(130)


def save(run: Run, step: int) -> None:
    """Checkpoint after `step` steps, by the main process."""
    recipe, history = run.recipe, run.history
    if run.accelerator.is_main_process:
        state = {
            "dtype": str(next(run.policy.module.parameters()).dtype).removeprefix("torch."),
            "stages": run.log.seconds,
            "seconds": history["seconds"] + time.perf_counter() - history["begun"],
            "eval_before": history["eval_before"],
            "warmup_steps": history["warmup_steps"],
            "recipe": described(recipe),
        }
        directory = Path(recipe.directory) / "checkpoints"
        checkpoint.save(directory, step, run.policy, run.optimizer, state, keep=recipe.save_total_limit)
    run.accelerator.wait_for_everyone()


def finish(run: Run) -> dict[str, Any]:
    """Evaluate on held-out problems, write summary.json and the picture, say in a paragraph what happened."""
    recipe, accelerator, log, history = run.recipe, run.accelerator, run.log, run.history
    policy, rollout_policy = run.policy, run.rollout_policy
    with log.stage("evaluation"):
        after = evaluate_with(recipe, policy, recipe.eval_task, accelerator)
        quantized = (
            after if rollout_policy is policy else evaluate_with(recipe, rollout_policy, recipe.eval_task, accelerator)
        )
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
        "checkpoint": str(checkpoint.found(directory / "checkpoints")[-1][1]),
        "machine": machine(accelerator),
        "recipe": described(recipe),
    }
    if accelerator.is_main_process:
        write_json(directory / "summary.json", summary)
        picture = plots.plot(directory) if recipe.num_steps else None
        log.say(
            f"\n{recipe.name}, seed {recipe.seed}: {shown(history['eval_before'])}  ->  {shown(after)}  on "
            f"{len(recipe.eval_task)} held-out problems, after {history['warmup_steps']} warm-up and "
            f"{recipe.num_steps} RL steps in {summary['seconds']:.0f} s.\n"
            f"Checkpoint: {summary['checkpoint']}\nPicture:    {picture}\nNumbers:    {directory / 'summary.json'}\n"
            f"Sample:     dllm-rl sample {summary['checkpoint']} {_example(recipe)}"
        )
    accelerator.wait_for_everyone()
    return summary


def _example(recipe: Recipe) -> str:
    prompt = recipe.eval_task[0].prompt
    return repr(prompt) if isinstance(prompt, str) else repr(prompt[-1]["content"])
