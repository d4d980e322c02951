"""What a canvas shows of a batch that is half written: nothing of positions that are still masked."""

from dataclasses import replace

import torch
from likelihood_toys import TablePolicy

from dllm_rl.samplers.canvas import BlockTracker, block_first_step, make_canvas, positions_of, put
from dllm_rl.samplers.revise import packed_events
from dllm_rl.types.rollouts import Prompts, SamplingParams

SEEDS = [7, 8]
MASK = 2  # of a policy of two words; 3 is its prompt token and 4 its padding


def canvas_of(length, *, rows=1, block_size=2, attention="full"):
    policy = TablePolicy(length=length, words=2, seed=0)
    policy.spec = replace(policy.spec, attention=attention, block_size=block_size)
    prompts = Prompts.from_ids([[3]] * rows, pad_id=4, seeds=SEEDS[:rows])
    return make_canvas(policy, prompts, length, block_size)


def write(canvas, rows, places, step, token=0):
    where, written = (torch.tensor(rows), torch.tensor(places)), canvas.written
    written.tokens[where[0], canvas.columns[where]] = token
    written.masked[where], written.unmask_step[where], written.logprobs[where] = False, step, -0.5


def test_only_rows_that_ended_are_padded():
    """Both rows write one of three positions; the second writes an end token, which is 1 here."""
    canvas = canvas_of(3, rows=2, attention="block_causal")
    write(canvas, [0], [0], step=0)
    write(canvas, [1], [0], step=0, token=1)
    canvas.mark_finished(torch.tensor([0, 1]), (1,))
    seen = canvas.rollout(SamplingParams(), 0)
    assert seen.tokens.tolist() == [[3, 0, MASK, MASK], [3, 1, 4, 4]]
    assert seen.attention_mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_a_position_that_is_masked_again_has_no_record():
    canvas = canvas_of(2)
    canvas.events = []
    kept = torch.tensor([[[-1, -1], [0, 1]]])
    canvas.written = canvas.written._replace(log_mass=torch.tensor([[0.0, -0.1]]), support_ids=kept)
    write(canvas, [0], [1], step=3)
    assert canvas.rollout(SamplingParams(), 0).logprobs.tolist() == [[0.0, 0.0, -0.5]]
    canvas.remask(torch.tensor([0]), torch.tensor([1]), torch.tensor([4]))
    seen, written = canvas.rollout(SamplingParams(), 0), canvas.written
    assert not seen.logprobs.any() and not written.log_mass.any() and (written.support_ids == -1).all()
    assert (seen.unmask_step == -1).all() and not seen.completion_mask.any() and seen.tokens[0, 2] == MASK


def test_values_are_put_where_they_are_kept():
    target = torch.zeros(2, 3, 2, dtype=torch.long)
    rows, columns, values = torch.tensor([0, 1, 1]), torch.tensor([2, 0, 1]), torch.tensor([[1, 2], [3, 4], [5, 6]])
    put(target, rows, columns, values, torch.tensor([True, False, True]))
    assert target.tolist() == [[[0, 0], [0, 0], [1, 2]], [[0, 0], [5, 6], [0, 0]]]
    put(target, rows, columns, values)
    assert target[1, 0].tolist() == [3, 4]


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
    assert block_first_step(canvas.written.unmask_step, canvas.block).tolist() == [[-1, 3]]
    write(canvas, [0], [0], step=5)
    assert block_first_step(canvas.written.unmask_step, canvas.block).tolist() == [[3, 3]]


def half_written(*, wait_for_all_rows: bool, revised: bool = False):
    """Row 0 has written its first block, row 1 one position of it; both have taken part in one step."""
    canvas = canvas_of(5, rows=2)
    canvas.events = [] if revised else None
    tracker = BlockTracker(canvas, 5, wait_for_all_rows=wait_for_all_rows)
    first = tracker.next_rows()
    write(canvas, [0, 0, 1], [0, 1, 1], step=0)
    complete = tracker.record(first, torch.tensor([2, 1]))
    assert complete.tolist() == [0]
    return canvas, tracker


def planned(canvas, tracker):
    step = tracker.next_rows()
    return step, positions_of(canvas, step)


def test_rows_move_on_alone():
    step, plan = planned(*half_written(wait_for_all_rows=False))
    assert step.rows.tolist() == [0, 1] and step.blocks.tolist() == [1, 0]
    assert step.num_masked.tolist() == [2, 1]
    assert (
        step.steps_left.tolist() == plan.steps_left.tolist() == [2, 1]
    )  # two steps a block; row 1 has used one of its first block's
    assert list(zip(plan.row_index.tolist(), plan.offset.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 0)]
    assert plan.column.tolist() == [3, 4, 1]  # behind one prompt token
    assert plan.seed.tolist() == [7, 7, 8] and plan.row_steps.tolist() == [1, 1, 1]


def test_rows_in_step_wait_for_the_slowest():
    step, plan = planned(*half_written(wait_for_all_rows=True))
    assert step.rows.tolist() == [1] and step.blocks.tolist() == [0]
    assert plan.canvas_row.tolist() == [1] and plan.row_index.tolist() == [0] and plan.offset.tolist() == [0]


def test_a_rule_that_rewrites_is_offered_what_the_block_holds():
    step, plan = planned(*half_written(wait_for_all_rows=True, revised=True))
    assert plan.offset.tolist() == [0, 1] and step.num_positions.tolist() == [2]
    assert plan.rewritable.nonzero().tolist() == [[0, 1]] and plan.masked.nonzero().tolist() == [[0, 0]]


def test_a_held_row_stays_in_its_block_while_steps_last():
    _, tracker = half_written(wait_for_all_rows=True)
    step, zero = tracker.next_rows(), torch.tensor([0])
    tracker.steps_left[1, 0] = 2
    held = torch.tensor([True])
    assert tracker.record(step, torch.tensor([1]), held).tolist() == []
    step = tracker.next_rows()
    assert step.blocks.tolist() == [0]
    assert tracker.record(step, zero, held).tolist() == [1]


def test_a_row_that_has_used_its_steps_is_in_its_last_one_until_all_is_written():
    """An adaptive rule may take more than diffusion_steps. Then a step that writes nothing would repeat for ever."""
    canvas, tracker = half_written(wait_for_all_rows=True)
    nothing = torch.tensor([0])
    for _ in range(3):
        step, plan = planned(canvas, tracker)
        assert step.rows.tolist() == [1] and step.steps_left.tolist() == plan.steps_left.tolist() == [1]
        tracker.record(step, nothing)


def test_rows_that_end_early_take_part_no_more():
    _, tracker = half_written(wait_for_all_rows=False)
    tracker.finish_rows(torch.tensor([0]))
    assert tracker.next_rows().rows.tolist() == [1]
    tracker.finish_rows(torch.tensor([1]))
    assert tracker.next_rows() is None
