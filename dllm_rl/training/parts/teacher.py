"""On-policy distillation: a teacher scores the student's completions, and the teacher's score is their reward, or part
of it.

    reward = (1 - coeff) * the task's reward + coeff * (log p_T(y) - log q(y)), in nats

q(y) is the probability that the sampler recorded for the completion y. p_T(y) is the probability with which the teacher
would have written y in the same order, in finer steps: each step of the student is split into up to `substeps` steps,
and each of them sees the tokens of the steps before it. Inside a step of the student, the order of the positions is
drawn once per prompt, for all of its completions. The draw does not depend on the tokens, so that p_T adds up to 1 over
all completions.

The mean of log q - log p_T over the student's completions is KL(q || p_T), the reverse KL of TRL and verl, and

    grad KL(q || p_T) = E_q[(log q(y) - log p_T(y)) grad log q(y)],

since E_q[grad log q] = 0: the policy gradient of this reward is the gradient of -KL. (With a rank that reads the
logits, such as MaxProb, the order in which positions are written also depends on the weights. It changes in jumps,
which have no gradient, so the gradient leaves it out. This holds everywhere in the library.)

Each draw of the order inside the steps has its own p_T, and so its own KL. Averaged over the draws as well, log q -
log p_T is the mean of these KLs. It is at least the KL between q and the mean of all p_T, because the KL is convex
[ours].
"""

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.algorithms.advantages import has_unequal_rewards
from dllm_rl.distributed.collectives import gather_on_host
from dllm_rl.groups import Teacher
from dllm_rl.likelihoods.estimators import Causal, Trajectory, recorded
from dllm_rl.likelihoods.masks import ranks
from dllm_rl.models.base import Policy, position_ids
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for, row_seeds, uniforms
from dllm_rl.samplers.sampler import Sampler
from dllm_rl.step.collect import compute_advantages
from dllm_rl.step.context import StepContext, StepFeature
from dllm_rl.step.samples import Samples
from dllm_rl.training.cautions import order_depends_on_tokens
from dllm_rl.types.groups import group_numbers
from dllm_rl.types.rollouts import Rollout


class TeacherReward(StepFeature):
    """Add the teacher's reward to the task's rewards and recompute the advantages.

    The metric teacher/reverse_kl is the mean of log q - log p_T over the completions of all processes, in nats per
    completion; teacher/coeff is the teacher's `coeff`.
    """

    def __init__(self, recipe: Recipe, teacher: Teacher, policy: Policy) -> None:
        self.recipe = recipe
        self.teacher = teacher
        self.policy = policy

    def after_rollout(self, context: StepContext, samples: Samples, step: int) -> tuple[Samples, dict[str, float]]:
        """Raises FloatingPointError if the teacher's log-probs are NaN."""
        recipe, teacher, accelerator = self.recipe, self.teacher, context.accelerator
        with context.log.stage("teacher"), context.arithmetic():
            number = group_numbers(samples.group)
            generator = generator_for(recipe.seed, "teacher", step)
            seeds = samples.local(row_seeds(generator, int(number[-1]) + 1)[number], accelerator)
            reverse_kl = student_teacher_log_ratio(
                self.policy,
                samples.rollout,
                seeds,
                sampler=recipe.sampler,
                num_substeps=teacher.substeps,
                micro_batch_size=recipe.micro_batch_size,
            )
        (reverse_kl,) = gather_on_host([reverse_kl], accelerator, samples.counts)
        if reverse_kl.isnan().any():  # NaN in `rewards` means that a completion has no reward
            raise FloatingPointError(f"the teacher's log-probs of the completions of step {step} are NaN")
        coeff = teacher.coeff
        task_part = 0 if coeff == 1 else (1 - coeff) * samples.rewards
        rewards = task_part - coeff * reverse_kl.to(samples.rewards)
        advantages = compute_advantages(recipe.advantages, rewards, samples.group, {})
        samples = replace(samples, rewards=rewards, advantages=advantages)
        has_equal_rewards = ~has_unequal_rewards(rewards, samples.group)  # in place of the task's share
        return samples, {
            "teacher/reverse_kl": reverse_kl.mean().item(),
            "teacher/coeff": coeff,
            "frac_reward_zero_std": has_equal_rewards.double().mean().item(),
        }


def student_teacher_log_ratio(
    teacher: Policy,
    rollout: Rollout,
    seeds: Int[Tensor, " B"],
    *,
    sampler: Sampler,
    num_substeps: int,
    micro_batch_size: int | None,
) -> Float[Tensor, " B"]:
    """Return log q(y) - log p_T(y) of each row, in nats, in fp64.

    Args:
        teacher: The teacher.
        rollout: The student's completions.
        seeds: Seed of each row's order, the same in a group.
        sampler: The recipe's sampler, which made the rollout.
        num_substeps: The teacher's steps per step of the student.
        micro_batch_size: Rows per forward; None: all.

    Raises:
        ValueError: The teacher cannot score this rollout (`check_rollout`).
    """
    check_rollout(sampler, teacher, rollout, num_substeps)
    likelihood = Causal() if teacher.spec.attention == "causal" else Trajectory()
    unused_generator = torch.Generator()  # neither estimator is random
    student_logprobs = recorded(rollout, likelihood.draw_views(rollout, unused_generator))
    if num_substeps > 1:
        rollout = refine_steps(rollout, seeds, num_parts=num_substeps)
    views = likelihood.draw_views(rollout, unused_generator)
    teacher_logprobs = likelihood.logprobs(teacher, rollout, views, micro_batch_size=micro_batch_size)
    return (student_logprobs.double() - teacher_logprobs.double()).sum(-1)


def refine_steps(rollout: Rollout, seeds: Int[Tensor, " B"], *, num_parts: int) -> Rollout:
    """Split each denoising step of a rollout into `num_parts` steps of about equal size, or into one step per position
    if the step wrote fewer positions.

    The order of the positions is drawn from the row's seed. Rows with the same seed have the same order.
    """
    step = rollout.unmask_step
    offset = position_ids(rollout.attention_mask)  # the same with any padding
    seed_per_token = seeds[:, None].expand_as(step).flatten()
    order_keys = uniforms(seed_per_token, torch.zeros_like(seed_per_token), offset.flatten(), stream=0).view(step.shape)
    step_index = step + 1  # from 1; 0 for positions that no step wrote
    positions_per_step = torch.zeros_like(step_index[:, :1]).expand(-1, int(step_index.max()) + 1)
    positions_per_step = positions_per_step.scatter_add(1, step_index, torch.ones_like(step_index))
    first_rank = (positions_per_step.cumsum(-1) - positions_per_step).gather(1, step_index)
    rank_in_step = ranks(step_index + order_keys) - first_rank  # from 0
    step_size = positions_per_step.gather(1, step_index)
    substep = rank_in_step * step_size.clamp(max=num_parts) // step_size
    first_step = None if rollout.first_step is None else rollout.first_step * num_parts
    refined = torch.where(step < 0, -1, step * num_parts + substep)
    return replace(rollout, unmask_step=refined, order=None, first_step=first_step)


def check_rollout(sampler: Sampler, teacher: Policy, rollout: Rollout, num_substeps: int) -> None:
    """Raise ValueError on a rollout that a teacher cannot score."""
    if rollout.sampling_params.filters:
        raise ValueError(
            "teacher with top_k or top_p: a token that the teacher's filter drops has probability 0, and the KL is "
            "infinite; leave top_k and top_p out of the sampler"
        )
    reason, advice = None, "use teacher.substeps=1"
    if teacher.spec.attention == "causal":
        reason = "an autoregressive student writes one token per step, which cannot be split"
    elif rollout.events is not None or rollout.renoised is not None:
        reason = "the sampler writes positions more than once, so that its steps cannot be split"
    elif order_depends_on_tokens(sampler):
        reason = "the sampler's rank reads the drawn tokens, so that a finer order would depend on unwritten tokens"
        advice += ", or rank=MaxProb()"
    if num_substeps > 1 and reason:
        raise ValueError(f"teacher.substeps={num_substeps}: {reason}; {advice}")
