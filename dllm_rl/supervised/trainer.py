"""Supervised steps: the loss of a batch of examples, its gradient, and the update."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from dllm_rl.algorithms.optimizers import set_learning_rate
from dllm_rl.distributed.collectives import Processes, reduce_metrics, sum_gradients, sum_over
from dllm_rl.models.base import Policy, gather_if_sharded, join_uneven_forwards, trainable_parameters
from dllm_rl.supervised.denoising import Noise, denoising_examples, denoising_loss
from dllm_rl.supervised.examples import Example, prompt_and_answer
from dllm_rl.supervised.loss import add_noise, draw_levels, lay_out, weighted_loss

MicroBatch = Sequence[Any]  # of one forward, with noise: NoisyExample, or DenoisingExample


@dataclass(frozen=True, kw_only=True)
class SupervisedTrainer:
    """Takes the supervised steps of a run, for SFT and for the warm-up before RL.

    Args:
        policy: Policy to train.
        processes: The processes of the run. Each gets its share of a step's examples.
        micro_batch_size: Rows per forward. None (default): all.
        bf16: Whether to autocast forwards to bf16. Default: False.
        like_rollouts: Whether every learned token counts alike, in rows that are padded as RL's are. False (default):
            every example of a diffusion model counts alike.
        max_grad_norm: Norm to which a larger gradient is scaled down. Default: 1.
        stage: Function from the name of a part of a step to a context that measures its time. Default: no measurement.
    """

    policy: Policy
    processes: Processes
    micro_batch_size: int | None = None
    bf16: bool = False
    like_rollouts: bool = False
    max_grad_norm: float = 1.0
    stage: Callable[[str], AbstractContextManager] = nullcontext

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        examples: Sequence[Example],
        generator: Generator,
        *,
        learning_rate: float,
        place: str,
    ) -> dict[str, float]:
        """Update the weights once.

        Args:
            optimizer: Optimizer of the policy.
            examples: Examples of the step, of all processes.
            generator: Generator of the noise, the same in all processes.
            learning_rate: Learning rate of this step.
            place: Name of the step, for the error.

        Returns:
            The loss in nats, grad_norm, and frac_padding, the share of positions that are padding.

        Raises:
            FloatingPointError: The gradient is not finite. It is not applied.
        """
        with self.stage("gradients"):
            loss, padding = self.add_gradients(examples, generator)
            sum_gradients(self.policy.module, self.processes)
            parameters = trainable_parameters(self.policy.module)
            norm = gather_if_sharded(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
            sums_and_counts = {"loss": (loss, torch.ones_like(loss)), "grad_norm": (norm, torch.ones_like(norm))}
            metrics = reduce_metrics(sums_and_counts, self.processes, shares=("loss",))
            metrics |= reduce_metrics({"frac_padding": padding}, self.processes)
        if not math.isfinite(metrics["grad_norm"]):
            raise FloatingPointError(f"gradient norm is {metrics['grad_norm']} at {place}; the update was not applied")
        with self.stage("update"):
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()
            self.policy.module.zero_grad(set_to_none=True)  # frees memory for an evaluation
        return metrics

    def add_gradients(self, examples: Sequence[Example], generator: Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Add the gradient of this process's share of a batch to the parameters; return its loss, and the numbers of
        padding and of all positions.
        """
        loss = torch.zeros((), device=self.policy.device)
        num_positions = 0
        micro_batches, divisor, num_tokens = self.micro_batches(examples, generator, self.micro_batch_size)
        with join_uneven_forwards(self.policy, backward=True):
            for batch in micro_batches:
                with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.bf16):
                    micro_loss = self.sum_of_losses(batch) / divisor
                if micro_loss.requires_grad:  # it does not if no token was masked
                    micro_loss.backward()
                loss += micro_loss.detach()
                num_positions += len(batch) * max(item.num_tokens for item in batch)
        return loss, (torch.tensor(float(num_positions - num_tokens)), torch.tensor(float(num_positions)))

    @torch.no_grad()
    def loss(self, examples: Sequence[Example], generator: Generator, *, micro_batch_size: int) -> float:
        """Return the loss of the examples of all processes, in nats."""
        micro_batches, divisor, _ = self.micro_batches(examples, generator, micro_batch_size)
        loss = torch.zeros((), dtype=torch.float64)  # fp64, so that the sum hardly depends on the batches
        with torch.autocast(self.policy.device.type, torch.bfloat16, enabled=self.bf16):
            for batch in micro_batches:
                loss += self.sum_of_losses(batch).double().cpu()
        return sum_over(loss / divisor, self.processes).item()

    def micro_batches(
        self, examples: Sequence[Example], generator: Generator, size: int | None
    ) -> tuple[Sequence[MicroBatch], int, int]:
        """Return this process's examples with their noise as micro-batches of `size` rows, the divisor of the loss over
        all processes, and the number of this process's tokens.

        Noise is drawn for the examples of all processes, so that it does not depend on how they are split.
        """
        policy, count = self.policy, len(examples)
        noisy_examples: Sequence[Any]
        if policy.spec.attention == "encoder_decoder":
            assert policy.spec.block_size is not None, "`check_spec` requires it"
            noise = draw_levels(generator, count, policy.spec.block_size)
            pairs = [prompt_and_answer(policy, item) for item in examples]
            more_noise = torch.rand(2, count, generator=generator)
            noisy_examples, divisor = denoising_examples(policy, pairs, Noise(*noise, *more_noise)), count
        else:
            levels, uniforms, _ = draw_levels(generator, count, max(int(item.learned.sum()) for item in examples))
            noisy_examples, divisor = add_noise(policy, examples, levels, uniforms, per_token=self.like_rollouts)
        local_examples = noisy_examples[self.processes.process_index :: self.processes.num_processes]
        size = size or max(1, len(local_examples))
        batches = [local_examples[start : start + size] for start in range(0, len(local_examples), size)]
        return batches, divisor, sum(item.num_tokens for item in local_examples)

    def sum_of_losses(self, batch: MicroBatch) -> Tensor:
        """Return the sum of the examples' weighted losses, in nats, of one forward."""
        policy = self.policy
        if policy.spec.attention == "encoder_decoder":
            return denoising_loss(policy, batch)
        layout = lay_out(batch, pad_id=policy.pad_id, device=policy.device, like_rollouts=self.like_rollouts)
        return weighted_loss(policy, layout)
