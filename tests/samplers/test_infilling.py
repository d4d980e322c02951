"""Prompts with open positions: what is filled in, that it is the sampler that it was, and where it does not apply."""

from dataclasses import replace

import pytest
import torch
from order_toys import stayed_of
from refusals import refuses
from repetitions import few
from rollouts import fields_of

from dllm_rl.decoding.support import with_support
from dllm_rl.likelihoods import estimators
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.masks import block_index
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.samplers import rules
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.cache import PrefixCache
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import Prompts
from tests.support.likelihood_toys import TablePolicy, elbo_by_hand

CHARACTERS = "0123456789 abcdefghijklmnop"
M = 1  # the mask token of the tiny models
IDS = [[3, M, 4, M, M, 5], [M, 7], [8, 9, M, M, 10, 11, M, M, 12, M, 13, M], [15, M, 16, M], [4, M, M, M, 5, 6, M]]
WAYS = {
    "confidence": {"rank": rules.Confidence()},
    "entropy": {"rank": rules.Entropy(), "block_size": 2},
    "random": {"rank": rules.RandomOrder(), "diffusion_steps": 3, "top_k": 5},
    "plackett_luce": {
        "rank": rules.PlackettLuce(temperature=0.3, base_rank=rules.Entropy()),
        "diffusion_steps": 3,
    },
    "soft_threshold": {"rank": rules.MaxProb(), "commit": rules.SoftThreshold(tau=0.2)},
    "threshold": {"rank": rules.MaxProb(), "commit": rules.Threshold(tau=0.2)},
    "greedy": {"temperature": 0.0},
}


@pytest.fixture(scope="module", params=few(["masked_lm", "llama", "shifted"], ["shifted"]))
def policy(request):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "head_std": 0.5}
    if request.param != "masked_lm":
        made = tiny_llama(characters=CHARACTERS, causal=False, **sizes)
        made.spec = replace(made.spec, shift=request.param == "shifted")
        return made
    return tiny_masked_lm(characters=CHARACTERS, **sizes)


def fill(policy, ids, seeds, *, new=0, width=0, group=1, on_step=None, **options):
    prompts = Prompts.from_ids(ids, pad_id=0, num_generations=group, seeds=list(seeds), mask_id=M)
    if width:
        columns = {name: getattr(prompts, name) for name in ("tokens", "attention_mask", "infill_mask")}
        pad = lambda x: torch.nn.functional.pad(x, (width - x.shape[1], 0))  # noqa: E731
        prompts = replace(prompts, **{name: pad(x) for name, x in columns.items()})
    options = {"temperature": 1.0} | options
    return Unmask(max_new_tokens=new, **options)(policy, prompts, torch.Generator(), on_step=on_step)


def test_a_row_without_blanks_has_as_many_steps_as_tokens_in_any_batch(policy):
    """A row of three blanks and two new tokens may have four steps, and one of two tokens may not."""
    fill(policy, IDS[:1], [0], new=2, diffusion_steps=4)
    for ids in ([[3, 4]], [IDS[0], [3, 4]]):
        with pytest.raises(ValueError, match="diffusion_steps=4 is more than the 2 tokens of a completion"):
            fill(policy, ids, range(len(ids)), new=2, diffusion_steps=4)


def equal(a, b):
    for (name, one), (same, other) in zip(fields_of(a), fields_of(b), strict=True):
        assert name == same
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name


@pytest.mark.parametrize("name", WAYS)
def test_what_is_open_is_filled_and_the_rest_stays(policy, name):
    rollout, prompts = fill(policy, IDS, range(5), new=2, **WAYS[name]), Prompts.from_ids(IDS, pad_id=0)
    opened = torch.nn.functional.pad(prompts.tokens == M, (0, 2), value=True)
    assert torch.equal(rollout.completion_mask, opened)
    assert (rollout.tokens[opened] != M).all()
    assert torch.equal(rollout.tokens[~opened], torch.nn.functional.pad(prompts.tokens, (0, 2), value=M)[~opened])
    assert torch.equal(rollout.attention_mask, torch.nn.functional.pad(prompts.attention_mask, (0, 2), value=True))
    assert ((rollout.unmask_step >= 0) == opened).all() and ((rollout.logprobs < 0) == opened).all()
    if "diffusion_steps" not in WAYS[name] and "commit" not in WAYS[name]:
        for row in range(5):  # a position a step, so that a row ends when its own are filled
            assert sorted(rollout.unmask_step[row][opened[row]].tolist()) == list(range(int(opened[row].sum())))


@pytest.mark.parametrize("name", few(WAYS, ["greedy", "plackett_luce"]))
def test_open_positions_at_the_end_are_what_is_appended(policy, name):
    """Bit for bit, all of the record, with rows of a group and padding on the left."""
    ids, seeds = [[3, 4, 5], [7], [8, 9, 10, 11, 12]], range(6)
    filled = fill(policy, [[*row, *[M] * 4] for row in ids], seeds, group=2, **WAYS[name])
    plain = Unmask(max_new_tokens=4, **{"temperature": 1.0} | WAYS[name])(
        policy, Prompts.from_ids(ids, pad_id=0, num_generations=2, seeds=seeds), torch.Generator()
    )
    equal(filled, plain)
    equal(fill(policy, [[*row, M, M] for row in ids], seeds, group=2, new=2, **WAYS[name]), plain)


@pytest.mark.parametrize("name", few(WAYS, ["confidence", "soft_threshold"]))
def test_a_row_depends_on_itself_only(policy, name):
    seeds, order = [11, 22, 33, 44, 55], [3, 1, 4, 0, 2]
    together = fill(policy, IDS, seeds, new=1, **WAYS[name])
    permuted = fill(policy, [IDS[i] for i in order], [seeds[i] for i in order], new=1, **WAYS[name])
    padded = fill(policy, IDS, seeds, new=1, width=17, **WAYS[name])
    for row, ids in enumerate(IDS[:3]):
        alone, size = fill(policy, [ids], [seeds[row]], new=1, **WAYS[name]), len(ids) + 1
        for other, index in ((together, row), (permuted, order.index(row)), (padded, row)):
            assert torch.equal(alone.tokens[0], other.tokens[index, -size:])
            assert torch.equal(alone.unmask_step[0], other.unmask_step[index, -size:])
            torch.testing.assert_close(alone.logprobs[0], other.logprobs[index, -size:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", few(WAYS, ["confidence"]))
@pytest.mark.usefixtures("exact_arithmetic")
def test_replay_gives_recorded_logprobs_bitwise(policy, name):
    assert_replayed(policy, name, atol=0)


@pytest.mark.parametrize("name", few(WAYS, ["confidence", "plackett_luce"]))
def test_replay_gives_recorded_logprobs_to_rounding(policy, name):
    assert_replayed(policy, name, atol=1e-5)


def assert_replayed(policy, name, *, atol):
    for rows, group in ((slice(1), 1), (slice(3), 2)):
        rollout = fill(policy, IDS[rows], range(len(IDS[rows]) * group), new=1, group=group, **WAYS[name])
        estimator = estimators.Trajectory()
        noise = estimator.draw_views(rollout, torch.Generator())
        found = estimator.logprobs(policy, rollout, noise)
        torch.testing.assert_close(found, recorded(rollout, noise), rtol=0, atol=atol)
        assert (stayed_of(noise) is None) == (name not in ("confidence", "plackett_luce", "soft_threshold"))


def test_filters_record_what_they_kept(policy):
    rollout = fill(policy, IDS, range(5), top_k=3, rank=rules.RandomOrder())
    assert ((rollout.filter_support.ids >= 0).sum(-1) == 3 * rollout.completion_mask).all()
    assert ((rollout.filter_support.log_mass < 0) == rollout.completion_mask).all()
    scored = with_support(rollout, "rollout")
    estimator = estimators.Trajectory()
    again = estimator.logprobs(policy, scored, estimator.draw_views(scored, torch.Generator()))
    torch.testing.assert_close(again, rollout.logprobs, rtol=0, atol=1e-5)


def test_blocks_count_open_positions(policy):
    rollout = fill(policy, IDS, range(5), new=1, block_size=2, diffusion_steps=None, rank=rules.RandomOrder())
    for steps, own in zip(rollout.unmask_step, rollout.completion_mask, strict=True):
        for place, step in enumerate(steps[own].tolist()):
            assert step // 2 == place // 2
    assert block_index(rollout.completion_mask, 2)[0].tolist() == [-1] * 7 + [0, -1, 0, 1, -1, 1]


def test_watch_sees_masks_go(policy):
    seen = []
    last = fill(policy, IDS[:2], range(2), on_step=seen.append)
    assert [int((each.tokens == M).sum()) for each in seen] == [2, 1, 0]
    assert [int(each.completion_mask.sum()) for each in seen] == [2, 3, 4]
    equal(seen[-1], last)


def table_rollout():
    policy = TablePolicy(length=4, words=2, seed=3)
    rollout = policy.rollout([[1, 0, 1, 1]])
    own = torch.tensor([[False, False, True, False, True]])
    return policy, replace(rollout, completion_mask=own, unmask_step=torch.where(own, 0, -1)), (1, 3)


def test_one_step_and_elbo_score_the_open_positions():
    """By hand, from the table: the second and the last of four tokens are open, the others always seen."""
    policy, rollout, inside = table_rollout()
    tokens = rollout.tokens[0, 1:]
    step = estimators.OneStep(prompt_mask=0.0)
    found = step.logprobs(policy, rollout, step.draw_views(rollout, torch.Generator()))
    expected = [0.0, 0.0, policy.logp(tokens, set(inside), 1), 0.0, policy.logp(tokens, set(inside), 3)]
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=0, atol=1e-6)

    elbo = estimators.ELBO(num_samples=200)
    noise = elbo.draw_views(rollout, torch.Generator().manual_seed(0))
    assert not (noise.masked & ~rollout.completion_mask).any()
    views = (elbo.view_logprobs(policy, rollout, noise) * noise.coefficients).sum((1, 2)) * 200
    error = (views.mean() - elbo_by_hand(policy, tokens.tolist(), inside)).abs()
    assert error < 4 * views.std() / 200**0.5


def test_gradients_are_those_of_the_open_positions(policy):
    rollout = fill(policy, IDS[:2], range(2))
    estimator = estimators.Trajectory(include_order=False)
    noise = estimator.draw_views(rollout, torch.Generator())
    policy.module.zero_grad()
    for view, weight in zip(each_view(noise), noise.coefficients, strict=True):
        view.backward(policy, rollout, weight)
    found = [p.grad.clone() for p in policy.module.parameters() if p.grad is not None]
    policy.module.zero_grad()
    total = 0.0
    for row in range(2):
        for step in range(int(rollout.unmask_step[row].max()) + 1):
            at = rollout.unmask_step[row] == step
            hidden = rollout.completion_mask[row] & (rollout.unmask_step[row] >= step)
            tokens = rollout.tokens[row].masked_fill(hidden, M)[None]
            logits = policy.logits(tokens, rollout.attention_mask[row][None])[0].clone()
            logits[:, M] = -torch.inf
            total = total + logits.log_softmax(-1)[at, rollout.tokens[row][at]].sum()
    total.backward()
    expected = [p.grad for p in policy.module.parameters() if p.grad is not None]
    policy.module.zero_grad()
    assert any(g.abs().max() > 0.1 for g in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_errors_name_the_value_and_a_remedy(policy):
    prompts = Prompts.from_ids([[3, M, 4], [5, 6]], pad_id=0, mask_id=M)

    def run(prompts, **settings):
        return Unmask(**settings)(policy, prompts, torch.Generator())

    refuses("max_new_tokens=0, and row 1 has no open position", lambda: run(prompts=prompts, max_new_tokens=0))
    assert run(prompts=prompts, max_new_tokens=1).completion_mask.sum(-1).tolist() == [2, 1]
    refuses("max_new_tokens=-1", lambda: run(prompts=prompts, max_new_tokens=-1))
    refuses("max_new_tokens=0", lambda: run(prompts=Prompts.from_ids([[3, 4]], pad_id=0, mask_id=M), max_new_tokens=0))
    refuses("use cache=None", lambda: run(prompts=prompts, max_new_tokens=1, cache=PrefixCache()))
    with pytest.raises(ValueError, match="approximate_early_exit would leave gaps"):
        run(prompts=prompts, max_new_tokens=1, approximate_early_exit=True)
    small = replace(policy.spec, attention="block_causal", block_size=2)
    with pytest.raises(ValueError, match="attention is 'block_causal' and a gap would not see"):
        blocks = TablePolicy(length=2, words=2, seed=0)
        blocks.spec = small
        Unmask(max_new_tokens=2)(blocks, prompts, torch.Generator())
    causal = tiny_llama(characters=CHARACTERS, causal=True, num_layers=1)
    refuses("a causal model cannot fill in", lambda: Autoregress(max_new_tokens=2)(causal, prompts, torch.Generator()))
