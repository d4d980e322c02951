"""A step's memory, measured on fake tensors (which have no data) with CPU kernels. It is the size of the live storages;
the kernels' workspaces and the allocator's rounding are not counted.
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
NF4_BYTES = 9 / 16  # per weight: half a byte, and an fp32 scale per 64 weights


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages that were made in the block: current (`now`) and largest (`peak`) number."""

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
        # Tensor views share a storage, which is live as long as any of them.
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    @contextmanager
    def measured(self, sizes: dict[str, int], name: str, *, peak: bool = False) -> Iterator[None]:
        """Set `sizes[name]` to the number of bytes by which the block increases the live bytes, or, with `peak`, to the
        peak of all live bytes in the block.
        """
        before = self.peak = self.now
        yield
        sizes[name] = self.peak if peak else self.now - before


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs."""

    persistent: dict[str, int]  # tensors that are live in every stage, by kind
    peaks: dict[str, int]  # peak of each stage, including `persistent`

    @property
    def peak(self) -> int:
        """Return the largest of the stages' peaks."""
        return max(self.peaks.values())


class Packed(nn.Linear):
    """A frozen quantized layer, whose weight is dequantized for each product and for its backward."""

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
    """Replaces a product of stacked experts outside bf16, which torch 2.13 cannot run on fake tensors, by the product
    of one expert, which needs the same memory.
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
    dtype: torch.dtype | None,  # dtype of the weights; None: unchanged
    rollout_copy: int,  # bytes of the rollout policy's copy
    on_gpu: bool = True,  # the optimizer is fused, as on a GPU; the chunks of the head depend on policy.device instead
) -> Memory:
    """Measure one step of the recipe on fake tensors: make its persistent tensors, then run its stages."""
    persistent: dict[str, int] = {}
    peaks: dict[str, int] = {}
    policy = copy.copy(policy)
    module = copy.deepcopy(policy.module)
    with FakeTensorMode(allow_non_fake_inputs=True), GroupedShapes(), LiveBytes() as live:
        with live.measured(persistent, "weights"):
            policy.module = forget_data(module, dtype, recipe.base_quantization)
        trained = trainable_parameters(policy.module)
        if recipe.lora is not None:
            persistent["adapters"] = sum(p.nbytes for p in trained)
            persistent["weights"] -= persistent["adapters"]
        alive: list[object] = []  # keeps the persistent tensors live during the stages
        for name, make in (
            ("reference", partial(reference_tensors, recipe, policy)),
            ("rollout copy", partial(torch.empty, rollout_copy, dtype=torch.uint8)),
            ("gradients", partial(make_gradients, trained)),
        ):
            with live.measured(persistent, name):
                alive.append(make())
        with live.measured(persistent, "optimizer"), live.measured(peaks, "optimizer step", peak=True):
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
    return Memory({name: size for name, size in persistent.items() if size}, peaks)


def reference_tensors(recipe: Recipe, policy: Policy) -> list[Tensor]:
    """Return the weights of the reference policy; [] with adapters, whose base model is the reference."""
    has_copy = recipe.needs_reference_policy and recipe.lora is None
    return [torch.empty_like(p) for p in policy.module.parameters()] if has_copy else []


def make_gradients(trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)


class FakeStep:
    """The stages of a recipe's step on the policy's fake tensors, while the gradients of the previous step are in
    memory.
    """

    def __init__(self, recipe: Recipe, policy: Policy, prompt_tokens: int) -> None:
        self.recipe = recipe
        if policy.spec.attention == "encoder_decoder":  # it would read the mask's values, which a fake tensor lacks
            policy = copy.copy(policy)
            policy.spec = replace(policy.spec, encode=partial(without_mask, policy.spec.encode))
        self.policy = policy
        self.prompt_tokens = prompt_tokens
        self.rows = recipe.train_batch_size * recipe.num_generations
        self.micro_rows = min(recipe.micro_batch_size or self.rows, self.rows)
        self.num_graphs = num_retained_graphs(recipe, policy, rows=self.rows)
        self.retained_logprobs: list[Tensor] = []  # of scoring, with their autograd graphs
        self.sampler_options: dict[str, Any] = getattr(recipe.sampler, "keywords", {})
        mask_id = policy.spec.mask_id
        suppress = (*self.sampler_options.get("suppress", ()), *([] if mask_id is None else [mask_id]))
        params = {
            name: self.sampler_options[name]
            for name in ("temperature", "top_k", "top_p")
            if name in self.sampler_options
        }
        self.sampling_params = SamplingParams(**params, suppress=suppress)

    def autocast(self) -> torch.autocast:
        # As in training, autocast caches its copies of the weights, except of sharded ones.
        cache_enabled = self.recipe.shard_size == 1
        return torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.bf16, cache_enabled=cache_enabled)

    @torch.no_grad()
    def rollout(self) -> None:
        """Run the part of a rollout that needs most memory: the forward of all rows, and the draw of a block's tokens,
        with a cache if the sampler has one.
        """
        rows = min(self.recipe.rollout_batch_size or self.rows, self.rows)
        length = self.recipe.max_new_tokens
        spec = self.policy.spec
        with self.autocast():
            if spec.attention == "encoder_decoder":
                self.renoise(rows)
                return
            cache = self.make_cache(rows)
            if spec.attention == "causal":  # the largest forward is that of the prompts, one per group
                tokens, mask = batch_of(rows // self.recipe.num_generations, self.prompt_tokens)
                token_logprobs(
                    self.policy, self.policy.hidden(tokens, mask)[:, -1], tokens[:, -1], self.sampling_params
                )
                return
            states = self.policy.hidden(*batch_of(rows, self.prompt_tokens + length))
            start = self.prompt_tokens if length else 0
            block_size = self.sampler_options.get("block_size") or spec.block_size or length or self.prompt_tokens
            states = first_two_chunks(self.policy, states[:, start : start + block_size].flatten(0, 1))
            draw_tokens(self.policy, states, torch.zeros(len(states), dtype=torch.float64), self.sampling_params)
            del cache

    def make_cache(self, rows: int) -> Tensor | None:
        """Return a tensor of the KV cache's size; None without a cache."""
        config = getattr(self.policy.module, "config", None)
        causal = self.policy.spec.attention == "causal"
        if config is None or not (causal or self.sampler_options.get("cache") is not None):
            return None
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        length = self.prompt_tokens + self.recipe.max_new_tokens
        shape = (2, config.num_hidden_layers, rows, num_heads, length, head_dim)
        return torch.empty(shape, dtype=next(self.policy.module.parameters()).dtype)

    def renoise(self, rows: int) -> None:
        """Run the step of `renoise` that needs most memory: a step of the last canvas, after all other canvases."""
        prefix = Prefix.empty(self.policy, rows)
        self.read(prefix, rows, self.prompt_tokens + self.recipe.max_new_tokens - self.canvas_length)
        logits, previous_logits = self.step_logits(prefix, rows)
        flat_logits = logits.flatten(0, 1)
        invert_cdf(flat_logits.softmax(-1), torch.zeros(len(flat_logits), dtype=torch.float64))
        TokenLogprob.apply(flat_logits, torch.zeros(len(flat_logits), dtype=torch.long))
        Categorical(logits=logits, validate_args=False).entropy()  # fake tensors have no values to check
        del previous_logits

    def replay(self, rows: int, *, backward: bool = False) -> list[Tensor]:
        """Compute the log-probs of `renoise`'s steps as scoring does: of all steps if their graphs are retained, else
        of the last step.

        With `backward`, run the backward of the step down to the cache, and then the backward of the encoder, as
        `likelihoods.renoise.RenoiseView.backward` does.
        """
        prefix = Prefix.empty(self.policy, rows)
        cuts = []  # where the backward of the steps stops
        logprobs = []
        for canvas in range(self.recipe.max_new_tokens // self.canvas_length):
            self.read(prefix, rows, self.canvas_length if canvas else self.prompt_tokens)
            if backward:
                cuts.append(prefix.detach_cache())
        for _ in range(max(1, self.num_graphs)):
            logits, previous_logits = self.step_logits(prefix, rows)
            flat_logits = logits.flatten(0, 1)
            logprobs.append(TokenLogprob.apply(flat_logits, torch.zeros(len(flat_logits), dtype=torch.long)))
        if backward:
            logprobs.pop().sum().backward()
            del logits, previous_logits, flat_logits
            backward_through(cuts)
        return logprobs

    @property
    def canvas_length(self) -> int:
        assert self.policy.spec.block_size is not None, "`check_spec` requires it"
        return self.policy.spec.block_size

    def read(self, prefix: Prefix, rows: int, length: int) -> None:
        """Run the encoder on `length` more tokens of each row."""
        tokens, mask = batch_of(rows, length)
        prefix.mask = prefix.mask.cpu()  # all kernels run on the CPU
        prefix.read(self.policy, tokens, mask)

    def step_logits(self, prefix: Prefix, rows: int) -> tuple[Tensor, Tensor]:
        """Return the logits of a step, and the logits of the previous step, which the step reads."""
        previous_logits = conditioning(self.policy, torch.zeros(rows, self.canvas_length, self.policy.vocab_size))
        tokens, _ = batch_of(rows, self.canvas_length)
        return prefix.logits(self.policy, tokens, previous_logits, temperature=1.0), previous_logits

    def score(self) -> None:
        """Run the forwards whose graphs are retained; without retained graphs, one forward, and the head on two chunks
        of its states.
        """
        with torch.set_grad_enabled(self.num_graphs > 0), self.autocast():
            if self.policy.spec.attention == "encoder_decoder":
                logprobs = self.replay(self.micro_rows)
                self.retained_logprobs += logprobs if self.num_graphs else []
                return
            for _ in range(self.num_graphs):
                self.retained_logprobs.append(self.logprobs(self.states()))
            if not self.num_graphs:
                self.logprobs(first_two_chunks(self.policy, self.states()))

    def update(self) -> None:
        """Run the backward of the retained graphs; without them, the forward and backward of a micro-batch."""
        if self.num_graphs or (self.micro_rows >= self.rows and self.recipe.likelihood.name in ONE_VIEW):
            # This is the update's only backward, so there are no gradients of an earlier micro-batch or view.
            self.policy.module.zero_grad(set_to_none=True)
        with self.autocast():
            if self.num_graphs:
                torch.cat(self.retained_logprobs).sum().backward()
                self.retained_logprobs.clear()
                return
            if self.policy.spec.attention == "encoder_decoder":
                self.replay(self.micro_rows, backward=True)
                return
            states = self.states()
            tokens = torch.zeros(len(states), dtype=torch.long)
            backward_token_logprobs(self.policy, states, tokens, self.sampling_params, torch.ones(len(states)))

    @torch.no_grad()
    def merge(self) -> None:
        """Merge adapters one layer at a time, as the sync and a save do."""
        for _ in merged_tensors(self.policy.module):
            pass

    def states(self) -> Tensor:
        """Return the hidden states (K, D) of a view at all completion positions; without a completion, at all prompt
        positions.
        """
        length = self.recipe.max_new_tokens
        packed = self.recipe.likelihood.block_size is not None  # clean and noisy columns share one forward
        tokens, mask = batch_of(self.micro_rows, self.prompt_tokens + length * (1 + packed))
        num_scored = length or self.prompt_tokens
        if not packed:
            return self.policy.hidden(tokens, mask)[:, -num_scored:].flatten(0, 1)
        mask_4d = mask[:, None, None, :].expand(-1, -1, mask.shape[1], -1).clone()
        return self.policy.encode(tokens, mask_4d, position_ids(mask))[:, -num_scored:].flatten(0, 1)

    def logprobs(self, states: Tensor) -> Tensor:
        return token_logprobs(self.policy, states, torch.zeros(len(states), dtype=torch.long), self.sampling_params)


def shard_memory(memory: Memory, module: Module, size: int) -> Memory:
    """Return the memory per process of a learner that is sharded over `size` processes. `memory` is the memory of an
    unsharded learner.
    """
    persistent = {name: -(-value // size) for name, value in memory.persistent.items()}
    if "rollout copy" in persistent:  # the only part that is not sharded
        persistent["rollout copy"] = memory.persistent["rollout copy"]
    unsharded_total = sum(memory.persistent.values())
    sharded_total = sum(persistent.values())
    weight_counts = [p.numel() for name, p in module.named_parameters() if ".lora_" not in name]
    bytes_per_weight = memory.persistent["weights"] / sum(weight_counts)
    blocks = blocks_of(module, "shard_size")

    def unit_sizes(*, only_trained: bool) -> tuple[float, float, float]:
        """Return the bytes of the largest block, of the backbone outside the blocks, and of the head."""

        def size_of(part: Module) -> float:
            return bytes_per_weight * sum(p.numel() for p in part.parameters() if p.requires_grad or not only_trained)

        backbone = size_of(backbone_of(module))
        return max(map(size_of, blocks)), backbone - sum(map(size_of, blocks)), size_of(module) - backbone

    block, rest, head = unit_sizes(only_trained=False)
    block_grad, rest_grad, head_grad = unit_sizes(only_trained=True)
    # Gathered at the same time: a block and the next block, which is prefetched; the rest of the backbone; the head.
    scoring = 2 * block + rest + head
    # The update also has their gradients, twice while they are summed over processes, except those of the head.
    extra = {"scoring": scoring, "update": scoring + 2 * (block_grad + rest_grad) + head_grad}
    extra["sync or save"] = bytes_per_weight * max(weight_counts)  # the largest tensor is gathered
    peaks = {}
    for name, peak in memory.peaks.items():
        # The temporary tensors of the optimizer's step are sharded too.
        temporary = (peak - unsharded_total) / size if name == "optimizer step" else peak - unsharded_total
        peaks[name] = int(sharded_total + temporary + extra.get(name, 0))
    return Memory(persistent, peaks)


def forget_data(module: Module, dtype: torch.dtype | None, quantization: str | None) -> Module:
    """Replace the module's tensors by empty tensors, in place, with floating-point weights in `dtype` and quantized
    linear layers as `Packed`; return the module.
    """
    empty_tensors: dict[int, Tensor] = {}  # by id of the original tensor: tied weights stay one tensor

    def empty(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        if id(tensor) not in empty_tensors:
            data = torch.empty(tensor.shape, dtype=dtype if dtype and tensor.is_floating_point() else tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            empty_tensors[id(tensor)] = nn.Parameter(data, requires_grad=tensor.requires_grad) if is_parameter else data
        return empty_tensors[id(tensor)]

    for path, layer in list(module.named_modules()):
        if quantization and ".layers." in path and isinstance(layer, nn.Linear) and ".lora_" not in path:
            packed = Packed(layer, NF4_BYTES if quantization == "nf4" else 1, dtype or layer.weight.dtype)
            module.set_submodule(path, packed)
            continue
        weight_dtype = None if ".lora_" in path else dtype  # adapters stay in fp32
        for tensors, new_dtype in ((layer._parameters, weight_dtype), (layer._buffers, None)):
            tensors |= {name: empty(tensor, new_dtype) for name, tensor in tensors.items() if tensor is not None}
    return module


def num_retained_graphs(recipe: Recipe, policy: Policy, *, rows: int) -> int:
    """Return the number of autograd graphs of scoring that the first update reuses. If the number of the estimator's
    views is unknown, it is the largest number that `max_retained_graphs` allows.
    """
    micro_batches = math.ceil(rows / (recipe.micro_batch_size or rows))
    views = 1 if recipe.likelihood.name in ONE_VIEW else recipe.max_retained_graphs // micro_batches
    if policy.spec.attention == "encoder_decoder":
        views = renoising_steps(recipe, policy)
    return views * micro_batches if views and can_retain_graphs(recipe, policy, num_forwards=views, rows=rows) else 0


def renoising_steps(recipe: Recipe, policy: Policy) -> int:
    """Return the largest number of steps that all canvases of a completion need; a canvas may end earlier."""
    option = getattr(recipe.sampler, "keywords", {}).get("diffusion_steps")
    steps = option or inspect.signature(renoise).parameters["diffusion_steps"].default
    return steps * (recipe.max_new_tokens // (policy.spec.block_size or recipe.max_new_tokens))


def first_two_chunks(policy: Policy, states: Tensor) -> Tensor:
    """Return the rows that the head processes in its first two chunks: later chunks need no more memory."""
    return states[: 2 * chunk_rows(policy.vocab_size, policy.device)]


def without_mask(
    encode: Callable, module: Module, tokens: Tensor, mask: Tensor, *positions: Tensor, **kwargs: object
) -> Tensor:
    """Call `encode` with None as its mask."""
    return encode(module, tokens, None, *positions, **kwargs)


def batch_of(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the tokens and the attention mask of a batch without padding."""
    return torch.zeros(rows, width, dtype=torch.long), torch.ones(rows, width, dtype=torch.bool)


def step_optimizer(recipe: Recipe, trained: list[nn.Parameter], *, on_gpu: bool) -> object:
    """Clip the gradients and take an optimizer step, as `update` does; return what keeps the optimizer's state live."""
    torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
    if function_of(recipe.optim) is adamw_8bit:
        # Its kernel cannot run on fake tensors. Its state has 2 bytes per weight, and 2 fp32 scales per 256 weights.
        return [torch.empty(2 * p.numel() + p.numel() // 32, dtype=torch.uint8) for p in trained]
    optimizer = recipe.optim(trained, lr=1e-6, betas=(recipe.adam_beta1, recipe.adam_beta2), weight_decay=0.0)
    for group in optimizer.param_groups:
        if on_gpu and "fused" in group:
            group["fused"] = True
    optimizer.step()
    return optimizer
