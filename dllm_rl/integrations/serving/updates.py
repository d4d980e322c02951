"""The server side of `HTTPEngine`: receive the learner's weights, and return rollouts and logits.

The batcher runs `update_weights`, `sample_rollout` and `compute_logits` as jobs, in the thread that owns the policy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as repr_of
from typing import Any, TypeVar

import torch
from torch import Tensor

from dllm_rl.integrations.serving.batching import Refused
from dllm_rl.models.base import Policy, is_finite
from dllm_rl.models.checkpoint.tensors import mismatched_tensors
from dllm_rl.models.merge import merged_state_dict
from dllm_rl.models.tensor_bytes import deserialize, record_to_json, serialize
from dllm_rl.quantization.rollout_policy import sync_weights
from dllm_rl.rng import generator_for
from dllm_rl.samplers.with_settings import with_settings
from dllm_rl.types.rollouts import Prompts

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
except ModuleNotFoundError as error:
    raise ImportError(f"dllm-rl serve needs {error.name}: pip install -e '.[serve]'") from None

# Of each tensor of a request: dtype, and a letter for each dimension. Equal letters are equal sizes.
PROMPT_TENSORS = {
    "tokens": (torch.int64, "BS"),
    "attention_mask": (torch.bool, "BS"),
    "group": (torch.int64, "B"),
    "seeds": (torch.int64, "B"),
}
FILLED_PROMPT_TENSORS = PROMPT_TENSORS | {"infill_mask": (torch.bool, "BS")}
LOGITS_TENSORS = {
    "tokens": (torch.int64, "BT"),
    "attention_mask": (torch.bool, "BT"),
    "positions": (torch.int64, "BT"),
}


class Header(BaseModel):
    """What the header of every request says."""

    model_config = ConfigDict(strict=True, extra="forbid")
    run: str = Field(description="a text")
    weights_version: int = Field(ge=0, le=2**63 - 1, description="a whole number of at least 0, below 2**63")


class WeightsHeader(Header):
    """The header of a request for /weights."""

    is_load: bool = False


class RolloutHeader(Header):
    """The header of a request for /rollouts."""

    settings: dict[str, Any] = Field(description="an object of the sampler's settings")
    reads_order: bool


HeaderType = TypeVar("HeaderType", bound=Header)


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

    def check_run(self, header: Header) -> None:
        """Raise Refused unless the request comes from this run."""
        if self.run is None:
            raise Refused(409, "no run has loaded its weights into this server yet; call the engine's load first")
        if header.run != self.run:
            message = "another run has loaded its weights into this server since; give each run its own server"
            raise Refused(409, message)

    def check(self, policy: Policy, header: Header) -> None:
        """Raise Refused unless the request comes from this run and is for the current weights."""
        self.check_run(header)
        if header.weights_version != policy.weights_version:
            raise Refused(
                409,
                f"the request is for weights_version={header.weights_version}, and the server has "
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
    tensors, header = _read(data, WeightsHeader)
    version, is_load = header.weights_version, header.is_load
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
    lease.learner.weights_version, lease.run = version, header.run
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
    tensors, header = _read(data, RolloutHeader)
    lease.check(policy, header)
    _check_tensors(policy, tensors, FILLED_PROMPT_TENSORS if "infill_mask" in tensors else PROMPT_TENSORS)
    prompts = Prompts(**tensors, reads_order=header.reads_order)
    sampler = with_settings(policy, header.settings)
    rollout = sampler(policy, prompts, generator_for("unused"))  # rows have their own seeds
    rollout_tensors: dict[str, Tensor] = {}
    rollout_json = record_to_json(rollout, "rollout", rollout_tensors)  # also fills rollout_tensors
    return serialize(rollout_tensors, rollout_json)


@torch.no_grad()
def compute_logits(lease: Lease, data: bytes, policy: Policy) -> bytes:
    """Compute fp32 logits (B, T, V) from tokens, attention_mask and positions (B, T each). Logits are not shifted.

    Raises:
        Refused: The request is from another run, or for another version.
        ValueError: The tensors are invalid.
    """
    tensors, header = _read(data, Header)
    lease.check(policy, header)
    _check_tensors(policy, tensors, LOGITS_TENSORS)
    states = policy.encode(*(tensors[name].to(policy.device) for name in ("tokens", "attention_mask", "positions")))
    return serialize({"logits": policy.head(states).float()}, {})


def _read(data: bytes, kind: type[HeaderType]) -> tuple[dict[str, Tensor], HeaderType]:
    """Return the tensors and the checked header of a request. Raises ValueError with the field that is wrong."""
    tensors, values = deserialize(data)
    try:
        return tensors, kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    if not first["loc"]:
        raise ValueError("the header is not a JSON object")
    name = str(first["loc"][0])
    description = kind.model_fields[name].description if name in kind.model_fields else None
    value = f"{name}={repr_of(values[name])}" if name in values else name
    raise ValueError(f"{value}: {f'must be {description}' if description else first['msg']}")


def _check_tensors(
    policy: Policy, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, str]]
) -> None:
    """Raise ValueError unless the tensors have these names, dtypes and shapes, and ids that the model has.

    An id that an embedding lacks would end the process's use of a GPU.
    """
    if tensors.keys() != expected.keys():
        raise ValueError(f"tensors {sorted(tensors)} must be {', '.join(sorted(expected))}")
    sizes: dict[str, int] = {}
    for name, (dtype, letters) in expected.items():
        tensor = tensors[name]
        shape = "(" + ", ".join(letters) + ")"
        if tensor.dtype != dtype or tensor.dim() != len(letters):
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {dtype} of {shape}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if size == 0 or sizes.setdefault(letter, size) != size:
                raise ValueError(
                    f"{name} has the shape {tuple(tensor.shape)}; {shape} must be equal in all tensors, not 0"
                )
    limits = {"tokens": policy.vocab_size, "positions": policy.spec.max_length or 2**31, "group": 2**31}
    for name in limits.keys() & expected.keys():
        low, high = map(int, tensors[name].aminmax())
        if low < 0 or high >= limits[name]:
            raise ValueError(f"{name} must lie in [0, {limits[name]}), and has values from {low} to {high}")
