"""A module's blocks, one by one: recomputed in the backward, or compiled."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from dllm_rl.models.base import Module, Policy
from dllm_rl.models.lora import LoraLinear


def backbone_of(module: Module) -> Any:
    """A stock module without its heads; any other module itself."""
    return getattr(module, "base_model", module)


def blocks_of(module: Module, wanted_by: str = "gradient_checkpointing") -> list[nn.Module]:
    """The members of the backbone's outermost lists of layers. Raises ValueError, naming `wanted_by`, without any."""
    backbone = backbone_of(module)
    found: list[nn.Module] = []
    for name, layers in backbone.named_modules():
        # A list inside a block, as of experts, has the block's number in its name.
        if isinstance(layers, nn.ModuleList) and not re.search(r"(^|\.)\d+(\.|$)", name):
            found += layers
    if not found:
        raise ValueError(f"{wanted_by}=True: {type(module).__name__} has no list of blocks; leave it off")
    return found


@contextmanager
def recomputed_blocks(module: Module) -> Iterator[None]:
    """Gradient checkpointing: a forward inside keeps each block's input alone. The backward, inside or later, runs the
    block again with the same dropout masks, so that gradients are the same bit for bit on deterministic kernels."""
    # transformers' own switch does nothing in eval mode, in which policies stay, and does not cover every family.
    blocks = blocks_of(module)
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward, block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _checkpointed(forward: Callable, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    adapters = [layer for layer in block.modules() if isinstance(layer, LoraLinear)]
    first = [layer.calls for layer in adapters]
    modes = _get_current_function_mode_stack()

    def run(*args: Any, **kwargs: Any) -> Any:
        now = [layer.calls for layer in adapters]
        _count(adapters, first)  # the second run draws the dropout masks of the first
        try:
            with ExitStack() as again:  # a backward runs outside of the forward's modes
                for mode in modes[len(_get_current_function_mode_stack()) :]:
                    again.enter_context(mode)
                return forward(*args, **kwargs)
        finally:  # the backward leaves the block early, by an exception
            _count(adapters, map(max, (layer.calls for layer in adapters), now))

    # No block draws from torch's global generator, so its state is not kept.
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _count(adapters: list[LoraLinear], calls: Iterable[int]) -> None:
    for layer, count in zip(adapters, calls, strict=True):
        layer.calls = count


def compile_blocks(policy: Policy, *, mode: str = "default") -> None:
    """Compile every block of the policy's module in place, at its first forward. Raises ValueError without blocks.

    mode  torch.compile's. "default": one compilation for all shapes. "reduce-overhead", "max-autotune": one per shape
          for CUDA graphs, for at most eight shapes; torch runs further shapes uncompiled.
    Numbers differ from eager ones by rounding. Only for sampling without a cache: a compiled block is neither
    differentiated with adapters nor recomputed, and a growing cache would be compiled again at every step."""
    for block in blocks_of(policy.module, "torch_compile"):
        block.compile(mode=mode, dynamic=mode == "default")
