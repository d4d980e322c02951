"""A policy's sampler with settings by name, as a request, a command or `complete` gives them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from dllm_rl.models.base import Policy
from dllm_rl.records import make_record
from dllm_rl.samplers import Autoregress, Renoise, Sampler, Unmask, decodes_in_engine, sampler_for, settings_for

# Settings of `Unmask` that no request may set. compile_step would compile a graph for every new batch shape.
NOT_SETTINGS = {"compile_step"}


def known_settings(policy: Policy) -> set[str]:
    """Return the names of the settings of the policy's sampler."""
    return {field.name for field in fields(sampler_for(policy))} - NOT_SETTINGS


def with_settings(policy: Policy, settings: Mapping[str, Any], defaults: Sampler | None = None) -> Sampler:
    """Return the policy's sampler with settings, which may be JSON (`records.to_json`), and those of `defaults` for the
    others.

    A commit rule without a rank gets the rank that it requires. At another length without `diffusion_steps`, those of
    `defaults` are scaled with the length (`scaled_steps`), except for `Renoise`, whose steps are those of a canvas.

    Raises:
        ValueError: The policy's sampler has no such setting, or a value is wrong.
    """
    sampler = sampler_for(policy)
    known = known_settings(policy)
    for name, value in settings.items():
        if name not in known:
            raise ValueError(
                f"{name}={value!r} is not a setting of {sampler.__name__}, the sampler of this model; leave it out"
            )
    default_values = {} if defaults is None else {each.name: getattr(defaults, each.name) for each in fields(defaults)}
    values = default_values | dict(settings)
    if issubclass(sampler, Unmask) and "diffusion_steps" not in settings and default_values.get("diffusion_steps"):
        steps, length = default_values["diffusion_steps"], values["max_new_tokens"]
        block_size = values.get("block_size") or policy.spec.block_size
        spare = block_size - 1 if policy.spec.attention == "block_causal" and block_size else 0
        values["diffusion_steps"] = scaled_steps(steps, default_values["max_new_tokens"], length, block_size, spare)
    made: Sampler = make_record(sampler, values)
    if isinstance(made, Unmask) and "commit" in settings and "rank" not in settings:
        return with_required_rank(made)
    return made


def scaled_steps(steps: int, length: int, new_length: int, block_size: int | None = None, spare: int = 0) -> int:
    """Return the `diffusion_steps` at a new length: with as many tokens per step, rounded up.

    They are at least one per block, and at most one per token. At the same length, and at 0 (a sampler that fills in
    the blanks of prompts), the steps stay the same. `spare` is the largest number of tokens that a prompt may have in
    the completion's first block.
    """
    if new_length in (length, 0):
        return steps
    scaled = math.ceil(new_length * steps / length) if length else steps
    num_blocks = math.ceil((new_length + spare) / (block_size or new_length))
    return min(max(scaled, num_blocks), new_length)


def with_required_rank(sampler: Unmask) -> Unmask:
    """Return the sampler with a rank whose scores its commit rule can read, unchanged if its own is one."""
    ranks = sampler.commit.required_ranks
    return sampler if not ranks or sampler.rank in ranks else sampler.replace(rank=ranks[0])


def sampler_with(policy: Policy, run_sampler: Sampler | None, passed: Mapping[str, Any]) -> Sampler:
    """Return a run's sampler, or the default of the policy's class, with the passed settings.

    If max_new_tokens is passed without diffusion_steps, the run's number of steps is scaled with it (`with_settings`).

    Args:
        policy: Policy that samples.
        run_sampler: The run's sampler. None: 16 tokens at temperature 0.
        passed: Settings by name; None for those that were not passed, "none" for no cache.

    Raises:
        ValueError: The policy's sampler has no such setting, or a value is wrong.
    """
    sampler = sampler_for(policy)
    if sampler is Autoregress and run_sampler is not None and decodes_in_engine(run_sampler):  # of a causal model
        run_sampler = Autoregress(**settings_for(Autoregress, run_sampler))
    changes = {name: value for name, value in passed.items() if value is not None}
    if changes.get("cache") == "none":
        del changes["cache"]
        run_sampler = run_sampler.replace(cache=None) if isinstance(run_sampler, Unmask) else run_sampler
    if sampler is Renoise and not changes.get("temperature"):  # it has a schedule of temperatures
        changes.pop("temperature", None)
    if not isinstance(run_sampler, sampler):
        defaults: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.0}
        if sampler is Renoise:
            defaults = {"max_new_tokens": policy.spec.block_size}
        return with_settings(policy, defaults | changes)
    if isinstance(run_sampler, Unmask):
        # A compiled step is for the run's rank, rule and cache.
        is_compiled = run_sampler.compile_step and changes.keys().isdisjoint(("rank", "commit", "cache"))
        run_sampler = run_sampler.replace(compile_step=is_compiled)
    return with_settings(policy, changes, run_sampler)


def check_number_of_samples(sampler: Callable[..., Any], samples: int, name: str = "samples") -> None:
    """Raise ValueError for several completions of a prompt by a sampler that has only one: it is greedy, or draws from
    one token, in an order without chance. `name` is what the caller's setting is called.
    """
    if samples <= 1 or not isinstance(sampler, Unmask | Autoregress) or (sampler.temperature and sampler.top_k != 1):
        return
    if isinstance(sampler, Unmask):
        if type(sampler).__call__ is not Unmask.__call__:  # a subclass may draw in its own way
            return
        if sampler.rank.adds_gumbel or "uniforms" in sampler.rank.reads | sampler.commit.reads:
            return
    setting, remedy = "with top_k=1", "leave top_k out"
    if not sampler.temperature:
        setting, remedy = "at temperature=0", "give a temperature above 0"
    raise ValueError(f"{name}={samples} {setting} would all be equal; {remedy}, or {name}=1")
