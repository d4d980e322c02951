"""Public names of earlier versions, and their current names.

A key of RENAMED is NAME, a name of the package or a field of `Recipe`; or OWNER.NAME, a keyword of a function or a
field of a record; or one of these with =VALUE, if the value was renamed.
"""

import re
from collections.abc import Iterable
from typing import Any

RENAMED = {
    # fields of Recipe, which are also options of the command line and keywords of grpo
    "aggregate": "loss_reduction",
    "fresh_masks": "resample_masks",
    "kept_graphs": "max_retained_graphs",
    "mismatch_sample": "num_mismatch_groups",
    "sampling_support=own": "sampling_support=per_policy",
    "teacher_steps": "teacher_substeps",
    "warmup_batch_size": "sft_warmup_batch_size",
    "warmup_corruption": "sft_warmup_corruption",
    "warmup_eval_steps": "sft_warmup_eval_steps",
    "warmup_learning_rate": "sft_warmup_learning_rate",
    "warmup_metric": "sft_warmup_metric",
    "warmup_steps": "sft_warmup_steps",
    "warmup_target": "sft_warmup_target",
    # functions and classes
    "Columns": "BatchRecord",
    "Kept": "FilterSupport",
    "ViewPart": "ViewTensors",
    "Weigh": "WeightFn",
    "Weighed": "TokenWeights",
    "alarm": "ais_lambda",
    "block": "block_elbo",
    "composed": "combine_weights",
    "computed_by": "with_forward",
    "constant": "fixed_length_mean",
    "finite": "drop_nonfinite",
    "informative": "has_unequal_rewards",
    "maker": "configurable",
    "no_weights": "unit_weights",
    "none": "no_correction",
    "sequence": "sequence_mean",
    "takes_parts": "takes_component_rewards",
    "token": "token_mean",
    "weigh": "weight_fn",
    "weighs": "weight_fns",
    # keywords of functions
    "adaptive_weights.aggregate": "pool",
    "adaptive_weights.combine": "lambda_fn",
    "ais.aggregate": "pool",
    "ais.combine": "lambda_fn",
    "band_weights.c": "max_weight",
    "float8_weight_only.dequantised": "dequantized",
    "icepop.high": "max_ratio",
    "icepop.low": "min_ratio",
    "masked_weights.aggregate": "pool",
    "masked_weights.high": "max_ratio",
    "masked_weights.low": "min_ratio",
    "mis.aggregate": "pool",
    "mis.high": "max_ratio",
    "mis.low": "min_ratio",
    "plackett_luce.score": "base_rank",
    "qarl.c": "max_weight",
    "reject.aggregate": "pool",
    "reject.bound": "threshold",
    "rejection.aggregate": "pool",
    "rejection.bound": "threshold",
    "renoise.watch": "on_step",
    "tbpo.c": "max_weight",
    "tis.aggregate": "pool",
    "tiny_diffusion_gemma.expert_size": "moe_intermediate_size",
    "tiny_diffusion_gemma.num_experts_per_tok": "top_k_experts",
    "tiny_diffusion_gemma.num_heads": "num_attention_heads",
    "tiny_diffusion_gemma.softcap": "final_logit_softcapping",
    "tiny_llama.num_heads": "num_attention_heads",
    "tiny_masked_lm.num_heads": "num_attention_heads",
    "tiny_moe.intermediate_size": "moe_intermediate_size",
    "tiny_moe.num_heads": "num_attention_heads",
    "trajectory.num_sampled": "num_sampled_steps",
    "trajectory.order": "include_order",
    "trajectory.order=given": "include_order=False",
    "trajectory.order=law": "include_order=True",
    "trajectory_views.num_sampled": "num_sampled_steps",
    "truncated_weights.aggregate": "pool",
    "unmask.watch": "on_step",
    # inputs that a user's functions receive by name
    "commit.changed": "replaceable",
    "commit.visible": "redrawable",
    "commit.written": "remaskable",
    "surrogate.old": "old_logprobs",
    "surrogate.sum_over": "sum_over_processes",
    # fields and methods of records
    "Batch.keep": "loss_mask",
    "Batch.old": "old_logprobs",
    "Batch.old_scores": "old_view_logprobs",
    "Batch.reference": "reference_logprobs",
    "Batch.sum_over": "sum_over_processes",
    "Batch.weights": "importance_weights",
    "Columns.united": "merge_records",
    "Corrector.aggregate": "loss_reduction",
    "Corrector.made_by": "factory",
    "Corrector.surrogate": "loss",
    "Corrector.weighs": "has_weight_fn",
    "Events.by_draws": "depends_on_tokens",
    "FamilySpec.ignored": "ignored_tensors",
    "FamilySpec.names": "tensor_names",
    "FamilySpec.native": "stock_model",
    "FamilySpec.original": "original_config",
    "FamilySpec.recognises": "matches",
    "FamilySpec.source": "checkpoint_folder",
    "FamilySpec.when": "config_test",
    "LikelihoodEstimator.attention": "supported_attention",
    "LikelihoodEstimator.draw": "draw_views",
    "LikelihoodEstimator.made_by": "factory",
    "LikelihoodEstimator.random": "is_random",
    "LikelihoodEstimator.scores": "view_logprobs",
    "LikelihoodEstimator.scores.keep_graphs": "retain_graphs",
    "Order.draw": "draw_index",
    "Order.noisy_rank": "rank_function",
    "Order.open_step": "block_first_step",
    "Order.rank": "rank_name",
    "Order.soft": "soft_threshold_params",
    "Policy.version": "weights_version",
    "Prompts.open": "infill_mask",
    "QuantizationReport.kept": "skipped",
    "Recipe.aggregation": "resolved_loss_reduction",
    "Recipe.keeps_reference": "needs_reference_policy",
    "Recipe.mask_draws": "num_mask_sets",
    "Recipe.rolls_out_apart": "has_separate_rollout_policy",
    "Recipe.surrogate": "resolved_loss",
    "Rollout.joined": "concatenate",
    "Rollout.kept": "filter_support",
    "Rollout.replaced": "replace_rows",
    "RolloutEngine.made_by": "factory",
    "SamplingParams.support=own": "support=per_policy",
    "ViewPart.on": "apply_to",
    "ViewPart.recorded": "sampler_logprobs",
    "ViewPart.single_tokens": "is_per_token",
    "Views.only": "restrict_to_rows",
    "Views.parts": "features",
    "Views.weight": "coefficients",
}
# The tokens of a text that `members.describe` makes.
_WORD = re.compile(
    r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?P<call>[\w.:]*)\(|\)|(?P<key>\w+)=(?:'(?P<value>\w+)')?|[\w.:]+"""
)


def hint(name: str, *owners: str) -> str:
    """Return a text such as `aggregate is now pool` if one of the owners once had this name, else ""."""
    for owner in owners or ("",):
        if now := RENAMED.get(f"{owner}.{name}" if owner else name):
            return f"{name} is now {now}"
    return ""


def refuse_renamed(names: Iterable[str], *owners: str) -> None:
    """Raise ValueError on the first name that was renamed."""
    for name in names:
        if rename_hint := hint(name, *owners):
            raise ValueError(rename_hint)


def renamed(owner: str, name: str, value: Any = None) -> tuple[str, Any]:
    """Return the current name and value for a stored name and value of `owner` ("" for a recipe)."""
    path = f"{owner}.{name}" if owner else name
    if isinstance(value, str) and (pair := RENAMED.get(f"{path}={value}")):
        new_name, _, new_value = pair.partition("=")
        return new_name, new_value
    return RENAMED.get(path, name), value


def renamed_text(text: str) -> str:
    """Convert a stored description to current names: `tis(aggregate='product')` -> `tis(pool='product')`."""
    owners: list[str] = []
    parts: list[str] = []
    end = 0
    for match in _WORD.finditer(text):
        word, call, key, value = match[0], match["call"], match["key"], match["value"]
        if call is not None:
            owners.append(call)
            word = RENAMED.get(call, call) + "("
        elif key is not None:
            name, new_value = renamed(owners[-1] if owners else "", key, value)
            word = f"{name}={new_value if new_value != value else repr(value) if value else ''}"
        elif word == ")":
            owners = owners[:-1]
        else:
            word = RENAMED.get(word, word)
        parts += [text[end : match.start()], word]
        end = match.end()
    return "".join(parts) + text[end:]


def renamed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's stored settings under current names. `members.same_setting` compares their values."""
    return dict(renamed("", name, value) for name, value in settings.items())
