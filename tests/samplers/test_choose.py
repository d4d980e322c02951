"""What a step writes: the same tokens whether they are drawn before the ranking or after it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from likelihood_toys import TablePolicy
from repetitions import few, pairwise, slow
from run_outputs import metrics_of
from tiny_recipe import tiny_recipe, tiny_recipe_ar

from dllm_rl import train
from dllm_rl.decoding.support import MAX_SUPPORT_IDS, with_support
from dllm_rl.likelihoods.estimators import Causal, Trajectory
from dllm_rl.likelihoods.views import View
from dllm_rl.models import logprobs
from dllm_rl.models.logprobs import process, token_logprobs
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.samplers import rules, sampler_for
from dllm_rl.samplers.canvas import BlockTracker, make_canvas, positions_of
from dllm_rl.samplers.choose import StepSampler, rank_and_draw
from dllm_rl.samplers.rules import Confidence, MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types.rollouts import FilterSupport, Prompts, Rollout, SamplingParams

pytestmark = pytest.mark.usefixtures("no_rehearsal")


def choice_of(rank, commit=rules.Schedule(), *, temperature=1.0):
    """The first step of three rows, six positions in one block of three steps: two positions a row are written."""
    policy = TablePolicy(length=6, words=2, seed=0)
    canvas = make_canvas(policy, Prompts.from_ids([[3]] * 3, pad_id=4, seeds=[5, 6, 7]), 6, 6)
    tracker = BlockTracker(canvas, 3, wait_for_all_rows=False)
    sampler = Unmask(max_new_tokens=6, rank=rank, commit=commit)
    choose = StepSampler(policy, canvas, SamplingParams(temperature, suppress=(2, 3, 4)), sampler.rank, sampler.commit)
    step = tracker.next_rows()
    at = positions_of(canvas, step)
    states = policy.hidden(canvas.written.tokens, canvas.attention_mask)[at.canvas_row, at.column]
    return choose, at, choose(at, states, canvas.written, step)


def draws_first(logits, normalizer, tokens):
    """`max_prob`, which asks for the tokens without a use for them."""
    return rules.MaxProb()(logits, normalizer)


def test_drawing_before_ranking_changes_nothing():
    late, plan, choice = choice_of(rules.MaxProb())
    early, _, same = choice_of(draws_first)
    assert early.draws_first and not late.draws_first
    assert choice.places.tolist() == same.places.tolist()
    assert plan.row_index[choice.places].tolist() == [0, 0, 1, 1, 2, 2]
    for name in ("tokens", "logprobs"):
        assert torch.equal(getattr(late.canvas.written, name), getattr(early.canvas.written, name))


def test_the_order_has_a_law_only_where_chance_ranks():
    made, _, choice = choice_of(rules.Confidence())
    order = made.canvas.written.order_logprobs
    assert not order[choice.chosen].any()
    assert (order <= 0).all() and (order[~choice.chosen] < 0).any()
    for rank, temperature in ((rules.MaxProb(), 1.0), (rules.Confidence(), 0.0)):
        assert choice_of(rank, temperature=temperature)[0].canvas.written.order_logprobs is None


def test_the_most_confident_draws_are_written():
    """The same draws, once all written and once ranked by hand: log-prob of the drawn token, mask token included."""
    whole, plan, _ = choice_of(rules.Confidence(), lambda scores, masked, steps_left: masked)
    tokens = whole.canvas.written.tokens[plan.canvas_row, plan.column]
    logp = TablePolicy(length=6, words=2, seed=0).table[-1][:, :3].log_softmax(-1)
    expected = []
    for row in range(3):
        mine = (plan.row_index == row).nonzero()[:, 0].tolist()
        confidences = {position: logp[plan.offset[position], tokens[position]].item() for position in mine}
        expected += sorted(sorted(confidences, key=confidences.get)[-2:])
    assert choice_of(rules.Confidence())[2].places.tolist() == expected


FILTERS = {"top_k": {"top_k": 2}, "top_p": {"top_p": 0.7}, "both": {"top_k": 4, "top_p": 0.9}}
SHAPE = {
    "characters": "123456789",
    "hidden_size": 32,
    "num_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


class HeadAlone:
    """A policy of which only the head is asked, whose hidden states are the logits; the last token is the mask."""

    module = tokenizer = weights_version = lora = quantization = quantization_report = None
    float32_head, gradient_checkpointing = True, False
    device, pad_id = torch.device("cpu"), 0

    def __init__(self, vocabulary: int) -> None:
        self.vocab_size, self.spec = vocabulary, SimpleNamespace(mask_id=vocabulary - 1)

    def head(self, hidden):
        return hidden.clone()

    encode = hidden = logits = to = save_pretrained = reference = head


def tiny(*, is_causal: bool, seed: int = 0):
    return tiny_llama(causal=is_causal, head_std=0.5, seed=seed, **SHAPE)


def sampled(policy, **options) -> Rollout:
    prompts = Prompts.from_ids([[5, 6, 7], [8, 9, 10, 11, 3]], pad_id=0, num_generations=3)
    options = {"max_new_tokens": 6, "temperature": 0.7} | options
    if policy.spec.attention != "causal":
        options = {"rank": MaxProb(), "diffusion_steps": 4} | options
    return sampler_for(policy)(**options)(policy, prompts, torch.Generator().manual_seed(1))


def exact_for(policy):
    return Causal() if policy.spec.attention == "causal" else Trajectory()


def score(policy, rollout: Rollout) -> torch.Tensor:
    return exact_for(policy).logprobs(policy, rollout, exact_for(policy).draw_views(rollout, torch.Generator()))


def test_the_worked_example():
    """`Rollout.with_support`'s: p = (.5, .3, .15, .05), q = (.4, .2, .3, .1), top_k 2, and a mask token of no mass."""
    policy, params = HeadAlone(5), SamplingParams(top_k=2, suppress=(4,))
    p, q = (torch.tensor([[*x, 1e-30]]).log() for x in ((0.5, 0.3, 0.15, 0.05), (0.4, 0.2, 0.3, 0.1)))
    ratios = {}
    for u, token in ((0.1, 0), (0.9, 1)):
        uniform = torch.tensor([u], dtype=torch.float64)
        _, (tokens, logp, _, log_mass, kept) = rank_and_draw(policy, p.clone(), params, uniforms=(None, uniform))
        assert tokens.tolist() == [token] and kept[:, :3].tolist() == [[0, 1, -1]]
        assert log_mass.exp().item() == pytest.approx(0.8)
        one = torch.ones(1, 1, dtype=torch.bool)
        rollout = Rollout(
            tokens[None], one, one, tokens[None] * 0, logp[None], torch.arange(1), sampling_params=params,
            filter_support=FilterSupport(log_mass[None], kept[None]),
        )  # fmt: skip
        for support in ("per_policy", "unfiltered", "rollout"):
            side = with_support(rollout, support)
            ids = side.filter_support.ids[0] if support == "rollout" else None
            learner = token_logprobs(policy, q, tokens, side.sampling_params, ids)
            ratios[support, token] = (learner - side.logprobs[0]).exp().item()
    expected = {
        ("per_policy", 0): (0.4 / 0.7) / 0.625,
        ("per_policy", 1): (0.2 / 0.9) / 0.375,
        ("unfiltered", 0): 0.4 / 0.5,
        ("unfiltered", 1): 0.2 / 0.3,
        ("rollout", 0): (0.4 / 0.6) / 0.625,
        ("rollout", 1): (0.2 / 0.6) / 0.375,
    }
    assert ratios == pytest.approx(expected)
    means = {s: 0.625 * ratios[s, 0] + 0.375 * ratios[s, 1] for s in ("per_policy", "unfiltered", "rollout")}
    assert means == pytest.approx({"per_policy": 0.7936508, "unfiltered": 0.75, "rollout": 1.0})


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_mean_ratios_by_enumeration(name, temperature):
    """Over every token that the rollout may draw: 1 under its own set, q(S)/p(S) unfiltered; 50 pairs of policies."""
    size, generator = 7, torch.Generator().manual_seed(3)
    policy = HeadAlone(size)
    params = SamplingParams(temperature=temperature, suppress=(size - 1,), **FILTERS[name])
    p, q = 2 * torch.randn(2, 50, size, generator=generator)
    uniforms = torch.rand(50, generator=generator, dtype=torch.float64)
    _, (_, _, _, log_mass, kept) = rank_and_draw(policy, p.clone(), params, uniforms=(None, uniforms))
    unfiltered = replace(params, support="unfiltered")
    for row in range(50):
        # The set and its mass, from the definition: the likeliest, until k of them, or until their mass is top_p.
        weights = [math.exp(x / temperature) for x in p[row, : size - 1].tolist()]
        order = sorted(range(size - 1), key=lambda v: -weights[v])[: params.top_k]
        inside, mass = [], 0.0
        for v in order:
            if params.top_p is None or mass < params.top_p * sum(weights[v] for v in order):
                inside.append(v)
                mass += weights[v]
        assert [i for i in kept[row].tolist() if i >= 0] == inside
        assert log_mass[row].exp().item() == pytest.approx(mass / sum(weights), rel=1e-5)

        chance = {v: weights[v] / mass for v in inside}
        hidden, tokens = q[row].expand(len(inside), -1), torch.tensor(inside)
        ids = kept[row : row + 1].expand(len(inside), -1)
        within = token_logprobs(policy, hidden, tokens, replace(params, support="rollout"), ids).exp().tolist()
        assert sum(chance[v] * (x / chance[v]) for v, x in zip(inside, within, strict=True)) == pytest.approx(1)
        full = token_logprobs(policy, hidden, tokens, unfiltered).exp().tolist()
        mean = sum(chance[v] * x / (weights[v] / sum(weights)) for v, x in zip(inside, full, strict=True))
        learner = [math.exp(x / temperature) for x in q[row, : size - 1].tolist()]
        share = sum(learner[v] for v in inside) / sum(learner)
        assert mean == pytest.approx(share / (mass / sum(weights)), rel=1e-4)


@pytest.mark.parametrize(
    ("is_causal", "name"), pairwise([False, True], FILTERS, kept=[(False, "top_p"), (True, "both")])
)
@pytest.mark.usefixtures("exact_arithmetic")
def test_a_rollout_records_what_was_kept(is_causal, name):
    policy = tiny(is_causal=is_causal)
    rollout = sampled(policy, **FILTERS[name])
    chosen = rollout.completion_mask
    assert (
        rollout.filter_support.ids.shape[:2] == rollout.tokens.shape and rollout.filter_support.ids.dtype == torch.int32
    )
    assert (rollout.filter_support.ids[~chosen] == -1).all() and (rollout.filter_support.log_mass[~chosen] == 0).all()
    assert (rollout.filter_support.log_mass[chosen] < 0).all()
    assert (
        (rollout.filter_support.ids[chosen] == rollout.tokens[chosen][:, None]).any(-1).all()
    )  # the sampled token is one
    count = (rollout.filter_support.ids >= 0).sum(-1)[chosen]
    assert count.max() == rollout.filter_support.ids.shape[-1]
    if name == "top_k":
        assert (count == 2).all()
    # On-policy all conventions agree bit for bit, except for the rounding of one sum of two numbers.
    own, within, whole = (with_support(rollout, s) for s in ("per_policy", "rollout", "unfiltered"))
    assert own is rollout
    if not is_causal:  # a cache computes other shapes than the learner
        assert torch.equal(score(policy, own), rollout.logprobs)
        assert torch.equal(score(policy, within), rollout.logprobs)
    torch.testing.assert_close(score(policy, within), rollout.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(score(policy, whole), whole.logprobs, rtol=0, atol=1e-5)
    assert (whole.logprobs[chosen] < rollout.logprobs[chosen]).all()


def test_a_rank_that_draws_first_records_the_same():
    rollouts = [
        sampled(tiny(is_causal=False), rank=rank, top_k=3, max_new_tokens=1, diffusion_steps=1)
        for rank in (Confidence(), MaxProb())
    ]
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    assert torch.equal(rollouts[0].filter_support.ids, rollouts[1].filter_support.ids)
    assert torch.equal(rollouts[0].filter_support.log_mass, rollouts[1].filter_support.log_mass)


@pytest.mark.parametrize("support", ["per_policy", "unfiltered", "rollout"])
def test_another_policy_scores_under_each_convention(support):
    """log q(y) less the log of the mass that the convention divides by, from logits in float64; and its gradient."""
    rollout = with_support(sampled(tiny(is_causal=True), top_k=2), support)
    policy, chosen = tiny(is_causal=True, seed=5), rollout.completion_mask
    logits = policy.logits(rollout.tokens, rollout.attention_mask).double()[chosen] / 0.7
    y, kept = rollout.tokens[chosen], rollout.filter_support.ids[chosen].long()
    own = logits >= logits.topk(2).values[:, -1:]
    sets = {
        "per_policy": own,
        "unfiltered": torch.ones_like(own),
        "rollout": torch.zeros_like(own).scatter(-1, kept, True),
    }
    inside = sets[support].scatter(-1, y[:, None], True)
    expected = logits.gather(-1, y[:, None])[:, 0] - logits.masked_fill(~inside, -torch.inf).logsumexp(-1)
    view = View(torch.zeros_like(chosen), chosen)
    with torch.no_grad():
        found = view.logprobs(policy, rollout)[chosen]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    weight = policy.module.lm_head.weight
    vector = torch.linspace(-1, 1, len(y))
    (wanted,) = torch.autograd.grad((expected * vector).sum(), weight)
    view.backward(policy, rollout, torch.zeros(chosen.shape).masked_scatter(chosen, vector))
    torch.testing.assert_close(weight.grad, wanted, rtol=1e-4, atol=1e-5)


def test_nothing_is_recorded_without_filters():
    rollout = sampled(tiny(is_causal=False))
    assert rollout.filter_support is None
    assert all(with_support(rollout, s) is rollout for s in ("per_policy", "unfiltered", "rollout"))


def test_a_set_too_large_for_its_ids_is_refused_and_its_mass_is_not():
    size = MAX_SUPPORT_IDS + 10
    characters = "".join(map(chr, range(0x4E00, 0x4E00 + size)))
    policy = tiny_llama(causal=True, hidden_size=32, num_layers=1, characters=characters)
    rollout = sampled(policy, top_k=MAX_SUPPORT_IDS + 1)
    assert rollout.filter_support.ids is None and rollout.filter_support.log_mass is not None
    with pytest.raises(
        ValueError, match=f"ids are recorded for at most {MAX_SUPPORT_IDS} tokens; lower top_k or top_p"
    ):
        with_support(rollout, "rollout")
    assert with_support(rollout, "unfiltered").sampling_params.support == "unfiltered"
    assert sampled(policy, top_k=MAX_SUPPORT_IDS).filter_support.ids.shape[-1] == MAX_SUPPORT_IDS


def test_conventions_that_cannot_be():
    rollout = sampled(tiny(is_causal=True), top_k=2)
    with pytest.raises(
        ValueError,
        match="support='per_policy': the rollout has 'unfiltered' already; pass the sampler's rollout",
    ):
        with_support(with_support(rollout, "unfiltered"), "per_policy")
    with pytest.raises(ValueError, match="needs the filter's support, which is not recorded: sample with this"):
        with_support(replace(rollout, filter_support=None), "unfiltered")
    with pytest.raises((ValueError, TypeError), match="'half'"):  # the tests' type checker is asked first
        tiny_recipe("unused", sampling_support="half")
    with pytest.raises(ValueError, match="zero_mismatch=True cannot be combined with sampling_support='unfiltered'"):
        tiny_recipe("unused", sampling_support="unfiltered", zero_mismatch=True, rollout_quantization=None)


def test_records_stay_together():
    """Padding and replaced rows carry the kept sets with them, of whatever width."""
    policy = tiny(is_causal=False)
    wide = sampled(policy, top_k=5)
    narrow = replace(sampled(policy, top_k=2), sampling_params=wide.sampling_params)
    joined = wide.replace_rows(torch.tensor([0, 1, 2]), narrow.rows(torch.arange(3)), pad_id=0)
    assert (
        torch.equal(joined.filter_support.ids[:3, :, :2], narrow.filter_support.ids[:3])
        and (joined.filter_support.ids[:3, :, 2:] == -1).all()
    )
    assert torch.equal(joined.filter_support.ids[3:], wide.filter_support.ids[3:])
    assert torch.equal(
        joined.filter_support.log_mass,
        torch.cat([narrow.filter_support.log_mass[:3], wide.filter_support.log_mass[3:]]),
    )
    padded = wide.padded(2, pad_id=0)
    assert (
        torch.equal(padded.filter_support.ids[:, 2:], wide.filter_support.ids)
        and (padded.filter_support.ids[:, :2] == -1).all()
    )
    assert torch.equal(padded.filter_support.log_mass[:, 2:], wide.filter_support.log_mass)
    first = torch.tensor([0])
    assert (
        wide.replace_rows(
            first, replace(narrow, filter_support=replace(narrow.filter_support, ids=None)).rows(first), pad_id=0
        ).filter_support.ids
        is None
    )


def test_ties_with_the_kth_are_kept_and_recorded():
    logits = torch.tensor([[3.0, 1.0, 3.0, 0.0, 2.0]])
    kept = torch.tensor([[0, 2, -1]], dtype=torch.int32)
    left = torch.isfinite(process(logits, SamplingParams(top_k=1), support_ids=kept))
    assert left.tolist() == [[True, False, True, False, False]]
    params, uniform = SamplingParams(top_k=1, suppress=(4,)), torch.tensor([0.9], dtype=torch.float64)
    _, (_, logp, _, log_mass, ids) = rank_and_draw(HeadAlone(5), logits.clone(), params, uniforms=(None, uniform))
    assert sorted(ids[0, :2].tolist()) == [0, 2] and ids[0, 2] == -1
    assert logp.item() == pytest.approx(math.log(0.5))
    assert log_mass.exp().item() == pytest.approx(2 * math.e**3 / (2 * math.e**3 + math.e + 1))


@pytest.mark.parametrize("support", few(["per_policy", "unfiltered", "rollout"], ["per_policy", "rollout"]))
@pytest.mark.parametrize("make", [tiny_recipe, pytest.param(tiny_recipe_ar, marks=pytest.mark.slow)])
@pytest.mark.repeated(first_only=True)
def test_a_run_under_each_convention(tmp_path, make, support):
    """Unquantized and on-policy, the first step has no mismatch under any of them."""
    recipe = make(tmp_path, sampling_support=support, rollout_quantization=None, num_steps=1, train_batch_size=2)
    rank = {"rank": MaxProb()} if make is tiny_recipe else {}
    recipe = replace(recipe, sampler=recipe.sampler.replace(top_k=3, **rank))
    train(recipe)
    (row,) = metrics_of(tmp_path)
    assert row["rollout_corr/abs_log_ratio_max"] < 1e-5 and row["grad_norm"] > 0


def max_prob(logits, normalizer):
    return logits.amax(-1) - normalizer


def max_prob_in_place(logits, normalizer):
    return logits.sub_(normalizer[:, None]).amax(-1)


@pytest.mark.parametrize(
    "options",
    [slow({}), {"top_p": 0.8}, {"commit": rules.LateSchedule()}, slow({"block_size": 3})],
    ids=str,
)
def test_tokens_are_drawn_from_the_logits_that_ranked(options, monkeypatch):
    """One product of the head per step for the library's ranks. A custom rank may write to its logits; it takes two."""
    policy = tiny(is_causal=False)
    calls, head = [], policy.head
    monkeypatch.setattr(policy, "head", lambda states: calls.append(len(states)) or head(states))

    def sample(rank):
        calls.clear()
        rollout = sampled(policy, rank=rank, **options)
        return rollout, len(calls), rollout.forwards

    ours, num_products, num_steps = sample(MaxProb())
    assert num_products == num_steps
    for rank in (rules.Margin(), rules.Entropy()):
        assert sample(rank)[1] == num_steps
    for rank in (max_prob, max_prob_in_place):
        theirs, num_products, _ = sample(rank)
        assert num_products == 2 * num_steps
        assert torch.equal(ours.tokens, theirs.tokens)
        torch.testing.assert_close(
            ours.logprobs, theirs.logprobs, atol=1e-5, rtol=0
        )  # another product: its rounding may differ
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 16 * policy.vocab_size)  # the first steps have more rows
    in_chunks, num_products, _ = sample(MaxProb())
    assert num_products > num_steps
    assert torch.equal(ours.tokens, in_chunks.tokens)
    torch.testing.assert_close(ours.logprobs, in_chunks.logprobs, atol=1e-5, rtol=0)


def careless(hidden=None, tokens=None, normalizer=None, uniforms=None, logits=None):
    """Scores by the uniforms, and other contents of all that the rank was given."""
    scores = uniforms.clone()
    for values in (hidden, tokens, normalizer, uniforms, logits):
        if values is not None:
            values.zero_()
    return scores


@pytest.mark.parametrize(
    "rank",
    [
        lambda hidden, uniforms: careless(hidden=hidden, uniforms=uniforms),
        lambda hidden, tokens, normalizer, uniforms, logits: careless(hidden, tokens, normalizer, uniforms, logits),
    ],
    ids=["before the draw", "after it"],
)
def test_a_rank_that_writes_into_what_it_gets_changes_no_draw(rank):
    policy = tiny_llama(characters="12345678=", causal=False, hidden_size=16, num_layers=1, head_std=1.0)
    prompts = Prompts.from_ids([[3, 4], [5]], pad_id=policy.pad_id, seeds=[1, 2])
    made = [
        Unmask(max_new_tokens=4, temperature=1.0, rank=each)(policy, prompts, torch.Generator())
        for each in (rank, lambda uniforms: uniforms)
    ]
    assert torch.equal(made[0].tokens, made[1].tokens) and torch.equal(made[0].logprobs, made[1].logprobs)
    assert torch.equal(made[0].unmask_step, made[1].unmask_step)
