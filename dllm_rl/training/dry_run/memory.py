"""Estimate the memory of a step by formulas. The tensors that live in every stage are exact but for buffers; what a
stage adds to them is an estimate. Kernels' workspaces and the allocator's rounding are not counted.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from dllm_rl.algorithms.optimizers import AdamW8bit
from dllm_rl.models.base import Policy, trainable_parameters
from dllm_rl.models.forward.blocks import backbone_of, blocks_of
from dllm_rl.models.logprobs import chunk_rows
from dllm_rl.models.lora import STACKS, LoraExperts, base_of, is_stacked
from dllm_rl.quantization.linear import quantizable_layers, skip_reasons
from dllm_rl.quantization.rollout_policy import CHUNK_BYTES
from dllm_rl.quantization.schemes import FakeQuantize, Int4Packed
from dllm_rl.recipe import Recipe
from dllm_rl.samplers import Renoise
from dllm_rl.step.score import retained_graphs
from dllm_rl.training.sharded_learner import processes_per_shard
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Views

NF4_BYTES = 9 / 16  # per weight: half a byte, and an fp32 scale per 64 weights
BYTES_OF_ADAMW8BIT = 2 + 8 / 256  # per weight: two moments of a byte, and two fp32 scales per 256 weights
# A forward without gradients has about this many tensors of the widest layer's size at once.
LIVE_TENSORS = 5
# A forward with gradients keeps about this many times the outputs of all linear layers, for norms, attention and
# activation functions too, and this share of their inputs: layers that read the same input keep it once.
KEPT_OUTPUTS = 1.6
KEPT_INPUTS = 2 / 3
# The head has this many fp32 tensors of a chunk's logits at once, and a step of `Renoise` of a canvas's.
LOGITS_TENSORS = 3
# A sync needs about this many bytes for each weight that it quantizes at a time: it joins the weights of several
# layers, rounds them in fp32, and compares the codes with the old ones.
SYNC_BYTES = 15
CANVAS_TENSORS = 5


@dataclass(frozen=True)
class PlannedStep:
    """A training step of which memory and time are estimated, and the sizes that follow from it.

    Args:
        recipe: Settings of the run.
        policy: Policy with the adapters. Only the shapes of its weights are used.
        prompt_tokens: Tokens of a prompt.
        processes: Number of processes, one per GPU, that share the batch.
        blanks: Tokens of a prompt that are to be filled in.
    """

    recipe: Recipe
    policy: Policy
    prompt_tokens: int
    processes: int = 1
    blanks: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the learner's weights in the run."""
        if not isinstance(self.recipe.model, str):
            return next(self.policy.module.parameters()).dtype  # a model that was built already
        name = self.policy.module.config.dtype if self.recipe.dtype == "auto" else self.recipe.dtype
        return getattr(torch, str(name or "float32").removeprefix("torch."))

    @property
    def value_bytes(self) -> int:
        """Bytes of an input of a linear layer."""
        return 2 if self.recipe.bf16 else self.dtype.itemsize

    @property
    def shard_size(self) -> int:
        """Number of GPUs that share the weights of one learner; 1 if it is not sharded."""
        return processes_per_shard(self.recipe.shard_size, self.processes)

    @property
    def rows(self) -> int:
        """Completions of one process."""
        return self.recipe.train_batch_size // self.processes * self.recipe.num_generations

    @property
    def written_tokens(self) -> int:
        """Tokens that the sampler writes in a row."""
        return self.recipe.max_new_tokens or self.prompt_tokens  # a task may have blanks in its prompts

    @property
    def row_tokens(self) -> int:
        """Tokens of a row, prompt and completion."""
        return self.prompt_tokens + self.recipe.max_new_tokens

    @property
    def micro_rows(self) -> int:
        """Largest number of rows that a forward of scoring and update may have."""
        rows = max(self.rows, self.replayed_rows)
        return min(self.recipe.micro_batch_size or rows, rows)

    @property
    def replayed_rows(self) -> int:
        """Rows of a replay update in a process."""
        return 0 if self.recipe.replay is None else math.ceil(self.recipe.replay.batch_size / self.processes)

    @property
    def canvas(self) -> int:
        """Positions that a forward of `Renoise` denoises in a row; 0 with other samplers."""
        return self.policy.spec.block_size or 0 if self.policy.spec.attention == "encoder_decoder" else 0

    @property
    def sampler_steps(self) -> int:
        """Forwards of the sampler for a completion, at most: an adaptive commit rule needs fewer."""
        sampler = self.recipe.sampler
        steps = getattr(sampler, "diffusion_steps", None) or self.written_tokens
        return steps * (sampler.max_new_tokens // self.canvas) if isinstance(sampler, Renoise) else steps

    @cached_property
    def views(self) -> Views:
        """The masked versions in which the likelihood scores a completion that is written from left to right."""
        length = self.written_tokens
        tokens, mask = torch.zeros(1, length, dtype=torch.long), torch.ones(1, length, dtype=torch.bool)
        unmask_step = torch.arange(length)[None] * self.sampler_steps // length
        zeros, group = torch.zeros(1, length), torch.zeros(1, dtype=torch.long)
        rollout = Rollout(tokens, mask, mask, unmask_step, zeros, group)
        return self.recipe.likelihood.draw_views(rollout, torch.Generator())

    @property
    def num_views(self) -> int:
        """Forwards in which the likelihood scores a completion."""
        return self.sampler_steps if isinstance(self.recipe.sampler, Renoise) else len(self.views.coefficients)

    @property
    def shares_rows(self) -> bool:
        """Whether one row is scored for all completions of a prompt: if every view masks the whole completion."""
        recipe = self.recipe
        return not isinstance(recipe.sampler, Renoise) and bool(self.views.masked.all())

    @property
    def scored_rows(self) -> int:
        """Rows of one process that go through the model in a view."""
        return self.rows // self.recipe.num_generations if self.shares_rows else self.rows

    @property
    def forward_rows(self) -> int:
        """Largest number of rows that go through the model in a forward of scoring and update."""
        return min(self.micro_rows, max(self.scored_rows, self.replayed_rows))

    @property
    def num_forwards(self) -> int:
        """Forwards of scoring, or of an update."""
        return self.num_views * math.ceil(self.scored_rows / self.micro_rows)

    @property
    def num_graphs(self) -> int:
        """Forwards of scoring whose autograd graphs the first update reuses."""
        graphs = retained_graphs(self.recipe, self.policy, torch.zeros(0, dtype=torch.bool))
        if graphs is None:
            return 0
        in_a_view = self.sampler_steps if isinstance(self.recipe.sampler, Renoise) else 1
        room = graphs.limit
        if room is None:
            fitting = graphs.MAX_BYTES // max(1, kept_bytes(self, self.forward_tokens)[0])
            room = max(1, fitting) if in_a_view == 1 else 0
        return min(self.num_forwards, room // in_a_view * in_a_view)

    @property
    def forward_tokens(self) -> int:
        """Largest number of tokens of a forward of scoring and update."""
        packed = self.recipe.likelihood.required_block_size is not None  # clean and noisy columns share one forward
        return self.forward_rows * (self.row_tokens + self.canvas + packed * self.recipe.max_new_tokens)


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs."""

    persistent: dict[str, int]  # tensors that are live in every stage, by kind
    peaks: dict[str, int]  # peak of each stage, including `persistent`

    @property
    def peak(self) -> int:
        """Return the largest of the stages' peaks."""
        return max(self.peaks.values())


def step_memory(step: PlannedStep) -> Memory:
    """Estimate the memory of a step on one GPU, which has the full learner or its part of a sharded learner."""
    recipe = step.recipe
    persistent = persistent_bytes(step)
    base = sum(persistent.values())
    if step.shard_size > 1:
        # Gathered at the same time: a block and the next block, which is prefetched; and what is outside the blocks.
        # An update of all weights also gathers their gradients, those of the embedding twice.
        module = step.policy.module
        blocks = [num_weights(block) for block in blocks_of(module, "shard_size")]
        outside, embedding = (num_weights(part) - sum(blocks) for part in (module, backbone_of(module)))
        copies = gathered = (2 * max(blocks) + outside) * step.dtype.itemsize
        if recipe.lora is None:
            gathered = 2 * copies + embedding * step.dtype.itemsize
    else:  # autocast keeps bf16 copies of the fp32 weights of linear layers
        shapes = [shape for _, layer in quantizable_layers(step.policy.module) for shape in shapes_of(layer)]
        copies = gathered = 2 * sum(map(math.prod, shapes)) * (recipe.bf16 and step.dtype == torch.float32)

    tokens = step.forward_tokens
    completions = step.forward_rows * (recipe.num_generations if step.shares_rows else 1)
    head = logits_bytes(step, completions * step.written_tokens)
    kept, recomputed = kept_bytes(step, tokens)
    # The first backward of an update has no gradients of an earlier one: its own grow while the graph is freed.
    first = max(1, step.num_graphs) * kept + max(head, recomputed)
    first -= min(persistent["gradients"], first)
    num_later = max(step.num_graphs - 1, step.num_forwards > max(1, step.num_graphs))  # graphs beside gradients
    later = num_later * kept + max(head, recomputed) * bool(num_later)
    peaks = {
        # A rollout policy of its own has weights that are neither cast nor gathered.
        "rollout": base + copies * ("rollout copy" not in persistent) + rollout_bytes(step),
        "scoring": base + copies + step.num_graphs * kept + max(live_bytes(step, tokens), head),
        "update": base + gathered + max(first, later),
    }
    if "rollout copy" in persistent and recipe.rollout_quantization is not None:
        peaks["sync"] = base + sync_bytes(step)
    return Memory(persistent, peaks)


def persistent_bytes(step: PlannedStep) -> dict[str, int]:
    """Return the bytes of the tensors that live in every stage, by kind."""
    recipe, module = step.recipe, step.policy.module
    has_adapters = recipe.lora is not None
    trained = trainable_parameters(module)
    num_trained = sum(p.numel() for p in trained)
    trained_bytes = sum(p.nbytes for p in trained) if has_adapters else num_trained * step.dtype.itemsize
    quantized = 0  # weights in `base_quantization`: those of the blocks' linear layers
    if recipe.base_quantization is not None:
        blocks = (layer for name, layer in quantizable_layers(module) if ".layers." in name)
        quantized = sum(base_of(layer).weight.numel() for layer in blocks if not is_stacked(base_of(layer)))
    weights = int(quantized * (NF4_BYTES if recipe.base_quantization == "nf4" else 1))
    weights += (num_weights(module) - quantized) * step.dtype.itemsize
    has_8bit_moments = isinstance(recipe.optim, AdamW8bit)
    sharded = {
        "weights": weights,
        "adapters": trained_bytes * has_adapters,
        "reference": weights * (recipe.needs_reference_policy and not has_adapters),  # of adapters, the base model
        "gradients": trained_bytes,
        # Another optimizer than the library's counts as AdamW.
        "optimizer": int(BYTES_OF_ADAMW8BIT * num_trained) if has_8bit_moments else 2 * trained_bytes,
    }
    sizes = {name: -(-size // step.shard_size) for name, size in sharded.items()} | {"rollout copy": copy_bytes(step)}
    return {name: size for name, size in sizes.items() if size or name == "gradients"}


def copy_bytes(step: PlannedStep) -> int:
    """Return the bytes that the rollout policy, a copy of the learner, needs in addition to the learner.

    The scales of the quantization are not counted. One scale per row adds about 0.1 %; one per group of inputs (int4)
    adds several percent.
    """
    recipe, scheme = step.recipe, step.recipe.rollout_quantization
    total = num_weights(step.policy.module)
    if scheme is None:
        return total * step.dtype.itemsize if step.shard_size > 1 else 0  # the rollout needs full weights
    layers, weights, _ = count_quantized(step)
    if not layers:
        return 0
    config = scheme.config()
    dtype = torch.bfloat16 if recipe.bf16 else step.dtype
    bytes_per_weight: float = 1  # of a quantized weight
    if isinstance(config, type(Int4Packed().config())):
        bytes_per_weight = 0.5
    elif isinstance(config, FakeQuantize):
        # Values stay in the weight's dtype, or in fp32 if activations are rounded too.
        bytes_per_weight = dtype.itemsize if config.activation is None else 4
    # With adapters the copy shares the frozen embedding, head and norms with the learner.
    shared = recipe.lora is not None and dtype == step.dtype and step.shard_size == 1
    return int(weights * bytes_per_weight) + (0 if shared else total - weights) * dtype.itemsize


def count_quantized(step: PlannedStep) -> tuple[int, int, dict[str, str]]:
    """Return the number of layers and the number of weights that are quantized for rollouts, and a dict from each layer
    that is not quantized to the reason.
    """
    scheme, module = step.recipe.rollout_quantization, step.policy.module
    if scheme is None:
        return 0, 0, {}
    skipped = skip_reasons(module, scheme.config(), None)
    shapes = [shape for name, layer in quantizable_layers(module) if name not in skipped for shape in shapes_of(layer)]
    # Each matrix of a stack of experts counts as a layer.
    return sum(math.prod(shape[:-2]) for shape in shapes), sum(map(math.prod, shapes)), skipped


def rollout_bytes(step: PlannedStep) -> int:
    """Return the bytes of a rollout's forward of all rows, or of its head, and of the keys and values of all tokens if
    the sampler keeps them.
    """
    recipe, attention = step.recipe, step.policy.spec.attention
    rows = min(recipe.rollout_batch_size or step.rows, step.rows)
    if attention == "causal":  # its largest forward is that of the prompts, one per group
        forward = live_bytes(step, rows // recipe.num_generations * step.prompt_tokens)
        head = logits_bytes(step, rows)
    else:
        forward = live_bytes(step, rows * (step.row_tokens + step.canvas))
        head = logits_bytes(step, rows * step.written_tokens)
    config = getattr(step.policy.module, "config", None)
    keeps = attention in ("causal", "encoder_decoder") or getattr(recipe.sampler, "cache", None) is not None
    cache = 0
    if config is not None and keeps:
        config = config.get_text_config()
        layer = (getattr(config, "per_layer_config", None) or [config])[0]  # layers that differ differ little
        head_size = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        num_heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        values = 2 * config.num_hidden_layers * num_heads * head_size  # of a token
        cache = values * rows * (step.row_tokens + step.canvas) * step.dtype.itemsize
    return cache + max(forward, head)


def sync_bytes(step: PlannedStep) -> int:
    """Return the bytes of a sync's temporary tensors: of the layers of one shape, at most CHUNK_BYTES of fp32 weights,
    or one larger layer.
    """
    _, _, skipped = count_quantized(step)
    sizes: dict[tuple[int, ...], int] = {}
    for name, layer in quantizable_layers(step.policy.module):
        for shape in [] if name in skipped else shapes_of(layer):
            # Experts and the layers of a sharded learner are quantized one by one.
            is_alone = len(shape) > 2 or step.shard_size > 1
            sizes[shape[-2:]] = math.prod(shape[-2:]) + (0 if is_alone else sizes.get(shape, 0))
    return SYNC_BYTES * max(max(math.prod(shape), min(size, CHUNK_BYTES // 4)) for shape, size in sizes.items())


def live_bytes(step: PlannedStep, tokens: int) -> int:
    """Return the bytes of a forward without gradients."""
    layers = token_layers(step.policy, with_head=False)
    widest = max((max(inputs, outputs) * times for inputs, outputs, times in layers), default=0)
    return LIVE_TENSORS * widest * tokens * step.value_bytes


def kept_bytes(step: PlannedStep, tokens: int) -> tuple[int, int]:
    """Return the bytes that a forward keeps for its backward, and those that the backward computes again."""
    policy = step.policy
    layers = list(token_layers(policy, with_head=False))
    inputs = sum(inputs * times for inputs, _, times in layers)
    outputs = sum(outputs * times for _, outputs, times in layers)
    per_token = step.value_bytes * (KEPT_OUTPUTS * outputs + KEPT_INPUTS * inputs)
    if policy.lora is not None and policy.lora.dropout:  # each layer keeps a mask, and its input after the mask
        per_token += inputs * (1 + step.value_bytes * (1 - KEPT_INPUTS))
    experts = [layer for _, layer in quantizable_layers(policy.module) if isinstance(layer, LoraExperts)]
    # A forward merges adapted experts.
    merged = step.dtype.itemsize * sum(math.prod(shape) for layer in experts for shape in shapes_of(layer))
    total = int(per_token * tokens) + merged
    if not policy.gradient_checkpointing:
        return total, 0
    num_blocks = len(blocks_of(policy.module))  # the inputs of all blocks, and all of one block
    hidden_size = layers[0][0] if layers else 0
    return num_blocks * hidden_size * step.dtype.itemsize * tokens, total // num_blocks


def logits_bytes(step: PlannedStep, positions: int) -> int:
    """Return the bytes of the head's logits at these positions: of a chunk of them, or of all in a canvas."""
    vocabulary = step.policy.vocab_size
    if step.canvas:
        return CANVAS_TENSORS * 4 * positions * step.canvas // step.recipe.max_new_tokens * vocabulary
    return LOGITS_TENSORS * 4 * min(chunk_rows(vocabulary, step.policy.device), positions) * vocabulary


def num_weights(module: nn.Module) -> int:
    """Return the number of weights without adapters."""
    return sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)


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
            times = 1
            if experts:
                config = policy.module.config.get_text_config()
                times = getattr(config, "top_k_experts", None) or config.num_experts_per_tok
            yield inputs, outputs, times
