"""A rollout engine whose rollouts a server makes (`dllm-rl serve MODEL --allow_updates`)."""

import http.client
import inspect
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dllm_rl.members import configurable
from dllm_rl.models.base import Policy, position_ids
from dllm_rl.models.engine import RolloutEngine, with_forward
from dllm_rl.models.lora import adapted_layers
from dllm_rl.models.merge import merged_state_dict
from dllm_rl.models.serialization import deserialize, record_from_json, serialize
from dllm_rl.rng import row_seeds
from dllm_rl.samplers import sampler_for
from dllm_rl.samplers.records import as_rank
from dllm_rl.samplers.unmask import unmask
from dllm_rl.serving.settings import known_settings, write_settings
from dllm_rl.types import Prompts, Rollout

TOKEN_VARIABLE = "DLLM_RL_TOKEN"
# The command line and the checks of a recipe read the signature of its sampler.
SERVED = inspect.Signature(
    [each for name, each in inspect.signature(unmask).parameters.items() if name not in ("compile_step", "on_step")]
)


@configurable
def http_engine(
    *, url: str = "http://127.0.0.1:8000", token_file: str | None = None, timeout: float = 600.0
) -> RolloutEngine:
    """Make an engine whose rollouts a server of this library makes.

    Use it with the sampler `served`. On a CPU, with the same version of torch and the same number of threads, a run has
    the bits of a run that samples in the learner's process. A server serves one run at a time, of one process.

    Args:
        url: Address of `dllm-rl serve MODEL --allow_updates`, which must serve a model of the run's shapes.
        token_file: File with the server's token. None: the environment variable DLLM_RL_TOKEN. The token itself is no
            argument, because arguments are stored with the run.
        timeout: Seconds to wait for an answer.
    """
    return RolloutEngine(partial(_load, Link(url, token_file, timeout)), _sync, is_exclusive=True)


@dataclass(frozen=True)
class Link:
    """How to reach a server.

    Args:
        url: Address of the server.
        token_file: File with the token. None: the environment variable.
        timeout: Seconds to wait for an answer.
        run: Random id of the load that gave the server its weights.
    """

    url: str
    token_file: str | None
    timeout: float
    run: str = ""

    def post(
        self, path: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Any]:
        """Send tensors and a JSON value, and return those of the answer.

        Raises:
            ValueError: The server refuses, is not reachable, or does not answer in time. The message is its line.
        """
        parts = urlsplit(self.url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in kinds or not parts.hostname:
            raise ValueError(f"url={self.url!r} is no address of a server; give http://HOST:PORT")
        connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=self.timeout)
        body = serialize(tensors, dict(header) | {"run": self.run})
        headers = {"Authorization": f"Bearer {self._token()}", "Content-Type": "application/octet-stream"}
        try:
            connection.request("POST", parts.path.rstrip("/") + path, body, headers)
            answer = connection.getresponse()
            data = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"rollout_engine: {self.url}{path}: {type(error).__name__} {error}; is `dllm-rl serve` running there?"
            ) from error
        finally:
            connection.close()
        if answer.status != 200:
            raise ValueError(f"rollout_engine: {self.url}{path} answers {answer.status}: {_message(data)}")
        return deserialize(data)

    def _token(self) -> str:
        if self.token_file is not None:
            return read_token(self.token_file)
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise ValueError(f"rollout_engine: no token; set token_file, or the environment variable {TOKEN_VARIABLE}")
        return token


def read_token(path: str) -> str:
    """Return the token in a file's only line.

    Raises:
        ValueError: The file has no token of printable ASCII characters without spaces.
    """
    token = Path(path).read_text(encoding="utf-8", errors="replace").strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(f"token_file={path} must hold one line of printable ASCII without spaces")
    return token


def _message(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no message; is it a server of `dllm-rl serve`?"


def _load(link: Link, policy: Policy) -> Policy:
    """Give the server all weights of the learner; return the policy that `served` samples with."""
    if hasattr(policy.module, "sharding") or (
        torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    ):
        raise ValueError("rollout_engine=http_engine needs a run of one process; start it without a launcher")
    run_link = Link(link.url, link.token_file, link.timeout, run=secrets.token_hex(16))
    header = {"weights_version": policy.weights_version, "is_load": True}
    run_link.post("/weights", merged_state_dict(policy.module), header)
    rollout_policy = with_forward(policy, partial(_logits, run_link, policy.weights_version))
    rollout_policy.module.link = run_link
    return rollout_policy


def _sync(policy: Policy, rollout_policy: Policy) -> dict[str, float]:
    """Give the server the weights that training changes, with adapters merged, and their version."""
    link: Link = rollout_policy.module.link
    tensors = merged_state_dict(policy.module)
    trained = {name for name, weight in policy.module.named_parameters() if weight.requires_grad}
    adapted = adapted_layers(policy.module)
    changed = {
        name: tensor for name, tensor in tensors.items() if name in trained or name.rpartition(".")[0] in adapted
    }
    # A module without trainable weights, as of `check_engine`, does not say which weights change.
    link.post("/weights", changed or tensors, {"weights_version": policy.weights_version, "is_load": False})
    synced = with_forward(policy, partial(_logits, link, policy.weights_version))
    rollout_policy.spec, rollout_policy.weights_version = synced.spec, policy.weights_version
    return {}


def _logits(
    link: Link,
    weights_version: int,
    tokens: Int[Tensor, "B T"],
    attention_mask: Tensor,
    positions: Int[Tensor, "B T"],
    **cache_kwargs: Any,
) -> Float[Tensor, "B T V"]:
    """Compute logits on the server, for likelihoods and samplers of the run's process."""
    if attention_mask.dim() != 2:
        raise ValueError("rollout_engine=http_engine computes whole rows: set the sampler's cache=None, or use served")
    width = tokens.shape[1]
    if cache_kwargs:  # autoregress: the cache holds a row's tokens, in place of keys and values
        new = tokens[:, None, :, None]
        tokens = cache_kwargs["cache"].update(new, new, 0)[0][:, 0, :, 0]
        positions = position_ids(attention_mask)
    sent = {"tokens": tokens, "attention_mask": attention_mask, "positions": positions}
    tensors, _ = link.post("/logits", sent, {"weights_version": weights_version})
    return tensors["logits"][:, -width:].to(tokens.device)


@torch.no_grad()
def served(policy: Policy, prompts: Prompts, generator: Generator, **settings: Any) -> Rollout:
    """Let a server complete every prompt `prompts.group_size` times, by `unmask` or, for a causal model, `autoregress`.

    Use it as `Recipe.sampler` with `rollout_engine=http_engine(...)`.

    Args:
        policy: Policy of `http_engine`.
        prompts: Left-padded prompts.
        generator: Generator that draws one seed per row. It is not used if `prompts.seeds` is set.
        settings: Keywords of `unmask` except compile_step and on_step. For a causal model, only max_new_tokens,
            temperature, top_k, top_p and suppress may be set.

    Returns:
        The rollout that the sampler would make in this process.

    Raises:
        TypeError: A setting is unknown, or max_new_tokens is missing.
        ValueError: The policy is not of `http_engine`, a setting is not for its model or has no name, or the server
            refuses.
    """
    SERVED.bind(policy, prompts, generator, **settings)
    link = getattr(policy.module, "link", None)
    if not isinstance(link, Link):
        raise ValueError(
            "sampler=served needs the policy of rollout_engine=http_engine(...); use unmask or autoregress"
        )
    if policy.spec.attention == "encoder_decoder":
        raise ValueError(f"sampler=served does not serve {policy.spec.name!r}, whose sampler is renoise")
    keywords = _of_sampler(policy, settings)
    seeds = row_seeds(generator, prompts.num_rows) if prompts.seeds is None else prompts.seeds
    tensors = {"tokens": prompts.tokens, "attention_mask": prompts.attention_mask, "seeds": seeds}
    if prompts.infill_mask is not None:
        tensors["infill_mask"] = prompts.infill_mask
    header = {
        "weights_version": policy.weights_version,
        "group_size": prompts.group_size,
        "settings": write_settings(keywords),
    }
    found, about = link.post("/rollouts", tensors, header)
    return record_from_json(about, found, as_rank(settings.get("rank", SERVED.parameters["rank"].default)).function).to(
        policy.device
    )


def _of_sampler(policy: Policy, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the policy's sampler. Raise ValueError for another one's that is not at its default."""
    known = known_settings(policy)
    defaults = {name: parameter.default for name, parameter in SERVED.parameters.items()}
    for name, value in given.items():
        if name not in known and value != defaults[name]:
            raise ValueError(f"{name}={value!r} is not for {sampler_for(policy).__name__}; leave it out")
    return {name: value for name, value in given.items() if name in known}


served.__signature__ = SERVED  # type: ignore[attr-defined]
