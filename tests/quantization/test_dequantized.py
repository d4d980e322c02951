"""Weight-only FP8 that is dequantized once a sync: the numbers of torchao's own, bit for bit."""

import pytest
import torch

from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy, sync_weights
from dllm_rl.quantization.schemes import Float8WeightOnly

SIZES = {
    "characters": "abcdefgh",
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def adapted():
    policy = tiny_llama(**SIZES, causal=False)
    add_lora(policy, Lora(r=4))
    return policy


@pytest.mark.parametrize("make", [lambda: tiny_masked_lm(**SIZES), lambda: tiny_llama(**SIZES, causal=False), adapted])
def test_weights_dequantized_once_a_sync_give_the_same_states(make):
    """As made, and after an update that is synced into both copies; no product of the second dequantizes anything."""
    policy, tokens = make(), torch.randint(3, 11, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    in_products, once = (quantized_copy(policy, Float8WeightOnly(dequantized=d)) for d in (False, True))
    for _ in range(2):
        expected, found = (copy.hidden(tokens, mask) for copy in (in_products, once))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (found - policy.hidden(tokens, mask)).abs().max() > 1e-3  # as far as quantization moves them
        assert in_products.quantization_report.quantized == once.quantization_report.quantized
        with torch.no_grad():
            for number, parameter in enumerate(policy.module.parameters()):
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.02
                )
        changes = [sync_weights(policy, copy) for copy in (in_products, once)]
        assert changes[0]["quantization/codes_changed"] == changes[1]["quantization/codes_changed"] > 0
    assert in_products.quantization_report.bytes_after < once.quantization_report.bytes_after
