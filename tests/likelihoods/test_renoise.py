"""The likelihood of `renoise`, against every history of a toy: three tokens, a canvas of three, two or three steps."""

from dataclasses import fields
from functools import partial

import pytest
import torch
from renoise_toys import C, Histories, as_rollout, enumerate_all, toy

from dllm_rl import ELBO, Prompts, Trajectory
from dllm_rl.likelihoods.views import each_view
from dllm_rl.samplers import Renoise

PROMPT = torch.tensor([1, 2])
TEMPERATURES = (0.9, 0.7)
BOUND = 0.9  # accepts one place, two or three
ANSWERS = ("argmax", "drawn")


@pytest.fixture(autouse=True)
def in_doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sampled(policy, rows, *, answer, stops=None, bound=BOUND, seed=0, steps=2):
    stability, confidence = stops or (None, None)
    t_max, t_min = TEMPERATURES[0], TEMPERATURES[0] - 0.2 * steps  # the last of two steps is at 0.7
    return Renoise(
        max_new_tokens=C,
        diffusion_steps=steps,
        t_max=t_max,
        t_min=t_min,
        entropy_bound=bound,
        stability_threshold=stability,
        confidence_threshold=confidence,
        answer=answer,
    )(policy, Prompts.from_ids([PROMPT.tolist()], pad_id=0, num_generations=rows), torch.Generator().manual_seed(seed))


def reward(answer):
    """Of two tokens alike, and more for one of them: no function of a single place."""
    return (answer[:, 0] == answer[:, 1]).double() + 0.5 * (answer[:, 2] == 1) - 0.7 * (answer.sum(-1) == 2)


def gradient(policy, estimator, found, weights):
    """sum_h weights_h grad log p(h), by the estimator's backward on all histories."""
    rollout = as_rollout(found, PROMPT, TEMPERATURES)
    views = estimator.draw_views(rollout, torch.Generator())
    vectors = (weights[:, None] * rollout.completion_mask)[None]
    policy.module.zero_grad()
    estimator.backward(policy, rollout, views, vectors)
    return flat(policy)


def flat(policy):
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters(policy)]
    )


def parameters(policy):
    return list(policy.module.parameters())


def moved(policy, direction, length):
    with torch.no_grad():
        sizes = [p.numel() for p in parameters(policy)]
        for p, d in zip(parameters(policy), direction.split(sizes), strict=True):
            p += length * d.view_as(p)


@pytest.mark.parametrize("stops", [None, (0, 0.7), (1, 0.75)])
@pytest.mark.parametrize("answer", ANSWERS)
def test_a_rollouts_log_prob_is_that_of_its_history(answer, stops):
    policy = toy()
    temperatures = TEMPERATURES if stops is None else (0.9, 0.7, 0.5)
    if stops and answer == "drawn":
        temperatures = TEMPERATURES  # three steps would be half a million histories
        stops = (0, stops[1])
    with torch.no_grad():
        found = enumerate_all(policy, PROMPT, temperatures, BOUND, answer, stops=stops)
    rollout = as_rollout(found, PROMPT, temperatures)
    scored = Trajectory().logprobs(policy, rollout, Trajectory().draw_views(rollout, torch.Generator())).sum(-1)
    assert (scored - found.p.log()).abs().max() < 1e-10
    assert abs(float((scored.exp() * found.noise).sum()) - 1) < 1e-10
    lengths = (found.seen >= 0).any(1).sum(-1)
    assert stops is None or lengths.min() < lengths.max()  # some histories stop early, and some do not


@pytest.mark.parametrize("answer", ANSWERS)
def test_sampled_frequencies_are_the_laws(answer):
    policy = toy()
    stops = (0, 0.7)
    with torch.no_grad():
        found = enumerate_all(policy, PROMPT, TEMPERATURES, BOUND, answer, stops=stops)
    rows = 4000
    rollout = sampled(policy, rows, answer=answer, stops=stops)

    # Cells: which canvas came first, at how many steps it ended, and the answer's first two tokens.
    def cells(seen, drawn, answer):
        steps = (seen >= 0).any(1).sum(-1)
        first = ((drawn[:, :, 0] + 1) * torch.tensor([16, 4, 1])).sum(-1)
        return (first * 3 + steps) * 9 + answer[:, 0] * 3 + answer[:, 1]

    part = rollout.renoised
    steps = found.seen.shape[2]
    wide = [torch.nn.functional.pad(x[:, 2:], (0, steps - x.shape[2]), value=-1) for x in (part.seen, part.drawn)]
    expected = torch.zeros(64 * 27).index_add(0, cells(found.seen, found.drawn, found.answer), found.p * found.noise)
    counts = cells(wide[0].long(), wide[1].long(), rollout.tokens[:, 2:]).bincount(minlength=64 * 27)
    assert (counts[expected == 0] == 0).all()
    common = rows * expected >= 5  # the rarer ones are one cell
    pairs = [torch.cat([x[common], x[~common].sum()[None]]) for x in (counts.double(), rows * expected)]
    statistic = float(((pairs[0] - pairs[1]) ** 2 / pairs[1]).sum())
    freedom = int(common.sum())
    assert freedom > 20
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5  # mean and deviation of chi-square


@pytest.mark.parametrize("answer", ANSWERS)
def test_scoring_is_the_samplers_record(answer):
    policy = toy()
    rollout = sampled(policy, 64, answer=answer)
    estimator = Trajectory()
    views = estimator.draw_views(rollout, torch.Generator())
    # One policy, one arithmetic: `zero_mismatch` compares bits in tests/models/test_denoiser.py.
    assert (estimator.logprobs(policy, rollout, views) - rollout.logprobs).abs().max() < 1e-12
    assert (rollout.renoised.logprobs.sum(-1) - rollout.logprobs).abs().max() < 1e-12
    chosen = rollout.renoised.drawn >= 0
    assert (rollout.renoised.logprobs[~chosen] == 0).all() and (rollout.renoised.logprobs[chosen] < 0).all()


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_full_gradient_is_the_expected_rewards(answer):
    """Against central differences of the enumerated expected reward. Where the answer is the argmax, too: the reward is
    then a function of weights as well, but a step function, whose derivative is 0 where it has one."""
    policy = toy()
    expected = partial(enumerate_all, policy, PROMPT, TEMPERATURES, BOUND, answer)
    with torch.no_grad():
        found = expected()
    weights = found.p * found.noise * reward(found.answer)
    full = gradient(policy, Trajectory(self_conditioning="full"), found, weights)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(len(full), generator=generator)
        ends = []
        for length in (1e-5, -2e-5, 1e-5):  # there, back to the other side, and home
            moved(policy, direction, length)
            with torch.no_grad():
                ends.append(expected().expected(reward))
        assert abs(float((ends[0] - ends[1]) / 2e-5 - full @ direction)) < 1e-7
    moved(policy, torch.zeros_like(full), 0.0)


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_detached_gradient_stops_at_the_step_before(answer):
    policy = toy()
    found = enumerate_all(policy, PROMPT, TEMPERATURES, BOUND, answer, detached=True)
    policy.module.zero_grad()
    found.expected(reward).backward()
    wanted = flat(policy).clone()
    weights = (found.p * found.noise * reward(found.answer)).detach()
    ours = gradient(policy, Trajectory(), found, weights)
    assert (ours - wanted).abs().max() < 1e-10
    full = gradient(policy, Trajectory(self_conditioning="full"), found, weights)
    left_out = float((full - ours).norm() / full.norm())
    if answer == "argmax":  # of two steps the second draws nothing that counts, and the first has no step before
        assert left_out < 1e-12
    else:
        assert left_out == pytest.approx(0.22, abs=0.005)


def test_kept_graphs_carry_the_same_gradient():
    policy = toy()
    with torch.no_grad():
        found = enumerate_all(policy, PROMPT, TEMPERATURES, BOUND, "drawn")
    found = Histories(*(getattr(found, field.name)[::7] for field in fields(found)))
    weights = found.p * found.noise * reward(found.answer)
    for estimator in (Trajectory(), Trajectory(self_conditioning="full")):
        rollout = as_rollout(found, PROMPT, TEMPERATURES)
        views = estimator.draw_views(rollout, torch.Generator())
        once = gradient(policy, estimator, found, weights).clone()
        policy.module.zero_grad()
        scores = estimator.view_logprobs(policy, rollout, views, retain_graphs=True)
        scores.backward((weights[:, None] * rollout.completion_mask)[None])
        assert (flat(policy) - once).abs().max() < 1e-12


def line(policy, answer, bound, *, points):
    """The change of the expected reward along a line of weights, and the integral of its gradient (midpoints)."""
    direction = torch.randn(sum(p.numel() for p in parameters(policy)), generator=torch.Generator().manual_seed(2))
    length = 0.6 / points
    expected = partial(enumerate_all, policy, PROMPT, TEMPERATURES, bound, answer)
    with torch.no_grad():
        start = float(expected().expected(reward))
    integral = 0.0
    for _ in range(points):
        moved(policy, direction, length / 2)
        policy.module.zero_grad()
        expected().expected(reward).backward()
        integral += float(flat(policy) @ direction) * length
        moved(policy, direction, length / 2)
    with torch.no_grad():
        return float(expected().expected(reward)) - start, integral


@pytest.mark.slow
def test_what_the_argmax_leaves_out_of_the_gradient():
    """Nowhere does a gradient see that an argmax, or the set of accepted places, changes: between two weights the
    expected reward moves by jumps, too. With drawn answers, all accepted, there are none."""
    smooth, integral = line(toy(), "drawn", float("inf"), points=60)
    assert abs(smooth - integral) < 1e-4 < abs(smooth)
    for answer, bound in (("argmax", float("inf")), ("argmax", BOUND), ("drawn", BOUND)):
        whole, integral = line(toy(), answer, bound, points=60)
        assert abs(whole - integral) > 0.01


def test_the_view_counts_its_forwards():
    rollout = sampled(toy(), 4, answer="drawn")
    (part,) = Trajectory().draw_views(rollout, torch.Generator()).features
    assert part.num_forwards == 2 and not part.is_per_token
    (view,) = each_view(Trajectory().draw_views(rollout, torch.Generator()))
    assert (view.inputs_and_targets(toy(), rollout)[0] == rollout.tokens).all()
    with pytest.raises(ValueError, match="needs_entropy"):  # as the entropy, which reads the states of one forward
        view.run(toy(), rollout, view.scored)


def test_what_cannot_be_replayed_is_refused():
    with pytest.raises(ValueError, match="self_conditioning='some' must be"):
        Trajectory(self_conditioning="some")
    for estimator in (Trajectory(num_segments=2), ELBO()):
        with pytest.raises(
            ValueError, match=r"the policy's is 'encoder_decoder'; use Trajectory\(num_segments=None, block_size=None\)"
        ):
            estimator.check_policy(toy())
