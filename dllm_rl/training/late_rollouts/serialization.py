"""Serialize weights and batches of asynchronous rollouts, as the bytes of a safetensors file."""

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from dllm_rl.models.base import Policy
from dllm_rl.recipe import Recipe
from dllm_rl.renamed import RENAMED, renamed
from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.training.completion_log import stored_fields
from dllm_rl.training.rollouts import GradedCompletion
from dllm_rl.training.samples import Samples
from dllm_rl.types import BatchRecord, Rollout, SamplingParams

# The records that a rollout consists of. A rollout is a `BatchRecord` too.
RECORDS: dict[str, Callable] = {kind.__name__: kind for kind in (*BatchRecord.__subclasses__(), SamplingParams)}
Collected = tuple[Samples, list[GradedCompletion], dict[str, float]]


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
        raise ValueError(f"not a safetensors file of this library: {error}") from None


def trained_weights(policy: Policy) -> bytes:
    """Serialize the weights that training changes (with adapters, only the adapters) and their version."""
    trained = {name: weight for name, weight in policy.module.named_parameters() if weight.requires_grad}
    return serialize(trained, {"version": policy.weights_version})


def record_to_json(value: object, name: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a rollout, or a part of it, to JSON. Its tensors are added to `tensors`; the JSON has their names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if is_dataclass(value):
        json_fields = {
            f.name: record_to_json(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields(value)
        }
        return {"record": type(value).__name__, "fields": json_fields}
    if isinstance(value, tuple):
        return {"tuple": [record_to_json(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    return {"rank": True} if callable(value) else value  # the rank is the only function in a rollout


def record_from_json(value: Any, tensors: Mapping[str, Tensor], rank: Callable | None) -> Any:
    """Rebuild the argument of `record_to_json`. `rank` is the rank of the recipe's sampler."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "record" in value:
        class_name: str = value["record"]  # from a checkpoint, maybe of an earlier version
        record_fields = dict(
            renamed(class_name, name, record_from_json(item, tensors, rank)) for name, item in value["fields"].items()
        )
        return RECORDS[RENAMED.get(class_name, class_name)](**record_fields)
    return rank if "rank" in value else tuple(record_from_json(item, tensors, rank) for item in value["tuple"])


def serialize_batch(collected: Collected, seconds: float) -> bytes:
    """Serialize a batch for another process or a checkpoint. `seconds` is the time that making it took.

    The fields of a problem become JSON, as in completions.jsonl: after grading they are only shown and stored.
    """
    samples, answers, metrics = collected
    tensors = {"rewards": samples.rewards, "advantages": samples.advantages, "metric_weights": samples.metric_weights}
    tensors |= {f"rollout_logprobs.{number}": logprobs for number, logprobs in enumerate(samples.rollout_logprobs)}
    problems: dict[int, dict[str, Any]] = {}
    json_answers = []
    for answer in answers:
        problem, reward = answer.problem, answer.reward
        if id(problem) not in problems:
            texts = {"prompt": problem.prompt, "solution": problem.solution, "blank": problem.blank}
            problems[id(problem)] = {"fields": stored_fields(problem), **texts}
        breakdown = {name: float(value) for name, value in reward.breakdown.items()}
        json_reward = {
            "value": float(reward.value),
            "parsed": bool(reward.parsed),
            "breakdown": breakdown,
            "answer": reward.answer,
        }
        json_answer = {f.name: getattr(answer, f.name) for f in fields(answer) if f.name not in ("problem", "reward")}
        json_answers.append({"problem": list(problems).index(id(problem)), "reward": json_reward, **json_answer})
    rollout = record_to_json(samples.rollout, "rollout", tensors)
    header = {"rollout": rollout, "problems": list(problems.values()), "answers": json_answers}
    return serialize(tensors, {**header, "metrics": metrics, "seconds": seconds})


def deserialize_batch(data: bytes, recipe: Recipe, device: torch.device) -> tuple[Collected, float]:
    """Return the batch and the seconds that `serialize_batch` received, with the rollout on the device."""
    tensors, header = deserialize(data)
    rollout: Rollout = record_from_json(header["rollout"], tensors, getattr(recipe.sampler, "keywords", {}).get("rank"))
    count = sum(name.startswith("rollout_logprobs.") for name in tensors)
    samples = Samples(
        rollout.to(device),
        tensors["rewards"],
        tensors["advantages"],
        tensors["metric_weights"],
        tuple(tensors[f"rollout_logprobs.{number}"].to(device) for number in range(count)),
    )
    problems = [Problem(**item) for item in header["problems"]]
    answers = []
    for item in header["answers"]:
        records = {"problem": problems[item["problem"]], "reward": Reward(**item["reward"])}
        answers.append(GradedCompletion(**{**item, **records}))
    return (samples, answers, header["metrics"]), header["seconds"]
