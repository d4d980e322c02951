"""Convert sampler settings to and from JSON values for requests. Rules and caches have their command-line names."""

import inspect
from collections.abc import Mapping
from typing import Any

from dllm_rl.models.base import Policy
from dllm_rl.samplers import sampler_for
from dllm_rl.samplers.by_name import READERS, text_of
from dllm_rl.samplers.cache import Cache
from dllm_rl.samplers.records import as_commit
from dllm_rl.samplers.rules import check_steps, schedule

# Sampler arguments that no request may set. compile_step would compile a graph for every new batch shape.
NOT_SETTINGS = {"policy", "prompts", "generator", "on_step", "compile_step"}


def known_settings(policy: Policy) -> set[str]:
    """Return the names of the settings of the policy's sampler."""
    return inspect.signature(sampler_for(policy)).parameters.keys() - NOT_SETTINGS


def read_settings(policy: Policy, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert JSON values to keywords of the policy's sampler. A None is left out, so the sampler's default applies.

    Raises:
        ValueError: The policy's sampler has no such setting, or a rule or cache is unknown.
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


def check_number_of_steps(keywords: Mapping[str, Any]) -> None:
    """Raise ValueError if keywords of `unmask`, with max_new_tokens, have more steps than tokens."""
    rule = as_commit(keywords.get("commit", schedule))
    check_steps(keywords.get("diffusion_steps"), keywords["max_new_tokens"], rule.count)


def write_settings(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a sampler's keywords to JSON values, which `read_settings` converts back to equal keywords.

    Raises:
        ValueError: A rule or cache has no command-line name, for example a function defined in a script.
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
            survives = _comparable(READERS[name](text)) == _comparable(value)
        except ValueError:
            survives = False
        if not survives:
            raise ValueError(
                f"{name}={text} is no rule that a server knows by name; use one of `dllm-rl sample --{name}`, or "
                "sample in the run's process"
            )
        settings[name] = text
    return settings


def _comparable(rule: Any) -> Any:
    """Return a partial as its parts, because two separate partials never compare as equal."""
    return (rule.func, rule.args, rule.keywords) if hasattr(rule, "func") else rule
