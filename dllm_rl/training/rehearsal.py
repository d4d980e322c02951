"""Rehearse a step before a run, on one group per process. Weights, gradients and random generators stay unchanged."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from dllm_rl.algorithms.optimizers import AdamW, AdamW8bit
from dllm_rl.checkpoints import checkpoint
from dllm_rl.checkpoints.run_folder import REHEARSAL
from dllm_rl.checkpoints.state import TrainingState
from dllm_rl.decoding.prompts import encode
from dllm_rl.distributed.collectives import from_main
from dllm_rl.files import remove
from dllm_rl.models.base import Policy, join_uneven_forwards, trainable_parameters, with_new_layers
from dllm_rl.models.lora import add_lora
from dllm_rl.models.lora_settings import Lora
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for, row_seeds
from dllm_rl.step.collect import GradedCompletion, draw_group_sizes, sample_and_grade
from dllm_rl.step.context import StepContext, StepFeature
from dllm_rl.step.correct import make_batches
from dllm_rl.step.samples import Samples
from dllm_rl.step.score import score_samples
from dllm_rl.step.update import forward_backward
from dllm_rl.supervised.examples import solution_examples
from dllm_rl.tasks.base import Cost, Problem, grade, metric_fractions
from dllm_rl.training.cautions import made_up_advantages
from dllm_rl.training.make_step import make_step, run_features
from dllm_rl.training.parts.replay import ReplayStore
from dllm_rl.training.parts.teacher import student_teacher_log_ratio
from dllm_rl.training.policies import RolloutCopy, make_optimizer
from dllm_rl.training.sharded_learner import gather_on_main
from dllm_rl.training.validation import check_measured, is_own_task, needed_metrics
from dllm_rl.training.warmup import drawn_problems
from dllm_rl.types.groups import any_in_group, equal_groups
from dllm_rl.types.rollouts import Rollout

MOMENT_BYTES: dict[type, int] = {AdamW: 8, AdamW8bit: 2}  # bytes of state per trained weight, if known


def rehearse(
    recipe: Recipe,
    policy: Policy,
    problem: Problem,
    accelerator: Accelerator,
    features: Sequence[StepFeature] = (),
) -> None:
    """Run one group per process through a step without the update, and save a checkpoint. Call it before the first
    step, so that a setting that fails is refused early: it raises any error that the step would raise.
    """
    key = (recipe.seed, "rehearsal")
    with preserve_random_state(), as_trained(policy, recipe.lora) as learner:
        reference = learner if recipe.lora is None else learner.reference()
        engine = recipe.rollout_engine or RolloutCopy(recipe=recipe)
        context = make_step(
            recipe,
            accelerator=accelerator,
            policy=learner,
            rollout_policy=engine.load(learner),
            reference=reference if recipe.beta else None,
            features=(*run_features(recipe), *features),
        )
        first_problems = torch.zeros(recipe.train_batch_size, dtype=torch.long)
        draw_group_sizes(context.settings, context.history, first_problems, 0)  # checks what the source returns
        seeds = row_seeds(generator_for(*key), recipe.num_generations)
        rollout, answers, _ = sample_and_grade(context, [problem], [recipe.num_generations], seeds, key)
        for drawn in drawn_problems(recipe, learner):
            # Raises ValueError if the problem has no solution to learn from.
            solution_examples(learner, [drawn], max_new_tokens=recipe.max_new_tokens)
        check_validation_metrics(recipe, answers[0])
        if recipe.teacher is not None:
            # The student also plays the teacher, which is not loaded yet.
            student_teacher_log_ratio(
                learner,
                rollout,
                seeds[:1].expand(len(seeds)).to(learner.device),
                sampler=recipe.sampler,
                num_substeps=recipe.teacher.substeps,
                micro_batch_size=recipe.micro_batch_size,
            )
        compute_gradients(context, rollout)
        for feature in context.features:
            if isinstance(feature, ReplayStore):
                feature.rehearse(context, rollout)
        with join_uneven_forwards(learner):
            recipe.eval_sampler(learner, encode(learner, [problem], reads_order=False), generator_for(*key))
        from_main(partial(try_save, recipe, gather_on_main(learner, accelerator)), accelerator)


def compute_gradients(context: StepContext, rollout: Rollout) -> None:
    """Score this process's group and compute the gradients of its first micro-batch. No weight changes."""
    settings = context.settings
    samples = made_up_samples(context, rollout)
    with context.arithmetic(learner=True):
        scored = score_samples(context, samples, 0)
    with context.arithmetic(learner=True):
        batch = make_batches(context, scored)[0][0]
        forward_backward(
            context.policy,
            batch,
            batch.old_view_logprobs,
            loss=settings.update_settings(0).loss,
            likelihood=settings.likelihood,
            micro_batch_size=settings.micro_batch_size,
        )


def made_up_samples(context: StepContext, rollout: Rollout) -> Samples:
    """Return the samples of one group per process, whose advantages are those of made-up rewards."""
    settings, processes = context.settings, context.accelerator.num_processes
    generations = settings.num_generations
    group = equal_groups(processes, generations)
    all_groups, advantages = made_up_advantages(settings)
    # A group whose advantages are 0 gets advantages of both signs, so that every group has a loss.
    both_signs = torch.linspace(1, -1, generations).repeat(settings.train_batch_size)
    advantages = torch.where(any_in_group(advantages != 0, all_groups), advantages, both_signs)[: len(group)]
    weights = torch.ones(len(group), dtype=torch.double)
    return Samples(rollout, group, advantages, advantages, weights, (generations,) * processes)


def check_validation_metrics(recipe: Recipe, answer: GradedCompletion) -> None:
    """Raise ValueError if evaluations on a `validation_task` of the user's own lack a metric that the recipe names: it
    grades a completion. If that has no reward, nothing is known. `check_metric_names` has checked all other tasks.
    """
    task, needed = recipe.validation_task, needed_metrics(recipe)
    if not needed or not is_own_task(task):
        return
    cost = Cost(answer.forwards, answer.length - answer.ends)
    (reward,) = grade(task, [task[0]], [answer.completion], [cost], timeout=recipe.limits.reward_timeout)
    if reward.value is not None:
        check_measured(needed, metric_fractions(reward))


def try_save(recipe: Recipe, policy: Policy) -> None:
    """Write a checkpoint to the run's disk and delete it, to check the disk and its free space."""
    folder = Path(recipe.directory) / REHEARSAL
    trained = trainable_parameters(policy.module)
    moment_bytes = MOMENT_BYTES.get(type(recipe.optim), 0) * sum(p.numel() for p in trained)
    try:
        state = TrainingState.first(recipe.settings(), policy)
        merged = not recipe.saves_only_adapters
        # The last checkpoint also has full weights.
        full_weight_bytes = 0 if merged else checkpoint.weights_size(policy.module)
        optimizer = make_optimizer(recipe, policy)
        content = checkpoint.Checkpoint(policy=policy, optimizer=optimizer, state=state, merged=merged)
        checkpoint.save(folder, content, keep_last=1, reserve=moment_bytes + full_weight_bytes)
    finally:
        remove(folder)


@contextmanager
def as_trained(policy: Policy, lora: Lora | None) -> Iterator[Policy]:
    """Yield the policy as RL will train it: the same weights, with adapters if `lora` is given. Gradients are
    deleted afterwards.
    """
    module = policy.module
    learner = policy
    trained = trainable_parameters(module)
    if lora is not None and policy.lora is None:
        learner = with_new_layers(policy)
        add_lora(learner, lora)
    try:
        yield learner
    finally:
        module.requires_grad_(False)
        for parameter in trained:  # `add_lora` froze them
            parameter.requires_grad_(True)
        module.zero_grad(set_to_none=True)


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the global random generators after the block: a grader or a model may have drawn from them."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = range(len(torch.cuda.default_generators))  # GPUs in use
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
