"""From causal to masked diffusion: the same weights, a new token, and the head shifted as before."""

import pytest
import torch
from layouts import checkpoint, nemotron, published, write
from repetitions import slow

from dllm_rl import Float8WeightOnly, Prompts, Unmask, load_policy
from dllm_rl.likelihoods.estimators import Causal
from dllm_rl.models.convert import as_causal, diffusion_from_causal
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import Autoregress

SMALL = {"characters": "ab", "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("family", [slow("llama"), "qwen3", slow("smollm2")])
def test_a_causal_checkpoint_becomes_a_masked_diffusion_one(tmp_path, family):
    folder = checkpoint(tmp_path / "causal", family)
    causal, state = load_policy(folder), torch.random.get_rng_state()
    policy = diffusion_from_causal(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (policy.spec.attention, policy.spec.shift, policy.spec.mask_id) == ("full", True, 39)
    assert policy.tokenizer.convert_tokens_to_ids("<|mask|>") == 39
    before, after = causal.module.state_dict(), policy.module.state_dict()
    for name in before:  # 39 words and one to spare: the mask takes the spare row
        assert (
            torch.equal(before[name][:39], after[name][:39])
            if before[name].shape[0] == 40
            else torch.equal(before[name], after[name])
        )
    rows = after["model.embed_tokens.weight"]
    torch.testing.assert_close(rows[39], rows[:39].mean(0))

    tokens = torch.tensor([[5, 9, 39, 7, 11]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    logits = policy.logits(tokens, mask)
    # One token attends to itself alone, causal or not: the shifted head makes the same prediction for the second.
    one = torch.tensor([[5, 6]])
    torch.testing.assert_close(causal.logits(one, mask[:, :2])[0, 1, :39], _second(policy)[:39], rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[:, 1:], policy.module(input_ids=tokens).logits[:, :-1], rtol=0, atol=1e-5)

    policy.save_pretrained(tmp_path / "diffusion")
    again = load_policy(tmp_path / "diffusion")
    assert again.spec == policy.spec
    assert torch.equal(again.logits(tokens, mask), logits)
    rollout = Unmask(max_new_tokens=6, diffusion_steps=3)(
        again, Prompts.from_ids([[5, 9]], pad_id=1), torch.Generator()
    )
    assert not (rollout.tokens == 39).any()


def _second(policy) -> torch.Tensor:
    """The prediction made from a first token that sees nothing else."""
    states = policy.module.base_model(input_ids=torch.tensor([[5]])).last_hidden_state
    return policy.module.lm_head(states)[0, 0]


def test_a_vocabulary_without_room_grows(tmp_path):
    causal = tiny_llama(causal=True, **SMALL)
    causal.tokenizer.mask_token = None
    causal.save_pretrained(tmp_path)
    policy = diffusion_from_causal(tmp_path)
    assert policy.spec.mask_id == policy.vocab_size - 1 == 5
    assert load_policy(tmp_path).vocab_size == 5  # the causal checkpoint is left as it was
    rows = policy.module.lm_head.weight
    assert rows.shape[0] == 6
    torch.testing.assert_close(rows[5], rows[:5].mean(0))


def test_a_mask_token_in_the_middle_of_the_vocabulary_leaves_the_others_their_rows(tmp_path):
    """The tokenizer declares one, as BERT's does: <pad> 0, <mask> 1, <eos> 2, two letters."""
    causal = tiny_llama(causal=True, **SMALL)
    causal.save_pretrained(tmp_path)
    policy = diffusion_from_causal(tmp_path)
    assert policy.spec.mask_id == 1 and policy.vocab_size == causal.vocab_size == 5
    others = [0, 2, 3, 4]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        before, after = (each.module.state_dict()[name] for each in (causal, policy))
        assert torch.equal(after[others], before[others])
        torch.testing.assert_close(after[1], before[others].mean(0))


def test_a_diffusion_model_is_refused(tmp_path):
    tiny_llama(causal=False, **SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a diffusion model already"):
        diffusion_from_causal(tmp_path)


def test_a_converted_model_decodes_from_left_to_right_as_before(tmp_path):
    """The logits are those of the causal checkpoint, but for the mask's row; the weights are the same tensors."""
    folder = checkpoint(tmp_path, "qwen3")
    before_it, diffusion = load_policy(folder), diffusion_from_causal(folder)
    diffusion.weights_version, diffusion.float32_head = 7, False
    again = as_causal(diffusion)
    assert (again.spec.attention, again.spec.mask_id, again.weights_version) == ("causal", diffusion.spec.mask_id, 7)
    assert not again.float32_head and diffusion.spec.attention == "full"
    tokens = torch.tensor([[5, 9, 12, 7, 11]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    before = diffusion.logits(tokens, mask)
    assert torch.equal(again.logits(tokens, mask)[..., :39], before_it.logits(tokens, mask)[..., :39])
    assert not torch.allclose(before, again.logits(tokens, mask), atol=1e-3)
    for ours, theirs in zip(again.module.parameters(), diffusion.module.parameters(), strict=True):
        assert ours is theirs
    assert torch.equal(diffusion.logits(tokens, mask), before)  # the diffusion model is as it was


def test_a_model_trained_both_ways_decodes_as_its_autoregressive_checkpoint(tmp_path):
    """The same tensors, stored with either of Nemotron's two paradigms."""
    both, autoregressive = (
        load_policy(write(tmp_path / name, *nemotron(name))) for name in ("bidirectional", "autoregressive")
    )
    tokens = torch.tensor([[5, 9, 12, 7, 11, 3, 4, 8, 6, 10]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert torch.equal(as_causal(both).logits(tokens, mask), autoregressive.logits(tokens, mask))


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("options", [{}, {"suppress": (3,)}, {"top_k": 5}, {"temperature": 0.0}])
def test_the_mask_token_is_never_drawn_and_the_likelihood_leaves_it_out(tmp_path, options):
    """Also of an untrained model, whose mask is as likely as any token."""
    tiny_llama(causal=True, **SMALL | {"characters": "123"}).save_pretrained(tmp_path)
    policy = as_causal(diffusion_from_causal(tmp_path))
    prompts = Prompts.from_ids([[3, 4]], pad_id=policy.pad_id, num_generations=16)
    rollout = Autoregress(**{"max_new_tokens": 8, "temperature": 2.0} | options)(policy, prompts, generator_for(0))
    assert not (rollout.tokens == policy.spec.mask_id).any()
    assert set(rollout.sampling_params.suppress) == {*options.get("suppress", ()), policy.spec.mask_id}
    likelihood = Causal()
    views = likelihood.draw_views(rollout, generator_for(0))
    torch.testing.assert_close(likelihood.logprobs(policy, rollout, views), rollout.logprobs)


def test_a_model_that_was_never_causal_is_refused():
    with pytest.raises(ValueError, match="'diffusion_lm' models do not decode from left to right"):
        as_causal(tiny_llama(causal=False, **SMALL))


def test_a_quantized_copy_stays_one(tmp_path):
    tiny_llama(causal=True, **SMALL).save_pretrained(tmp_path)
    quantized = as_causal(quantized_copy(diffusion_from_causal(tmp_path), Float8WeightOnly()))
    assert quantized.quantization is not None and quantized.quantization_report is not None
    with pytest.raises(ValueError, match="a quantized copy's weights are rounded"):
        quantized.save_pretrained(tmp_path / "copy")


def test_a_model_of_both_kinds_decodes_rows_longer_than_a_block_and_is_opened_as_it_was_saved(tmp_path):
    both = load_policy(published(tmp_path / "both", "nemotron"))
    causal = as_causal(both)
    prompt = list(range(3, 3 + both.spec.block_size + 4))
    prompts = Prompts.from_ids([prompt], pad_id=causal.pad_id, num_generations=2, seeds=range(2))
    rollout = Autoregress(max_new_tokens=3)(causal, prompts, generator_for(0))
    logps = Causal().logprobs(causal, rollout, Causal().draw_views(rollout, generator_for(0)))
    torch.testing.assert_close(
        logps[rollout.completion_mask], rollout.logprobs[rollout.completion_mask], rtol=0, atol=1e-5
    )
    causal.save_pretrained(tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    assert (again.spec.attention, again.spec.shift) == ("causal", True)
    assert torch.equal(
        again.logits(rollout.tokens, rollout.attention_mask), causal.logits(rollout.tokens, rollout.attention_mask)
    )
