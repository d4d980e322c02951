"""Serialize weights and rollouts for another process, as the bytes of a safetensors file. Nothing is pickled."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from dllm_rl.types.batch_record import BatchRecord
from dllm_rl.types.rollouts import SamplingParams

# The records that a rollout consists of. A rollout is a `BatchRecord` too.
RECORDS: dict[str, Callable] = {kind.__name__: kind for kind in (*BatchRecord.__subclasses__(), SamplingParams)}


def serialize(tensors: Mapping[str, Tensor], header: object) -> bytes:
    """Serialize tensors, and any JSON value as the file's metadata."""
    # Each tensor is copied, because the format refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.save(copies, metadata={"about": json.dumps(header)})


def deserialize(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors and the JSON value that `serialize` received.

    Raises:
        ValueError: The bytes are not from `serialize`.
    """
    try:
        (size,) = struct.unpack("<Q", data[:8])
        return safetensors.load(data), json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["about"])
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"not a safetensors file that this library wrote: {error}") from None


def record_to_json(value: object, name: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a rollout, or a part of it, to JSON. Its tensors are added to `tensors`; the JSON has their names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if callable(value):
        return {"rank": True}  # the only function in a rollout
    if is_dataclass(value):
        json_fields = {
            f.name: record_to_json(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields(value)
        }
        return {"record": type(value).__name__, "fields": json_fields}
    if isinstance(value, tuple):
        return {"tuple": [record_to_json(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    return value


def record_from_json(value: Any, tensors: Mapping[str, Tensor], rank: Callable | None) -> Any:
    """Rebuild the argument of `record_to_json`. `rank` is the rank of the recipe's sampler, to which an order refers.

    Raises ValueError if an order refers to a rank, and there is none.
    """
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "record" in value:
        record_fields = {name: record_from_json(item, tensors, rank) for name, item in value["fields"].items()}
        return RECORDS[value["record"]](**record_fields)
    if "rank" in value:
        if rank is None:
            raise ValueError(
                "the rollout's order was drawn by a rank, and the recipe's sampler has no field rank to score it by: "
                "give the sampler such a field, or use late=None"
            )
        return rank
    return tuple(record_from_json(item, tensors, rank) for item in value["tuple"])
