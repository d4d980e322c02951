"""Evaluation of a policy on a task: one function for training, for code and for `dllm-rl evaluate`."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from dllm_rl.distributed.collectives import OneProcess, Processes, gather_objects
from dllm_rl.evaluation.completions import Completions, Rows, fingerprint, make_row
from dllm_rl.evaluation.results import Evaluation, Graded
from dllm_rl.members import describe
from dllm_rl.models.base import Policy
from dllm_rl.models.forward.uneven import join_uneven_forwards
from dllm_rl.models.tokens import chosen_ids, costs_of, encode, graded_texts
from dllm_rl.rng import generator_for
from dllm_rl.tasks.base import Cost, Problem, Task, grade
from dllm_rl.types import Rollout


def evaluate(  # noqa: PLR0913
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
    """Complete the problems of a task and grade the completions.

    Call it to measure a policy outside a run; a run evaluates itself every `eval_steps`. Random numbers depend only on
    (seed, problem, sample); sample 0 is the same as with samples=1.

    Args:
        policy: Policy to evaluate.
        task: Problems and their grader.
        sampler: `unmask`, `autoregress` or `renoise` with its settings bound.
        seed: Seed of the random numbers. Default: 0.
        batch_size: Completions per call of the sampler in each process, but at least all samples of one problem.
            Default: 256.
        samples: Completions per problem. Default: 1.
        limit: Number of problems, from the first on. None (default): all problems.
        completions: A .jsonl file that stores every completion. Stored completions are graded again and not sampled
            again. None (default): nothing is stored.
        model: Name of the model, for the records.
        quantization: Name of the weights' quantization, for the records.
        accelerator: Processes that share the problems; all of them return the same result. None (default): only this
            process.
        reward_timeout: Seconds for the grading of one completion; see `tasks.deadline`. None (default): no limit.
        progress: Function that is called with the number of completions done so far, over all processes.

    Returns:
        The graded completions of all processes, with means and summary.

    Raises:
        ValueError: samples, batch_size or limit is below 1; the log-probs are not finite; or the file has completions
            of other weights, quantization, seed, sampler or problems.
    """
    count = len(task) if limit is None else min(limit, len(task))
    for name, value in {"samples": samples, "batch_size": batch_size, "limit": count}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    accelerator = accelerator or OneProcess()
    path = None if completions is None else Path(completions)
    # Without a file there are no other weights to compare with, so no weight is read.
    made_with = {"seed": seed, "sampler": describe(sampler), "weights": path and fingerprint(policy)}
    made_with |= {"quantization": quantization} if quantization else {}
    keeper = Completions(path, made_with, accelerator)
    facts = task_facts(task) | {"model": model} | made_with

    answers: list[Graded] = []
    # Every process gets a batch, even if all problems fit into one batch.
    size = min(max(1, batch_size // samples), -(-count // accelerator.num_processes))
    with join_uneven_forwards(policy):
        for start in range(accelerator.process_index * size, count, accelerator.num_processes * size):
            problems = {problem: task[problem] for problem in range(start, min(start + size, count))}
            rows = keeper.held(product(problems, range(samples)), problems)
            if len(rows) < len(problems) * samples:
                # The full batch is run, even if part of it is stored, so that an earlier kill changes no result.
                rows = complete(policy, problems, sampler, seed, samples, facts) | rows
                keeper.append(rows)
            answers += graded(task, problems, rows, reward_timeout)
            progress(min(len(answers) * accelerator.num_processes, count * samples))
    gathered = sorted(gather_objects(answers, accelerator), key=lambda answer: (answer.problem, answer.sample))
    keeper.fold(gathered, facts["protocol"])
    return Evaluation(tuple(gathered), facts)


def complete(
    policy: Policy,
    problems: dict[int, Problem],
    sampler: Callable[..., Rollout],
    seed: int,
    samples: int,
    facts: dict[str, Any],
) -> Rows:
    """Return the rows of a batch in which every problem is completed `samples` times."""
    asked = list(problems.values())
    keys = list(product(problems, range(samples)))
    begin = time.perf_counter()
    prompts = encode(policy, asked, group_size=samples, seeds=seeds_of(seed, keys))
    rollout = sampler(policy, prompts, generator_for(seed, "evaluate"))
    if not rollout.logprobs.isfinite().all():
        raise ValueError("the model's log-probabilities are not finite (NaN or infinity): nothing can be evaluated")
    chosen = chosen_ids(rollout)
    texts = graded_texts(policy, rollout, asked, chosen)
    # The rows of a batch share its calls and its time, so that the rows' costs add up to the evaluation's cost.
    share = {"forwards": rollout.forwards / len(keys), "seconds": (time.perf_counter() - begin) / len(keys)}
    rows = {}
    for (problem, sample), text, cost in zip(keys, texts, costs_of(policy, rollout, chosen), strict=True):
        own = {"problem": problem, "sample": sample, "tokens": cost.tokens, "steps": cost.forwards}
        rows[problem, sample] = make_row(problems[problem], text, {**own, **share, **facts})
    return rows


def seeds_of(seed: int, keys: Sequence[tuple[int, int]]) -> list[int]:
    seeds = []
    for problem, sample in keys:
        place = (problem, sample) if sample else (problem,)  # sample 0 is the same as with samples=1
        seeds.append(generator_for(seed, "evaluate", *place).initial_seed())
    return seeds


def graded(task: Task, problems: dict[int, Problem], rows: Rows, timeout: float | None) -> list[Graded]:
    texts = [row["completion"] for row in rows.values()]
    costs = [Cost(row["evaluation"]["steps"], row["evaluation"]["tokens"]) for row in rows.values()]
    rewards = grade(task, list(problems.values()), texts, costs, timeout=timeout)
    answers = []
    for (key, row), reward in zip(rows.items(), rewards, strict=True):
        made = row["evaluation"]
        answers.append(Graded(*key, reward, made["tokens"], made["forwards"], made["seconds"], made["steps"]))
    return answers


def task_facts(task: Task) -> dict[str, Any]:
    """Return name, version, protocol and split of a task, and its settings that are plain values."""
    inner = getattr(task, "task", task)  # under a protocol, take the settings of the inner task
    plain = {}
    for field in dataclasses.fields(inner) if dataclasses.is_dataclass(inner) else ():
        value = getattr(inner, field.name)
        if _plain(value):  # a data set or a function has no short text
            plain[field.name] = str(value) if isinstance(value, Path) else value
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
