"""Supervised warm-up: the masked-diffusion loss, or the causal one, on prompts with a known completion."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Generator, Tensor

from dllm_rl.distributed.collectives import local, reduce_metrics, sum_gradients
from dllm_rl.distributed.sharding import in_pace
from dllm_rl.likelihoods.scoring import score_view
from dllm_rl.models.base import Policy, whole
from dllm_rl.models.tokens import prompt_ids, text_ids
from dllm_rl.monitoring.log import RunLog
from dllm_rl.recipe import Recipe
from dllm_rl.rng import generator_for
from dllm_rl.tasks.base import Problem
from dllm_rl.training.prompts import choose, draw_indices
from dllm_rl.types import Rollout, SamplingParams


def examples(policy: Policy, problems: Sequence[Problem], *, max_new_tokens: int) -> Rollout:
    """Left-padded prompts with solutions, as if sampled. Raises ValueError if a solution is missing or too long."""
    eos = policy.spec.eos_ids[0] if policy.spec.eos_ids else policy.pad_id
    causal = policy.spec.attention == "causal"
    if any(problem.blank is not None for problem in problems):
        raise ValueError("a problem has blanks, and warm-up writes solutions behind the prompt; use warmup_steps=0")
    prompts = [prompt_ids(policy, problem.prompt) for problem in problems]
    width = max(map(len, prompts))
    rows = []
    attention = []
    scored = []
    for problem, prompt in zip(problems, prompts, strict=True):
        if problem.solution is None:
            raise ValueError(
                f"solution is None for the problem {problem.prompt!r}; warm-up needs a reference completion"
            )
        answer = text_ids(policy, problem.solution)
        if len(answer) > max_new_tokens:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} is too short for a solution of {len(answer)}: {problem.solution!r}"
            )
        left = width - len(prompt)
        spare = max_new_tokens - len(answer)
        # A diffusion model generates all end tokens, a causal one stops at the first.
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
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B L"]]:
    """Masking levels t ~ U(min_t, 1], stratified over the batch, and the uniforms to compare with them."""
    # One level per stratum: a batch has easy and hard rows, so that the loss varies less.
    strata = (torch.randperm(num_rows, generator=generator) + torch.rand(num_rows, generator=generator)) / num_rows
    return min_t + (1 - min_t) * strata, torch.rand(num_rows, length, generator=generator)


def supervised_loss(
    policy: Policy, batch: Rollout, levels: Float[Tensor, " B"], uniforms: Float[Tensor, "B L"]
) -> Float[Tensor, ""]:
    """Mean negative log-likelihood per completion token, nats. The L completion positions stand at the rows' end.

    causal     -sum_t log p(y_t | before) / tokens
    diffusion  -sum_{masked with the row's t} log p(y_i | rest) / t / tokens (LLaDA eq. 5 [paper]; strata, floor [ours])
    """
    if policy.spec.attention == "causal":
        scored = batch.completion_mask
        weight = scored.float()
    else:
        below = (uniforms < levels[:, None]).to(policy.device)
        scored = torch.zeros_like(batch.completion_mask)
        scored[:, -uniforms.shape[1] :] = below
        scored &= batch.completion_mask
        weight = scored / levels[:, None].to(policy.device)
    logps = score_view(policy, batch, scored, scored)
    return -(logps * weight).sum() / batch.completion_mask.sum()


def warmup(
    policy: Policy,
    draw_problems: Callable[[int], Sequence[Problem]],
    *,
    max_new_tokens: int,
    num_steps: int,
    learning_rate: float,
    draw_noise: Callable[[int], tuple[Tensor, Tensor]],  # step -> levels and uniforms, as `draw_levels`
    lr_warmup_steps: int = 30,
    on_step: Callable[[int, float], bool] = lambda step, loss: False,  # True ends the warm-up
    reduce_gradients: Callable[[Policy], None] = lambda policy: None,  # sums over processes
) -> int:
    """AdamW on `supervised_loss`; returns the number of steps taken."""
    optimizer = torch.optim.AdamW(policy.module.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    for step in range(num_steps):
        batch = examples(policy, draw_problems(step), max_new_tokens=max_new_tokens)
        with in_pace(policy, backward=True):
            loss = supervised_loss(policy, batch, *draw_noise(step))
            loss.backward()
        reduce_gradients(policy)
        norm = whole(torch.nn.utils.clip_grad_norm_(policy.module.parameters(), 1.0))
        if not norm.isfinite():
            raise FloatingPointError(f"gradient norm is {norm.item()} at warm-up step {step}; it was not applied")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / max(1, lr_warmup_steps))
        optimizer.step()
        policy.module.zero_grad(set_to_none=True)  # an evaluation has the memory
        if on_step(step, loss.item()):
            return step + 1
    return num_steps


def warm_up(
    recipe: Recipe, policy: Policy, accelerator: Accelerator, log: RunLog, measure: Callable[[], dict[str, float]]
) -> int:
    """`warmup` with the recipe's settings until `measure` reaches warmup_target; returns the number of steps taken."""
    if not recipe.warmup_steps:
        return 0
    name = f"warmup/{recipe.warmup_metric}"
    progress = log.view("warm-up", recipe.warmup_steps, curve=name)

    def draw_noise(step: int) -> tuple[Tensor, Tensor]:
        generator = generator_for(recipe.seed, "warm-up masks", step)
        levels, uniforms = draw_levels(generator, recipe.warmup_batch_size, recipe.max_new_tokens)
        return local(levels, accelerator), local(uniforms, accelerator)  # as one process would draw them

    def draw_problems(step: int) -> list[Problem]:
        chosen = draw_indices(len(recipe.task), recipe.warmup_batch_size, recipe.seed, "warm-up", step)
        return choose(recipe, policy, local(chosen, accelerator).tolist())[0]

    def on_step(step: int, loss: float) -> bool:
        done = (step + 1) % recipe.warmup_eval_steps == 0
        found = measure()[recipe.warmup_metric] if done else 0.0
        reached = done and found >= recipe.warmup_target
        shares = {"warmup/loss": (torch.tensor(loss), torch.tensor(1.0))}
        metrics = reduce_metrics(shares, accelerator) | ({name: found} if done else {})
        log.write_warmup(step, metrics)
        progress(metrics, show=reached or (step + 1) % recipe.logging_steps == 0)
        return reached

    taken = warmup(
        policy,
        draw_problems,
        max_new_tokens=recipe.max_new_tokens,
        num_steps=recipe.warmup_steps,
        learning_rate=recipe.warmup_learning_rate,
        draw_noise=draw_noise,
        on_step=on_step,
        reduce_gradients=lambda policy: sum_gradients(policy.module, accelerator, mean=True),  # equal shares
    )
    progress({}, show=False, close=True)
    return taken
