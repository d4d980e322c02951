"""Which denoising steps are drawn, with which chances, and what the drawn ones are scored as."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from likelihood_toys import TablePolicy
from refusals import refuses
from run_outputs import metrics_of
from tiny_recipe import SIZES, tiny_recipe

from dllm_rl import (
    AIS,
    GSPO,
    MIS,
    TBPO,
    TIS,
    VESPO,
    Compose,
    Confidence,
    GroupRelative,
    IcePop,
    MaxProb,
    NoCorrection,
    PPOClip,
    Prompts,
    QaRL,
    RandomOrder,
    Reject,
    Trajectory,
    Unmask,
    train,
)
from dllm_rl.algorithms.losses import CISPO, OffPolicyMask, TrustBand
from dllm_rl.likelihoods.drawn_steps import UNIFORM_SHARE, draw_steps, growth_threshold
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.views import num_row_forwards
from dllm_rl.models.base import encode_block_causal
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.rng import generator_for
from dllm_rl.samplers.revise import Remask
from dllm_rl.samplers.rules import PlackettLuce, SoftThreshold
from dllm_rl.step.collect import with_support
from recipes.examples.turns import TwoTurns

EXACT = Trajectory()


def rolled(*, group=4, prompts=([3, 4, 5], [6, 7, 8, 3, 4], [5]), seed=0, scale=1.0, **options):
    policy = tiny_masked_lm(**SIZES)
    given = Prompts.from_ids(prompts, pad_id=policy.pad_id, num_generations=group)
    settings = {"max_new_tokens": 8, "diffusion_steps": 4, "temperature": 1.0, "rank": RandomOrder()} | options
    return policy, Unmask(**settings)(policy, given, torch.Generator().manual_seed(seed))


def drawn(rollout, advantages=None, *, growth=0.5, seed=0, likelihood=EXACT, **options):
    views = likelihood.draw_views(rollout, torch.Generator())
    advantages = torch.linspace(-1, 2, len(rollout.tokens)) if advantages is None else advantages
    return draw_steps(views, rollout, advantages, generator_for(seed), variance_growth=growth, **options)


def test_the_threshold_adds_the_variance_that_is_allowed():
    """Sizes 4, 2, 1, 1 (squares: 22). With threshold t between 1 and 2 the last two have chance 1 / t each, so that
    2 (t - 1) is added; with t between 2 and 4 the second adds 4 (t / 2 - 1), too."""
    sizes = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0]], dtype=torch.float64)
    assert growth_threshold(sizes, 1 / 22) == pytest.approx(1.5)
    assert growth_threshold(sizes, 8 / 22) == pytest.approx(3.5)  # 2 * 2.5 + 4 * 0.75
    least = (1 / UNIFORM_SHARE - 1) * 22
    assert growth_threshold(sizes, 2 * least) == pytest.approx(4 / UNIFORM_SHARE)  # every chance is the smallest
    assert growth_threshold(torch.zeros(2, 3), 0.1) == math.inf
    split = torch.cat([sizes.flip(0), torch.zeros(2, 2)], dim=1)
    assert growth_threshold(split, 0.1) == growth_threshold(sizes, 0.1)  # whichever process has a row


def test_the_chance_is_of_the_recorded_doubt_and_the_advantage():
    """A row alone, two tokens in the first step and one in each other: q = |A| (sum of (1 - p)^2 + 0.03^2)^(1/2)."""
    toy = TablePolicy(length=4, words=2, seed=0)
    steps = torch.tensor([[-1, 0, 0, 1, 2]])
    p = torch.tensor([[1.0, 0.5, 0.2, 0.8, 0.999]])
    rollout = toy.rollout([[0, 1, 1, 0]], unmask_step=steps, logprobs=p.log())
    q = [2 * math.hypot(0.5, 0.8, 0.03, 0.03), 2 * math.hypot(0.2, 0.03), 2 * math.hypot(0.001, 0.03)]
    total = sum(x * x for x in q)
    threshold = growth_threshold(torch.tensor([q], dtype=torch.float64), 0.12)
    chances = [min(1.0, max(UNIFORM_SHARE, x / threshold)) for x in q]
    assert chances[0] == 1 > chances[1] > chances[2] == UNIFORM_SHARE
    assert sum((1 / c - 1) * x * x for c, x in zip(chances, q, strict=True)) == pytest.approx(0.12 * total, rel=1e-6)
    expected = [0, *(1 / chances[step] for step in (0, 0, 1, 2))]
    found = torch.zeros(5)
    for seed in range(200):
        weights = drawn(rollout, torch.tensor([-2.0]), growth=0.12, seed=seed).inverse_chances[0, 0]
        for weight, whole in zip(weights.tolist(), expected, strict=True):
            assert weight == 0 or weight == pytest.approx(whole, rel=1e-4)
        found += weights > 0
    for count, whole in zip(found.tolist(), expected, strict=True):
        chance = 1 / whole if whole else 0.0
        assert abs(count / 200 - chance) <= 4 * math.sqrt(chance * (1 - chance) / 200)


def test_drawn_tokens_have_their_exact_log_probs_and_others_none():
    policy, rollout = rolled()
    exact = EXACT.logprobs(policy, rollout, EXACT.draw_views(rollout, torch.Generator()))
    views = drawn(rollout)
    is_drawn = views.inverse_chances[0] > 0
    assert is_drawn.any() and (~is_drawn & rollout.completion_mask).any()
    assert torch.equal(views.scored(rollout.completion_mask), is_drawn)
    assert torch.equal(recorded(rollout, views), rollout.logprobs * is_drawn)
    for size in (None, 1, 3, 64):
        found = EXACT.logprobs(policy, rollout, views, micro_batch_size=size)
        torch.testing.assert_close(found, exact * is_drawn, rtol=0, atol=1e-5)
    for step in rollout.unmask_step.unique()[1:]:  # a step is drawn with all of its tokens
        of_step = rollout.unmask_step == step
        counts = (is_drawn & of_step).sum(-1)
        assert ((counts == 0) | (counts == of_step.sum(-1))).all()


def block_causal():
    """Blocks of four, scored a step of every block at once."""
    policy = tiny_llama(causal=False, characters="1234.=", hidden_size=32, num_layers=2)
    spec = replace(policy.spec, attention="block_causal", block_size=4)
    policy.spec = replace(spec, encode=partial(encode_block_causal, spec=spec))
    prompts = Prompts.from_ids([[3, 4, 5, 6]] * 2, pad_id=policy.pad_id, num_generations=3)
    settings = {"max_new_tokens": 8, "diffusion_steps": 4, "block_size": 4, "rank": RandomOrder()}
    return policy, Unmask(temperature=1.0, **settings)(policy, prompts, torch.Generator().manual_seed(0))


def two_turns():
    policy, _ = rolled()
    prompts = Prompts.from_ids([[3, 4, 5], [6]], pad_id=policy.pad_id, num_generations=3)
    turn = Unmask(max_new_tokens=4, diffusion_steps=2, temperature=1.0, rank=RandomOrder())
    sampler = TwoTurns(max_new_tokens=10, turn=turn, tool=lambda text: "12", tool_length=2)
    return policy, sampler(policy, prompts, torch.Generator().manual_seed(0))


def filtered():
    policy, rollout = rolled(top_p=0.6)
    return policy, with_support(rollout, "rollout")


ROLLOUTS = {
    "random order": (rolled, EXACT),
    "blocks": (partial(rolled, block_size=4), EXACT),
    "top_p": (filtered, EXACT),
    "plackett_luce": (partial(rolled, rank=PlackettLuce(temperature=0.3)), EXACT),
    "soft_threshold": (partial(rolled, rank=MaxProb(), commit=SoftThreshold(tau=0.3)), EXACT),
    "block_causal": (block_causal, Trajectory(block_size=4)),
    "turns": (two_turns, EXACT),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_drawn_steps_have_the_log_probs_and_gradients_of_their_views(name):
    """Whatever the sampler, in forwards of any size: those of a replay of every step, restricted to the drawn ones."""
    made, likelihood = ROLLOUTS[name]
    policy, rollout = made()
    every, views = likelihood.draw_views(rollout, torch.Generator()), drawn(rollout, likelihood=likelihood, growth=2.0)
    scores = likelihood.view_logprobs(policy, rollout, every)
    is_drawn = views.inverse_chances[0] > 0
    assert is_drawn.any() and (~is_drawn & rollout.completion_mask).any()
    exact = likelihood.combine(scores, every)
    torch.testing.assert_close(recorded(rollout, views), exact * is_drawn, rtol=0, atol=1e-4)
    vectors = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0)) * is_drawn
    given = [(every, None, vectors), *((views, size, vectors * (views.coefficients != 0)) for size in (None, 1, 3))]
    found = []
    for each, size, vector in given:
        if each is views:
            logprobs = likelihood.logprobs(policy, rollout, views, micro_batch_size=size)
            torch.testing.assert_close(logprobs, exact * is_drawn, rtol=0, atol=1e-5)
        policy.module.zero_grad()
        likelihood.backward(policy, rollout, each, vector * (each.coefficients != 0), micro_batch_size=size)
        found.append(torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.grad is not None]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)
    assert found[0].abs().max() > 1e-3


class Counted:
    """The number of rows of each forward."""

    def __init__(self, policy, monkeypatch):
        self.rows = []
        hidden = policy.hidden

        def counted(tokens, *others):
            self.rows.append(len(tokens))
            return hidden(tokens, *others)

        monkeypatch.setattr(policy, "hidden", counted)


def test_forwards_are_filled_with_the_drawn_steps_of_any_rows(monkeypatch):
    """The first step of a prompt's completions is one row; the forwards are full, but for the last one of a length."""
    policy, rollout = rolled(prompts=([3, 4, 5], [6, 7, 8]), group=6)
    counted = Counted(policy, monkeypatch)
    views = drawn(rollout, growth=0.3)
    EXACT.logprobs(policy, rollout, views, micro_batch_size=4)
    is_drawn = (views.coefficients != 0).any(-1)  # (N, B)
    first = {int(group) for group in rollout.group[is_drawn[0]]}
    expected = len(first) + int(is_drawn[1:].sum())
    assert 4 < expected < 2 + is_drawn[1:].numel()
    assert num_row_forwards(rollout, views) == sum(counted.rows) == expected
    assert counted.rows == [4] * (expected // 4) + [expected % 4] * (expected % 4 > 0)


def test_a_forward_has_no_more_rows_than_the_batch(monkeypatch):
    """Without a micro-batch size, which the memory of a replay of all steps allows, too."""
    policy, rollout = rolled(group=2)
    counted = Counted(policy, monkeypatch)
    views = drawn(rollout, growth=1e-6)  # nearly every step
    EXACT.logprobs(policy, rollout, views)
    assert max(counted.rows) <= len(rollout.tokens) < sum(counted.rows)


def test_the_completions_of_a_prompt_are_drawn_together_where_the_model_reads_them_alike():
    _, rollout = rolled(group=8)
    for seed in range(20):
        views = drawn(rollout, torch.full((24,), 1e-3), growth=1e9, seed=seed)  # every chance is the smallest
        first = (views.coefficients[0] != 0).any(-1).view(3, 8)
        assert (first == first[:, :1]).all()


def test_a_draw_is_the_same_for_every_number_of_processes():
    """Rows of two prompts in one process, of one in the other: what each gathers are the rows of both."""
    _, rollout = rolled(scale=2.0)
    advantages = torch.linspace(-1, 2, 12)
    whole = drawn(rollout, advantages)
    sizes = []
    drawn(rollout, advantages, gather=lambda local: sizes.append(local) or local)
    for rows in (torch.arange(8), torch.arange(8, 12)):
        part = replace(rollout.rows(rows), batch_row=rows)
        others = sizes[0][[row for row in range(12) if row not in rows]]
        found = drawn(part, advantages[rows], gather=lambda local, others=others: torch.cat([others, local]))
        assert torch.equal(found.coefficients, whole.coefficients[:, rows])
        assert torch.equal(found.inverse_chances, whole.inverse_chances[:, rows])
    alone = drawn(replace(rollout.rows(rows), batch_row=rows), advantages[rows])
    assert not torch.equal(alone.inverse_chances, whole.inverse_chances[:, rows])  # the threshold is of all rows


def test_a_block_causal_models_steps_are_drawn_for_all_blocks_at_once():
    """One forward scores step j of every block (`block_size`)."""
    _, rollout = block_causal()
    packed = Trajectory(block_size=4)
    every = packed.draw_views(rollout, torch.Generator())
    views = drawn(rollout, likelihood=packed, growth=1.0)
    is_drawn = views.inverse_chances[0] > 0
    assert len(every.masked) == 2 and is_drawn.any() and (~is_drawn & rollout.completion_mask).any()
    scored = every.coefficients.argmax(0)
    for row, column in rollout.completion_mask.nonzero().tolist():
        same = (scored[row] == scored[row, column]) & rollout.completion_mask[row]
        assert (is_drawn[row][same] == is_drawn[row, column]).all()


def test_what_cannot_be_drawn_step_by_step_is_refused():
    _, ranked = rolled(rank=Confidence())
    refuses(r"variance_growth=0.5 .* include_order=False, or .*variance_growth=None", lambda: drawn(ranked))
    assert (drawn(ranked, likelihood=Trajectory(include_order=False)).inverse_chances > 0).any()
    _, rewritten = rolled(commit=Remask(eta=0.5))
    refuses(r"variance_growth=0.5 .* writes a position in several steps", lambda: drawn(rewritten))
    with pytest.raises(ValueError, match=r"variance_growth=0.1 draws denoising steps, which num_segments=2 merges"):
        Trajectory(variance_growth=0.1, num_segments=2)
    refuses(r"variance_growth=0 must be above 0", lambda: Trajectory(variance_growth=0))


DRAWN = Trajectory(variance_growth=0.1)


def divided(weights):
    """A corrector's weights with mean 1 over the batch, of which nobody knows the tokens that are not drawn."""
    return weights._replace(importance_weights=weights.importance_weights / weights.importance_weights.mean())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"corrector": AIS()}, r"corrector=AIS.* needs all tokens of a row"),
        ({"corrector": TIS(level="sequence")}, r"corrector=TIS"),
        ({"corrector": MIS(outside="drop")}, r"corrector=MIS"),
        ({"corrector": Compose(parts=(TIS(), Reject(level="token")))}, r"corrector=Compose"),
        ({"corrector": lambda stats: IcePop(level="sequence").weights(stats)}, r"corrector="),
        ({"loss": VESPO()}, r"loss=VESPO.* needs all tokens of a row"),
        ({"loss": OffPolicyMask(loss=VESPO())}, r"loss=OffPolicyMask"),
        ({"loss": lambda log_ratio, advantages, mask: log_ratio.sum(-1, keepdim=True) + log_ratio}, r"loss="),
        ({"corrector": lambda stats: divided(TIS().weights(stats))}, r"corrector="),
        ({"loss": lambda log_ratio, advantages, mask: (log_ratio - log_ratio.mean()) * advantages[:, None]}, r"loss="),
    ],
)
def test_what_needs_all_tokens_of_a_row_is_refused(changes, told, tmp_path):
    settings = {"corrector": NoCorrection(), "likelihood": DRAWN} | changes
    refuses(rf"variance_growth=0.1 scores some of a row's steps, and {told}", lambda: tiny_recipe(tmp_path, **settings))
    tiny_recipe(tmp_path, **settings | {"likelihood": Trajectory(include_order=False)})


@pytest.mark.parametrize(
    "changes",
    [
        {"corrector": TIS()},
        {"corrector": TIS(level="sequence", pool="geometric")},
        {"corrector": AIS(pool="geometric")},
        {"corrector": TBPO()},
        {"corrector": QaRL()},
        {"corrector": Compose(parts=(TIS(), MIS()))},
        {"corrector": lambda stats: IcePop().weights(stats)},
        *(
            {"loss": loss}
            for loss in (PPOClip(delta=3.0), CISPO(), GSPO(), TrustBand(), OffPolicyMask(), OffPolicyMask(loss=GSPO()))
        ),
        {"loss": lambda log_ratio, advantages, mask: log_ratio * advantages[:, None]},
    ],
)
def test_what_treats_tokens_alone_or_weights_them_is_taken(changes, tmp_path):
    tiny_recipe(tmp_path, **{"corrector": NoCorrection(), "likelihood": DRAWN} | changes)


def test_a_run_draws_anew_for_each_update_and_the_same_after_a_resume(tmp_path):
    settings = {
        "likelihood": Trajectory(variance_growth=0.5, include_order=False), "corrector": TIS(), "num_iterations": 2,
        "lr_schedule_steps": 3, "advantages": GroupRelative(), "save_steps": 1,
    }  # fmt: skip
    train(tiny_recipe(tmp_path / "whole", num_steps=3, **settings))
    train(tiny_recipe(tmp_path / "parts", num_steps=2, **settings))
    train(tiny_recipe(tmp_path / "parts", num_steps=3, resume_from_checkpoint="latest", **settings))
    whole, parts = (metrics_of(tmp_path / name) for name in ("whole", "parts"))
    for name in ("drawn_steps/row_forwards", "grad_norm/iteration_0", "grad_norm/iteration_1", "rollout_corr/kl"):
        assert whole[2][name] == parts[2][name], name
    assert 0 < whole[0]["drawn_steps/row_forwards"] < 3
    assert "rollout_corr/chi2_seq" not in whole[0] and "rollout_corr/kl" in whole[0]
