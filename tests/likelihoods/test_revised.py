"""The law of samplers that revise against the enumeration of every event sequence, and what carries their events."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
from likelihood_toys import TablePolicy
from repetitions import few, nightly, slow
from revise_toys import as_rollout, events_of, sequences
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe
from torch.nn.functional import pad

from dllm_rl import train
from dllm_rl.algorithms import correctors
from dllm_rl.algorithms.losses import K2, FixedLengthMean, PPOClip, policy_loss
from dllm_rl.config import from_command_line
from dllm_rl.decoding.support import with_support
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.base import encode_block_causal
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers import revise, rules
from dllm_rl.samplers.cache import BlockCache
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.update import forward_backward
from dllm_rl.tasks.sudoku import Sudoku
from dllm_rl.types.rollouts import Prompts, Rollout
from dllm_rl.types.scoring import Batch

pytestmark = pytest.mark.usefixtures("no_rehearsal")

REMASK = {"name": "remask", "eta": 0.6}
EDIT = {"name": "soft_edit", "rank": "RandomOrder", "rate": 0.3}
SURE = {"name": "soft_edit", "rank": "MaxProb", "rate": 0.4}
TOYS = [
    (REMASK, [[0, 1]], 3, {}),
    (REMASK | {"eta": 1.0}, [[0, 1]], 4, {"temperature": 0.7}),
    (REMASK, [[0, 1], [2]], 3, {}),
    (EDIT, [[0, 1]], 3, {}),
    (EDIT, [[0, 1, 2]], 2, {"temperature": 1.4, "top_k": 2}),
    (SURE, [[0, 1, 2]], 3, {}),
    (SURE, [[0, 1], [2]], 2, {"top_p": 0.8}),
]


@pytest.fixture
def fp64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def toy(blocks, *, seed=0):
    length = sum(map(len, blocks))
    return TablePolicy(length=length, words=2 if length == 2 else 3, seed=seed)


def bound(rule):
    """The sampler's keywords for a rule of the toys."""
    if rule["name"] == "remask":
        return {"rank": rules.RandomOrder(), "commit": revise.Remask(eta=rule["eta"])}
    return {"rank": getattr(rules, rule["rank"])(), "commit": revise.SoftEdit(rate=rule["rate"])}


def sampled(policy, rows, blocks, diffusion_steps, rule, **options):
    prompts = Prompts.from_ids([[policy.words + 1]], pad_id=policy.pad_id, num_generations=rows)
    suppress = (policy.words + 1, policy.words + 2)
    steps = diffusion_steps * len(blocks)
    sampler = Unmask(
        max_new_tokens=policy.length,
        suppress=suppress,
        diffusion_steps=steps,
        block_size=len(blocks[0]),
        **bound(rule),
        **{"temperature": 1.0} | options,
    )
    return sampler(policy, prompts, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("toy_of", TOYS, ids=str)
def test_the_law_is_the_enumeration_of_all_event_sequences(fp64, toy_of):
    rule, blocks, diffusion_steps, options = toy_of
    policy, estimator = toy(blocks), lik.Trajectory()
    found = sequences(policy, blocks, diffusion_steps, rule, **options)
    rollout = as_rollout(policy, found, **options)
    known, drawn = torch.tensor(list(found.values())).T
    torch.testing.assert_close((known * drawn).sum(), torch.tensor(1.0), rtol=0, atol=1e-10)
    contributions = estimator.logprobs(policy, rollout, estimator.draw_views(rollout, torch.Generator()))
    torch.testing.assert_close(contributions.sum(-1), drawn.log(), rtol=0, atol=1e-10)
    assert (rollout.events.token == -1).any() and rollout.events.step.shape[-1] > 1


@pytest.mark.parametrize("toy_of", few(TOYS, TOYS[::3]), ids=str)
@pytest.mark.repeated(first_only=True)
def test_the_sampler_takes_each_sequence_as_often_as_the_law_says(toy_of):
    """Pearson's chi-square over the sequences that are expected five times or more, the others as one."""
    rule, blocks, diffusion_steps, options = toy_of
    policy, rows = toy(blocks), 6_000
    found = sequences(policy, blocks, diffusion_steps, rule, **options)
    rollout = sampled(policy, rows, blocks, diffusion_steps, rule, **options)
    counts = Counter(events_of(rollout))
    assert set(counts) <= set(found) and rollout.events and not rollout.events.depends_on_tokens
    expected = {key: rows * known * drawn for key, (known, drawn) in found.items()}
    cells = [(counts[key], e) for key, e in expected.items() if e >= 5]
    cells.append((rows - sum(o for o, _ in cells), rows - sum(e for _, e in cells)))
    statistic, degrees = sum((o - e) ** 2 / e for o, e in cells if e > 1e-9), len(cells) - 1
    assert degrees > 20 and abs(math.sqrt(2 * statistic) - math.sqrt(2 * degrees - 1)) < 3  # Fisher's normal
    estimator = lik.Trajectory()  # the record is the law's, bit for bit
    noise = estimator.draw_views(rollout, torch.Generator())
    assert torch.equal(estimator.logprobs(policy, rollout, noise), recorded(rollout, noise))


@pytest.mark.parametrize("toy_of", [TOYS[0], (REMASK, [[0], [1]], 3, {}), TOYS[3], TOYS[6]], ids=str)
@pytest.mark.repeated
def test_the_gradient_through_the_learner_is_that_of_the_expected_reward(fp64, toy_of):
    """sum over all sequences of P A grad log P, as `forward_backward` makes it, is grad E[A] by enumeration to
    1e-10 of its norm, and the finite difference; the last writings' alone is another vector."""
    rule, blocks, diffusion_steps, options = toy_of
    policy = toy(blocks, seed=1)
    found = sequences(policy, blocks, diffusion_steps, rule, **options)
    chances = torch.tensor([known * drawn for known, drawn in found.values()])
    rewards = torch.randn(len(found), generator=torch.Generator().manual_seed(0))
    direction = torch.randn(policy.table.shape, generator=torch.Generator().manual_seed(1))

    def expectation(table):
        moved = toy(blocks, seed=1)
        moved.table = table
        again = sequences(moved, blocks, diffusion_steps, rule, **options)
        return sum(known * drawn * r for (known, drawn), r in zip(again.values(), rewards.tolist(), strict=True))

    def through_the_learner(rollout):
        estimator = lik.Trajectory()
        policy.table.grad = None
        policy.table.requires_grad_()
        noise = estimator.draw_views(rollout, torch.Generator())
        scores = estimator.view_logprobs(policy, rollout, noise)
        old, mask = estimator.combine(scores, noise), rollout.completion_mask
        weights = chances[:, None].expand(mask.shape)
        batch = Batch(rollout, noise, rewards, old, scores, weights, mask, None, num_tokens=1, num_sequences=1)
        surrogate, aggregate = PPOClip(epsilon=0.2), FixedLengthMean(length=1)
        loss = partial(policy_loss, surrogate=surrogate, loss_reduction=aggregate, beta=0.0, kl=K2())
        forward_backward(policy, batch, scores, loss=loss, likelihood=estimator, micro_batch_size=64)
        return -policy.table.grad

    rollout = as_rollout(policy, found, **options)
    exact = through_the_learner(rollout)
    expected = policy.table.detach().requires_grad_()
    policy.table = expected
    sums = sequences(policy, blocks, diffusion_steps, rule, differentiable=True, **options)
    total = sum(known * drawn * r for (known, drawn), r in zip(sums.values(), rewards.tolist(), strict=True))
    (expected,) = torch.autograd.grad(total, expected)
    assert (exact - expected).norm() <= 1e-10 * expected.norm()
    table, small = policy.table.detach(), 1e-5
    slope = (expectation(table + small * direction) - expectation(table - small * direction)) / (2 * small)
    assert float((exact * direction).sum()) == pytest.approx(slope, rel=1e-6, abs=1e-9)
    last = through_the_learner(replace(rollout, events=None))
    assert (last - expected).norm() > 0.05 * expected.norm()


CHARACTERS = "0123456789 abcdefghijklmnop"
SIZES = {"characters": CHARACTERS, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 64, "head_std": 0.5}
IDS = [[3, 4, 5], [7], [8, 9, 10, 11, 12]]
RULES = [
    {"rank": rules.RandomOrder(), "commit": revise.Remask(eta=0.5)},
    {"rank": rules.RandomOrder(), "commit": revise.SoftEdit(rate=0.3)},
    {"rank": rules.MaxProb(), "commit": revise.SoftEdit(rate=0.3)},
]


def block_causal():
    policy = tiny_llama(causal=False, **SIZES)
    spec = replace(policy.spec, attention="block_causal", block_size=4)
    policy.spec = replace(spec, encode=partial(encode_block_causal, spec=spec))
    return policy


def rolled(policy, *, group=2, length=8, **options):
    seeds = list(range(len(IDS) * group))
    prompts = Prompts.from_ids(IDS, pad_id=policy.pad_id, num_generations=group, seeds=seeds)
    options = {"diffusion_steps": 6, "temperature": 1.0} | options
    return Unmask(max_new_tokens=length, **options)(policy, prompts, torch.Generator())


OTHERS = [({"block_size": 4}, RULES[0]), ({"top_k": 5, "temperature": 0.7}, RULES[2])]


@pytest.mark.parametrize(
    ("options", "rule"), [*(({}, rule) for rule in RULES), *OTHERS],
    ids=["remask", "soft_edit", "soft_edit, max_prob", "remask, blocks", "soft_edit, max_prob, top_k"],
)  # fmt: skip
@pytest.mark.repeated(first_only=True)
def test_recorded_logprobs_are_the_replayed_ones(rule, options):
    assert_replayed(rule, options, atol=1e-5)


@pytest.mark.repeated(first_only=True)
@pytest.mark.parametrize("rule", RULES[::2], ids=["remask", "soft_edit, max_prob"])
@pytest.mark.usefixtures("exact_arithmetic")
def test_recorded_logprobs_are_the_replayed_ones_bit_for_bit(rule):
    assert_replayed(rule, {}, atol=0)


def assert_replayed(rule, options, *, atol):
    for policy in (tiny_masked_lm(**SIZES), tiny_llama(causal=False, **SIZES)):
        settings = {"group": 1} | rule | options
        rollout, estimator = rolled(policy, **settings), lik.Trajectory()
        noise = estimator.draw_views(rollout, torch.Generator())
        contributions = estimator.logprobs(policy, rollout, noise)
        torch.testing.assert_close(contributions, recorded(rollout, noise), rtol=0, atol=atol)
        assert not torch.equal(contributions, rollout.logprobs)  # of the last writings
        last = rollout.events.step.argmax(-1, keepdim=True)
        chosen = rollout.completion_mask
        for event, column in zip(
            ("step", "token", "logprobs"), (rollout.unmask_step, rollout.tokens, rollout.logprobs), strict=True
        ):
            assert torch.equal(
                getattr(rollout.events, event).gather(-1, last)[..., 0][chosen].to(column), column[chosen]
            )


@pytest.mark.parametrize(
    ("rule", "cache"), [*((rule, None) for rule in RULES), (RULES[0], BlockCache())],
    ids=["remask", "soft_edit", "soft_edit, max_prob", "remask, cache"],
)  # fmt: skip
@pytest.mark.repeated(first_only=True)
def test_blocks_at_once_score_what_steps_one_by_one_do(rule, cache):
    """Also where a view edits a block without masks."""
    policy = block_causal()
    rollout = rolled(policy, group=1, diffusion_steps=6, length=8, cache=cache, **rule)
    vector = torch.randn(rollout.tokens.shape, generator=torch.Generator().manual_seed(2)) * rollout.completion_mask
    found = []
    for estimator in (lik.Trajectory(), lik.Trajectory(block_size=4)):
        noise = estimator.draw_views(rollout, torch.Generator())
        logps = estimator.logprobs(policy, rollout, noise)
        torch.testing.assert_close(logps, recorded(rollout, noise), atol=5e-6, rtol=1e-5)
        policy.module.zero_grad()
        for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
            view.backward(policy, rollout, vector * weight)
        by_hand = torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.grad is not None])
        logps = sum(view.logprobs(policy, rollout) for view in each_view(noise))
        used = [p for p in policy.module.parameters() if p.grad is not None]
        autograd = torch.cat([g.flatten() for g in torch.autograd.grad((logps * vector).sum(), used)])
        assert (by_hand - autograd).norm() < 1e-5 * autograd.norm()
        found.append((len(noise.masked), by_hand))
    assert found[1][0] < found[0][0]
    assert (found[1][1] - found[0][1]).norm() < 1e-5 * found[0][1].norm()


@pytest.mark.usefixtures("exact_arithmetic")
def test_open_positions_inside_a_prompt_are_revised_too():
    policy = tiny_masked_lm(**SIZES)
    prompts = Prompts.from_ids([[3, 1, 4, 1, 1], [1, 5]], pad_id=0, num_generations=2, seeds=range(4), mask_id=1)
    options = {"diffusion_steps": 3, "temperature": 1.0, "max_new_tokens": 2}
    for rule in RULES:
        rollout, estimator = Unmask(**options, **rule)(policy, prompts, torch.Generator()), lik.Trajectory()
        noise = estimator.draw_views(rollout, torch.Generator())
        assert torch.equal(estimator.logprobs(policy, rollout, noise), recorded(rollout, noise))
        assert torch.equal((rollout.events.step >= 0).any(-1), rollout.completion_mask)


@pytest.mark.slow
def test_events_are_carried_with_the_record():
    policy = tiny_masked_lm(**SIZES)
    estimator = lik.Trajectory()
    few, many = (rolled(policy, diffusion_steps=steps, **RULES[0]) for steps in (3, 6))
    assert few.events.step.shape[-1] < many.events.step.shape[-1] and few.events.step.dtype == torch.int32

    def scored(rollout):
        noise = estimator.draw_views(rollout, torch.Generator())
        ours = estimator.logprobs(policy, rollout, noise, micro_batch_size=2)
        torch.testing.assert_close(ours, recorded(rollout, noise), atol=1e-5, rtol=0)
        return ours

    wide = few.padded(3, pad_id=policy.pad_id)
    of_few, of_many, of_wide = map(scored, (few, many, wide))
    torch.testing.assert_close(of_wide[:, 3:], of_few, atol=1e-5, rtol=0)
    taken = torch.tensor([4, 5, 0, 1])
    torch.testing.assert_close(scored(many.rows(taken)), of_many[taken], atol=1e-5, rtol=0)
    for first, second, ours, theirs in ((few, many, of_few, of_many), (many, wide, of_many, of_wide)):
        both = Rollout.concatenate([first, second], pad_id=policy.pad_id)
        assert both.events.step.shape[-1] == many.events.step.shape[-1]
        width = both.tokens.shape[1]  # narrower parts are padded on the right
        parts = torch.cat([pad(x, (0, width - x.shape[1])) for x in (ours, theirs)])
        torch.testing.assert_close(scored(both), parts, atol=1e-5, rtol=0)
        rows = torch.tensor([2, 3, 0, 1, 4, 5])
        swapped = first.replace_rows(rows[:4], second.rows(torch.arange(4)), pad_id=policy.pad_id)
        width = swapped.tokens.shape[1]  # the narrower one is padded on the left
        wider = [pad(x, (width - x.shape[1], 0)) for x in (ours, theirs)]
        torch.testing.assert_close(scored(swapped), wider[0].index_copy(0, rows[:4], wider[1][:4]), atol=1e-5, rtol=0)


def test_what_has_no_law_is_refused_before_any_forward():
    policy = tiny_masked_lm(**SIZES)
    hard = {"rank": rules.MaxProb(), "commit": revise.Edit(tau=0.5, tau_edit=0.0)}
    ranked = {"rank": rules.Confidence(), "commit": revise.SoftEdit(rate=0.3)}
    few = {"group": 1, "length": 4, "diffusion_steps": 2}
    for options in (hard, ranked):
        rollout = rolled(policy, **few, **options)
        assert rollout.events.depends_on_tokens
        for estimator in (lik.Trajectory(), lik.Trajectory(variance_growth=0.5)):
            with pytest.raises(ValueError, match=r"Trajectory.*\(Edit, Confidence\).*SoftEdit.*OneStep"):
                estimator.draw_views(rollout, torch.Generator())
        assert lik.Coupled().draw_views(rollout, torch.Generator()).masked.any()
    with pytest.raises(ValueError, match="num_segments=2 merges steps"):
        lik.Trajectory(num_segments=2).draw_views(rolled(policy, **few, **RULES[0]), torch.Generator())
    with pytest.raises(ValueError, match=r"sampling_support='rollout'.*position's last write"):
        filtered = with_support(rolled(policy, top_k=3, **few, **RULES[0]), "rollout")
        lik.Trajectory().draw_views(filtered, torch.Generator())


def run(directory, words, **changes):
    """The metrics of each step of a run from the command line."""
    changes |= {"train_batch_size": 2, "eval_task": Sudoku(split="test", size=1)}
    changes["validation_task"] = Sudoku(split="validation", size=1)
    recipe = from_command_line(tiny_recipe(directory, learning_rate=1e-3, **changes), words)
    train(recipe)
    return metrics_of(directory)


WORDS = {
    "remask": ["--sampler.commit", "Remask", "--sampler.commit.eta", "0.5", "--sampler.rank", "RandomOrder"],
    "soft_edit": ["--sampler.commit", "SoftEdit", "--sampler.commit.rate", "0.3", "--sampler.rank", "MaxProb"],
}


@pytest.mark.parametrize("name", few(WORDS, ["remask"]))
def test_an_unquantized_run_has_exactly_no_mismatch(tmp_path, name):
    exact = {"zero_mismatch": True, "rollout_quantization": None, "corrector": correctors.NoCorrection()}
    rows = run(tmp_path / "run", WORDS[name], **exact, likelihood=lik.Trajectory(), num_steps=2)
    assert [row["rollout_corr/abs_log_ratio_max"] for row in rows] == [0.0, 0.0] and rows[0]["grad_norm"] > 0


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.repeated(first_only=True)
def test_the_sum_of_a_positions_writes_is_no_tokens_log_prob(tmp_path, name):
    """Of an untrained model no token is below 1e-4, and the sum of six writes may be."""
    settings = {"likelihood": lik.Trajectory(include_order=False), "num_steps": 1}
    (row,) = run(tmp_path / "run", WORDS[name], **settings)
    assert "symptoms/repetition_positive" in row and "symptoms/error_tokens_positive" not in row


CORRECTORS = ["TIS", "MIS", "IcePop", "Reject", "AIS"]


@pytest.mark.parametrize(
    ("corrector", "name"),
    [slow("AIS", "remask"), slow("TBPO", "soft_edit"), *(nightly(c, "soft_edit") for c in CORRECTORS)],
)
def test_correctors_run_on_a_rollout_that_revises(tmp_path, name, corrector):
    changes = {"corrector": getattr(correctors, corrector)(), "likelihood": lik.Trajectory()}
    rows = run(tmp_path / "run", WORDS[name], **changes, num_iterations=2, micro_batch_size=4, num_steps=1)
    assert 0 < rows[0]["rollout_corr/abs_log_ratio_mean"] < 0.5 and 0 < rows[0]["grad_norm/iteration_0"] < math.inf
    assert 0.5 < rows[0]["rollout_corr/rollout_is_eff_sample_size"] <= 1
