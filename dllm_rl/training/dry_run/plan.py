"""The plan that a dry run prints, computed without loading a checkpoint's weights: parameters, batches, memory, time,
and which GPUs are large enough.
"""

import copy
import math
from collections import Counter
from dataclasses import replace

import torch

from dllm_rl.decoding.tokens import prompt_ids
from dllm_rl.distributed.collectives import num_launched
from dllm_rl.models.base import FamilySpec, Module, Policy, Tokenizer
from dllm_rl.models.checkpoint.families import find_family
from dllm_rl.models.checkpoint.loading import build_empty, load_config
from dllm_rl.models.lora import add_lora, base_of
from dllm_rl.models.policy import DiffusionPolicy
from dllm_rl.quantization.linear import quantizable_layers, skip_reasons
from dllm_rl.quantization.schemes import FakeQuantize, Int4Packed
from dllm_rl.recipe import Recipe
from dllm_rl.samplers import Autoregress, Renoise, Unmask, sampler_for
from dllm_rl.tasks.base import check_not_empty
from dllm_rl.training.cautions import learning_rate_warnings
from dllm_rl.training.dry_run.duration import HOST_SECONDS, PEAK_FLOPS, peak_shares, stage_seconds
from dllm_rl.training.dry_run.memory import ONE_VIEW, Memory, num_retained_graphs, step_memory
from dllm_rl.training.feature_state import check_value_model
from dllm_rl.training.policies import call_model_function, check_blocks
from dllm_rl.training.saving import saves_only_adapters
from dllm_rl.training.sharded_learner import check_batches, check_module, check_sharding, processes_per_shard

GB = 1e9
GPU_SIZES = (80, 96, 141, 192)  # GB of memory
USABLE_SHARE = 0.9  # share of a GPU's memory that a run can use; the allocator, kernels and driver need the rest
MAX_FILE_SIZE = 5 * GB  # largest file of weights; `save_pretrained` has one file at a time in memory
WRITE_RATE = 0.57 * GB  # bytes per second: 16 GB were written in 13 s and hashed in 15 s
# Bytes of weights into which adapters are merged per second. Two CPU cores took 85 s for 16 GB in bf16 at rank 16, and
# 104 s at rank 128.
MERGE_RATE = 0.17 * GB
ASSUMED_PROMPT = 256  # tokens of a prompt, if no task is opened


class MetaPolicy(DiffusionPolicy):
    """Policy that a plan is computed with. Only the shapes of its weights are used, not their values.

    Its `device` is always a GPU, because the plan is for a run on a GPU, even if this machine has none.
    """

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")

    def __init__(self, module: Module, spec: FamilySpec, tokenizer: Tokenizer) -> None:
        super().__init__(module, spec, tokenizer)
        self.num_parameters = sum(p.numel() for p in module.parameters())  # without adapters, which are added later


def meta_policy(recipe: Recipe) -> MetaPolicy:
    """Return a policy with the shapes of the recipe's model.

    If `recipe.model` names a checkpoint, the module is built on the meta device from the checkpoint's config, so that
    no weights are downloaded, and the policy has no tokenizer. If `recipe.model` is a policy, or a function that makes
    one, the module is a copy of that policy's module, with its weights.
    """
    if not isinstance(recipe.model, str):
        policy = (
            recipe.model
            if isinstance(recipe.model, Policy)
            else call_model_function(recipe.model, recipe.seed, dry_run=True)
        )
        meta = MetaPolicy(copy.deepcopy(policy.module), policy.spec, policy.tokenizer)
    else:
        raw_config = load_config(recipe.model)
        family = find_family(raw_config)
        module = build_empty(raw_config)
        # For a model that reads images, this is the config of its text part; else it is module.config itself.
        config = module.config.get_text_config()
        # The same spec as `load_policy` makes, but without the token ids, which only the tokenizer has.
        spec = replace(family, max_length=config.max_position_embeddings)
        if family.attention == "encoder_decoder":
            spec = replace(spec, vocab_size=config.vocab_size, block_size=raw_config["canvas_length"])
        meta = MetaPolicy(module, spec, None)
    meta.float32_head = recipe.float32_head
    meta.gradient_checkpointing = recipe.gradient_checkpointing
    if recipe.lora is not None:
        add_lora(meta, recipe.lora)
    return meta


def gpus_per_learner(recipe: Recipe) -> int:
    """Return the number of GPUs that share the weights of one learner; 1 if the learner is not sharded."""
    return processes_per_shard(recipe, num_launched())


def assumed_processes(recipe: Recipe) -> int:
    """Return the number of processes in the plan: the number of launched ones, or more if `shard_size` needs more."""
    return max(gpus_per_learner(recipe), num_launched())


def recipe_per_process(recipe: Recipe) -> Recipe:
    """Return the recipe with a `train_batch_size` that is one process's part of the batch."""
    return replace(recipe, train_batch_size=recipe.train_batch_size // assumed_processes(recipe))


def check_recipe(recipe: Recipe, policy: MetaPolicy, prompt_tokens: int) -> None:
    """Raise ValueError if the recipe's sampler, likelihood, model and processes cannot be combined, or if a prompt and
    its completion have more tokens than the model has positions.
    """
    recipe.likelihood.check_policy(policy)
    check_value_model(recipe, policy)
    check_blocks(recipe, policy)
    shard_size = gpus_per_learner(recipe)
    check_sharding(recipe, assumed_processes(recipe))
    check_batches(recipe, assumed_processes(recipe))
    if shard_size > 1:
        check_module(policy.module, shard_size)
    sampler = type(recipe.sampler)
    expected_sampler = sampler_for(policy)
    if sampler in (Autoregress, Unmask, Renoise) and sampler is not expected_sampler:
        attention = policy.spec.attention
        raise ValueError(
            f"sampler={sampler.__name__} is not for {attention!r} attention; use {expected_sampler.__name__}"
        )
    max_positions = policy.spec.max_length
    if max_positions is not None and prompt_tokens + recipe.max_new_tokens > max_positions:
        raise ValueError(
            f"max_new_tokens={recipe.max_new_tokens} after {prompt_tokens} tokens exceeds the model's "
            f"{max_positions} positions"
        )


def weights_dtype(recipe: Recipe, policy: MetaPolicy) -> torch.dtype:
    """Return the dtype that the learner's weights have in a run."""
    if not isinstance(recipe.model, str):
        return next(policy.module.parameters()).dtype  # a model that was built already
    name = policy.module.config.dtype if recipe.dtype == "auto" else recipe.dtype
    return getattr(torch, str(name or "float32").removeprefix("torch."))


def memory(recipe: Recipe, policy: MetaPolicy, prompt_tokens: int) -> Memory:
    """Return the memory that a run needs on one GPU, in bytes. The GPU has the full learner, or its part of a sharded
    learner.
    """
    dtype = weights_dtype(recipe, policy)
    shard_size = gpus_per_learner(recipe)
    rollout_copy = rollout_bytes(recipe, policy, dtype)
    if shard_size > 1 and recipe.rollout_quantization is None:
        rollout_copy = policy.num_parameters * dtype.itemsize  # the rollout needs a full copy of sharded weights
    return step_memory(
        recipe_per_process(recipe),
        policy,
        prompt_tokens=prompt_tokens,
        dtype=dtype,
        rollout_copy=rollout_copy,
        shard_size=shard_size,
    )


def count_quantized(recipe: Recipe, policy: MetaPolicy) -> tuple[int, int, dict[str, str]]:
    """Return the number of layers and the number of weights that are quantized for rollouts, and a dict from each layer
    that is not quantized to the reason.
    """
    if recipe.rollout_quantization is None:
        return 0, 0, {}
    skipped = skip_reasons(policy.module, recipe.rollout_quantization.config(), None)
    layers = [base_of(layer) for name, layer in quantizable_layers(policy.module) if name not in skipped]
    matrices = [weight for layer in layers for weight in layer.parameters(recurse=False) if weight.dim() > 1]
    # Each matrix of a stack of experts counts as a layer.
    return sum(math.prod(weight.shape[:-2]) for weight in matrices), sum(map(torch.numel, matrices)), skipped


def rollout_bytes(recipe: Recipe, policy: MetaPolicy, dtype: torch.dtype) -> int:
    """Return the bytes that the rollout policy, a quantized copy of the learner, needs in addition to the learner.

    The scales of the quantization are not counted. One scale per row adds about 0.1 %; one per group of inputs (int4)
    adds several percent.
    """
    layers, weights, _ = count_quantized(recipe, policy)
    scheme = recipe.rollout_quantization
    if scheme is None or not layers:
        return 0
    config = scheme.config()
    copy_dtype = torch.bfloat16 if recipe.bf16 else dtype
    bytes_per_value = copy_dtype.itemsize
    bytes_per_weight = 0.5 if isinstance(config, type(Int4Packed().config())) else 1.0  # bytes of a quantized weight
    if isinstance(config, FakeQuantize):
        # Values stay in the weight's dtype, or in fp32 if activations are rounded too.
        bytes_per_weight = bytes_per_value if config.activation is None else 4.0
    # With adapters the copy shares the frozen embedding, head and norms with the learner.
    shared = recipe.lora is not None and copy_dtype == dtype and gpus_per_learner(recipe) == 1
    other_weights = 0 if shared else policy.num_parameters - weights
    return int(weights * bytes_per_weight) + other_weights * bytes_per_value


def plan(recipe: Recipe) -> str:
    """Return the plan as text, after all checks of the recipe that need no weights.

    Raises:
        ValueError: The recipe cannot run.
    """
    policy = meta_policy(recipe)
    # Without a tokenizer, the tokens of a prompt cannot be counted. The task is then not opened, because its data may
    # not be on this machine.
    prompt_tokens = recipe.max_prompt_length or ASSUMED_PROMPT
    if policy.tokenizer is not None:
        check_not_empty("task", recipe.task)
        problem = recipe.task[0]
        prompt_tokens = len(prompt_ids(policy, problem.prompt, problem.blank))
    check_recipe(recipe, policy, prompt_tokens)
    lines = [*model_lines(recipe, policy), *batch_lines(recipe, policy, prompt_tokens)]
    estimate = memory(recipe, policy, prompt_tokens)
    lines += [*memory_lines(recipe, estimate), *save_lines(recipe, policy, estimate)]
    return "\n".join([*lines, *time_lines(recipe, stage_seconds(recipe_per_process(recipe), policy, prompt_tokens))])


def model_lines(recipe: Recipe, policy: MetaPolicy) -> list[str]:
    """Return the lines about the model: parameters, adapters and quantized layers."""
    trainable = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    adapters = "" if recipe.lora is None else f" in {recipe.lora}"
    layers, weights, skipped = count_quantized(recipe, policy)
    reasons = Counter(reason.split(" ")[0] if reason.startswith("tied") else reason for reason in skipped.values())
    skipped_text = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or ("none" if layers else "all")
    engine_line = "rollout engine        not counted: memory and time below are for sampling in the learner's process"
    return [
        f"{recipe.name}: {recipe.model if isinstance(recipe.model, str) else policy.spec.name} "
        f"({type(policy.module).__name__}, {policy.spec.attention} attention)",
        f"parameters            {policy.num_parameters:,}",
        f"trainable parameters  {trainable:,}{adapters}",
        f"quantized layers      {layers} with {weights:,} weights; skipped: {skipped_text}",
        f"corrector             {recipe.corrector}",
        *([engine_line] if recipe.rollout_engine is not None else []),
        *(f"warning: {caution}" for caution in learning_rate_warnings(recipe.learning_rate, policy.num_parameters)),
    ]


def batch_lines(recipe: Recipe, policy: MetaPolicy, prompt_tokens: int) -> list[str]:
    """Return the lines about the batches of a step."""
    num_processes = assumed_processes(recipe)
    rows = recipe.train_batch_size * recipe.num_generations
    length = recipe.max_new_tokens
    graphs_text = "none: an update runs every forward again, one at a time"
    if graphs := num_retained_graphs(recipe, policy, rows=rows // num_processes):
        prefix = "" if recipe.likelihood.name in ONE_VIEW else "up to "
        graphs_text = (
            f"{prefix}{graphs} from scoring, which the first update uses instead of running these forwards again "
            "(max_retained_graphs)"
        )
    micro_rows = min(recipe.micro_batch_size or rows, rows // num_processes)
    return [
        f"processes             {num_processes} assumed; put WORLD_SIZE=N in front of the command to plan for N",
        f"rollout batch         {rows} rows x ({prompt_tokens} assumed prompt + {length} new) tokens: "
        f"{recipe.train_batch_size} prompts x {recipe.num_generations} completions, over all processes",
        f"update batch          {micro_rows} rows per forward of a process, {recipe.num_iterations} updates per step",
        f"autograd graphs kept  {graphs_text}",
        f"tokens per step       {rows * length:,} sampled, {rows * (length + prompt_tokens):,} with the prompts",
    ]


def memory_lines(recipe: Recipe, step_memory: Memory) -> list[str]:
    """Return the lines about the memory of a GPU, and which GPUs are large enough."""
    num_gpus = gpus_per_learner(recipe)
    shared_text = f"; {num_gpus} GPUs share the learner" if num_gpus > 1 else ""
    lines = ["memory per GPU in GB (10^9 bytes), estimated from the shapes of the weights and the batch" + shared_text]
    for name, value in step_memory.persistent.items():
        lines.append(f"  {name:15}  {value / GB:8.3f} GB in every stage")
    for name, value in step_memory.peaks.items():
        lines.append(f"  {name:15}  {value / GB:8.3f} GB at the peak of this stage, including the tensors above")
    lines.append(f"  {'peak':15}  {step_memory.peak / GB:8.3f} GB, the largest of the stages' peaks")
    lines.append(
        "fits                  " + ", ".join(f"{size} GB: {fit(step_memory.peak, size)}" for size in GPU_SIZES)
    )
    if fit(step_memory.peak, GPU_SIZES[0]) == "no":
        lines.append(
            "to reduce memory      --gradient_checkpointing, a smaller --micro_batch_size or --rollout_batch_size, "
            "--lora Lora, --optim AdamW8bit, --base_quantization nf4, or --shard_size on several GPUs"
        )
    return lines


def save_lines(recipe: Recipe, policy: MetaPolicy, step_memory: Memory) -> list[str]:
    """Return the lines about checkpoints: their size on disk, the memory on the host, and the time of a save."""
    # Bytes of the optimizer's state and the adapters, which every checkpoint has. `persistent` has those of one GPU.
    state_bytes = gpus_per_learner(recipe) * sum(
        step_memory.persistent.get(name, 0) for name in ("optimizer", "adapters")
    )
    weight_bytes = policy.num_parameters * weights_dtype(recipe, policy).itemsize
    full_bytes = weight_bytes + state_bytes  # of a checkpoint with all weights; the last one always has them
    only_adapters = saves_only_adapters(recipe)
    checkpoint_bytes = state_bytes if only_adapters else full_bytes
    disk_bytes = recipe.save_total_limit * checkpoint_bytes + full_bytes
    host_bytes = min(weight_bytes, MAX_FILE_SIZE)  # one file of weights at a time
    if recipe.async_save or gpus_per_learner(recipe) > 1:
        host_bytes += weight_bytes + state_bytes * recipe.async_save
    elif recipe.lora is not None and policy.spec.stock_model is None:  # saved by transformers, from a merged copy
        host_bytes = weight_bytes
    sizes_text = f"{checkpoint_bytes / GB:.3f} GB each"
    seconds_text = f"{checkpoint_bytes / WRITE_RATE:.0f} s"
    if only_adapters:
        sizes_text += f", the last one {full_bytes / GB:.3f} GB"
        seconds_text += f", the last one {full_bytes / WRITE_RATE:.0f} s"
    merge_text = ""
    if recipe.lora is not None:
        merge_text = f"; if a CPU merges the adapters, {weight_bytes / MERGE_RATE:.0f} s more"
    return [
        f"checkpoints           {sizes_text}; {disk_bytes / GB:.3f} GB of disk for {recipe.save_total_limit} kept "
        "checkpoints and the last one while it is written",
        f"host memory at a save {host_bytes / GB:.3f} GB",
        f"time of a save        {seconds_text}, estimated at {WRITE_RATE / GB:.2f} GB/s, measured with two CPU cores "
        f"and one disk{merge_text}",
    ]


def time_lines(recipe: Recipe, seconds: dict[str, float]) -> list[str]:
    """Return the lines about the time of a step, by stage, and of the run."""
    hours = recipe.num_steps * sum(seconds.values()) / 3600
    lines = [
        "time of a step on an H100 or H200, estimated from the step's matrix products, at the percentage "
        f"below of {PEAK_FLOPS / 1e12:.0f} TFLOP/s, or from {HOST_SECONDS * 1e6:.0f} us of host time per linear layer "
        "if that takes longer"
    ]
    for name, share in peak_shares(recipe).items():
        lines.append(f"  {name:15}  {seconds[name]:8.1f} s at {share:.0%}")
    run_line = f"  {'run':15}  {hours:8.1f} h for num_steps={recipe.num_steps}, without evaluations and waiting times"
    return [*lines, run_line]


def fit(peak: int, size: int) -> str:
    """Return "yes" if a GPU of `size` GB is large enough for a peak of `peak` bytes, else "no"."""
    return "yes" if peak <= USABLE_SHARE * size * GB else "no"
