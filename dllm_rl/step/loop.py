"""One training step on collected samples."""

from dataclasses import replace

import torch

from dllm_rl.step.context import StepContext
from dllm_rl.step.correct import make_batches
from dllm_rl.step.samples import Samples, StepResult
from dllm_rl.step.score import score_samples
from dllm_rl.step.update import update


def train_step(context: StepContext, samples: Samples, step: int, optimizer: torch.optim.Optimizer) -> StepResult:
    """Train on a step's samples: score them, correct for the mismatch, and update the weights."""
    with context.log.stage("scoring"), context.learner_forward():
        scored = score_samples(context, samples, samples.batch_number_of(step))
    with context.log.stage("update"), context.learner_forward():
        batches, mismatch = make_batches(context, scored)
        batches = [batches[k % len(batches)] for k in range(context.settings.num_iterations)]
        settings = context.settings.update_settings(step)
        late = settings.max_staleness + sum(feature.max_staleness for feature in context.features)
        update_metrics = update(
            context.policy, optimizer, batches, context.accelerator, replace(settings, max_staleness=late)
        )
        for feature in context.features:
            feature.learn(context)
    return StepResult(scored.samples, scored.logps[0], mismatch | update_metrics)
