"""The options of every command that opens a model, and the policy that they select."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dllm_rl.members import import_function

if TYPE_CHECKING:
    import torch

    from dllm_rl.manifest import Check
    from dllm_rl.models.base import Policy


def add_model_options(sub: argparse.ArgumentParser, *, maker: str = "--model") -> None:
    maker_help = "function that makes the policy of a custom module; the checkpoint's weights are loaded into it"
    sub.add_argument(maker, dest="maker", metavar="MODULE:FUNCTION", help=maker_help)
    dtypes = ("float32", "bfloat16", "float16", "auto")
    sub.add_argument("--dtype", default="auto", choices=dtypes, help="dtype of the weights (default auto: as stored)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: the accelerator, where there is one)")
    sub.add_argument(
        "--verify_checkpoint",
        default="full",
        choices=("full", "quick"),
        help="check before use; quick: of files over 1 MiB, only the size and the first MiB (default full)",
    )


def checkpoint_of(model: str, *, quick: bool = False) -> str:
    """Return a folder or a hub's id unchanged, and for a run's folder its newest complete checkpoint.

    Raises:
        ValueError: The run has no complete checkpoint.
    """
    folder = Path(model) / "checkpoints"
    if not folder.is_dir():
        return model
    from dllm_rl.checkpoints import checkpoint  # local: imports torch, which would slow --help
    from dllm_rl.screen import escape_controls

    try:
        say = lambda text: print(escape_controls(text), file=sys.stderr)  # noqa: E731
        newest = checkpoint.locate("latest", folder, quick=quick, say=say)
    except ValueError:
        raise ValueError(f"{model}: none of the run's checkpoints is complete; dllm-rl verify says why") from None
    if newest is None:
        raise ValueError(f"{model} is a run's folder without a checkpoint yet; give a checkpoint")
    return str(newest)


def open_policy(
    arguments: argparse.Namespace,
    model: str | None = None,
    *,
    device: "torch.device | None" = None,
    float32_head: bool = True,
) -> "Policy":
    """Load the policy of `model` (default: arguments.model) in --dtype, on `device` (default: --device).

    `arguments.checkpoint` is set to the folder of the loaded checkpoint.
    """
    import torch

    from dllm_rl.device import find_device
    from dllm_rl.models.base import Policy
    from dllm_rl.models.policy import load_policy, load_weights

    device = find_device(arguments.device) if device is None else device
    model = model or arguments.model
    folder = checkpoint_of(model, quick=arguments.verify_checkpoint == "quick")
    arguments.checkpoint = folder
    # checkpoint_of has verified the newest checkpoint of a run.
    check: Check = arguments.verify_checkpoint if folder == model else "quick"
    if arguments.maker is None:
        policy: Policy = load_policy(folder, dtype=arguments.dtype, device=device, verify_checkpoint=check)
    else:
        policy = import_function("model", arguments.maker)()
        if not isinstance(policy, Policy):
            kind = type(policy).__name__
            raise ValueError(f"--model {arguments.maker!r} makes a {kind} and no policy; return make_policy(...)")
        load_weights(policy, folder, verify_checkpoint=check)
        if arguments.dtype != "auto":
            policy.module.to(getattr(torch, arguments.dtype))
        policy = policy.to(device)
    policy.float32_head = float32_head
    return policy
