"""A transformers class with a spec of the caller's own: its checkpoint is never opened with the family's spec."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from layouts import ORIGINAL, STOCK, checkpoint
from own_module import with_spec
from refusals import refuses

from dllm_rl.models.base import copied, encode_base, linear_head
from dllm_rl.models.checkpoint.loading import has_known_family
from dllm_rl.models.load import load_policy, load_weights
from dllm_rl.models.policy import make_policy
from dllm_rl.models.tiny import tiny_llama, tiny_moe

TOKENS = torch.tensor([[5, 9, 12, 7, 11]])
REFUSED = r"custom_spec='.*' in config.json.*--make_model MODULE:FUNCTION.*load_policy\(folder, into=policy\)"
CHANGES = {
    "attention": {"attention": "causal"},
    "shift": {"shift": True},
    "is_also_causal": {"is_also_causal": True},
    "mask": {"mask_id": 4},
    "ends": {"eos_ids": (2, 4)},
    "longest": {"max_length": 20},
    "any length": {"max_length": None},
    "encoder": {"encode": lambda *args, **options: encode_base(*args, **options) + 1},
    "head": {"head": lambda module, hidden: 2 * linear_head(module, hidden)},
    "adapted layers": {"lora_targets": ("q_proj",)},
}


def llama():
    return tiny_llama(characters="abcdefghijklm", causal=False, hidden_size=16, num_layers=1)


def logits(policy):
    return policy.logits(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))


def comes_back(policy, folder) -> bool:
    """Whether load_weights restores what the policy saves, into a module whose weights are zero."""
    policy.save_pretrained(folder)
    again = copied(policy)
    for weight in again.module.parameters():
        weight.data.zero_()
    load_weights(again, folder)
    return torch.equal(logits(again), logits(policy))


@pytest.mark.repeated(every=3)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_spec_that_differs_in_one_field_is_not_replaced_by_the_familys(tmp_path, change):
    policy = llama()
    policy.spec = replace(policy.spec, **change)
    assert comes_back(policy, tmp_path)
    refuses(REFUSED, lambda: load_policy(tmp_path))


@pytest.mark.parametrize("family", [*ORIGINAL, *STOCK])
@pytest.mark.repeated(every=12)
def test_of_every_family_a_changed_spec_is_refused_by_name_and_the_same_spec_opens(tmp_path, family):
    opened = load_policy(checkpoint(tmp_path, family))
    same = with_spec(opened)
    same.save_pretrained(tmp_path / "same")
    assert torch.equal(logits(load_policy(tmp_path / "same")), logits(opened))
    assert comes_back(with_spec(opened, max_length=20), tmp_path / "changed")
    refuses(REFUSED, lambda: load_policy(tmp_path / "changed"))


@pytest.mark.parametrize("make", [llama, lambda: tiny_moe(characters="abcdefghijklm", hidden_size=16, num_layers=1)])
def test_transformers_opens_it_and_its_spec_is_asked_for_again(tmp_path, make):
    policy = with_spec(make(), shift=True)
    policy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["custom_spec"] == policy.spec.name
    module = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in policy.module.named_parameters():
        assert torch.equal(weight, module.get_parameter(name)), name
    refuses(REFUSED, lambda: make_policy(module, policy.tokenizer))


def test_what_the_library_makes_opens_by_name(tmp_path):
    llama().save_pretrained(tmp_path / "made")
    load_policy(tmp_path / "made").save_pretrained(tmp_path / "again")
    assert has_known_family(tmp_path / "made") and has_known_family(tmp_path / "again")
