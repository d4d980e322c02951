"""check_policy: every family and a stranger's module keep the contract."""

import pytest
import torch
from layouts import ORIGINAL, STOCK, checkpoint
from own_module import Own, own_policy
from repetitions import few

from dllm_rl import load_policy
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.testing import check_policy


class Causal(Own):
    causal = True


SMALL = {"characters": "01234", "hidden_size": 32, "num_layers": 2}
POLICIES = {
    "masked_lm": lambda: tiny_masked_lm(**SMALL),
    "diffusion_llama": lambda: tiny_llama(causal=False, **SMALL),
    "causal_llama": lambda: tiny_llama(causal=True, **SMALL),
    "own": own_policy,
    "own causal": lambda: own_policy(kind=Causal),
}


@pytest.mark.repeated
@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_made_here(make):
    policy = make()
    before = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    check_policy(policy)
    after = policy.module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("layout", few([*ORIGINAL, *STOCK], ["dream", "llada2"]))
def test_every_family_in_its_published_layout(layout, tmp_path):
    check_policy(load_policy(checkpoint(tmp_path, layout)))


def test_adapters_and_16_bits(tmp_path):
    policy = load_policy(checkpoint(tmp_path, "llada"), dtype=torch.bfloat16)
    check_policy(policy)
    add_lora(policy, Lora(r=2))
    check_policy(policy)


def test_adapters_on_a_module_of_ones_own():
    policy = own_policy()
    add_lora(policy, Lora(r=2))
    check_policy(policy)
