"""On-policy distillation: a teacher scores the student's completions, and the teacher's score is their reward, or part
of it.

    reward = (1 - teacher_coeff) * the task's reward + teacher_coeff * (log p_T(y) - log q(y)), in nats

q(y) is the record of the policy that sampled. p_T(y) is the probability with which the teacher would have written y in
the same order, in finer steps: each step of the student becomes up to `teacher_substeps` steps, and each of them sees
the tokens of the steps before it. The order of the positions inside a step of the student is a fixed draw, the same for
all completions of a prompt. The draw does not depend on the tokens, so that p_T adds up to 1 over all completions.

The mean of log q - log p_T over the student's completions is KL(q || p_T), the reverse KL of TRL and verl, and

    grad KL(q || p_T) = E_q[(log q(y) - log p_T(y)) grad log q(y)],

since E_q[grad log q] = 0: the policy gradient of this reward is the gradient of -KL. (The order of a rank such as
max_prob changes with the weights too, in jumps that no gradient sees, as everywhere in the library.) Over the draws of
the order, the mean is the mean of the KLs, at least the KL to the mean of the p_T [ours].
"""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from dllm_rl.device import send
from dllm_rl.distributed.collectives import gather_on_host, local
from dllm_rl.likelihoods.estimator import recorded
from dllm_rl.likelihoods.estimators import causal, trajectory
from dllm_rl.likelihoods.masks import ranks
from dllm_rl.models.base import Policy, position_ids
from dllm_rl.recipe import REFERENCE, Recipe
from dllm_rl.rng import generator_for, row_seeds, uniforms
from dllm_rl.training.cautions import order_by_draws
from dllm_rl.training.forwards import arithmetic
from dllm_rl.training.policies import build_policy
from dllm_rl.training.rollouts import compute_advantages
from dllm_rl.training.run import Run
from dllm_rl.training.samples import Samples
from dllm_rl.types import Rollout


def teacher_policy(recipe: Recipe, policy: Policy, accelerator: Accelerator) -> Policy | None:
    """Return the recipe's teacher, frozen; None without a teacher, or if the teacher is the run's reference.

    Raises:
        ValueError: The teacher cannot score this student's completions.
    """
    if recipe.teacher in (None, REFERENCE):
        return None
    changes: dict[str, Any] = {"model": recipe.teacher, "base_quantization": None}
    teacher = build_policy(replace(recipe, **changes), accelerator.device)
    check_teacher(policy, teacher)
    teacher.module.requires_grad_(False)
    return teacher


def check_teacher(policy: Policy, teacher: Policy) -> None:
    """Raise ValueError if the teacher's vocabulary or kind of attention differs from the student's."""
    ours, theirs = policy.spec, teacher.spec
    if theirs.attention != ours.attention:
        raise ValueError(
            f"teacher is {theirs.attention!r} ({theirs.name}) and the student {ours.attention!r} ({ours.name}): it "
            "cannot score the student's steps; give a teacher that writes as the student does"
        )
    vocabularies = [each.tokenizer.get_vocab() for each in (policy, teacher) if hasattr(each.tokenizer, "get_vocab")]
    same = len(vocabularies) < 2 or vocabularies[0] == vocabularies[1]
    if not same or (teacher.vocab_size, theirs.mask_id) != (policy.vocab_size, ours.mask_id):
        raise ValueError(
            f"teacher ({theirs.name}, {teacher.vocab_size} tokens, mask {theirs.mask_id}) has another vocabulary than "
            f"the student ({ours.name}, {policy.vocab_size} tokens, mask {ours.mask_id}), and the same ids would be "
            "other words; give a teacher with the student's tokenizer"
        )


def teach(run: Run[Recipe], samples: Samples, step: int) -> tuple[Samples, dict[str, float]]:
    """Add the teacher's part to the rewards and recompute the advantages; without a teacher, return the samples
    unchanged.

    The metric teacher/reverse_kl is the mean of log q - log p_T over the completions of all processes, in nats per
    completion; teacher/coeff is `teacher_coeff`.
    """
    recipe, accelerator = run.recipe, run.accelerator
    teacher = run.reference if recipe.teacher == REFERENCE else run.teacher
    if teacher is None:
        return samples, {}
    with run.log.stage("teacher"), arithmetic(recipe, accelerator):
        every = row_seeds(generator_for(recipe.seed, "teacher", step), len(samples.rewards))
        apart = log_ratio(recipe, teacher, samples.rollout, local(every, accelerator))
    (apart,) = gather_on_host([rearrange(apart, "(p g) -> p g", g=samples.rollout.group_size)], accelerator)
    share = recipe.teacher_coeff
    rewards = (1 - share) * samples.rewards - share * apart.to(samples.rewards)
    found = replace(samples, rewards=rewards, advantages=compute_advantages(recipe, rewards, {}))
    return found, {"teacher/reverse_kl": apart.mean().item(), "teacher/coeff": share}


def log_ratio(recipe: Recipe, teacher: Policy, rollout: Rollout, seeds: Int[Tensor, " p"]) -> Float[Tensor, " B"]:
    """Return log q(y) - log p_T(y) of each row, in nats, in fp64. `seeds` seeds the order of each prompt.

    Raises:
        ValueError: The steps of the rollout cannot be split.
    """
    check_rollout(recipe, teacher, rollout)
    likelihood = causal() if teacher.spec.attention == "causal" else trajectory()
    unused = torch.Generator()  # neither estimator is random
    sampled = recorded(rollout, likelihood.draw_views(rollout, unused))
    (seeds,) = send(rollout.tokens.device, seeds)
    taken = rollout if recipe.teacher_substeps == 1 else finer(rollout, seeds, num_parts=recipe.teacher_substeps)
    views = likelihood.draw_views(taken, unused)
    scored = likelihood.logprobs(teacher, taken, views, micro_batch_size=recipe.micro_batch_size)
    return (sampled.double() - scored.double()).sum(-1)


def finer(rollout: Rollout, seeds: Int[Tensor, " p"], *, num_parts: int) -> Rollout:
    """Return the rollout as if each of its steps had been `num_parts` steps of equal size, or one step per position if
    it has fewer positions. The order of these steps is drawn from the prompt's seed, the same for all of its
    completions.
    """
    step = rollout.unmask_step
    place = position_ids(rollout.attention_mask)  # does not depend on padding
    rows = seeds.repeat_interleave(rollout.group_size)[:, None].expand_as(step).flatten()
    keys = uniforms(rows, torch.zeros_like(rows), place.flatten(), stream=0).view(step.shape)
    group = step + 1  # 0: not written
    sizes = torch.zeros_like(group[:, :1]).expand(-1, int(group.max()) + 1)
    sizes = sizes.scatter_add(1, group, torch.ones_like(group))
    rank = ranks(group + keys) - (sizes.cumsum(-1) - sizes).gather(1, group)  # rank inside the step, from 0
    size = sizes.gather(1, group)
    part = rank * size.clamp(max=num_parts) // size
    return replace(rollout, unmask_step=torch.where(step < 0, -1, step * num_parts + part), order=None)


def check_rollout(recipe: Recipe, teacher: Policy, rollout: Rollout) -> None:
    """Raise ValueError on a rollout that a teacher cannot score."""
    if rollout.sampling_params.filters:
        raise ValueError(
            "teacher with top_k or top_p: a token that the teacher's own filter drops has no probability, and the KL "
            "no bound; leave top_k and top_p out of the sampler"
        )
    why = None
    if teacher.spec.attention == "causal":
        why = "an autoregressive student writes one token a step, which has no parts"
    elif rollout.events is not None or rollout.renoised is not None:
        why = "the sampler writes a position more than once, so that its steps have no finer order"
    elif order_by_draws(recipe):
        why = "the sampler's rank chooses by the drawn tokens, so that a finer order would know them before they stand"
    if recipe.teacher_substeps > 1 and why:
        raise ValueError(f"teacher_substeps={recipe.teacher_substeps}: {why}; use teacher_substeps=1, or rank=max_prob")
