"""Rotary positions: convert a checkpoint's RoPE scaling to transformers' fields, and rotate in fp32."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dllm_rl.models.base import Module

ATTENTION = "sdpa_float32_rope"
_YARN = {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"}
# The kinds of scaling that transformers supports: (required fields, optional fields).
SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": ({"factor"}, _YARN | {"mscale", "mscale_all_dim", "truncate"}),
    "longrope": ({"short_factor", "long_factor"}, {"original_max_position_embeddings", "attention_factor", "factor"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
}
_COMMON = {"rope_type", "rope_theta", "partial_rotary_factor"}


def rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """Return transformers' `rope_parameters` for the fields of a checkpoint's config.

    Raise ValueError for an unsupported kind, field or factor.
    """
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"  # the name in older files
    scaling = raw.get(name) or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"{name}={scaling!r} is not an object; give its fields by name, or null for no scaling")
    parameters = {key: value for key, value in scaling.items() if key != "type" and value is not None}
    kind = parameters.setdefault("rope_type", scaling.get("type", "default"))  # older files have the key `type`
    if scaling.get("type", kind) != kind:
        raise ValueError(f"{name} has both rope_type={kind!r} and type={scaling['type']!r}; remove the wrong one")
    _check_scaling(name, kind, parameters)
    for key in ("rope_theta", "partial_rotary_factor"):
        if raw.get(key) is not None:
            parameters.setdefault(key, raw[key])  # a value in the scaling takes precedence
    if "rope_theta" not in parameters:  # transformers' default may be wrong for this checkpoint
        raise ValueError("rope_theta is not in the config; set the base of the rotary frequencies in config.json")
    return parameters


def _check_scaling(name: str, kind: Any, parameters: dict[str, Any]) -> None:
    """Raise ValueError for a kind of scaling, or a field of it, that transformers does not support."""
    if kind not in SCALINGS:
        raise ValueError(f"{name} has the kind {kind!r}, which is not known; known are {', '.join(SCALINGS)}")
    required, optional = SCALINGS[kind]
    for key in sorted(required - parameters.keys()):
        raise ValueError(f"{name} of the kind {kind!r} has no {key!r}; add it to config.json")
    # transformers would ignore an unknown field, and so compute other positions than the checkpoint's own code.
    for key in sorted(parameters.keys() - required - optional - _COMMON):
        raise ValueError(f"{name} of the kind {kind!r} has an unsupported field {key!r}; remove it")
    factor = parameters.get("factor", 1.0)
    # `not >=` also refuses NaN; True is an int.
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 1:
        raise ValueError(f"{name} has factor={factor!r}; it must be a number of at least 1")


def rotate_in_float32(module: Module) -> None:
    """Make a Llama-like module compute cos and sin and rotate queries and keys in fp32, and only then round them.

    A stock module rounds cos and sin to the weights' dtype, which changes the likeliest token at 2 % of the positions
    of a bf16 LLaDA.
    """
    module.base_model.rotary_emb.register_forward_pre_hook(_as_float32, with_kwargs=True)
    module.set_attn_implementation(ATTENTION)


def _as_float32(rotary: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    states, *rest = args  # the rotary module reads only the states' dtype, which becomes that of cos and sin
    return (states.new_empty(0).float(), *rest), kwargs


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    # fp32 cos and sin have promoted the rotated queries and keys to fp32.
    return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
