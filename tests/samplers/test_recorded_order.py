"""The log-prob of the order is computed only where something reads it, and nothing else depends on that."""

from dataclasses import replace

import pytest
import torch
from repetitions import few, slow
from tiny_recipe import tiny_recipe

from dllm_rl import NoCorrection, evaluate, train
from dllm_rl.integrations.serving.batching import CompletionJob, sample_rows
from dllm_rl.likelihoods.estimators import ELBO, OneStep, Trajectory
from dllm_rl.models.tiny import tiny_masked_lm
from dllm_rl.samplers import choose
from dllm_rl.samplers.cache import DualCache
from dllm_rl.samplers.rules import Confidence, PlackettLuce, SoftThreshold
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.tasks import Sudoku
from dllm_rl.types.rollouts import Prompts

pytestmark = pytest.mark.usefixtures("no_rehearsal")

ORDERS = {
    "confidence": {"rank": Confidence()},
    "in blocks, with a cache": {"rank": Confidence(), "block_size": 3, "cache": DualCache()},
    "filtered": {"rank": Confidence(), "top_p": 0.8},
    "plackett_luce": {"rank": PlackettLuce(temperature=0.3)},
    "soft_threshold": {"commit": SoftThreshold(tau=0.3)},
}


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """For each time that log F_j is computed for `Confidence`, the number of positions."""
    calls = []
    compute = choose.stay_masked_logprobs

    def counted(policy, hidden, *arguments):
        calls.append(len(hidden))
        return compute(policy, hidden, *arguments)

    monkeypatch.setattr(choose, "stay_masked_logprobs", counted)
    return calls


@pytest.mark.parametrize("name", few(ORDERS, ["in blocks, with a cache", "soft_threshold"]))
def test_without_the_record_a_rollout_is_the_same(name, computed):
    policy = tiny_masked_lm(characters="123456789", hidden_size=32, num_layers=1, num_attention_heads=2, head_std=0.2)
    prompts = Prompts.from_ids([[5, 6, 7], [8, 9, 10, 11, 3]], pad_id=0, num_generations=3)
    sampler = Unmask(**{"max_new_tokens": 6, "temperature": 0.7, "diffusion_steps": 4} | ORDERS[name])
    recorded = sampler(policy, prompts, torch.Generator().manual_seed(1))
    assert recorded.order.logprobs.any() and bool(computed) == isinstance(sampler.rank, Confidence)
    computed.clear()
    bare = sampler(policy, replace(prompts, reads_order=False), torch.Generator().manual_seed(1))
    assert bare.order.logprobs is None and not computed
    order = replace(recorded.order, logprobs=None, draw_index=None)
    expected, found = replace(recorded, order=order).tensors(), bare.tensors()
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert bare.order.probability == recorded.order.probability


@pytest.mark.parametrize(
    ("likelihood", "reads"),
    [
        slow(Trajectory(), True),  # every run of it would fail without
        (lambda rollout, generator: Trajectory().draw_views(rollout, generator), True),
        slow(Trajectory(include_order=False), False),
        (Trajectory(num_segments=2), False),
        slow(Trajectory(variance_growth=0.5, include_order=False), False),
        slow(OneStep(), False),
        slow(ELBO(num_samples=1), False),
    ],
    ids=["exact", "function", "tokens", "merged", "drawn", "one_step", "elbo"],
)
@pytest.mark.repeated(first_only=True)
def test_a_run_computes_the_order_if_its_likelihood_reads_it(likelihood, reads, computed, tmp_path):
    few = {"num_steps": 1, "train_batch_size": 1, "num_generations": 2, "eval_steps": 0, "corrector": NoCorrection()}
    train(tiny_recipe(tmp_path, likelihood=likelihood, **few))
    assert bool(computed) == reads


def test_neither_an_evaluation_nor_a_server_reads_the_order(computed):
    recipe = tiny_recipe("unused")
    policy = recipe.model()
    sampler = recipe.eval_sampler.replace(temperature=1.0)
    evaluate(policy, Sudoku(split="test", size=2), sampler)
    sample_rows(policy, [CompletionJob(ids=[3, 4], sampler=sampler, seed=0)])
    assert not computed
