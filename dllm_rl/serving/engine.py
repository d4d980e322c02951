"""A rollout engine that sends weights to a server (`dllm-rl serve MODEL --allow_updates`) and samples there."""

import http.client
import inspect
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
# The signature of `http_sampler`, which takes **settings: the command line and the checks of recipes read it.
SAMPLER_SIGNATURE = inspect.Signature(
    [
        parameter
        for name, parameter in inspect.signature(unmask).parameters.items()
        if name not in ("compile_step", "on_step")
    ]
)


@configurable
def http_engine(
    *, url: str = "http://127.0.0.1:8000", token_file: str | None = None, timeout: float = 600.0
) -> RolloutEngine:
    """Make an engine that samples rollouts on a server of this library.

    Use it with the sampler `http_sampler`. On a CPU, with the same version of torch and the same number of threads, a
    run is bitwise identical to one that samples in the learner's process. A server serves one run at a time, and the
    run must have a single process. For quantized rollouts, start the server with `--quantization SCHEME`, and leave the
    run's `rollout_quantization` at None.

    Args:
        url: Address of `dllm-rl serve MODEL --allow_updates`. MODEL must have the same architecture as the run's model.
        token_file: File with the server's token. None: the environment variable DLLM_RL_TOKEN. The token itself is not
            an argument, because arguments are stored with the run.
        timeout: Seconds to wait for a response.
    """
    return RolloutEngine(partial(_load, Client(url, token_file, timeout)), _sync, is_exclusive=True)


@dataclass(frozen=True)
class Client:
    """Sends the requests of a run to a server.

    Args:
        url: Address of the server.
        token_file: File with the token. None: the environment variable.
        timeout: Seconds to wait for a response.
        run: Random id that identifies the run to the server (`Lease.run`).
    """

    url: str
    token_file: str | None
    timeout: float
    run: str = ""

    def post(
        self, path: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Any]:
        """Send tensors with a header, and return the tensors and the header of the response.

        Raises:
            ValueError: The server refuses, is not reachable, or does not respond in time.
        """
        parts = urlsplit(self.url)
        connection_types = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        if parts.scheme not in connection_types or not parts.hostname:
            raise ValueError(f"url={self.url!r} is not the address of a server; give http://HOST:PORT")
        connection = connection_types[parts.scheme](parts.hostname, parts.port, timeout=self.timeout)
        body = serialize(tensors, dict(header) | {"run": self.run})
        headers = {"Authorization": f"Bearer {self._token()}", "Content-Type": "application/octet-stream"}
        try:
            connection.request("POST", parts.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            data = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"rollout_engine: {self.url}{path}: {type(error).__name__} {error}; is `dllm-rl serve` running there?"
            ) from error
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(f"rollout_engine: {self.url}{path} answers {response.status}: {_error_message(data)}")
        return deserialize(data)

    def _token(self) -> str:
        if self.token_file is not None:
            return read_token(self.token_file)
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise ValueError(f"rollout_engine: no token; set token_file, or the environment variable {TOKEN_VARIABLE}")
        return token


def read_token(path: str) -> str:
    """Read the token from a file with a single line.

    Raises:
        ValueError: The content is not one word of printable ASCII characters.
    """
    token = Path(path).read_text(encoding="utf-8", errors="replace").strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(f"token_file={path} must hold one line of printable ASCII without spaces")
    return token


def _error_message(data: bytes) -> str:
    """Return the message of an error response."""
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no message; is it a server of `dllm-rl serve`?"


def _load(client: Client, policy: Policy) -> Policy:
    """Send all weights of the learner to the server. Return the rollout policy that `http_sampler` needs."""
    if hasattr(policy.module, "sharding") or (
        torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    ):
        raise ValueError("rollout_engine=http_engine needs a run of one process; start it without a launcher")
    client = replace(client, run=secrets.token_hex(16))
    header = {"weights_version": policy.weights_version, "is_load": True}
    client.post("/weights", merged_state_dict(policy.module), header)
    rollout_policy = with_forward(policy, partial(_logits, client, policy.weights_version))
    rollout_policy.module.client = client
    return rollout_policy


def _sync(policy: Policy, rollout_policy: Policy) -> dict[str, float]:
    """Send the weights that training changes to the server, with adapters merged, and their version.

    Return the metrics of the server's quantization, if it quantizes.
    """
    client: Client = rollout_policy.module.client
    tensors = merged_state_dict(policy.module)
    trained = {name for name, weight in policy.module.named_parameters() if weight.requires_grad}
    adapted = adapted_layers(policy.module)
    changed = {
        name: tensor for name, tensor in tensors.items() if name in trained or name.rpartition(".")[0] in adapted
    }
    # If no weight requires a gradient (in `check_engine`), it is unknown which weights change: send all.
    _, header = client.post(
        "/weights", changed or tensors, {"weights_version": policy.weights_version, "is_load": False}
    )
    synced = with_forward(policy, partial(_logits, client, policy.weights_version))
    rollout_policy.spec, rollout_policy.weights_version = synced.spec, policy.weights_version
    return header["metrics"]


def _logits(
    client: Client,
    weights_version: int,
    tokens: Int[Tensor, "B T"],
    attention_mask: Tensor,
    positions: Int[Tensor, "B T"],
    **cache_kwargs: Any,
) -> Float[Tensor, "B T V"]:
    """Compute logits on the server, for likelihoods and for samplers that run in the learner's process."""
    if attention_mask.dim() != 2:
        raise ValueError(
            "rollout_engine=http_engine computes whole rows: set the sampler's cache=None, or use http_sampler"
        )
    width = tokens.shape[1]
    if cache_kwargs:
        # `autoregress` passes only the new tokens. The server keeps no key-value cache between requests, so the cache
        # stores token ids in place of keys and values, and the whole row is sent.
        new = tokens[:, None, :, None]
        tokens = cache_kwargs["cache"].update(new, new, 0)[0][:, 0, :, 0]
        positions = position_ids(attention_mask)
    inputs = {"tokens": tokens, "attention_mask": attention_mask, "positions": positions}
    tensors, _ = client.post("/logits", inputs, {"weights_version": weights_version})
    return tensors["logits"][:, -width:].to(tokens.device)


@torch.no_grad()
def http_sampler(policy: Policy, prompts: Prompts, generator: Generator, **settings: Any) -> Rollout:
    """Sample `prompts.group_size` completions per prompt on a server, with `unmask`, or `autoregress` if causal.

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
        ValueError: The policy is not from `http_engine`, the model's sampler lacks a setting, a rule has no name on the
            command line, or the server refuses.
    """
    SAMPLER_SIGNATURE.bind(policy, prompts, generator, **settings)
    client = getattr(policy.module, "client", None)
    if not isinstance(client, Client):
        raise ValueError(
            "sampler=http_sampler needs the policy of rollout_engine=http_engine(...); use unmask or autoregress"
        )
    if policy.spec.attention == "encoder_decoder":
        raise ValueError(f"sampler=http_sampler does not serve {policy.spec.name!r}, whose sampler is renoise")
    keywords = _sampler_keywords(policy, settings)
    seeds = row_seeds(generator, prompts.num_rows) if prompts.seeds is None else prompts.seeds
    tensors = {"tokens": prompts.tokens, "attention_mask": prompts.attention_mask, "seeds": seeds}
    if prompts.infill_mask is not None:
        tensors["infill_mask"] = prompts.infill_mask
    header = {
        "weights_version": policy.weights_version,
        "group_size": prompts.group_size,
        "settings": write_settings(keywords),
    }
    rollout_tensors, rollout_json = client.post("/rollouts", tensors, header)
    rank = as_rank(settings.get("rank", SAMPLER_SIGNATURE.parameters["rank"].default))
    return record_from_json(rollout_json, rollout_tensors, rank.function).to(policy.device)


def _sampler_keywords(policy: Policy, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the policy's sampler has. Raise ValueError if another one is not at its default."""
    known = known_settings(policy)
    defaults = {name: parameter.default for name, parameter in SAMPLER_SIGNATURE.parameters.items()}
    for name, value in settings.items():
        if name not in known and value != defaults[name]:
            raise ValueError(f"{name}={value!r} is not for {sampler_for(policy).__name__}; leave it out")
    return {name: value for name, value in settings.items() if name in known}


http_sampler.__signature__ = SAMPLER_SIGNATURE  # type: ignore[attr-defined]
