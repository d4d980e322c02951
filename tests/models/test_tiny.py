"""Small models made from scratch: their tokenizer, their length, their first weights."""

import pytest
import torch
from refusals import refused, refuses

from dllm_rl.models.tiny import char_tokenizer, tiny_diffusion_gemma, tiny_llama, tiny_masked_lm, tiny_moe


def test_characters_come_back_as_they_were(tmp_path):
    tokenizer = char_tokenizer("0123456789 +=\n")
    text = "12  +3=\n\n 15"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert ids[:3] == [4, 5, 13]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([4, 2, 0, 5], skip_special_tokens=True) == "12"
    refuses("Missing", lambda: tokenizer("1 x 2"), Exception)


def test_longest_sequence_is_what_the_model_can_take():
    """A RoBERTa counts positions from pad_token_id + 1, so it has room for that many fewer."""
    policy = tiny_masked_lm(characters="ab", max_length=12)
    assert policy.spec.max_length == 12
    full = torch.full((1, 12), 3)
    assert policy.logits(full, torch.ones_like(full, dtype=torch.bool)).shape == (1, 12, 5)
    too_long = torch.full((1, 13), 3)
    with pytest.raises((IndexError, RuntimeError)):
        policy.logits(too_long, torch.ones_like(too_long, dtype=torch.bool))


def test_first_weights_have_the_stated_deviations():
    """Of n draws the sample's standard deviation is within 5 / sqrt(2 n) of the true one."""
    module = tiny_llama(characters="0123456789", causal=False, head_std=0.1).module
    up = module.model.layers[1].mlp.up_proj.weight
    expected = ((module.model.embed_tokens.weight, 0.3), (module.lm_head.weight, 0.1), (up, 0.7 / 96**0.5))
    for weight, std in expected:
        assert weight.std().item() == pytest.approx(std, rel=5 / (2 * weight.numel()) ** 0.5)


def test_every_weight_is_set_and_nothing_is_drawn_from_the_global_generator(monkeypatch):
    """transformers sets none of them; torch then fills with NaN what is allocated without a value."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    state = torch.random.get_rng_state()
    torch.use_deterministic_algorithms(True)
    try:
        sizes = {"characters": "ab", "hidden_size": 8, "num_layers": 1}
        made = [tiny_masked_lm(**sizes), tiny_llama(causal=True, attention_bias=True, **sizes)]
        made += [tiny_moe(**sizes), tiny_diffusion_gemma(**sizes)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.random.get_rng_state(), state)
    for module in (policy.module for policy in made):
        assert all(tensor.isfinite().all() for tensor in module.state_dict().values())
        tied = module.get_output_embeddings().weight is module.get_input_embeddings().weight
        assert tied == module.config.get_text_config().tie_word_embeddings


test_a_field_that_does_not_fit_is_refused = refused(
    ({"vocab_size": 3}, "vocab_size=3 follows from the other arguments; leave it out"),
    ({"num_hidden_layers": 2}, "num_hidden_layers=2 follows"),
    ({"num_attention_heads": 0}, "num_attention_heads=0 must divide hidden_size=96"),
    ({"num_attention_heads": 5}, "num_attention_heads=5 must divide hidden_size=96"),
    ({"num_key_value_head": 2}, "not a field of LlamaConfig; the nearest is 'num_key_value_heads'"),
    by=lambda config: tiny_llama(characters="ab", causal=True, **config),
)


def test_further_fields_are_the_configs():
    config = tiny_llama(characters="ab", causal=True, num_key_value_heads=2, rope_theta=50.0).module.config
    assert config.num_key_value_heads == 2 and config.rope_parameters["rope_theta"] == 50.0
    refuses("must divide", lambda: tiny_moe(characters="ab", num_attention_heads=0))
