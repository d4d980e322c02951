"""The settings of a server, and the samplers of requests: a policy's sampler with a request's settings as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dllm_rl.models.base import Policy
from dllm_rl.records import make_record
from dllm_rl.samplers import Sampler, Unmask, sampler_for
from dllm_rl.samplers.rules import check_steps

# Settings of `Unmask` that no request may set. compile_step would compile a graph for every new batch shape.
NOT_SETTINGS = {"compile_step"}


@dataclass(frozen=True)
class ServerSettings:
    """Access and limits of a server.

    Args:
        name: Name of the model in requests and responses.
        token: Token that requests must send. None: no token is needed, but only requests to localhost are answered.
        allow_updates: Whether requests with the token may replace the weights.
        max_tokens: Largest number of tokens of a completion.
        max_waiting: Largest number of waiting completions of all requests, and so of one request.
        max_body_bytes: Largest size of a request's body.
        timeout: Seconds until a request must be finished, including its time in the queue.
        client_timeout: Seconds that a client has to send a request's body.
        seed: Seed of the server. A request without a seed gets one derived from it and from the request's number.
    """

    name: str
    token: str | None = field(default=None, repr=False)
    allow_updates: bool = False
    max_tokens: int = 1024
    max_waiting: int = 256
    max_body_bytes: int = 2**20
    timeout: float = 300.0
    client_timeout: float = 30.0
    seed: int = 0


def known_settings(policy: Policy) -> set[str]:
    """Return the names of the settings of the policy's sampler."""
    return {field.name for field in fields(sampler_for(policy))} - NOT_SETTINGS


def with_settings(policy: Policy, settings: Mapping[str, Any], defaults: Sampler | None = None) -> Sampler:
    """Return the policy's sampler with settings, which may be JSON (`records.to_json`), and those of `defaults` for the
    others.

    A commit rule without a rank gets the rank that it requires.

    Raises:
        ValueError: The policy's sampler has no such setting, or a value is wrong.
    """
    sampler = sampler_for(policy)
    known = known_settings(policy)
    for name, value in settings.items():
        if name not in known:
            raise ValueError(
                f"{name}={value!r} is no setting of {sampler.__name__}, the sampler of this model; leave it out"
            )
    default_values = {} if defaults is None else {each.name: getattr(defaults, each.name) for each in fields(defaults)}
    made: Sampler = make_record(sampler, default_values | dict(settings))
    if isinstance(made, Unmask) and "commit" in settings and "rank" not in settings:
        return with_required_rank(made)
    return made


def with_required_rank(sampler: Unmask) -> Unmask:
    """Return the sampler with the rank that its commit rule requires, or unchanged."""
    rank = sampler.commit.required_rank
    return sampler if rank is None else sampler.replace(rank=rank)


def check_number_of_steps(sampler: Sampler) -> None:
    """Raise ValueError if a sampler that unmasks has more steps than tokens."""
    if isinstance(sampler, Unmask):
        check_steps(sampler.diffusion_steps, sampler.max_new_tokens, sampler.commit.count)
