"""What a canvas shows of a batch that is half written: nothing of positions that are still masked."""

from dataclasses import replace

import torch
from likelihood_toys import TablePolicy

from dllm_rl.samplers.canvas import make_canvas
from dllm_rl.types import Prompts, SamplingParams

MASK = 2  # of a policy of two words; 3 is its prompt token and 4 its padding


def canvas_of(length, *, rows=1, block_size=2, attention="full"):
    policy = TablePolicy(length=length, words=2, seed=0)
    policy.spec = replace(policy.spec, attention=attention, block_size=block_size)
    prompts = Prompts.from_ids([[3]] * rows, pad_id=4)
    return make_canvas(policy, prompts, length, block_size, block_aligned=False)


def write(canvas, rows, places, step, token=0):
    where = torch.tensor(rows), torch.tensor(places)
    canvas.write(
        *where, torch.full((len(rows),), step), torch.full((len(rows),), token), torch.full((len(rows),), -0.5)
    )


def test_only_rows_that_ended_are_padded():
    """Both rows write one of three positions; the second writes an end token, which is 1 here."""
    canvas = canvas_of(3, rows=2, attention="block_causal")
    write(canvas, [0], [0], step=0)
    write(canvas, [1], [0], step=0, token=1)
    canvas.end(torch.tensor([0, 1]), (1,))
    seen = canvas.rollout(SamplingParams(), 0)
    assert seen.tokens.tolist() == [[3, 0, MASK, MASK], [3, 1, 4, 4]]
    assert seen.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_a_position_that_is_masked_again_has_no_record():
    canvas = canvas_of(2)
    kept = torch.tensor([-0.1]), torch.tensor([[0, 1]])
    canvas.write(*torch.tensor([[0], [1], [3], [0]]), torch.tensor([-0.5]), *kept)
    assert canvas.rollout(SamplingParams(), 0).logprobs.tolist() == [[0.0, 0.0, -0.5]]
    canvas.reopen(torch.tensor([0]), torch.tensor([1]), MASK)
    seen = canvas.rollout(SamplingParams(), 0)
    assert not seen.logprobs.any() and not seen.log_kept_mass.any() and (seen.kept_ids == -1).all()
    assert (seen.unmask_step == -1).all() and not seen.completion_mask.any() and seen.tokens[0, 2] == MASK


def test_the_opening_step_is_known_of_what_is_written_alone():
    """Of a block of two positions the second is written in step 3, the first is still masked."""
    canvas = canvas_of(2)
    write(canvas, [0], [1], step=3)
    assert canvas.rollout(SamplingParams(), 0).open_step.tolist() == [[-1, -1, 3]]
    write(canvas, [0], [0], step=5)
    assert canvas.rollout(SamplingParams(), 0).open_step.tolist() == [[-1, 3, 3]]
