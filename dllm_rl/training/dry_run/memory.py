"""A step's memory, measured without weights or a GPU: the model runs on fake tensors, and live storages are counted.

Measured with CPU kernels and fused attention; kernel workspaces and allocator rounding are not included.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_rl.algorithms.optimizers import adamw_8bit
from dllm_rl.diagnostics.batch_invariance import GROUPED
from dllm_rl.models.adapters.merge import merged_state
from dllm_rl.models.base import Module, Policy, position_ids
from dllm_rl.models.forward.recompute import backbone_of, blocks_of
from dllm_rl.models.logprobs import backward_token_logprobs, chunk_rows, token_logprobs
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.propose import propose
from dllm_rl.training.scorer import keeps_graphs
from dllm_rl.types import SamplingParams

ONE_VIEW = ("one_step", "causal")  # estimators that score the batch in one view
NF4 = 9 / 16  # bytes a weight: half of one, and an fp32 scale per 64


class LiveBytes(TorchDispatchMode):
    """Bytes of the live storages that were made in the block: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    @contextmanager
    def measured(self, into: dict[str, int], name: str, *, peak: bool = False) -> Iterator[None]:
        """Write under `name` how many more bytes are held after the block than before, or the most held inside it."""
        before, self.peak = self.now, self.now
        yield
        into[name] = self.peak if peak else self.now - before


@dataclass(frozen=True)
class Memory:
    """Bytes. held: kept from step to step, by part. peaks: the most alive in a stage, `held` included."""

    held: dict[str, int]
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


class Packed(nn.Linear):
    """A frozen layer whose weight is held in few bits, and unpacked for each product and its backward."""

    def __init__(self, layer: nn.Linear, bytes_per_weight: float, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.codes = torch.empty(int(layer.weight.numel() * bytes_per_weight), dtype=torch.uint8)
        self.shape, self.dtype = layer.weight.shape, dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.empty(self.shape, dtype=self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _PackedProduct.apply(x, self)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Packed) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.weight.to(gradients[0].dtype), None


class GroupedShapes(TorchFunctionMode):
    """Products of stacked experts outside bf16 (torch 2.13 has no shapes for them) as one expert's: the same memory."""

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in GROUPED and args[0].dtype != torch.bfloat16:
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


def measure_step(
    recipe: Recipe,
    policy: Policy,
    *,
    prompt_tokens: int,
    dtype: torch.dtype | None,
    rollout_copy: int,
    on_gpu: bool = True,
) -> Memory:
    """One step of the recipe on fake tensors: optimiser, update, sync, rollout, scoring.

    policy        with the recipe's adapters, and a module on the meta device or with weights to forget.
    dtype         of its weights; None: as they are. rollout_copy: bytes of the quantised copy.
    on_gpu        the optimiser's step is one fused kernel. (The head's chunks are those of the policy's device.)

    Gradients of an earlier micro-batch or view are present, unless the batch is one of each.
    """
    all_rows = recipe.train_batch_size * recipe.num_generations
    micro, rollout_rows = recipe.micro_batch_size or all_rows, recipe.rollout_batch_size or all_rows
    held: dict[str, int] = {}
    peaks: dict[str, int] = {}
    policy, module = copy.copy(policy), copy.deepcopy(policy.module)
    cached = recipe.shard_size == 1  # as in training: autocast's copies of the weights
    autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16, cache_enabled=cached)  # noqa: E731
    with FakeTensorMode(allow_non_fake_inputs=True), GroupedShapes(), LiveBytes() as live:
        with live.measured(held, "weights"):
            policy.module = forget_data(module, dtype, recipe.base_quantization)
        trained = [p for p in policy.module.parameters() if p.requires_grad]
        if recipe.lora is not None:
            held["adapters"] = sum(p.nbytes for p in trained)
            held["weights"] -= held["adapters"]
        beside = []
        if recipe.beta and recipe.lora is None:
            with live.measured(held, "reference"):
                beside += [torch.empty_like(p) for p in policy.module.parameters()]
        if rollout_copy:
            with live.measured(held, "rollout copy"):
                beside.append(torch.empty(rollout_copy, dtype=torch.uint8))
        with live.measured(held, "gradients"):
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
        with live.measured(held, "optimiser"), live.measured(peaks, "optimiser step", peak=True):
            optimizer = step_optimizer(recipe, trained, on_gpu=on_gpu)
        params, graphs, kept = sampling_params(recipe, policy), most_graphs(recipe, policy, rows=all_rows), []
        if graphs:  # beside the gradients of the step before
            with autocast(), live.measured(peaks, "scoring", peak=True):
                kept = [view_logprobs(recipe, policy, micro, prompt_tokens, params) for _ in range(graphs)]
        if micro >= all_rows and recipe.likelihood.name in ONE_VIEW:
            for parameter in trained:
                parameter.grad = None
        with autocast(), live.measured(peaks, "update", peak=True):
            if graphs:
                torch.cat(kept).sum().backward()
                kept.clear()
            else:
                states = view_states(recipe, policy, micro, prompt_tokens)
                tokens = torch.zeros(len(states), dtype=torch.long)
                backward_token_logprobs(policy, states, tokens, params, torch.ones(len(states)))
                del states, tokens
        with live.measured(peaks, "sync or save", peak=True), torch.no_grad():
            for _ in merged_state(policy.module):
                pass
        with live.measured(peaks, "rollout", peak=True), torch.no_grad(), autocast():
            sample_step(recipe, policy, rollout_rows, prompt_tokens, params)
        if not graphs:
            with live.measured(peaks, "scoring", peak=True), torch.no_grad(), autocast():
                states = two_chunks(policy, view_states(recipe, policy, micro, prompt_tokens))
                token_logprobs(policy, states, torch.zeros(len(states), dtype=torch.long), params)
                del states
        del optimizer, beside
    order = ("weights", "adapters", "gradients", "optimiser", "reference", "rollout copy")
    return Memory({name: held[name] for name in order if held.get(name)}, peaks)


def shared_out(memory: Memory, module: Module, size: int) -> Memory:
    """The memory per process of a learner sharded over `size` processes, from the memory of one alone.

    Unsharded are the rollout's copy and, in turn, two blocks (the next is fetched), the backbone's other weights and
    the head; in the update also their gradients, twice while summed except the head's; in the sync the largest tensor.
    """
    held = {name: value if name == "rollout copy" else -(-value // size) for name, value in memory.held.items()}
    before, now = sum(memory.held.values()), sum(held.values())
    numbers = [p.numel() for name, p in module.named_parameters() if ".lora_" not in name]
    each, blocks = memory.held["weights"] / sum(numbers), blocks_of(module, "shard_size")

    def units(trained: bool) -> tuple[float, float, float]:
        def size_of(part: Module) -> float:
            return each * sum(p.numel() for p in part.parameters() if p.requires_grad or not trained)

        inside = size_of(backbone_of(module))
        return max(map(size_of, blocks)), inside - sum(map(size_of, blocks)), size_of(module) - inside

    (block, rest, head), (block_grad, rest_grad, head_grad) = units(False), units(True)
    scoring = 2 * block + rest + head
    extra = {"scoring": scoring, "update": scoring + 2 * (block_grad + rest_grad) + head_grad}
    extra["sync or save"] = each * max(numbers)
    peaks = {
        name: int(now + (peak - before) / (size if name == "optimiser step" else 1) + extra.get(name, 0))
        for name, peak in memory.peaks.items()
    }
    return Memory(held, peaks)


def forget_data(module: Module, dtype: torch.dtype | None, quantization: str | None) -> Module:
    """The module with empty tensors: floating weights in `dtype`, linear layers of a quantised base in few bits."""
    new: dict[int, Tensor] = {}

    def empty(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        if id(tensor) not in new:
            fresh = torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            new[id(tensor)] = nn.Parameter(fresh, requires_grad=tensor.requires_grad) if is_parameter else fresh
        return new[id(tensor)]

    for path, layer in list(module.named_modules()):
        if quantization and ".layers." in path and isinstance(layer, nn.Linear) and ".lora_" not in path:
            packed = Packed(layer, NF4 if quantization == "nf4" else 1, dtype or layer.weight.dtype)
            module.set_submodule(path, packed)
            continue
        own = None if ".lora_" in path else dtype
        for tensors, kind in ((layer._parameters, own), (layer._buffers, None)):
            tensors |= {name: empty(tensor, kind) for name, tensor in tensors.items() if tensor is not None}
    return module


def sampling_params(recipe: Recipe, policy: Policy) -> SamplingParams:
    """The sampler's temperature and filters, and the mask token, which is never sampled."""
    given, mask_id = getattr(recipe.sampler, "keywords", {}), policy.spec.mask_id
    suppress = (*given.get("suppress", ()), *([] if mask_id is None else [mask_id]))
    named = {name: given[name] for name in ("temperature", "top_k", "top_p") if name in given}
    return SamplingParams(**named, suppress=suppress)


def view_states(recipe: Recipe, policy: Policy, rows: int, prompt_tokens: int) -> Tensor:
    """The states (K, D) at all completion positions of a view; without a completion, at all prompt positions."""
    length = recipe.max_new_tokens
    packed = recipe.likelihood.packed is not None
    tokens, mask = batch_of(rows, prompt_tokens + length * (1 + packed))
    scored = length or prompt_tokens
    if not packed:
        return policy.hidden(tokens, mask)[:, -scored:].flatten(0, 1)
    whole = mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1).clone()
    return policy.encode(tokens, whole, position_ids(mask))[:, -scored:].flatten(0, 1)


def most_graphs(recipe: Recipe, policy: Policy, *, rows: int) -> int:
    """How many of scoring's graphs `kept_graphs` keeps; an estimator of unknown views takes as many as fit."""
    chunks = math.ceil(rows / (recipe.micro_batch_size or rows))
    views = 1 if recipe.likelihood.name in ONE_VIEW else recipe.kept_graphs // chunks
    return views * chunks if views and keeps_graphs(recipe, policy, views=views, rows=rows) else 0


def view_logprobs(recipe: Recipe, policy: Policy, rows: int, prompt_tokens: int, params: SamplingParams) -> Tensor:
    """The log-probs of a view's states, with their graph."""
    states = view_states(recipe, policy, rows, prompt_tokens)
    return token_logprobs(policy, states, torch.zeros(len(states), dtype=torch.long), params)


def two_chunks(policy: Policy, states: Tensor) -> Tensor:
    """As many rows as the head takes in two chunks: a third chunk holds no more memory than the second."""
    return states[: 2 * chunk_rows(policy.vocab_size, policy.device)]


def batch_of(rows: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, width, dtype=torch.long), torch.ones(rows, width, dtype=torch.bool)


def sample_step(recipe: Recipe, policy: Policy, rows: int, prompt_tokens: int, params: SamplingParams) -> None:
    """The widest step of a rollout: the forward of all rows and the draw in a block, with keys and values if cached."""
    length, given, spec = recipe.max_new_tokens, getattr(recipe.sampler, "keywords", {}), policy.spec
    causal = spec.attention == "causal"
    cache = None
    config = getattr(policy.module, "config", None)
    if config is not None and (causal or given.get("cache") is not None):
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (2, config.num_hidden_layers, rows, heads, prompt_tokens + length, size)
        cache = torch.empty(shape, dtype=next(policy.module.parameters()).dtype)
    width = prompt_tokens + (0 if causal else length)
    tokens, mask = batch_of(rows // recipe.num_generations if causal else rows, width)
    states = policy.hidden(tokens, mask)
    if causal:
        token_logprobs(policy, states[:, -1], tokens[:, -1], params)
        return
    block, begin = given.get("block_size") or spec.block_size or length or prompt_tokens, prompt_tokens if length else 0
    states = two_chunks(policy, states[:, begin : begin + block].flatten(0, 1))
    propose(policy, states, torch.zeros(len(states), dtype=torch.float64), params)
    del cache


def step_optimizer(recipe: Recipe, trained: list[nn.Parameter], *, on_gpu: bool) -> object:
    """Clip and step as `update` does; returns what holds the optimiser's state."""
    torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
    if recipe.optim is adamw_8bit:  # its kernel wants addresses: two bytes a weight, a scale for each 256 of either
        return [torch.empty(2 * p.numel() + p.numel() // 32, dtype=torch.uint8) for p in trained]
    optimizer = recipe.optim(trained, lr=1e-6, betas=(recipe.adam_beta1, recipe.adam_beta2), weight_decay=0.0)
    for group in optimizer.param_groups:
        if on_gpu and "fused" in group:
            group["fused"] = True
    optimizer.step()
    return optimizer
