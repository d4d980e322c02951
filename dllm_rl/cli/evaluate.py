"""What `dllm-rl evaluate` does: build the task and the samplers, evaluate at each length, show a table or JSON."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dllm_rl.cli.options import open_policy
from dllm_rl.config import paths
from dllm_rl.distributed import OneProcess, Processes, find_device, launched, make_accelerator
from dllm_rl.evaluation.evaluate import evaluate
from dllm_rl.files import write_json
from dllm_rl.models.base import Policy
from dllm_rl.models.tokens import usual_length
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.unmask import unmask
from dllm_rl.screen import escape_controls, literal
from dllm_rl.tasks import Task
from dllm_rl.tasks.protocols import PROTOCOLS, TASKS, under_protocol

GENERATED = 500  # problems of a task that could make any number


def evaluate_command(arguments: argparse.Namespace) -> None:
    """Run the command. Raises ValueError on settings that do not go together."""
    task = make_task(arguments)
    processes: Processes = OneProcess()
    device = find_device(arguments.device)
    if launched() > 1:
        processes = make_accelerator(device=device if arguments.device else None)
        device = processes.device
    policy = open_policy(arguments, device=device)
    plans = plan(policy, task, arguments)
    limit = num_problems(task, arguments)
    found = []
    for settings, sampler in plans:
        length = settings["max_new_tokens"]
        total = min(len(task), limit) * arguments.samples
        with progress_bar(f"{task.name}, {length} tokens", total, main=processes.is_main_process) as progress:
            result = evaluate(
                policy,
                task,
                sampler,
                seed=arguments.seed,
                batch_size=arguments.batch_size,
                samples=arguments.samples,
                limit=limit,
                completions=arguments.output_dir and Path(arguments.output_dir) / f"completions-{length}.jsonl",
                model=str(arguments.model),
                accelerator=processes,
                progress=progress,
            )
        found.append({**result.summary, **settings})
    if processes.is_main_process:
        if arguments.output_dir:
            write_json(Path(arguments.output_dir) / "results.json", found)
        if arguments.json:
            print("\n".join(map(json.dumps, found)))
        else:
            Console().print(table(found))
            if arguments.output_dir:
                print(f"Completions and results.json: {escape_controls(str(arguments.output_dir))}")


def make_task(arguments: argparse.Namespace) -> Task:
    """The named task with the split, the file and the settings asked for, under its protocol (strict by default)."""
    name = arguments.task
    if name not in TASKS:
        raise ValueError(f"task={name!r} is none of {', '.join(TASKS)}")
    known = {field.name for field in fields(TASKS[name])}
    given = {"split": arguments.split, "path": arguments.path}
    for option, value in given.items():
        if value is not None and option not in known:
            raise ValueError(f"--{option} is no setting of task {name!r}, which has {', '.join(sorted(known))}")
    given["split"] = given["split"] or "test"
    task = TASKS[name](**{option: value for option, value in given.items() if option in known and value is not None})
    for text in arguments.set:
        option, equals, value = text.partition("=")
        settings = paths(task)
        if not equals or option not in settings:
            raise ValueError(f"--set {text}: write FIELD=VALUE, where task {name!r} has {', '.join(settings)}")
        task = replace(task, **{option: settings[option].read(value)})
    if name not in PROTOCOLS and arguments.protocol is None:
        return task
    return under_protocol(task, arguments.protocol or "strict")


def num_problems(task: Task, arguments: argparse.Namespace) -> int:
    """How many problems: as asked, else all of a file or data set, or GENERATED of what can be made at will."""
    inner = getattr(task, "task", task)
    made_at_will = hasattr(inner, "seed") and getattr(inner, "path", None) is None
    if arguments.limit is not None:
        return arguments.limit
    return min(len(task), GENERATED) if made_at_will else len(task)


def plan(policy: Policy, task: Task, arguments: argparse.Namespace) -> list[tuple[dict[str, Any], Callable]]:
    """For each length: its settings, for the records, and the sampler bound to them."""
    lengths = arguments.lengths or [usual_length(policy, task)]
    temperature = arguments.temperature
    if arguments.samples > 1 and temperature == 0:
        raise ValueError(f"--samples {arguments.samples} at --temperature 0 are all alike; give a temperature above 0")
    if policy.spec.attention == "causal":
        for name in ("num_steps", "block_size"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} is for diffusion models; {arguments.model} is a causal one")
        settings = [{"max_new_tokens": length, "temperature": temperature} for length in lengths]
        return [(bound, partial(autoregress, **bound)) for bound in settings]
    steps = arguments.num_steps or [None]
    if len(steps) not in (1, len(lengths)):
        raise ValueError(f"--num_steps has {len(steps)} numbers for {len(lengths)} lengths; give one, or one for each")
    settings = [
        {"max_new_tokens": n, "num_steps": s or n, "block_size": arguments.block_size, "temperature": temperature}
        for n, s in zip(lengths, steps * (len(lengths) if len(steps) == 1 else 1), strict=True)
    ]
    return [(bound, partial(unmask, **bound)) for bound in settings]


@contextmanager
def progress_bar(description: str, total: int, *, main: bool) -> Iterator[Callable[[int], None]]:
    """progress(done), shown on standard error from its first call on; standard output holds nothing but the result."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = TextColumn("{task.description}", markup=False)
    bar = Progress(shown, *columns, console=Console(file=sys.stderr), disable=not main)
    line = bar.add_task(escape_controls(description), total=total)

    def progress(done: int) -> None:
        bar.start()
        bar.update(line, completed=done)

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Metrics down, lengths across, each number with its 95 % interval."""
    first = found[0]
    split = f", {first['split']} split" if first["split"] else ""
    title = f"{first['task']} (version {first['version']}), protocol {first['protocol']}{split}, seed {first['seed']}"
    heading = literal(f"{title}, {first['n']} problems x {first['samples']}", style="table.title")
    shown = Table(title=heading, caption=literal(first["model"], style="table.caption"))
    shown.add_column("")
    for result in found:
        steps = f", {result['num_steps']} steps" if "num_steps" in result else ""
        shown.add_column(f"{result['max_new_tokens']} tokens{steps}", justify="right")
    for name in (name for name in first if f"{name}_interval" in first):
        cells = ((result[name], *result[f"{name}_interval"]) for result in found)
        shown.add_row(literal(name), *(f"{mean:.3f}  [{low:.3f}, {high:.3f}]" for mean, low, high in cells))
    completions = first["n"] * first["samples"]
    shown.add_row("tokens per completion", *(f"{result['tokens'] / completions:.1f}" for result in found))
    shown.add_row("forwards, of a batch each", *(f"{result['forwards']}" for result in found))
    shown.add_row("seconds", *(f"{result['seconds']:.1f}" for result in found))
    return shown
