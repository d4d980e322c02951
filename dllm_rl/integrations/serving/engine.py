"""A rollout engine that sends weights to a server (`dllm-rl serve MODEL --allow_updates`) and samples there."""

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dllm_rl.integrations.http_request import request
from dllm_rl.models.base import Policy
from dllm_rl.models.lora import adapted_layers
from dllm_rl.models.merge import merged_state_dict
from dllm_rl.models.rollout_engine import RolloutEngine, check_single_process, with_forward
from dllm_rl.models.tensor_bytes import deserialize, record_from_json, serialize
from dllm_rl.records import Record, option, to_json
from dllm_rl.rng import row_seeds
from dllm_rl.samplers import sampler_for
from dllm_rl.samplers.unmask import Unmask
from dllm_rl.samplers.with_settings import known_settings
from dllm_rl.types.rollouts import Prompts, Rollout

TOKEN_VARIABLE = "DLLM_RL_TOKEN"


class HTTPEngine(RolloutEngine):
    """Sample rollouts on a server of this library.

    Use it with the sampler `HTTPSampler`. On a CPU, with the same version of torch and the same number of threads, a
    run is bitwise identical to one that samples in the learner's process. A server serves one run at a time, and the
    run must have a single process. For quantized rollouts, start the server with `--quantization SCHEME`, and leave the
    run's `rollout_quantization` at None.

    Args:
        url: Address of `dllm-rl serve MODEL --allow_updates`. MODEL must have the same architecture as the run's model.
        token_file: File with the server's token. None: the environment variable DLLM_RL_TOKEN. The token itself is not
            a setting, because settings are stored with the run.
        timeout: Seconds to wait for a response.
    """

    url: str = "http://127.0.0.1:8000"
    token_file: str | None = None
    timeout: float = option(default=600.0, above=0)
    is_exclusive = True

    def load(self, learner: Policy) -> Policy:
        """Send all weights of the learner to the server. Return the rollout policy that `HTTPSampler` needs."""
        check_single_process(learner, "HTTPEngine")
        client = Client(self, learner.weights_version, secrets.token_hex(16))
        client.post("/weights", merged_state_dict(learner.module), is_load=True)
        rollout_policy = with_forward(learner, client.logits)
        rollout_policy.module.client = client
        return rollout_policy

    def sync(self, learner: Policy, policy: Policy) -> dict[str, float]:
        """Send the weights that training changes to the server, with adapters merged, and their version.

        Return the metrics of the server's quantization, if it quantizes.
        """
        client: Client = policy.module.client
        tensors = merged_state_dict(learner.module)
        trained = {name for name, weight in learner.module.named_parameters() if weight.requires_grad}
        adapted = adapted_layers(learner.module)
        changed = {
            name: tensor for name, tensor in tensors.items() if name in trained or name.rpartition(".")[0] in adapted
        }
        # An older version, such as the best one at the end, is not an update: it is loaded as at the start.
        is_load = learner.weights_version < client.weights_version
        # If no weight requires a gradient (in `check_engine`), it is unknown which weights change: send all.
        sent = tensors if is_load or not changed else changed
        _, answer = client.post("/weights", sent, weights_version=learner.weights_version, is_load=is_load)
        client.weights_version = policy.weights_version = learner.weights_version
        return answer["metrics"]


@dataclass
class Client:
    """Sends the requests of a run to a server.

    Args:
        engine: Address of the server, token and timeout.
        weights_version: Version of the weights that the run sent last.
        run: Random id that identifies the run to the server (`Lease.run`).
    """

    engine: HTTPEngine
    weights_version: int
    run: str

    def post(self, path: str, tensors: Mapping[str, Tensor], **header: Any) -> tuple[dict[str, Tensor], Any]:
        """Send tensors with a header, and return the tensors and the header of the response.

        Raises:
            ValueError: The server refuses.
            ConnectionError: The server is not reachable, or does not respond in time.
        """
        url, timeout = self.engine.url, self.engine.timeout
        body = serialize(tensors, {"run": self.run, "weights_version": self.weights_version} | header)
        headers = {"Authorization": f"Bearer {self._token()}", "Content-Type": "application/octet-stream"}
        status, data = request(url, path, body, headers, timeout=timeout, program="`dllm-rl serve`")
        if status != 200:
            raise ValueError(f"rollout_engine: {url}{path} answers {status}: {_error_message(data)}")
        return deserialize(data)

    def logits(
        self, tokens: Int[Tensor, "B T"], attention_mask: Tensor, positions: Int[Tensor, "B T"]
    ) -> Float[Tensor, "B T V"]:
        """Compute logits on the server, for likelihoods and for samplers that run in the learner's process."""
        if attention_mask.dim() != 2:
            raise ValueError(
                "rollout_engine=HTTPEngine computes whole rows, one text each; use a likelihood with block_size=None"
            )
        inputs = {"tokens": tokens, "attention_mask": attention_mask, "positions": positions}
        tensors, _ = self.post("/logits", inputs)
        return tensors["logits"].to(tokens.device)

    def _token(self) -> str:
        if self.engine.token_file is not None:
            return read_token(self.engine.token_file)
        token = os.environ.get(TOKEN_VARIABLE, "")
        if not token:
            raise ValueError(f"rollout_engine: no token; set token_file, or the environment variable {TOKEN_VARIABLE}")
        return token


def read_token(path: str) -> str:
    """Read the token from a file with a single line.

    Raises:
        ValueError: The content is not one word of printable ASCII characters.
    """
    token = Path(path).expanduser().read_text(encoding="utf-8", errors="replace").strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(f"token_file={path} must hold one line of printable ASCII without spaces")
    return token


def _error_message(data: bytes) -> str:
    """Return the message of an error response."""
    try:
        return str(json.loads(data)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no message; is it a server of `dllm-rl serve`?"


class HTTPSampler(Unmask):
    """Sample on a server, with the settings of `Unmask`, or of `Autoregress` if the model is causal.

    Use it as `Recipe.sampler` with rollout_engine=HTTPEngine(...). For a causal model, only max_new_tokens,
    temperature, top_k, top_p and suppress may be set. It makes the rollout that the sampler would make in this process.
    `Unmask` explains the settings.
    """

    def check(self) -> None:
        if self.compile_step:
            raise ValueError("compile_step=True is not for HTTPSampler: a server compiles no steps; leave it out")

    @torch.no_grad()
    def __call__(
        self,
        policy: Policy,
        prompts: Prompts,
        generator: Generator,
        *,
        on_step: Callable[[Rollout], bool | None] | None = None,
    ) -> Rollout:
        """Complete the prompts with a policy of `HTTPEngine`.

        Raises:
            ValueError: The policy is not from `HTTPEngine`, the model's sampler lacks a setting, a rule is defined in a
                script, or the server refuses.
        """
        if on_step is not None:
            raise ValueError("on_step is not for HTTPSampler: a server returns finished rollouts; leave it out")
        client = getattr(policy.module, "client", None)
        if not isinstance(client, Client):
            raise ValueError(
                "sampler=HTTPSampler needs the policy of rollout_engine=HTTPEngine(...); use Unmask or Autoregress"
            )
        if policy.spec.attention == "encoder_decoder":
            raise ValueError(f"sampler=HTTPSampler does not serve {policy.spec.name!r}, whose sampler is Renoise")
        seeds = row_seeds(generator, len(prompts.tokens)) if prompts.seeds is None else prompts.seeds
        tensors = {name: getattr(prompts, name) for name in ("tokens", "attention_mask", "group")} | {"seeds": seeds}
        if prompts.infill_mask is not None:
            tensors["infill_mask"] = prompts.infill_mask
        header = {"settings": self._settings_of(policy), "reads_order": prompts.reads_order}
        rollout_tensors, rollout_json = client.post(
            "/rollouts", tensors, weights_version=policy.weights_version, **header
        )
        return record_from_json(rollout_json, rollout_tensors, self.rank).to(policy.device)

    def _settings_of(self, policy: Policy) -> dict[str, Any]:
        """Return the settings of the policy's sampler as JSON. Raise ValueError if another one is set."""
        known = known_settings(policy)
        settings = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in known:
                settings[field.name] = to_json(value)
            elif value != field.default:
                sampler = sampler_for(policy).__name__
                raise ValueError(f"{field.name}={value!r} is not for {sampler}; leave it out")
            if isinstance(value, Record) and not _is_of_library(value):
                raise ValueError(f"{field.name}={value} is not a rule that a server knows; sample in the run's process")
        return settings


def _is_of_library(record: Record) -> bool:
    """Return whether a server has the classes of a record and of its fields, and none of them wraps a function."""
    if type(record).__module__.partition(".")[0] != "dllm_rl":
        return False
    values = [getattr(record, field.name) for field in fields(record)]  # type: ignore[arg-type]
    return all(_is_of_library(value) if isinstance(value, Record) else not callable(value) for value in values)
