"""The data of one training step. Keep every value of all rows in `Samples`, so that load balancing reorders all of them
together.
"""

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from dllm_rl.device import copy_to_device
from dllm_rl.types import Logprobs, Rollout


def rows_of_processes(sizes: Int[Tensor, " P"], num_processes: int) -> tuple[int, ...]:
    """Return the number of rows of each process. Each has as many of the P groups, whose sizes are given, in order."""
    return tuple(int(part.sum()) for part in sizes.chunk(num_processes))


@dataclass(frozen=True)
class Samples:
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
            (`step.score.draw_view_sets`). Set only for asynchronous rollouts whose estimator does not replay the
            sampler.
        batch_number: Number of the batch, which gives its prompts, random numbers and masks: the step that trains on
            it, but with rollout_schedule='first_ready'.
    """

    rollout: Rollout
    group: Int[Tensor, " B"]
    rewards: Float[Tensor, " B"]
    advantages: Float[Tensor, " B"]
    metric_weights: Float[Tensor, " B"]
    counts: tuple[int, ...]
    rollout_logprobs: tuple[Float[Tensor, "b T"], ...] = ()
    batch_number: int = 0

    def local(self, values: Shaped[Tensor, "B *C"], accelerator: Accelerator) -> Shaped[Tensor, "b *C"]:
        """Return this process's rows of values of all rows, on its device."""
        return copy_to_device(accelerator.device, values.split(list(self.counts))[accelerator.process_index])[0]

    def reorder(self, order: Int[Tensor, " B"], counts: tuple[int, ...], rollout: Rollout) -> "Samples":
        """Return the samples with the rows of all processes in this order; `rollout` has this process's new rows."""
        return Samples(
            rollout,
            self.group[order],
            self.rewards[order],
            self.advantages[order],
            self.metric_weights[order],
            counts,
            batch_number=self.batch_number,
        )

    def concatenate(self, other: "Samples", *, pad_id: int) -> "Samples":
        """Return the samples with the rows of `other` after those of each process. Their groups stay apart.

        A feature adds rows of earlier steps by it (`StepFeature.after_rollout`).
        """
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
