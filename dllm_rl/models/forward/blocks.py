"""A module's blocks: recomputed in the backward, or compiled."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, no_type_check

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from dllm_rl.models.base import CACHE, Module, Policy
from dllm_rl.models.lora import LoraLinear

MAX_BLOCKS = 64  # of a forward that is one graph: compiling one takes some seconds for each block


def backbone_of(module: Module) -> Any:
    """Return a stock module without its heads, or any other module itself."""
    return getattr(module, "base_model", module)


def blocks_of(module: Module, option: str = "gradient_checkpointing") -> list[nn.Module]:
    """Return the blocks of a module: the members of the backbone's outermost lists of layers.

    Raise ValueError if there are none. Its message names the `option` that needs them.
    """
    backbone = backbone_of(module)
    blocks: list[nn.Module] = []
    for name, layers in backbone.named_modules():
        # A list inside a block, such as a list of experts, has the block's number in its name.
        if isinstance(layers, nn.ModuleList) and not re.search(r"(^|\.)\d+(\.|$)", name):
            blocks += layers
    if not blocks:
        raise ValueError(f"{option}=True: {type(module).__name__} has no list of blocks; leave it off")
    return blocks


@contextmanager
def recomputed_blocks(module: Module) -> Iterator[None]:
    """In this context, use gradient checkpointing: each forward stores only the inputs of the module's blocks.

    The backward, in the context or later, runs each block again with the same dropout masks. With deterministic
    kernels, the gradients are then bit-identical.
    """
    # transformers' gradient checkpointing has no effect in eval mode, in which policies stay, and in some families.
    blocks = blocks_of(module)
    compiled_forwards = [vars(block).get("forward") for block in blocks]  # of `compile_blocks`
    for block in blocks:
        block.forward = partial(_checkpointed, block.forward, block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in zip(blocks, compiled_forwards, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward  # type: ignore[method-assign]


def _checkpointed(forward: Callable, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a block with torch's checkpoint, so that its recomputation has the same dropout masks and function modes."""
    adapters = [layer for layer in block.modules() if isinstance(layer, LoraLinear)]
    first_calls = [layer.calls for layer in adapters]
    modes = _get_current_function_mode_stack()

    def run(*args: Any, **kwargs: Any) -> Any:
        current_calls = [layer.calls for layer in adapters]
        _set_calls(adapters, first_calls)  # so that the recomputation draws the same dropout masks
        try:
            with ExitStack() as entered_modes:  # such as `Routing`: a backward runs outside of them
                for mode in modes[len(_get_current_function_mode_stack()) :]:
                    entered_modes.enter_context(mode)
                return forward(*args, **kwargs)
        finally:  # torch may stop the recomputation early, by an exception
            _set_calls(adapters, map(max, (layer.calls for layer in adapters), current_calls))

    # No block draws from torch's global generator, so its state is not stored.
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _set_calls(adapters: list[LoraLinear], calls: Iterable[int]) -> None:
    for layer, count in zip(adapters, calls, strict=True):
        layer.calls = count


def has_uncompiled(module: Module) -> bool:
    """Return whether some layers always run outside of compiled graphs, such as quantized experts."""
    return any(getattr(layer.forward, "_torchdynamo_disable", False) for layer in module.modules())


def compile_blocks(policy: Policy) -> None:
    """Compile the policy's forwards in place, at the first one. Raise ValueError for a module without blocks.

    A forward of a family that the library knows, through at most MAX_BLOCKS blocks, is one graph, so that the host
    checks and starts one graph and not one for each block. Other forwards have a graph for each block: those of deeper
    modules, of custom policies and encodes, and of quantized experts, which run eagerly between two graphs. A graph
    serves all shapes, except that the first forward of a cache, and a batch or a width of 1, have separate ones. What
    cannot be compiled to one graph raises torch's error. Results differ from eager ones by rounding. Forwards with
    gradients are not compiled.
    """
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)  # at most 12 were observed
    blocks, splits = blocks_of(policy.module, "torch_compile"), has_uncompiled(policy.module)
    if getattr(policy, "library_spec", None) is policy.spec and len(blocks) <= MAX_BLOCKS and not splits:
        policy.compiled = torch.compile(_encode, dynamic=True, fullgraph=True)  # type: ignore[attr-defined]
        return
    run = torch.compile(_forward_block, dynamic=True, fullgraph=not splits)
    for index, block in enumerate(blocks):
        block.forward = partial(_compiled, block, index, run)  # type: ignore[method-assign]


def compiled_encode(policy: Any, *inputs: Tensor, cache: Any = None, **options: Any) -> Tensor:
    """Return what `policy.spec.encode` does, by a compiled graph, whose inputs and outputs are the cache's tensors."""
    past = None
    if cache is not None:
        for index, layer in enumerate(getattr(cache, "layers", ())):
            _check_cache_layer(layer, index)
        past = cache.tensors()
    states, past = policy.compiled(policy.spec, policy.module, inputs, past, options)
    if cache is not None:
        cache.set_tensors(past)
    return states


@no_type_check  # torch.compile cannot trace the tests' type checks
def _encode(spec, module, inputs, past, options):
    if past is None:
        return spec.encode(module, *inputs, **options), None
    cache = spec.new_cache(module)
    if past:
        cache.set_tensors(past)
    states = spec.encode(module, *inputs, cache=cache, **options)
    return states, cache.tensors()


def _check_cache_layer(layer: Any, index: int) -> None:
    """Raise ValueError for a layer of a cache that stores more than its keys and values, such as a sliding window."""
    from transformers.cache_utils import DynamicLayer  # not at the top: --help needs no transformers

    if type(layer) is not DynamicLayer:
        raise ValueError(f"torch_compile=True: block {index} stores its keys in a {type(layer).__name__}; leave it off")


def _compiled(block: nn.Module, index: int, run: Callable, *args: Any, **kw: Any) -> Any:
    """Run a block by the compiled function `run`, or eagerly if gradients are needed."""
    if torch.is_grad_enabled():
        return _forward_block(block, args, kw)
    past = kw.get(CACHE)
    if past is None:
        return run(block, args, kw)
    layer = past.layers[index] if hasattr(past, "layers") else past
    _check_cache_layer(layer, index)
    block_cache = _BlockCache(*((layer.keys, layer.values) if layer.is_initialized else (None, None)))
    states = run(block, args, kw | {CACHE: block_cache})
    if not layer.is_initialized:
        layer.lazy_initialization(block_cache.keys, block_cache.values)
    layer.keys, layer.values = block_cache.keys, block_cache.values
    return states


@no_type_check  # torch.compile cannot trace the tests' type checks
def _forward_block(block: nn.Module, args: tuple, kw: dict) -> Any:
    return type(block).forward(block, *args, **kw)


class _BlockCache:
    """The keys and values of one block, in place of transformers' cache of all blocks.

    With transformers' cache, a graph would depend on the block's index, and could not be shared by all blocks.
    """

    def __init__(self, keys: Tensor | None, values: Tensor | None) -> None:
        self.keys: Any = keys
        self.values: Any = values

    @no_type_check
    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys = keys.to(values.dtype)  # as in `models.kv_cache.KVCache`
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=-2)
        self.values = values if self.values is None else torch.cat([self.values, values], dim=-2)
        return self.keys, self.values
