"""The policies of a run: the learner, its reference, and the rollout's copy."""

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dllm_rl import manifest
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.distributed.collectives import from_main
from dllm_rl.distributed.sharding import sharding_of
from dllm_rl.files import replacing
from dllm_rl.likelihoods.replay import check_replay
from dllm_rl.models.base import Policy, copied, frozen_of, trained_of
from dllm_rl.models.engine import RolloutEngine
from dllm_rl.models.forward.blocks import blocks_of
from dllm_rl.models.lora import add_lora, load_adapter
from dllm_rl.models.policy import load_policy, load_weights
from dllm_rl.monitoring.log import RunLog
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.recipe import Recipe, Settings
from dllm_rl.samplers.records import as_commit
from dllm_rl.samplers.rules import schedule
from dllm_rl.samplers.whole_step import check_fixed_shapes
from dllm_rl.training.sharded_learner import first_home, on_main, share_out
from dllm_rl.training.validation import evaluate_with, shown
from dllm_rl.training.warmup import warm_up
from dllm_rl.versions import versions


def fresh_state(recipe: Recipe, policy: Policy, accelerator: Accelerator, log: RunLog) -> TrainingState:
    """Warm up the recipe's model, add its adapters, and evaluate it."""
    measure = partial(evaluate_with, recipe, policy, recipe.validation_task, accelerator)
    with log.stage("warm-up"):
        warmup_steps = warm_up(recipe, policy, accelerator, log, measure)
    # A resume needs the adapters' base if the warm-up changed it, and the reference, which with adapters is the base.
    needed = recipe.needs_reference_policy if recipe.lora is None else warmup_steps and policy.lora is None
    reference = save_reference(recipe, policy, accelerator) if needed else None
    if recipe.lora is not None and policy.lora is None:
        add_lora(policy, recipe.lora())
    with log.stage("evaluation"):
        before = evaluate_with(recipe, policy, recipe.eval_task, accelerator)
    log.say(f"before RL: {shown(before)} on {len(recipe.eval_task)} held-out problems")
    return TrainingState.first(recipe, policy, eval_before=before, warmup_steps=warmup_steps, reference=reference)


def resumed_policy(recipe: Recipe, folder: Path, state: TrainingState, accelerator: Accelerator) -> Policy:
    device = first_home(recipe, accelerator)
    dtype = getattr(torch, state.dtype)
    if recipe.lora is None:
        policy = opened(recipe, folder, dtype, device)
        freeze(recipe, policy, state.frozen or [])
        return share_out(recipe, policy, accelerator)
    # Adapters apply to the weights after the warm-up, if there was one.
    base = Path(recipe.directory) / "reference"
    policy = opened(recipe, base, dtype, device) if state.warmup_steps else build_policy(recipe, device)
    load_adapter(policy, folder / "adapter")
    return share_out(recipe, policy, accelerator)


def build_policy(recipe: Settings, device: torch.device) -> Policy:
    """Return the recipe's model: a checkpoint, a copy of a policy, or the result of its function."""
    if isinstance(recipe.model, str):
        options: dict[str, Any] = {"dtype": recipe.dtype, "quantization": recipe.base_quantization}
        options["verify_checkpoint"] = recipe.verify_checkpoint
        policy: Policy = load_policy(recipe.model, device=device, **options)
    elif isinstance(recipe.model, Policy):
        policy = copied(recipe.model).to(device)  # the caller's policy stays unchanged
    else:
        policy = called(recipe.model, recipe.seed).to(device)
    if policy.lora is not None:  # a checkpoint could not distinguish them from the run's adapters
        raise ValueError(
            f"model has adapters of rank {policy.lora.r} already; merge them first, merge_lora(policy), and give lora "
            "to train new ones"
        )
    return configured(recipe, policy)


def called(model: Callable[..., Policy], seed: int, *, dry_run: bool = False) -> Policy:
    """Call a recipe's function and return its policy. The function receives the seed if it accepts `seed`. A function
    that also trains its policy should accept `dry_run`: it is True if only the shapes of the weights matter.
    """
    accepted = inspect.signature(model).parameters
    return model(**{name: value for name, value in (("seed", seed), ("dry_run", dry_run)) if name in accepted})


def configured(recipe: Settings, policy: Policy) -> Policy:
    """Set the recipe's compute settings on the policy and return it.

    Raises:
        ValueError: The policy cannot have a setting.
    """
    policy.float32_head = recipe.float32_head
    policy.gradient_checkpointing = recipe.gradient_checkpointing
    check_blocks(recipe, policy)
    check_replay(policy, recipe.router_replay)
    return policy


def check_blocks(recipe: Settings, policy: Policy) -> None:
    """Raise ValueError on a setting that wraps the model's blocks, if the model has no blocks or they write a cache."""
    for setting in ("gradient_checkpointing", "torch_compile"):
        if getattr(recipe, setting):
            blocks_of(policy.module, setting)
            if policy.spec.attention == "encoder_decoder":  # a block that runs again would write its cache twice
                raise ValueError(f"{setting}=True does not go with the cache of {policy.spec.name!r}; leave it off")


def opened(recipe: Settings, folder: Path, dtype: torch.dtype, device: torch.device) -> Policy:
    """Load the policy in a folder of this run; the recipe first builds a module that is not a transformers model."""
    # A folder of this run was verified when the run's folder was opened, or written after that.
    if (folder / "config.json").exists():
        return configured(recipe, load_policy(folder, dtype=dtype, device=device, verify_checkpoint="quick"))
    policy = build_policy(recipe, device)
    load_weights(policy, folder, verify_checkpoint="quick")
    return policy


def freeze(recipe: Settings, policy: Policy, names: list[str]) -> None:
    """Freeze exactly the weights of these names, as in the run that is resumed.

    Raises:
        ValueError: Other weights of the recipe's policy are frozen: the optimizer's state would not fit.
    """
    if isinstance(recipe.model, Policy) and (odd := set(frozen_of(recipe.model.module)) ^ set(names)):
        name = min(odd)
        raise ValueError(
            f"requires_grad of {name!r} is {name in names} in this model, and was {name not in names} in the run that "
            "is resumed; set it as it was, or start a new run"
        )
    for name, weight in policy.module.named_parameters():
        if name in names:
            weight.requires_grad_(False)


def make_optimizer(recipe: Settings, policy: Policy) -> torch.optim.Optimizer:
    trainable = trained_of(policy.module)
    betas = (recipe.adam_beta1, recipe.adam_beta2)
    return recipe.optim(trainable, lr=recipe.learning_rate, betas=betas, weight_decay=recipe.weight_decay)


def reference_policy(recipe: Recipe, policy: Policy, accelerator: Accelerator, *, fresh: bool) -> Policy | None:
    """Return the frozen policy that RL started from, if a run needs it: without adapters, or from the run's folder."""
    if not recipe.needs_reference_policy:
        return None
    if recipe.lora is not None:
        return policy.reference()  # the same weights without the adapters, so there is no second copy
    folder = Path(recipe.directory) / "reference"
    if fresh and sharding_of(policy.module) is None:
        reference = copied(policy)
    else:
        dtype = next(policy.module.parameters()).dtype
        device = first_home(recipe, accelerator)
        reference = share_out(recipe, opened(recipe, folder, dtype, device), accelerator)
    reference.module.requires_grad_(False)  # the loss has no gradient with respect to it
    return reference


def save_reference(recipe: Recipe, policy: Policy, accelerator: Accelerator) -> str:
    """Write the weights that RL starts from to the run's folder, atomically; return the digest of their manifest."""
    saved = on_main(policy, accelerator)

    def write() -> str:
        with replacing(Path(recipe.directory) / "reference") as partial:
            saved.save_pretrained(partial)
            return manifest.write(partial, step=None, processes=accelerator.num_processes, versions=versions())

    return from_main(write, accelerator)


def engine_of(recipe: Recipe) -> RolloutEngine:
    return recipe.rollout_engine or RolloutEngine(partial(rollout_copy, recipe), sync_weights)


def rollout_copy(recipe: Recipe, policy: Policy) -> Policy:
    """Return the policy that samples: the quantized copy; without a scheme the learner, or a full copy of a sharded
    learner.
    """
    scheme = recipe.rollout_quantization
    if scheme is None:
        return policy if sharding_of(policy.module) is None else quantized_copy(policy, None)
    copied = quantized_copy(policy, scheme(), dtype=torch.bfloat16 if recipe.bf16 else None)
    copied.records_experts = recipe.router_replay is not None and recipe.likelihood.exact_for_sampler
    return copied


def check_compiled(recipe: Recipe) -> None:
    """Raise ValueError if torch_compile, or the sampler's compile_step, cannot be combined with another setting."""
    given = [getattr(sampler, "keywords", {}) for sampler in (recipe.sampler, recipe.eval_sampler)]
    whole = [options for options in given if options.get("compile_step")]
    steps = bool(whole)
    why = None
    if recipe.rollout_engine is not None:
        why = "compiles torch's forwards, and a rollout_engine has its own: leave rollout_engine out"
    elif recipe.router_replay is not None:
        why = "does not go with router_replay='R3', as compiled blocks name no experts: leave out router_replay"
    elif recipe.zero_mismatch:
        why = "rounds otherwise than the eager learner, which zero_mismatch forbids: leave one of them out"
    elif recipe.torch_compile and steps:
        why = "compiles blocks, and the sampler's compile_step=True whole steps: leave one of them out"
    setting = "torch_compile" if recipe.torch_compile else "compile_step"
    if (recipe.torch_compile or steps) and why:
        raise ValueError(f"{setting}=True {why}, or set {setting}=False")
    for options in whole:
        radius = options.get("confidence_radius")
        check_fixed_shapes(options.get("cache"), as_commit(options.get("commit", schedule)), radius is not None)
