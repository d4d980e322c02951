"""Rows of like lengths go through the model together, without the padding that they share; nothing else changes."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tiny_recipe import Wrapped, tiny_recipe

from dllm_rl.likelihoods import causal, coupled, elbo, one_step
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.scoring import backward_view, row_chunks, score_view
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.models.tokens import encode
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.learner import accumulate_gradients
from dllm_rl.training.scorer import arithmetic, score
from dllm_rl.types import Batch, Prompts

SMALL = {"characters": "abcdefgh", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
SMALL |= {"head_std": 0.2}
LENGTHS = (3, 40, 5, 38, 12)  # with 6 new tokens: 46 and 44 together, and 18, 11 and 9


def ragged(kind: str = "llada"):
    policy = tiny_masked_lm(**SMALL) if kind == "roberta" else tiny_llama(**SMALL, causal=kind == "causal")
    ids = [[3 + i % 7 for i in range(n)] for n in LENGTHS]
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, group_size=2)
    if kind == "causal":
        return policy, autoregress(policy, prompts, generator_for(0), max_new_tokens=6)
    return policy, unmask(policy, prompts, generator_for(0), max_new_tokens=6, num_steps=3, temperature=1.0)


def test_chunks_by_hand():
    """Of two rows each; the rule of `length_buckets`, which a test of its own works out."""
    _, rollout = ragged()
    noise = one_step().draw(rollout, generator_for(1))

    def chunks(noise, size):
        return [(chunk.rows.tolist(), chunk.columns.start) for chunk in row_chunks(rollout, noise, size)]

    assert chunks(noise, None) == [([2, 3, 6, 7], 0), ([0, 1, 4, 5, 8, 9], 28)]
    assert chunks(noise, 5) == [([2, 3, 6, 7], 0), ([0, 1, 4, 5], 28), ([8, 9], 28)]
    assert chunks(noise, 2) == [([2, 3], 0), ([6, 7], 0), ([0, 1], 28), ([4, 5], 28), ([8, 9], 28)]
    one = noise.only(torch.arange(10) == 4)
    assert chunks(one, None) == [([4, 5], 28)], "the width is that of the whole rollout's bucket"


@pytest.mark.parametrize("kind", ["llada", "roberta", "causal"])
def test_scores_are_those_of_the_padded_batch_and_of_each_row_alone(kind, monkeypatch):
    """A causal row that ends early has padding behind it, too."""
    policy, rollout = ragged(kind)
    estimator = causal() if kind == "causal" else elbo()
    noise = estimator.draw(rollout, generator_for(1))
    padded = torch.stack(
        [score_view(policy, rollout, m, w != 0) for m, w in zip(noise.masked, noise.weight, strict=True)]
    )
    tokens, hidden = [], policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda x, mask: (tokens.append(x.numel()), hidden(x, mask))[1])
    ours = estimator.scores(policy, rollout, noise)
    assert sum(tokens) == len(noise.weight) * (4 * 46 + 6 * 18)
    torch.testing.assert_close(ours, padded, rtol=1e-5, atol=2e-6)
    assert (padded != 0).any()
    monkeypatch.undo()
    single = replace(rollout, group_size=1)
    rows = torch.arange(10).split(1)
    alone = torch.cat([estimator.scores(policy, single.rows(row), noise.rows(row)) for row in rows], dim=1)
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=2e-6)


def test_the_gradient_is_that_of_the_padded_batch():
    policy, rollout = ragged()
    estimator = coupled()
    noise = estimator.draw(rollout, generator_for(1))
    scores, mask = estimator.scores(policy, rollout, noise), rollout.completion_mask
    vector = torch.randn(mask.shape, generator=generator_for(2)) * mask
    old = estimator.combine(scores, noise)
    batch = Batch(rollout, noise, torch.ones(10), old, scores, mask.float(), mask, None, 1, 1)
    found = []
    for update in ("padded", "buckets", "kept"):
        policy.module.zero_grad()
        if update == "padded":
            for masked, weight in zip(noise.masked, noise.weight, strict=True):
                backward_view(policy, rollout, masked, vector * weight)
        else:
            given = estimator.scores(policy, rollout, noise, keep_graphs=update == "kept")
            accumulate_gradients(policy, batch, given, loss=lambda logps, batch: (0, {}, vector), likelihood=estimator)
        found.append(torch.cat([p.grad.flatten() for p in policy.module.parameters()]))
    for ours in found[1:]:
        assert (ours - found[0]).norm() < 1e-5 * found[0].norm()


class Ragged(Wrapped):
    """Every other prompt is nearly twice as long."""

    def reward(self, problem, completion):
        return self.task.reward(problem, completion)

    def __getitem__(self, index):
        problem = self.task[index]
        return replace(problem, prompt=problem.prompt + "=" * (28 * (index % 2) + index % 3))


@pytest.mark.parametrize("zero_mismatch", [False, True])
def test_what_is_scored_is_bit_for_bit_what_was_sampled(tmp_path, zero_mismatch):
    """The sampler's buckets are the learner's, also where some groups are not scored."""
    task = Ragged(Sudoku(split="train", size=8))
    recipe = tiny_recipe(tmp_path, zero_mismatch=zero_mismatch, rollout_quantization=None, task=task)
    policy = recipe.model()
    with arithmetic(recipe, Accelerator(cpu=True)):
        problems = [recipe.task[i] for i in range(8)]
        rollout = recipe.sampler(policy, encode(policy, problems, group_size=2), generator_for(0))
        noise = recipe.likelihood.draw(rollout, generator_for(1)).only(torch.arange(16) != 3)
        assert len(row_chunks(rollout, noise, None)) == 2
        logps = score(recipe, rollout, noise, policy=policy, rollout_policy=policy, reference=None)
    there = torch.arange(16)[:, None] != 3
    assert torch.equal(logps.old, recorded(rollout, noise) * there) and (logps.old != 0).any()
