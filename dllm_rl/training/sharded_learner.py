"""A learner whose weights are sharded (FSDP2): check its settings, shard it, and gather its weights for a save."""

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from dllm_rl.algorithms.optimizers import AdamW8bit
from dllm_rl.distributed.collectives import collective
from dllm_rl.distributed.sharding import shard, sharding_of
from dllm_rl.distributed.stop import as_written
from dllm_rl.models.base import Module, Policy
from dllm_rl.models.forward.blocks import backbone_of, blocks_of
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.merge import host_copy
from dllm_rl.recipe import Recipe
from dllm_rl.training.any_recipe import AnyRecipe

UNSHARDED_REMEDY = "or shard_size=1, with which every process has the full weights"


def processes_per_shard(shard_size: int, processes: int) -> int:
    """Return how many processes share the weights of one learner."""
    return shard_size or processes


def loading_device(shard_size: int, accelerator: Accelerator) -> torch.device:
    """Return the device to load the learner's weights to: the host if they will be sharded."""
    # No device needs memory for the full model: `shard` moves it to the devices unit by unit.
    return torch.device("cpu") if processes_per_shard(shard_size, accelerator.num_processes) > 1 else accelerator.device


def check_launch_config() -> None:
    """Raise ValueError if the launch requests DeepSpeed, FSDP or Megatron. On a CPU, Accelerate would silently ignore
    FSDP.
    """
    if name := launch_engine():
        raise ValueError(
            f"distributed_type={name} in the launch's config: such an engine would wrap the model, whose layers "
            "the weight sync and the constant-memory update access one by one; use MULTI_GPU, and "
            f"{as_written(shard_size=0)} to shard the weights (torch's FSDP2)"
        )


def launch_engine() -> str | None:
    """Return the engine that the launch requests, DEEPSPEED, FSDP or MEGATRON_LM; None: none of them."""
    return next(
        (name for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM") if parse_flag_from_env(f"ACCELERATE_USE_{name}")), None
    )


def check_processes(recipe: AnyRecipe, processes: int) -> None:
    """Raise ValueError if the processes cannot share a batch equally, or on a setting that a sharded learner cannot
    have, before anything is loaded.
    """
    sizes = {"train_batch_size": recipe.train_batch_size}
    for name, batch_size in (
        sizes | ({"warmup.batch_size": recipe.warmup.batch_size} if recipe.warmup.steps else {})
    ).items():
        if batch_size % processes:
            lower_multiple = batch_size // processes * processes
            nearest = f"{f'{lower_multiple}, ' if lower_multiple else ''}{lower_multiple + processes}"
            raise ValueError(
                f"{name}={batch_size} must be a multiple of the {processes} processes; the nearest are: {nearest}"
            )
    size = processes_per_shard(recipe.shard_size, processes)
    if processes % size:
        raise ValueError(f"shard_size={size} must divide the {processes} processes; give a divisor, or 0 for all")
    if size == 1 or not isinstance(recipe, Recipe):
        return
    conflicts = {
        f"warmup.steps={recipe.warmup.steps} with lora": recipe.warmup.steps
        and recipe.lora is not None
        and "adapters cannot be added to sharded weights: warm up without adapters in a separate run, and start from "
        "its checkpoint",
        "zero_mismatch=True": recipe.zero_mismatch
        and "if rollout and learner differ, only one process would search for the layer",
        f"base_quantization={recipe.base_quantization!r}": recipe.base_quantization
        and "bitsandbytes' weights cannot be sharded",
        "optim=AdamW8bit": isinstance(recipe.optim, AdamW8bit) and "its moments cannot be sharded: use AdamW()",
    }
    for name, reason in conflicts.items():
        if reason:
            raise ValueError(f"{name} cannot be combined with shard_size={size}: {reason}; {UNSHARDED_REMEDY}")


def shard_policy(
    policy: Policy, accelerator: Accelerator, *, shard_size: int, lora: Lora | None, timeout: float
) -> Policy:
    """Shard the policy's weights in place, with its adapters, if the run shards the learner; return the policy.

    Args:
        policy: The policy with full weights.
        accelerator: The processes.
        shard_size: The recipe's `shard_size`.
        lora: Adapters to add before, if the policy has none; None: no adapters.
        timeout: The recipe's `collective_timeout`, in seconds.
    """
    size = processes_per_shard(shard_size, accelerator.num_processes)
    module = policy.module
    if size == 1:
        return policy
    check_module(module, size)
    if lora is not None and policy.lora is None:  # adapters cannot be added to a sharded layer later
        add_lora(policy, lora)
    shard(module, blocks_of(module, "shard_size"), accelerator, size=size, timeout=timeout)
    return policy


def check_module(module: Module, size: int) -> None:
    """Raise ValueError on a module whose weights cannot be sharded."""
    backbone: Module = backbone_of(module)
    if backbone is module:
        problem = f"needs a transformers module with a backbone and a head, not {type(module).__name__}"
        raise ValueError(f"shard_size={size} {problem}; use shard_size=1")
    backbone_ids = {id(parameter) for parameter in backbone.parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in backbone_ids and not name.startswith(f"{module.base_model_prefix}."):
            raise ValueError(
                f"shard_size={size}: {name} of {type(module).__name__} is tied to the backbone's embeddings: it "
                "would be in two shards; use shard_size=1"
            )


@collective
def gather_on_main(policy: Policy, accelerator: Accelerator) -> Policy:
    """Return a policy that can be saved: for a sharded learner a copy with full weights in the main process, else the
    policy itself.
    """
    if sharding_of(policy.module) is None:
        return policy
    return host_copy(policy, keep=accelerator.is_main_process)
