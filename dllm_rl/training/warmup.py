"""Supervised warm-up on prompts with a known completion. The loss is the masked-diffusion loss, the causal loss, or the
loss of `training.denoising`.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dllm_rl.distributed.collectives import local, reduce_metrics, sum_gradients
from dllm_rl.likelihoods.views import View
from dllm_rl.models.base import Policy, whole
from dllm_rl.models.forward.uneven import join_uneven_forwards
from dllm_rl.models.tokens import ordinary_ids, prompt_ids, text_ids
from dllm_rl.monitoring.log import RunLog
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.tasks.base import Problem
from dllm_rl.training.denoising import Noise, denoising_loss, lessons
from dllm_rl.training.prompts import choose, draw_indices
from dllm_rl.types import Rollout, SamplingParams

RISE = 30  # steps in which the learning rate rises to its full height


def solved(policy: Policy, problems: Sequence[Problem], *, max_new_tokens: int) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each prompt and of its solution.

    Raises:
        ValueError: A solution is missing or too long.
    """
    if any(problem.blank is not None for problem in problems):
        raise ValueError("a problem has blanks, and warm-up writes solutions behind the prompt; use sft_warmup_steps=0")
    found = []
    for problem in problems:
        prompt = prompt_ids(policy, problem.prompt)
        if problem.solution is None:
            raise ValueError(
                f"solution is None for the problem {problem.prompt!r}; warm-up needs a reference completion"
            )
        answer = text_ids(policy, problem.solution)
        if len(answer) > max_new_tokens:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is too short for a solution of {len(answer)}: {problem.solution!r}"
            )
        found.append((prompt, answer))
    return found


def examples(policy: Policy, problems: Sequence[Problem], *, max_new_tokens: int) -> Rollout:
    """Return left-padded prompts with their solutions, as if they were sampled.

    Raises:
        ValueError: A solution is missing or too long.
    """
    eos = policy.spec.eos_ids[0] if policy.spec.eos_ids else policy.pad_id
    causal = policy.spec.attention == "causal"
    pairs = solved(policy, problems, max_new_tokens=max_new_tokens)
    width = max(len(prompt) for prompt, _ in pairs)
    rows = []
    attention = []
    scored = []
    for prompt, answer in pairs:
        left = width - len(prompt)
        spare = max_new_tokens - len(answer)
        # A diffusion model generates all end tokens; a causal model stops at the first.
        learnt = min(max_new_tokens, len(answer) + 1) if causal else max_new_tokens
        rows.append([policy.pad_id] * left + prompt + answer + [eos] * spare)
        attention.append([False] * left + [True] * (len(prompt) + max_new_tokens))
        scored.append([False] * width + [True] * learnt + [False] * (max_new_tokens - learnt))
    tokens = torch.tensor(rows, device=policy.device)
    return Rollout(
        tokens=tokens,
        attention_mask=torch.tensor(attention, device=policy.device),
        completion_mask=torch.tensor(scored, device=policy.device),
        unmask_step=torch.full_like(tokens, -1),
        logprobs=torch.zeros(tokens.shape, device=policy.device),
        group_size=1,
        sampling_params=SamplingParams(suppress=() if policy.spec.mask_id is None else (policy.spec.mask_id,)),
    )


def draw_levels(
    generator: Generator, num_rows: int, length: int, *, min_t: float = 0.02
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Draw masking levels t ~ U(min_t, 1], stratified over the batch, the uniforms to compare them with, and noise."""
    # One level per stratum: a batch has easy and hard rows, so that the loss varies less.
    strata = (torch.randperm(num_rows, generator=generator) + torch.rand(num_rows, generator=generator)) / num_rows
    uniforms = torch.rand(num_rows, length, generator=generator)
    return min_t + (1 - min_t) * strata, uniforms, torch.rand(num_rows, length, generator=generator)


def corrupted(
    policy: Policy, tokens: Int[Tensor, "*K"], noise: Float[Tensor, "*K"], *, share: float
) -> Int[Tensor, "*K"]:
    """Replace each token with probability `share` by another token, uniform over the vocabulary without special tokens.
    `noise` has uniforms in [0, 1).

    Raises:
        ValueError: The model is causal.
    """
    if not share:
        return tokens
    if policy.spec.attention == "causal":
        raise ValueError(f"corruption={share} is of a diffusion model's visible tokens; use 0 for a causal model")
    ordinary = ordinary_ids(policy).to(tokens.device)
    place = torch.searchsorted(ordinary, tokens.contiguous())
    own = (ordinary[place % len(ordinary)] == tokens).long()  # 0 for a special token, which any id may replace
    # A uniform below `share`, divided by `share`, is uniform too. Doubles: no device rounds the product up.
    drawn = (noise.double() / share * (len(ordinary) - own)).long()
    return torch.where(noise.double() < share, ordinary[(place + own + drawn) % len(ordinary)], tokens)


def supervised_loss(
    policy: Policy,
    batch: Rollout,
    levels: Float[Tensor, " B"],
    uniforms: Float[Tensor, "B L"],
    noise: Float[Tensor, "B L"],
    *,
    corruption: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the mean negative log-likelihood per completion token, in nats. The last L positions of each row are the
    completion.

    A causal model's loss is -sum_t log p(y_t | before) / tokens. A diffusion model's loss is -sum_{masked with the
    row's t} log p(y_i | rest) / t / tokens (LLaDA eq. 5 [paper]; strata, floor [ours]). `corruption` is the share of a
    diffusion model's visible tokens that are replaced; if it is above 0, each visible token counts 1 / tokens [ours].
    """
    here = slice(-uniforms.shape[1], None)
    seen = batch.tokens.clone()
    seen[:, here] = corrupted(policy, seen[:, here], noise.to(policy.device), share=corruption)
    masked = batch.completion_mask
    weight = masked.float()
    if policy.spec.attention != "causal":
        masked = torch.zeros_like(masked)
        masked[:, here] = (uniforms < levels[:, None]).to(policy.device)
        masked &= batch.completion_mask
        weight *= torch.where(masked, 1 / levels[:, None].to(policy.device), float(corruption > 0))
    # The view sees the corrupted tokens, and scores the solution's tokens.
    view = View(masked, weight != 0, canvas=lambda rollout: (seen, rollout.tokens))
    logps = view.logprobs(policy, batch)
    return -(logps * weight).sum() / batch.completion_mask.sum()


def warm_up(
    recipe: Recipe, policy: Policy, accelerator: Accelerator, log: RunLog, measure: Callable[[], dict[str, float]]
) -> int:
    """Train with AdamW on `supervised_loss` until `measure` reaches sft_warmup_target; return the number of steps."""
    if not recipe.sft_warmup_steps:
        return 0
    name = f"warmup/{recipe.sft_warmup_metric}"
    progress = log.view("warm-up", recipe.sft_warmup_steps, curve=name)
    optimizer = torch.optim.AdamW(policy.module.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    taken = 0
    reached = False
    while taken < recipe.sft_warmup_steps and not reached:
        loss = warmup_step(recipe, policy, optimizer, taken, accelerator)
        taken += 1
        metrics = reduce_metrics({"warmup/loss": (torch.tensor(loss), torch.tensor(1.0))}, accelerator)
        if taken % recipe.sft_warmup_eval_steps == 0:
            metrics[name] = measure()[recipe.sft_warmup_metric]
            reached = metrics[name] >= recipe.sft_warmup_target
        log.write_warmup(taken - 1, metrics)
        progress(metrics, show=reached or taken % recipe.logging_steps == 0)
    progress({}, show=False, close=True)
    return taken


def warmup_step(
    recipe: Recipe, policy: Policy, optimizer: torch.optim.Optimizer, step: int, accelerator: Accelerator
) -> float:
    """Train one step on the problems and masks of its number, which do not depend on the number of processes; return
    this process's loss.

    Raises:
        FloatingPointError: A gradient is not finite. It is raised before the weights change.
    """
    generator = generator_for(recipe.seed, "warm-up masks", step)
    rows = recipe.sft_warmup_batch_size
    canvas = policy.spec.block_size if policy.spec.attention == "encoder_decoder" else None
    drawn = list(draw_levels(generator, rows, canvas or recipe.max_new_tokens))
    if canvas:
        drawn += torch.rand(2, rows, generator=generator)
    chosen = draw_indices(len(recipe.task), recipe.sft_warmup_batch_size, recipe.seed, "warm-up", step)
    problems, _ = choose(recipe, policy, local(chosen, accelerator).tolist())
    mine = [local(each, accelerator) for each in drawn]
    with join_uneven_forwards(policy, backward=True):
        if canvas:
            pairs = solved(policy, problems, max_new_tokens=recipe.max_new_tokens)
            end = policy.spec.eos_ids[0]
            ended = [(prompt, [*answer, end][: recipe.max_new_tokens]) for prompt, answer in pairs]
            loss = denoising_loss(policy, lessons(policy, ended, Noise(*mine))) / len(ended)
        else:
            batch = examples(policy, problems, max_new_tokens=recipe.max_new_tokens)
            loss = supervised_loss(policy, batch, *mine, corruption=recipe.sft_warmup_corruption)
        loss.backward()
    sum_gradients(policy.module, accelerator, mean=True)  # all processes have equal shares
    norm = whole(torch.nn.utils.clip_grad_norm_(policy.module.parameters(), 1.0))
    if not norm.isfinite():
        raise FloatingPointError(f"gradient norm is {norm.item()} at warm-up step {step}; it was not applied")
    for group in optimizer.param_groups:
        group["lr"] = recipe.sft_warmup_learning_rate * min(1.0, (step + 1) / RISE)
    optimizer.step()
    policy.module.zero_grad(set_to_none=True)  # frees the memory for an evaluation
    return loss.item()
