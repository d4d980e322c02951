"""Order agreement by hand, on a table: which positions a learner would have begun with, against which were."""

from dataclasses import replace

import pytest
import torch
from likelihood_toys import TablePolicy

from dllm_rl.samplers import rules
from dllm_rl.samplers.choose import order_agreement
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Events, Prompts

LENGTH = 4


def policy_of(*tops):
    """A table whose likeliest word has, in the first state, these logits at the four positions, all others 0."""
    policy = TablePolicy(length=LENGTH, words=3, seed=0)
    policy.table = torch.zeros_like(policy.table)
    policy.table[-1, :, 0] = torch.tensor(tops)  # the state of four masks is the last
    return policy


def sampled(policy, **options):
    prompts = Prompts.from_ids([[4], [4]], pad_id=5, num_generations=3)
    settings = {"temperature": 1.0, "rank": rules.MaxProb(), "suppress": (4, 5), "diffusion_steps": 2} | options
    return Unmask(max_new_tokens=LENGTH, **settings)(policy, prompts, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("rank", [rules.MaxProb(), rules.Margin(), rules.Entropy()])
def test_positions_and_prompts_that_agree(rank):
    rollout = sampled(policy_of(4.0, 3.0, 2.0, 1.0), rank=rank)
    assert ((rollout.unmask_step[:, 1:] == 0) == torch.tensor([True, True, False, False])).all()
    for tops, positions, prompts in (
        ((4.0, 3.0, 2.0, 1.0), 4, 2),  # of two committed positions in each of two prompts
        ((4.0, 1.0, 3.0, 2.0), 2, 0),
        ((1.0, 2.0, 3.0, 4.0), 0, 0),
        ((3.0, 4.0, 2.0, 1.0), 4, 2),  # a set, whatever the order inside it
    ):
        found = {name: tuple(map(int, pair)) for name, pair in order_agreement(policy_of(*tops), rollout).items()}
        assert found == {"order_agreement": (positions, 4), "order_agreement_rows": (prompts, 2)}


def test_a_first_step_that_writes_nothing_is_not_compared():
    """Eight steps for four positions, with the remainder on the last ones: the first four write nothing."""
    rollout = sampled(policy_of(4.0, 3.0, 2.0, 1.0), diffusion_steps=8, commit=rules.LateSchedule())
    assert rollout.unmask_step[:, 1:].min() == 4
    found = order_agreement(policy_of(4.0, 3.0, 2.0, 1.0), rollout)
    assert {name: tuple(map(int, pair)) for name, pair in found.items()} == {
        "order_agreement": (0, 0),
        "order_agreement_rows": (0, 0),
    }


def test_only_the_open_block_can_be_chosen():
    rollout = sampled(policy_of(1.0, 2.0, 3.0, 4.0), block_size=2, diffusion_steps=4)
    found = order_agreement(policy_of(1.0, 2.0, 9.0, 9.0), rollout)
    assert tuple(map(int, found["order_agreement"])) == (2, 2)


def test_orders_that_depend_on_no_policy_or_on_the_draws_are_not_compared():
    policy = policy_of(4.0, 3.0, 2.0, 1.0)
    for rank in (rules.RandomOrder(), rules.Confidence(), lambda logits: logits[:, 0]):
        assert order_agreement(policy, sampled(policy, rank=rank)) == {}
    assert order_agreement(policy, replace(sampled(policy), order=None)) == {}


def test_an_order_that_was_revised_is_not_compared():
    policy = policy_of(4.0, 3.0, 2.0, 1.0)
    never = torch.full((*sampled(policy).tokens.shape, 1), -1)
    assert order_agreement(policy, replace(sampled(policy), events=Events(never, never, never.float()))) == {}
