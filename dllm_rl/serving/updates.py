"""The server's side of the rollout engine: weights of a learner, rollouts and logits. Each function is one job."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_rl.models.base import Policy, is_finite
from dllm_rl.models.checkpoint.tensors import mismatched_tensors
from dllm_rl.models.merge import merged_state_dict
from dllm_rl.models.serialization import deserialize, record_to_json, serialize
from dllm_rl.rng import generator_for
from dllm_rl.samplers import sampler_for
from dllm_rl.serving.settings import read_settings
from dllm_rl.types import Prompts


class Conflict(ValueError):
    """Raised when a request does not fit the weights that the server has."""


@dataclass
class Lease:
    """Which run gave the server its weights.

    A run gets a new lease when it loads its engine. The server then serves this run only, so that two runs, or a run
    and its restart, cannot mix their weights.

    Args:
        run: Random id of the run's load. None: the weights are the checkpoint's.
    """

    run: str | None = None

    def check(self, policy: Policy, header: dict[str, Any]) -> None:
        """Raise Conflict unless the request is of this run and of the present weights."""
        if header.get("run") != self.run or self.run is None:
            raise Conflict("another run has loaded its weights into this server since; give each run its own server")
        if header.get("weights_version") != policy.weights_version:
            raise Conflict(
                f"weights_version={header.get('weights_version')!r} is asked for, and the server has "
                f"{policy.weights_version}; call the engine's sync after each update"
            )


def update_weights(lease: Lease, data: bytes, policy: Policy) -> bytes:
    """Replace weights in place. Nothing changes before everything is checked.

    Args:
        lease: The server's lease.
        data: Tensors by the names of `merged_state_dict`, with a header: `run`, `weights_version` and `is_load`. A load
            takes any version and needs every tensor; an update needs a newer version than the server's.
        policy: The server's policy.

    Raises:
        Conflict: Another run has the lease, or the version is not newer.
        ValueError: A name, shape or dtype is not the model's, or a number is not finite.
    """
    tensors, header = _read(data)
    version, run = header.get("weights_version"), header.get("run")
    if type(version) is not int or version < 0 or not isinstance(run, str):
        raise ValueError(f"weights_version={version!r} must be a whole number from 0 on, and run={run!r} a text")
    is_load = header.get("is_load") is True
    if not is_load and run != lease.run:
        raise Conflict("another run has loaded its weights into this server since; give each run its own server")
    if not is_load and version <= policy.weights_version:
        raise Conflict(f"weights_version={version} is not newer than the server's {policy.weights_version}")
    targets = merged_state_dict(policy.module)
    expected = targets if is_load else {name: targets[name] for name in tensors if name in targets}
    if wrong := mismatched_tensors(tensors, expected):
        raise ValueError(
            f"tensors {wrong[:3]} do not fit the server's {type(policy.module).__name__}; serve the run's model"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"{name} has numbers that are not finite; the server keeps its weights")
    with torch.no_grad():
        for name, tensor in tensors.items():
            targets[name].copy_(tensor)
    policy.weights_version, lease.run = version, run
    return serialize({}, {"weights_version": version})


def sample_rollout(lease: Lease, data: bytes, policy: Policy) -> bytes:
    """Sample a rollout of one batch, exactly as the sampler would in the run's process.

    Args:
        lease: The server's lease.
        data: Tensors of `Prompts`, with a header: `run`, `weights_version`, `group_size` and `settings`
            (`read_settings`). The server's own defaults do not apply.
        policy: The server's policy.

    Raises:
        Conflict: The run or the version is another one.
        ValueError: The prompts or the settings are wrong.
    """
    tensors, header = _read(data)
    lease.check(policy, header)
    names = {"tokens", "attention_mask", "seeds", "infill_mask"}
    if not {"tokens", "attention_mask", "seeds"} <= tensors.keys() <= names:
        raise ValueError(f"tensors {sorted(tensors)} are not those of prompts with seeds")
    prompts = Prompts(group_size=header["group_size"], **tensors)
    tokens = prompts.tokens
    if tokens.dim() != 2 or tokens.shape != prompts.attention_mask.shape or len(tensors["seeds"]) != prompts.num_rows:
        raise ValueError("tokens, attention_mask and seeds must be (P, S), (P, S) and (P * group_size,)")
    if tokens.min() < 0 or tokens.max() >= policy.vocab_size:
        raise ValueError(f"tokens must lie in [0, {policy.vocab_size})")
    keywords = read_settings(policy, header["settings"])
    rollout = sampler_for(policy)(policy, prompts, generator_for("unused"), **keywords)  # every row has a seed
    found: dict[str, Tensor] = {}
    about = record_to_json(rollout, "rollout", found)
    return serialize(found, about)


@torch.no_grad()
def compute_logits(lease: Lease, data: bytes, policy: Policy) -> bytes:
    """Compute fp32 logits (B, T, V) of tokens, attention mask and positions, each (B, T), not shifted.

    Raises:
        Conflict: The run or the version is another one.
        ValueError: The tensors are wrong.
    """
    tensors, header = _read(data)
    lease.check(policy, header)
    if tensors.keys() != {"tokens", "attention_mask", "positions"}:
        raise ValueError(f"tensors {sorted(tensors)} must be tokens, attention_mask and positions")
    states = policy.encode(*(tensors[name].to(policy.device) for name in ("tokens", "attention_mask", "positions")))
    return serialize({"logits": policy.head(states).float()}, {})


def _read(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, header = deserialize(data)
    if not isinstance(header, dict):
        raise ValueError("the header is no JSON object")
    return tensors, header
