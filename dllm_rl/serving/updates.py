"""The server side of `HTTPEngine`: receive the learner's weights, and return rollouts and logits.

The batcher runs `update_weights`, `sample_rollout` and `compute_logits` as jobs, in the thread that owns the policy.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dllm_rl.models.base import Policy, is_finite
from dllm_rl.models.checkpoint.tensors import mismatched_tensors
from dllm_rl.models.lora import merged_state_dict
from dllm_rl.models.tensor_bytes import deserialize, record_to_json, serialize
from dllm_rl.quantization.rollout_policy import sync_weights
from dllm_rl.rng import generator_for
from dllm_rl.serving.batching import Refused
from dllm_rl.serving.settings import with_settings
from dllm_rl.types import Prompts


@dataclass
class Lease:
    """The weights that a training run may update, and which run owns them.

    A run takes the lease when its engine sends all weights. From then on the server accepts only this run's requests,
    so that two runs, or a run and its restart, cannot mix their weights.

    Args:
        learner: Policy that receives the run's weights: the server's policy, or if that is quantized, the unquantized
            policy of which it is a copy.
        run: Random id that the run's engine chose when it sent all weights. None: no run has sent weights yet.
    """

    learner: Policy
    run: str | None = None

    def check_run(self, header: dict[str, Any]) -> None:
        """Raise Refused unless the request comes from this run."""
        if header.get("run") != self.run or self.run is None:
            message = "another run has loaded its weights into this server since; give each run its own server"
            raise Refused(409, message)

    def check(self, policy: Policy, header: dict[str, Any]) -> None:
        """Raise Refused unless the request comes from this run and is for the current weights."""
        self.check_run(header)
        if header.get("weights_version") != policy.weights_version:
            raise Refused(
                409,
                f"the request is for weights_version={header.get('weights_version')!r}, and the server has "
                f"{policy.weights_version}; call the engine's sync after each update",
            )


def update_weights(lease: Lease, data: bytes, policy: Policy) -> bytes:
    """Replace weights in place, after all checks: a refused request changes nothing.

    Args:
        lease: The server's lease.
        data: Serialized tensors, named as in `merged_state_dict`, with a header: `run`, `weights_version` and
            `is_load`. A load must have every tensor, and may have any version. An update may have some of the
            tensors, and its version must be newer than the server's.
        policy: The server's policy. If it is a quantized copy, the new weights are quantized into it.

    Returns:
        Serialized header with `weights_version`, and with the `metrics` of `sync_weights`.

    Raises:
        Refused: Another run has the lease, or the version is not newer.
        ValueError: A name, shape or dtype is not the model's, or a number is not finite.
    """
    tensors, header = _read(data)
    version, run = header.get("weights_version"), header.get("run")
    if type(version) is not int or version < 0 or not isinstance(run, str):
        raise ValueError(f"weights_version={version!r} must be a whole number of at least 0, and run={run!r} a string")
    is_load = header.get("is_load") is True
    if not is_load:
        lease.check_run(header)
        if version <= policy.weights_version:
            raise Refused(409, f"weights_version={version} is not newer than the server's {policy.weights_version}")
    targets = merged_state_dict(lease.learner.module)
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
    lease.learner.weights_version, lease.run = version, run
    return serialize({}, {"weights_version": version, "metrics": sync_weights(lease.learner, policy)})


def sample_rollout(lease: Lease, data: bytes, policy: Policy) -> bytes:
    """Sample a rollout of one batch, exactly as the sampler would in the run's process.

    Args:
        lease: The server's lease.
        data: Serialized tensors of `Prompts`, with a header: `run`, `weights_version`, `settings`
            (`with_settings`) and `reads_order`. The server's sampler defaults do not apply.
        policy: The server's policy.

    Raises:
        Refused: The request is from another run, or for another version.
        ValueError: The prompts or the settings are invalid.
    """
    tensors, header = _read(data)
    lease.check(policy, header)
    required = {"tokens", "attention_mask", "group", "seeds"}
    if not required <= tensors.keys() <= required | {"infill_mask"}:
        raise ValueError(f"tensors {sorted(tensors)} are not those of prompts with seeds")
    prompts = Prompts(**tensors, reads_order=header["reads_order"])
    tokens = prompts.tokens
    vectors = {(len(values),) == values.shape == tokens.shape[:1] for values in (prompts.group, tensors["seeds"])}
    if tokens.dim() != 2 or tokens.shape != prompts.attention_mask.shape or vectors != {True}:
        raise ValueError("tokens, attention_mask, group and seeds must be (B, S), (B, S), (B,) and (B,)")
    if tokens.min() < 0 or tokens.max() >= policy.vocab_size:
        raise ValueError(f"tokens must lie in [0, {policy.vocab_size})")
    sampler = with_settings(policy, header["settings"])
    rollout = sampler(policy, prompts, generator_for("unused"))  # rows have their own seeds
    rollout_tensors: dict[str, Tensor] = {}
    rollout_json = record_to_json(rollout, "rollout", rollout_tensors)  # also fills rollout_tensors
    return serialize(rollout_tensors, rollout_json)


@torch.no_grad()
def compute_logits(lease: Lease, data: bytes, policy: Policy) -> bytes:
    """Compute fp32 logits (B, T, V) from tokens, attention_mask and positions (B, T each). Logits are not shifted.

    Raises:
        Refused: The request is from another run, or for another version.
        ValueError: The tensors have other names.
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
        raise ValueError("the header is not a JSON object")
    return tensors, header
