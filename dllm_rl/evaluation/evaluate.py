"""`evaluate`, which a run's evaluations and `dllm-rl evaluate` call."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from dllm_rl.decoding.prompts import encode
from dllm_rl.decoding.texts import completion_token_ids, costs_of, texts_to_grade
from dllm_rl.distributed.collectives import OneProcess, Processes, gather_objects
from dllm_rl.evaluation.completions import COSTS, Completions, Rows, digest_of_problem, fingerprint, make_row
from dllm_rl.evaluation.results import Evaluation, GradedAnswer
from dllm_rl.models.base import Policy, join_uneven_forwards
from dllm_rl.records import describe
from dllm_rl.rng import generator_for
from dllm_rl.samplers.sampler import check_rollout
from dllm_rl.samplers.with_settings import check_number_of_samples
from dllm_rl.tasks.base import Cost, Problem, Task, grade
from dllm_rl.types.rollouts import Rollout


def evaluate(  # noqa: PLR0913
    policy: Policy,
    task: Task,
    sampler: Callable[..., Rollout],
    *,
    seed: int = 0,
    batch_size: int = 32,
    samples: int = 1,
    limit: int | None = None,
    completions: str | Path | None = None,
    model: str = "",
    quantization: str | None = None,
    weights: str | None = None,
    accelerator: Processes | None = None,
    reward_timeout: float | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Complete the problems of a task and grade the completions.

    Call it to measure a policy outside a run; a run evaluates its policy every `evaluation.steps` steps. The random
    numbers of a completion depend only on the seed, the problem and the index of the sample, so that raising `samples`
    adds completions and leaves the others as they are.

    Args:
        policy: Policy to evaluate.
        task: Problems and their grader.
        sampler: `Unmask`, `Autoregress`, `Renoise`, or your own with its settings.
        seed: Seed of the random numbers. Default: 0.
        batch_size: Largest number of completions per call of the sampler in each process. Default: 32.
        samples: Completions per problem. Default: 1.
        limit: Number of problems to evaluate, from the first problem on. None (default): all problems.
        completions: Path of a .jsonl file that stores every completion. If the file exists, its completions are graded
            again, and only batches with a missing completion are sampled; stored completions are not replaced. None
            (default): nothing is stored.
        model: Name of the model, stored with the results.
        quantization: Name of the weights' quantization, stored with the results.
        weights: `fingerprint` of the policy, for several evaluations of one policy with files. None (default): it is
            computed if a file needs it, which reads every weight.
        accelerator: Processes among which the problems are divided; every process returns the same result. None
            (default): only this process.
        reward_timeout: Time limit in seconds for grading one completion; after it the process ends. None (default): no
            limit.
        progress: Function that is called after each batch with the number of completions that all processes together
            have finished.

    Returns:
        The graded completions of all processes, with means and summary.

    Raises:
        ValueError: samples, batch_size or limit is below 1; the samples of a problem would all be equal; the log-probs
            are not finite; the sampler lacks rows or does not fill the blanks; or the file has completions that were
            made with other weights, quantization, seed, sampler or problems.
    """
    count = len(task) if limit is None else min(limit, len(task))
    for name, value in {"samples": samples, "batch_size": batch_size, "limit": count}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    check_number_of_samples(sampler, samples)
    accelerator = accelerator or OneProcess()
    path = None if completions is None else Path(completions).expanduser()
    # The fingerprint shows whether this policy made the stored completions. Without a file it is not needed.
    if path is not None and weights is None:
        weights = fingerprint(policy)
    provenance = {"seed": seed, "sampler": describe(sampler), "weights": weights}
    provenance |= {"quantization": quantization} if quantization else {}
    store = Completions(path, provenance, accelerator)
    facts = task_facts(task) | {"model": model} | provenance

    answers: list[GradedAnswer] = []
    # A batch has at most the number of problems divided by the number of processes, so that every process gets a batch.
    problems_per_batch = min(max(1, batch_size // samples), -(-count // accelerator.num_processes))
    with join_uneven_forwards(policy):
        first = accelerator.process_index * problems_per_batch
        for start in range(first, count, accelerator.num_processes * problems_per_batch):
            problems = {problem: task[problem] for problem in range(start, min(start + problems_per_batch, count))}
            rows = store.stored_rows(product(problems, range(samples)), problems)
            if len(rows) < len(problems) * samples:
                # Sample the full batch even if part of it is stored, so that an interrupted evaluation gives the same
                # results. Stored rows replace the new ones.
                for first_sample in range(0, samples, batch_size):
                    some = range(first_sample, min(first_sample + batch_size, samples))
                    rows = complete(policy, problems, sampler, seed, some, facts) | rows
                store.append(rows)
            answers += grade_rows(task, problems, rows, reward_timeout)
            progress(min(len(answers) * accelerator.num_processes, count * samples))
    gathered = sorted(gather_objects(answers, accelerator), key=lambda answer: (answer.problem, answer.sample))
    # Merge the files of all processes into one file, and add the grades.
    store.merge_parts(gathered, facts["protocol"])
    return Evaluation(tuple(gathered), facts)


def complete(
    policy: Policy,
    problems: dict[int, Problem],
    sampler: Callable[..., Rollout],
    seed: int,
    samples: range,
    facts: dict[str, Any],
) -> Rows:
    """Sample the completions of these numbers of every problem in one batch; return them as rows."""
    keys = list(product(problems, samples))
    start_time = time.perf_counter()
    seeds = row_seeds(seed, keys)
    prompts = encode(policy, list(problems.values()), num_generations=len(samples), seeds=seeds, reads_order=False)
    rollout = sampler(policy, prompts, generator_for(seed, "evaluate", seeds[0]))
    check_rollout(sampler, policy, prompts, rollout)
    if not rollout.logprobs.isfinite().all():
        raise ValueError("the model's log-probabilities are not finite (NaN or infinity): nothing can be evaluated")
    completion_ids = completion_token_ids(rollout)
    texts = texts_to_grade(policy, rollout, [problems[problem] for problem, _ in keys], completion_ids)
    # The forwards and the seconds of the batch are divided equally among its rows, so that their sum over all rows is
    # the cost of the evaluation.
    batch_share = {"forwards": rollout.forwards / len(keys), "seconds": (time.perf_counter() - start_time) / len(keys)}
    rows = {}
    for (problem, sample), text, cost in zip(keys, texts, costs_of(policy, rollout, completion_ids), strict=True):
        # Two numbers count forwards (model calls). "steps" (`Cost.forwards`) is the number of forwards that this
        # completion needed, whatever other rows are in its batch. "forwards", in batch_share, is its share of the
        # batch's forwards: a batch of 8 rows that took 64 forwards adds 8 to each row.
        row_fields = {"problem": problem, "sample": sample, "tokens": cost.tokens, "steps": cost.forwards}
        rows[problem, sample] = make_row(problems[problem], text, {**row_fields, **batch_share, **facts})
    return rows


def row_seeds(seed: int, keys: Sequence[tuple[int, int]]) -> list[int]:
    """Return the seed of each (problem, sample)."""
    seeds = []
    for problem, sample in keys:
        # The key of sample 0 has no sample index: its seed is that of earlier versions, which had one sample per
        # problem.
        key = (problem, sample) if sample else (problem,)
        seeds.append(generator_for(seed, "evaluate", *key).initial_seed())
    return seeds


def grade_rows(task: Task, problems: dict[int, Problem], rows: Rows, timeout: float | None) -> list[GradedAnswer]:
    """Grade the completions of rows."""
    texts = [row["completion"] for row in rows.values()]
    sampling_costs = [Cost(row["evaluation"]["steps"], row["evaluation"]["tokens"]) for row in rows.values()]
    rewards = grade(task, [problems[problem] for problem, _ in rows], texts, sampling_costs, timeout=timeout)
    digests = {number: digest_of_problem(problem) for number, problem in problems.items()}
    answers = []
    for (key, row), reward in zip(rows.items(), rewards, strict=True):
        costs = {name: row["evaluation"][name] for name in COSTS}
        answers.append(GradedAnswer(*key, reward, **costs, content=digests[key[0]]))
    return answers


def task_facts(task: Task) -> dict[str, Any]:
    """Return what results record about a task: name, version, protocol, split, and the settings that are plain values
    (see `_plain`).
    """
    # The settings of a task that `under_protocol` wrapped are those of its attribute `task`.
    inner_task = getattr(task, "task", task)
    settings = {}
    for field in dataclasses.fields(inner_task) if dataclasses.is_dataclass(inner_task) else ():
        if not field.repr:
            continue
        value = getattr(inner_task, field.name)
        if _plain(value):  # a data set or a function cannot be stored in a JSON file
            settings[field.name] = str(value) if isinstance(value, Path) else value
    return {
        "task": task.name,
        "version": task.version,
        "protocol": getattr(task, "protocol", "own"),  # "own": the task's own grader
        "split": settings.get("split"),
        "settings": settings,
    }


def _plain(value: Any) -> bool:
    """Return whether a setting is a scalar, a path, or a tuple of these."""
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str | Path)
