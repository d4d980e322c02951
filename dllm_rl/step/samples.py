"""The data of one training step. Keep every value of all rows in `Samples`, so that load balancing reorders all of them
together.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.step.settings import StepSettings
from dllm_rl.types.batch_record import Copied
from dllm_rl.types.groups import any_in_group, starts_group
from dllm_rl.types.rollouts import Rollout
from dllm_rl.types.scoring import Logprobs


def rows_of_processes(sizes: Int[Tensor, " P"], num_processes: int) -> tuple[int, ...]:
    """Return the number of rows of each process. Each has as many of the P groups, whose sizes are given, in order."""
    return tuple(int(part.sum()) for part in sizes.chunk(num_processes))


@dataclass(frozen=True)
class Samples(Copied):
    """Data of one training step. `rollout` has this process's rows. `group`, `rewards`, `advantages` and
    `metric_weights` are on the host and have the B rows of all processes, in rank order.

    Args:
        rollout: This process's completions.
        group: Group of each row, a number that is unique over all processes.
        rewards: Reward of each row; NaN without a reward.
        advantages: Advantage of each row.
        metric_weights: Weight of each row in the mismatch metrics: the inverse sampling fraction of its group, 0 if the
            group is not scored.
        counts: Number of rows of each process.
        rollout_logprobs: Log-probs under the weights that sampled, in nats, one tensor per set of views of the step
            (`step.score.draw_view_sets`), for late rollouts whose estimator does not replay the sampler: these weights
            are no longer in memory. (): scoring computes them, or the sampler has recorded them.
    """

    rollout: Rollout
    group: Int[Tensor, " B"]
    rewards: Float[Tensor, " B"]
    advantages: Float[Tensor, " B"]
    metric_weights: Float[Tensor, " B"]
    counts: tuple[int, ...]
    rollout_logprobs: tuple[Float[Tensor, "b T"], ...] = ()

    def __post_init__(self) -> None:
        shape = (sum(self.counts),)
        for name in ("group", "rewards", "advantages", "metric_weights"):
            if (found := tuple(getattr(self, name).shape)) != shape:
                raise ValueError(f"Samples: {name} is of shape {found}, and counts={self.counts} are {shape[0]} rows")
        if int(starts_group(self.group).sum()) > len(self.group.unique()):
            raise ValueError(
                "Samples: rows of one group are apart, and a group is read as rows that follow each other; reorder "
                "whole groups, and rows within their group"
            )

    def local(self, values: Shaped[Tensor, "B *C"], accelerator: Accelerator) -> Shaped[Tensor, "b *C"]:
        """Return this process's rows of values of all rows, on its device."""
        return copy_to_device(accelerator.device, values.split(list(self.counts))[accelerator.process_index])[0]

    @property
    def source(self) -> Literal["fresh", "late"]:
        """Where the rollout's log-probs come from: "late" samples have those of their weights, `rollout_logprobs`."""
        return "late" if self.rollout_logprobs else "fresh"

    def reorder(self, order: Int[Tensor, " B"], counts: tuple[int, ...], rollout: Rollout) -> "Samples":
        """Return the samples with the rows of all processes in this order; `rollout` has this process's new rows.

        Raises:
            ValueError: The samples are late, and there are several processes: their log-probs stay where they are.
        """
        rollout_logprobs = self.rollout_logprobs
        if self.source == "late":
            if len(counts) > 1:
                raise ValueError(
                    "Samples.reorder: late rollouts' log-probs do not move between processes; train in one process, or "
                    "use late.max_staleness=0 or a likelihood that is exact for the sampler, such as Trajectory()"
                )
            width = rollout.tokens.shape[1]  # padding is on the left
            moved = (values[order.to(values.device)] for values in rollout_logprobs)
            rollout_logprobs = tuple(F.pad(values, (width - values.shape[1], 0)) for values in moved)
        if rollout.batch_row is None and len(counts) == 1:  # with several processes, `step.balance` has set it
            # A row's masks, and its place in completions.jsonl, are those of its first place in the batch.
            rollout = replace(rollout, batch_row=order.to(rollout.tokens.device))
        return replace(
            self,
            rollout=rollout,
            group=self.group[order],
            rewards=self.rewards[order],
            advantages=self.advantages[order],
            metric_weights=self.metric_weights[order],
            counts=counts,
            rollout_logprobs=rollout_logprobs,
        )

    def concatenate(self, other: "Samples", *, pad_id: int) -> "Samples":
        """Return the samples with the rows of `other` after those of each process. Their groups stay apart.

        A feature adds rows of earlier steps by it, not older than its `max_staleness` (`StepFeature.after_rollout`).

        Raises:
            ValueError: Samples of the two are late: their log-probs belong to the masks of their own batch.
        """
        if "late" in (self.source, other.source):
            raise ValueError(
                "Samples.concatenate: late rollouts' log-probs belong to the masks of their own batch; use "
                "late.max_staleness=0 or a likelihood that is exact for the sampler, such as Trajectory()"
            )
        counts = (*self.counts, *other.counts)
        number = len(self.counts)

        def join(first: Tensor, second: Tensor) -> Tensor:
            parts = torch.cat([first, second.to(first)]).split(list(counts))
            return torch.cat([part for process in range(number) for part in (parts[process], parts[number + process])])

        return replace(
            self,
            rollout=Rollout.concatenate([self.rollout, other.rollout], pad_id=pad_id),
            group=join(self.group, other.group + self.group.max() + 1),
            rewards=join(self.rewards, other.rewards),
            advantages=join(self.advantages, other.advantages),
            metric_weights=join(self.metric_weights, other.metric_weights),
            counts=tuple(mine + more for mine, more in zip(self.counts, other.counts, strict=True)),
        )

    def of_rows(self, rows: Int[Tensor, " b"]) -> "Samples":
        """Return the samples of a process that trains on these rows of the rollout."""
        logprobs = tuple(values[rows] for values in self.rollout_logprobs)
        return replace(self, rollout=self.rollout.rows(rows), rollout_logprobs=logprobs)


@dataclass(frozen=True)
class StepResult:
    """Samples that a step trained on, and the metrics of the step.

    After load balancing, some rows come from other processes. With several sets of views, `logps` and all metrics
    except the update's belong to the first set.
    """

    samples: Samples
    logps: Logprobs
    metrics: dict[str, float]


def active_rows(settings: StepSettings, samples: Samples, *, all_groups: bool = False) -> Bool[Tensor, " B"]:
    """Return which rows the update trains on: the groups with a nonzero advantage, or all rows if the loss has a KL
    term or an entropy bonus, or if a feature gives the tokens advantages (`all_groups`). No rows if there is no update,
    and no row without a reward.
    """
    if not settings.num_iterations:
        return torch.zeros_like(samples.advantages, dtype=torch.bool)
    is_active = any_in_group(samples.advantages != 0, samples.group) | (settings.trains_all_groups or all_groups)
    return is_active & ~samples.rewards.isnan()
