"""`dllm-rl evaluate`: evaluate every model at every combination of settings, and show the results."""

import argparse
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from dllm_rl.cli.options import Method, open_policy, read_methods
from dllm_rl.cli.run_settings import sampler_of, task_named
from dllm_rl.config import import_named, override
from dllm_rl.decoding.tokens import default_max_new_tokens
from dllm_rl.device import find_device
from dllm_rl.distributed.collectives import OneProcess, Processes, make_accelerator, num_launched
from dllm_rl.evaluation.completions import fingerprint
from dllm_rl.evaluation.evaluate import evaluate, task_facts
from dllm_rl.evaluation.results import Evaluation, best_of, compared_with, metric_of, varying, with_bounds
from dllm_rl.files import read_json, write_json
from dllm_rl.models.base import Policy
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import Scheme
from dllm_rl.records import describe
from dllm_rl.samplers import Renoise, Sampler, Unmask, sampler_for
from dllm_rl.samplers.cache import Cache
from dllm_rl.samplers.rules import Commit, Rank, Schedule, check_scores
from dllm_rl.samplers.unmask import check_number_of_steps
from dllm_rl.samplers.with_settings import check_number_of_samples, sampler_with
from dllm_rl.screen import NARROW, escape_controls, literal
from dllm_rl.tasks import Task
from dllm_rl.tasks.base import check_not_empty
from dllm_rl.tasks.protocols import SOURCES, TASKS, under_protocol
from dllm_rl.versions import versions

Plan = tuple[dict[str, Any], Sampler]  # settings by name as recorded, and the sampler with them
IN_HEADINGS = {"model", "max_new_tokens", "diffusion_steps"}  # settings that `results_table` shows
NUM_GENERATED = 500  # problems to evaluate, without --limit, of a task that can generate any number


def evaluate_command(arguments: argparse.Namespace) -> None:
    task = make_task(arguments)
    check_arguments(task, arguments)  # before loading a model
    schemes = swept_methods(Scheme, "quantization", arguments) or [None]
    processes: Processes = OneProcess()
    device = find_device(arguments.device)
    if num_launched() > 1:
        processes = make_accelerator(device=device if arguments.device else None)
        device = processes.device
    limit = num_problems(task, arguments)
    source = SOURCES.get(getattr(task, "protocol", ""), arguments.task)  # a task of the user's has no protocol
    facts: dict[str, Any] = {"protocol_source": source, "versions": versions()}
    rows: list[dict[str, Any]] = []
    # By the other settings: the first model, or a single model's first quantization, and its results.
    baselines: dict[str, tuple[str, Evaluation]] = {}
    is_one_model = len(arguments.models) == 1
    for position, model in enumerate(arguments.models):
        policy = open_policy(arguments, model, device=device)
        facts["dtype"] = dtype_of(policy)
        plans = make_plans(policy, task, arguments)
        for scheme in schemes:
            quantization = describe_scheme(scheme)
            quantized = policy if scheme is None else quantized_copy(policy, scheme)
            weights = fingerprint(quantized) if arguments.output_dir else None
            for plan_settings, sampler in plans:
                settings = {"quantization": quantization, **plan_settings}
                file = completions_file(arguments, weights, task, settings, model=model)
                differing = [{"quantization": describe_scheme(each), **plan} for each in schemes for plan, _ in plans]
                shown = [f"{name} {settings[name]}" for name in varying(differing) if name in settings]
                title = ", ".join([task.name, str(model), *shown])
                with progress_bar(title, limit * arguments.samples, main=processes.is_main_process) as progress:
                    result = evaluate(
                        quantized,
                        task,
                        sampler,
                        seed=arguments.seed,
                        batch_size=arguments.batch_size,
                        samples=arguments.samples,
                        limit=limit,
                        completions=file,
                        model=str(model),
                        quantization=quantization if scheme else None,
                        weights=weights,
                        accelerator=processes,
                        reward_timeout=arguments.reward_timeout,
                        progress=progress,
                    )
                row = {**result.summary, **result.majority(arguments.majority), **settings, **facts}
                row |= {"completions": file.name} if file else {}
                others = str(plan_settings if is_one_model else settings)
                if scheme is schemes[0] if is_one_model else position == 0:
                    baselines[others] = (f"quantization {quantization}" if is_one_model else str(model), result)
                elif others in baselines:
                    against, baseline = baselines[others]
                    row |= compared_with(against, result, baseline)
                rows.append(row)
    if processes.is_main_process:
        show_results(rows, arguments)


def describe_scheme(scheme: Scheme | None) -> str:
    """Return a quantization scheme as the results name it."""
    return "none" if scheme is None else describe(scheme)


def check_arguments(task: Task, arguments: argparse.Namespace) -> None:
    """Check the arguments, and create the folders of the results.

    Raises:
        ValueError: There is no model, or --majority does not fit the other arguments or the task.
        OSError: A folder cannot be created.
    """
    largest_k = max(arguments.majority, default=0)
    if not arguments.models:
        raise ValueError("evaluate needs a MODEL: a checkpoint's or a run's folder, or a hub's id")
    if largest_k > arguments.samples or (largest_k and task.reward(task[0], "").answer is None):
        need = f"--samples {largest_k} or more, and a grader that says which answers are equal"
        raise ValueError(f"--majority {largest_k} needs {need}: gsm8k's, or math500's without math-verify")
    if folder := arguments.output_dir:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--output_dir {folder!r} cannot be written ({error.strerror}); give another") from None


def show_results(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.output_dir:
        add_results(Path(arguments.output_dir) / "results.json", rows)
    if arguments.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        is_small = len(rows) <= 3 and len(arguments.models) == 1 and {*varying(rows)} <= IN_HEADINGS
        Console().print(results_table(rows) if is_small else sweep_table(rows))
        if arguments.output_dir:
            print(f"Completions and results.json: {escape_controls(str(arguments.output_dir))}")


def add_results(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a results.json. They replace the rows of the same completions under the same protocol."""

    def key(row: dict[str, Any]) -> tuple[Any, Any]:
        return row["completions"], row["protocol"]

    new = set(map(key, rows))
    earlier = read_json(path) if path.is_file() else []
    write_json(path, [*(row for row in earlier if key(row) not in new), *rows])


def dtype_of(policy: Policy) -> str:
    """Return the dtype of the loaded weights, whatever --dtype is."""
    return str(next(policy.module.parameters()).dtype).removeprefix("torch.")


def completions_file(
    arguments: argparse.Namespace, weights: str | None, task: Task, settings: dict[str, Any], *, model: object
) -> Path | None:
    """Return the file of the completions of the policy with the fingerprint `weights`; None without --output_dir.

    Its name has the last part of the model's name, the size, and a hash of everything that the completions depend on.
    The grading and the model's name are not part of the hash: completions of the same weights are found again.
    """
    if weights is None:
        return None
    facts = task_facts(task)
    provenance = {name: facts[name] for name in ("task", "version", "settings")} | settings
    provenance |= {"seed": arguments.seed, "weights": weights}
    key = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:8]
    steps = f"-{settings['diffusion_steps']}-steps" if settings.get("diffusion_steps") else ""
    folder, size = Path(arguments.output_dir), f"{settings['max_new_tokens']}-tokens{steps}"
    earlier = min(folder.glob(f"completions-*-{size}-{key}.*"), default=None)
    if earlier is not None:
        return folder / f"{earlier.name.partition(f'-{key}.')[0]}-{key}.jsonl"
    name = re.sub(r"[^\w.-]", "_", Path(str(model)).resolve().name)
    return folder / f"completions-{name}-{size}-{key}.jsonl"


def make_task(arguments: argparse.Namespace) -> Task:
    """Return the task of --task, or of the first run, with --split, --path and --set, graded by --protocol.

    If --task names a run's task, it keeps the run's settings.

    The default protocol is strict, or sandbox for a task with reward_rule="sandbox". A task of the user's, given as
    MODULE:NAME of a function or class that makes it, grades by its own rules.
    """
    name, of_run = task_named(arguments.models, arguments.task)
    if arguments.path:  # all rows of the file, and not those that the run would take
        of_run = {field: value for field, value in of_run.items() if field not in ("split", "size")}
    settings: dict[str, Any] = {"split": "test"} | of_run
    is_own = ":" in name
    if name not in TASKS and not is_own:
        raise ValueError(f"task={name!r} is neither one of {', '.join(TASKS)} nor MODULE:NAME")
    make: Callable[..., Task] = import_named(name, "--task") if is_own else TASKS[name]
    parameters = inspect.signature(make).parameters
    for option in ("path", "split"):
        if (value := getattr(arguments, option)) and option not in parameters:
            raise ValueError(f"{option}={value!r}: task {name!r} makes its problems; leave it out")
        settings |= {option: value} if value else {}
    for option, parameter in parameters.items():
        if parameter.default is parameter.empty and option not in settings:
            raise ValueError(f"--task {name} needs {option!r}; give a function without arguments that makes the task")
    task = make(**{option: value for option, value in settings.items() if option in parameters})
    if not isinstance(task, Task):
        raise ValueError(f"--task {name} makes a {type(task).__name__}, not a task: see dllm_rl.tasks.Task")
    names: list[str] = [field.name for field in fields(task)] if is_dataclass(task) else []
    for text in arguments.set:
        option, equals, _ = text.partition("=")
        if not equals or option not in names:
            raise ValueError(f"--set {text}: write FIELD=VALUE, where task {name!r} has {', '.join(names) or 'none'}")
    task = override(task, [f"--{text}" for text in arguments.set]) if arguments.set else task
    check_not_empty("task", task)
    if is_own:
        if arguments.protocol is not None:
            raise ValueError(f"--protocol {arguments.protocol}: task {name!r} grades by its own rules; leave it out")
        return task
    default_protocol = "sandbox" if getattr(task, "reward_rule", "") == "sandbox" else "strict"
    return under_protocol(task, arguments.protocol or default_protocol)


def num_problems(task: Task, arguments: argparse.Namespace) -> int:
    """Return the number of problems: --limit, else all problems of a file or data set, or NUM_GENERATED."""
    inner = getattr(task, "task", task)  # the task that `under_protocol` wraps
    is_generated = hasattr(inner, "seed") and getattr(inner, "path", None) is None
    limit = NUM_GENERATED if is_generated and arguments.limit is None else arguments.limit
    return len(task) if limit is None else min(limit, len(task))


def make_plans(policy: Policy, task: Task, arguments: argparse.Namespace) -> list[Plan]:
    """Return a plan for each combination of the settings that are lists.

    Settings that are not passed are those of the run's evaluations, if the model is a run. Without them a completion
    has one step per token.
    """
    sampler_class = sampler_for(policy)
    rules = [  # read first, because this imports a rank of the user's, which the run's sampler may have
        swept_methods(base, name, arguments) or [None]
        for name, base in (("commit", Commit), ("rank", Rank), ("cache", Cache))
    ]
    run_sampler = sampler_of(arguments.models[0]) if len(arguments.models) == 1 else None
    run = run_sampler if isinstance(run_sampler, sampler_class) else None
    temperature = arguments.temperature
    if sampler_class is not Renoise:  # whose schedule sets the temperatures
        temperature = getattr(run_sampler, "temperature", 0.0) if temperature is None else temperature
    filters = {name: getattr(arguments, name) for name in ("top_k", "top_p", "suppress")}
    shared = {"temperature": temperature, "block_size": arguments.block_size} | filters
    lengths = arguments.max_new_tokens or [default_length(policy, task, run_sampler)]
    plans: list[Plan] = []
    for length, commit, rank, cache, steps in product(lengths, *rules, arguments.diffusion_steps or [None]):
        rule = commit or getattr(run, "commit", Schedule())
        takes_steps = rule.revises or not rule.adaptive  # of an adaptive rule they limit the edits
        if not takes_steps and steps and commit is None:
            reason = f"the run's commit={rule} chooses its number of steps"
            raise ValueError(f"--diffusion_steps {steps}: {reason}; add --commit Schedule")
        if sampler_class is Unmask and not rule.adaptive and run is None:
            steps = steps or length or None
        changes = shared | {"rank": rank, "commit": commit}
        changes |= {"cache": "none" if arguments.cache and cache is None else cache}
        changes |= {"diffusion_steps": steps if takes_steps else None}
        changes |= {"max_new_tokens": length if run is None or arguments.max_new_tokens else None}
        sampler = sampler_with(policy, run, changes)
        # Check here, before the first forward, instead of in the middle of a sweep.
        check_number_of_steps(sampler, policy.spec)
        if isinstance(sampler, Unmask):
            check_scores(sampler.rank, sampler.commit)
        check_number_of_samples(sampler, arguments.samples)
        names = ("max_new_tokens", "diffusion_steps", "block_size", "temperature")
        settings = {name: getattr(sampler, name) for name in names if hasattr(sampler, name)}
        settings |= {name: value for name, value in filters.items() if value is not None}
        for name in ("rank", "commit", "cache"):
            if hasattr(sampler, name):
                method = getattr(sampler, name)
                settings[name] = "none" if method is None else describe(method)
        if (settings, sampler) not in plans:  # an adaptive rule is the same plan for every number of steps
            plans.append((settings, sampler))
    return plans


def default_length(policy: Policy, task: Task, run_sampler: Sampler | None) -> int:
    """Return the run's max_new_tokens, or the task's default, for `Renoise` in whole canvases."""
    if run_sampler is not None:
        return run_sampler.max_new_tokens
    length = default_max_new_tokens(policy, task)
    if sampler_for(policy) is not Renoise:
        return length
    canvas = policy.spec.block_size
    assert canvas is not None, "`check_spec` requires it"
    return max(1, -(-length // canvas)) * canvas


def swept_methods(base: type[Method], option: str, arguments: argparse.Namespace) -> list[Method | None]:
    """Return the methods that an option names, one for each combination of the values of their fields.

    `--commit Threshold,Schedule --commit.tau 0.7,0.9` are Threshold(tau=0.7), Threshold(tau=0.9) and Schedule().
    """
    values_of = {
        field: [text] if text.startswith("[") else text.split(",")
        for field, text in arguments.fields.get(option, {}).items()
    }
    methods: list[Method | None] = []
    for values in product(*values_of.values()):
        given = {option: dict(zip(values_of, values, strict=True))}
        methods += read_methods(base, option, getattr(arguments, option) or [], given)
    return [*dict.fromkeys(methods)]  # a class without the field is made once


@contextmanager
def progress_bar(description: str, total: int, *, main: bool) -> Iterator[Callable[[int], None]]:
    """Yield progress(done), which draws a bar on a terminal's standard error from its first call on, until the block
    ends.
    """
    columns = (BarColumn(10), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    text_column = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
    console = Console(file=sys.stderr)
    is_shown = main and console.is_terminal
    bar = Progress(text_column, *columns, console=console, disable=not is_shown, expand=True, transient=True)
    bar_task = bar.add_task(escape_controls(description), total=total)

    def progress(done: int) -> None:
        bar.start()  # only now, so that an error before the first batch is printed without a bar
        bar.update(bar_task, completed=done)

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()


def heading(row: dict[str, Any], split: str = "") -> Any:
    """Return the title of a table whose rows share the task, protocol and seed of `row`."""
    title = f"{row['task']} (version {row['version']}), protocol {row['protocol']}{split}, seed {row['seed']}"
    return literal(f"{title}, {row['n']} problems x {row['samples']}", style="table.title")


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one row per metric with 95 % intervals, and one column per length."""
    first_row = rows[0]
    split = f", {first_row['split']} split" if first_row["split"] else ""
    captions = [first_row["model"], *reasons_for_null(rows)]
    table = Table(title=heading(first_row, split), caption=literal(". ".join(captions), style="table.caption"))
    table.add_column("")
    for row in rows:
        sizes = {"tokens": row["max_new_tokens"], "steps": row.get("diffusion_steps")}  # 0 tokens: blanks are filled
        title = ", ".join(f"{size} {unit}" for unit, size in sizes.items() if size)
        table.add_column(title, justify="right")
    for name in dict.fromkeys(name for row in rows for name in row if f"{name}_interval" in row):
        cells = [with_bounds(row[name], row[f"{name}_interval"], separator="  ") if name in row else "" for row in rows]
        table.add_row(literal(name), *map(literal, cells))
    completions = first_row["n"] * first_row["samples"]
    table.add_row("tokens per completion", *(f"{row['tokens'] / completions:.1f}" for row in rows))
    for name in ("forwards_per_answer", "tokens_per_forward", "seconds"):
        table.add_row(name.replace("_", " "), *(f"{row[name]:.1f}" for row in rows))
    return table


def sweep_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one row per setting: the settings that differ, `metric_of`, and the cost."""
    metric = metric_of(rows)
    against = next((row["against"] for row in rows if "against" in row), None)
    text = f"difference: {metric} minus that of {against}, problem by problem, with a 95 % interval"
    names = varying(rows)
    values_and_labels = [
        (row[metric], ", ".join(str(row[name]) for name in names if name in row)) for row in rows if metric in row
    ]
    captions = [
        *[text] * bool(against),
        best_of(values_and_labels, metric),
        "forwards: per answer, x tokens per forward",
        *reasons_for_null(rows),
    ]
    table = Table(title=heading(rows[0]), caption=literal(". ".join(captions), style="table.caption"), **NARROW)
    for name in names:
        # The full name would leave no space for the other columns.
        table.add_column(literal("steps" if name == "diffusion_steps" else name), overflow="fold")
    for name in (metric, *["difference"] * (against is not None), "forwards", "seconds"):
        table.add_column(literal(name), justify="right", no_wrap=True)
    separator = "\n" if against else " "  # a line break leaves space for the names of models
    for row in rows:
        cells = [with_bounds(row[metric], row[f"{metric}_interval"], separator=separator) if metric in row else ""]
        if against is not None:
            difference = row.get("difference", {}).get(metric)
            cells.append(with_bounds(difference[0], difference[1:], sign="+", separator="\n") if difference else "")
        cells.append(f"{row['forwards_per_answer']:.1f}{separator}x {row['tokens_per_forward']:.1f}")
        cells.append(f"{row['seconds']:.1f}")
        table.add_row(
            *(literal(str(row.get(name, ""))) for name in names), *(literal(cell, keep="\n") for cell in cells)
        )
    return table


def reasons_for_null(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return why some of the numbers of results have no interval; [] if all have one."""
    return list(dict.fromkeys(row["why_null"] for row in rows if "why_null" in row))
