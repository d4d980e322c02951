"""The last block runs where its output is read: the same rollouts, scores and gradients from fewer rows."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from layouts import checkpoint

from dllm_rl import load_policy
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.scoring import backward_view
from dllm_rl.models.compiled import compile_blocks
from dllm_rl.models.last_block import predicting
from dllm_rl.models.logprobs import ROWS
from dllm_rl.models.policy import shifted
from dllm_rl.models.tiny import tiny_llama, tiny_moe
from dllm_rl.samplers import rules
from dllm_rl.samplers.cache import block_cache, dual_cache, prefix_cache
from dllm_rl.samplers.unmask import unmask
from dllm_rl.types import Prompts

CHARACTERS = "0123456789 abcdefghijklmnop"
SIZE = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "head_std": 0.4}
IDS = [[3 + (7 * row + 5 * i) % 9 for i in range(size)] for row, size in enumerate([40, 2, 33, 5, 38, 1])]


def policy_for(name, folder):
    if name in ("sdar", "llada2", "dream", "llada_moe"):
        return load_policy(checkpoint(folder, name))
    policy = tiny_llama(characters=CHARACTERS, causal=False, num_layers=2, **SIZE)
    if name == "shifted":
        policy.spec = replace(policy.spec, shift=True)
    return policy


def everywhere(policy):
    """The same policy, whose last block is run as the others are."""
    whole = type(policy)(policy.module, replace(policy.spec, pointwise=()), policy.tokenizer)
    whole.gradient_checkpointing = policy.gradient_checkpointing
    return whole


def sampled(policy, *, fill=False, **options):
    # A row's first token is open, in every other row the second, too: in a shifted family both read one state.
    opened = [[i % 3 == 1 + n % 2 or i == 0 for i in range(len(row))] for n, row in enumerate(IDS)] if fill else None
    prompts = Prompts.from_ids(IDS, pad_id=policy.pad_id, group_size=2, seeds=range(12), open_positions=opened)
    blocks = {} if fill or policy.spec.attention == "block_causal" else {"block_size": 4}
    options = {"max_new_tokens": 12, "num_steps": 6, "temperature": 1.0, "rank": rules.max_prob} | blocks | options
    return unmask(policy, prompts, torch.Generator(), **options)


class Rows:
    """How many rows each of a policy's feed-forward layers was given, forward by forward."""

    def __init__(self, policy):
        self.seen = [[] for _ in policy.module.model.layers]
        for seen, layer in zip(self.seen, policy.module.model.layers, strict=True):
            inner = getattr(layer.mlp, "down_proj", None) or layer.mlp.experts
            inner.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][..., 0].numel()))


OPTIONS = {
    "exact": {},
    "confidence": {"rank": rules.confidence},
    "threshold": {"commit": partial(rules.threshold, tau=0.2)},
    "infilling": {"fill": True},
    "prefix cache": {"cache": prefix_cache()},
    "dual cache": {"cache": dual_cache(refresh=2)},
    "shifted": {},
    "shifted, infilling": {"fill": True},
    "shifted, dual cache": {"cache": dual_cache()},
    "sdar": {},
    "sdar, block cache": {"cache": block_cache()},
    "llada2": {},
    "dream": {},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_rollouts_are_those_of_a_whole_last_block(name, tmp_path):
    policy = policy_for(name.split(",")[0], tmp_path)
    whole = sampled(everywhere(policy), **OPTIONS[name])
    rows = Rows(policy)
    rollout = sampled(policy, **OPTIONS[name])
    assert torch.equal(rollout.tokens, whole.tokens) and torch.equal(rollout.unmask_step, whole.unmask_step)
    torch.testing.assert_close(rollout.logprobs, whole.logprobs, atol=2e-6, rtol=1e-5)
    first, last = sum(rows.seen[0]), sum(rows.seen[-1])
    assert len(rows.seen[0]) == len(rows.seen[-1]) and last < first * 0.8, (first, last)


ESTIMATORS = {
    "elbo": lik.elbo(num_samples=3),
    "coupled": lik.coupled(),
    "one_step": lik.one_step(),
    "trajectory": lik.trajectory(),
}
CASES = [(policy, estimator) for policy in ("llama", "shifted") for estimator in ESTIMATORS]
CASES += [("llada_moe", "elbo"), ("sdar", "trajectory"), ("sdar", "packed")]


@pytest.mark.parametrize(("name", "estimator"), CASES)
@pytest.mark.parametrize("fill", [False, True])
def test_scores_and_gradients_are_those_of_a_whole_last_block(name, estimator, fill, tmp_path):
    """In infilled rows of a shifted family the first token reads its own state, which the second reads too."""
    policy = policy_for(name, tmp_path)
    if fill and policy.spec.attention != "full":
        pytest.skip("nothing is filled in under block-causal attention")
    rollout = sampled(policy, fill=fill)
    scorer = ESTIMATORS.get(estimator) or lik.trajectory(block_size=policy.spec.block_size)
    noise = scorer.draw(rollout, torch.Generator().manual_seed(0))
    vector = torch.randn(noise.weight.shape, generator=torch.Generator().manual_seed(1)) * (noise.weight != 0)
    found, rows = [], Rows(policy)
    for each in (everywhere(policy), policy):
        scores = scorer.logprobs(each, rollout, noise)
        each.module.zero_grad()
        for masked, part in zip(noise.masked, vector, strict=True):
            backward_view(each, rollout, masked, part, packed=estimator == "packed")
        found.append([scores, *(p.grad.clone() for p in each.module.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert sum(rows.seen[-1]) < sum(rows.seen[0]) * 0.95


def test_a_place_is_predicted_by_the_column_before_it_or_as_a_rows_first_by_its_own():
    mask = torch.tensor([[True, True, True], [False, True, True]])
    policy, (rows, columns) = policy_for("shifted", None), mask.nonzero().unbind(1)
    assert predicting(policy, mask, rows, columns).tolist() == [0, 0, 1, 1, 1]
    assert predicting(policy_for("llama", None), mask, rows, columns).tolist() == [0, 1, 2, 1, 2]
    states = torch.arange(3.0).expand(2, 3)[..., None]  # what `hidden` gives at a place is the number of its column
    assert shifted(states, mask)[rows, columns, 0].tolist() == [0, 0, 1, 1, 1]


def test_no_product_is_smaller_than_the_least(tmp_path):
    policy = policy_for("llama", tmp_path)
    rows = Rows(policy)
    sampled(policy, num_steps=12)
    assert min(rows.seen[-1]) == ROWS <= min(rows.seen[0])


def test_a_block_that_is_run_again_or_compiled_is_run_whole(tmp_path):
    policy = policy_for("llama", tmp_path)
    rollout, rows = sampled(policy), Rows(policy)
    # Other positions from row to row, so that none share a forward.
    masked = rollout.completion_mask & (rollout.unmask_step >= 3)
    for again in (False, True):
        policy.gradient_checkpointing = again
        backward_view(policy, rollout, masked, torch.where(masked, 1.0, 0.0))
        assert (rows.seen[0] == rows.seen[-1]) == again
        for seen in rows.seen:
            seen.clear()
    compile_blocks(policy)
    for layer in policy.module.model.layers:
        layer._compiled_call_impl = layer._call_impl  # what is compiled is another test's affair
    for seen in rows.seen:
        seen.clear()
    sampled(policy)
    assert rows.seen[0] == rows.seen[-1]


def test_noted_experts_are_those_of_every_column(tmp_path):
    policy = tiny_moe(characters=CHARACTERS, causal=False)
    policy.records_experts, rows = True, Rows(policy)
    rollout = sampled(policy)
    assert rows.seen[0] == rows.seen[-1] and rollout.experts is not None
