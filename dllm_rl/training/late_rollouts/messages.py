"""Serialize weights and batches of asynchronous rollouts, as the bytes of a safetensors file."""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from dllm_rl.files import as_json
from dllm_rl.models.base import Policy, gather_if_sharded
from dllm_rl.models.tensor_bytes import deserialize, record_from_json, record_to_json, serialize
from dllm_rl.step.collect import GradedCompletion
from dllm_rl.step.samples import Samples
from dllm_rl.tasks.base import Problem, Reward

Collected = tuple[Samples, list[GradedCompletion], dict[str, float]]


@torch.no_grad()
def trained_weights(policy: Policy, *, keep: bool = True) -> bytes:
    """Serialize the weights that training changes (with adapters, only the adapters) and their version.

    For a sharded learner this is a collective: every process must call it, and those that need no bytes pass
    keep=False, which returns none.
    """
    trained = {}
    for name, weight in policy.module.named_parameters():
        if weight.requires_grad:
            value = gather_if_sharded(weight)
            if keep:  # of gathered tensors, the device stores one at a time
                trained[name] = weight if value is weight else value.cpu()
    return serialize(trained, {"version": policy.weights_version}) if keep else b""


def serialize_batch(collected: Collected, seconds: float) -> bytes:
    """Serialize a batch for another process or a checkpoint. `seconds` is the time that making it took.

    The fields of a problem become JSON, as in completions.jsonl: after grading they are only shown and stored.
    """
    samples, answers, metrics = collected
    tensors: dict[str, Tensor] = {}
    json_samples = {f.name: record_to_json(getattr(samples, f.name), f.name, tensors) for f in fields(samples)}
    json_answers = []
    for answer in answers:
        reward = answer.reward
        json_reward = {
            "value": None if reward.value is None else float(reward.value),
            "parsed": bool(reward.parsed),
            "breakdown": {name: float(value) for name, value in reward.breakdown.items()},
            "answer": reward.answer,
        }
        problem = {f.name: getattr(answer.problem, f.name) for f in fields(Problem)}
        json_problem = problem | {"fields": as_json(answer.problem.fields)}
        json_answers.append(vars(answer) | {"problem": json_problem, "reward": json_reward})
    return serialize(tensors, [json_samples, json_answers, metrics, seconds])


def deserialize_batch(data: bytes, rank: Callable | None, device: torch.device) -> tuple[Collected, float]:
    """Return the batch and the seconds that `serialize_batch` received, with the rollout on the device. `rank` is that
    of the recipe's sampler.
    """
    tensors, (json_samples, json_answers, metrics, seconds) = deserialize(data)
    samples = Samples(**{name: record_from_json(value, tensors, rank) for name, value in json_samples.items()})
    samples = replace(
        samples,
        rollout=samples.rollout.to(device),
        rollout_logprobs=tuple(logprobs.to(device) for logprobs in samples.rollout_logprobs),
    )
    answers = []
    for item in json_answers:
        records = {"problem": Problem(**item["problem"]), "reward": Reward(**item["reward"])}
        answers.append(GradedCompletion(**item | records))
    return (samples, answers, metrics), seconds
