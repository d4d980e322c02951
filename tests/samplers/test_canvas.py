"""What a canvas shows of a batch that is half written: nothing of positions that are still masked."""

from dataclasses import replace

import pytest
import torch
from likelihood_toys import TablePolicy

from dllm_rl.models.order import block_first_step
from dllm_rl.samplers.canvas import BlockQueue, make_canvas, next_turn
from dllm_rl.samplers.revise import packed_events
from dllm_rl.samplers.rules import check_last_step, threshold
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
    canvas.events = []
    where = torch.tensor([0]), torch.tensor([1])
    canvas.write(*where, *torch.tensor([[3], [0]]), torch.tensor([-0.5]))
    canvas.note("log_mass", *where, torch.tensor([-0.1]))
    canvas.note("ids", *where, torch.tensor([[0, 1]]), -1)
    assert canvas.noted["ids"].tolist() == [[[-1, -1], [0, 1]]]
    assert canvas.rollout(SamplingParams(), 0).logprobs.tolist() == [[0.0, 0.0, -0.5]]
    canvas.reopen(torch.tensor([0]), torch.tensor([1]), torch.tensor([4]))
    seen = canvas.rollout(SamplingParams(), 0)
    assert not seen.logprobs.any() and not canvas.noted["log_mass"].any() and (canvas.noted["ids"] == -1).all()
    assert (seen.unmask_step == -1).all() and not seen.completion_mask.any() and seen.tokens[0, 2] == MASK


def test_events_of_a_position_are_packed_in_their_order():
    """Row 0, place 1: written in step 0, masked in 2, written in 3; row 1, place 0: written in step 1."""
    noted = [[[0], [1], [0], [5]], [[1], [0], [1], [6]], [[0], [1], [2], [-1]], [[0], [1], [3], [7]]]
    events = [(*torch.tensor(each), -0.1 * torch.tensor(each[3])) for each in noted]
    found = packed_events(events, torch.Size([2, 2]), depends_on_tokens=False)
    none = [-1, -1, -1]
    assert found.step.tolist() == [[none, [0, 2, 3]], [[1, -1, -1], none]]
    assert found.token.tolist() == [[none, [5, -1, 7]], [[6, -1, -1], none]]
    wanted = torch.tensor([[[0, 0, 0], [-0.5, 0.1, -0.7]], [[-0.6, 0, 0], [0, 0, 0]]])
    torch.testing.assert_close(found.logprobs, wanted)


def test_the_opening_step_is_known_of_what_is_written_alone():
    """Of a block of two positions the second is written in step 3, the first is still masked."""
    canvas = canvas_of(2)
    write(canvas, [0], [1], step=3)
    assert block_first_step(canvas.unmask_step, canvas.block).tolist() == [[-1, 3]]
    write(canvas, [0], [0], step=5)
    assert block_first_step(canvas.unmask_step, canvas.block).tolist() == [[3, 3]]


SEEDS = torch.tensor([7, 8])


def half_written(*, in_step: bool, revised: bool = False):
    """Row 0 has written its first block, row 1 one position of it; both have taken part in one step."""
    policy = TablePolicy(length=5, words=2, seed=0)
    canvas = make_canvas(policy, Prompts.from_ids([[3], [3]], pad_id=4), 5, 2, block_aligned=False)
    canvas.events = [] if revised else None
    queue = BlockQueue(canvas.block, 5, in_step=in_step)
    rows, places = torch.tensor([[0, 0, 1], [0, 1, 1]])
    first = next_turn(canvas, queue, SEEDS)
    canvas.write(rows, places, torch.zeros(3, dtype=torch.long), torch.zeros(3, dtype=torch.long), torch.zeros(3))
    complete = queue.record((first.rows, first.blocks), torch.tensor([2, 1]))
    assert complete.tolist() == [0]
    return canvas, queue


def test_rows_move_on_alone():
    turn = next_turn(*half_written(in_step=False), SEEDS)
    assert turn.rows.tolist() == [0, 1] and turn.blocks.tolist() == [1, 0]
    assert turn.num_masked.tolist() == [2, 1]
    assert turn.steps_left.tolist() == [2, 1]  # two steps a block; row 1 has used one of its first block's
    assert list(zip(turn.row.tolist(), turn.place.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 0)]
    assert turn.column.tolist() == [3, 4, 1]  # behind one prompt token
    assert turn.seed.tolist() == [7, 7, 8] and turn.clock.tolist() == [1, 1, 1]


def test_rows_in_step_wait_for_the_slowest():
    turn = next_turn(*half_written(in_step=True), SEEDS)
    assert turn.rows.tolist() == [1] and turn.blocks.tolist() == [0]
    assert turn.canvas_row.tolist() == [1] and turn.row.tolist() == [0] and turn.place.tolist() == [0]


def test_a_rule_that_rewrites_is_offered_what_the_block_holds():
    turn = next_turn(*half_written(in_step=True, revised=True), SEEDS)
    assert turn.place.tolist() == [0, 1] and turn.num_positions.tolist() == [2]
    assert turn.written.nonzero().tolist() == [[0, 1]] and turn.masked.nonzero().tolist() == [[0, 0]]


def test_a_held_row_stays_in_its_block_while_steps_last():
    canvas, queue = half_written(in_step=True)
    turn = next_turn(canvas, queue, SEEDS)
    zero = torch.tensor([0])
    where = (turn.rows, turn.blocks)
    queue.steps[1, 0] = 2
    held = torch.tensor([True])
    assert queue.record(where, torch.tensor([1]), held).tolist() == []
    assert next_turn(canvas, queue, SEEDS).blocks.tolist() == [0]
    assert queue.record(where, zero, held).tolist() == [1]


def test_a_row_that_has_used_its_steps_is_in_its_last_one_until_all_is_written():
    """An adaptive rule may take more than diffusion_steps. Then a step that writes nothing would repeat for ever."""
    canvas, queue = half_written(in_step=True)
    nothing = torch.tensor([0])
    for _ in range(3):
        turn = next_turn(canvas, queue, SEEDS)
        assert turn.rows.tolist() == [1] and turn.steps_left.tolist() == turn.left.tolist() == [1]
        with pytest.raises(ValueError, match="chose nothing in the last step of a block"):
            check_last_step(threshold, turn.steps_left, turn.num_masked, nothing)
        queue.record((turn.rows, turn.blocks), nothing)


def test_rows_that_end_early_take_part_no_more():
    canvas, queue = half_written(in_step=False)
    queue.drop(torch.tensor([0]))
    assert next_turn(canvas, queue, SEEDS).rows.tolist() == [1]
    queue.drop(torch.tensor([1]))
    assert next_turn(canvas, queue, SEEDS) is None
