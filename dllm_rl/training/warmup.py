"""Supervised warm-up on prompts with a known completion. The loss is the masked-diffusion loss, the causal loss, or the
loss of `training.denoising`.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dllm_rl.decoding.tokens import ordinary_ids, prompt_ids, text_ids
from dllm_rl.distributed.collectives import local, reduce_metrics, sum_gradients
from dllm_rl.likelihoods.views import View
from dllm_rl.models.base import Policy, gather_if_sharded
from dllm_rl.models.forward.uneven import join_uneven_forwards
from dllm_rl.monitoring.log import RunLog
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.step.collect import draw_indices, fit_prompts
from dllm_rl.tasks.base import Problem
from dllm_rl.training.denoising import Noise, denoising_examples, denoising_loss
from dllm_rl.training.step_settings import step_settings
from dllm_rl.types import Rollout, SamplingParams

LR_WARMUP_STEPS = 30  # steps in which the learning rate rises linearly to its full value


def tokenize_solutions(
    policy: Policy, problems: Sequence[Problem], *, max_new_tokens: int
) -> list[tuple[list[int], list[int]]]:
    """Return the token ids of each prompt and of its solution.

    Raises:
        ValueError: A solution is missing or too long.
    """
    if any(problem.blank is not None for problem in problems):
        raise ValueError(
            "a problem has blanks, and the warm-up appends solutions to the prompt; use sft_warmup_steps=0"
        )
    pairs = []
    for problem in problems:
        prompt = prompt_ids(policy, problem.prompt)
        if problem.solution is None:
            raise ValueError(
                f"solution is None for the problem {problem.prompt!r}; warm-up needs a reference completion"
            )
        solution = text_ids(policy, problem.solution)
        if len(solution) > max_new_tokens:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is too short for a solution of {len(solution)}: {problem.solution!r}"
            )
        pairs.append((prompt, solution))
    return pairs


def examples(policy: Policy, problems: Sequence[Problem], *, max_new_tokens: int) -> Rollout:
    """Return the problems' prompts and solutions as a rollout, as if the policy had sampled the solutions.

    Raises:
        ValueError: A solution is missing or too long.
    """
    eos = policy.spec.eos_ids[0] if policy.spec.eos_ids else policy.pad_id
    causal = policy.spec.attention == "causal"
    pairs = tokenize_solutions(policy, problems, max_new_tokens=max_new_tokens)
    width = max(len(prompt) for prompt, _ in pairs)
    token_rows = []
    attention_rows = []
    scored_rows = []
    for prompt, solution in pairs:
        num_left_pads = width - len(prompt)
        num_end_tokens = max_new_tokens - len(solution)
        # A diffusion model learns every end token of the completion; a causal model stops at the first.
        num_scored = min(max_new_tokens, len(solution) + 1) if causal else max_new_tokens
        token_rows.append([policy.pad_id] * num_left_pads + prompt + solution + [eos] * num_end_tokens)
        attention_rows.append([False] * num_left_pads + [True] * (len(prompt) + max_new_tokens))
        scored_rows.append([False] * width + [True] * num_scored + [False] * (max_new_tokens - num_scored))
    tokens = torch.tensor(token_rows, device=policy.device)
    return Rollout(
        tokens=tokens,
        attention_mask=torch.tensor(attention_rows, device=policy.device),
        completion_mask=torch.tensor(scored_rows, device=policy.device),
        unmask_step=torch.full_like(tokens, -1),
        logprobs=torch.zeros(tokens.shape, device=policy.device),
        group=torch.arange(len(tokens), device=policy.device),
        sampling_params=SamplingParams(suppress=() if policy.spec.mask_id is None else (policy.spec.mask_id,)),
    )


def draw_levels(
    generator: Generator, num_rows: int, length: int, *, min_t: float = 0.02
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B L"], Float[Tensor, "B L"]]:
    """Draw the random numbers of a batch of `supervised_loss`.

    Returns:
        A mask ratio t ~ U[min_t, 1) per row, stratified over the rows; uniforms (a token is masked if its uniform is
        below t); and uniforms for `corrupted`.
    """
    # Stratified: the rows draw from different parts of the interval, so that every batch has low and high mask ratios,
    # and the loss varies less.
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
        raise ValueError(f"corruption={share} replaces visible tokens of a diffusion model; use 0 for a causal model")
    ordinary = ordinary_ids(policy).to(tokens.device)
    index = torch.searchsorted(ordinary, tokens.contiguous())
    # 0 for a special token, which any ordinary id may replace; an ordinary token is replaced by another id.
    is_ordinary = (ordinary[index % len(ordinary)] == tokens).long()
    # Noise below `share`, divided by `share`, is uniform in [0, 1). In fp64, so that no device rounds the product up to
    # the next id.
    shift = (noise.double() / share * (len(ordinary) - is_ordinary)).long()
    return torch.where(noise.double() < share, ordinary[(index + is_ordinary + shift) % len(ordinary)], tokens)


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

    A causal model's loss is -sum_i log p(y_i | y_<i) / tokens. A diffusion model's loss is -sum_{masked i} log p(y_i |
    visible tokens) / t / tokens, where t is the row's mask ratio (LLaDA eq. 5 [paper]; strata and min_t [ours]).
    `corruption` is the share of a diffusion model's visible tokens that are replaced by other tokens; if it is above 0,
    the loss includes -log p / tokens of each visible token [ours].
    """
    completion = slice(-uniforms.shape[1], None)
    input_tokens = batch.tokens.clone()
    input_tokens[:, completion] = corrupted(
        policy, input_tokens[:, completion], noise.to(policy.device), share=corruption
    )
    masked = batch.completion_mask
    weight = masked.float()
    if policy.spec.attention != "causal":
        masked = torch.zeros_like(masked)
        masked[:, completion] = (uniforms < levels[:, None]).to(policy.device)
        masked &= batch.completion_mask
        weight *= torch.where(masked, 1 / levels[:, None].to(policy.device), float(corruption > 0))
    # The model reads the corrupted tokens; the loss scores the tokens of the solution.
    view = View(masked, weight != 0, canvas=lambda rollout: (input_tokens, rollout.tokens))
    logps = view.logprobs(policy, batch)
    return -(logps * weight).sum() / batch.completion_mask.sum()


def warm_up(
    recipe: Recipe, policy: Policy, accelerator: Accelerator, log: RunLog, measure: Callable[[], dict[str, float]]
) -> int:
    """Train with AdamW for at most sft_warmup_steps, until `sft_warmup_metric`, measured by `measure`, reaches
    `sft_warmup_target`; return the number of steps.
    """
    if not recipe.sft_warmup_steps:
        return 0
    name = f"warmup/{recipe.sft_warmup_metric}"
    progress = log.view("warm-up", recipe.sft_warmup_steps, curve=name)
    optimizer = torch.optim.AdamW(policy.module.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    steps_done = 0
    is_reached = False
    while steps_done < recipe.sft_warmup_steps and not is_reached:
        loss = warmup_step(recipe, policy, optimizer, steps_done, accelerator)
        steps_done += 1
        metrics = reduce_metrics({"warmup/loss": (torch.tensor(loss), torch.tensor(1.0))}, accelerator)
        if steps_done % recipe.sft_warmup_eval_steps == 0:
            metrics[name] = measure()[recipe.sft_warmup_metric]
            is_reached = metrics[name] >= recipe.sft_warmup_target
        log.write_warmup(steps_done - 1, metrics)
        progress(metrics, show=is_reached or steps_done % recipe.logging_steps == 0)
    progress({}, show=False, close=True)
    return steps_done


def warmup_step(
    recipe: Recipe, policy: Policy, optimizer: torch.optim.Optimizer, step: int, accelerator: Accelerator
) -> float:
    """Train one step; return this process's loss. Problems and masks depend only on the seed and the step, not on the
    number of processes.

    Raises:
        FloatingPointError: A gradient is not finite. It is raised before the weights change.
    """
    generator = generator_for(recipe.seed, "warm-up masks", step)
    rows = recipe.sft_warmup_batch_size
    canvas_length = policy.spec.block_size if policy.spec.attention == "encoder_decoder" else None
    draws = list(draw_levels(generator, rows, canvas_length or recipe.max_new_tokens))
    if canvas_length:
        draws += torch.rand(2, rows, generator=generator)
    indices = draw_indices(len(recipe.task), recipe.sft_warmup_batch_size, recipe.seed, "warm-up", step)
    problems, _ = fit_prompts(step_settings(recipe), policy, local(indices, accelerator).tolist())
    local_draws = [local(draw, accelerator) for draw in draws]
    with join_uneven_forwards(policy, backward=True):
        if canvas_length:
            pairs = tokenize_solutions(policy, problems, max_new_tokens=recipe.max_new_tokens)
            end = policy.spec.eos_ids[0]
            pairs_with_end = [(prompt, [*solution, end][: recipe.max_new_tokens]) for prompt, solution in pairs]
            noisy_examples = denoising_examples(policy, pairs_with_end, Noise(*local_draws))
            loss = denoising_loss(policy, noisy_examples) / len(noisy_examples)
        else:
            batch = examples(policy, problems, max_new_tokens=recipe.max_new_tokens)
            loss = supervised_loss(policy, batch, *local_draws, corruption=recipe.sft_warmup_corruption)
        loss.backward()
    sum_gradients(policy.module, accelerator, mean=True)  # every process has the same number of rows
    norm = gather_if_sharded(torch.nn.utils.clip_grad_norm_(policy.module.parameters(), 1.0))
    if not norm.isfinite():
        raise FloatingPointError(f"gradient norm is {norm.item()} at warm-up step {step}; the update was not applied")
    for group in optimizer.param_groups:
        group["lr"] = recipe.sft_warmup_learning_rate * min(1.0, (step + 1) / LR_WARMUP_STEPS)
    optimizer.step()
    policy.module.zero_grad(set_to_none=True)  # frees memory for an evaluation
    return loss.item()
