"""The options that every command with a model has, and the policy that they ask for."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from dllm_rl.models.base import Policy


def add_model_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16", "auto"))
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the accelerator, where there is one)")


def open_policy(arguments: argparse.Namespace, *, device: "torch.device | None" = None, **options: Any) -> "Policy":
    """The checkpoint that the arguments name, in their dtype and on their device, or on the one given."""
    from dllm_rl.distributed import find_device
    from dllm_rl.models.policy import load_policy

    device = find_device(arguments.device) if device is None else device
    return load_policy(arguments.model, dtype=arguments.dtype, device=device, **options)
