"""The plan that a dry run prints, computed without loading a checkpoint's weights: parameters, batches, memory, time,
and which GPUs are large enough.
"""

import copy
from collections import Counter
from dataclasses import replace

from dllm_rl.algorithms.optimizers import AdamW8bit
from dllm_rl.decoding.prompts import ids_and_blanks
from dllm_rl.distributed.collectives import num_launched
from dllm_rl.likelihoods.drawn_steps import UNIFORM_SHARE
from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.families import find_family
from dllm_rl.models.checkpoint.loading import build_empty, load_config, num_positions
from dllm_rl.models.checkpoint.tensors import MAX_FILE_SIZE
from dllm_rl.models.lora import add_lora
from dllm_rl.models.policy import ModulePolicy
from dllm_rl.recipe import Recipe
from dllm_rl.samplers import Autoregress, Renoise, Unmask, sampler_for
from dllm_rl.tasks.base import check_not_empty
from dllm_rl.training.cautions import cautions, learning_rate_warnings
from dllm_rl.training.dry_run.duration import HOST_SECONDS, PEAK_FLOPS, host_bound_stages, peak_shares, stage_seconds
from dllm_rl.training.dry_run.memory import Memory, PlannedStep, count_quantized, num_weights, step_memory
from dllm_rl.training.policies import apply_compute_settings, call_model_function
from dllm_rl.training.rollouts_by_gpu import with_rollouts_by_gpu
from dllm_rl.training.sharded_learner import check_module, check_processes, processes_per_shard
from dllm_rl.training.validation import check_metric_names

GB = 1e9
GPU_SIZES = (24, 48, 80, 96, 141, 192)  # GB of memory
USABLE_SHARE = 0.9  # share of a GPU's memory that a run can use; the allocator, kernels and driver need the rest
WRITE_RATE = 0.57 * GB  # bytes per second: 16 GB were written in 13 s and hashed in 15 s
ASSUMED_PROMPT = 256  # tokens of a prompt, at most, if no task is opened
READ_PROMPTS = 100  # the longest of them is the prompt, if a task is opened


def plan(recipe: Recipe) -> str:
    """Return the plan as text, after all checks of the recipe that need no weights.

    Raises:
        ValueError: The recipe cannot run.
    """
    # More processes than were launched, if `shard_size` needs more.
    processes = max(processes_per_shard(recipe.shard_size, num_launched()), num_launched())
    recipe, chosen = with_rollouts_by_gpu(recipe, processes, is_plan=True)
    policy = meta_policy(recipe)
    # Without a tokenizer, the tokens of a prompt cannot be counted. The task is then not opened, because its data may
    # not be on this machine.
    positions = policy.spec.max_length or ASSUMED_PROMPT + recipe.max_new_tokens
    assumed_tokens = min(ASSUMED_PROMPT, max(1, positions - recipe.max_new_tokens))
    prompt_tokens, blanks = recipe.max_prompt_length or assumed_tokens, 0
    if policy.tokenizer is not None:
        check_not_empty("task", recipe.task)
        check_metric_names(recipe)
        problems = [recipe.task[index] for index in range(min(READ_PROMPTS, len(recipe.task)))]
        is_blank = [ids_and_blanks(policy, problem.prompt, problem.blank)[1] for problem in problems]
        prompt_tokens, blanks = max(map(len, is_blank)), max(map(sum, is_blank))
        prompt_tokens = min(prompt_tokens, recipe.max_prompt_length or prompt_tokens)  # longer ones are skipped
    step = PlannedStep(recipe, policy, prompt_tokens, processes, blanks)
    check_step(step)
    memory = step_memory(step)
    lines = [
        *model_lines(step),
        *([f"rollouts              {chosen}"] if chosen else []),
        *batch_lines(step),
        *memory_lines(step, memory),
        *save_lines(step, memory),
    ]
    return "\n".join([*lines, *time_lines(step)])


def meta_policy(recipe: Recipe) -> Policy:
    """Return a policy with the shapes of the recipe's model, on the meta device, where weights have no values.

    If `recipe.model` names a checkpoint, the module is built from the checkpoint's config, so that no weights are
    downloaded, and the policy has no tokenizer.
    """
    if not isinstance(recipe.model, str):
        made = recipe.model
        policy = made if isinstance(made, Policy) else call_model_function(made, recipe.seed, dry_run=True)
        meta = ModulePolicy(copy.deepcopy(policy.module).to("meta"), policy.spec, policy.tokenizer)
    else:
        raw_config = load_config(recipe.model)
        module = build_empty(raw_config)
        # For a model that reads images, this is the config of its text part; else it is module.config itself.
        config = module.config.get_text_config()
        # The same spec as `load_policy` makes, but without the token ids, which only the tokenizer has.
        family = find_family(raw_config)
        spec = replace(family, max_length=num_positions(config, family))
        if spec.attention == "encoder_decoder":
            spec = replace(spec, vocab_size=config.vocab_size, block_size=raw_config["canvas_length"])
        meta = ModulePolicy(module, spec, None)
    apply_compute_settings(recipe, meta)
    if recipe.lora is not None:
        add_lora(meta, recipe.lora)
    return meta


def check_step(step: PlannedStep) -> None:
    """Raise ValueError if the recipe's sampler, likelihood, model and processes cannot be combined, or if a prompt and
    its completion have more tokens than the model has positions.
    """
    recipe, policy = step.recipe, step.policy
    recipe.likelihood.check_policy(policy)
    check_processes(recipe, step.processes)
    if step.shard_size > 1:
        check_module(policy.module, step.shard_size)
    sampler, expected_sampler = type(recipe.sampler), sampler_for(policy)
    if sampler in (Autoregress, Unmask, Renoise) and sampler is not expected_sampler:
        raise ValueError(
            f"sampler={sampler.__name__} is not for {policy.spec.attention!r} attention; use "
            f"{expected_sampler.__name__}"
        )
    max_positions = policy.spec.max_length
    if max_positions is not None and step.row_tokens > max_positions:
        raise ValueError(
            f"max_new_tokens={recipe.max_new_tokens} after {step.prompt_tokens} tokens exceeds the model's "
            f"{max_positions} positions"
        )


def model_lines(step: PlannedStep) -> list[str]:
    """Return the lines about the model: parameters, adapters and quantized layers."""
    recipe, policy = step.recipe, step.policy
    parameters = num_weights(policy.module)
    trainable = sum(p.numel() for p in policy.module.parameters() if p.requires_grad)
    adapters = "" if recipe.lora is None else f" in {recipe.lora}"
    layers, weights, skipped = count_quantized(step)
    reasons = Counter(reason.split(" ")[0] if reason.startswith("tied") else reason for reason in skipped.values())
    skipped_text = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or ("none" if layers else "all")
    warnings = [*cautions(recipe), *learning_rate_warnings(recipe.learning_rate, parameters)]
    weights_too = "" if recipe.teacher is not None and recipe.teacher.is_reference else " and weights"
    others = "workers" if recipe.late is not None else "engine"
    elsewhere = f"{f'rollout {others}':22}not counted: memory and time below are for sampling in the learner's process"
    return [
        f"{recipe.name}: {recipe.model if isinstance(recipe.model, str) else policy.spec.name} "
        f"({type(policy.module).__name__}, {policy.spec.attention} attention)",
        f"parameters            {parameters:,}",
        f"trainable parameters  {trainable:,}{adapters}",
        f"quantized layers      {layers} with {weights:,} weights; skipped: {skipped_text}",
        f"corrector             {recipe.corrector}",
        *([f"teacher               not counted: its forwards{weights_too}"] if recipe.teacher is not None else []),
        *([elsewhere] if recipe.late is not None or recipe.rollout_engine is not None else []),
        *(f"warning: {caution}" for caution in warnings),
    ]


def batch_lines(step: PlannedStep) -> list[str]:
    """Return the lines about the batches of a step."""
    recipe = step.recipe
    rows = recipe.train_batch_size * recipe.num_generations
    graphs_text = "none: an update runs every forward again, one at a time"
    if step.num_graphs:
        graphs_text = (
            f"{step.num_graphs} of scoring's {step.num_forwards} forwards, which the first update does not run again "
            "(max_retained_graphs)"
        )
    growth, drawn = recipe.likelihood.variance_growth, []
    if growth is not None:
        seconds = stage_seconds(step)
        least = UNIFORM_SHARE * (seconds["scoring"] + seconds["update"])
        drawn = [
            f"steps drawn           with variance_growth={growth:g} from {UNIFORM_SHARE * step.num_views:.2g} to "
            f"{step.num_views} row-forwards score a completion (drawn_steps/row_forwards). Planned are all "
            f"{step.num_views}, for a policy that is unsure of every token; of the time below scoring and update take "
            f"from {least:.1f} s to {least / UNIFORM_SHARE:.1f} s, in proportion"
        ]
    prompt = "assumed prompt" if step.policy.tokenizer is None else "longest prompt"
    return [
        f"processes             {step.processes} assumed; put WORLD_SIZE=N in front of the command to plan for N",
        f"rollout batch         {rows} rows x ({step.prompt_tokens} {prompt} + {recipe.max_new_tokens} new) "
        f"tokens: {recipe.train_batch_size} prompts x {recipe.num_generations} completions, over all processes",
        f"update batch          {step.forward_rows} rows per forward of a process, {recipe.num_iterations} updates per "
        "step",
        f"autograd graphs kept  {graphs_text}",
        *drawn,
        f"tokens per step       {rows * (step.blanks + recipe.max_new_tokens):,} sampled, "
        f"{rows * step.row_tokens:,} with the prompts",
    ]


def memory_lines(step: PlannedStep, memory: Memory) -> list[str]:
    """Return the lines about the memory of a GPU, and which GPUs are large enough."""
    shared_text = f"; {step.shard_size} GPUs share the learner" if step.shard_size > 1 else ""
    lines = ["memory per GPU in GB (10^9 bytes), estimated from the shapes of the weights and the batch" + shared_text]
    for name, value in memory.persistent.items():
        lines.append(f"  {name:15}  {value / GB:8.3f} GB in every stage")
    for name, value in memory.peaks.items():
        lines.append(f"  {name:15}  {value / GB:8.3f} GB at the peak of this stage, including the tensors above")
    lines.append(f"  {'peak':15}  {memory.peak / GB:8.3f} GB, the largest of the stages' peaks")
    fits = {size: memory.peak <= USABLE_SHARE * size * GB for size in GPU_SIZES}
    fits_text = ", ".join(f"{size} GB: {'yes' if is_enough else 'no'}" for size, is_enough in fits.items())
    lines.append(f"fits                  {fits_text}")
    if not fits[GPU_SIZES[0]]:
        lines.append(f"to reduce memory      {', or '.join(memory_remedies(step))}")
    return lines


def memory_remedies(step: PlannedStep) -> list[str]:
    """Return the settings that need less memory, without those that the recipe has. Those that change nothing but
    memory, time and rounding come first, the one that costs the least time before the others.
    """
    recipe, sharded, lora = step.recipe, step.shard_size > 1, step.recipe.lora
    is_decoder = step.policy.spec.attention != "encoder_decoder"  # its weights and cache take neither of two settings
    smaller = "--lora.r 16" if lora is None else f"--lora.r 16 --lora.alpha {16 * lora.alpha / lora.r:g}"
    can_quantize = is_decoder and isinstance(recipe.model, str) and not sharded and lora is not None
    can_quantize = can_quantize and not any(is_wrong for is_wrong, _ in recipe.low_bit_conflicts(""))
    # Sharding saves nothing with adapters and unquantized rollouts: a sharded learner needs a full copy to sample with.
    shards_well = lora is None or recipe.rollout_quantization is not None
    shards_well = shards_well and not (recipe.base_quantization or recipe.loads_best)
    remedies = {
        "a smaller --micro_batch_size or --rollout_batch_size": True,
        "--gradient_checkpointing": is_decoder and not recipe.gradient_checkpointing,
        smaller: lora is None or lora.r > 16,
        "--base_quantization nf4": can_quantize and recipe.base_quantization is None,
        "--optim AdamW8bit": not sharded and not isinstance(recipe.optim, AdamW8bit),
        "on several GPUs --shard_size 0 --optim AdamW": not sharded and shards_well and not recipe.zero_mismatch,
    }
    return [remedy for remedy, helps in remedies.items() if helps]


def save_lines(step: PlannedStep, memory: Memory) -> list[str]:
    """Return the lines about checkpoints: their size on disk, the memory on the host, and the time of a save."""
    recipe, persistent = step.recipe, memory.persistent
    # Bytes of the optimizer's state and the adapters, which every checkpoint has. `persistent` has those of one GPU.
    state_bytes = step.shard_size * sum(persistent.get(name, 0) for name in ("optimizer", "adapters"))
    weight_bytes = num_weights(step.policy.module) * step.dtype.itemsize
    full_bytes = weight_bytes + state_bytes  # of a checkpoint with all weights; the last one always has them
    only_adapters = recipe.saves_only_adapters
    checkpoint_bytes = state_bytes if only_adapters else full_bytes
    disk_bytes = recipe.saves.total_limit * checkpoint_bytes + full_bytes
    host_bytes = min(weight_bytes, MAX_FILE_SIZE)  # one file of weights at a time
    if recipe.saves.in_background or step.shard_size > 1:
        host_bytes += weight_bytes + state_bytes * recipe.saves.in_background
    elif recipe.lora is not None and step.policy.spec.files.stock_model is None:  # transformers saves a merged copy
        host_bytes = weight_bytes
    last_size = f", the last one {full_bytes / GB:.3f} GB" if only_adapters else ""
    return [
        f"checkpoints           {checkpoint_bytes / GB:.3f} GB each{last_size}; {disk_bytes / GB:.3f} GB of disk for "
        f"{recipe.saves.total_limit} kept checkpoints and the last one while it is written",
        f"host memory at a save {host_bytes / GB:.3f} GB",
        f"time of a save        {checkpoint_bytes / WRITE_RATE:.0f} s at {WRITE_RATE / GB:.2f} GB/s, measured with two "
        "CPU cores and one disk",
    ]


def time_lines(step: PlannedStep) -> list[str]:
    """Return the lines about the time of a step, by stage, and of the run."""
    seconds, shares, of_host = stage_seconds(step), peak_shares(step), host_bound_stages(step)
    num_steps = step.recipe.num_steps
    hours = num_steps * sum(seconds.values()) / 3600
    return [
        "time of a step on an H100 or H200, estimated from the step's matrix products, or from "
        f"{HOST_SECONDS * 1e6:.0f} us of host time per linear layer if that takes longer",
        *(
            f"  {name:15}  {seconds[name]:8.1f} s at {share:.0%} of {PEAK_FLOPS / 1e12:.0f} TFLOP/s"
            f"{': the log-probabilities of the completions before the update' * (name == 'scoring')}"
            f"{', but the host is the limit' * (name in of_host)}"
            for name, share in shares.items()
        ),
        f"  {'run':15}  {hours:8.1f} h for num_steps={num_steps}, without rewards, evaluations, saves and waiting "
        "times",
    ]
