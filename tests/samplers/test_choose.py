"""What a step writes: the same tokens whether they are drawn before the ranking or after it."""

import torch
from likelihood_toys import TablePolicy

from dllm_rl.samplers import rules
from dllm_rl.samplers.canvas import make_canvas
from dllm_rl.samplers.choose import Choose
from dllm_rl.samplers.turns import BlockQueue, next_turn
from dllm_rl.types import Prompts, SamplingParams


def choice_of(rank, commit=rules.schedule, *, temperature=1.0):
    """The first step of three rows, six positions in one block of three steps: two positions a row are written."""
    policy = TablePolicy(length=6, words=2, seed=0)
    canvas = make_canvas(policy, Prompts.from_ids([[3]] * 3, pad_id=4), 6, 6, block_aligned=False)
    turn = next_turn(canvas, BlockQueue(canvas.block, 3, in_step=False), torch.tensor([5, 6, 7]))
    states = policy.hidden(canvas.tokens, canvas.attention_mask)[turn.canvas_row, turn.column]
    choose = Choose(policy, canvas, SamplingParams(temperature, suppress=(2, 3, 4)), rank, commit)
    return choose, turn, choose(turn, states)


def draws_first(logits, normalizer, tokens):
    """`max_prob`, which asks for the tokens without a use for them."""
    return rules.max_prob(logits, normalizer)


def test_drawing_before_ranking_changes_nothing():
    late, turn, choice = choice_of(rules.max_prob)
    early, _, same = choice_of(draws_first)
    assert early.draws_first and not late.draws_first
    assert choice.picked.tolist() == same.picked.tolist()
    assert turn.row[choice.picked].tolist() == [0, 0, 1, 1, 2, 2]
    for drawn, other in zip(choice.drawn, same.drawn, strict=True):
        assert torch.equal(drawn, other)


def test_the_order_has_a_law_only_where_chance_ranks():
    _, turn, choice = choice_of(rules.confidence)
    stayed, order = choice.left
    assert sorted(choice.picked.tolist() + stayed.tolist()) == list(range(len(turn.row)))
    assert (order <= 0).all() and (order < 0).any()
    for rank, temperature in ((rules.max_prob, 1.0), (rules.confidence, 0.0)):
        assert choice_of(rank, temperature=temperature)[2].left is None


def test_the_most_confident_draws_are_written():
    """The same draws, once all written and once ranked by hand: log-prob of the drawn token, mask token included."""
    _, turn, whole = choice_of(rules.confidence, lambda scores, masked, steps_left: masked)
    logp = TablePolicy(length=6, words=2, seed=0).table[-1][:, :3].log_softmax(-1)
    expected = []
    for row in range(3):
        mine = (turn.row == row).nonzero()[:, 0].tolist()
        confidences = {position: logp[turn.place[position], whole.drawn[0][position]].item() for position in mine}
        expected += sorted(sorted(confidences, key=confidences.get)[-2:])
    assert choice_of(rules.confidence)[2].picked.tolist() == expected
