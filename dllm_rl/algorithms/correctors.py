"""Corrections of the training-inference mismatch, made of three parts that methods combine.

log_mismatch = logp_old - logp_rollout per token (nats), over the GLOBAL batch. The mask marks the corrected rows: those
with an advantage, or all rows with a KL term or an entropy bonus. Batch statistics (AIS's lambda) are of these rows; a
corrector's metrics are logged as `live/*`, those of all rows as `rollout_corr/*`. Weights are detached, multiply the
surrogate before any KL term, and are 1 off the mask. A token with a non-finite log_mismatch leaves the keep mask.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from dllm_rl.algorithms import weights
from dllm_rl.algorithms.losses import sequence
from dllm_rl.algorithms.surrogates import trust_band
from dllm_rl.algorithms.weights import Aggregate, Level, Weigh, alarm, composed, no_weights, rejection
from dllm_rl.bounds import check_bound

Surrogate = Callable[..., Tensor]  # (log_ratio, advantages, mask, further ones of surrogates.OFFERED)
Aggregation = Callable[..., Tensor]  # of losses: (mask, *, num_tokens, num_sequences) -> coefficients


@dataclass(frozen=True)
class Corrector:
    """weigh          (log_mismatch (B, T), advantages (B,), mask (B, T)) -> detached weights, keep mask, metrics
    align_forward  the learner's forward runs through the rollout's quantised operands
    surrogate      the objective (see `algorithms.surrogates`) of a method that brings one; None: the recipe's `loss`
    aggregate      that method's aggregation, where the recipe names none
    """

    weigh: Weigh = no_weights
    surrogate: Surrogate | None = field(default=None, metadata={"omit_none": True})
    align_forward: bool = False
    aggregate: Aggregation | None = field(default=None, metadata={"omit_none": True})

    def __post_init__(self) -> None:  # a constant is refused here, before a run, and not at the first batch
        check_bound((self.weigh, self.surrogate, self.aggregate))


def none() -> Corrector:
    """No correction: weight 1 everywhere."""
    return Corrector()


def tis(*, cap: float = 2.0, level: Level = "token", aggregate: Aggregate = "product") -> Corrector:
    """Truncated importance sampling; see `truncated_weights`."""
    return Corrector(weigh=partial(weights.truncated_weights, cap=cap, level=level, aggregate=aggregate))


def mis(*, low: float = 0.5, high: float = 2.0, level: Level = "token", aggregate: Aggregate = "product") -> Corrector:
    """Masked importance sampling; see `masked_weights`."""
    return Corrector(weigh=partial(weights.masked_weights, low=low, high=high, level=level, aggregate=aggregate))


def icepop(*, low: float = 0.5, high: float = 5.0) -> Corrector:
    """IcePop: masked importance sampling per token, from 0.5 to 5 [paper]."""
    return mis(low=low, high=high, level="token")


def reject(
    *, level: Level = "sequence", statistic: str = "k3", bound: float = 0.001, aggregate: str = "mean"
) -> Corrector:
    """Rejection of tokens or sequences; see `rejection`."""
    return Corrector(weigh=partial(rejection, level=level, statistic=statistic, bound=bound, aggregate=aggregate))


def ais(
    *,
    cap: float = 2.0,
    tau: float = 0.05,
    combine: Callable[..., float] = alarm,
    aggregate: Aggregate = "product",
    level: Level = "token",
) -> Corrector:
    """Adaptive importance sampling; see `adaptive_weights`."""
    bound = partial(weights.adaptive_weights, cap=cap, tau=tau, combine=combine, aggregate=aggregate, level=level)
    return Corrector(weigh=bound)


def tbpo(*, eps_high: float = 4e-4, neg_low: float = 3e-4, neg_high: float = 7e-4, c: float = 2.0) -> Corrector:
    """Trust-band policy optimisation: `band_weights` with `trust_band`, the mean over sequences [digest].

    The defaults fit long autoregressive responses [digest]; diffusion likelihoods move more and need wider bands.
    """
    surrogate = partial(trust_band, eps_high=eps_high, neg_low=neg_low, neg_high=neg_high)
    return Corrector(weigh=partial(weights.band_weights, c=c), surrogate=surrogate, aggregate=sequence)


def aligned() -> Corrector:
    """No weights: the learner's forward runs through the rollout's quantised operands."""
    return Corrector(align_forward=True)


def qarl(*, eps_high: float = 4e-4, neg_low: float = 3e-4, neg_high: float = 7e-4, c: float = 2.0) -> Corrector:
    """QaRL (arXiv 2604.07853): `tbpo` with the aligned forward [paper]."""
    return compose(tbpo(eps_high=eps_high, neg_low=neg_low, neg_high=neg_high, c=c), aligned())


def compose(*parts: Corrector | Weigh) -> Corrector:
    """Combine correctors or bare weigh functions: see `composed`. The forward is aligned if any part's is.

    Raises ValueError when two parts bring different objectives. Example: compose(tis(cap=3.0), reject(bound=0.1))
    """
    correctors = [part if isinstance(part, Corrector) else Corrector(weigh=part) for part in parts]
    brought = [part for part in correctors if part.surrogate is not None] or [none()]  # an objective, its aggregation
    if len({part.surrogate for part in brought}) > 1:
        raise ValueError(f"{len(brought)} parts bring an objective; keep one: replace(part, surrogate=None)")
    weighs = tuple(part.weigh for part in correctors if part.weigh is not no_weights)
    weigh = weighs[0] if len(weighs) == 1 else partial(composed, weighs=weighs) if weighs else no_weights
    aligned = any(part.align_forward for part in correctors)
    return Corrector(weigh, brought[0].surrogate, aligned, brought[0].aggregate)
