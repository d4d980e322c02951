"""Rows of like lengths go through the model together, without the padding that they share; nothing else changes."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from tiny_recipe import Wrapped, tiny_recipe

from dllm_rl.likelihoods import causal, coupled, elbo, one_step
from dllm_rl.likelihoods.scoring import SPREAD, backward_view, buckets, row_chunks, score_view
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.models.tokens import encode
from dllm_rl.rng import generator_for
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.unmask import unmask
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.training.learner import accumulate_gradients, arithmetic, score
from dllm_rl.types import Batch, Prompts

SMALL = {"characters": "abcdefgh", "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
SMALL |= {"head_std": 0.2}
LENGTHS = (3, 40, 5, 38, 12)  # with 6 new tokens: 46 and 44 together, then 18, then 11 and 9


def ragged(kind: str = "llada"):
    policy = tiny_masked_lm(**SMALL) if kind == "roberta" else tiny_llama(**SMALL, causal=kind == "causal")
    ids = [[3 + i % 7 for i in range(n)] for n in LENGTHS]
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, group_size=2)
    if kind == "causal":
        return policy, autoregress(policy, prompts, generator_for(0), max_new_tokens=6)
    return policy, unmask(policy, prompts, generator_for(0), max_new_tokens=6, num_steps=3, temperature=1.0)


def test_buckets_by_hand():
    assert SPREAD == 0.75 and buckets([]) == []
    assert buckets([46, 9, 44, 11, 18]) == [[0, 2], [4], [1, 3]]
    assert buckets([75, 100, 75, 74]) == [[0, 1, 2], [3]]
    assert buckets([5] * 3) == [[0, 1, 2]]


def test_chunks_by_hand():
    policy, rollout = ragged()
    noise = one_step().draw(rollout, generator_for(1))
    shape = [(chunk.rows.tolist(), chunk.columns) for chunk in row_chunks(rollout, noise, None)]
    assert shape == [([2, 3, 6, 7], slice(0, 46)), ([8, 9], slice(28, 46)), ([0, 1, 4, 5], slice(35, 46))]
    shape = [(chunk.rows.tolist(), chunk.columns) for chunk in row_chunks(rollout, noise, 2)]
    assert [rows for rows, _ in shape] == [[2, 3], [6, 7], [8, 9], [0, 1], [4, 5]]
    assert [columns.start for _, columns in shape] == [0, 2, 28, 37, 35]
    short = noise.only(torch.arange(10) >= 8)
    (chunk,) = row_chunks(rollout, short, None)
    assert chunk.rows.tolist() == [8, 9] and chunk.columns == slice(28, 46)


@pytest.mark.parametrize("kind", ["llada", "roberta", "causal"])
def test_scores_are_those_of_the_padded_batch_and_of_each_row_alone(kind, monkeypatch):
    """A causal row that ends early has padding behind it, too."""
    policy, rollout = ragged(kind)
    estimator = causal() if kind == "causal" else elbo()
    noise = estimator.draw(rollout, generator_for(1))
    padded = torch.stack([score_view(policy, rollout, m, w != 0) for m, w in zip(noise.masked, noise.weight, strict=True)])
    tokens, hidden = [], policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda x, mask: (tokens.append(x.numel()), hidden(x, mask))[1])
    ours = estimator.scores(policy, rollout, noise)
    assert sum(tokens) / len(noise.weight) < 0.6 * rollout.tokens.numel()
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


def test_without_mismatch_buckets_are_still_bit_for_bit_the_samplers(tmp_path):
    """The sampler pads to the longest prompt and the learner to the bucket's: attention leaves padding out row by row.
    Without that, as without zero_mismatch, they differ by rounding."""
    recipe = tiny_recipe(
        tmp_path, zero_mismatch=True, rollout_quantization=None, task=Ragged(Sudoku(split="train", size=8))
    )
    policy = recipe.model()
    with arithmetic(recipe, Accelerator(cpu=True)):
        problems = [recipe.task[i] for i in range(8)]
        rollout = recipe.sampler(policy, encode(policy, problems, group_size=2), generator_for(0))
        noise = recipe.likelihood.draw(rollout, generator_for(1))
        assert len(row_chunks(rollout, noise, None)) == 2
        logps = score(recipe, rollout, noise, policy=policy, rollout_policy=policy, reference=None)  # or RuntimeError
    assert torch.equal(logps.old, rollout.logprobs) and (logps.old != 0).any()
