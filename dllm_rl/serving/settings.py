"""A sampler's settings as JSON values, which requests carry: rules and caches by their names on the command line."""

import inspect
from collections.abc import Mapping
from typing import Any

from dllm_rl.models.base import Policy
from dllm_rl.samplers import sampler_for
from dllm_rl.samplers.by_name import READERS, text_of
from dllm_rl.samplers.cache import Cache

# Arguments of samplers that no request may set: a callback, and compiled graphs, one for each shape of a batch.
NOT_SETTINGS = {"policy", "prompts", "generator", "on_step", "compile_step"}


def known_settings(policy: Policy) -> set[str]:
    """Return the names of the settings of the policy's sampler."""
    return inspect.signature(sampler_for(policy)).parameters.keys() - NOT_SETTINGS


def read_settings(policy: Policy, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords of the policy's sampler from JSON values. None stands for the sampler's default.

    Raises:
        ValueError: A setting belongs to another sampler, or a rule or cache is unknown.
    """
    known = known_settings(policy)
    keywords = {}
    for name, value in settings.items():
        if value is None:
            continue
        if name not in known:
            sampler = sampler_for(policy).__name__
            raise ValueError(f"{name}={value!r} is no setting of {sampler}, the sampler of this model; leave it out")
        if name in READERS:
            value = READERS[name](value)
        keywords[name] = tuple(value) if isinstance(value, list) else value
    return keywords


def write_settings(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sampler's keywords as JSON values, from which `read_settings` makes the same keywords.

    Raises:
        ValueError: A rule or cache has no name on the command line, such as a function of a script.
    """
    settings = {}
    for name, value in keywords.items():
        if name not in READERS or value is None:
            settings[name] = list(value) if isinstance(value, tuple) else value
            continue
        if isinstance(value, Cache):
            text = value.kind if value.refresh is None else f"{value.kind}={value.refresh}"
        else:
            text = text_of(value)
        try:
            is_same = _contents(READERS[name](text)) == _contents(value)
        except ValueError:
            is_same = False
        if not is_same:
            raise ValueError(
                f"{name}={text} is no rule that a server knows by name; use one of `dllm-rl sample --{name}`, or "
                "sample in the run's process"
            )
        settings[name] = text
    return settings


def _contents(rule: Any) -> Any:
    """Return a bound function as its function and keywords, because two partials never compare as equal."""
    return (rule.func, rule.args, rule.keywords) if hasattr(rule, "func") else rule
