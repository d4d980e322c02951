"""Commit rules that come back to what they wrote: remasking (ReMDM) and editing (LLaDA2.1)."""

import itertools
import math
from collections import Counter

import pytest
import torch
from refusals import refuses
from repetitions import few

from dllm_rl import train
from dllm_rl.likelihoods import estimators
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers import revise, rules
from dllm_rl.samplers.cache import DualCache
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.types.rollouts import Prompts
from tests.support.likelihood_toys import TablePolicy
from tests.support.tiny_recipe import SIZES, tiny_recipe

pytestmark = pytest.mark.usefixtures("no_rehearsal")

REMASK = {"rank": rules.RandomOrder(), "commit": revise.Remask(eta=0.5)}
EDIT = {"rank": rules.Confidence(), "commit": revise.Edit(tau=0.5)}
SOFT = {"rank": rules.MaxProb(), "commit": revise.SoftEdit(rate=0.5)}


def sample(policy, ids, seeds, *, length=6, group=1, on_step=None, **options):
    prompts = Prompts.from_ids(ids, pad_id=policy.pad_id, num_generations=group, seeds=list(seeds))
    sampler = Unmask(max_new_tokens=length, **{"temperature": 1.0} | options)
    return sampler(policy, prompts, torch.Generator(), on_step=on_step)


@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_remasking_keeps_the_share_that_is_written(eta):
    """In step j of n a position is masked with probability 1 - j/n, whatever eta: what makes it a sampler of the same
    model (ReMDM, theorem 3.1). Every uniform of a fine grid stands for a position."""
    n, size = 5, 40_000
    grid, state = (torch.arange(size) + 0.5) / size, 1.0
    for j in range(n):
        left = torch.tensor([n - j])
        chosen = [
            revise.Remask(eta=eta)(grid[None], masked, left, ~masked, steps=torch.tensor([n])).float().mean()
            for masked in (torch.ones(1, size, dtype=torch.bool), torch.zeros(1, size, dtype=torch.bool))
        ]
        state = state * (1 - chosen[0]) + (1 - state) * chosen[1]
        torch.testing.assert_close(float(state), 1 - (j + 1) / n, rtol=0, atol=2e-4)
        assert eta or chosen[1] == 0


def test_without_remasking_it_is_the_ancestral_sampler():
    scores, masked = torch.rand(3, 50, generator=torch.Generator().manual_seed(0)), torch.ones(3, 50, dtype=torch.bool)
    left, steps = torch.tensor([4, 2, 1]), torch.tensor([4, 4, 4])
    chosen = revise.Remask(eta=0.0)(scores, masked, left, ~masked, steps)
    assert torch.equal(chosen, rules.Origin()(scores, masked, left))


def law(policy: TablePolicy, diffusion_steps: int, eta: float) -> dict[tuple[int, ...], float]:
    """What completions the remasking sampler writes, by enumeration over states in plain floats."""
    mask, states = policy.mask_id, {(policy.mask_id,) * policy.length: 1.0}
    for j in range(diffusion_steps):
        a_t, a_s = j / diffusion_steps, (j + 1) / diffusion_steps
        sigma = min(eta, (1 - a_s) / a_t) if j else 0.0
        write = (a_s - (1 - sigma) * a_t) / (1 - a_t)
        after: Counter = Counter()
        for state, p in states.items():
            tokens = torch.tensor([[policy.words + 1, *state]])
            logits = policy.hidden(tokens, torch.ones_like(tokens))[0, 1:, : policy.words].double()
            probs = logits.softmax(-1).tolist()
            ways = [
                [(v, write * q) for v, q in enumerate(probs[i])] + [(mask, 1 - write)]
                if token == mask
                else [(token, 1 - sigma), (mask, sigma)]
                for i, token in enumerate(state)
            ]
            for way in itertools.product(*ways):
                after[tuple(t for t, _ in way)] += p * math.prod(q for _, q in way)
        states = after
    return {state: p for state, p in states.items() if p > 0}


@pytest.mark.parametrize("eta", few([0.5, 1.0], [0.5]))
def test_what_remasking_writes_follows_the_enumerated_law(eta):
    policy, rows = TablePolicy(length=2, words=2, seed=3, scale=3.0), 10_000
    expected = law(policy, 3, eta)
    rule = revise.Remask(eta=eta)
    options = {"rank": rules.RandomOrder(), "commit": rule, "suppress": (3, 4)}
    rollout = sample(policy, [[3]], range(rows), group=rows, length=2, diffusion_steps=3, **options)
    counts = Counter(map(tuple, rollout.tokens[:, 1:].tolist()))
    assert math.isclose(sum(expected.values()), 1) and set(counts) <= set(expected)
    for state, p in expected.items():
        assert abs(counts[state] - rows * p) < 5 * math.sqrt(rows * p * (1 - p)) + 1, state
    without = law(policy, 3, 0.0)  # the test can tell: another cap is another law
    assert any(abs(without.get(s, 0) - p) * rows > 10 * math.sqrt(rows * p * (1 - p)) for s, p in expected.items())


class Scripted(TablePolicy):
    """Two words, three positions: alone, each proposes 0 with probability .6 (.55 in the middle); once the outer two
    are written, the middle is 1 with .9, and nothing else changes."""

    def __init__(self):
        super().__init__(length=3, words=2, seed=0)
        self.table = torch.full_like(self.table, -torch.inf)
        for first, middle, last in itertools.product(range(3), repeat=3):
            row = self.table[first + 3 * middle + 9 * last]
            seen = first != self.mask_id and last != self.mask_id
            for i, p in enumerate((0.6, 0.1 if seen else 0.55, 0.6)):
                row[i, 0], row[i, 1] = math.log(p), math.log(1 - p)


def test_editing_by_hand():
    """tau .5: the first step writes 0 0 0; the second sees them and proposes 1 in the middle with .9, above tau_edit;
    the third changes nothing, and the block ends. With tau_edit .95 the second changes nothing."""
    greedy = {"rank": rules.MaxProb(), "temperature": 0.0}
    for tau_edit, tokens, steps, forwards in ((0.5, [0, 1, 0], [0, 1, 0], 3), (0.95, [0, 0, 0], [0, 0, 0], 2)):
        policy = Scripted()
        rule = revise.Edit(tau=0.5, tau_edit=tau_edit)
        rollout = sample(policy, [[3]], [0], length=3, commit=rule, **greedy)
        assert rollout.tokens[0, 1:].tolist() == tokens and rollout.unmask_step[0, 1:].tolist() == steps
        assert rollout.forwards == forwards and rollout.events is not None
        wanted = torch.tensor([0.6, 0.9 if steps[1] else 0.55, 0.6]).log()
        torch.testing.assert_close(rollout.logprobs[0, 1:], wanted)


@pytest.mark.parametrize("rank", [rules.MaxProb(), rules.Confidence()])
def test_edits_depend_on_draws_only_where_tokens_are_drawn(rank):
    """At temperature 0 a state has one proposal: the events are all of the law, and replay gives the record."""
    options = {"rank": rank, "commit": revise.Edit(tau=0.5)}
    assert sample(Scripted(), [[3]], [0], length=3, **options).events.depends_on_tokens
    greedy = sample(Scripted(), [[3]], [0], length=3, temperature=0.0, **options)
    assert not greedy.events.depends_on_tokens and greedy.tokens[0, 1:].tolist() == [0, 1, 0]
    trajectory = estimators.Trajectory()
    noise = trajectory.draw_views(greedy, torch.Generator())
    assert torch.equal(trajectory.logprobs(Scripted(), greedy, noise), recorded(greedy, noise))


def test_a_rank_of_the_state_edits_too():
    """max_prob asks for no tokens, but a change is only seen once they are drawn: this cold, the likeliest."""
    options = {"rank": rules.MaxProb(), "commit": revise.Edit(tau=0.5), "temperature": 0.01}
    assert sample(Scripted(), [[3]], [0], length=3, **options).tokens[0, 1:].tolist() == [0, 1, 0]


def test_a_block_without_steps_left_is_not_edited():
    rollout = sample(Scripted(), [[3]], [0], length=3, diffusion_steps=1, rank=rules.MaxProb(), temperature=0.0,
                     commit=revise.Edit(tau=0.5))  # fmt: skip
    assert rollout.forwards == 1 and rollout.tokens[0, 1:].tolist() == [0, 0, 0]


@pytest.fixture(scope="module", params=few(["masked_lm", "llama"], ["llama"]))
def policy(request):
    characters = "0123456789 abcdefghijklmnop"
    sizes = SIZES | {"characters": characters, "num_layers": 2, "head_std": 0.5}
    return tiny_llama(causal=False, **sizes) if request.param == "llama" else tiny_masked_lm(**sizes)


IDS = [[3, 4, 5], [7], [8, 9, 10, 11, 12]]


@pytest.mark.parametrize("options", few([REMASK, EDIT, SOFT], [EDIT]), ids=["remask", "edit", "soft_edit"])
def test_a_row_depends_on_itself_alone_and_ends_whole(policy, options):
    together = sample(policy, IDS, [5, 6, 7], diffusion_steps=4, **options)
    assert together.completion_mask.sum(-1).tolist() == [6, 6, 6] and together.events is not None
    for row, (ids, seed) in enumerate(zip(IDS, [5, 6, 7], strict=True)):
        alone = sample(policy, [ids], [seed], diffusion_steps=4, **options)
        assert torch.equal(alone.tokens[0, -6:], together.tokens[row, -6:])
        assert torch.equal(alone.unmask_step[0, -6:], together.unmask_step[row, -6:])


def test_positions_are_masked_again_and_none_is_left(policy):
    masks, policy_mask = [], policy.spec.mask_id
    rollout = sample(policy, IDS * 4, range(12), length=12, diffusion_steps=6, block_size=6, **REMASK,
                     on_step=lambda r: masks.append(r.tokens[:, -12:] == policy_mask))  # fmt: skip
    states = torch.stack(masks)
    assert (~states[:-1] & states[1:]).any() and not states[-1].any() and rollout.forwards == 6
    assert not (~states[:-1] & states[1:])[2:, :, :6].any()  # a finished block is not opened again
    assert rollout.logprobs[:, -12:].lt(0).all() and (rollout.unmask_step[:, -12:] >= 0).all()


@pytest.mark.parametrize("options", few([REMASK, EDIT, SOFT], [REMASK]), ids=["remask", "edit", "soft_edit"])
def test_filters_caches_and_infilling(policy, options):
    if "llama" in type(policy.module).__name__.lower():
        cached = sample(policy, IDS, range(3), diffusion_steps=4, block_size=3, cache=DualCache(refresh=1), **options)
        exact = sample(policy, IDS, range(3), diffusion_steps=4, block_size=3, **options)
        assert torch.equal(cached.tokens[:, -6:], exact.tokens[:, -6:])
    filtered = sample(policy, IDS, range(3), diffusion_steps=4, top_k=3, **options)
    assert ((filtered.filter_support.ids[:, -6:] >= 0).sum(-1) == 3).all() and (
        filtered.filter_support.log_mass[:, -6:] < 0
    ).all()
    prompts = Prompts.from_ids([[3, 1, 4, 1, 1], [1, 5]], pad_id=0, seeds=[1, 2], mask_id=1)
    filled = Unmask(max_new_tokens=0, diffusion_steps=2, temperature=1.0, **options)(policy, prompts, torch.Generator())
    assert filled.completion_mask.sum(-1).tolist() == [3, 1] and not (filled.tokens[filled.completion_mask] == 1).any()


def test_a_rule_takes_written_or_changed_and_leaves_the_last_step_whole(policy):
    def both(scores, masked, steps_left, remaskable, replaceable):
        return masked

    def three(scores, masked, steps_left, remaskable, replaceable, redrawable):
        return masked

    def stubborn(scores, masked, steps_left, remaskable):
        return masked | remaskable

    refuses("commit=both takes remaskable and replaceable", lambda: sample(policy, IDS, range(3), commit=both))
    with pytest.raises(ValueError, match="commit=three takes remaskable and redrawable and replaceable"):
        sample(policy, IDS, range(3), commit=three)
    with pytest.raises(ValueError, match="commit=stubborn masked positions again in the last step"):
        sample(policy, IDS, range(3), diffusion_steps=2, commit=stubborn)
    for rule in (rules.Schedule(), rules.Threshold(tau=0.5)):
        assert rule.reads == frozenset()
    assert revise.Remask(eta=0.1).reads == {"remaskable", "steps"}
    assert revise.Edit(tau=0.5).reads == {"replaceable"}
    assert revise.SoftEdit(rate=0.1).reads == {"redrawable", "uniforms"}


def test_settings_out_of_range_are_named():
    refuses(r"eta=1.5 must lie in \[0, 1\]", lambda: revise.Remask(eta=1.5))
    refuses(r"tau_edit=-1.0 must lie in \[0, 1\]", lambda: revise.Edit(tau=0.5, tau_edit=-1.0))
    refuses(r"rate=1.5 must lie in \[0, 1\]", lambda: revise.SoftEdit(rate=1.5))
    refuses("eta", revise.Remask, TypeError)


def test_a_run_learns_from_it_by_an_estimate_that_does_not_replay(tmp_path):
    sampler = Unmask(max_new_tokens=16, diffusion_steps=3, temperature=1.0, **REMASK)
    recipe = tiny_recipe(tmp_path / "run", sampler=sampler, likelihood=estimators.Coupled(), num_steps=1,
                         train_batch_size=2, validation_task=Sudoku(split="validation", size=1),
                         eval_task=Sudoku(split="test", size=1))  # fmt: skip
    before = tiny_masked_lm(**SIZES, seed=recipe.seed).module
    summary = train(recipe)
    moved = zip(before.parameters(), summary.policy.module.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in moved)


def test_a_row_that_ends_early_ends_with_the_block_of_its_end_token(policy):
    eos, length = policy.spec.eos_ids[0], 18
    options = {"length": length, "diffusion_steps": 9, "block_size": 6, **REMASK}
    full = sample(policy, IDS * 4, range(12), **options)
    short = sample(policy, IDS * 4, range(12), approximate_early_exit=True, **options)
    stopped = 0
    for row in range(12):
        completion = full.tokens[row, -length:].tolist()
        kept = next((6 * b + 6 for b in range(3) if eos in completion[6 * b : 6 * b + 6]), length)
        stopped += kept < length
        assert short.tokens[row, -length:].tolist() == completion[:kept] + [policy.spec.mask_id] * (length - kept)
    assert stopped > 0


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_soft_edit_draws_every_written_position_again_at_rate_1(rate):
    """Three positions, five steps: at rate 0 the plan of `schedule`; at rate 1 all that can be."""
    policy, rule = TablePolicy(length=3, words=2, seed=3), revise.SoftEdit(rate=rate)
    options = {"length": 3, "diffusion_steps": 5, "rank": rules.RandomOrder(), "suppress": (3, 4)}
    rollout = sample(policy, [[3]] * 9, range(9), commit=rule, **options)
    assert rollout.forwards == 5 and ((rollout.events.token >= 0) == (rollout.events.step >= 0)).all()
    for row in rollout.events.step[:, 1:]:
        steps = sorted([s for s in place if s >= 0] for place in row.tolist())
        assert steps == ([[0], [1], [2]] if rate == 0 else [[0, 1, 2, 3, 4], [1, 2, 3, 4], [2, 3, 4]])


def test_remasking_reconsiders_a_block_in_every_step_of_its_share():
    """Two positions, eight steps: both are often written early, and each may be masked again until the last step."""
    policy = TablePolicy(length=2, words=2, seed=3)
    rule = revise.Remask(eta=0.3)
    for seed in range(8):
        rollout = sample(policy, [[3]], [seed], length=2, diffusion_steps=8, rank=rules.RandomOrder(), commit=rule)
        assert rollout.forwards == 8


SEEDS_NEAR_1 = [5404478, 5797592, 5190787]  # at one of 8 positions the uniform number of step 3 rounds to 1 in fp32


@pytest.mark.parametrize("seed", SEEDS_NEAR_1)
def test_the_last_step_masks_nothing_again_where_a_uniform_number_rounds_to_1(seed):
    policy = tiny_masked_lm(characters="abcdefgh=")
    options = {"rank": rules.RandomOrder(), "commit": revise.Remask(eta=0.1), "diffusion_steps": 4}
    assert sample(policy, [[5, 6]], [seed], length=8, **options).completion_mask.sum() == 8


@pytest.mark.parametrize("rank", [rules.RandomOrder(), rules.MaxProb()])
def test_the_uniform_numbers_of_a_rule_are_below_1(rank):
    seen = []

    def last(scores, masked, steps_left, uniforms):
        seen.append((uniforms, scores))
        return masked & (steps_left == 1)[:, None]

    policy = tiny_masked_lm(characters="abcdefgh=")
    sample(policy, [[5, 6]], SEEDS_NEAR_1[:1], length=8, diffusion_steps=4, rank=rank, commit=last)
    uniforms, scores = seen[-1]
    assert uniforms.max() == 1 - 2**-24 and torch.equal(uniforms, scores) == (rank == rules.RandomOrder())
