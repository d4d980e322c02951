"""Copies of a module into which peft put adapters, as TRL does: they are merged, or refused by name."""

import copy

import peft
import pytest
import torch

from dllm_rl import Float8WeightOnly, Int8WeightOnly, load_policy, quantized_copy, tiny_masked_lm
from dllm_rl.models.merge import merge_lora
from dllm_rl.models.tiny import tiny_llama, tiny_moe
from dllm_rl.quantization.rollout_policy import sync_weights

LINEARS = ["query", "key", "value", "dense"]
TOKENS = torch.randint(3, 8, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS, dtype=torch.bool)


def adapted(make=tiny_masked_lm, names=(), **config):
    """A policy whose module has peft's adapters, with random numbers in all of them, and peft's model."""
    policy = make(characters="1234=", hidden_size=32, num_layers=2, num_attention_heads=2)
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS} | config
    model = peft.get_peft_model(policy.module, peft.LoraConfig(**config))
    for name in names:
        model.add_adapter(name, peft.LoraConfig(**config))
    randomize(model)
    return policy, model.eval()


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def unloaded(policy, model):
    """The policy with the weights that peft merged by itself."""
    plain = copy.copy(policy)
    plain.module = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    return plain


KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "rslora": {"use_rslora": True},
    "trained biases": {"bias": "all"},
    "some layers": {"target_modules": ["query"]},
}


@pytest.mark.parametrize("scheme", [Int8WeightOnly(), Float8WeightOnly(), None])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.repeated(first_only=True)
def test_the_merged_layers_are_quantized_synced_and_saved(tmp_path, kind, scheme):
    policy, model = adapted(**KINDS[kind])
    plain = unloaded(policy, model)
    rollout, expected = quantized_copy(policy, scheme), quantized_copy(plain, scheme)
    assert rollout.quantization_report.quantized == expected.quantization_report.quantized
    assert rollout.quantization_report.skipped == expected.quantization_report.skipped
    if scheme is not None:
        assert len(rollout.quantization_report.quantized) == 12
    assert torch.equal(rollout.logits(TOKENS, MASK), expected.logits(TOKENS, MASK))
    randomize(model, seed=1)
    plain = unloaded(policy, model)
    sync_weights(policy, rollout)
    sync_weights(plain, expected)
    assert torch.equal(rollout.logits(TOKENS, MASK), expected.logits(TOKENS, MASK))
    policy.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_policy(tmp_path / "saved").logits(TOKENS, MASK), plain.logits(TOKENS, MASK))


@pytest.mark.parametrize("state", ["two adapters", "merged already", "off", "the base is trained too"])
@pytest.mark.repeated
def test_a_copy_computes_what_peft_computes_now(state):
    policy, model = adapted(names=["second"])
    if state == "two adapters":
        model.base_model.set_adapter(["default", "second"])
    elif state == "merged already":
        model.merge_adapter()
    elif state == "off":
        model.base_model.disable_adapter_layers()
    else:
        model.requires_grad_(True)
    rollout = quantized_copy(policy, None)
    randomize(model, seed=1) if state != "merged already" else None
    sync_weights(policy, rollout)
    torch.testing.assert_close(rollout.logits(TOKENS, MASK), policy.logits(TOKENS, MASK), rtol=1e-4, atol=1e-5)


def test_adapters_can_be_merged_in_place():
    policy, _ = adapted()
    expected = policy.logits(TOKENS, MASK)
    merge_lora(policy)
    torch.testing.assert_close(policy.logits(TOKENS, MASK), expected, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in policy.module.named_parameters())


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("word_embeddings is peft's Embedding", {"target_modules": ["word_embeddings"]}),
        (
            "lm_head.dense is peft's ModulesToSaveWrapper",
            {"target_modules": ["query"], "modules_to_save": ["lm_head.dense"]},
        ),
        (r"embed_tokens is peft's Embedding", {"make": tiny_llama, "target_modules": ["embed_tokens", "q_proj"]}),
        (
            r"experts is peft's ParamWrapper",
            {"make": tiny_moe, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, name, config):
    if config.get("make") is tiny_llama:
        config = config | {"make": lambda **given: tiny_llama(causal=False, **given)}
    policy, _ = adapted(**config)
    for use in (lambda: quantized_copy(policy, Int8WeightOnly()), lambda: policy.save_pretrained(tmp_path / "x")):
        with pytest.raises(ValueError, match=rf"{name}, not an adapter on a plain nn.Linear.*merge_and_unload"):
            use()


def test_a_model_of_peft_itself_is_refused():
    policy, model = adapted()
    policy.module = model
    with pytest.raises(ValueError, match=r"PeftModel is peft's PeftModel, .*merge_and_unload"):
        quantized_copy(policy, Int8WeightOnly())
