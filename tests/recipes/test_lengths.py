"""The lengths study: its blended copy and its settings."""

import torch

from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import FakeQuantize
from recipes.studies import lengths


def weights_of(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.module.parameters()])


def test_a_blended_copy_lies_its_share_of_the_way():
    policy = tiny_masked_lm(
        characters="1234.=", hidden_size=16, num_layers=1, num_attention_heads=2, intermediate_size=24
    )
    engine = lengths.blended(0.25)
    copy = engine.load(policy)
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter.mul_(1.5).add_(0.1)
    assert engine.sync(policy, copy) == {}
    far = weights_of(quantized_copy(policy, FakeQuantize(weight="five_level"))) - weights_of(policy)
    assert far.abs().max() > 0.01
    torch.testing.assert_close(weights_of(copy) - weights_of(policy), 0.25 * far, rtol=1e-4, atol=1e-6)
    for share in (0.0, 1.0):
        torch.testing.assert_close(weights_of(lengths.blended(share).load(policy)), weights_of(policy) + share * far)
