"""The learner's gradient, taken mask by mask, against plain autograd through every mask at once."""

from dataclasses import replace
from functools import partial
from itertools import cycle

import pytest
import torch
from accelerate import Accelerator
from repetitions import crossed

from dllm_rl.algorithms import correctors as c
from dllm_rl.algorithms import losses
from dllm_rl.algorithms.advantages import GroupRelative
from dllm_rl.likelihoods import estimators as lik
from dllm_rl.likelihoods.views import each_view
from dllm_rl.models import logprobs as head_module
from dllm_rl.models.tiny import tiny_llama, tiny_masked_lm
from dllm_rl.quantization.aligned import aligned_forward
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import Int8WeightOnly
from dllm_rl.samplers.autoregress import Autoregress
from dllm_rl.samplers.rules import MaxProb
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.step.settings import UpdateSettings
from dllm_rl.step.update import forward_backward, update
from dllm_rl.testing import make_stats
from dllm_rl.types.rollouts import Prompts
from dllm_rl.types.scoring import Batch
from recipes.examples import bounds

SMALL = {
    "characters": "abcdefgh",
    "hidden_size": 16,
    "num_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
SMALL |= {"head_std": 0.3}
ESTIMATORS = {
    "one_step": lik.OneStep(),
    "elbo": lik.ELBO(num_samples=4, antithetic=True),
    "coupled": lik.Coupled(num_samples=2),
    "eubo": bounds.EUBO(base=lik.Coupled(num_samples=2)),
    "sandwich": bounds.Sandwich(base=lik.ELBO(num_samples=3)),
    "trajectory": lik.Trajectory(),
    "trajectory, merged": lik.Trajectory(num_segments=2),
    "causal": lik.Causal(),
}
CORRECTORS = {
    "none": c.NoCorrection(),
    "tis": c.TIS(),
    "icepop": c.IcePop(),
    "reject": c.Reject(level="token", statistic="k1", threshold=0.4),
    "ais": c.AIS(),
    "tbpo": c.TBPO(eps_high=0.1, neg_low=0.1, neg_high=0.1),
}
LOSSES = {
    "ppo": losses.PPOClip(epsilon=0.2),
    "gspo": losses.GSPO(epsilon=0.05, epsilon_high=0.05),
    "cispo": losses.CISPO(),
    "vespo": losses.VESPO(),
    "reinforce": losses.Reinforce(),
}
AGGREGATIONS = {
    "token": losses.TokenMean(),
    "sequence": losses.SequenceMean(),
    "constant": losses.FixedLengthMean(length=9),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def setting(name: str, *, policy=None):
    """A policy, its rollout, and the noise of an estimator that has been told the advantages."""
    estimator = ESTIMATORS[name]
    if policy is None:
        policy = tiny_llama(causal=True, **SMALL) if name == "causal" else tiny_masked_lm(**SMALL)
    prompts = Prompts.from_ids([[3, 4, 5, 6], [7, 8], [9]], pad_id=policy.pad_id, num_generations=4)
    if name == "causal":
        rollout = Autoregress(max_new_tokens=6)(policy, prompts, seeded(1))
    else:
        options = {"max_new_tokens": 6, "diffusion_steps": 3, "temperature": 1.0, "rank": MaxProb()}
        rollout = Unmask(**options)(policy, prompts, seeded(1))
    advantages = GroupRelative()(torch.randn(12, generator=seeded(2)), rollout.group)
    noise = estimator.with_advantages(estimator.draw_views(rollout, seeded(3)), advantages)
    return policy, estimator, rollout, noise, advantages


def make_batch(policy, estimator, rollout, noise, advantages, *, corrector, beta: float) -> tuple[Batch, torch.Tensor]:
    """A batch whose old, rollout and reference log-probs lie off the current ones, so that clips and weights bite."""
    scores = estimator.view_logprobs(policy, rollout, noise)
    current, mask = estimator.combine(scores, noise), rollout.completion_mask
    off = lambda seed, scale: scale * torch.randn(current.shape, generator=seeded(seed)) * mask  # noqa: E731
    old = current + off(4, 0.3)
    weights, keep, _ = corrector.weights(make_stats(off(5, 0.5), advantages, mask))
    return Batch(
        rollout=rollout,
        views=noise,
        advantages=advantages,
        old_logprobs=old,
        old_view_logprobs=scores,
        importance_weights=weights,
        loss_mask=keep,
        reference_logprobs=current + off(6, 0.3) if beta else None,
        num_tokens=int(keep.sum()) + 3,
        num_sequences=len(advantages) + 1,
    ), scores


def loss_of(surrogate, aggregate, *, beta: float = 0.0, entropy: float = 0.0) -> partial:
    return partial(
        losses.policy_loss, surrogate=surrogate, loss_reduction=aggregate, beta=beta, kl=losses.K3(), entropy=entropy
    )


def plain_logps(policy, estimator, rollout, noise) -> torch.Tensor:
    """One graph through every view."""
    views = [view.logprobs(policy, rollout) for view in each_view(noise)]
    return estimator.combine(torch.stack(views), noise)


def plain_gradient(policy, estimator, batch: Batch, loss: partial, *, logps=None) -> torch.Tensor:
    """Autograd's gradient through every view at once, for the loss's own gradient with respect to the log-probs.

    That one is worked by hand in test_losses; here it is only carried through the model.
    """
    logps = plain_logps(policy, estimator, batch.rollout, batch.views) if logps is None else logps
    vector = loss(logps.detach(), batch)[2]
    return flat(torch.autograd.grad(logps, parameters(policy), vector, retain_graph=True, allow_unused=True), policy)


def parameters(policy) -> list[torch.nn.Parameter]:
    return [p for p in policy.module.parameters() if p.requires_grad]


def flat(gradients, policy) -> torch.Tensor:
    pairs = zip(gradients, parameters(policy), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten().double() for g, p in pairs])


def learned(policy, batch, scores, estimator, loss, *, micro_batch_size: int | None = None) -> torch.Tensor:
    for parameter in parameters(policy):
        parameter.grad = None
    forward_backward(policy, batch, scores, loss=loss, likelihood=estimator, micro_batch_size=micro_batch_size)
    return flat([p.grad for p in parameters(policy)], policy)


def assert_same(ours: torch.Tensor, plain: torch.Tensor) -> None:
    assert plain.norm() > 1e-4  # a zero gradient would prove nothing
    assert ((ours - plain).norm() / plain.norm()).item() < 1e-5


@pytest.mark.parametrize(("name", "correction"), crossed(ESTIMATORS, CORRECTORS, row="trajectory", column="tis"))
@pytest.mark.repeated
def test_gradient_is_plain_autograds(name, correction):
    """Every loss and every aggregation; KL term, entropy bonus and micro-batch size change from case to case."""
    policy, estimator, rollout, noise, advantages = setting(name)
    logps, own = plain_logps(policy, estimator, rollout, noise), CORRECTORS[correction]
    batches = {
        beta: make_batch(policy, estimator, rollout, noise, advantages, corrector=own, beta=beta) for beta in (0.0, 0.1)
    }
    surrogates = [own.loss] if correction == "tbpo" else LOSSES.values()
    for i, (surrogate, aggregate) in enumerate(zip(surrogates, cycle(AGGREGATIONS.values()))):
        beta, size = (0.0, 0.1)[i % 2], (4, None, 8)[i % 3]
        batch, scores = batches[beta]
        loss = loss_of(surrogate, aggregate, beta=beta, entropy=(0.0, 0.2, 0.0)[i % 3])
        plain = plain_gradient(policy, estimator, batch, loss, logps=logps)
        assert_same(learned(policy, batch, scores, estimator, loss, micro_batch_size=size), plain)


VARIANTS = ("chunked head", "gradient checkpointing", "lora", "aligned", "tempered", "llada")


@pytest.mark.parametrize(
    ("variant", "name"), crossed(VARIANTS, ["coupled", "eubo", "trajectory"], row=None, column="eubo")
)
@pytest.mark.repeated
def test_gradient_survives(variant, name, monkeypatch):
    policy = tiny_llama(causal=False, **SMALL) if variant == "llada" else tiny_masked_lm(**SMALL)
    rollout_policy = quantized_copy(policy, Int8WeightOnly()) if variant == "aligned" else policy
    if variant == "chunked head":
        monkeypatch.setattr(head_module, "CHUNK_ELEMENTS", 4 * policy.vocab_size)
    if variant == "gradient checkpointing":
        policy.gradient_checkpointing = True
    if variant == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        policy.module = inject_adapter_in_model(LoraConfig(r=4, target_modules=["query", "value"]), policy.module)
        for parameter_name, parameter in policy.module.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3, generator=seeded(8))
    policy, estimator, rollout, noise, advantages = setting(name, policy=policy)
    if variant == "tempered":
        rollout = replace(rollout, sampling_params=replace(rollout.sampling_params, temperature=0.5, top_k=4))
    with aligned_forward(policy, rollout_policy) if variant == "aligned" else torch.enable_grad():
        batch, scores = make_batch(policy, estimator, rollout, noise, advantages, corrector=c.TIS(), beta=0.0)
        loss = loss_of(losses.PPOClip(), losses.TokenMean())
        plain = plain_gradient(policy, estimator, batch, loss)
        assert_same(learned(policy, batch, scores, estimator, loss, micro_batch_size=4), plain)


def test_accumulated_batches_give_the_whole_batchs_gradient():
    """Two processes' shares, or two accumulated batches, with the global counts: the sum is one batch's gradient."""
    policy, estimator, rollout, noise, advantages = setting("sandwich")
    batch, scores = make_batch(policy, estimator, rollout, noise, advantages, corrector=c.TIS(), beta=0.1)
    loss = loss_of(losses.PPOClip(), losses.SequenceMean(), beta=0.1)
    whole, total = learned(policy, batch, scores, estimator, loss), 0
    for rows in (torch.arange(4), torch.arange(4, 12)):
        share = replace(
            batch,
            rollout=rollout.rows(rows),
            views=noise.rows(rows),
            advantages=advantages[rows],
            old_logprobs=batch.old_logprobs[rows],
            old_view_logprobs=scores[:, rows],
            importance_weights=batch.importance_weights[rows],
            loss_mask=batch.loss_mask[rows],
            reference_logprobs=batch.reference_logprobs[rows],
        )
        total = total + learned(policy, share, scores[:, rows], estimator, loss)
    assert_same(total, whole)


def spying(policy, monkeypatch) -> list[int]:
    rows, hidden = [], policy.hidden
    monkeypatch.setattr(policy, "hidden", lambda tokens, mask: (rows.append(len(tokens)), hidden(tokens, mask))[1])
    return rows


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_the_first_inner_iteration_pays_no_extra_forward(num_iterations, monkeypatch):
    policy, estimator, rollout, noise, advantages = setting("coupled")
    batch, scores = make_batch(policy, estimator, rollout, noise, advantages, corrector=c.NoCorrection(), beta=0.0)
    batch = replace(batch, old_logprobs=estimator.combine(scores, noise))
    settings = {"loss": loss_of(losses.PPOClip(), losses.TokenMean()), "likelihood": estimator, "learning_rate": 1e-3}
    optimizer = torch.optim.AdamW(policy.module.parameters())
    rows = spying(policy, monkeypatch)
    metrics = update(policy, optimizer, [batch] * num_iterations, Accelerator(cpu=True), UpdateSettings(**settings))
    views = 4
    assert len(rows) == views * (1 + 2 * (num_iterations - 1))
    if num_iterations == 1:
        assert metrics["ratio/mean"] == 1.0 and metrics["clip_ratio/region_mean"] == 0.0
    else:
        assert metrics["ratio/mean"] != 1.0


def test_what_moves_nothing_is_not_forwarded(monkeypatch):
    """Rows without an advantage, and views whose tokens are all clipped, cost no forward and change no gradient."""
    policy, estimator, rollout, noise, advantages = setting("trajectory")
    advantages = advantages.clone()
    advantages[:4] = 0
    batch, scores = make_batch(policy, estimator, rollout, noise, advantages, corrector=c.NoCorrection(), beta=0.0)
    batch = replace(batch, old_logprobs=estimator.combine(scores, noise))
    loss = loss_of(losses.PPOClip(), losses.TokenMean())
    rows = spying(policy, monkeypatch)
    learned(policy, batch, scores, estimator, loss)
    assert rows[0] == 3 and rows[1:] == [8, 8]  # the shared first view is forwarded once a prompt
    clipped = replace(
        batch, old_logprobs=batch.old_logprobs - noise.coefficients[2] * torch.where(advantages[:, None] > 0, 1.0, -1.0)
    )
    rows.clear()
    ours = learned(policy, clipped, scores, estimator, loss)
    assert rows == [3, 8]
    assert_same(ours, plain_gradient(policy, estimator, clipped, loss))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move():
    policy, estimator, rollout, noise, advantages = setting("elbo")
    batch, _ = make_batch(policy, estimator, rollout, noise, advantages, corrector=c.NoCorrection(), beta=0.0)
    settings = {"loss": loss_of(losses.PPOClip(), losses.TokenMean()), "likelihood": estimator, "learning_rate": 1e-3}
    before = [p.detach().clone() for p in parameters(policy)]
    broken = replace(batch, importance_weights=batch.importance_weights.masked_fill(batch.loss_mask, torch.nan))
    with pytest.raises(FloatingPointError, match=r"gradient norm is nan at inner iteration 0"):
        update(
            policy,
            torch.optim.AdamW(policy.module.parameters()),
            [broken],
            Accelerator(cpu=True),
            UpdateSettings(**settings),
        )
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(policy), strict=True))


@pytest.mark.parametrize("num_iterations", [1, 2])
def test_bf16_autocast_sees_the_weights_of_each_inner_iteration(num_iterations):
    """Autocast keeps bf16 copies of weights for the length of its block, which the optimizer's step must not leave
    stale: the second iteration's gradient is that of the moved weights."""
    policy, estimator, rollout, noise, advantages = setting("coupled")
    with torch.autocast("cpu", torch.bfloat16):
        batch, scores = make_batch(policy, estimator, rollout, noise, advantages, corrector=c.NoCorrection(), beta=0.0)
    batch = replace(batch, old_logprobs=estimator.combine(scores, noise))
    loss = loss_of(losses.Reinforce(), losses.TokenMean())
    settings = {"loss": loss, "likelihood": estimator, "learning_rate": 0.05, "max_grad_norm": 1e9}
    optimizer = torch.optim.SGD(policy.module.parameters(), lr=0.05)
    start = [p.detach().clone() for p in parameters(policy)]
    with torch.autocast("cpu", torch.bfloat16):
        update(policy, optimizer, [batch] * num_iterations, Accelerator(cpu=True), UpdateSettings(**settings))
    ours = [p.grad.clone() for p in parameters(policy)]

    # The same steps with a block of autocast for each forward.
    with torch.no_grad():
        for p, s in zip(parameters(policy), start, strict=True):
            p.copy_(s)
    for iteration in range(num_iterations):
        if iteration:
            optimizer.step()
        with torch.autocast("cpu", torch.bfloat16):
            logps = plain_logps(policy, estimator, rollout, noise)
        plain = torch.autograd.grad(logps, parameters(policy), loss(logps.detach(), batch)[2], allow_unused=True)
        for p, g in zip(parameters(policy), plain, strict=True):
            p.grad = torch.zeros_like(p) if g is None else g
    a, b = flat(ours, policy), flat([p.grad for p in parameters(policy)], policy)
    assert ((a - b).norm() / b.norm()).item() < 0.02  # bf16 rounding of sums in another order
