"""The contracts of correctors and estimators."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dllm_rl.algorithms.correctors import Corrector, TokenStats, no_correction
from dllm_rl.algorithms.losses import kl_k2, policy_loss, ppo_clip, sequence_mean
from dllm_rl.likelihoods.estimator import LikelihoodEstimator
from dllm_rl.models.base import Policy
from dllm_rl.types import Batch, Rollout, Views


def check_corrector(corrector: Corrector, *, seed: int = 0) -> None:
    """Raise AssertionError, naming the broken promise, unless the corrector fulfills its contract.

    Call it in a test of a custom corrector.

    Where every log-ratio is exactly 0, the corrector must equal `no_correction` bit for bit. Weights are finite, >= 0
    and without gradient. The loss mask is a subset of the mask and drops ratios that are not finite. Metrics are finite
    floats. Inputs do not change. Row order, padding and micro-batches do not matter. One row, a row without tokens, and
    a batch without tokens are defined.

    Args:
        corrector: Corrector to check.
        seed: Seed of the random batches.

    Raises:
        AssertionError: A promise is broken.
    """
    generator = torch.Generator().manual_seed(seed)
    for rows, length in ((6, 5), (1, 3)):  # a statistic over one row must not divide by 0
        mask = torch.rand(rows, length, generator=generator) < 0.8
        mask[0, 0] = True  # at least one token counts
        mismatch = torch.randn(rows, length, generator=generator) * 0.5
        advantages = torch.randn(rows, generator=generator)
        step = torch.randn(rows, length, generator=generator) * 0.1
        _neutral(corrector, mask, advantages)
        _sound(corrector, mismatch, advantages, mask)
        _symmetric(corrector, mismatch, advantages, mask, step)
    empty = torch.tensor([True, False, True])[:, None].repeat(1, 4)  # a row without tokens
    mismatch = torch.randn(3, 4, generator=generator)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    _sound(corrector, mismatch, advantages, empty)
    _sound(corrector, mismatch, advantages, torch.zeros_like(empty))
    _drops_nonfinite(corrector, advantages)


def make_batch(
    mask: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    loss_mask: Tensor | None = None,
    **more: Any,
) -> Batch:
    """Build a Batch around the tensors that a loss reads, to test a custom loss.

    Args:
        mask: Completion tokens (B, T).
        advantages: Advantages (B,).
        old_logprobs: Log-probs (B, T) before the update, in nats; they are the rollout's too. None: -1.
        loss_mask: Tokens (B, T) that the loss counts. None: `mask`.
        more: Fields of Batch that replace the blanks.
    """
    loss_mask = mask if loss_mask is None else loss_mask
    old_logprobs = torch.full(mask.shape, -1.0) if old_logprobs is None else old_logprobs
    blank = torch.zeros(mask.shape, dtype=torch.long)
    rollout = Rollout(blank, torch.ones_like(mask), mask, blank, torch.zeros(mask.shape), group_size=1)
    views = Views(mask[None], mask[None].float())
    ones = torch.ones(mask.shape)
    batch = Batch(
        rollout,
        views,
        advantages,
        old_logprobs,
        old_logprobs[None],
        ones,
        loss_mask,
        None,
        int(loss_mask.sum()),
        len(mask),
    )
    return replace(batch, **{"rollout_logprobs": old_logprobs, **more})


def make_stats(log_mismatch: Tensor, advantages: Tensor, mask: Tensor, **more: Any) -> TokenStats:
    """Build the `TokenStats` of a batch, to test a custom corrector.

    Log-probs are about -1 nat, each column is a step, and the entropy is 1. `more` replaces fields.
    """
    old = torch.full_like(log_mismatch, -1.0).detach()
    entropy = torch.ones_like(old)
    steps = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    blank = TokenStats(log_mismatch, advantages, mask, old, old - log_mismatch.detach(), steps, entropy)
    return replace(blank, **more)


def loss_of(corrector: Corrector, batch: Batch, logps: Tensor) -> tuple[Tensor, dict, Tensor]:
    """Return the loss, the metrics and the gradient of a corrector's surrogate (default: `ppo_clip`)."""
    return policy_loss(
        logps, batch, surrogate=corrector.loss or ppo_clip, loss_reduction=sequence_mean, beta=0.0, kl=kl_k2
    )


def _neutral(corrector: Corrector, mask: Tensor, advantages: Tensor) -> None:
    zeros = torch.zeros(mask.shape)
    weights, keep, _ = corrector.weight_fn(make_stats(zeros, advantages, mask))
    assert torch.equal(keep, mask), "on-policy, the keep mask must be the mask"
    assert (weights[mask] == 1).all(), f"on-policy, every weight must be exactly 1, got {weights[mask]}"
    ours = make_batch(mask, advantages, importance_weights=weights, loss_mask=keep)
    plain = make_batch(mask, advantages)
    loss, _, gradient = loss_of(corrector, ours, ours.old_logprobs)
    wanted, _, slope = loss_of(no_correction(), plain, plain.old_logprobs)
    # Bit for bit: under zero_mismatch a run with a corrector is then the run without one. Unquantized rollouts only
    # agree with the learner up to rounding, and so do the two runs.
    assert torch.equal(loss, wanted), f"on-policy, the loss must be that of none() bit for bit: {loss} against {wanted}"
    assert torch.equal(gradient, slope), "on-policy, the gradient must be that of none() bit for bit"


def _facts(mask: Tensor) -> dict[str, Tensor]:
    """Return steps of a few tokens each, and entropies from 0 to 2 nats, which differ between rows."""
    numbers = torch.arange(mask.numel()).view(mask.shape)
    return {"unmask_step": (numbers * 7 % 3).masked_fill(~mask, -1), "entropy": numbers * 7 % 5 / 2}


def _sound(corrector: Corrector, mismatch: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict]:
    copies = mismatch.clone().requires_grad_(), advantages.clone(), mask.clone()  # a gradient would show in weights
    weights, keep, metrics = corrector.weight_fn(make_stats(*copies, **_facts(mask)))
    assert weights.shape == mask.shape and keep.shape == mask.shape, "weights and keep mask must be (B, T)"
    assert not weights.requires_grad, "weights must be detached: no gradient flows through them"
    assert weights.isfinite().all() and (weights >= 0).all(), f"weights must be finite and >= 0, got {weights}"
    assert keep.dtype == torch.bool and not (keep & ~mask).any(), "the keep mask must be a boolean subset of the mask"
    kept = all(map(torch.equal, copies, (mismatch, advantages, mask)))
    assert kept, "the inputs must not be written to"
    for name, value in metrics.items():
        assert isinstance(value, float) and math.isfinite(value), f"metric {name} must be a finite float, got {value!r}"
    return weights, keep, metrics


def _symmetric(corrector: Corrector, mismatch: Tensor, advantages: Tensor, mask: Tensor, step: Tensor) -> None:
    weights, keep, metrics = _sound(corrector, mismatch, advantages, mask)
    order = torch.arange(len(mask)).flip(0)
    facts = {name: values[order] for name, values in _facts(mask).items()}
    turned, kept, again = corrector.weight_fn(make_stats(mismatch[order], advantages[order], mask[order], **facts))
    _same(turned[order][mask], weights[mask], "another order of the rows must give the same weights")
    assert torch.equal(kept[order], keep), "another order of the rows must give the same keep mask"
    for name, value in metrics.items():
        assert _near(again[name], value), f"metric {name} depends on the order of the rows"

    garbage = torch.where(mask, mismatch, 7.0)  # large, so that a sum over all columns would show it
    padded = torch.cat([mask, torch.zeros_like(mask)], 1)
    off_mask = {"unmask_step": -1, "entropy": 9.0}
    facts = {name: torch.cat([x, torch.full_like(x, off_mask[name])], 1) for name, x in _facts(mask).items()}
    facts["entropy"][~padded] = off_mask["entropy"]
    wider, _, _ = corrector.weight_fn(make_stats(torch.cat([garbage, garbage], 1), advantages, padded, **facts))
    _same(wider[:, : mask.shape[1]][mask], weights[mask], "what lies off the mask must not change the weights")

    behavior = torch.full(mask.shape, -1.0) - torch.where(mask, mismatch, 0)
    batch = make_batch(mask, advantages, importance_weights=weights, loss_mask=keep, rollout_logprobs=behavior)
    logps = batch.old_logprobs + step
    asked: list[Tensor] = []  # the sums over processes that a surrogate asks for: of the full batch, then of each part

    def of_all(x: Tensor) -> Tensor:
        asked.append(x)
        return asked[0]

    loss, sums, gradient = loss_of(corrector, replace(batch, sum_over_processes=of_all), logps)
    whole = len(asked)
    assert whole <= 1, "a surrogate must ask for one sum over processes, or for none"
    parts = []
    for rows in torch.arange(len(mask)).split(max(1, len(mask) // 2)):
        some = {"importance_weights": weights[rows], "loss_mask": keep[rows], "rollout_logprobs": behavior[rows]}
        part = make_batch(mask[rows], advantages[rows], **some)
        # The denominators of the full batch, so that the parts' losses add up to its loss.
        part = replace(part, num_tokens=batch.num_tokens, num_sequences=batch.num_sequences, sum_over_processes=of_all)
        parts.append(loss_of(corrector, part, logps[rows]))
    losses, parts_sums, gradients = zip(*parts, strict=True)
    if whole:
        _same(sum(asked[1:]), asked[0], "what a surrogate sums over processes must add up")
    _same(sum(losses), loss, "micro-batches must add up to the batch's loss")
    _same(torch.cat(gradients), gradient, "micro-batches must give the batch's gradient")
    for name, (total, count) in sums.items():
        if name != "loss":  # the loss is already divided
            above, below = zip(*(part[name] for part in parts_sums), strict=True)
            adds_up = _near(sum(above), total) and _near(sum(below), count)
            assert adds_up, f"metric {name} must be a (sum, count) that adds up over micro-batches"
    assert (gradient[~keep] == 0).all(), "tokens outside the keep mask must get no gradient"


def _same(found: Any, wanted: Tensor, what: str) -> None:
    # The same sums in another order: 1e-5 is a hundred roundings of fp32.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6, msg=lambda message: f"{what}: {message}")


def _near(found: Any, wanted: Any) -> bool:
    return math.isclose(float(found), float(wanted), rel_tol=1e-5, abs_tol=1e-6)


def _drops_nonfinite(corrector: Corrector, advantages: Tensor) -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    mismatch = torch.zeros(3, 4)
    mismatch[0, 1] = math.inf
    mismatch[1, 2] = -math.inf
    mismatch[2, 0] = math.nan
    weights, keep, metrics = corrector.weight_fn(make_stats(mismatch, advantages, mask))
    assert not keep[~mismatch.isfinite()].any(), "a token whose ratio is not finite must leave the keep mask"
    assert weights.isfinite().all(), f"weights must stay finite where a ratio is not, got {weights}"
    for name, value in metrics.items():
        assert math.isfinite(value), f"metric {name}={value} must stay finite where a ratio is not"


def check_estimator(estimator: LikelihoodEstimator, policy: Policy, rollout: Rollout, *, seed: int = 0) -> None:
    """Raise AssertionError, naming the broken promise, unless the estimator fulfills its contract.

    Call it in a test of a custom `LikelihoodEstimator`.

    The same seed gives a row the same masks, whatever the other rows and the padding; inputs and the global generator
    do not change. The estimator masks and scores only real tokens, and (unless causal) scores only masked tokens.
    Contributions are finite, zero off the completion, and the same twice, in micro-batches, padded or reordered.
    Gradients reach only what a view scores.

    Args:
        estimator: Estimator to check.
        policy: Policy that sampled the rollout.
        rollout: Rollout of at least two prompts, with completions of at least two tokens.
        seed: Seed of the views.

    Raises:
        AssertionError: A promise is broken.
    """

    def draw(rows: Rollout) -> Views:
        return estimator.draw_views(rows, torch.Generator().manual_seed(seed))

    before = torch.get_rng_state()
    tokens = rollout.tokens.clone()
    views = draw(rollout)
    again = draw(rollout)
    completion = rollout.completion_mask
    group = rollout.group_size
    advantages = torch.arange(len(tokens), device=tokens.device) % 2 - 0.5  # both signs: an estimator may differ
    told = estimator.with_advantages(views, advantages)
    logps = estimator.logprobs(policy, rollout, told)
    assert torch.equal(torch.get_rng_state(), before), "the global generator must not be used"
    assert torch.equal(rollout.tokens, tokens), "the rollout must not be written to"
    assert _same_noise(views, again), "the same seed must give the same masks"
    assert told.masked is views.masked and told.coefficients is views.coefficients, (
        "with_advantages() must keep the masks"
    )

    assert not (views.masked & ~rollout.attention_mask).any(), "padding must not be masked"
    assert not views.coefficients.masked_fill(completion, 0).any(), "weights must be zero off the completion"
    if policy.spec.mask_id is not None:
        seen = (views.coefficients != 0) & ~views.masked
        assert not seen.any(), "a token must be masked where it is scored: the model could read it off"
    assert logps.shape == completion.shape and logps.isfinite().all(), "contributions must be finite, (B, T)"
    assert not logps.masked_fill(completion, 0).any(), "contributions must be zero off the completion"
    assert torch.equal(estimator.logprobs(policy, rollout, told), logps), "on-policy, a ratio must be exactly 1"

    first = torch.arange(group, device=tokens.device)
    fewer = draw(rollout.rows(first))
    assert _same_noise(fewer, views.rows(first)), "a row's masks must not depend on the rows that follow it"
    padded = rollout.padded(2, pad_id=policy.pad_id)
    wider = draw(padded)
    assert torch.equal(wider.masked[..., 2:], views.masked), "a row's masks must not depend on padding"
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    found = estimator.logprobs(policy, padded, estimator.with_advantages(wider, advantages))[:, 2:]
    torch.testing.assert_close(found, logps, **near, msg=lambda m: f"padding must not change contributions: {m}")
    parts = estimator.logprobs(policy, rollout, told, micro_batch_size=group)
    torch.testing.assert_close(parts, logps, **near, msg=lambda m: f"micro-batches must not change contributions: {m}")
    order = torch.arange(len(tokens), device=tokens.device).view(-1, group).flip(0).flatten()  # groups stay together
    turned = estimator.logprobs(policy, rollout.rows(order), told.rows(order))
    torch.testing.assert_close(turned, logps[order], **near, msg=lambda m: f"the order of prompts must not matter: {m}")

    scores = estimator.view_logprobs(policy, rollout, told).requires_grad_()
    combined = estimator.combine(scores, told)
    (gradient,) = torch.autograd.grad(combined.sum(), scores)
    assert gradient.isfinite().all(), "the gradient with respect to scores must be finite"
    assert not gradient[views.coefficients == 0].any(), "a view that does not score a token must get no gradient there"
    assert gradient.any(), "combine must pass a gradient to the scores"


def _same_noise(a: Views, b: Views) -> bool:
    """Return whether masks and weights are equal. Surplus views must be empty (a trajectory's length may differ)."""
    few = min(len(a.masked), len(b.masked))
    surplus = a.masked[few:].any() or a.coefficients[few:].any() or b.masked[few:].any() or b.coefficients[few:].any()
    return (
        torch.equal(a.masked[:few], b.masked[:few])
        and torch.equal(a.coefficients[:few], b.coefficients[:few])
        and not surplus
    )
