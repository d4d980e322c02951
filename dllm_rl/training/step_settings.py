"""What a step reads of a recipe."""

from dllm_rl.recipe import Recipe
from dllm_rl.step.settings import StepSettings, UpdateSettings

DIRECTION_STEPS = 5  # steps from one measurement of `update/direction` to the next


def step_settings(recipe: Recipe) -> StepSettings:
    """Return what a step reads of a recipe."""
    is_unsharded = recipe.shard_size == 1
    loss = recipe.policy_loss
    schedule_steps = recipe.lr_schedule_steps or recipe.num_steps

    def update_settings(step: int) -> UpdateSettings:
        return UpdateSettings(
            loss=loss,
            likelihood=recipe.likelihood,
            learning_rate=recipe.learning_rate * recipe.lr_schedule(step, schedule_steps),
            max_grad_norm=recipe.max_grad_norm,
            micro_batch_size=recipe.micro_batch_size,
            max_staleness=recipe.max_staleness,
            # Not with an aligned forward: the extra forward of the measurement would quantize the updated weights, and
            # the next `quantization/codes_changed` would count no change.
            measure=(step + 1) % DIRECTION_STEPS == 0 and not recipe.corrector.align_forward,
        )

    return StepSettings(
        seed=recipe.seed,
        task=recipe.task,
        prompt_source=recipe.prompt_source,
        train_batch_size=recipe.train_batch_size,
        num_generations=recipe.num_generations,
        rollout_batch_size=recipe.rollout_batch_size,
        max_prompt_length=recipe.max_prompt_length,
        max_num_gen_batches=recipe.max_num_gen_batches,
        reward_timeout=recipe.reward_timeout,
        advantages=recipe.advantages,
        learning_rate=recipe.learning_rate,
        likelihood=recipe.likelihood,
        corrector=recipe.corrector,
        beta=recipe.beta,
        old_logprobs=recipe.old_logprobs,
        num_mask_sets=recipe.num_mask_sets,
        num_scored_mask_sets=recipe.num_scored_mask_sets,
        num_mismatch_groups=recipe.num_mismatch_groups,
        micro_batch_size=recipe.micro_batch_size,
        bf16=recipe.bf16,
        num_iterations=recipe.num_iterations,
        sampler=recipe.sampler,
        sampling_support=recipe.sampling_support,
        checks_logits=recipe.rollout_engine is None,
        counts_graphs=recipe.torch_compile or getattr(recipe.sampler, "compile_step", False),
        trains_all_groups=bool(recipe.beta or recipe.entropy_coeff or recipe.value_model),
        max_retained_graphs=recipe.max_retained_graphs if is_unsharded else 0,
        autocast_cache=is_unsharded,  # the cache would hold all weights of a sharded model in bf16
        update_settings=update_settings,
    )
