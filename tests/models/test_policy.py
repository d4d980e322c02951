"""The interface over every backbone, on models made from scratch."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from own_module import own_policy
from repetitions import crossed, few
from safetensors.torch import load_file
from tiny_recipe import tiny_recipe
from transformers import DynamicCache
from transformers.models.llama import modeling_llama
from transformers.utils import logging

from dllm_rl import load_policy, make_policy, train
from dllm_rl.decoding.texts import before_end, completion_token_ids, decode
from dllm_rl.likelihoods.estimators import Causal, Trajectory
from dllm_rl.models.base import FamilySpec, shift_states
from dllm_rl.models.forward.blocks import blocks_of
from dllm_rl.models.tiny import char_tokenizer, tiny_llama, tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers import Autoregress, Unmask
from dllm_rl.testing import check_policy
from dllm_rl.types.rollouts import Prompts, Rollout

MAKERS = {
    "masked_lm": tiny_masked_lm,
    "diffusion_llama": lambda **k: tiny_llama(causal=False, **k),
    "causal_llama": lambda **k: tiny_llama(causal=True, **k),
}


@pytest.mark.repeated
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_save_and_load_is_bitwise_and_silent(tmp_path, make, capfd):
    policy = make(characters="0123 =\n", seed=3, hidden_size=32, num_layers=2)
    policy.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled()
    before, after = policy.module.state_dict(), again.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert again.spec == policy.spec
    tokens = torch.tensor([[3, 4, 5, 6, 9]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert torch.equal(again.logits(tokens, mask), policy.logits(tokens, mask))
    again.save_pretrained(tmp_path / "twice")
    first, second = (load_file(d / "model.safetensors") for d in (tmp_path, tmp_path / "twice"))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_progress_bars_stay_off_for_who_turned_them_off(tmp_path):
    logging.disable_progress_bar()
    try:
        tiny_masked_lm(characters="ab").save_pretrained(tmp_path)
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_scoring_and_learning_build_no_cache(monkeypatch):
    """A stock causal model's config says use_cache=True."""
    policy, built = tiny_llama(causal=True, characters="abc"), []
    monkeypatch.setattr(modeling_llama, "DynamicCache", lambda **_: (built.append(1), DynamicCache(**_))[1])
    tokens = torch.tensor([[3, 4, 5]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    policy.hidden(tokens, mask).sum().backward()
    assert not built
    policy.module(input_ids=tokens, use_cache=True)
    assert built  # the spy does see one that is built


def test_shifting_starts_again_behind_padding():
    states = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    assert shift_states(states, mask)[0, :, 0].tolist() == [0, 0, 1, 2, 3]
    assert shift_states(states, mask)[1, 2:, 0].tolist() == [
        7,
        7,
        8,
    ]  # the first token has its own state, not the padding's


def test_a_completion_ends_before_the_first_of_several_end_tokens():
    """<eos> is 2; 3, 4 and 5 are a, b, c."""
    policy = tiny_masked_lm(characters="abc")
    policy.spec = replace(policy.spec, eos_ids=(2, 4))
    tokens = torch.tensor([[3, 5, 2, 3, 4], [3, 4, 5, 2, 5], [4, 3, 3, 3, 3], [2, 3, 5, 5, 3]])
    chosen = torch.ones_like(tokens, dtype=torch.bool)
    chosen[3, 0] = False  # an end token in the prompt ends nothing
    rollout = Rollout(tokens, chosen, chosen, tokens * 0, torch.zeros(tokens.shape), group=torch.arange(len(tokens)))
    assert [before_end(policy, ids) for ids in completion_token_ids(rollout)] == [[3, 5], [3], [], [3, 5, 5, 3]]
    assert decode(policy, rollout) == ["ac", "a", "", "acca"]


def test_a_module_of_full_attention_is_no_block_causal_one():
    """Its first state moves with a token of the next block."""
    with pytest.raises(
        ValueError, match="attention='block_causal' is what Own should have, but changing token 2 changed"
    ):
        own_policy(attention="block_causal", block_size=2)


@pytest.mark.parametrize("max_length", [2, 5, 7, 8])
@pytest.mark.parametrize("make", [tiny_masked_lm, partial(tiny_llama, causal=True)], ids=["masked", "causal"])
def test_the_logits_of_a_short_model_are_checked_where_it_has_positions(make, max_length):
    """The vocabulary has more tokens than the model has positions."""
    assert make(characters="123456789", max_length=max_length).spec.max_length == max_length


@pytest.mark.parametrize("max_length", [5, 7, 8])
def test_the_attention_of_a_short_model_is_checked_where_it_has_positions(max_length):
    assert tiny_masked_lm(characters="12=", max_length=max_length).spec.max_length == max_length
    own_policy(attention="block_causal", block_size=8, max_length=max_length)  # one block
    with pytest.raises(ValueError, match=f"attention='causal' .* token {max_length - 1} changed"):
        own_policy(attention="causal", mask_id=None, shift=True, max_length=max_length)


@dataclass
class Letters:
    """A tokenizer of somebody's own, without a hash: characters above the ids of `char_tokenizer`'s special tokens."""

    characters = "1234.="

    def encode(self, text, add_special_tokens, split_special_tokens):
        return [3 + self.characters.index(character) for character in text]

    def decode(self, ids, *, skip_special_tokens):
        special = "" if skip_special_tokens else "?"
        return "".join(self.characters[i - 3] if i >= 3 else special for i in ids)

    def save_pretrained(self, folder):
        (Path(folder) / "characters.txt").write_text(self.characters)


def policy_with(tokenizer):
    own = own_policy()
    return make_policy(own.module, tokenizer, own.spec)


def test_a_custom_tokenizer_needs_three_methods(tmp_path):
    policy = policy_with(Letters())
    check_policy(policy)
    summary = train(tiny_recipe(tmp_path, model=policy, num_steps=1, train_batch_size=1, num_generations=2))
    assert (Path(summary["checkpoint"]) / "characters.txt").read_text() == "1234.="


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"save_pretrained": None}, "tokenizer Broken has no save_pretrained"),
        ({"encode": None, "decode": None}, "tokenizer Broken has no encode, decode"),
        ({"chat_template": "{{ messages }}"}, "tokenizer Broken has no apply_chat_template, added_tokens_decoder"),
        ({"encode": lambda self, text: []}, "tokenizer Broken: .*unexpected keyword argument 'add_special_tokens'"),
        ({"decode": lambda self, ids: ""}, "tokenizer Broken: .*unexpected keyword argument 'skip_special_tokens'"),
        ({"encode": lambda self, text, **_: torch.zeros(0)}, "encode returned tensor.* must return a list and text"),
    ],
)
def test_a_tokenizer_without_what_it_needs_is_refused_at_once(changed, message):
    members = {name: value for name, value in (vars(Letters) | changed).items() if value is not None}
    broken = type("Broken", (), members)()
    with pytest.raises(ValueError, match=message):
        policy_with(broken)
    policy = own_policy()
    policy.tokenizer = broken  # as in a policy that make_policy did not make
    with pytest.raises(AssertionError, match=message):
        check_policy(policy)


def test_a_stock_model_finds_its_ids_in_the_tokenizer():
    with pytest.raises(ValueError, match="tokenizer Letters has no get_vocab, eos_token_id, mask_token_id"):
        make_policy(tiny_masked_lm(characters="1234.=").module, Letters())


CAUSAL = {
    "Granite": {"logits_scaling": 8.0},
    "Cohere": {"logit_scale": 0.0625},
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "Llama": {},
    "Qwen3": {},
}


@pytest.mark.parametrize("name", few(CAUSAL, ["Granite", "Gemma2", "Llama"]))
def test_a_causal_class_that_changes_its_logits_after_the_head_is_refused(name):
    """A run would sample and train at another temperature."""
    tokenizer = char_tokenizer("1234.=")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0}
    kind = getattr(transformers, f"{name}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(kind.config_class(**sizes | CAUSAL[name], eos_token_id=2, bos_token_id=None)).eval()
    for weight in module.parameters():
        weight.data.mul_(20 if weight.dim() > 1 else 1)
    if CAUSAL[name]:
        with pytest.raises(
            ValueError, match=f"{name}ForCausalLM computes other logits than its family .*scaled or capped"
        ):
            make_policy(module, tokenizer)
    else:
        assert make_policy(module, tokenizer).spec.attention == "causal"


class Bare(transformers.PreTrainedModel):
    """A causal model of somebody's own, whose forward is not a stock class's."""

    config_class = transformers.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.inner = transformers.LlamaForCausalLM(config)

    def get_output_embeddings(self):
        return self.inner.lm_head

    def forward(self, input_ids):
        return self.inner(input_ids).logits


def test_the_forward_of_ones_own_causal_class_is_not_called():
    tokenizer = char_tokenizer("1234.=")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    module = Bare(transformers.LlamaConfig(**sizes, intermediate_size=32, max_position_embeddings=64)).eval()

    def encode(module, tokens, attention_mask, positions):
        mask = attention_mask.long()
        return module.inner.model(tokens, attention_mask=mask, position_ids=positions).last_hidden_state

    policy = make_policy(module, tokenizer, FamilySpec("mine", "causal", shift=True, eos_ids=(2,), encode=encode))
    assert policy.spec.name == "mine"


def dropping(kind):
    """A policy whose layers drop 30 % in train mode."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
    if kind == "causal_llama":
        return tiny_llama(characters="0123=", causal=True, attention_dropout=0.3, **sizes)
    return tiny_masked_lm(characters="0123=", hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, **sizes)


@pytest.mark.parametrize(
    ("kind", "part"),
    crossed(["masked_lm", "causal_llama"], ["", "base_model", "blocks"], row="masked_lm", column="blocks"),
)
def test_forwards_without_gradients_drop_nothing_and_leave_the_modes(kind, part):
    """Rollouts, scores and evaluations of a module that a loop of one's own trains; its own forwards drop."""
    policy = dropping(kind)
    tokens = torch.tensor([[5, 3, 4, 5, 6, 3]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    make_sampler = Autoregress if kind == "causal_llama" else Unmask
    sampler = make_sampler(max_new_tokens=3, temperature=1.0)
    prompts = Prompts.from_ids([[3, 4]] * 3, pad_id=0, seeds=[1, 2, 3])
    estimator = Causal() if kind == "causal_llama" else Trajectory()

    def results():
        rollout = sampler(policy, prompts, generator_for(0))
        with torch.no_grad():
            scores = estimator.logprobs(policy, rollout, estimator.draw_views(rollout, generator_for(1)))
            return policy.logits(tokens, mask), rollout.tokens, rollout.logprobs, scores

    expected = results()
    chosen = {"": policy.module, "base_model": policy.module.base_model, "blocks": blocks_of(policy.module)[0]}[part]
    chosen.train()
    modes = [layer.training for layer in policy.module.modules()]
    for found, right in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)
    assert [layer.training for layer in policy.module.modules()] == modes and any(modes)
    assert not torch.equal(policy.logits(tokens, mask), policy.logits(tokens, mask))  # with gradients: the user's mode
