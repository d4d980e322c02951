"""The records that flow through the loop.

Axes, everywhere: P prompts, G completions per prompt, B = P*G rows (row p*G+g), S prompt positions, T positions
(prompt and completion), V vocabulary, D hidden size, N masks or segments of an estimator, K scored positions.
Log-probabilities are in nats, fp32.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

Moved = TypeVar("Moved", bound="_Movable")


@dataclass(frozen=True)
class _Movable:
    """Records of tensors that move to a device, or keep some rows, as one."""

    def to(self: Moved, device: torch.device | str) -> Moved:
        return self._map(lambda x: x.to(device))

    def _map(self: Moved, f: Callable[[Tensor], Tensor]) -> Moved:
        tensors = {f_.name: getattr(self, f_.name) for f_ in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: f(v) for k, v in tensors.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class SamplingParams:
    """What turns raw logits into the distribution that is sampled from; the learner mirrors it.

    temperature  divides the logits; 0 means greedy, whose log-probs are reported at temperature 1.
    top_k, top_p keep the k likeliest tokens / the smallest set with probability >= p; None keeps all.
    suppress     token ids that are never sampled (a mask token always is).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    suppress: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be >= 0 (0 is greedy)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1], or None to keep every token")


@dataclass(frozen=True)
class Prompts(_Movable):
    """Left-padded prompts, each to be completed `group_size` times.

    seeds  one per row (B,), for a caller who wants to fix each row's own random numbers; otherwise the sampler
           draws them from its generator.
    """

    tokens: Int[Tensor, "P S"]
    attention_mask: Bool[Tensor, "P S"]
    group_size: int = 1
    seeds: Int[Tensor, " B"] | None = None

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[Sequence[int]],
        *,
        pad_id: int,
        group_size: int = 1,
        seeds: Sequence[int] | None = None,
    ) -> "Prompts":
        """Left-pad lists of token ids. Raises ValueError on an empty batch or a group_size below 1."""
        if not len(ids):
            raise ValueError("ids is empty: at least one prompt is needed")
        if group_size < 1:
            raise ValueError(f"group_size={group_size} must be at least 1")
        if seeds is not None and len(seeds) != len(ids) * group_size:
            raise ValueError(
                f"seeds has {len(seeds)} entries; {len(ids)} prompts x {group_size} completions need one each"
            )
        width = max(1, max(len(row) for row in ids))
        tokens = torch.full((len(ids), width), pad_id, dtype=torch.long)
        attention_mask = torch.zeros((len(ids), width), dtype=torch.bool)
        for i, row in enumerate(ids):
            if len(row):
                tokens[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
                attention_mask[i, width - len(row) :] = True
        return cls(tokens, attention_mask, group_size, None if seeds is None else torch.tensor(seeds, dtype=torch.long))

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0] * self.group_size


@dataclass(frozen=True)
class Rollout(_Movable):
    """What a sampler did.

    attention_mask   False on padding; always passed to the model.
    completion_mask  True where the policy chose the token.
    unmask_step      step that committed it (autoregressive: 0, 1, 2 ...); -1 elsewhere.
    logprobs         at commit, under the rollout policy, of the distribution sampled from; nats; 0 elsewhere.
    sampling_params  that distribution's temperature and filters, so that the learner can mirror them.
    forwards         model calls that were made, counted per batch.
    """

    tokens: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]
    unmask_step: Int[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    group_size: int
    weights_version: int = 0
    sampling_params: SamplingParams = SamplingParams()
    forwards: int = 0

    def rows(self, keep: Int[Tensor, " R"]) -> "Rollout":
        """The given rows, in the given order. group_size must still divide them."""
        return self._map(lambda x: x[keep])

    def replaced(self, rows: Int[Tensor, " R"], by: "Rollout", *, pad_id: int) -> "Rollout":
        """This rollout with `rows` replaced by those of another; the narrower of the two is padded on the left."""
        width = max(self.tokens.shape[1], by.tokens.shape[1])
        old, new = (x.padded(width - x.tokens.shape[1], pad_id=pad_id) for x in (self, by))
        names = ("tokens", "attention_mask", "completion_mask", "unmask_step", "logprobs")
        joined = {name: getattr(old, name).index_copy(0, rows, getattr(new, name)) for name in names}
        return dataclasses.replace(self, **joined, forwards=self.forwards + by.forwards)

    def padded(self, columns: int, *, pad_id: int) -> "Rollout":
        """The same rows with so many more columns of padding on the left."""
        wider = lambda x, value: F.pad(x, (columns, 0), value=value)  # noqa: E731
        return dataclasses.replace(
            self,
            tokens=wider(self.tokens, pad_id),
            attention_mask=wider(self.attention_mask, False),
            completion_mask=wider(self.completion_mask, False),
            unmask_step=wider(self.unmask_step, -1),
            logprobs=wider(self.logprobs, 0.0),
        )


@dataclass(frozen=True)
class Logprobs:
    """Log-prob contributions of one rollout under every policy that a step compares; nats, 0 where none is scored.

    old        under the learner at the start of the update; old_scores: the same per mask, before they are combined.
    rollout    under the policy that sampled.
    reference  under the reference policy, or None without a KL term.
    """

    old: Float[Tensor, "B T"]
    old_scores: Float[Tensor, "N B T"]
    rollout: Float[Tensor, "B T"]
    reference: Float[Tensor, "B T"] | None


@dataclass(frozen=True)
class Batch:
    """All that one optimiser update needs. Rows are those of one process; counts are over all processes.

    old         log-prob contributions under the weights at the start of the update.
    old_scores  the same per mask, before an estimator combines them (lets the first inner step skip a forward).
    weights     detached importance weights of the corrector; keep: positions that stay in the loss.
    reference   log-prob contributions under the reference policy, or None without a KL term.
    num_tokens, num_sequences  denominators of the loss, over the global batch.
    """

    rollout: Rollout
    noise: "Noise"
    advantages: Float[Tensor, " B"]
    old: Float[Tensor, "B T"]
    old_scores: Float[Tensor, "N B T"]
    weights: Float[Tensor, "B T"]
    keep: Bool[Tensor, "B T"]
    reference: Float[Tensor, "B T"] | None
    num_tokens: int
    num_sequences: int


@dataclass(frozen=True)
class Noise(_Movable):
    """The masks of a likelihood estimate: data that travels with the batch, shared by every policy.

    masked  positions hidden from the model in view n.
    weight  coefficient of the position's log-prob in view n; 0 where it is not scored.
    upper_bound_weight  weight of the upper bound in each row's estimate, in [0, 1]; None: lower bound only.
    """

    masked: Bool[Tensor, "N B T"]
    weight: Float[Tensor, "N B T"]
    upper_bound_weight: Float[Tensor, " B"] | None = None

    def rows(self, keep: Int[Tensor, " R"]) -> "Noise":
        share = None if self.upper_bound_weight is None else self.upper_bound_weight[keep]
        return Noise(self.masked[:, keep], self.weight[:, keep], share)

    def only(self, live: Bool[Tensor, " B"]) -> "Noise":
        """The same masks, with the other rows not scored."""
        return dataclasses.replace(self, weight=self.weight * live[:, None])

    def scored(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """`mask` in the rows that any view scores."""
        return mask & (self.weight != 0).any(0).any(-1, keepdim=True)
