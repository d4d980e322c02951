"""The settings of TRL's `GRPOConfig` for a diffusion model: which are refused, and the recipe of the others.

docs/trl.md has the table of what is refused, with the reasons.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, Literal

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback

from dllm_rl.algorithms.correctors import Corrector, NoCorrection
from dllm_rl.algorithms.losses import (
    CISPO,
    K3,
    SAPO,
    VESPO,
    FixedLengthMean,
    Loss,
    OffPolicyMask,
    SequenceMean,
    TokenMean,
)
from dllm_rl.frontend.grpo import grpo_recipe
from dllm_rl.frontend.trl_names import OFF
from dllm_rl.integrations.oracle import Oracle
from dllm_rl.models.base import Policy
from dllm_rl.models.checkpoint.adapters import check_peft_config
from dllm_rl.recipe import Recipe
from dllm_rl.records import describe, fit
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.training.sharded_learner import launch_engine

# Fields of GRPOConfig that the trainer does not read, or with which it was not tried: they stay at their defaults.
UNUSED_FIELDS = (
    *(*OFF, "bf16_full_eval", "cast_lm_head_to_fp32", "fp16_full_eval", "parallelism_config", "torch_compile"),
    "trust_remote_code",
)
UNUSED_ARGUMENTS = ("tools", "rollout_func", "environment_factory", "quantization_config")
SAME_FIELDS = ("num_generations", "num_iterations", "beta", "seed", "bf16", "gradient_checkpointing")  # as a Recipe's
CLIP_FIELDS = ("importance_sampling_level", "epsilon", "epsilon_high", "delta")  # of the losses that clip a ratio
# TRL's loss types, and their averages over tokens. That of "bnpo" is over each micro-batch, which the trainer counts.
REDUCTIONS: dict[str, Callable[[Any], Any]] = {
    "bnpo": lambda args: TokenMean(),
    "cispo": lambda args: TokenMean(),
    "dapo": lambda args: TokenMean(),
    "dr_grpo": lambda args: FixedLengthMean(length=args.max_completion_length),
    "grpo": lambda args: SequenceMean(),
    "luspo": lambda args: FixedLengthMean(length=1),  # the sum over a sequence's tokens
    "sapo": lambda args: SequenceMean(),
    "vespo": lambda args: TokenMean(),
}
# The loss types whose objective clips no ratio, their objectives, and the fields that these read.
OBJECTIVES: dict[str, tuple[Callable[[Any], Loss], tuple[str, ...]]] = {
    "cispo": (
        lambda args: CISPO(max_ratio=args.epsilon if args.epsilon_high is None else args.epsilon_high),
        ("epsilon", "epsilon_high"),
    ),
    "sapo": (
        lambda args: SAPO(temperature_pos=args.sapo_temperature_pos, temperature_neg=args.sapo_temperature_neg),
        ("sapo_temperature_pos", "sapo_temperature_neg"),
    ),
    "vespo": (
        lambda args: VESPO(
            k_pos=args.vespo_k_pos,
            lam_pos=args.vespo_lambda_pos,
            k_neg=args.vespo_k_neg,
            lam_neg=args.vespo_lambda_neg,
        ),
        ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"),
    ),
}


def check_settings(args: Any, arguments: dict[str, Any]) -> None:
    """Raise one ValueError for all settings that have no meaning for a diffusion model, or are not supported.

    `arguments` are those of TRL's trainer.
    """
    defaults = defaults_of(args)
    values = {name: getattr(args, name) for name in UNUSED_FIELDS if name in defaults}  # a TRL may lack some
    refused = [f"{name}={x!r}" for name, x in values.items() if x != defaults[name] and (x or defaults[name])]
    refused += [name for name in UNUSED_ARGUMENTS if arguments.get(name) is not None]
    if args.loss_type not in REDUCTIONS:
        refused.append(f"loss_type={args.loss_type!r} (it is one of {', '.join(REDUCTIONS)})")
    if others := set(args.model_init_kwargs or {}) - {"dtype"}:
        refused.append(f"model_init_kwargs {sorted(others)} (only dtype)")
    if engine := launch_engine():
        refused.append(f"distributed_type={engine} in the launch's config (only MULTI_GPU or MULTI_CPU)")
    if refused:
        raise ValueError(
            f"DiffusionGRPOTrainer has no use for {'; '.join(refused)}; leave them out (docs/trl.md has the reasons)"
        )


def defaults_of(args: Any) -> dict[str, Any]:
    """Return the defaults of a GRPOConfig's fields."""
    return {field.name: field.default for field in fields(args)}


def check_adapters(config: Any, setting: str) -> None:
    """Raise ValueError for adapters of peft that the trainer cannot train, or whose file `load_policy` would refuse."""
    check_peft_config(config, setting)
    if config.lora_dropout:
        raise ValueError(f"{setting}: lora_dropout={config.lora_dropout}: forwards have no dropout; set it to 0")


def check_peft_model(model: Any) -> None:
    """Raise ValueError for a PeftModel whose adapters would not be trained, or not be in the model's forwards."""
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"model has the active adapters {active}, and one is trained: call model.set_adapter(NAME)")
    check_adapters(model.peft_config[active[0]], "model")
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if any(layer.merged for layer in layers):
        raise ValueError("model's adapters are merged into its weights: call model.unmerge_adapter()")
    if any(layer.disable_adapters for layer in layers):
        raise ValueError("model's adapters are switched off: call model.enable_adapter_layers()")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model's adapters are frozen: load them by PeftModel.from_pretrained(..., is_trainable=True)")


def check_rewards(reward_funcs: Any) -> None:
    """Raise ValueError for an `Oracle`, whose calls only a run of `grpo` can count and store."""
    for index, function in enumerate(reward_funcs if isinstance(reward_funcs, list | tuple) else [reward_funcs]):
        if isinstance(function, Oracle):
            raise ValueError(
                f"reward_funcs[{index}] is an Oracle, whose budget and stored calls belong to a run of grpo; use "
                "grpo, or give the function itself"
            )


def check_trainer_callbacks(callbacks: Iterable[Any]) -> None:
    """Raise ValueError unless all are callbacks of transformers' trainer, or classes of them."""
    for index, callback in enumerate(callbacks):
        kind = callback if isinstance(callback, type) else type(callback)
        if not issubclass(kind, TrainerCallback):
            raise ValueError(
                f"callbacks[{index}] is of type {kind.__name__}; give an object of transformers.TrainerCallback "
                "(dllm_rl.Callback objects, such as StopBelow, are for grpo)"
            )


def make_recipe(policy: Policy, args: Any, **choices: Any) -> Recipe:
    """Return the recipe of a GRPOConfig, with the sampler, likelihood, corrector and loss in `choices`."""
    corrector = choices["corrector"] = fit("corrector", Corrector, choices.get("corrector", NoCorrection()))
    drawing = {"max_new_tokens": args.max_completion_length, "temperature": args.temperature}
    drawing |= {"top_k": args.top_k or None, "top_p": None if args.top_p == 1 else args.top_p}
    sampler_options = {name: value for name, value in drawing.items() if value is not None}
    if "sampler" in choices:
        choices["sampler"] = with_drawing(fit("sampler", Sampler, choices["sampler"]), drawing)
        sampler_options = {}
    if "loss" in choices or corrector.loss is not None:
        owner = "loss" if "loss" in choices else "corrector"
        check_objective_unset(args, f"{owner}={describe(choices[owner])}")
    else:
        choices |= objective_of(args)
    if corrector.loss_reduction is None:
        choices["loss_reduction"] = REDUCTIONS[args.loss_type](args)
    recipe = grpo_recipe(
        policy,
        [{"prompt": ""}] * 2,  # nothing reads the recipe's task: TRL draws prompts and grades
        lambda completions: [0.0] * len(completions),
        preset="none",
        sampler_options=sampler_options or None,
        micro_batch_size=args.per_device_train_batch_size,
        max_retained_graphs=0,
        kl=K3(bias_correction=args.use_bias_correction_kl),
        **{name: getattr(args, name) for name in SAME_FIELDS},
        **choices,
    )
    if args.off_policy_mask_threshold is None:
        return recipe
    # TRL's ratio is to the rollout's log-probs only if vLLM samples.
    since: Literal["rollout", "old"] = "old" if recipe.rollout_quantization is None else "rollout"
    return replace(
        recipe, loss=OffPolicyMask(loss=recipe.resolved_loss, threshold=args.off_policy_mask_threshold, since=since)
    )


def with_drawing(sampler: Sampler, drawing: dict[str, Any]) -> Sampler:
    """Return the sampler with GRPOConfig's length, temperature and filters, as far as it has them."""
    drawing = {name: value for name, value in drawing.items() if hasattr(sampler, name)}
    for name, value in drawing.items():
        if getattr(sampler, name) not in (None, 0.0, value):
            raise ValueError(f"sampler.{name}={getattr(sampler, name)} is not GRPOConfig's ({value}); set it there")
    return sampler.replace(**drawing)


def objective_of(args: Any) -> dict[str, Any]:
    """Return the arguments of `grpo_recipe` for the objective of a GRPOConfig."""
    if args.loss_type not in OBJECTIVES:
        return {name: getattr(args, name) for name in CLIP_FIELDS if getattr(args, name) is not None}
    if args.importance_sampling_level != "token" and args.loss_type != "vespo":  # whose ratio is always the row's
        raise ValueError(
            f"importance_sampling_level={args.importance_sampling_level!r} with loss_type={args.loss_type!r} is not "
            "supported, whose ratio is a token's: leave one of them out, or use loss_type='grpo' or 'luspo'"
        )
    make, _ = OBJECTIVES[args.loss_type]
    return {"loss": make(args)}


def check_objective_unset(args: Any, given: str) -> None:
    """Raise ValueError for a field of the objective that was set, and that the `given` one replaces."""
    defaults = defaults_of(args)
    names = {*CLIP_FIELDS, *(name for _, read in OBJECTIVES.values() for name in read)}
    changed = sorted(name for name in names if getattr(args, name) != defaults[name])
    if args.loss_type in OBJECTIVES:
        changed.append("loss_type")
    if changed:
        values = ", ".join(f"{name}={getattr(args, name)!r}" for name in changed)
        raise ValueError(f"{given} replaces the objective that GRPOConfig's {values} would choose; leave one out")
