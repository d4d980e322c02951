"""Groups move once, so that processes finish together; what moves arrives as it left, and its noise with it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from threading import Barrier

import pytest
import torch
from accelerate import Accelerator
from tiny_recipe import tiny_recipe
from torch import Tensor

from dllm_rl.likelihoods.estimators import ELBO, Coupled, OneStep
from dllm_rl.rng import generator_for
from dllm_rl.step import balance
from dllm_rl.step.samples import Samples
from dllm_rl.training.make_step import make_step
from dllm_rl.types.batch_record import BatchRecord
from dllm_rl.types.rollouts import Events, FilterSupport, Order, Rollout, SamplingParams


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([[5, 5, 5, 5], [0, 0, 0, 0]], [((0, 0), (1, 0)), ((0, 1), (1, 1))]),  # 20 and 0 -> 15 and 5 -> 10 and 10
        ([[5, 0], [0, 5]], []),
        ([[5, 5], [0, 5]], []),  # 10 and 5 would be 5 and 10
        ([[9, 2, 4], [1, 0, 0]], [((0, 0), (1, 0))]),  # 15 and 1 -> 7 and 9
        ([[9, 4], [6, 1]], [((0, 0), (1, 0))]),  # 13 and 7 -> 10 and 10: a long group for a short one
        ([[500, 500], [499, 491]], []),  # 9 or 1 of 1000 is not worth a move
        ([[0, 0], [4, 4], [4, 4], [0, 0]], [((1, 0), (0, 0)), ((2, 0), (3, 0))]),
        ([[0, 0], [0, 0]], []),
    ],
)
def test_groups_are_swapped_as_long_as_the_slower_process_gains(costs, expected):
    costs = torch.tensor(costs)
    assert balance.plan_swaps(costs, torch.zeros_like(costs, dtype=torch.bool)) == expected


def test_no_process_takes_longer_than_the_slowest_did_and_a_group_moves_once():
    generator = generator_for("costs")
    gains = []
    for _ in range(200):
        costs = torch.randint(0, 9, (5, 6), generator=generator) * torch.randint(0, 2, (5, 6), generator=generator)
        plan = balance.plan_swaps(costs, torch.zeros_like(costs, dtype=torch.bool))
        assert len({place for pair in plan for place in pair}) == 2 * len(plan)
        moved = costs.clone()
        for one, other in plan:
            moved[one] = costs[other]
            moved[other] = costs[one]
        assert moved.sum(1).max() <= costs.sum(1).max()
        gains.append(
            (costs.sum(1).max() / costs.sum(1).float().mean(), moved.sum(1).max() / moved.sum(1).float().mean())
        )
    before, after = torch.tensor(gains).nanmean(0).tolist()
    assert before > 1.4 and after < 1.1


def rank(index, count):
    """What an Accelerator says in one of several processes."""
    says = {"process_index": index, "num_processes": count, "device": torch.device("cpu"), "__init__": lambda _: None}
    return type("Rank", (Accelerator,), says)()


class Joined:
    """Processes as threads: what each gathers and swaps reaches the others."""

    def __init__(self, count):
        self.barrier = Barrier(count, timeout=60)
        self.given = [None] * count
        self.me = {}

    def all_of(self, accelerator, given):
        self.given[accelerator.process_index] = given
        self.barrier.wait()
        found = list(self.given)
        self.barrier.wait()
        return found

    def run(self, monkeypatch, work):
        """`work(accelerator)` of each process."""
        count = len(self.given)
        ranks = [rank(i, count) for i in range(count)]

        def gathered(parts, accelerator, counts=None):
            return [torch.cat(found) for found in zip(*self.all_of(accelerator, parts), strict=True)]

        monkeypatch.setattr(balance, "gather_on_host", gathered)
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(work, ranks))


def made(rows, columns, ids, *, seed, padding, events=0):
    """A rollout of random numbers, every field filled; its first columns pad every row."""
    draw = generator_for("balance", seed)
    whole = lambda *shape: torch.randint(-1, 2**50, shape, generator=draw)  # noqa: E731
    yes = lambda *shape: torch.rand(shape, generator=draw) < 0.5  # noqa: E731
    real = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    two = (rows, columns)
    seen = torch.arange(columns).expand(two) >= padding
    order = Order(whole(*two), logprobs=real(*two), draw_index=whole(*two))
    record = Events(whole(*two, events), whole(*two, events), real(*two, events)) if events else None
    return Rollout(
        tokens=whole(*two), attention_mask=seen, completion_mask=yes(*two), unmask_step=whole(*two),
        logprobs=real(*two), group=torch.arange(rows) // 2, sampling_params=SamplingParams(support="rollout"),
        filter_support=FilterSupport(real(*two), whole(*two, ids)), order=order, events=record,
    )  # fmt: skip


def columns_of(rollout, source):
    """Pairs of the tensors (B, T, ...) of two records, and of their parts, and what fills empty columns."""
    for field in fields(rollout):
        now, then = getattr(rollout, field.name), getattr(source, field.name)
        if isinstance(now, BatchRecord):
            yield from columns_of(now, then)
        elif isinstance(now, Tensor) and now.dim() > 1:
            yield now, then, rollout.FILL.get(field.name, 0)


def balanced(monkeypatch, recipe, rollouts, advantages, weights):
    """What each process has after `balance`."""
    joined = Joined(len(rollouts))

    def work(accelerator):
        me = accelerator.process_index
        group, counts = torch.arange(len(advantages)) // 2, (len(advantages) // 2,) * 2
        samples = Samples(rollouts[me], group, advantages + 100, advantages, weights, counts)
        swaps = not recipe.zero_mismatch
        return balance.balance(recipe, samples, accelerator, pad_id=0, swaps=swaps)

    return joined.run(monkeypatch, work)


def test_what_moves_arrives_as_it_left(tmp_path, monkeypatch):
    """Between processes whose rollouts differ in columns, kept ids and events; all know the new order."""
    recipe = tiny_recipe(tmp_path)
    rollouts = [made(8, 7, 5, seed=0, padding=0, events=2), made(8, 9, 1, seed=1, padding=1, events=3)]
    advantages = torch.zeros(16)
    advantages[:6] = torch.arange(1.0, 7)  # the first process has three groups of four, the other none
    weights = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 5]).repeat_interleave(2)
    found = balanced(monkeypatch, recipe, rollouts, advantages, weights)
    rows = [samples.rollout.batch_row.tolist() for samples in found]
    assert rows == [[8, 9, 2, 3, 4, 5, 6, 7], [0, 1, 10, 11, 12, 13, 14, 15]]
    for samples, mine in zip(found, rows, strict=True):
        rollout, scores, weights = samples.rollout, samples.advantages, samples.metric_weights
        assert torch.equal(samples.rewards, scores + 100), "what is known of a group stays together"
        assert scores[rows[0] + rows[1]].tolist() != scores.tolist()
        assert torch.equal(scores, advantages[rows[0] + rows[1]])
        assert weights.tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 5, 5]
        assert samples.counts == (8, 8) and samples.group.tolist() == [row // 2 for row in rows[0] + rows[1]]
        assert rollout.group.tolist() == [row // 2 for row in mine], "no two groups of a process have one number"
        for line, row in enumerate(mine):
            source = rollouts[row // 8]
            for now, then, fill in columns_of(rollout, source):
                width = min(now.shape[1], then.shape[1])
                if now.dim() == 3:
                    ids = then.shape[-1]
                    assert torch.equal(now[line, -width:, :ids], then[row % 8, -width:])
                    assert (now[line, ..., ids:] == fill).all()
                else:
                    assert torch.equal(now[line, -width:], then[row % 8, -width:]) and now.dtype == then.dtype
            assert not rollout.attention_mask[line, :-width].any()
    assert [samples.rollout.tokens.shape[1] for samples in found] == [8, 8], "no column pads every row"


def test_an_update_counts_for_more_than_a_row_that_is_only_measured(tmp_path, monkeypatch):
    """Two groups to learn from on one side, two to measure on the other: one of each goes across."""
    recipe = tiny_recipe(tmp_path)
    rollouts = [made(8, 7, 1, seed=seed, padding=0) for seed in range(2)]
    advantages = torch.zeros(16)
    advantages[:4] = 1.0
    weights = torch.tensor([1.0, 1, 0, 0, 3, 3, 0, 0]).repeat_interleave(2)
    found = balanced(monkeypatch, recipe, rollouts, advantages, weights)
    assert all((one.advantages != 0).view(2, 4, 2).any(-1).sum(1).tolist() == [1, 1] for one in found)


def test_the_cost_of_a_group_is_that_of_all_its_rows(tmp_path, monkeypatch):
    """Of each measured group, only the first row has a weight: of two such groups one goes across."""
    recipe = tiny_recipe(tmp_path)
    rollouts = [made(8, 7, 1, seed=seed, padding=0) for seed in range(2)]
    weights = torch.tensor([1.0, 0, 1, 0, *[0] * 12])
    found = balanced(monkeypatch, recipe, rollouts, torch.zeros(16), weights)
    measured = found[0].metric_weights.view(2, 4, 2).any(-1)
    assert measured.sum(1).tolist() == [1, 1]


def test_rows_stay_with_zero_mismatch(tmp_path, monkeypatch):
    """The bits of a row depend on the width of its rollout. Rows are numbered all the same, for their noise."""
    recipe = tiny_recipe(tmp_path, zero_mismatch=True, rollout_quantization=None)
    rollouts = [made(8, 7, 1, seed=seed, padding=0) for seed in range(2)]
    advantages = (torch.arange(16) < 8).float()
    found = balanced(monkeypatch, recipe, rollouts, advantages, torch.ones(16))
    assert [samples.rollout.batch_row.tolist() for samples in found] == [list(range(8)), list(range(8, 16))]
    for samples, given in zip(found, rollouts, strict=True):
        assert torch.equal(samples.rollout.tokens, given.tokens)


def test_one_process_balances_nothing(tmp_path):
    policy = tiny_recipe(tmp_path).model()
    step = make_step(tiny_recipe(tmp_path), accelerator=Accelerator(cpu=True), policy=policy, rollout_policy=policy)
    assert not step.balances


@pytest.mark.parametrize(
    "estimator",
    [OneStep(), ELBO(), Coupled()],
    ids=lambda estimator: estimator.name,
)
def test_a_row_has_the_same_noise_wherever_it_is(estimator):
    shape = (12, 7)
    seen = torch.ones(shape, dtype=torch.bool)
    rollout = replace(
        made(*shape, 1, seed=0, padding=0),
        completion_mask=seen & (torch.arange(7) > 2),
        unmask_step=(torch.arange(7) - 3).expand(shape).clamp(min=-1),
    )
    every = estimator.draw_views(rollout, generator_for("noise"))
    rows = torch.tensor([4, 5, 10, 11, 2, 3])
    some = estimator.draw_views(replace(rollout.rows(rows), batch_row=rows), generator_for("noise"))
    assert torch.equal(some.masked, every.masked[:, rows]) and torch.equal(
        some.coefficients, every.coefficients[:, rows]
    )
    other = estimator.draw_views(rollout.rows(rows), generator_for("noise"))
    assert not torch.equal(other.masked, some.masked)


def test_numbers_go_back_to_the_process_that_sampled_their_rows(monkeypatch):
    rows = [[4, 5, 2, 3], [0, 1, 6, 7]]
    rollouts = [replace(made(4, 7, 1, seed=i, padding=0), batch_row=torch.tensor(rows[i])) for i in range(2)]

    def work(accelerator):
        mine = torch.tensor(rows[accelerator.process_index])
        rollout, known = rollouts[accelerator.process_index], torch.zeros(8)
        samples = Samples(rollout, torch.arange(8) // 2, known, known, known, (4, 4))
        return balance.to_sampling_order(torch.stack([mine * -10.0, mine * 1.0], dim=1), samples, samples, accelerator)

    first, second = Joined(2).run(monkeypatch, work)
    # By their rows, not by the first value.
    assert torch.cat([first, second]).tolist() == [[-10.0 * i, i] for i in range(8)]
