"""A step's memory, measured on fake tensors with CPU kernels: live storages, without the kernels' workspaces and
rounding.
"""

import copy
import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Categorical
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_rl.algorithms.optimizers import adamw_8bit
from dllm_rl.diagnostics.batch_invariance import GROUPED
from dllm_rl.members import function_of
from dllm_rl.models.base import Module, Policy, position_ids, trainable_parameters
from dllm_rl.models.denoiser import Prefix, backward_through, conditioning
from dllm_rl.models.forward.blocks import backbone_of, blocks_of
from dllm_rl.models.logprobs import (
    TokenLogprob,
    backward_token_logprobs,
    chunk_rows,
    invert_cdf,
    token_logprobs,
)
from dllm_rl.models.merge import merged_tensors
from dllm_rl.recipe import Recipe
from dllm_rl.samplers import renoise
from dllm_rl.samplers.choose import draw_tokens
from dllm_rl.training.learner import can_retain_graphs
from dllm_rl.types import SamplingParams

ONE_VIEW = ("one_step", "causal")  # estimators that score the batch in one view
NF4 = 9 / 16  # bytes per weight: half a byte, and an fp32 scale per 64 weights


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that were made in the block: the current number and the peak."""

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
        # Views share a storage, which is live as long as any of the views.
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    @contextmanager
    def measured(self, into: dict[str, int], name: str, *, peak: bool = False) -> Iterator[None]:
        """Write under `name` how many more bytes are live after the block than before it, or with `peak` the peak
        inside it.
        """
        before = self.peak = self.now
        yield
        into[name] = self.peak if peak else self.now - before


@dataclass(frozen=True)
class Memory:
    """Bytes of a step."""

    held: dict[str, int]  # persistent tensors, by part
    peaks: dict[str, int]  # largest live bytes in a stage, `held` included

    @property
    def peak(self) -> int:
        return max(self.peaks.values())


class Packed(nn.Linear):
    """A frozen layer whose weight is stored in few bits, and unpacked for each product and its backward."""

    def __init__(self, layer: nn.Linear, bytes_per_weight: float, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.bias = layer.bias
        self.codes = torch.empty(int(layer.weight.numel() * bytes_per_weight), dtype=torch.uint8)
        self.shape = layer.weight.shape
        self.dtype = dtype

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
    """Computes products of stacked experts outside bf16 (torch 2.13 has no shapes for them) as the product of one
    expert, which needs the same memory.
    """

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in GROUPED and args[0].dtype != torch.bfloat16:
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


def measure_step(
    recipe: Recipe,
    policy: Policy,  # with the adapters; its module is on the meta device, or its weights are not used
    *,
    prompt_tokens: int,
    dtype: torch.dtype | None,  # of the weights; None: unchanged
    rollout_copy: int,  # bytes of the quantized copy
    on_gpu: bool = True,  # the optimizer's step is one fused kernel; the policy's device decides the head's chunks
) -> Memory:
    """Run one step of the recipe on fake tensors: first its persistent tensors, then its stages."""
    held: dict[str, int] = {}
    peaks: dict[str, int] = {}
    policy = copy.copy(policy)
    module = copy.deepcopy(policy.module)
    with FakeTensorMode(allow_non_fake_inputs=True), GroupedShapes(), LiveBytes() as live:
        with live.measured(held, "weights"):
            policy.module = forget_data(module, dtype, recipe.base_quantization)
        trained = trainable_parameters(policy.module)
        if recipe.lora is not None:
            held["adapters"] = sum(p.nbytes for p in trained)
            held["weights"] -= held["adapters"]
        alive: list[object] = []
        for name, make in (
            ("reference", partial(reference_tensors, recipe, policy)),
            ("rollout copy", partial(torch.empty, rollout_copy, dtype=torch.uint8)),
            ("gradients", partial(make_gradients, trained)),
        ):
            with live.measured(held, name):
                alive.append(make())
        with live.measured(held, "optimizer"), live.measured(peaks, "optimizer step", peak=True):
            alive.append(step_optimizer(recipe, trained, on_gpu=on_gpu))
        step = FakeStep(recipe, policy, prompt_tokens)
        for name, stage in (
            ("rollout", step.rollout),
            ("scoring", step.score),
            ("update", step.update),
            ("sync or save", step.merge),
        ):
            with live.measured(peaks, name, peak=True):
                stage()
        del alive
    return Memory({name: size for name, size in held.items() if size}, peaks)


def reference_tensors(recipe: Recipe, policy: Policy) -> list[Tensor]:
    """Return the weights of the run's reference. With adapters the reference is the base, which is counted already."""
    needed = recipe.needs_reference_policy and recipe.lora is None
    return [torch.empty_like(p) for p in policy.module.parameters()] if needed else []


def make_gradients(trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)


class FakeStep:
    """The stages of a recipe's step on the policy's fake tensors, while the gradients of the previous step are in
    memory.
    """

    def __init__(self, recipe: Recipe, policy: Policy, prompt_tokens: int) -> None:
        self.recipe = recipe
        if policy.spec.attention == "encoder_decoder":  # its decoder reads the mask, which is fake
            policy = copy.copy(policy)
            policy.spec = replace(policy.spec, encode=partial(without_mask, policy.spec.encode))
        self.policy = policy
        self.prompt_tokens = prompt_tokens
        self.rows = recipe.train_batch_size * recipe.num_generations
        self.micro_rows = min(recipe.micro_batch_size or self.rows, self.rows)
        self.graphs = most_graphs(recipe, policy, rows=self.rows)
        self.kept: list[Tensor] = []  # log-probs of scoring, with their graphs
        self.sampler: dict[str, Any] = getattr(recipe.sampler, "keywords", {})
        mask_id = policy.spec.mask_id
        suppress = (*self.sampler.get("suppress", ()), *([] if mask_id is None else [mask_id]))
        named = {name: self.sampler[name] for name in ("temperature", "top_k", "top_p") if name in self.sampler}
        self.params = SamplingParams(**named, suppress=suppress)

    def autocast(self) -> torch.autocast:
        # As in training, autocast caches its copies of the weights, except of sharded ones.
        cached = self.recipe.shard_size == 1
        return torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16, cache_enabled=cached)

    @torch.no_grad()
    def rollout(self) -> None:
        """Run the widest part of a rollout: the forward of all rows and the draw in a block, with a cache if the
        sampler has one.
        """
        rows = min(self.recipe.rollout_batch_size or self.rows, self.rows)
        length = self.recipe.max_new_tokens
        spec = self.policy.spec
        with self.autocast():
            if spec.attention == "encoder_decoder":
                self.renoise(rows)
                return
            cache = self.cache(rows)
            if spec.attention == "causal":  # the widest part is the prompts' forward, one per group
                tokens, mask = batch_of(rows // self.recipe.num_generations, self.prompt_tokens)
                token_logprobs(self.policy, self.policy.hidden(tokens, mask)[:, -1], tokens[:, -1], self.params)
                return
            states = self.policy.hidden(*batch_of(rows, self.prompt_tokens + length))
            begin = self.prompt_tokens if length else 0
            block = self.sampler.get("block_size") or spec.block_size or length or self.prompt_tokens
            states = two_chunks(self.policy, states[:, begin : begin + block].flatten(0, 1))
            draw_tokens(self.policy, states, torch.zeros(len(states), dtype=torch.float64), self.params)
            del cache

    def cache(self, rows: int) -> Tensor | None:
        config = getattr(self.policy.module, "config", None)
        causal = self.policy.spec.attention == "causal"
        if config is None or not (causal or self.sampler.get("cache") is not None):
            return None
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        columns = self.prompt_tokens + self.recipe.max_new_tokens
        shape = (2, config.num_hidden_layers, rows, heads, columns, size)
        return torch.empty(shape, dtype=next(self.policy.module.parameters()).dtype)

    def renoise(self, rows: int) -> None:
        """Run the widest step of `renoise`: a step of the last canvas, after all others."""
        prefix = Prefix.empty(self.policy, rows)
        self.read(prefix, rows, self.prompt_tokens + self.recipe.max_new_tokens - self.canvas)
        logits, before = self.step_logits(prefix, rows)
        flat = logits.flatten(0, 1)
        invert_cdf(flat.softmax(-1), torch.zeros(len(flat), dtype=torch.float64))
        TokenLogprob.apply(flat, torch.zeros(len(flat), dtype=torch.long))
        Categorical(logits=logits, validate_args=False).entropy()  # fake tensors have no values to check
        del before

    def replay(self, rows: int, *, back: bool = False) -> list[Tensor]:
        """Compute the log-probs of `renoise`'s steps as scoring does: of all steps with retained graphs, or of the last
        step.

        With `back`, the gradient of a step goes to the cache immediately, and then to the encoder, as in
        `likelihoods.renoise.RenoiseView.backward`.
        """
        prefix = Prefix.empty(self.policy, rows)
        cuts = []
        found = []
        for canvas in range(self.recipe.max_new_tokens // self.canvas):
            self.read(prefix, rows, self.canvas if canvas else self.prompt_tokens)
            if back:
                cuts.append(prefix.detach_cache())
        for _ in range(max(1, self.graphs)):
            logits, before = self.step_logits(prefix, rows)
            flat = logits.flatten(0, 1)
            found.append(TokenLogprob.apply(flat, torch.zeros(len(flat), dtype=torch.long)))
        if back:
            found.pop().sum().backward()
            del logits, before, flat
            backward_through(cuts)
        return found

    @property
    def canvas(self) -> int:
        assert self.policy.spec.block_size is not None, "`check_spec` asks for it"
        return self.policy.spec.block_size

    def read(self, prefix: Prefix, rows: int, columns: int) -> None:
        tokens, mask = batch_of(rows, columns)
        prefix.mask = prefix.mask.cpu()  # all kernels run on the CPU
        prefix.read(self.policy, tokens, mask)

    def step_logits(self, prefix: Prefix, rows: int) -> tuple[Tensor, Tensor]:
        """Return the logits of a step, and of the step before, which the step sees."""
        before = conditioning(self.policy, torch.zeros(rows, self.canvas, self.policy.vocab_size))
        return prefix.logits(self.policy, batch_of(rows, self.canvas)[0], before, temperature=1.0), before

    def score(self) -> None:
        """With retained graphs, run all of their forwards; otherwise one forward, and the part of the head that is live
        at a time.
        """
        with torch.set_grad_enabled(self.graphs > 0), self.autocast():
            if self.policy.spec.attention == "encoder_decoder":
                found = self.replay(self.micro_rows)
                self.kept += found if self.graphs else []
                return
            for _ in range(self.graphs):
                self.kept.append(self.logprobs(self.states()))
            if not self.graphs:
                self.logprobs(two_chunks(self.policy, self.states()))

    def update(self) -> None:
        if self.graphs or (self.micro_rows >= self.rows and self.recipe.likelihood.name in ONE_VIEW):
            # The update's only backward: there are no gradients of another micro-batch or view.
            self.policy.module.zero_grad(set_to_none=True)
        with self.autocast():
            if self.graphs:
                torch.cat(self.kept).sum().backward()
                self.kept.clear()
                return
            if self.policy.spec.attention == "encoder_decoder":
                self.replay(self.micro_rows, back=True)
                return
            states = self.states()
            tokens = torch.zeros(len(states), dtype=torch.long)
            backward_token_logprobs(self.policy, states, tokens, self.params, torch.ones(len(states)))

    @torch.no_grad()
    def merge(self) -> None:
        """Merge adapters one layer at a time, as the sync and a save do."""
        for _ in merged_tensors(self.policy.module):
            pass

    def states(self) -> Tensor:
        """Return the states (K, D) at all completion positions of a view; without a completion, at all prompt
        positions.
        """
        length = self.recipe.max_new_tokens
        packed = self.recipe.likelihood.block_size is not None  # clean and noisy columns share one forward
        tokens, mask = batch_of(self.micro_rows, self.prompt_tokens + length * (1 + packed))
        scored = length or self.prompt_tokens
        if not packed:
            return self.policy.hidden(tokens, mask)[:, -scored:].flatten(0, 1)
        whole = mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1).clone()
        return self.policy.encode(tokens, whole, position_ids(mask))[:, -scored:].flatten(0, 1)

    def logprobs(self, states: Tensor) -> Tensor:
        return token_logprobs(self.policy, states, torch.zeros(len(states), dtype=torch.long), self.params)


def shard_memory(memory: Memory, module: Module, size: int) -> Memory:
    """Return the memory per process of a learner that is sharded over `size` processes, from the memory of an unsharded
    learner.
    """
    held = {name: -(-value // size) for name, value in memory.held.items()}
    if "rollout copy" in held:  # the only part that is not sharded
        held["rollout copy"] = memory.held["rollout copy"]
    before = sum(memory.held.values())
    now = sum(held.values())
    numbers = [p.numel() for name, p in module.named_parameters() if ".lora_" not in name]
    each = memory.held["weights"] / sum(numbers)
    blocks = blocks_of(module, "shard_size")

    def units(trained: bool) -> tuple[float, float, float]:
        def size_of(part: Module) -> float:
            return each * sum(p.numel() for p in part.parameters() if p.requires_grad or not trained)

        inside = size_of(backbone_of(module))
        return max(map(size_of, blocks)), inside - sum(map(size_of, blocks)), size_of(module) - inside

    block, rest, head = units(False)
    block_grad, rest_grad, head_grad = units(True)
    scoring = 2 * block + rest + head  # unsharded: two blocks (the next is fetched), the backbone's rest, the head
    # The update also has their gradients: twice while they are summed, except the head's gradients.
    extra = {"scoring": scoring, "update": scoring + 2 * (block_grad + rest_grad) + head_grad}
    extra["sync or save"] = each * max(numbers)  # the largest tensor
    peaks = {}
    for name, peak in memory.peaks.items():
        share = (peak - before) / size if name == "optimizer step" else peak - before
        peaks[name] = int(now + share + extra.get(name, 0))
    return Memory(held, peaks)


def forget_data(module: Module, dtype: torch.dtype | None, quantization: str | None) -> Module:
    """Return the module with empty tensors: floating weights in `dtype`, linear layers of a quantized base packed."""
    new: dict[int, Tensor] = {}

    def empty(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        if id(tensor) not in new:  # tied weights stay one tensor
            fresh = torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            new[id(tensor)] = nn.Parameter(fresh, requires_grad=tensor.requires_grad) if is_parameter else fresh
        return new[id(tensor)]

    for path, layer in list(module.named_modules()):
        if quantization and ".layers." in path and isinstance(layer, nn.Linear) and ".lora_" not in path:
            packed = Packed(layer, NF4 if quantization == "nf4" else 1, dtype or layer.weight.dtype)
            module.set_submodule(path, packed)
            continue
        own = None if ".lora_" in path else dtype  # adapters stay in fp32
        for tensors, kind in ((layer._parameters, own), (layer._buffers, None)):
            tensors |= {name: empty(tensor, kind) for name, tensor in tensors.items() if tensor is not None}
    return module


def most_graphs(recipe: Recipe, policy: Policy, *, rows: int) -> int:
    """Return how many of scoring's graphs `max_retained_graphs` retains. An estimator of unknown views has as many as
    fit.
    """
    chunks = math.ceil(rows / (recipe.micro_batch_size or rows))
    views = 1 if recipe.likelihood.name in ONE_VIEW else recipe.max_retained_graphs // chunks
    if policy.spec.attention == "encoder_decoder":
        views = renoising_steps(recipe, policy)
    return views * chunks if views and can_retain_graphs(recipe, policy, num_forwards=views, rows=rows) else 0


def renoising_steps(recipe: Recipe, policy: Policy) -> int:
    """Return the largest number of steps of all canvases of a completion: a canvas may end earlier."""
    named = getattr(recipe.sampler, "keywords", {}).get("diffusion_steps")
    steps = named or inspect.signature(renoise).parameters["diffusion_steps"].default
    return steps * (recipe.max_new_tokens // (policy.spec.block_size or recipe.max_new_tokens))


def two_chunks(policy: Policy, states: Tensor) -> Tensor:
    """Return as many rows as the head processes in two chunks: a third chunk needs no more memory than the second."""
    return states[: 2 * chunk_rows(policy.vocab_size, policy.device)]


def without_mask(
    encode: Callable, module: Module, tokens: Tensor, mask: Tensor, *positions: Tensor, **kwargs: object
) -> Tensor:
    return encode(module, tokens, None, *positions, **kwargs)


def batch_of(rows: int, width: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, width, dtype=torch.long), torch.ones(rows, width, dtype=torch.bool)


def step_optimizer(recipe: Recipe, trained: list[nn.Parameter], *, on_gpu: bool) -> object:
    """Clip and step as `update` does; return the objects that contain the optimizer's state."""
    torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
    # Its kernel needs real addresses. It uses two bytes per weight, and a scale for each 256 values.
    if function_of(recipe.optim) is adamw_8bit:
        return [torch.empty(2 * p.numel() + p.numel() // 32, dtype=torch.uint8) for p in trained]
    optimizer = recipe.optim(trained, lr=1e-6, betas=(recipe.adam_beta1, recipe.adam_beta2), weight_decay=0.0)
    for group in optimizer.param_groups:
        if on_gpu and "fused" in group:
            group["fused"] = True
    optimizer.step()
    return optimizer
