"""Groups to score are shared out so that processes finish together; what travels arrives as it left."""

import dataclasses

import pytest
import torch
from tiny_recipe import tiny_recipe
from torch import Tensor

from dllm_rl.likelihoods.estimators import one_step
from dllm_rl.rng import generator_for
from dllm_rl.training import learner, train
from dllm_rl.training.evening import Evened, even_out, layout, moves, packed, tensors, unpacked
from dllm_rl.types import Noise, Rollout, SamplingParams


@pytest.mark.parametrize(
    ("costs", "extra", "expected"),
    [
        ([[5, 5, 5, 5], [0, 0, 0, 0]], 0, [(0, 1, 0), (0, 1, 1)]),  # 20 and 0 -> 15 and 5 -> 10 and 10
        ([[5, 5, 5, 5], [0, 0, 0, 0]], 6, [(0, 1, 0)]),  # 15 and 11: another would end at 10 and 22
        ([[5, 5, 5, 5], [0, 0, 0, 0]], 16, []),  # what a guest costs beside its own eats the gain
        ([[2] * 8, [0] * 8], 3, [(0, 1, 0), (0, 1, 1)]),  # 16 and 0 -> 14 and 5 -> 12 and 10
        ([[5, 0], [0, 5]], 0, []),
        ([[5, 5], [0, 5]], 0, []),  # 10 and 5 would be 5 and 10
        ([[9, 2, 4], [1, 0, 0]], 0, [(0, 1, 0), (1, 0, 0)]),  # 15 and 1 -> 6 and 10 -> 7 and 9
        ([[0, 0], [4, 4], [4, 4], [0, 0]], 0, [(1, 0, 0), (2, 3, 0)]),
    ],
)
def test_groups_move_as_long_as_the_slower_process_gains(costs, extra, expected):
    assert moves(torch.tensor(costs), extra=extra) == expected


def test_no_process_takes_longer_than_the_slowest_did_and_no_group_is_lost():
    """Random costs: the slowest is never slower, what is not worth a move stays, and a group moves once, from home."""
    generator = generator_for("costs")
    gains = []
    for _ in range(200):
        costs = torch.randint(0, 9, (5, 6), generator=generator) * torch.randint(0, 2, (5, 6), generator=generator)
        plan = moves(costs, extra=1)
        assert len({(giver, place) for giver, _, place in plan}) == len(plan)
        loads = costs.sum(1)
        for giver, taker, place in plan:
            loads[giver] -= costs[giver, place]
            loads[taker] += costs[giver, place] + 1
            assert costs[giver, place] > 0
        assert loads.max() <= costs.sum(1).max()
        assert loads.sum() == costs.sum() + len(plan)
        gains.append((costs.sum(1).max() / costs.sum(1).float().mean(), loads.max() / costs.sum(1).float().mean()))
    before, after = torch.tensor(gains).nanmean(0).tolist()
    assert before > 1.4 and after < 1.2


def made(rows, columns, views, ids, *, seed):
    """A rollout and masks of random numbers, every field filled."""
    draw = generator_for("evening", seed)
    whole = lambda *shape: torch.randint(-1, 2**50, shape, generator=draw)  # noqa: E731
    yes = lambda *shape: torch.rand(shape, generator=draw) < 0.5  # noqa: E731
    real = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    two, three = (rows, columns), (views, rows, columns)
    rollout = Rollout(
        tokens=whole(*two), attention_mask=yes(*two), completion_mask=yes(*two), unmask_step=whole(*two),
        logprobs=real(*two), group_size=2, sampling_params=SamplingParams(support="rollout"), log_kept_mass=real(*two),
        kept_ids=whole(*two, ids), open_step=whole(*two), order_logprobs=real(*two),
    )  # fmt: skip
    return rollout, Noise(yes(*three), real(*three), real(rows), yes(*three), yes(rows))


def test_what_travels_arrives_as_it_left():
    """Between processes whose rollouts differ in rows, columns, views and kept ids."""
    theirs, ours = made(4, 7, 3, 5, seed=0), made(6, 9, 2, 1, seed=1)
    rows = torch.tensor([2, 3])
    left = [each.rows(rows) for each in theirs]
    parcel, shapes = packed(*left), layout(*ours, 2, (3, 7, 5))
    arrived = unpacked(*ours, parcel, shapes)
    assert len(shapes) == 14 and parcel.dtype == torch.float64
    for one, other in zip(left, arrived, strict=True):
        for field in dataclasses.fields(one):
            a, b = getattr(one, field.name), getattr(other, field.name)
            assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b, field.name
    assert tensors(*ours).keys() == shapes.keys()


def test_one_process_runs_its_own_rows_without_an_exchange():
    rollout, noise = made(4, 7, 3, 5, seed=0)
    even = even_out(rollout, noise, stays=False)
    assert even == Evened([(rollout, noise)])
    scores = torch.randn(3, 4, 7, generator=generator_for("scores"))
    assert even.home([scores]) is scores and even.away(scores) == [scores]


@pytest.mark.parametrize(
    ("changes", "stays"),
    [
        ({"kept_graphs": 0}, {False}),
        ({"kept_graphs": 1, "likelihood": one_step(), "micro_batch_size": None}, {True}),
        ({"kept_graphs": 0, "rollout_quantization": None, "zero_mismatch": True}, {True, False}),  # scoring, update
    ],
)
def test_rows_stay_where_graphs_are_kept_or_widths_must_be_those_of_the_rollout(tmp_path, monkeypatch, changes, stays):
    asked = []
    monkeypatch.setattr(learner, "even_out", lambda *a, stays: asked.append(stays) or even_out(*a, stays=stays))
    train(tiny_recipe(tmp_path, num_steps=1, report_to=None, **changes))
    assert set(asked[1:]) == stays, "the first is the rehearsal's"
