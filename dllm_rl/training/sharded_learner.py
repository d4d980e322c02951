"""A learner whose weights are sharded: incompatible settings, and its state on one host."""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env

from dllm_rl.algorithms.optimizers import adamw_8bit
from dllm_rl.distributed.sharding import shard, sharding_of
from dllm_rl.distributed.stop import as_written
from dllm_rl.members import function_of
from dllm_rl.models.base import Module, Policy
from dllm_rl.models.forward.blocks import backbone_of, blocks_of
from dllm_rl.models.lora import add_lora
from dllm_rl.models.merge import host_copy
from dllm_rl.recipe import Recipe, Settings

WHOLE = "or shard_size=1, with which each process holds the weights whole"


def group_size(recipe: Settings, processes: int) -> int:
    return recipe.shard_size or processes


def first_home(recipe: Settings, accelerator: Accelerator) -> torch.device:
    """Return the device that the learner's weights are loaded to: the host if they are to be sharded."""
    # A device need not have memory for the full model: `shard` sends it unit by unit.
    return torch.device("cpu") if group_size(recipe, accelerator.num_processes) > 1 else accelerator.device


def check_launch_config() -> None:
    """Raise ValueError if the launch requests an engine, which Accelerate silently ignores on a CPU."""
    for name in ("DEEPSPEED", "FSDP"):  # on a GPU such an engine would own the model
        if parse_flag_from_env(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"distributed_type={name} in the launch's config: such an engine would own the model, whose layers the "
                "sync of the rollout's copy and the constant-memory update take one by one; use MULTI_GPU, and "
                f"{as_written(shard_size=0)} to share the weights out (torch's FSDP2)"
            )


def check_batches(recipe: Settings, processes: int) -> None:
    """Raise ValueError if the processes cannot share a batch equally."""
    for name in ("train_batch_size", "sft_warmup_batch_size") if recipe.sft_warmup_steps else ("train_batch_size",):
        whole = getattr(recipe, name)
        if whole % processes:
            least = whole // processes * processes
            near = f"{f'{least}, ' if least else ''}{least + processes}"
            raise ValueError(
                f"{name}={whole} must be a multiple of the {processes} processes; nearest that are: {near}"
            )


def check_sharding(recipe: Settings, processes: int) -> None:
    """Raise ValueError on a setting that a sharded learner cannot have, before anything is loaded."""
    size = group_size(recipe, processes)
    if processes % size:
        raise ValueError(f"shard_size={size} must divide the {processes} processes; give a divisor, or 0 for all")
    if size == 1 or not isinstance(recipe, Recipe):
        return
    wrong = {
        f"sft_warmup_steps={recipe.sft_warmup_steps} with lora": recipe.sft_warmup_steps
        and recipe.lora is not None
        and "adapters cannot be added to weights that are shared out: warm up without them in a run of its own, and "
        "start from its checkpoint",
        "zero_mismatch=True": recipe.zero_mismatch
        and "where the sides differ, one process alone would look for the layer",
        f"base_quantization={recipe.base_quantization!r}": recipe.base_quantization
        and "bitsandbytes' weights cannot be parted",
        "optim=adamw_8bit": function_of(recipe.optim) is adamw_8bit and "its moments cannot be parted: use adamw",
    }
    for name, why in wrong.items():
        if why:
            raise ValueError(f"{name} does not go with shard_size={size}: {why}; {WHOLE}")


def share_out(recipe: Recipe, policy: Policy, accelerator: Accelerator) -> Policy:
    size = group_size(recipe, accelerator.num_processes)
    module = policy.module
    if size == 1:
        return policy
    check_module(module, size)
    if recipe.lora is not None and policy.lora is None:  # adapters cannot be added to a sharded layer later
        add_lora(policy, recipe.lora())
    shard(module, blocks_of(module, "shard_size"), accelerator, size=size, timeout=recipe.collective_timeout)
    return policy


def check_module(module: Module, size: int) -> None:
    """Raise ValueError on a module whose weights cannot be sharded."""
    backbone: Module = backbone_of(module)
    if backbone is module:
        wrong = f"needs a transformers module with a backbone and a head, not {type(module).__name__}"
        raise ValueError(f"shard_size={size} {wrong}; use shard_size=1")
    inside = {id(parameter) for parameter in backbone.parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in inside and not name.startswith(f"{module.base_model_prefix}."):
            raise ValueError(
                f"shard_size={size}: {name} of {type(module).__name__} is tied to the backbone's embeddings: two "
                "shards would hold it; use shard_size=1"
            )


def on_main(policy: Policy, accelerator: Accelerator) -> Policy:
    """Return the policy to save: itself, or of a sharded learner a full copy on the main process. Collective."""
    if sharding_of(policy.module) is None:
        return policy
    twin: Any = copy.copy(policy)  # the learner's sharded module stays unchanged
    twin.module = host_copy(policy.module, keep=accelerator.is_main_process) or policy.module
    return twin
