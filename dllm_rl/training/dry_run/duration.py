"""Estimate a step's duration on a GPU, from its matrix products and from speeds measured on an H200 and an H100."""

import math

from dllm_rl.quantization.schemes import Float8Dynamic, Float8WeightOnly
from dllm_rl.recipe import Recipe
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.training.dry_run.memory import PlannedStep, token_layers

PEAK_FLOPS = 989e12  # operations per second of an H100 and an H200 in dense bf16
# Shares of PEAK_FLOPS that were measured on LLaDA-8B's shapes (benchmarks/README.md). In FP8 a share may be above 1.
FORWARD_SHARE = 0.49  # a forward in bf16
BACKWARD_SHARE = 0.20  # a forward and backward
LARGE_FORWARD = 24 * 512  # tokens of a forward from which on a rollout's share is that of large ones
# A forward of the rollout policy: eager; compiled, of few tokens (8 rows of 192); compiled, of many (48 rows of 512),
# where only dynamic FP8 was measured.
ROLLOUT_SHARES: dict[type, tuple[float, float, float]] = {
    type(None): (FORWARD_SHARE, 0.63, 0.63),
    Float8WeightOnly: (0.25, 0.54, 0.54),
    Float8Dynamic: (0.29, 0.84, 1.16),
}
# Time on the host per linear layer: 21 ms for the 225 layers of LLaDA-8B in eager bf16. A compiled forward was measured
# when it had a graph for each block: 18 ms in bf16 and 36 ms in FP8.
HOST_SECONDS = 21e-3 / 225


def forward_tokens(step: PlannedStep) -> int:
    """Return the tokens of a row in one forward of a rollout."""
    sampler = step.recipe.sampler
    if step.policy.spec.attention == "causal":
        return 1
    if step.policy.spec.attention == "encoder_decoder":  # each forward denoises a canvas
        return step.canvas
    if isinstance(sampler, Unmask) and sampler.cache is not None:
        return sampler.block_size or step.policy.spec.block_size or step.written_tokens
    return step.row_tokens


def rollout_share(recipe: Recipe, tokens: int) -> float:
    """Return the share of PEAK_FLOPS that a forward of so many tokens of the rollout policy is assumed to reach."""
    eager, few, many = ROLLOUT_SHARES.get(type(recipe.rollout_quantization), (FORWARD_SHARE,) * 3)
    compiled = many if tokens >= LARGE_FORWARD else few
    return compiled if recipe.torch_compile else eager


def peak_shares(step: PlannedStep) -> dict[str, float]:
    """Return the share of PEAK_FLOPS that each stage is assumed to reach."""
    rows = min(step.rows, step.recipe.rollout_batch_size or step.rows)
    rollout = rollout_share(step.recipe, rows * forward_tokens(step))
    return {"rollout": rollout, "scoring": FORWARD_SHARE, "update": BACKWARD_SHARE}


def host_bound_stages(step: PlannedStep) -> set[str]:
    """Return the stages whose time is the host's, because it takes longer to start the kernels than they run."""
    products = stage_seconds(step, host_seconds=0.0)
    return {name for name, seconds in stage_seconds(step).items() if seconds > products[name]}


def stage_seconds(step: PlannedStep, host_seconds: float = HOST_SECONDS) -> dict[str, float]:
    """Return the seconds of a process's step, by stage. All groups count as scored.

    `host_seconds` is the host's time per linear layer of a forward, which a stage takes at least. A token is multiplied
    with the weights of the experts that it uses; adapters are small and not counted.
    """
    recipe, attention = step.recipe, step.policy.spec.attention
    layers = list(token_layers(step.policy))
    weights = sum(map(math.prod, layers))
    head = weights - sum(map(math.prod, token_layers(step.policy, with_head=False)))

    def duration(tokens: float, share: float, forwards: int, passes: int = 1) -> float:
        return passes * max(2 * weights * tokens / (share * PEAK_FLOPS), forwards * len(layers) * host_seconds)

    # The head scores every completion, also where completions of a prompt share a row.
    copied_tokens = (step.rows - step.scored_rows) * step.written_tokens * head / weights
    view_tokens = step.num_views * (step.scored_rows * step.row_tokens + copied_tokens)
    rollout_tokens = step.rows * forward_tokens(step) * step.sampler_steps
    if attention == "encoder_decoder":  # the text is read once, and each forward denoises a canvas
        rollout_tokens = view_tokens = step.rows * (step.row_tokens + step.sampler_steps * step.canvas)

    share = peak_shares(step)["rollout"]
    rollout_batches = math.ceil(step.rows / (recipe.rollout_batch_size or step.rows))
    passes = 1 + bool(recipe.beta)  # forwards of the learner, and of the reference
    scoring = duration(view_tokens, FORWARD_SHARE, step.num_forwards, passes)
    if recipe.has_separate_rollout_policy and not recipe.likelihood.exact_for_sampler:
        scoring_share = rollout_share(recipe, step.forward_rows * step.row_tokens)
        scoring += duration(view_tokens, scoring_share, step.num_forwards)
    # A forward and the gradients of inputs; the gradients of weights; and the forwards that checkpointing runs again.
    passes = 2 + (recipe.lora is None) + recipe.gradient_checkpointing
    update = recipe.num_iterations * duration(view_tokens, BACKWARD_SHARE, step.num_forwards, passes)
    if step.num_graphs and recipe.num_iterations:  # the first update reuses the forward of scoring
        tokens = view_tokens * step.num_graphs / step.num_forwards
        update -= duration(tokens, BACKWARD_SHARE, step.num_graphs)
    if recipe.replay is not None:
        rows, count = step.replayed_rows, recipe.replay.num_updates
        forwards = count * math.ceil(rows / step.micro_rows)
        update += duration(count * rows * step.row_tokens, BACKWARD_SHARE, forwards, passes)
    return {
        "rollout": duration(rollout_tokens, share, rollout_batches * step.sampler_steps),
        "scoring": scoring * recipe.num_scored_mask_sets,
        "update": update,
    }
