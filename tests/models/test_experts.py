"""Adapters on stacks of experts, number by number."""

import torch
from torch import nn

from dllm_rl.models.adapters.experts import STACKS, LoraExperts
from dllm_rl.models.lora import Lora


def test_merged_experts_are_rounded_once():
    """1 + 2^-8 + 2^-17 lies above the middle of two numbers of bf16, 1 and 1 + 2^-7. An adapter that is rounded before
    the sum is 2^-8, and the sum then a tie, which goes to 1."""
    base = nn.Module()
    for name in STACKS:
        base.register_parameter(name, nn.Parameter(torch.ones(1, 1, 1, dtype=torch.bfloat16)))
    layer = LoraExperts(base, Lora(r=1, alpha=1.0, experts=True), torch.Generator())
    with torch.no_grad():
        layer.lora_A["down_proj"].fill_(1 + 2**-9)
        layer.lora_B["down_proj"].fill_(2**-8)
    assert layer.merged("down_proj").item() == 1 + 2**-7
