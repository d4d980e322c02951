"""Complete prompts: `complete`, and what it shares with `dllm-rl sample`."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_rl.decoding.prompts import encode
from dllm_rl.decoding.texts import decode, full_texts
from dllm_rl.device import find_device
from dllm_rl.models.base import Policy
from dllm_rl.models.load import load_policy
from dllm_rl.records import from_json
from dllm_rl.rng import generator_for
from dllm_rl.samplers import Renoise, Sampler, Unmask
from dllm_rl.samplers.sampler import check_rollout
from dllm_rl.samplers.with_settings import check_number_of_samples, sampler_with
from dllm_rl.tasks.base import Problem
from dllm_rl.types.rollouts import Rollout

Prompt = str | list[dict[str, str]]


def complete(
    model: Policy | str | Path,
    prompts: Prompt | Sequence[Prompt],
    *,
    sampler: Sampler | None = None,
    blank: str | None = None,
    num_generations: int = 1,
    seed: int = 0,
    **settings: Any,
) -> str | list[str]:
    """Return the completion of a prompt, or the completions of several.

    Call it to try a model; call `evaluate` to measure one. `policy.complete(...)` is `complete(policy, ...)`, and
    `dllm-rl sample MODEL PROMPT ...` prints the same texts.

        grpo(model, rows, reward).policy.complete("37=")
        complete("runs/sums-seed0", "37=")
        complete("GSAI-ML/LLaDA-8B-Instruct", [{"role": "user", "content": "Hi"}], max_new_tokens=64)

    Args:
        model: Diffusion or causal policy; or what `load_policy` opens, such as a run's folder, a checkpoint or a hub
            id, in the dtype that it is stored in and on the accelerator, where there is one.
        prompts: A text, or a chat (messages with role and content); or a list of them, which is one batch.
        sampler: Sampler of the policy. None (default): that of the evaluations of the run that trained the policy; for
            another policy, 16 tokens at temperature 0, or one canvas of a model whose noise is random tokens.
        blank: For infilling: a text of which each occurrence in a prompt is one token to fill in. The texts are then
            the filled prompts. None (default): no infilling.
        num_generations: Completions of each prompt. Default: 1.
        seed: Seed of the sampler. Default: 0.
        settings: Fields of the sampler, such as max_new_tokens, temperature or diffusion_steps; they replace those of
            `sampler`.

    Returns:
        The text of a single prompt, or the list of the texts in the order of the prompts, `num_generations` of each.

    Raises:
        ValueError: There is no prompt, a prompt is neither a text nor a chat, or the policy's sampler has no such
            setting.
    """
    is_single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
    each: Any = [prompts] if is_single else prompts
    for prompt in each:
        if not isinstance(prompt, str) and not (
            isinstance(prompt, Sequence) and prompt and all(isinstance(turn, Mapping) for turn in prompt)
        ):
            raise ValueError(f"prompts has {prompt!r}, which is neither a text nor a chat; give texts, or messages")
    policy = load_policy(model, dtype="auto", device=find_device()) if isinstance(model, str | Path) else model
    given = sampler or sampler_of_run(getattr(policy, "eval_sampler", None))
    problems = [Problem(prompt, blank=blank) for prompt in each]
    if blank is not None and sampler is None:
        settings = {"max_new_tokens": 0} | settings
    made = sampler_with(policy, given, settings)
    rollout, _ = complete_problems(policy, problems, made, num_generations=num_generations, seed=seed)
    texts = completion_texts(policy, rollout, has_blanks=blank is not None)
    return texts[0] if is_single and num_generations == 1 else texts


def sampler_of_run(stored: Any, field: str = "eval_sampler") -> Sampler | None:
    """Return a run's sampler, which may be stored as JSON; None, with a warning, if only the run's script can make it
    or one of its rules.
    """
    if not isinstance(stored, dict):
        return stored
    try:
        sampler: Sampler = from_json(Sampler, stored, field)
    except ValueError:
        warnings.warn(f"{field}={stored} is not part of the library, so the default is used; pass yours", stacklevel=3)
        return None
    return sampler


def complete_problems(
    policy: Policy,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    num_generations: int = 1,
    seed: int = 0,
    on_step: Callable[[Rollout], None] | None = None,
) -> tuple[Rollout, float]:
    """Return the checked rollout of problems, each in `num_generations` rows, and the sampler's seconds.

    Args:
        policy: Policy that completes the problems.
        problems: Problems.
        sampler: Sampler for the policy.
        num_generations: Completions of each problem. Default: 1.
        seed: Seed of the sampler. Default: 0.
        on_step: Function that is called with the rollout after each step of a diffusion model's sampler; the others do
            not call it. None (default): no function.

    Raises:
        ValueError: There are no problems, the completions of a problem would all be equal, or the sampler is not for
            the policy or leaves blanks unfilled.
    """
    if not problems:
        raise ValueError("no prompts: give at least one")
    check_number_of_samples(sampler, num_generations, "num_generations")
    prompts = encode(policy, problems, num_generations=num_generations, reads_order=False)
    has_steps = on_step is not None and isinstance(sampler, Unmask | Renoise)
    start_time = time.perf_counter()  # the encoding of the prompts is not timed
    rollout = sampler(policy, prompts, generator_for(seed), **({"on_step": on_step} if has_steps else {}))
    seconds = time.perf_counter() - start_time
    check_rollout(sampler, policy, prompts, rollout)
    return rollout, seconds


def completion_texts(policy: Policy, rollout: Rollout, *, has_blanks: bool) -> list[str]:
    """Return each row's completion as text; with `has_blanks`, the full text with its blanks filled in."""
    return full_texts(policy, rollout) if has_blanks else decode(policy, rollout)
