"""The loss of an update: surrogates, KL terms, reductions, and `policy_loss`, which adds them up.

A surrogate (`Loss`) is a per-token objective (B, T) to be maximized. Its arguments are log_ratio (B, T), advantages
(B,), mask (B, T) and, by name, the SURROGATE_INPUTS that it declares. log_ratio = logp_current - logp_old, in nats; 0
outside the mask. A surrogate sees all rows of its process, regardless of micro-batches. SURROGATE_INPUTS:

- old_logprobs: (B, T) log-probs in the denominator of the ratios, in nats; 0 outside the mask.
- log_mismatch: (B, T) logp_old - logp_rollout, in nats; 0 outside the mask.
- inverse_chances: (B, T) 1 / the chance with which the token's denoising step was drawn, 0 for tokens that were not
  scored; None if all were. Weight sums over a row's tokens by it (`row_mean` does). `policy_loss` multiplies the
  objective of each token by it, so that a loss that treats each token by itself need not read it.
- sum_over_processes: Function that sums a tensor over all processes; every process calls it once, with equal shapes.

A reduction returns the coefficient of each token (B, T) in the loss; the counts in its arguments cover the GLOBAL
batch. docs/papers.md explains the tags [paper], [digest] and [ours].
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dllm_rl.records import FunctionRecord, Record, describe, fit, option
from dllm_rl.types.batch_record import copy_of
from dllm_rl.types.groups import group_numbers
from dllm_rl.types.scoring import Batch

MAX_LOG = 20.0  # log-ratios are clamped to +-20 before exp
# The width of a band around the ratio 1. A narrower one would be closed in float32, and the gradient lost at ratio 1.
WIDTH = 1e-6
SURROGATE_INPUTS = ("old_logprobs", "log_mismatch", "inverse_chances", "sum_over_processes")


class Loss(Record):
    """A surrogate: the per-token objective of the policy gradient, to be maximized.

    Subclass it for a custom objective: write its settings as fields and override `__call__`. Where a loss is expected,
    a plain function of (log_ratio, advantages, mask), and of any SURROGATE_INPUTS by name, is one too.
    """

    inputs: ClassVar[frozenset[str]] = frozenset()  # the SURROGATE_INPUTS that `__call__` takes by name
    reads_ratio: ClassVar[bool] = True  # whether the gradient depends on the old log-probs

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "__call__" in vars(cls) and "reads_ratio" not in vars(cls):  # it says nothing of another objective
            cls.reads_ratio = True

    def __call__(self, *arguments: Any, **inputs: Any) -> Float[Tensor, "B T"]:
        """Return the objective of each token (B, T).

        Args:
            *arguments: log_ratio, logp_current - logp_old (B, T), in nats; advantages, one of each row (B,); mask, the
                tokens in the loss (B, T).
            **inputs: The declared SURROGATE_INPUTS.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(log_ratio, advantages, mask)")


class FunctionLoss(FunctionRecord, Loss):
    """A loss that a function computes.

    Args:
        function: Function (log_ratio, advantages, mask) -> objective (B, T). Further parameters without a default are
            SURROGATE_INPUTS.

    Raises:
        ValueError: The function requires another input.
    """

    def check(self) -> None:
        parameters = list(inspect.signature(self.function).parameters.values())[3:]  # after the three of every loss
        for p in parameters:
            optional = p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            if p.name not in SURROGATE_INPUTS and not optional:
                raise ValueError(
                    f"the loss takes {p.name!r}, which is not one of {', '.join(SURROGATE_INPUTS)}; make it a field of "
                    "a Loss, or bind it with functools.partial"
                )

    @property
    def inputs(self) -> frozenset[str]:  # type: ignore[override]
        parameters = list(inspect.signature(self.function).parameters.values())[3:]
        return frozenset(p.name for p in parameters if p.default is p.empty and p.name in SURROGATE_INPUTS)


class PPOClip(Loss):
    """PPO's clipped ratio: min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) per token, with r = exp(log_ratio).

    This is the default loss. Source: PPO, GRPO [paper].

    Args:
        epsilon: Lower clip: the ratio is clipped at 1 - epsilon. Default: 0.2.
        epsilon_high: Upper clip: the ratio is clipped at 1 + epsilon_high (DAPO: larger than epsilon). None (default):
            epsilon.
        delta: Upper limit of the ratio in r A (two-sided clipping), at least 1 + epsilon_high. It matters for A < 0,
            where the ratio is otherwise unlimited. None (default): no limit.
    """

    epsilon: float = option(default=0.2, at_least=WIDTH)
    epsilon_high: float | None = option(default=None, at_least=WIDTH)
    delta: float | None = option(default=None, at_least=1)

    def check(self) -> None:
        upper_name = "epsilon" if self.epsilon_high is None else "epsilon_high"
        min_delta = 1 + getattr(self, upper_name)
        if self.delta is not None and self.delta < min_delta - 1e-6:  # a sum of decimals may be rounded
            raise ValueError(
                f"delta={self.delta} must be at least 1 + {upper_name}={min_delta:g}: a smaller one would clip ratios "
                "of positive advantages too"
            )

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Float[Tensor, "B T"]:
        return clipped_objective(exp_ratio(log_ratio), advantages, self.epsilon, self.epsilon_high, self.delta)


def clipped_objective(
    ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    epsilon: float,
    epsilon_high: float | None,
    delta: float | None = None,
) -> Float[Tensor, "B T"]:
    """Compute min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A); `PPOClip` explains the arguments."""
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    if delta is not None:  # for A < 0 the minimum below selects the unclipped ratio
        ratio = ratio.clamp(max=delta)
    return torch.minimum(ratio * advantages[:, None], clipped * advantages[:, None])


class GSPO(Loss):
    """`PPOClip` with one ratio per row, r = exp(mean_t log_ratio), the mean over the mask.

    Use it if ratios of single tokens are noisy. Source: GSPO [paper].

    Args:
        epsilon: Lower clip: the ratio is clipped at 1 - epsilon. Default: 3e-4.
        epsilon_high: Upper clip: the ratio is clipped at 1 + epsilon_high. None: epsilon. Default: 4e-4.
    """

    epsilon: float = option(default=3e-4, at_least=WIDTH)
    epsilon_high: float | None = option(default=4e-4, at_least=WIDTH)

    inputs = frozenset({"inverse_chances"})

    def __call__(
        self, log_ratio: Tensor, advantages: Tensor, mask: Tensor, inverse_chances: Tensor | None = None
    ) -> Float[Tensor, "B T"]:
        ratio = exp_ratio(row_mean(log_ratio, mask, inverse_chances))
        return clipped_objective(ratio, advantages, self.epsilon, self.epsilon_high)


class TrustBand(Loss):
    """TBPO's objective r^ A, where r^ is the row's ratio r = exp(mean_t log_ratio), clamped to a band.

        A >= 0:  r^ = clamp(r, 0, 1 + eps_high)        A < 0:  r^ = clamp(r, 1 - neg_low, 1 + neg_high)

    The gradient is zero outside the band. There is no outer minimum as in PPO, which would leave the ratio unbounded
    for A < 0. The paper averages over sequences, as `SequenceMean` does; the corrector `TBPO` sets this objective and
    this reduction.

    Args:
        eps_high: Clamp the ratio at 1 + eps_high if the advantage is not negative. Default: 4e-4.
        neg_low: Clamp the ratio from below at 1 - neg_low if the advantage is negative. Default: 3e-4.
        neg_high: Clamp the ratio from above at 1 + neg_high if the advantage is negative. Default: 7e-4.

    Source: QaRL, arXiv 2604.07853 [digest].
    """

    eps_high: float = option(default=4e-4, at_least=WIDTH)
    neg_low: float = option(default=3e-4, at_least=WIDTH)
    neg_high: float = option(default=7e-4, at_least=WIDTH)

    inputs = frozenset({"inverse_chances"})

    def __call__(
        self, log_ratio: Tensor, advantages: Tensor, mask: Tensor, inverse_chances: Tensor | None = None
    ) -> Float[Tensor, "B T"]:
        ratio = exp_ratio(row_mean(log_ratio, mask, inverse_chances))
        for_nonnegative = ratio.clamp(0, 1 + self.eps_high)
        for_negative = ratio.clamp(1 - self.neg_low, 1 + self.neg_high)
        advantages = advantages[:, None]
        return torch.where(advantages >= 0, for_nonnegative, for_negative) * advantages


class CISPO(Loss):
    """sg(min(r, max_ratio)) A log_ratio: a policy gradient weighted by the capped ratio (sg: stop-gradient).

    Use it if every token should have a gradient. The paper multiplies by logp_current; log_ratio has the same gradient,
    and makes the value 0 on-policy. Source: CISPO [paper].

    Args:
        max_ratio: Largest ratio (TRL's `epsilon_high`), above 0. One below 1 is hardly more than a factor of the
            gradient. Default: 5.
    """

    max_ratio: float = option(default=5.0, above=0)

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Float[Tensor, "B T"]:
        return exp_ratio(log_ratio.detach()).clamp(max=self.max_ratio) * advantages[:, None] * log_ratio


class VESPO(Loss):
    """sg(phi(w)) A log_ratio, where w is the row's ratio and phi(w) = e^lam w^k e^(-lam w) (sg: stop-gradient).

    phi(1) = 1; phi is largest at w = k / lam and falls to 0 on both sides. VESPO's w is p_current / p_rollout, as in
    this library with old_logprobs="rollout". Otherwise w is p_current / p_old, and the corrector's weights multiply
    phi(w) [ours].

    Args:
        k_pos: k if the advantage is not negative, above 0. Default: 2.
        lam_pos: lam if the advantage is not negative, above 0. Default: 3.
        k_neg: k if the advantage is negative, above 0. Default: 3.
        lam_neg: lam if the advantage is negative, above 0. Default: 2.

    Source: VESPO, arXiv 2602.10693 [paper].
    """

    k_pos: float = option(default=2.0, above=0)
    lam_pos: float = option(default=3.0, above=0)
    k_neg: float = option(default=3.0, above=0)
    lam_neg: float = option(default=2.0, above=0)

    def check(self) -> None:
        """Raise ValueError if the largest weight phi exceeds e^MAX_LOG, for log w in +-MAX_LOG."""
        for sign in ("pos", "neg"):
            k, lam = getattr(self, f"k_{sign}"), getattr(self, f"lam_{sign}")
            log_w = min(max(math.log(k) - math.log(lam), -MAX_LOG), MAX_LOG)
            log_phi = lam + k * log_w - lam * math.exp(log_w)
            if log_phi > MAX_LOG:
                raise ValueError(
                    f"k_{sign}={k} and lam_{sign}={lam} give weights up to e^{log_phi:.3g}, more than "
                    f"e^{MAX_LOG:g}: choose smaller ones, closer to each other"
                )

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Float[Tensor, "B T"]:
        # Detached: phi is only a weight of the gradient of log p.
        log_w = torch.where(mask, log_ratio.detach(), 0).sum(-1, keepdim=True).clamp(-MAX_LOG, MAX_LOG)
        positive = (advantages >= 0)[:, None]
        k = torch.where(positive, self.k_pos, self.k_neg)
        lam = torch.where(positive, self.lam_pos, self.lam_neg)
        return (lam + k * log_w - lam * log_w.exp()).exp() * advantages[:, None] * log_ratio


class SAPO(Loss):
    """(4 / tau) sigmoid(tau (r - 1)) A: a soft gate instead of PPO's clip, with r = exp(log_ratio) per token.

    Use it if the gradient should fade as a ratio leaves 1, instead of ending at a bound. At r = 1 it is that of r A.

    Args:
        temperature_pos: tau if the advantage is above 0; a larger one lets the gradient fade faster. At least 1e-3:
            in float32 the constant 2 / tau of a smaller one hides the ratio. Default: 1.
        temperature_neg: tau if the advantage is not above 0. Default: 1.05.

    Source: SAPO, arXiv 2511.20347 [digest].
    """

    temperature_pos: float = option(default=1.0, at_least=1e-3)
    temperature_neg: float = option(default=1.05, at_least=1e-3)

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Float[Tensor, "B T"]:
        tau = torch.where(advantages > 0, self.temperature_pos, self.temperature_neg)[:, None]
        return torch.sigmoid(tau * (exp_ratio(log_ratio) - 1)) * 4 / tau * advantages[:, None]


class OffPolicyMask(Loss):
    """Another loss without the rows of negative advantage that left the policy that sampled them.

    Use it if several updates per rollout, or stale or quantized rollouts, push answers down that the policy would no
    longer give. A row is left out if A < 0 and the mean over its tokens of logp_rollout - logp_current exceeds the
    threshold.

    Args:
        loss: The loss of the other rows.
        threshold: Largest mean difference, in nats per token, of a row with a negative advantage.
        since: Policy of the difference's first term: "rollout", or "old", the learner before the step's first update,
            for likelihoods that do not estimate the sampler's probabilities. Default: "rollout".

    Source: DeepSeek-V3.2, arXiv 2512.02556, eq. 9 [digest].
    """

    loss: Loss = PPOClip()
    threshold: float = option(default=0.5, at_least=0)
    since: Literal["rollout", "old"] = "rollout"

    @property
    def inputs(self) -> frozenset[str]:  # type: ignore[override]
        own = {"log_mismatch"} if self.since == "rollout" else set()
        return self.loss.inputs | own | ({"inverse_chances"} if takes_drawn_steps(self.loss) else set())

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor, **inputs: Any) -> Float[Tensor, "B T"]:
        drift = -log_ratio.detach()
        if self.since == "rollout":
            drift = drift - inputs["log_mismatch"]
        mean_drift = mean_over_tokens(drift, mask, inputs.get("inverse_chances"))[:, 0]
        is_left_out = (advantages < 0) & (mean_drift > self.threshold)
        read = {name: value for name, value in inputs.items() if name in self.loss.inputs}
        return torch.where(is_left_out[:, None], 0, self.loss(log_ratio, advantages, mask, **read))


class Reinforce(Loss):
    """A log_ratio, whose gradient is the plain policy gradient A grad log p, without a ratio or a clip.

    Nothing bounds the change over several updates per rollout. Without a corrector, the masks of the later updates are
    not scored before the first one, and these updates have no metrics off_policy/* and ratio/mean.
    """

    reads_ratio = False

    def __call__(self, log_ratio: Tensor, advantages: Tensor, mask: Tensor) -> Float[Tensor, "B T"]:
        return advantages[:, None] * log_ratio


def mean_over_tokens(
    values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], inverse_chances: Float[Tensor, "B T"] | None = None
) -> Float[Tensor, "B 1"]:
    """Return each row's mean over the mask, 0 without tokens. With `inverse_chances` it is weighted by them, and
    estimates the mean over all tokens from those whose step was drawn.
    """
    weights = mask if inverse_chances is None else torch.where(mask, inverse_chances, 0).to(values)
    total = torch.where(mask, values if inverse_chances is None else values * weights, 0).sum(-1, keepdim=True)
    return total / weights.sum(-1, keepdim=True).clamp(min=1)


def row_mean(
    log_ratio: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], inverse_chances: Float[Tensor, "B T"] | None = None
) -> Float[Tensor, "B T"]:
    """Return the row's mean of log_ratio (`mean_over_tokens`) at every position of the mask; 0 outside the mask.

    The gradient is not that of a mean: each position of the result passes its gradient to its own log_ratio only.
    """
    masked_ratio = torch.where(mask, log_ratio, 0)
    mean = mean_over_tokens(masked_ratio.detach(), mask, inverse_chances)
    # If the loss's coefficients are constant in a row, these gradients add up to the gradient of the mean, without the
    # rounding of a sum over T and its division [ours].
    return torch.where(mask, mean + (masked_ratio - masked_ratio.detach()), 0)


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """Return exp(log_ratio), with log_ratio clamped to +-MAX_LOG."""
    return log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()


class KL(Record):
    """An estimator of the KL term from d = logp_reference - logp_current (B, T), in nats.

    Where a KL estimator is expected, a plain function of d is one too.

    Args:
        bias_correction: Whether to multiply each token's term by its ratio to the rollout, with the ratio's gradient
            (`bias_corrected_kl`). Default: False.
    """

    bias_correction: bool = False

    def __call__(self, log_ratio: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Compute the estimate of each token, in nats; `log_ratio` is d."""
        raise TypeError(f"{type(self).__name__} must define __call__(log_ratio)")


class FunctionKL(FunctionRecord, KL):
    """A KL estimator that a function computes.

    Args:
        function: Function of d (B, T), in nats.
    """


class K1(KL):
    """k1 = -d: unbiased for KL(current || reference).

    In a loss use `K2` or `K3`: on-policy, the expected gradient of k1 is 0, like that of any log-prob [ours].
    """

    def __call__(self, log_ratio: Tensor) -> Float[Tensor, "B T"]:
        return -log_ratio


class K2(KL):
    """k2 = d^2 / 2.

    Use it if log-probs are ELBOs, for which it is stable (ESPO [paper]). On-policy its expected gradient is that of
    KL(current || reference) of each token given the tokens before it; how a token changes the KL of later tokens is
    left out.
    """

    def __call__(self, log_ratio: Tensor) -> Float[Tensor, "B T"]:
        return log_ratio.square() / 2


class K3(KL):
    """k3 = exp(d) - 1 - d.

    It is the default: unbiased for KL(current || reference), and never negative. Source: GRPO [paper].
    """

    def __call__(self, log_ratio: Tensor) -> Float[Tensor, "B T"]:
        # The second term is not clamped, so that a gradient remains beyond MAX_LOG.
        return torch.expm1(log_ratio.clamp(-MAX_LOG, MAX_LOG)) - log_ratio


def bias_corrected_kl(
    log_ratio: Float[Tensor, "B T"],
    *,
    kl: KL | Callable[[Tensor], Tensor],
    rollout_log_ratio: Float[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """Multiply a KL estimate by p_current / p_rollout, and differentiate this ratio too.

    `policy_loss` uses it for a KL estimator with `bias_correction=True`. The expected gradient is then that of
    KL(current || reference) of each token given the tokens before it, even if other weights made the rollouts. For a
    row of one token this is the gradient of the row's KL. For longer rows, how a token changes the KL of later tokens
    is left out, and the tokens before are as frequent as in the rollouts. In an enumerated example of two tokens
    (tests/algorithms/test_losses.py) the gradient differs from that of the row's KL by 0.12 of its norm on-policy and
    by 0.57 off-policy [ours]. Source: DeepSeek-V3.2, arXiv 2512.02556, eq. 7 [digest].

    Args:
        log_ratio: logp_reference - logp_current (B, T), in nats.
        kl: Estimator of the KL term, such as K3().
        rollout_log_ratio: logp_current - logp_rollout (B, T), in nats; `policy_loss` passes it.

    Returns:
        The corrected estimate of each token (B, T), in nats.
    """
    return kl(log_ratio) * rollout_log_ratio.clamp(-MAX_LOG, MAX_LOG).exp()


def entropy_bonus(
    logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    group: Int[Tensor, " B"],
    inverse_chances: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Compute (-sg(log p) - b) log p: an objective that raises the entropy H, in nats, from the sampled tokens only.

    sg is stop-gradient, and H the entropy of a token given the tokens before it. b is a baseline: the mean of -log p
    over the tokens of the prompt's OTHER completions, or 0 without others. For every b that does not depend on the row,
    the expected gradient is the gradient of H (score function; exact only on-policy); how a token changes the entropy
    of later tokens is left out. Without b, the noise of the gradient lowers the entropy [ours].
    """
    surprise = torch.where(mask, -logps.detach(), 0)
    counted = mask if inverse_chances is None else torch.where(mask, inverse_chances, 0).to(logps)
    number = group_numbers(group)

    def of_others(values: Tensor) -> Tensor:  # including the row would make the baseline depend on it
        return torch.zeros_like(values).index_add(0, number, values)[number] - values

    baseline = of_others((surprise * counted).sum(-1)) / of_others(counted.sum(-1)).clamp(min=1)
    return (surprise - baseline[:, None]) * torch.where(mask, logps, 0)


class LossReduction(Record):
    """The averaging of tokens: the coefficient of each token in the loss.

    Where a reduction is expected, a plain function (mask, *, num_tokens, num_sequences) is one too.
    """

    def __call__(self, mask: Bool[Tensor, "B T"], *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
        """Return the coefficient of each token (B, T).

        Args:
            mask: Tokens in the loss (B, T).
            num_tokens: Tokens of the global batch.
            num_sequences: Sequences of the global batch.
        """
        raise TypeError(f"{type(self).__name__} must define __call__(mask, *, num_tokens, num_sequences)")


class FunctionReduction(FunctionRecord, LossReduction):
    """A reduction that a function computes.

    Args:
        function: Function (mask, *, num_tokens, num_sequences) -> coefficients (B, T).
    """


class TokenMean(LossReduction):
    """Weight every token equally, by 1 / (tokens of the global batch).

    Use it if long completions should count more than short ones. Source: DAPO [paper].
    """

    def __call__(self, mask: Tensor, *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
        return mask / max(num_tokens, 1)


class SequenceMean(LossReduction):
    """Average over each sequence's tokens, then over sequences.

    Use it if every completion should count the same. A sequence without tokens adds nothing, but is counted. Source:
    GRPO [paper].
    """

    def __call__(self, mask: Tensor, *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
        return mask / (mask.sum(-1, keepdim=True).clamp(min=1) * max(num_sequences, 1))


class FixedLengthMean(LossReduction):
    """Weight every token by the constant 1 / (sequences of the global batch * length).

    Use it if a token's weight should not depend on the length of any completion. Source: Dr.GRPO [paper].

    Args:
        length: Constant length in tokens, at least 1; usually max_new_tokens.
    """

    length: int = option(at_least=1)

    def __call__(self, mask: Tensor, *, num_tokens: int, num_sequences: int) -> Float[Tensor, "B T"]:
        return mask / (max(num_sequences, 1) * self.length)


def loss_inputs(names: frozenset[str], batch: Batch) -> dict[str, Tensor | Callable | None]:
    """Return the values of these SURROGATE_INPUTS, by name."""
    keywords: dict[str, Tensor | Callable | None] = {}
    if "old_logprobs" in names:
        keywords["old_logprobs"] = torch.where(batch.loss_mask, batch.old_logprobs, 0)
    if "log_mismatch" in names:
        log_mismatch = batch.old_logprobs - _rollout_logprobs(batch, "the loss")
        keywords["log_mismatch"] = torch.where(batch.loss_mask, log_mismatch, 0)
    if "inverse_chances" in names:
        keywords["inverse_chances"] = copy_of(batch.inverse_chances)  # the others are new tensors
    if "sum_over_processes" in names:
        keywords["sum_over_processes"] = batch.sum_over_processes
    return keywords


def check_shape(setting: str, function: Any, values: Any, shape: torch.Size) -> None:
    """Raise ValueError unless a function of the user returned one value per token, or one per row as (B, 1).

    Another shape, such as a mean, would be broadcast, and train something else.
    """
    if isinstance(values, Tensor) and values.shape in (shape, (shape[0], 1)):
        return
    found = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise ValueError(
        f"{setting}={describe(function)} returned {found}; return one value per token, of shape (B, T) = "
        f"{tuple(shape)}, without averaging"
    )


def apply_per_token(
    surrogate: Loss,
    log_ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    **keywords: Any,
) -> Float[Tensor, "B T"]:
    """Call a loss with an advantage per token instead of per row, by making every token a row.

    The loss must treat each token by itself (`is_per_token`).
    """
    flat_keywords = {name: x.reshape(-1, 1) if isinstance(x, Tensor) else x for name, x in keywords.items()}
    objective = surrogate(log_ratio.reshape(-1, 1), advantages.flatten(), mask.reshape(-1, 1), **flat_keywords)
    check_shape("loss", surrogate, objective, torch.Size((log_ratio.numel(), 1)))
    return objective.view_as(log_ratio)


def is_per_token(surrogate: Loss | Callable[..., Tensor]) -> bool:
    """Return whether a loss treats each token by itself, so that each token may have a different advantage.

    This is tested on numbers: rows of three tokens and rows of one token must give the same objective.
    """
    loss: Loss = fit("loss", Loss, surrogate)
    log_ratio, advantages, inputs = _tokens_of_a_test(loss)
    mask = torch.ones_like(log_ratio, dtype=torch.bool)
    row_objective = loss(log_ratio, advantages[:, 0], mask, **inputs)
    token_objective = apply_per_token(loss, log_ratio, advantages, mask, **inputs)
    return bool(torch.allclose(row_objective.expand(4, 3), token_objective))


def _tokens_of_a_test(loss: Loss) -> tuple[Float[Tensor, "4 3"], Float[Tensor, "4 3"], dict[str, Any]]:
    """Return log-ratios, advantages and the declared inputs of four rows, on which a loss is tested."""
    log_ratio = torch.linspace(-0.9, 0.7, 12, dtype=torch.float64).view(4, 3)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)[:, None].expand(4, 3)
    inputs = {"old_logprobs": log_ratio - 1, "log_mismatch": log_ratio / 3, "sum_over_processes": lambda total: total}
    inputs["inverse_chances"] = torch.ones_like(log_ratio)
    return log_ratio, advantages, {name: inputs[name] for name in loss.inputs}


def takes_drawn_steps(surrogate: Loss | Callable[..., Tensor]) -> bool:
    """Return whether a loss is right where only some tokens of the batch are scored (`Trajectory.variance_growth`): it
    treats each token by itself, or weights what it adds up by `inverse_chances`.

    The former is tested on numbers: a token alone must have the objective that it has among others.
    """
    loss: Loss = fit("loss", Loss, surrogate)
    if "inverse_chances" in loss.inputs:
        return True
    log_ratio, advantages, inputs = _tokens_of_a_test(loss)
    together = apply_per_token(loss, log_ratio, advantages, torch.ones_like(log_ratio, dtype=torch.bool), **inputs)

    def alone(token: int) -> Tensor:
        cut = {name: x.flatten()[token].view(1, 1) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        mask = torch.ones(1, 1, dtype=torch.bool)
        return loss(log_ratio.flatten()[token].view(1, 1), advantages.flatten()[token].view(1), mask, **cut).flatten()

    apart = torch.cat([alone(token) for token in range(log_ratio.numel())])
    return is_per_token(loss) and bool(torch.allclose(together.flatten(), apart))


def _rollout_logprobs(batch: Batch, consumer: str) -> Float[Tensor, "B T"]:
    """Return the rollout's log-probs, which `consumer` needs. Raise ValueError if the batch has none."""
    if batch.rollout_logprobs is None:
        raise ValueError(f"{consumer} needs the rollout's log-probs, but batch.rollout_logprobs is None: set it")
    return batch.rollout_logprobs


def policy_loss(
    logps: Float[Tensor, "B T"],
    batch: Batch,
    *,
    surrogate: Loss | Callable[..., Tensor],
    loss_reduction: LossReduction | Callable[..., Tensor],
    beta: float,
    kl: KL | Callable[[Tensor], Tensor],
    entropy: float = 0.0,
) -> tuple[Float[Tensor, ""], dict[str, tuple[Tensor, Tensor]], Float[Tensor, "B T"]]:
    """Compute this process's share of the loss, its metrics, and d loss / d logps.

    Call it to compute a loss outside of `train`; training calls it for every update.

        loss = -sum_t c_t (w_t J_t - beta KL_t + entropy H_t)

    J is the surrogate, w the corrector's weights, c the reduction's coefficients, H the `entropy_bonus`. The returned
    loss does not include H; the returned gradient does.

    Args:
        logps: Current log-probs (B, T), in nats.
        batch: Data of the update: old log-probs, advantages, weights, loss mask and counts.
        surrogate: Per-token objective, such as PPOClip().
        loss_reduction: Averaging of tokens, such as TokenMean().
        beta: Coefficient of the KL term; used if the batch has reference log-probs.
        kl: Estimator of the KL term, such as K3().
        entropy: Coefficient of the entropy bonus. Default: 0.

    Returns:
        The loss, detached; the metrics, each as (sum, count); the gradient (B, T).
        clip_ratio/{region,low,high}_mean: shares of all tokens whose policy term has no gradient: for any A, for A < 0,
        and for A > 0.
        band/{positive,negative}: share of the tokens with A > 0, and with A < 0, whose policy term has a gradient.
        Neither counts tokens with A = 0 or with weight 0.

    Raises:
        ValueError: The surrogate or the KL term needs the rollout's log-probs, and the batch has none; or the
            surrogate, the reduction or the KL term does not return one value per token.
    """
    objective_fn: Loss = surrogate if isinstance(surrogate, Loss) else fit("loss", Loss, surrogate)
    loss_mask = batch.loss_mask
    logps = logps.detach().requires_grad_()
    chances = batch.inverse_chances
    in_mean = loss_mask.clone()
    if chances is not None:  # tokens whose step was not drawn are in the loss: the drawn ones stand for them
        in_mean |= batch.rollout.completion_mask & (chances == 0)
    coefficient = loss_reduction(in_mean, num_tokens=batch.num_tokens, num_sequences=batch.num_sequences)
    check_shape("loss_reduction", loss_reduction, coefficient, logps.shape)
    for weights in (batch.rollout.loss_weights, chances):
        if weights is not None:
            coefficient = coefficient * weights
    # Not multiplied by the mask: infinities outside the mask would have a NaN gradient.
    log_ratio = torch.where(loss_mask, logps - batch.old_logprobs, 0)
    keywords = loss_inputs(objective_fn.inputs, batch) if objective_fn.inputs else {}
    copies = log_ratio.clone(), batch.advantages.clone(), loss_mask.clone()  # a loss may write into what it gets
    if batch.advantages.dim() == 1:
        advantages = batch.advantages[:, None]
        objective = objective_fn(*copies, **keywords)
        check_shape("loss", objective_fn, objective, logps.shape)
    else:
        advantages = batch.advantages
        objective = apply_per_token(objective_fn, copies[0], copies[1], copies[2], **keywords)
    flat_index = loss_mask.flatten().nonzero()[:, 0]  # computed only once, because `nonzero` waits for the GPU

    def at_tokens(values: Tensor) -> Tensor:
        return values.flatten()[flat_index]

    def number_of(tokens: Tensor) -> Tensor:  # of all tokens, of which the drawn ones are a sample
        return tokens.sum() if chances is None else (tokens * chances).sum()

    def total_of(values: Tensor) -> Tensor:
        return values.sum() if chances is None else (values * at_tokens(chances)).sum()

    loss = -at_tokens(coefficient * batch.importance_weights * objective).sum()
    (gradient,) = torch.autograd.grad(loss, logps)

    positive = advantages > 0
    # Tokens with a zero advantage or a zero weight never have a gradient, clipped or not.
    counted = loss_mask & (advantages != 0) & (batch.importance_weights != 0) & (coefficient != 0)
    clipped = counted & (gradient == 0)  # holds for every surrogate, however it clips
    count = number_of(counted)
    num_positive = number_of(counted & positive)
    metrics = {
        "clip_ratio/region_mean": (number_of(clipped), count),
        "clip_ratio/low_mean": (number_of(clipped & ~positive), count),
        "clip_ratio/high_mean": (number_of(clipped & positive), count),
        "band/positive": (number_of(counted & ~clipped & positive), num_positive),
        "band/negative": (number_of(counted & ~clipped & ~positive), count - num_positive),
    }
    if batch.is_scored:
        metrics["ratio/mean"] = (total_of(at_tokens(log_ratio.detach()).exp()), number_of(loss_mask))
    if batch.reference_logprobs is not None:
        reference_log_ratio = torch.where(loss_mask, batch.reference_logprobs - logps, 0)
        if isinstance(kl, KL) and kl.bias_correction:
            rollout_log_ratio = logps - _rollout_logprobs(batch, "kl.bias_correction=True")
            penalty = at_tokens(
                bias_corrected_kl(
                    reference_log_ratio, kl=kl, rollout_log_ratio=torch.where(loss_mask, rollout_log_ratio, 0)
                )
            )
        else:
            per_token = kl(reference_log_ratio)
            check_shape("kl", kl, per_token, logps.shape)
            penalty = at_tokens(per_token.expand(logps.shape))
        kl_term = beta * (at_tokens(coefficient) * penalty).sum()
        loss = loss + kl_term
        gradient = gradient + torch.autograd.grad(kl_term, logps)[0]
        metrics["kl"] = (total_of(penalty.detach()), number_of(loss_mask))
    if entropy:
        per_token = entropy_bonus(logps, loss_mask, group=batch.rollout.group, inverse_chances=chances)
        bonus = entropy * (coefficient * per_token).sum()
        gradient = gradient - torch.autograd.grad(bonus, logps)[0]
        metrics["entropy"] = (-total_of(at_tokens(logps.detach())), number_of(loss_mask))
    # This process's share of the loss: `step.update` adds up the shares.
    metrics["loss"] = (loss.detach(), torch.ones_like(loss.detach()))
    return loss.detach(), metrics, gradient
