"""What a likelihood and a loss take and return: views, log-probs, the batch of an update.

Log-probs are fp32, in nats. Axes: B rows, one per completion; T positions (prompt and completion), N views of an
estimator, K scored positions, V vocabulary, D hidden size.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from dllm_rl.types.batch_record import Copied, Movable
from dllm_rl.types.retained_graphs import RetainedGraphs
from dllm_rl.types.rollouts import Rollout


@dataclass(frozen=True)
class Logprobs(Copied):
    """Each position's contribution to the log-probs of one rollout, in nats; 0 where a position is not scored."""

    old_logprobs: Float[Tensor, "B T"]  # under the learner at the start of the update
    old_view_logprobs: Float[Tensor, "N B T"]  # the same per view
    rollout_logprobs: Float[Tensor, "B T"]  # under the policy that sampled
    reference_logprobs: Float[Tensor, "B T"] | None  # under the reference policy, or None without a KL term
    views: "Views"
    entropy: Float[Tensor, "B T"] | None = None  # entropy of the learner's distributions, if a corrector needs it
    token_advantages: Float[Tensor, "B T"] | None = None  # of a feature; None: those of rows
    is_scored: bool = True  # False: no policy scored these views, since no update reads the log-probs, which are 0


def single_process_sum(total: Tensor) -> Tensor:
    """Return `total` unchanged: with one process, it is the sum over all processes."""
    return total


@dataclass(frozen=True)
class Batch:
    """All data of one optimizer update. Rows belong to this process; counts cover all processes."""

    rollout: Rollout
    views: "Views"
    advantages: Float[Tensor, " B"] | Float[Tensor, "B T"]  # one per row, or one per token
    old_logprobs: Float[Tensor, "B T"]  # denominator of the ratios; the rollout's log-probs with old_logprobs="rollout"
    old_view_logprobs: Float[Tensor, "N B T"]  # the learner's, per view; the first inner step reuses them
    importance_weights: Float[Tensor, "B T"]  # the corrector's, detached
    loss_mask: Bool[Tensor, "B T"]  # positions that stay in the loss
    reference_logprobs: Float[Tensor, "B T"] | None  # log-probs under the reference policy, or None without a KL term
    num_tokens: int  # denominators of the loss, over the global batch
    num_sequences: int
    rollout_logprobs: Float[Tensor, "B T"] | None = None  # log-probs under the policy that sampled; None: unknown
    sum_over_processes: Callable[[Tensor], Tensor] = single_process_sum  # sums a tensor over all processes
    graphs: RetainedGraphs | None = None  # of the forwards that scored it, and of those of later updates
    is_scored: bool = True  # False: the log-probs before the update are 0, which the loss does not read
    inverse_chances: Float[Tensor, "B T"] | None = None  # see `Views`; None: every token of the loss counts once


@dataclass(frozen=True)
class ViewTensors(Movable):
    """Tensors that an optional feature adds to the views of an estimate: (N, B, T, ...) or (B,).

    Subclass it for tensors that are only stored with the views. Subclass `likelihoods.views.ViewFeature` for a feature
    that changes how views are scored.
    """

    ROW_AXIS: ClassVar[int] = 1
    is_per_token: ClassVar[bool] = True  # whether each contribution is the log-prob of one token

    @property
    def num_forwards(self) -> int:
        """The number of model forwards per view whose graphs would be retained together."""
        return 1

    def sampler_logprobs(self, rollout: Rollout, logprobs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Return the log-probs that the sampler recorded, in nats; without this feature they would be `logprobs`."""
        return logprobs


@dataclass(frozen=True)
class Views(Movable):
    """The masked versions of a batch that a likelihood estimate scores, the same for every policy.

    An estimator draws them once, and they stay with the batch.

    Args:
        masked: Positions hidden from the model in view n.
        coefficients: Coefficient of the position's log-prob in view n, of either sign; 0 where the position is not
            scored.
        features: Tensors of optional features, in the order in which they change a view, and an estimator's additional
            tensors.
        inverse_chances: 1 / the chance with which the token's denoising step was drawn (`draw_steps`), by which the
            loss multiplies the token's gradient; 0 where the step was not drawn, and the token is not scored. None
            (default): nothing was drawn.
    """

    ROW_AXIS: ClassVar[int] = 1

    masked: Bool[Tensor, "N B T"]
    coefficients: Float[Tensor, "N B T"]
    features: tuple[ViewTensors, ...] = ()
    inverse_chances: Float[Tensor, "1 B T"] | None = None

    def restrict_to_rows(self, live: Bool[Tensor, " B"]) -> "Views":
        """Return views with the same masks that score only the rows in `live`."""
        return dataclasses.replace(self, coefficients=self.coefficients * live[:, None])

    def scored(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """Return `mask` restricted to the rows that any view scores, and to the tokens of the steps that were drawn."""
        scored = mask & (self.coefficients != 0).any(0).any(-1, keepdim=True)
        return scored if self.inverse_chances is None else scored & (self.inverse_chances[0] > 0)
