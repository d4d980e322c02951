"""Translate TRL's names for settings into those of `grpo_recipe`. docs/trl.md has the names."""

import inspect
from collections.abc import Callable, Mapping, Set
from functools import wraps
from typing import Any, ParamSpec

from dllm_rl.algorithms import optimizers
from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.algorithms.losses import GSPO, FixedLengthMean, PPOClip, SequenceMean, TokenMean
from dllm_rl.distributed.collectives import num_launched
from dllm_rl.groups import TRL_FLAT, check_flat, nested, type_of
from dllm_rl.presets import PRESETS, find_preset
from dllm_rl.recipe import Recipe
from dllm_rl.records import annotations_of, check_scalar, describe, fit, union_members, with_nearest

# From TRL's names to keywords of grpo_recipe with the same meaning. NAME.ARGUMENT is an argument of the function in the
# keyword NAME, or an entry of the dict `sampler_options`.
TRL_NAMES = {
    "max_completion_length": "max_new_tokens",
    "max_steps": "num_steps",
    "run_name": "name",
    "hub_model_id": "push_to_hub",
    "tokenizer": "processing_class",
    "peft_config": "lora",
    "top_k": "sampler_options.top_k",
    "top_p": "sampler_options.top_p",
    "epsilon": "loss.epsilon",
    "epsilon_high": "loss.epsilon_high",
    "delta": "loss.delta",
    "scale_rewards": "advantages.scale_rewards",
    "warmup_steps": "lr_schedule.warmup_steps",
}
DR_GRPO = FixedLengthMean(length=1)  # stands for the mean over max_new_tokens, which `grpo_recipe` knows
# From TRL's names whose values are strings to keywords of grpo_recipe, and their values for the strings that have an
# equivalent.
STRING_VALUES: dict[str, tuple[str, dict[str, Any]]] = {
    "loss_type": (
        "loss_reduction",
        {"grpo": SequenceMean(), "dapo": TokenMean(), "dr_grpo": DR_GRPO},
    ),
    # This sets only the level: epsilon stays 0.2, and epsilon_high equals epsilon. For GSPO's bounds use loss=GSPO().
    "importance_sampling_level": ("loss", {"token": PPOClip(), "sequence": GSPO(epsilon=0.2, epsilon_high=None)}),
    "lr_scheduler_type": (
        "lr_schedule",
        {
            "constant": optimizers.ConstantRate(),
            "constant_with_warmup": optimizers.ConstantWithWarmup(),
            "linear": optimizers.LinearWithWarmup(),
            "cosine": optimizers.CosineWithWarmup(),
        },
    ),
}
# What to give for TRL's other loss types.
LOSS_TYPES = {
    "bnpo": "loss_type='dapo', whose mean is over all tokens of an update",
    "cispo": "loss=CISPO(max_ratio=epsilon_high)",
    "luspo": "loss=GSPO(epsilon=epsilon, epsilon_high=epsilon_high), loss_reduction=FixedLengthMean(length=1)",
    "sapo": "loss=SAPO(), loss_reduction=SequenceMean()",
    "vespo": "loss=VESPO()",
}
# TRL's completions per forward, and forwards per update, of one process. `batch_sizes` converts them.
BATCH_SIZES = ("per_device_train_batch_size", "gradient_accumulation_steps")
# From a setting, or another remedy, to the names without an equivalent for which it is the nearest: of TRL, of
# diffu-GRPO (d1), of verl, and of the sampler's keywords.
NEAREST = {
    "advantages": "multi_objective_aggregation adv_estimator",
    "base_quantization": "quantization_config",
    "beta": "sync_ref_model ref_model_sync_steps kl_loss_coef use_kl_loss",
    "beta, the coefficient of a KL term in the loss": "use_kl_in_reward kl_ctrl",
    "limits={'collective_timeout': ...}": "ddp_timeout",
    "corrector": "vllm_importance_sampling_mode vllm_importance_sampling_correction vllm_importance_sampling_cap "
    "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min rollout_correction rollout_is rollout_rs "
    "tis_imp_ratio_cap",
    "dry_run": "auto_find_batch_size",
    "dtype": "fp16 model_init_kwargs",
    "evaluation={'batch_size': ...}": "per_device_eval_batch_size val_batch_size",
    "eval_dataset": "val_files",
    "eval_steps": "eval_strategy test_freq",
    "gradient_checkpointing": "enable_gradient_checkpointing",
    "kl": "kl_loss_type kl_penalty",
    "learning_rate": "lr",
    "likelihood": "p_mask_prompt",
    "log={'completions_steps': ...}": "log_completions",
    "loss=PPOClip(epsilon=...)": "clip_ratio clip_ratio_low",
    "loss=PPOClip(epsilon_high=...)": "clip_ratio_high",
    "loss=PPOClip(delta=...)": "clip_ratio_c",
    "lora": "lora_rank lora_alpha",
    "loss_reduction": "loss_agg_mode",
    "lr_scheduler_type": "lr_scheduler_kwargs",
    "max_grad_norm": "grad_clip",
    "max_new_tokens": "max_response_length",
    "metric_for_best_model": "greater_is_better",
    "max_num_gen_batches": "filter_groups",
    "micro_batch_size": "ppo_micro_batch_size_per_gpu ppo_micro_batch_size ppo_max_token_len_per_gpu use_dynamic_bsz",
    "model": "path",
    "name": "experiment_name project_name",
    "num_generations": "n",
    "num_iterations": "steps_per_generation ppo_epochs",
    "num_steps": "num_train_epochs total_training_steps total_epochs",
    "optim": "adam_epsilon optim_args",
    "output_dir": "default_local_dir",
    "processing_class": "chat_template_kwargs",
    "report_to": "logger",
    "resample_masks": "random_masking",
    "resume_from_checkpoint": "resume_mode resume_from_path",
    "reward_funcs": "reward_processing_classes custom_reward_function compute_score",
    "reward_funcs that return None for cut answers": "mask_truncated_completions",
    "rollout_quantization": "use_vllm",
    "rollout_engine": "rollout.name",
    "late": "vllm_mode async_training",
    "sampler_options": "generation_kwargs",
    "sampler_options.block_size": "block_length block_size",
    "sampler_options.cache": "cache_implementation",
    "sampler_options.diffusion_steps": "diffusion_steps",
    "sampler_options.rank": "remasking",
    "save_steps": "save_strategy save_freq",
    "seed": "data_seed",
    "scale_rewards": "norm_adv_by_std_in_grpo",
    "shard_size": "deepspeed fsdp fsdp_config param_offload optimizer_offload",
    "top_p": "min_p",
    "warmup_steps": "warmup_ratio lr_warmup_steps lr_warmup_steps_ratio",
    "train_batch_size": "generation_batch_size",
    "train_batch_size, all of whose prompts are in each update": "ppo_mini_batch_size",
    "train_dataset": "train_files",
    "accelerate launch --cpu": "use_cpu",
    "accelerate launch --num_processes": "n_gpus_per_node nnodes",
    "nothing: logits are computed in fp32": "cast_lm_head_to_fp32",
    "dllm-rl evaluate --samples": "num_generations_eval",
    "the environment's HF_TOKEN": "hub_token",
    "each of its fields as an argument": "args",
    "train(grpo_recipe(...), features=...)": "features",
}
# Fields of GRPOConfig that neither `grpo` nor `DiffusionGRPOTrainer` has, and TRL's defaults, which turn them off.
OFF: dict[str, object] = {
    "auto_find_batch_size": False,
    "cache_implementation": None,
    "deepspeed": None,
    "entropy_coef": 0.0,
    "fp16": False,
    "fsdp": None,
    "generation_kwargs": None,
    "min_p": None,
    "neftune_noise_alpha": None,
    "repetition_penalty": 1.0,
    "top_entropy_quantile": 1.0,
    "use_adaptive_entropy": False,
    "use_liger_kernel": False,
    "use_transformers_continuous_batching": False,
    "use_vllm": False,
}
# TRL's defaults of more names that mean what `grpo` does without them.
SAME: dict[str, object] = {
    "adam_epsilon": 1e-8,
    "args": None,
    "chat_template_kwargs": None,
    "data_seed": None,
    "generation_batch_size": None,
    "greater_is_better": None,
    "hub_token": None,
    "load_best_model_at_end": False,
    "lr_scheduler_kwargs": None,
    "mask_truncated_completions": False,
    "model_init_kwargs": None,
    "num_generations_eval": None,
    "off_policy_mask_threshold": None,
    "optim": "adamw_torch_fused",
    "optim_args": None,
    "quantization_config": None,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "remove_unused_columns": False,
    "reward_processing_classes": None,
    "router_aux_loss_coef": None,
    "run_name": None,
    "save_strategy": "steps",
    "shuffle_dataset": True,
    "steps_per_generation": None,
    "sync_ref_model": False,
    "trust_remote_code": False,
    "use_cpu": False,
}
# Groups of verl's configuration, as in actor_rollout_ref.actor.ppo_epochs.
VERL = ("actor_rollout_ref", "actor", "algorithm", "custom_reward_function", "data", "model", "rollout", "trainer")
REMEDIES = {name: remedy for remedy, names in NEAREST.items() for name in names.split()}
Arguments = ParamSpec("Arguments")


def translate_trl_names(function: Callable[..., Recipe], keywords: dict[str, Any]) -> dict[str, Any]:
    """Translate keywords that may have TRL's names into the function's keywords.

    Raises:
        ValueError: Names are unknown, or a value has no equivalent.
    """
    types = {name: parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    # The function's types take precedence: its `model` accepts one more type than Recipe's.
    types = annotations_of(Recipe) | types
    known_names = (types.keys() | TRL_FLAT) - {"settings"}
    types |= dict.fromkeys(BATCH_SIZES, int) | {name: type_of(Recipe, name) for name in TRL_FLAT - {"report_to"}}
    targets = TRL_NAMES | {name: target for name, (target, _) in STRING_VALUES.items()}
    unused = unused_defaults(keywords)
    keywords = {name: value for name, value in keywords.items() if name not in unused or value != unused[name]}
    check_names(keywords, known_names, targets)
    if keywords.get("resume_from_checkpoint") is True:
        keywords["resume_from_checkpoint"] = "latest"
    for name in keywords.keys() & types.keys():
        check_scalar(name, union_members(types[name]), keywords[name])
    for name in keywords.keys() & TRL_FLAT - {"report_to"}:
        check_flat(Recipe, name, keywords[name])
    check_no_update_is_counted(keywords)
    translated = batch_sizes(keywords)
    for name, value in keywords.items():
        if name in BATCH_SIZES:
            continue
        target = targets.get(name, name)
        if target in translated:
            raise ValueError(f"{target} is set twice, once by TRL's name; set it once")
        translated[target] = STRING_VALUES[name][1][value] if name in STRING_VALUES else value
    if isinstance(translated.get("report_to"), list):
        translated["report_to"] = ",".join(translated["report_to"]) or "none"
    translated = nested(Recipe, translated)
    fields: dict[str, dict[str, Any]] = {}
    for target in [target for target in translated if "." in target]:
        name, _, field = target.partition(".")
        fields.setdefault(name, {})[field] = translated.pop(target)
    for name, values in fields.items():
        set_fields(translated, name, values, preset_fields(keywords))
    return translated


def unused_defaults(keywords: Mapping[str, Any]) -> dict[str, object]:
    """Return the defaults of TRL that change nothing next to these keywords."""
    unused = OFF | SAME
    for name, default in {"top_k": 0, "top_p": 1.0}.items():  # no filter, unless the sampler has one
        if getattr(keywords.get("sampler"), name, None) is None:
            unused[name] = default
    if keywords.get("lr_scheduler_type") == "constant":
        unused["warmup_steps"] = 0
    if keywords.get("hub_model_id") is None:
        unused["push_to_hub"] = False
    if keywords.get("per_device_train_batch_size") is None:
        unused["gradient_accumulation_steps"] = 1
    if keywords.get("advantages") is None:
        unused["multi_objective_aggregation"] = "sum_then_normalize"
    return unused


def check_names(keywords: Mapping[str, Any], known_names: Set[str], targets: Mapping[str, str]) -> None:
    """Raise one ValueError for all keywords that are not settings, and all words of STRING_VALUES without an
    equivalent.
    """
    refused = []
    for name, value in keywords.items():
        if name in STRING_VALUES and value not in list(STRING_VALUES[name][1]):
            words = ", ".join(map(repr, STRING_VALUES[name][1]))
            remedy = f"not one of {words}; for others give Recipe's {targets[name]}"
            if name == "loss_type" and value in [*LOSS_TYPES]:
                remedy = f"give {LOSS_TYPES[value]}"
            refused.append(f"{name}={value!r} ({remedy})")
        elif name.partition(".")[0] in VERL and name not in known_names:
            head, _, field = name.partition(".")
            group, field = name.split(".")[-2:] if field else ("", head)
            field = head if head in REMEDIES else f"{group}.{field}" if f"{group}.{field}" in REMEDIES else field
            is_same = field in known_names and field not in REMEDIES
            refused.append(f"{name} (give {field})" if is_same else unknown(field, known_names | targets.keys(), name))
        elif "." in name:
            head, _, field = name.partition(".")
            given = f"sampler_options={{{field!r}: ...}}" if head == "sampler" else f"{head}=...({field}=...)"
            refused.append(f"{name} (an option of the command line: in a call give {given})")
        elif name not in BATCH_SIZES and targets.get(name, name).partition(".")[0] not in known_names:
            refused.append(unknown(name, known_names | targets.keys()))
    if refused:
        raise ValueError(f"not settings of grpo: {', '.join(refused)}; help(dllm_rl.Recipe) lists all")


def unknown(name: str, known: Set[str], given: str | None = None) -> str:
    """Return a name that is not a setting, or as it was `given`, with what is nearest to it."""
    if name in Recipe.GROUPED:
        group, _, field = Recipe.GROUPED[name].partition(".")
        return f"{given or name} (give {group}={{'{field}': ...}})"
    if name in REMEDIES:
        return f"{given or name} (the nearest is {REMEDIES[name]})"
    return (given or name) + with_nearest(name, known).removeprefix(name)


def preset_fields(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's fields of the preset that is named; {} without one."""
    preset = keywords.get("preset")
    return find_preset(preset, keywords.get("name", ""))[0] if preset in PRESETS else {}


def check_no_update_is_counted(keywords: Mapping[str, Any]) -> None:
    """Raise ValueError if a keyword counts updates, and a step has several of them, also by a preset."""
    default = preset_fields(keywords).get("num_iterations", 1)
    if (updates := keywords.get("num_iterations", default)) > 1:
        schedule = type(STRING_VALUES["lr_scheduler_type"][1][keywords.get("lr_scheduler_type", "constant")]).__name__
        remedies = {"max_steps": f"num_steps (max_steps / {updates})", "lr_scheduler_type": f"lr_schedule={schedule!r}"}
        remedies["warmup_steps"] = "a schedule with it as lr_schedule, such as LinearDecay(warmup_steps=2)"
        for name, remedy in remedies.items():
            if keywords.get(name) not in (None, "constant", 0):  # a constant rate does not count updates
                raise ValueError(f"{name} counts updates, and num_iterations of them are one step here; give {remedy}")


def batch_sizes(keywords: dict[str, Any]) -> dict[str, Any]:
    """Return the settings for TRL's BATCH_SIZES; {} without them.

    They are micro_batch_size (rows of a forward), train_batch_size (prompts) and num_generations, by default TRL's.

    Raises:
        ValueError: The completions of a step are not complete groups.
    """
    if not keywords.keys() & set(BATCH_SIZES):
        return {}
    rows, forwards = keywords.get(BATCH_SIZES[0]), keywords.get(BATCH_SIZES[1], 1)
    if rows is None:
        raise ValueError(f"gradient_accumulation_steps={forwards} needs per_device_train_batch_size, in completions")
    generations = max(1, keywords.get("num_generations", Recipe.num_generations))  # Recipe refuses a value below 1
    completions = rows * forwards * num_launched()
    if completions % generations:
        raise ValueError(
            f"per_device_train_batch_size={rows} gives {completions} completions per step, which is not a multiple of "
            f"num_generations={generations}; use a multiple, or train_batch_size, in prompts"
        )
    sizes = {"micro_batch_size": rows, "train_batch_size": completions // generations}
    return sizes if "num_generations" in keywords else sizes | {"num_generations": generations}


def set_fields(settings: dict[str, Any], name: str, values: dict[str, Any], preset: Mapping[str, Any]) -> None:
    """Set fields of the record in a setting, which may be of a preset, all at once because it may check them together,
    or entries of `sampler_options`.
    """
    if name == "sampler_options":
        settings[name] = {**(settings.get(name) or {}), **values}
        return
    default = {"loss": PPOClip(), "advantages": GroupRelative(), "lr_schedule": optimizers.LinearDecay()}[name]
    given = settings.get(name) or preset.get(name) or default
    record = fit(name, annotations_of(Recipe)[name], given)  # which may be given by its name
    for field, value in values.items():
        if not hasattr(record, field):
            raise ValueError(f"{field}={value!r} is not a setting of {name}={describe(record)}; leave one of them out")
        if isinstance(value, bool):  # scale_rewards of earlier TRL versions
            values[field] = "group" if value else "none"
    settings[name] = record.replace(**values)


def with_trl_names(function: Callable[Arguments, Recipe]) -> Callable[Arguments, Recipe]:
    """Decorate `grpo_recipe`, so that it also accepts TRL's names."""

    @wraps(function)
    def call(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Recipe:
        return function(*arguments, **translate_trl_names(function, keywords))

    return call
