"""Rotary position embeddings in fp32, for models that were trained with them so whatever their weights' dtype."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dllm_rl.models.base import Module

ATTENTION = "sdpa_float32_rope"


def rotate_in_float32(module: Module) -> None:
    """Make a Llama-like module compute cos and sin in fp32, rotate queries and keys in fp32, then round them back.

    A stock module rounds cos and sin to the weights' dtype first, which moves the argmax of about 2 % of the logits
    of a bf16 LLaDA. In fp32 nothing changes.
    """
    module.base_model.rotary_emb.register_forward_pre_hook(_as_float32, with_kwargs=True)
    module.set_attn_implementation(ATTENTION)


def _as_float32(rotary: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The rotary module returns cos and sin in the dtype of its first argument, of which it uses nothing else."""
    states, *rest = args
    return (states.new_empty(0).float(), *rest), kwargs


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """fp32 cos and sin promote the rotated queries and keys to fp32: round them before the products."""
    return sdpa_attention_forward(module, query.to(value.dtype), key.to(value.dtype), value, attention_mask, **kwargs)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
