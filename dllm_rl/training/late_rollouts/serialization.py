"""Weights, and batches of asynchronous rollouts, as the bytes of a safetensors file."""

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
from dllm_rl.training.rollouts import Answer
from dllm_rl.training.samples import Samples
from dllm_rl.types import BatchRecord, Rollout, SamplingParams

# The records that a rollout consists of. A rollout is a `BatchRecord` too.
RECORDS: dict[str, Callable] = {kind.__name__: kind for kind in (*BatchRecord.__subclasses__(), SamplingParams)}
Collected = tuple[Samples, list[Answer], dict[str, float]]


def as_bytes(tensors: Mapping[str, Tensor], about: object) -> bytes:
    """Return a safetensors file with host copies of the tensors, and `about` as JSON in its header."""
    # Copies: the format refuses tensors that share memory.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return safetensors.save(copies, metadata={"about": json.dumps(about)})


def from_bytes(data: bytes) -> tuple[dict[str, Tensor], Any]:
    """Return the arguments of `as_bytes`.

    Raises:
        ValueError: The bytes are not from `as_bytes`.
    """
    try:
        (size,) = struct.unpack("<Q", data[:8])
        return safetensors.load(data), json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["about"])
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"no safetensors file of this library: {error}") from None


def trained_weights(policy: Policy) -> bytes:
    """Return the weights that training changes, with adapters only the adapters, and their version."""
    trained = {name: weight for name, weight in policy.module.named_parameters() if weight.requires_grad}
    return as_bytes(trained, {"version": policy.weights_version})


def plain_record(value: object, name: str, tensors: dict[str, Tensor]) -> Any:
    """Convert a rollout, or a part of it, to JSON; its tensors go to `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if is_dataclass(value):
        held = {f.name: plain_record(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields(value)}
        return {"record": type(value).__name__, "fields": held}
    if isinstance(value, tuple):
        return {"tuple": [plain_record(each, f"{name}.{i}", tensors) for i, each in enumerate(value)]}
    return {"rank": True} if callable(value) else value  # the rank is the only function in a rollout


def record_of(value: Any, tensors: Mapping[str, Tensor], rank: Callable | None) -> Any:
    """Return the argument of `plain_record`; `rank` is the sampler's."""
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "record" in value:
        kind: str = value["record"]  # from a checkpoint, maybe of an earlier version
        held = dict(renamed(kind, name, record_of(each, tensors, rank)) for name, each in value["fields"].items())
        return RECORDS[RENAMED.get(kind, kind)](**held)
    return rank if "rank" in value else tuple(record_of(each, tensors, rank) for each in value["tuple"])


def batch_as_bytes(collected: Collected, seconds: float) -> bytes:
    """Convert a batch for another process or a checkpoint; `seconds` is the time that it took.

    The fields of a problem become JSON, as in completions.jsonl: after grading they are only shown and stored.
    """
    samples, answers, metrics = collected
    tensors = {"rewards": samples.rewards, "advantages": samples.advantages, "metric_weights": samples.metric_weights}
    tensors |= {f"rollout_logprobs.{number}": each for number, each in enumerate(samples.rollout_logprobs)}
    problems: dict[int, dict[str, Any]] = {}
    graded = []
    for answer in answers:
        problem, reward = answer.problem, answer.reward
        if id(problem) not in problems:
            texts = {"prompt": problem.prompt, "solution": problem.solution, "blank": problem.blank}
            problems[id(problem)] = {"fields": stored_fields(problem), **texts}
        parts = {name: float(value) for name, value in reward.breakdown.items()}
        kept = {
            "value": float(reward.value),
            "parsed": bool(reward.parsed),
            "breakdown": parts,
            "answer": reward.answer,
        }
        plain = {f.name: getattr(answer, f.name) for f in fields(answer) if f.name not in ("problem", "reward")}
        graded.append({"problem": list(problems).index(id(problem)), "reward": kept, **plain})
    rollout = plain_record(samples.rollout, "rollout", tensors)
    known = {"rollout": rollout, "problems": list(problems.values()), "answers": graded}
    return as_bytes(tensors, {**known, "metrics": metrics, "seconds": seconds})


def batch_from_bytes(data: bytes, recipe: Recipe, device: torch.device) -> tuple[Collected, float]:
    """Return the arguments of `batch_as_bytes`, with the rollout on the device."""
    tensors, about = from_bytes(data)
    rollout: Rollout = record_of(about["rollout"], tensors, getattr(recipe.sampler, "keywords", {}).get("rank"))
    count = sum(name.startswith("rollout_logprobs.") for name in tensors)
    samples = Samples(
        rollout.to(device),
        tensors["rewards"],
        tensors["advantages"],
        tensors["metric_weights"],
        tuple(tensors[f"rollout_logprobs.{number}"].to(device) for number in range(count)),
    )
    problems = [Problem(**each) for each in about["problems"]]
    answers = []
    for each in about["answers"]:
        graded = {"problem": problems[each["problem"]], "reward": Reward(**each["reward"])}
        answers.append(Answer(**{**each, **graded}))
    return (samples, answers, about["metrics"]), about["seconds"]
