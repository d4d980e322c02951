"""Estimate the memory of a step by formulas. The tensors that live in every stage are exact but for buffers; what a
stage adds to them is an estimate. Kernels' workspaces and the allocator's rounding are not counted.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dllm_rl.algorithms.optimizers import AdamW8bit
from dllm_rl.models.base import Module, Policy, trainable_parameters
from dllm_rl.models.forward.blocks import backbone_of, blocks_of
from dllm_rl.models.logprobs import chunk_rows
from dllm_rl.models.lora import STACKS, LoraExperts, LoraLinear, base_of, is_stacked
from dllm_rl.quantization.linear import quantizable_layers
from dllm_rl.recipe import Recipe
from dllm_rl.samplers import Renoise
from dllm_rl.step.score import can_retain_graphs
from dllm_rl.training.step_settings import step_settings

ONE_VIEW = ("OneStep", "Causal")  # estimators that score the batch in one view
NF4_BYTES = 9 / 16  # per weight: half a byte, and an fp32 scale per 64 weights
# A forward without gradients has about this many tensors of the widest layer's size at once.
LIVE_TENSORS = 5
# A forward with gradients keeps about this many times the outputs of all linear layers, for norms, attention and
# activation functions too, and this share of their inputs: layers that read the same input keep it once.
KEPT_OUTPUTS = 1.6
KEPT_INPUTS = 2 / 3
# The head has this many fp32 tensors of a chunk's logits at once, and a step of `Renoise` of a canvas's.
LOGITS_TENSORS = 3
CANVAS_TENSORS = 5


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs."""

    persistent: dict[str, int]  # tensors that are live in every stage, by kind
    peaks: dict[str, int]  # peak of each stage, including `persistent`

    @property
    def peak(self) -> int:
        """Return the largest of the stages' peaks."""
        return max(self.peaks.values())


def step_memory(
    recipe: Recipe,
    policy: Policy,
    *,
    prompt_tokens: int,
    dtype: torch.dtype | None,
    rollout_copy: int,
    shard_size: int = 1,
) -> Memory:
    """Estimate the memory of a step on one GPU.

    Args:
        recipe: Recipe with the batch of one process.
        policy: Policy with the adapters. Only the shapes of its weights are used.
        prompt_tokens: Tokens of a prompt.
        dtype: Dtype of the weights. None: unchanged.
        rollout_copy: Bytes of the rollout policy's copy.
        shard_size: Number of GPUs that share the learner.
    """
    weights = weight_bytes(policy.module, dtype, recipe.base_quantization)
    trained = trainable_parameters(policy.module)
    adapters = recipe.lora is not None
    trained_bytes = sum(p.numel() * (p.dtype if adapters else dtype or p.dtype).itemsize for p in trained)
    persistent = {
        "weights": weights,
        "adapters": trained_bytes * adapters,
        "reference": weights * (recipe.needs_reference_policy and not adapters),  # of adapters, the base model
        "rollout copy": rollout_copy,
        "gradients": trained_bytes,
        "optimizer": moment_bytes(recipe, sum(p.numel() for p in trained), trained_bytes),
    }
    estimates = StageEstimates(recipe, policy, prompt_tokens, dtype or next(policy.module.parameters()).dtype)
    peaks = estimates.peaks(persistent, shard_size)
    memory = Memory({name: size for name, size in persistent.items() if size}, peaks)
    return memory if shard_size == 1 else shard_memory(memory, policy.module, shard_size)


def weight_bytes(module: Module, dtype: torch.dtype | None, quantization: str | None) -> int:
    """Return the bytes of the weights without adapters, with the blocks' linear layers in `quantization`."""
    quantized = 0
    if quantization:
        blocks = (layer for name, layer in quantizable_layers(module) if ".layers." in name)
        quantized = sum(base_of(layer).weight.numel() for layer in blocks if not is_stacked(base_of(layer)))
    others = sum(p.numel() for name, p in module.named_parameters() if ".lora_" not in name) - quantized
    itemsize = (dtype or next(module.parameters()).dtype).itemsize
    return int(quantized * (NF4_BYTES if quantization == "nf4" else 1)) + others * itemsize


def moment_bytes(recipe: Recipe, num_weights: int, trained_bytes: int) -> int:
    """Return the bytes of the optimizer's state. Another optimizer than the library's counts as AdamW."""
    if recipe.optim == AdamW8bit():  # two bytes per weight, and two fp32 scales per 256 weights
        return 2 * num_weights + num_weights // 32
    return 2 * trained_bytes


class StageEstimates:
    """What each stage of a recipe's step needs beside the tensors that live in every stage, in bytes."""

    def __init__(self, recipe: Recipe, policy: Policy, prompt_tokens: int, dtype: torch.dtype) -> None:
        self.recipe = recipe
        self.policy = policy
        self.prompt_tokens = prompt_tokens
        self.residual_bytes = dtype.itemsize  # of a value of the hidden states between blocks
        self.value_bytes = 2 if recipe.bf16 else dtype.itemsize  # of an input of a linear layer
        self.rows = recipe.train_batch_size * recipe.num_generations
        self.micro_rows = min(recipe.micro_batch_size or self.rows, self.rows)
        self.layers = list(token_layers(policy, with_head=False))
        self.matrices = [shape for _, layer in quantizable_layers(policy.module) for shape in shapes_of(layer)]
        self.widest = max((max(inputs, outputs) * times for inputs, outputs, times in self.layers), default=0)
        self.hidden_size = self.layers[0][0] if self.layers else 0
        is_canvas = policy.spec.attention == "encoder_decoder"
        # Positions of a row whose logits live at once in `Renoise`; 0 for other samplers.
        self.canvas = policy.spec.block_size or 0 if is_canvas else 0
        self.row_tokens = prompt_tokens + recipe.max_new_tokens + self.canvas
        self.has_casts = recipe.bf16 and dtype == torch.float32 and recipe.shard_size == 1

    def peaks(self, persistent: dict[str, int], shard_size: int) -> dict[str, int]:
        """Return the peak of each stage, including the persistent tensors, which are unsharded."""
        base = sum(persistent.values())
        # Autocast keeps bf16 copies of the weights; a rollout policy of its own has bf16 weights.
        casts = 2 * sum(map(math.prod, self.matrices)) * self.has_casts
        num_graphs = num_retained_graphs(self.recipe, self.policy, rows=self.rows)
        packed = self.recipe.likelihood.required_block_size is not None  # clean and noisy columns share one forward
        tokens = self.micro_rows * (self.row_tokens + packed * self.recipe.max_new_tokens)
        head = self.logits(self.micro_rows * (self.recipe.max_new_tokens or self.prompt_tokens))
        kept, recomputed = self.kept(tokens)
        graphs = max(1, num_graphs) * kept
        backward = graphs + max(head, recomputed)
        update = base + casts + backward
        # The only backward of an update has no gradients of an earlier one: its own grow while the graph is freed.
        if num_graphs or (self.micro_rows >= self.rows and self.recipe.likelihood.name in ONE_VIEW):
            update -= min(persistent["gradients"] // shard_size, backward)
        return {
            "rollout": base + casts * (not persistent["rollout copy"]) + self.rollout(),
            "scoring": base + casts + (graphs if num_graphs else 0) + max(self.live(tokens), head),
            "update": update,
            "sync or save": base + self.merged_layer(),
        }

    def merged_layer(self) -> int:
        """Return the bytes of merging the largest adapted layer: the adapters' product in fp32, and the sum."""
        layers = (layer for _, layer in quantizable_layers(self.policy.module))
        adapted = (layer for layer in layers if isinstance(layer, LoraLinear | LoraExperts))
        sizes = [math.prod(shape) for layer in adapted for shape in shapes_of(layer)]
        return (4 + self.residual_bytes) * max(sizes, default=0)

    def rollout(self) -> int:
        """Return the bytes of a rollout's forward of all rows, or of its head, and of the cache."""
        rows = min(self.recipe.rollout_batch_size or self.rows, self.rows)
        causal = self.policy.spec.attention == "causal"
        # The largest forward of a causal model is that of the prompts, one per group.
        forward_rows = rows // self.recipe.num_generations if causal else rows
        tokens = forward_rows * (self.prompt_tokens if causal else self.row_tokens)
        states = self.value_bytes * self.hidden_size * tokens
        positions = rows * (1 if causal else self.recipe.max_new_tokens or self.prompt_tokens)
        return self.cache_bytes(rows) + max(self.live(tokens), states + self.logits(positions))

    def cache_bytes(self, rows: int) -> int:
        """Return the bytes of the keys and values of all tokens, if the sampler keeps them."""
        config = getattr(self.policy.module, "config", None)
        spec = self.policy.spec
        keeps = spec.attention in ("causal", "encoder_decoder")
        if config is None or not (keeps or getattr(self.recipe.sampler, "cache", None) is not None):
            return 0
        config = config.get_text_config()
        layers = getattr(config, "per_layer_config", None) or [config] * config.num_hidden_layers
        values = 0  # of a token
        for layer in layers:
            head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
            values += 2 * head_dim * (getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)
        return values * rows * self.row_tokens * self.residual_bytes

    def live(self, tokens: int) -> int:
        """Return the bytes of a forward without gradients."""
        return LIVE_TENSORS * self.widest * tokens * self.value_bytes

    def kept(self, tokens: int) -> tuple[int, int]:
        """Return the bytes that a forward keeps for its backward, and those that the backward computes again."""
        inputs = sum(inputs * times for inputs, _, times in self.layers)
        outputs = sum(outputs * times for _, outputs, times in self.layers)
        lora = self.policy.lora
        has_dropout = lora is not None and lora.dropout  # each layer keeps a mask, and its input after the mask
        per_token = self.value_bytes * (KEPT_OUTPUTS * outputs + (1 if has_dropout else KEPT_INPUTS) * inputs)
        per_token += inputs * bool(has_dropout)
        experts = [layer for _, layer in quantizable_layers(self.policy.module) if isinstance(layer, LoraExperts)]
        # A forward merges adapted experts.
        merged = self.residual_bytes * sum(math.prod(shape) for layer in experts for shape in shapes_of(layer))
        total = int(per_token * tokens) + merged
        if not self.policy.gradient_checkpointing:
            return total, 0
        num_blocks = len(blocks_of(self.policy.module))  # the inputs of all blocks, and all of one block
        return num_blocks * self.hidden_size * self.residual_bytes * tokens, total // num_blocks

    def logits(self, positions: int) -> int:
        """Return the bytes of the head's logits at these positions: of a chunk of them, or of all in a canvas."""
        vocabulary = self.policy.vocab_size
        if self.canvas:
            return CANVAS_TENSORS * 4 * positions * self.canvas // self.recipe.max_new_tokens * vocabulary
        return LOGITS_TENSORS * 4 * min(chunk_rows(vocabulary, self.policy.device), positions) * vocabulary


def shapes_of(layer: nn.Module) -> list[tuple[int, ...]]:
    """Return the shapes of a linear layer's weight, or of a stack's weights (E, O, I)."""
    base = base_of(layer)
    weights = [getattr(base, stack) for stack in STACKS] if is_stacked(base) else [base.weight]
    return [tuple(weight.shape) for weight in weights]


def token_layers(policy: Policy, *, with_head: bool = True) -> Iterator[tuple[int, int, int]]:
    """Yield (inputs, outputs, times) of each weight that a token is multiplied with; of experts, as often as it uses
    them.
    """
    head = None if with_head else getattr(policy.module, "get_output_embeddings", lambda: None)()
    for name, layer in quantizable_layers(policy.module):
        if "vision" in name or layer is head:  # layers for images are not supported
            continue
        for *experts, outputs, inputs in shapes_of(layer):
            yield inputs, outputs, experts_per_token(policy) if experts else 1


def experts_per_token(policy: Policy) -> int:
    """Return the number of experts that a token uses in each layer."""
    config = policy.module.config.get_text_config()
    return getattr(config, "top_k_experts", None) or config.num_experts_per_tok


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
        peaks[name] = int(sharded_total + peak - unsharded_total + extra.get(name, 0))
    return Memory(persistent, peaks)


def num_retained_graphs(recipe: Recipe, policy: Policy, *, rows: int) -> int:
    """Return the number of autograd graphs of scoring that the first update reuses. If the number of the estimator's
    views is unknown, it is the largest number that `max_retained_graphs` allows.
    """
    micro_batches = math.ceil(rows / (recipe.micro_batch_size or rows))
    views = 1 if recipe.likelihood.name in ONE_VIEW else recipe.max_retained_graphs // micro_batches
    if policy.spec.attention == "encoder_decoder":
        views = renoising_steps(recipe, policy)
    retains = bool(views) and can_retain_graphs(step_settings(recipe), policy, num_forwards=views, rows=rows)
    return views * micro_batches if retains else 0


def renoising_steps(recipe: Recipe, policy: Policy) -> int:
    """Return the largest number of steps that all canvases of a completion need; a canvas may end earlier."""
    assert isinstance(recipe.sampler, Renoise), "the sampler of a model with random-token noise"
    return recipe.sampler.diffusion_steps * (recipe.max_new_tokens // (policy.spec.block_size or recipe.max_new_tokens))
