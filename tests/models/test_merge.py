"""The tensors of any module: each once, on the device that is asked for, without what no checkpoint contains."""

import copy
import weakref
from types import SimpleNamespace

import torch
from own_module import own_policy

from dllm_rl.models.lora import LoraLinear, adapted_layers, add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.models.merge import host_copy, merge_lora, merged_copy, merged_state_dict


def test_a_tied_tensor_has_its_first_name_alone():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2))
    module[1].weight = module[0].weight
    assert list(merged_state_dict(module)) == ["0.weight", "1.bias"]


def test_an_own_modules_tensors_leave_its_device_as_they_are_merged(monkeypatch):
    """Sent elsewhere, each merged weight is let go before the next is made; a tied weight is sent once."""
    policy, merged, alive = own_policy(), LoraLinear.merged, []
    add_lora(policy, Lora(r=2))

    def watched(layer):
        assert not any(made() is not None for made in alive), "two merged weights at once"
        weight = merged(layer)
        alive.append(weakref.ref(weight))
        return weight

    here = merged_state_dict(policy.module)
    monkeypatch.setattr(LoraLinear, "merged", watched)
    there = merged_state_dict(policy.module, device="meta")
    assert len(alive) > 1 and list(there) == list(here)
    assert all(x.is_meta and x.shape == here[name].shape for name, x in there.items())


def test_buffers_that_no_checkpoint_contains_are_left_out_at_every_depth():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    for owner in (module, module[0]):
        owner.register_buffer("kept", torch.zeros(1))
        owner.register_buffer("left", torch.zeros(1), persistent=False)
    names = module.state_dict().keys()
    assert set(merged_state_dict(module)) == names == {"kept", "0.weight", "0.kept"}
    module[0] = LoraLinear(module[0], Lora(r=1), torch.Generator())
    assert set(merged_state_dict(module)) == names


def test_a_layer_of_ones_own_called_base_layer_is_saved():
    """The name alone says nothing: peft, and layers in its manner, have it too."""
    module = torch.nn.ModuleDict({"x": torch.nn.ModuleDict({"base_layer": torch.nn.Linear(2, 2)})})
    assert merged_state_dict(module).keys() == module.state_dict().keys()


def test_a_merge_leaves_the_biases_what_they_are():
    policy = own_policy()
    add_lora(policy, Lora(r=2))
    bias = policy.module.blocks[0].qkv.base_layer.bias
    alike = merged_copy(policy.module)
    merge_lora(policy)
    assert policy.module.blocks[0].qkv.bias is bias and alike.blocks[0].qkv.bias is not bias
    assert type(alike.blocks[0].qkv) is torch.nn.Linear and torch.equal(alike.blocks[0].qkv.bias, bias)


def test_a_copy_on_the_host_shares_no_storage_and_keeps_adapters():
    policy = own_policy()
    add_lora(policy, Lora(r=2))
    policy.module.blocks[0].qkv.calls = 3
    copied = host_copy(policy).module
    ours, theirs = policy.module.state_dict(), copied.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not {x.data_ptr() for x in ours.values()} & {x.data_ptr() for x in theirs.values()}
    assert [p.requires_grad for p in copied.parameters()] == [p.requires_grad for p in policy.module.parameters()]
    assert copied.blocks[0].qkv.calls == 3
    assert host_copy(policy, keep=False) is policy


def test_a_sharded_modules_copy_goes_on_with_the_dropout_masks_of_training():
    """Its layers without weights were copied before training began, with no forward counted."""
    policy = own_policy()
    add_lora(policy, Lora(r=2, dropout=0.1))
    module = policy.module
    module.sharding = SimpleNamespace(plain=copy.deepcopy(module))
    for number, layer in enumerate(adapted_layers(module).values()):
        layer.calls = 3 + number
    copied = adapted_layers(host_copy(policy).module)
    assert len(copied) > 1
    assert {path: layer.calls for path, layer in copied.items()} == {path: 3 + n for n, path in enumerate(copied)}
