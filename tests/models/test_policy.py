"""The interface over every backbone, on models made from scratch."""

from dataclasses import replace

import pytest
import torch
from own_module import own_policy
from safetensors.torch import load_file
from transformers import DynamicCache
from transformers.models.llama import modeling_llama
from transformers.utils import logging

from dllm_rl import load_policy
from dllm_rl.models.policy import shifted
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.models.tokens import before_end, chosen_ids, decode
from dllm_rl.types import Rollout

MAKERS = {
    "masked_lm": tiny_masked_lm,
    "diffusion_llama": lambda **k: tiny_llama(causal=False, **k),
    "causal_llama": lambda **k: tiny_llama(causal=True, **k),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_save_and_load_is_bitwise_and_silent(tmp_path, make, capfd):
    policy = make(characters="0123 =\n", seed=3)
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
    policy.encode(tokens, mask, torch.arange(3)[None], use_cache=True)
    assert built  # the spy does see one that is built


def test_shifting_starts_again_behind_padding():
    states = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    assert shifted(states, mask)[0, :, 0].tolist() == [0, 0, 1, 2, 3]
    assert shifted(states, mask)[1, 2:, 0].tolist() == [7, 7, 8]  # the first token has its own state, not the padding's


def test_a_completion_ends_before_the_first_of_several_end_tokens():
    """<eos> is 2; 3, 4 and 5 are a, b, c."""
    policy = tiny_masked_lm(characters="abc")
    policy.spec = replace(policy.spec, eos_ids=(2, 4))
    tokens = torch.tensor([[3, 5, 2, 3, 4], [3, 4, 5, 2, 5], [4, 3, 3, 3, 3], [2, 3, 5, 5, 3]])
    chosen = torch.ones_like(tokens, dtype=torch.bool)
    chosen[3, 0] = False  # an end token in the prompt ends nothing
    rollout = Rollout(tokens, chosen, chosen, tokens * 0, torch.zeros(tokens.shape), group_size=1)
    assert [before_end(policy, ids) for ids in chosen_ids(rollout)] == [[3, 5], [3], [], [3, 5, 5, 3]]
    assert decode(policy, rollout) == ["ac", "a", "", "acca"]


def test_a_module_of_full_attention_is_no_block_causal_one():
    """Its first state moves with a token of the next block."""
    with pytest.raises(
        ValueError, match="attention='block_causal' is what Own should have, but changing token 2 moved"
    ):
        own_policy(attention="block_causal", block_size=2)
