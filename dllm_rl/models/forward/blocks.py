"""A module's blocks, one by one: recomputed in the backward, or compiled."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer

from dllm_rl.models.base import CACHE, Module, Policy
from dllm_rl.models.lora import LoraLinear


def backbone_of(module: Module) -> Any:
    """Return a stock module without its heads, or any other module itself."""
    return getattr(module, "base_model", module)


def blocks_of(module: Module, wanted_by: str = "gradient_checkpointing") -> list[nn.Module]:
    """Return the members of the backbone's outermost lists of layers.

    Raise ValueError, naming `wanted_by`, if there are none.
    """
    backbone = backbone_of(module)
    found: list[nn.Module] = []
    for name, layers in backbone.named_modules():
        # A list inside a block, as a list of experts, has the block's number in its name.
        if isinstance(layers, nn.ModuleList) and not re.search(r"(^|\.)\d+(\.|$)", name):
            found += layers
    if not found:
        raise ValueError(f"{wanted_by}=True: {type(module).__name__} has no list of blocks; leave it off")
    return found


@contextmanager
def recomputed_blocks(module: Module) -> Iterator[None]:
    """Use gradient checkpointing for the forwards in the block: each forward stores only the blocks' inputs.

    The backward, inside or later, runs each block again with the same dropout masks, so that gradients are the same bit
    for bit on deterministic kernels.
    """
    # transformers' switch does nothing in eval mode, in which policies stay, and does not cover every family.
    blocks = blocks_of(module)
    compiled = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward, block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in zip(blocks, compiled, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward  # type: ignore[method-assign]


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

    # No block draws from torch's global generator, so its state is not stored.
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _count(adapters: list[LoraLinear], calls: Iterable[int]) -> None:
    for layer, count in zip(adapters, calls, strict=True):
        layer.calls = count


def has_uncompiled(module: Module) -> bool:
    """Return whether some layers, as quantized experts, always run outside of compiled graphs."""
    return any(getattr(layer.forward, "_torchdynamo_disable", False) for layer in module.modules())


def compile_blocks(policy: Policy) -> None:
    """Compile every block of the policy's module in place, at its first forward. Raise ValueError without blocks.

    Few graphs serve all blocks and shapes, with a cache or without: the first forward has a separate graph, and so has
    a batch or a width of 1. A block that is not one graph raises torch's error; quantized experts run between two
    graphs. Numbers differ from eager ones by rounding. Differentiated forwards stay eager.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)  # 12 were observed
    run = torch.compile(_run, dynamic=True, fullgraph=not has_uncompiled(policy.module))
    for index, block in enumerate(blocks_of(policy.module, "torch_compile")):
        block.forward = partial(_compiled, block, index, run)  # type: ignore[method-assign]


def _compiled(block: nn.Module, index: int, run: Callable, *args: Any, **kw: Any) -> Any:
    if torch.is_grad_enabled():
        return _run(block, args, kw)
    past = kw.get(CACHE)
    if past is None:
        return run(block, args, kw)
    layer = past.layers[index]
    if type(layer) is not DynamicLayer:
        raise ValueError(f"torch_compile=True: block {index} keeps its keys in a {type(layer).__name__}; leave it off")
    own = _OwnKeysAndValues(*((layer.keys, layer.values) if layer.is_initialized else (None, None)))
    states = run(block, args, kw | {CACHE: own})
    if not layer.is_initialized:
        layer.lazy_initialization(own.keys, own.values)
    layer.keys, layer.values = own.keys, own.values
    return states


@no_type_check  # torch.compile cannot trace the tests' type checks
def _run(block: nn.Module, args: tuple, kw: dict) -> Any:
    return type(block).forward(block, *args, **kw)


class _OwnKeysAndValues:
    """One block's keys and values, in place of transformers' cache of all blocks.

    A graph that read the block's number could serve only that block.
    """

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.keys: Any = keys
        self.values: Any = values

    @no_type_check
    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys = keys.to(values.dtype)  # as `KeysAndValues`
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=-2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=-2)
        return self.keys, self.values
