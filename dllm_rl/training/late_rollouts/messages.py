"""Serialize weights and batches of asynchronous rollouts, as the bytes of a safetensors file."""

from dataclasses import fields
from typing import Any

import torch

from dllm_rl.files import as_json
from dllm_rl.models.base import Policy, gather_if_sharded
from dllm_rl.models.tensor_bytes import deserialize, record_from_json, record_to_json, serialize
from dllm_rl.recipe import Recipe
from dllm_rl.step.collect import GradedCompletion
from dllm_rl.step.samples import Samples
from dllm_rl.tasks.base import Problem, Reward
from dllm_rl.types import Rollout

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
    tensors = {name: getattr(samples, name) for name in ("group", "rewards", "advantages", "metric_weights")}
    tensors |= {f"rollout_logprobs.{number}": logprobs for number, logprobs in enumerate(samples.rollout_logprobs)}
    problems: dict[int, dict[str, Any]] = {}
    json_answers = []
    for answer in answers:
        problem, reward = answer.problem, answer.reward
        if id(problem) not in problems:
            texts = {"prompt": problem.prompt, "solution": problem.solution, "blank": problem.blank}
            problems[id(problem)] = {"fields": as_json(problem.fields), **texts}
        breakdown = {name: float(value) for name, value in reward.breakdown.items()}
        json_reward = {
            "value": None if reward.value is None else float(reward.value),
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
    rollout: Rollout = record_from_json(header["rollout"], tensors, getattr(recipe.sampler, "rank", None))
    count = sum(name.startswith("rollout_logprobs.") for name in tensors)
    samples = Samples(
        rollout.to(device),
        tensors["group"],
        tensors["rewards"],
        tensors["advantages"],
        tensors["metric_weights"],
        (len(rollout.tokens),),
        tuple(tensors[f"rollout_logprobs.{number}"].to(device) for number in range(count)),
    )
    problems = [Problem(**item) for item in header["problems"]]
    answers = []
    for item in header["answers"]:
        records = {"problem": problems[item["problem"]], "reward": Reward(**item["reward"])}
        answers.append(GradedCompletion(**{**item, **records}))
    return (samples, answers, header["metrics"]), header["seconds"]
