"""Evaluate a policy on a task: one function for training, for code and for `dllm-rl evaluate`."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllm_rl.distributed.collectives import OneProcess, Processes, gather_objects
from dllm_rl.distributed.sharding import in_pace
from dllm_rl.evaluation.completions import Completions, Row, fingerprint, make_row
from dllm_rl.evaluation.results import Evaluation, Graded
from dllm_rl.members import describe
from dllm_rl.models.base import Policy
from dllm_rl.models.tokens import before_end, chosen_ids, encode, graded_texts
from dllm_rl.rng import generator_for
from dllm_rl.tasks.base import Problem, Task, grade
from dllm_rl.types import Rollout


def evaluate(
    policy: Policy,
    task: Task,
    sampler: Callable[..., Rollout],
    *,
    seed: int = 0,
    batch_size: int = 256,
    samples: int = 1,
    limit: int | None = None,
    completions: str | Path | None = None,
    model: str = "",
    quantization: str | None = None,
    accelerator: Processes | None = None,
    reward_timeout: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Complete the task's problems, or its first `limit`, `samples` times each, and grade the completions.

    Random numbers depend on (seed, problem, sample) only; sample 0 is what samples=1 gives.
    batch_size   completions per call of the sampler and process, but at least those of one problem.
    completions  a .jsonl file that keeps every completion; stored completions are graded again, not sampled again.
    model, quantization  names of the model and of its weights' quantisation, for the records.
    accelerator  shares the problems among its processes; all return the same result. None: this process alone.
    reward_timeout  seconds for the grading of one completion; see `tasks.deadline`. None: no limit.
    progress     called with the number of completions done so far, over all processes.
    Raises ValueError if the file holds completions of other weights, quantisation, seed, sampler or problems.
    """
    count = len(task) if limit is None else min(limit, len(task))
    for name, value in {"samples": samples, "batch_size": batch_size, "limit": count}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    accelerator = accelerator or OneProcess()
    path = None if completions is None else Path(completions)
    made_with = {"seed": seed, "sampler": describe(sampler), "weights": path and fingerprint(policy)}
    made_with |= {"quantization": quantization} if quantization else {}
    keeper = Completions(path, made_with, accelerator)
    facts = task_facts(task) | {"model": model} | made_with

    answers: list[Graded] = []
    size = min(max(1, batch_size // samples), -(-count // accelerator.num_processes))
    starts = range(accelerator.process_index * size, count, accelerator.num_processes * size)
    with in_pace(policy):
        for batch in (range(start, min(start + size, count)) for start in starts):
            problems = {i: task[i] for i in batch}
            keys = [(i, j) for i in batch for j in range(samples)]
            rows = keeper.held(keys, problems)
            if len(rows) < len(keys):
                # Always run the whole batch, even if part of it is stored: results must not depend on where a previous
                # run was killed.
                made = complete(policy, problems, sampler, seed, samples, facts)
                fresh = {key: made[key] for key in keys if key not in rows}
                keeper.append(fresh.values())
                rows |= fresh
            texts = [rows[key]["completion"] for key in keys]
            graded = grade(task, list(problems.values()), texts, timeout=reward_timeout)
            for key, reward in zip(keys, graded, strict=True):
                record = rows[key]["evaluation"]
                answers.append(Graded(*key, reward, record["tokens"], record["forwards"], record["seconds"]))
            progress(min(len(answers) * accelerator.num_processes, count * samples))
    keeper.close()
    gathered = sorted(gather_objects(answers, accelerator), key=lambda answer: (answer.problem, answer.sample))
    return Evaluation(tuple(gathered), facts)


def complete(
    policy: Policy,
    problems: dict[int, Problem],
    sampler: Callable[..., Rollout],
    seed: int,
    samples: int,
    facts: dict[str, Any],
) -> dict[tuple[int, int], Row]:
    """The rows of a batch: every problem completed `samples` times."""
    keys = [(i, j) for i in problems for j in range(samples)]
    seeds = [generator_for(seed, "evaluate", i, *([j] if j else [])).initial_seed() for i, j in keys]
    begin = time.perf_counter()
    prompts = encode(policy, list(problems.values()), group_size=samples, seeds=seeds)
    rollout = sampler(policy, prompts, generator_for(seed, "evaluate"))
    if not rollout.logprobs.isfinite().all():
        raise ValueError("the model's log-probabilities are not finite (NaN or infinity): nothing can be evaluated")
    chosen = chosen_ids(rollout)
    texts = graded_texts(policy, rollout, list(problems.values()), chosen)
    lengths = [len(before_end(policy, ids)) for ids in chosen]
    share = {"forwards": rollout.forwards / len(keys), "seconds": (time.perf_counter() - begin) / len(keys)}
    return {
        (i, j): make_row(problems[i], text, {"problem": i, "sample": j, "tokens": length, **share, **facts})
        for (i, j), text, length in zip(keys, texts, lengths, strict=True)
    }


def task_facts(task: Task) -> dict[str, Any]:
    """Name, version, protocol and split of a task, and its settings that are plain values."""
    inner = getattr(task, "task", task)  # under a protocol, the settings are those of the task itself
    fields = dataclasses.fields(inner) if dataclasses.is_dataclass(inner) else ()
    values = {field.name: getattr(inner, field.name) for field in fields}
    plain = {n: str(v) if isinstance(v, Path) else v for n, v in values.items() if _plain(v)}
    return {
        "task": task.name,
        "version": task.version,
        "protocol": getattr(task, "protocol", "own"),
        "split": plain.get("split"),
        "settings": plain,
    }


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Path)
