"""What a recipe would take, worked out without its weights: parameters, batches, memory, GPUs."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dllm_rl.models.base import FamilySpec, Module, Policy
from dllm_rl.models.families import find_family
from dllm_rl.models.loading import build_empty
from dllm_rl.models.logprobs import CHUNK_ELEMENTS
from dllm_rl.models.lora import LoraLinear, add_lora
from dllm_rl.models.policy import DiffusionPolicy
from dllm_rl.models.tokens import prompt_ids
from dllm_rl.quantization.rollout_policy import skip_reasons
from dllm_rl.recipe import Recipe
from dllm_rl.samplers import autoregress, sampler_for, unmask

GB = 1e9
GPU_BYTES = 80 * GB
USABLE = 0.9  # of a GPU's memory; the rest is the allocator's and the kernels'
CONFIGS = Path(__file__).parent.parent / "models" / "configs"


def published_config(path_or_id: str | Path) -> dict:
    """Config fields of a checkpoint's folder, or of one of the published models whose configs the package carries."""
    for file in (Path(path_or_id) / "config.json", CONFIGS / f"{str(path_or_id).replace('/', '--')}.json"):
        if file.is_file():
            return json.loads(file.read_text())
    known = ", ".join(sorted(file.stem.replace("--", "/") for file in CONFIGS.glob("*.json")))
    raise ValueError(
        f"model={str(path_or_id)!r} is no checkpoint's folder, and no config is carried for it; carried are {known}"
    )


class MetaPolicy(DiffusionPolicy):
    """A policy without weights or tokenizer: what can be known of it before either is fetched."""

    @property
    def pad_id(self) -> int:
        """Nothing is padded here."""
        return 0

    def __init__(self, module: Module, spec: FamilySpec, tokenizer: Any) -> None:
        self.module, self.spec, self.tokenizer, self.version, self.lora = module, spec, tokenizer, 0, None
        self.float32_head = True
        self.parameters = sum(p.numel() for p in module.parameters())


def meta_policy(recipe: Recipe) -> MetaPolicy:
    """The recipe's policy without weights: its module on the meta device (or the small model itself) and its spec."""
    if not isinstance(recipe.model, str):
        policy = recipe.model if isinstance(recipe.model, Policy) else recipe.model()
        module, spec, tokenizer = policy.module, policy.spec, policy.tokenizer
    else:
        raw = published_config(recipe.model)
        family, module, tokenizer = find_family(raw), build_empty(raw), None
        # As load_policy does, but for the ids that only the tokenizer knows.
        spec = replace(family, max_length=module.config.max_position_embeddings)
    found = MetaPolicy(module, spec, tokenizer)
    if recipe.lora is not None:
        add_lora(found, recipe.lora())
    return found


def check(recipe: Recipe, policy: MetaPolicy, prompt_tokens: int) -> None:
    """Raise ValueError when sampler, likelihood and model do not go together, or a completion does not fit."""
    recipe.likelihood.check(policy)
    sampler, wanted = getattr(recipe.sampler, "func", recipe.sampler), sampler_for(policy)
    if sampler in (autoregress, unmask) and sampler is not wanted:
        raise ValueError(
            f"sampler={sampler.__name__} is not for {policy.spec.attention!r} attention; use {wanted.__name__}"
        )
    limit = policy.spec.max_length
    if limit is not None and prompt_tokens + recipe.max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens={recipe.max_new_tokens} after {prompt_tokens} tokens exceeds the model's {limit} positions"
        )


def element_bytes(recipe: Recipe, module: Module) -> int:
    if not isinstance(recipe.model, str):
        return next(module.parameters()).element_size()
    name = module.config.dtype if recipe.dtype == "auto" else recipe.dtype
    return getattr(torch, str(name or "float32").removeprefix("torch.")).itemsize


def memory(recipe: Recipe, policy: MetaPolicy, prompt_tokens: int) -> dict[str, int]:
    """Bytes per GPU (data parallel: every GPU holds all of them).

    activations  what a forward keeps for its backward, per token and layer: 8 hidden, 3 feed-forward and 2 attention
                 widths, times the element size. No checkpointing of layers is assumed.
    logits       four fp32 chunks of the head: logits, their softmax, its gradient, one copy.
    """
    module, config = policy.module, policy.module.config
    size, trainable = element_bytes(recipe, module), sum(p.numel() for p in module.parameters() if p.requires_grad)
    small = linear_elements(module) if recipe.base_quantization else 0
    # nf4: half a byte a weight and an fp32 scale per 64; int8: a byte a weight.
    packed = small * 9 // 16 if recipe.base_quantization == "nf4" else small
    adapters = trainable if recipe.lora is not None else 0
    rows = recipe.micro_batch_size or recipe.train_batch_size * recipe.num_generations
    heads, kv = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    experts = getattr(config, "num_experts_per_tok", 0) or 0
    inner = config.intermediate_size if not experts else config.moe_intermediate_size * (experts + 1)
    width = 8 * config.hidden_size + 3 * inner + 2 * (heads + kv) * head_dim
    compute = 2 if recipe.bf16 else size
    tokens = rows * (prompt_tokens + recipe.max_new_tokens)
    state = {"adamw": 2 * (4 if recipe.lora is not None else size), "adamw_8bit": 2}.get(recipe.optim.__name__, 8)
    each = 4 if recipe.lora is not None else size
    return {
        "weights": (policy.parameters - small) * size + packed,
        "adapters": adapters * 4,
        "gradients": trainable * each,
        "optimiser": trainable * state,
        "activations": tokens * config.num_hidden_layers * width * compute,
        "logits": 4 * 4 * CHUNK_ELEMENTS,
        "rollout copy": rollout_bytes(recipe, policy, size),
    }


def linear_elements(module: nn.Module) -> int:
    """Weights of linear layers in the blocks: what bitsandbytes quantises."""
    return sum(
        layer.weight.numel()
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and ".layers." in name and not name.endswith(("lora_A", "lora_B"))
    )


def quantisable(recipe: Recipe, policy: MetaPolicy) -> tuple[int, int, dict[str, str]]:
    """Number of layers and of weights that the rollout quantises, and why the others keep their precision."""
    if recipe.rollout_quantization is None:
        return 0, 0, {}
    kept = skip_reasons(policy.module, recipe.rollout_quantization(), None)
    layers: dict[str, Any] = {
        name.removesuffix(".base_layer"): getattr(layer, "base_layer", layer)
        for name, layer in policy.module.named_modules()
        if isinstance(layer, nn.Linear | LoraLinear) and not name.endswith(("lora_A", "lora_B"))
    }
    chosen = [layer for name, layer in layers.items() if name not in kept]
    return len(chosen), sum(layer.weight.numel() for layer in chosen), kept


def rollout_bytes(recipe: Recipe, policy: MetaPolicy, size: int) -> int:
    """The quantised copy at a byte a weight; adapters are merged for it, in a copy that is held for that moment."""
    layers, weights, _ = quantisable(recipe, policy)
    return 0 if not layers else weights + (policy.parameters - weights) * size


def plan(recipe: Recipe, *, prompt_tokens: int | None = None) -> str:
    """The plan as text, after every check that needs no weights. Raises ValueError where the recipe cannot run.

    prompt_tokens  length that prompts are assumed to have; None: the first one's of a model that is made here, whose
                   tokenizer is known, else 256.
    """
    policy = meta_policy(recipe)
    if prompt_tokens is None:
        prompt_tokens = len(prompt_ids(policy, recipe.task[0].prompt)) if policy.tokenizer else 256
    check(recipe, policy, prompt_tokens)
    trainable = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    parts = memory(recipe, policy, prompt_tokens)
    layers, weights, kept = quantisable(recipe, policy)
    rows, length = recipe.train_batch_size * recipe.num_generations, recipe.max_new_tokens
    reasons = {why.split(" ")[0] if why.startswith("tied") else why: 0 for why in kept.values()}
    for why in kept.values():
        reasons[why.split(" ")[0] if why.startswith("tied") else why] += 1
    total = sum(parts.values())
    lines = [
        f"{recipe.name}: {recipe.model if isinstance(recipe.model, str) else policy.spec.name} "
        f"({type(policy.module).__name__}, {policy.spec.attention} attention)",
        f"parameters            {policy.parameters:,}",
        f"trainable parameters  {trainable:,}" + ("" if recipe.lora is None else f" in {recipe.lora()}"),
        f"quantised layers      {layers} with {weights:,} weights; kept: "
        + (", ".join(f"{n} {why}" for why, n in reasons.items()) or "all"),
        f"rollout batch         {rows} rows x ({prompt_tokens} assumed prompt + {length} new) tokens: "
        f"{recipe.train_batch_size} prompts x {recipe.num_generations} completions, over all processes",
        f"update batch          {recipe.micro_batch_size or rows} rows at once, {recipe.num_iterations} updates a step",
        f"tokens per step       {rows * length:,} sampled, {rows * (length + prompt_tokens):,} in all",
        "memory per GPU, estimated (GB = 10^9 bytes)",
        *(f"  {name:12}  {value / GB:9.3f} GB" for name, value in parts.items()),
        f"  {'total':12}  {total / GB:9.3f} GB",
    ]
    if total <= USABLE * GPU_BYTES:
        lines.append("GPUs needed           1 with 80 GB; more share the prompts, each with all of the above")
    else:
        gpus = math.ceil(total / (USABLE * GPU_BYTES))
        lines.append(
            f"GPUs needed           does not fit one with 80 GB, and train() does not shard; "
            f"sharded it would take {gpus}. "
            "Use --lora lora_d1, a smaller --micro_batch_size, or --base_quantization nf4"
        )
    return "\n".join(lines)
