"""Rollouts that note their experts, and estimates that take them again."""

from dataclasses import replace

import pytest
import torch
from emulated import int3_emulated
from layouts import published
from mixtures import by_hand, chosen_by_hand, moe, on_a_boundary
from order_toys import stayed_of

from dllm_rl import load_policy
from dllm_rl.algorithms.mismatch import mismatch_metrics
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.estimators import recorded
from dllm_rl.likelihoods.router_replay import check_replay, record_experts, with_recorded_experts, with_sampled_experts
from dllm_rl.likelihoods.routing_agreement import routing_counts, routing_metrics
from dllm_rl.likelihoods.views import each_view, forward
from dllm_rl.models.forward import routing
from dllm_rl.models.tiny import tiny_llama
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.samplers.cache import BlockCache, DualCache
from dllm_rl.samplers.rules import Confidence, MaxProb, PlackettLuce, RandomOrder
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.types import Prompts, Rollout

GENERATOR = torch.Generator()
draw = Unmask(max_new_tokens=6, diffusion_steps=3, temperature=1.0, rank=MaxProb())


def prompts(lengths=(5, 40)):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 12, (n,), generator=generator).tolist() for n in lengths]
    return Prompts.from_ids(ids, pad_id=0, num_generations=2, seeds=range(2 * len(ids)))


def sampled(policy, **settings):
    policy.records_experts = True
    return draw.replace(**settings)(policy, prompts(), GENERATOR)


def gap(policy, rollout, noise):
    """Mean |log-ratio| of the scored tokens, nats."""
    d = lik.Trajectory().logprobs(policy, rollout, noise) - recorded(rollout, noise)
    return mismatch_metrics(d, rollout.completion_mask)["rollout_corr/abs_log_ratio_mean"]


def assert_noted(policy, rollout):
    """Step by step, what the routers of a forward of the recorded state take at the positions that it committed."""
    mask_id, compared = policy.spec.mask_id, 0
    for step in range(int(rollout.unmask_step.max()) + 1):
        hidden = rollout.completion_mask & (rollout.unmask_step >= step)
        own = chosen_by_hand(policy, rollout.tokens.masked_fill(hidden, mask_id), rollout.attention_mask)
        here = rollout.unmask_step == step
        assert torch.equal(own[here].sort().values, rollout.experts[here].long().sort().values), step
        compared += int(here.sum())
    assert compared == rollout.completion_mask.sum() > 0
    assert len(rollout.experts[rollout.completion_mask].unique(dim=0)) > 2


@pytest.mark.repeated
@pytest.mark.parametrize("settings", [{}, {"rank": RandomOrder()}, {"block_size": 4}, {"temperature": 0.0}])
def test_the_sampler_notes_the_experts_of_the_states_that_it_committed(settings):
    """Prompts of 5 and of 40 tokens: rows go through the model in buckets."""
    policy = moe()
    assert_noted(policy, sampled(policy, **settings))


def test_infilling_and_a_cache_note_theirs(tmp_path):
    policy = moe()
    policy.records_experts = True
    opened = Prompts.from_ids([[3, 4, 1, 5, 1, 1], [1, 6, 7]], pad_id=0, num_generations=2, mask_id=1)
    assert_noted(policy, draw.replace(max_new_tokens=3, diffusion_steps=2)(policy, opened, GENERATOR))
    assert_noted(policy, sampled(policy, block_size=4, cache=DualCache(refresh=1)))
    causal_blocks = load_policy(published(tmp_path, "sdar_moe"))
    kept = sampled(causal_blocks, cache=BlockCache())
    plain = sampled(causal_blocks)
    size = max(kept.tokens.shape[1], plain.tokens.shape[1])
    wide = [x.padded(size - x.tokens.shape[1], pad_id=0) for x in (kept, plain)]
    assert torch.equal(wide[0].tokens, wide[1].tokens)
    chosen = wide[0].completion_mask
    assert torch.equal(wide[0].experts[chosen].sort().values, wide[1].experts[chosen].sort().values)


def test_nothing_is_noted_unless_it_is_asked_for(monkeypatch):
    policy = moe()
    monkeypatch.setattr(routing.Routing, "__enter__", lambda self: pytest.fail("a forward notes its experts"))
    rollout = draw(policy, prompts(), GENERATOR)
    assert rollout.experts is None
    noise = lik.Trajectory().draw_views(rollout, GENERATOR)
    lik.Trajectory().logprobs(policy, rollout, noise)
    with pytest.raises(ValueError, match=r"its sampler did not record.*router_replay=None"):
        with_sampled_experts(noise, rollout)


@pytest.mark.repeated
@pytest.mark.parametrize(
    ("layers", "whole", "rank"), [(None, False, MaxProb()), (None, False, RandomOrder()), ((0, 1), True, RandomOrder())]
)
def test_replay_removes_the_jump_of_a_router_on_a_boundary(layers, whole, rank):
    """Weights that differ by 1e-5, and a tenth of a nat: gone with the sampler's experts where the last mixture jumps,
    and with those of all tokens where every mixture does."""
    policy = moe(num_experts_per_tok=1)
    other = on_a_boundary(policy, layers)
    rollout = sampled(other, rank=rank)
    noise = lik.Trajectory().draw_views(rollout, GENERATOR)
    jump = gap(policy, rollout, noise)
    replay = with_sampled_experts(noise, rollout)
    if whole:
        seen = record_experts(policy, rollout, noise)
        lik.Trajectory().logprobs(other, rollout, seen)
        replay = with_recorded_experts(seen, rollout)
    assert jump > 0.1 and gap(policy, rollout, replay) < 1e-3 * jump
    counts = routing_metrics(routing_counts(policy, other, rollout, noise))
    assert counts["routing/agreement"] < 0.9


def views(estimator):
    policy = moe()
    other = quantized_copy(policy, int3_emulated)
    rollout = sampled(other)
    noise = estimator.draw_views(rollout, GENERATOR)
    seen = record_experts(policy, rollout, noise)
    estimator.logprobs(other, rollout, seen, micro_batch_size=2)
    return policy, other, rollout, noise, with_recorded_experts(seen, rollout)


@pytest.mark.parametrize("estimator", [lik.Trajectory(), lik.Coupled()])
@pytest.mark.repeated(first_only=True)
def test_scores_and_gradients_under_replay_are_those_of_routers_by_hand(estimator):
    policy, _, rollout, noise, replay = views(estimator)
    note = replay.features[-1].ids
    scores = estimator.view_logprobs(policy, rollout, replay, micro_batch_size=4)
    kept = estimator.view_logprobs(policy, rollout, replay, retain_graphs=True)
    torch.testing.assert_close(kept.detach(), scores, rtol=1e-5, atol=1e-5)
    vector = torch.randn(noise.coefficients.shape, generator=torch.Generator().manual_seed(1)) * (
        noise.coefficients != 0
    )
    for n, view in enumerate(each_view(replay)):
        view.backward(policy, rollout, vector[n])
    ours = [p.grad.clone() for p in policy.module.parameters() if p.grad is not None]
    policy.module.zero_grad()
    for n, view in enumerate(each_view(noise)):
        live = view.scored.any(-1)  # the others are not run
        by_hand(policy, note[n][live], rollout.attention_mask[live])
        logps = view.logprobs(policy, replace(rollout, group=torch.arange(len(rollout.tokens))))
        torch.testing.assert_close(logps.detach(), scores[n], rtol=1e-4, atol=1e-5)
        logps.backward(vector[n])
    theirs = [p.grad for p in policy.module.parameters() if p.grad is not None]
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rank", [Confidence(), PlackettLuce(temperature=0.3)], ids=["confidence", "drawn"])
@pytest.mark.repeated(first_only=True)
def test_an_update_replays_where_the_order_has_a_law(rank):
    """The backward of a view makes a forward of its own. Its gradient is that of the scores, with the experts of the
    rollout; with the learner's own experts it would be another one."""
    policy = moe()
    rollout = sampled(quantized_copy(policy, int3_emulated), rank=rank)
    estimator = lik.Trajectory()
    noise = with_sampled_experts(estimator.draw_views(rollout, GENERATOR), rollout)
    assert stayed_of(noise) is not None
    vectors = torch.randn(noise.coefficients.shape, generator=torch.Generator().manual_seed(1)) * (
        noise.coefficients != 0
    )

    def gradient(update):
        policy.module.zero_grad()
        for view, vector in zip(each_view(noise), vectors, strict=True):
            update(view, vector)
        return torch.cat([p.grad.flatten() for p in policy.module.parameters() if p.grad is not None])

    replayed = gradient(lambda view, vector: view.logprobs(policy, rollout).backward(vector))
    own = gradient(lambda view, vector: replace(view, forward=forward).logprobs(policy, rollout).backward(vector))
    updated = gradient(lambda view, vector: view.backward(policy, rollout, vector))
    torch.testing.assert_close(updated, replayed, rtol=1e-3, atol=1e-5)
    assert (own - replayed).norm() > 0.1 * replayed.norm()


def test_what_is_noted_in_scoring_is_what_routers_take_by_hand():
    estimator = lik.Coupled()
    _, other, rollout, noise, replay = views(estimator)
    note = replay.features[-1].ids
    for n, masked in enumerate(noise.masked):
        own = chosen_by_hand(other, rollout.tokens.masked_fill(masked, other.spec.mask_id), rollout.attention_mask)
        seen = rollout.attention_mask & (noise.coefficients[n] != 0).any(-1, keepdim=True)
        assert torch.equal(own[seen].sort().values, note[n][seen].long().sort().values)


def test_packed_scoring_takes_the_same_experts_as_step_by_step(tmp_path):
    policy = load_policy(published(tmp_path, "sdar_moe"))
    for name, parameter in policy.module.named_parameters():
        if ".mlp.gate." in name:
            parameter.data.mul_(8)
    other = quantized_copy(policy, int3_emulated)
    rollout = sampled(other)
    size, found = policy.spec.block_size, []
    for estimator in (lik.Trajectory(), lik.Trajectory(block_size=size)):
        noise = estimator.draw_views(rollout, GENERATOR)
        found.append(estimator.logprobs(policy, rollout, with_sampled_experts(noise, rollout)))
        found.append(estimator.logprobs(policy, rollout, noise))
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_rollouts_are_joined_padded_and_cut_with_their_experts():
    policy = moe()
    policy.records_experts = True
    parts = [draw(policy, each, GENERATOR) for each in prompts((5, 9)).split(2)]
    whole = Rollout.concatenate(parts, pad_id=0)
    wider = parts[0].padded(3, pad_id=0)
    assert torch.equal(wider.experts[:, 3:], parts[0].experts) and not wider.experts[:, :3].any()
    assert torch.equal(whole.experts[:2, : parts[0].tokens.shape[1]], parts[0].experts)
    assert torch.equal(whole.rows(torch.tensor([3, 2])).experts, whole.experts[[3, 2]])
    swapped = whole.replace_rows(torch.tensor([0, 1]), parts[1], pad_id=0)
    assert torch.equal(swapped.experts[:2], swapped.experts[2:])


def test_counts_and_metrics_by_hand():
    """Two mixtures of three experts: 3 of 4 and 4 of 4 choices are shared."""
    counts = torch.tensor([[3, 4, 2, 2, 0, 3, 1, 0], [4, 4, 1, 1, 2, 1, 1, 2]])
    metrics = routing_metrics(counts)
    assert metrics["routing/agreement"] == 7 / 8
    assert metrics["routing/agreement/layer_0"] == 0.75 and metrics["routing/agreement/layer_1"] == 1
    assert metrics["routing/max_violation/layer_0"] == pytest.approx(0.5)  # 2 against a mean of 4/3
    assert metrics["routing/max_violation"] == pytest.approx(0.5)
    assert metrics["routing/max_violation/learner/layer_0"] == metrics["routing/max_violation/learner"] == 1.25
    assert metrics["routing/idle"] == metrics["routing/idle/learner"] == 1 / 6


def test_one_row_a_prompt_is_counted_in_the_first_view():
    """Against routers by hand, whose loads differ on the two sides."""
    policy = moe()
    other = quantized_copy(policy, int3_emulated)
    rollout = draw(other, prompts(), GENERATOR)
    noise = lik.Trajectory().draw_views(rollout, GENERATOR)
    tokens, seen = rollout.tokens.masked_fill(noise.masked[0], 1)[::2], rollout.attention_mask[::2]
    theirs, ours = (chosen_by_hand(each, tokens, seen)[seen] for each in (other, policy))
    counts = routing_counts(policy, other, rollout, noise)
    for layer, row in enumerate(counts):
        assert row[2:8].tolist() == theirs[:, layer].flatten().bincount(minlength=6).tolist()
        assert row[8:].tolist() == ours[:, layer].flatten().bincount(minlength=6).tolist()
        both = [set(a.tolist()) & set(b.tolist()) for a, b in zip(ours[:, layer], theirs[:, layer], strict=True)]
        assert row[0] == sum(map(len, both)) < row[1] == 2 * len(ours)
    assert not torch.equal(counts[:, 2:8], counts[:, 8:])


def test_positions_that_are_scored_as_left_choose_for_themselves():
    policy = moe()
    rollout = sampled(policy, rank=Confidence())
    noise = lik.Trajectory().draw_views(rollout, GENERATOR)
    assert stayed_of(noise).any()
    routed = with_sampled_experts(noise, rollout).features[-1].where
    assert torch.equal(routed, torch.stack([rollout.unmask_step == n for n in range(3)]))


def test_both_sides_of_one_policy_agree():
    policy = moe()
    rollout = draw(policy, prompts(), GENERATOR)
    noise = lik.Trajectory().draw_views(rollout, GENERATOR)
    counts = routing_counts(policy, quantized_copy(policy, None), rollout, noise)
    seen = int(rollout.attention_mask[::2].sum())
    assert counts.shape == (2, 2 + 2 * 6) and (counts[:, :2] == 2 * seen).all()
    assert (counts[:, 2:8] == counts[:, 8:]).all() and (counts[:, 2:8].sum(1) == 2 * seen).all()


def test_a_router_that_names_no_choice_is_not_measured_and_the_run_goes_on():
    policy = moe()
    rollout = draw(policy, prompts(), GENERATOR)
    noise = lik.Trajectory().draw_views(rollout, GENERATOR)
    other = quantized_copy(policy, None)

    def first_two(hidden):
        scores = hidden.reshape(-1, hidden.shape[-1])[:, :6]
        return scores, scores[:, :2], torch.zeros(len(scores), 2, dtype=torch.long)

    routing.moe_layers(other.module)[0].gate.forward = first_two
    with pytest.warns(UserWarning, match=r"routing/\* is not measured: 1 of 2 MoE layers"):
        assert routing_counts(policy, other, rollout, noise) is None


def test_a_dense_model_has_nothing_to_replay():
    policy = tiny_llama(characters="123456789", causal=False, hidden_size=32, num_attention_heads=2, num_layers=1)
    check_replay(policy, None)
    with pytest.raises(ValueError, match=r"router_replay='R3' .*LlamaForCausalLM has none"):
        check_replay(policy, "R3")
    rollout = draw(policy, prompts(), GENERATOR)
    noise = lik.Trajectory().draw_views(rollout, GENERATOR)
    assert routing_counts(policy, policy, rollout, noise) is None
