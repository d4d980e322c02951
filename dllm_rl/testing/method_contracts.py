"""Check correctors and estimators against their contracts."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dllm_rl.algorithms.correctors import Corrector, FunctionCorrector, NoCorrection, TokenStats, TokenWeights
from dllm_rl.algorithms.losses import K2, Loss, PPOClip, SequenceMean, policy_loss
from dllm_rl.likelihoods.estimators import LikelihoodEstimator, recorded
from dllm_rl.models.base import Policy
from dllm_rl.records import fit
from dllm_rl.types.groups import group_sizes
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Batch, Views


def check_corrector(method: Corrector | Loss | Callable[[TokenStats], TokenWeights], *, seed: int = 0) -> None:
    """Check that a corrector, or a loss, fulfills its contract.

    Call it in a test of a custom corrector or loss.

    `weights` must return a `TokenWeights`, and read the entropy only if the corrector sets `needs_entropy`. If every
    log-ratio is exactly 0, the corrector must equal NoCorrection() bit for bit. Weights are finite, >= 0 and
    without gradient. The loss mask is a subset of the mask, without tokens whose ratio is not finite. Metrics are
    finite floats. Inputs do not change. Row order, padding and micro-batches do not matter. A batch of one row, a row
    without tokens, and a batch without tokens must work.

    Args:
        method: Corrector to check, a function as its `weights`, or a loss, which is checked without weights.
        seed: Seed of the random batches.

    Raises:
        AssertionError: A requirement is violated. The message says which.
        ValueError: `method` is not one of these.
    """
    corrector: Corrector = fit(
        "corrector", Corrector, FunctionCorrector(loss=method) if isinstance(method, Loss) else method
    )
    generator = torch.Generator().manual_seed(seed)
    for rows, length in ((6, 5), (1, 3)):  # a statistic over one row must not divide by 0
        mask = torch.rand(rows, length, generator=generator) < 0.8
        mask[0, 0] = True  # at least one token counts
        mismatch = torch.randn(rows, length, generator=generator) * 0.5
        advantages = torch.randn(rows, generator=generator)
        update = torch.randn(rows, length, generator=generator) * 0.1
        _check_on_policy(corrector, mask, advantages)
        _check_outputs(corrector, mismatch, advantages, mask)
        _check_invariance(corrector, mismatch, advantages, mask, update)
    with_empty_row = torch.tensor([True, False, True])[:, None].repeat(1, 4)
    mismatch = torch.randn(3, 4, generator=generator)
    advantages = torch.tensor([1.0, -1.0, 0.0])
    _check_outputs(corrector, mismatch, advantages, with_empty_row)
    _check_outputs(corrector, mismatch, advantages, torch.zeros_like(with_empty_row))
    _check_nonfinite(corrector, advantages)


def make_batch(
    mask: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    loss_mask: Tensor | None = None,
    **more: Any,
) -> Batch:
    """Build a Batch from the tensors that a loss reads, to test a custom loss. Other fields get dummy values.

    Args:
        mask: Completion tokens (B, T).
        advantages: Advantages (B,).
        old_logprobs: Log-probs (B, T) before the update, in nats, also used as rollout_logprobs. None: -1.
        loss_mask: Tokens (B, T) that the loss counts. None: `mask`.
        more: Other fields of Batch, which replace the dummy values.
    """
    loss_mask = mask if loss_mask is None else loss_mask
    old_logprobs = torch.full(mask.shape, -1.0) if old_logprobs is None else old_logprobs
    zeros = torch.zeros(mask.shape, dtype=torch.long)
    rollout = Rollout(zeros, torch.ones_like(mask), mask, zeros, torch.zeros(mask.shape), torch.arange(len(mask)))
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

    Log-probs before the update are -1 nat, the unmask_step is the column, and the entropy is 1. `more` replaces fields.
    """
    old = torch.full_like(log_mismatch, -1.0).detach()
    entropy = torch.ones_like(old)
    steps = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    stats = TokenStats(log_mismatch, advantages, mask, old, old - log_mismatch.detach(), steps, entropy)
    return replace(stats, **more)


def loss_of(corrector: Corrector, batch: Batch, logps: Tensor) -> tuple[Tensor, dict, Tensor]:
    """Return the loss, the metrics and the gradient with a corrector's surrogate loss (`PPOClip` if it has none)."""
    return policy_loss(
        logps, batch, surrogate=corrector.loss or PPOClip(), loss_reduction=SequenceMean(), beta=0.0, kl=K2()
    )


def _weights(corrector: Corrector, stats: TokenStats) -> TokenWeights:
    """Call `weights` as a run does: without the entropy, unless the corrector sets `needs_entropy`."""
    try:
        result = corrector.weights(stats if corrector.needs_entropy else replace(stats, entropy=None))
    except (TypeError, AttributeError) as error:  # what Python raises where None is used as a tensor
        corrector.weights(stats)  # raises the same error, unless only the entropy was missing
        raise AssertionError("weights() reads the entropy, which is None: set needs_entropy=True") from error
    is_record = isinstance(result, TokenWeights)
    assert is_record, f"weights() must return TokenWeights(weights, loss mask, metrics), not a {type(result).__name__}"
    return result


def _check_on_policy(corrector: Corrector, mask: Tensor, advantages: Tensor) -> None:
    """Check that without mismatch the corrector changes nothing."""
    zeros = torch.zeros(mask.shape)
    weights, keep, _ = _weights(corrector, make_stats(zeros, advantages, mask))
    assert torch.equal(keep, mask), "on-policy, the keep mask must be the mask"
    assert (weights[mask] == 1).all(), f"on-policy, every weight must be exactly 1, got {weights[mask]}"
    corrected = make_batch(mask, advantages, importance_weights=weights, loss_mask=keep)
    plain = make_batch(mask, advantages)
    _, _, gradient = loss_of(corrector, corrected, corrected.old_logprobs)
    _, _, plain_gradient = loss_of(NoCorrection(), plain, plain.old_logprobs)
    # Bit for bit, so that under `zero_mismatch` a run with a corrector equals the run without one. The value may be
    # another: on-policy, A log_ratio is 0 where the clipped ratio is A.
    assert torch.equal(gradient, plain_gradient), "on-policy, the gradient must be that of NoCorrection() bit for bit"


def _steps_and_entropy(mask: Tensor) -> dict[str, Tensor]:
    """Return three different steps, and entropies from 0 to 2 nats, as fields of `TokenStats`. Rows differ."""
    numbers = torch.arange(mask.numel()).view(mask.shape)
    return {"unmask_step": (numbers * 7 % 3).masked_fill(~mask, -1), "entropy": numbers * 7 % 5 / 2}


def _check_outputs(
    corrector: Corrector, mismatch: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, dict]:
    """Check shapes and ranges of the corrector's weights, keep mask and metrics; return these."""
    # The mismatch requires a gradient, so that weights which are not detached are detected.
    copies = mismatch.clone().requires_grad_(), advantages.clone(), mask.clone()
    weights, keep, metrics = _weights(corrector, make_stats(*copies, **_steps_and_entropy(mask)))
    assert weights.shape == mask.shape and keep.shape == mask.shape, "weights and keep mask must be (B, T)"
    assert not weights.requires_grad, "weights must be detached: no gradient flows through them"
    assert weights.isfinite().all() and (weights >= 0).all(), f"weights must be finite and >= 0, got {weights}"
    assert keep.dtype == torch.bool and not (keep & ~mask).any(), "the keep mask must be a boolean subset of the mask"
    is_unchanged = all(map(torch.equal, copies, (mismatch, advantages, mask)))
    assert is_unchanged, "the inputs must not be written to"
    for name, value in metrics.items():
        assert isinstance(value, float) and math.isfinite(value), f"metric {name} must be a finite float, got {value!r}"
    return weights, keep, metrics


def _check_invariance(corrector: Corrector, mismatch: Tensor, advantages: Tensor, mask: Tensor, update: Tensor) -> None:
    """Check that row order, padding and micro-batches do not matter. `update` is the change of the log-probs."""
    weights, keep, metrics = _check_outputs(corrector, mismatch, advantages, mask)
    order = torch.arange(len(mask)).flip(0)
    fields = {name: values[order] for name, values in _steps_and_entropy(mask).items()}
    reordered = make_stats(mismatch[order], advantages[order], mask[order], **fields)
    reordered_weights, reordered_keep, reordered_metrics = _weights(corrector, reordered)
    _assert_close(reordered_weights[order][mask], weights[mask], "another order of the rows must give the same weights")
    assert torch.equal(reordered_keep[order], keep), "another order of the rows must give the same keep mask"
    for name, value in metrics.items():
        assert _is_close(reordered_metrics[name], value), f"metric {name} depends on the order of the rows"

    garbage = torch.where(mask, mismatch, 7.0)  # large, so that a sum over all columns is detected
    padded = torch.cat([mask, torch.zeros_like(mask)], 1)
    off_mask = {"unmask_step": -1, "entropy": 9.0}
    fields = {
        name: torch.cat([values, torch.full_like(values, off_mask[name])], 1)
        for name, values in _steps_and_entropy(mask).items()
    }
    fields["entropy"][~padded] = off_mask["entropy"]
    wider, _, _ = _weights(corrector, make_stats(torch.cat([garbage, garbage], 1), advantages, padded, **fields))
    _assert_close(wider[:, : mask.shape[1]][mask], weights[mask], "what lies off the mask must not change the weights")

    rollout_logprobs = torch.full(mask.shape, -1.0) - torch.where(mask, mismatch, 0)
    batch = make_batch(mask, advantages, importance_weights=weights, loss_mask=keep, rollout_logprobs=rollout_logprobs)
    logps = batch.old_logprobs + update
    summed: list[Tensor] = []  # arguments of `sum_over_processes`: of the full batch, then of each micro-batch

    def record_sum(x: Tensor) -> Tensor:
        summed.append(x)
        return summed[0]

    loss, sums, gradient = loss_of(corrector, replace(batch, sum_over_processes=record_sum), logps)
    num_sums = len(summed)
    assert num_sums <= 1, "a surrogate must ask for one sum over processes, or for none"
    parts = []
    for rows in torch.arange(len(mask)).split(max(1, len(mask) // 2)):
        part = make_batch(
            mask[rows],
            advantages[rows],
            importance_weights=weights[rows],
            loss_mask=keep[rows],
            rollout_logprobs=rollout_logprobs[rows],
            # The denominators of the full batch, so that the parts' losses add up to its loss.
            num_tokens=batch.num_tokens,
            num_sequences=batch.num_sequences,
            sum_over_processes=record_sum,
        )
        parts.append(loss_of(corrector, part, logps[rows]))
    losses, parts_sums, gradients = zip(*parts, strict=True)
    if num_sums:
        _assert_close(sum(summed[1:]), summed[0], "what a surrogate sums over processes must add up")
    _assert_close(sum(losses), loss, "micro-batches must add up to the batch's loss")
    _assert_close(torch.cat(gradients), gradient, "micro-batches must give the batch's gradient")
    for name, (total, count) in sums.items():
        if name != "loss":  # the loss is already divided
            part_totals, part_counts = zip(*(part[name] for part in parts_sums), strict=True)
            adds_up = _is_close(sum(part_totals), total) and _is_close(sum(part_counts), count)
            assert adds_up, f"metric {name} must be a (sum, count) that adds up over micro-batches"
    assert (gradient[~keep] == 0).all(), "tokens outside the keep mask must get no gradient"


def _assert_close(actual: Any, expected: Tensor, requirement: str) -> None:
    # A sum in another order may round differently; 1e-5 is about a hundred roundings of fp32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=lambda message: f"{requirement}: {message}")


def _is_close(actual: Any, expected: Any) -> bool:
    return math.isclose(float(actual), float(expected), rel_tol=1e-5, abs_tol=1e-6)


def _check_nonfinite(corrector: Corrector, advantages: Tensor) -> None:
    mask = torch.ones(3, 4, dtype=torch.bool)
    mismatch = torch.zeros(3, 4)
    mismatch[0, 1] = math.inf
    mismatch[1, 2] = -math.inf
    mismatch[2, 0] = math.nan
    weights, keep, metrics = _weights(corrector, make_stats(mismatch, advantages, mask))
    assert not keep[~mismatch.isfinite()].any(), "a token whose ratio is not finite must leave the keep mask"
    assert weights.isfinite().all(), f"weights must stay finite where a ratio is not, got {weights}"
    for name, value in metrics.items():
        assert math.isfinite(value), f"metric {name}={value} must stay finite where a ratio is not"


def check_estimator(estimator: LikelihoodEstimator, policy: Policy, rollout: Rollout, *, seed: int = 0) -> None:
    """Check that a likelihood estimator fulfills its contract.

    Call it in a test of a custom `LikelihoodEstimator`.

    With the same seed, a row gets the same masks, whatever the other rows and the padding. Inputs and the global
    generator do not change. The estimator masks and scores only real tokens, and (unless causal) scores only masked
    tokens. Contributions are finite, and zero outside the completion. They do not change if they are computed again, in
    micro-batches, with padding, or in another row order. Only scores that a view counts get a gradient.

    What the estimator declares must hold: with `exact_for_sampler` the contributions are what the sampler recorded,
    with `replays_steps` a view hides what was hidden when its tokens were written, without `is_random` another seed
    gives the same masks, and without `reads_order` the views do not depend on the order's log-probs.

    Args:
        estimator: Estimator to check.
        policy: Policy that sampled the rollout.
        rollout: Rollout of at least two prompts, with completions of at least two tokens.
        seed: Seed of the views.

    Raises:
        AssertionError: A requirement is violated. The message says which.
    """

    def draw(rows: Rollout, seed: int = seed) -> Views:
        return estimator.draw_views(rows, torch.Generator().manual_seed(seed))

    rng_state = torch.get_rng_state()
    tokens = rollout.tokens.clone()
    views = draw(rollout)
    same_views = draw(rollout)
    completion = rollout.completion_mask
    groups = torch.arange(len(tokens), device=tokens.device).split(group_sizes(rollout.group))
    advantages = torch.arange(len(tokens), device=tokens.device) % 2 - 0.5  # an estimator may use the sign
    used_views = estimator.with_advantages(views, advantages)
    logps = estimator.logprobs(policy, rollout, used_views)
    assert torch.equal(torch.get_rng_state(), rng_state), "the global generator must not be used"
    assert torch.equal(rollout.tokens, tokens), "the rollout must not be written to"
    assert _same_noise(views, same_views), "the same seed must give the same masks"
    kept = zip((used_views.masked, used_views.coefficients), (views.masked, views.coefficients), strict=True)
    assert all(torch.equal(used, drawn) for used, drawn in kept), "with_advantages() must keep the masks"

    assert not (views.masked & ~rollout.attention_mask).any(), "padding must not be masked"
    assert not views.coefficients.masked_fill(completion, 0).any(), "weights must be zero off the completion"
    if policy.spec.mask_id is not None:
        visible = (views.coefficients != 0) & ~views.masked
        assert not visible.any(), "a token must be masked where it is scored: the model could read it off"
    assert logps.shape == completion.shape and logps.isfinite().all(), "contributions must be finite, (B, T)"
    assert not logps.masked_fill(completion, 0).any(), "contributions must be zero off the completion"
    assert torch.equal(estimator.logprobs(policy, rollout, used_views), logps), "on-policy, a ratio must be exactly 1"

    _check_declared(estimator, rollout, views, logps, draw)
    fewer = draw(rollout.rows(groups[0]))
    assert _same_noise(fewer, views.rows(groups[0])), "a row's masks must not depend on the rows that follow it"
    padded = rollout.padded(2, pad_id=policy.pad_id)
    wider = draw(padded)
    assert torch.equal(wider.masked[..., 2:], views.masked), "a row's masks must not depend on padding"
    tolerance: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
    actual = estimator.logprobs(policy, padded, estimator.with_advantages(wider, advantages))[:, 2:]
    torch.testing.assert_close(actual, logps, **tolerance, msg=lambda m: f"padding must not change contributions: {m}")
    actual = estimator.logprobs(policy, rollout, used_views, micro_batch_size=len(groups[0]))
    message = "micro-batches must not change contributions"
    torch.testing.assert_close(actual, logps, **tolerance, msg=lambda m: f"{message}: {m}")
    order = torch.cat(groups[::-1])  # groups stay together
    actual = estimator.logprobs(policy, rollout.rows(order), used_views.rows(order))
    message = "the order of prompts must not matter"
    torch.testing.assert_close(actual, logps[order], **tolerance, msg=lambda m: f"{message}: {m}")

    scores = estimator.view_logprobs(policy, rollout, used_views).requires_grad_()
    combined = estimator.combine(scores, used_views)
    (gradient,) = torch.autograd.grad(combined.sum(), scores)
    assert gradient.isfinite().all(), "the gradient with respect to scores must be finite"
    assert not gradient[views.coefficients == 0].any(), "a view that does not score a token must get no gradient there"
    assert gradient.any(), "combine must pass a gradient to the scores"


def _check_declared(
    estimator: LikelihoodEstimator, rollout: Rollout, views: Views, logps: Tensor, draw: Callable[..., Views]
) -> None:
    """Check what the fields of an estimator declare; `logps` are its contributions under the policy that sampled."""
    if estimator.exact_for_sampler:
        gap = (recorded(rollout, views) - logps).abs().max()
        # 1e-3 nats: forwards of other shapes round differently. A NaN fails too.
        assert gap <= 1e-3, f"exact_for_sampler=True, but a contribution is {gap:.3g} nats from the sampler's record"
    if not estimator.is_random:
        assert _same_noise(draw(rollout, seed=-1), views), "is_random=False, but another seed gives other masks"
    if not estimator.reads_order and rollout.order is not None:
        changed = draw(replace(rollout, order=replace(rollout.order, logprobs=None)))
        assert _same_noise(changed, views), "the views depend on the order's log-probs: set reads_order=True"
    if estimator.replays_steps and rollout.events is None and rollout.renoised is None:
        last = rollout.unmask_step.max()
        previous = torch.full_like(rollout.unmask_step[:, :1], -1)
        for view_masked, scored in zip(views.masked, views.coefficients != 0, strict=True):
            step = rollout.unmask_step.where(scored, last + 1).amin(-1, keepdim=True)  # last + 1 if no token is scored
            hidden = rollout.completion_mask & (rollout.unmask_step >= step)
            assert torch.equal(view_masked, hidden), "replays_steps=True, but a view is not a state of the sampler"
            assert (step > previous).all(), "replays_steps=True, but the views are not in the sampler's order"
            previous = step.where(step <= last, previous)


def _same_noise(a: Views, b: Views) -> bool:
    """Return whether masks and coefficients are equal. If one has more views (a longer trajectory), these are empty."""
    count = min(len(a.masked), len(b.masked))
    has_more = any(tensor[count:].any() for views in (a, b) for tensor in (views.masked, views.coefficients))
    return (
        torch.equal(a.masked[:count], b.masked[:count])
        and torch.equal(a.coefficients[:count], b.coefficients[:count])
        and not has_more
    )
