"""Small mixtures of experts."""

import torch

from dllm_rl.models.tiny import tiny_moe


def sharp_moe(**settings):
    """A `tiny_moe` whose blocks have weights of twice the size: which expert is taken matters."""
    policy = tiny_moe(**settings)
    with torch.no_grad():
        for name, weight in policy.module.named_parameters():
            if ".layers." in name and weight.dim() > 1:
                weight.mul_(1.5 / 0.7)
    return policy


def moe(*, causal=False, **changes):
    settings = {"characters": "123456789", "head_std": 0.5, "hidden_size": 32, "num_layers": 2, "num_experts": 6}
    return sharp_moe(causal=causal, **(settings | {"num_attention_heads": 2, "moe_intermediate_size": 24} | changes))
