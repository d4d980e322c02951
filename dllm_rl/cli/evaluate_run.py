"""`dllm-rl evaluate`: evaluate every model at every combination of settings, and show the results."""

import argparse
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dllm_rl.cli.options import Method, import_function, open_policy, read_methods, read_value
from dllm_rl.cli.run_settings import sampler_or_note, task_of
from dllm_rl.config import override, setting_paths
from dllm_rl.decoding.tokens import default_max_new_tokens
from dllm_rl.device import find_device
from dllm_rl.distributed.collectives import OneProcess, Processes, make_accelerator, num_launched
from dllm_rl.evaluation.completions import fingerprint
from dllm_rl.evaluation.evaluate import evaluate, task_facts
from dllm_rl.evaluation.results import Evaluation, best_of, compared_with, headline, with_bounds
from dllm_rl.evaluation.sweep import plot_curve, varying, write_csv
from dllm_rl.files import write_json
from dllm_rl.models.base import Policy
from dllm_rl.models.policy import as_causal
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.quantization.schemes import Scheme
from dllm_rl.records import describe
from dllm_rl.samplers import Autoregress, Renoise, Sampler, Unmask
from dllm_rl.samplers.cache import Cache
from dllm_rl.samplers.rules import Commit, MaxProb, Rank, Schedule, check_steps, steps_per_block
from dllm_rl.screen import NARROW, escape_controls, literal
from dllm_rl.tasks import Task
from dllm_rl.tasks.base import check_not_empty
from dllm_rl.tasks.protocols import SOURCES, TASKS, under_protocol
from dllm_rl.versions import versions

Plan = tuple[dict[str, Any], Sampler]  # settings by name as recorded, and the sampler with them
Measured = tuple[dict[str, Any], Evaluation]  # settings by name, and the results at these settings
NUM_GENERATED = 500  # problems to evaluate, without --limit, of a task that can generate any number


def evaluate_command(arguments: argparse.Namespace) -> None:
    task = make_task(arguments)
    check_arguments(task, arguments)  # before loading a model
    schemes = read_schemes(arguments)
    processes: Processes = OneProcess()
    device = find_device(arguments.device)
    if num_launched() > 1:
        processes = make_accelerator(device=device if arguments.device else None)
        device = processes.device
    shared_arguments: dict[str, Any] = {
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "samples": arguments.samples,
    }
    limit = num_problems(task, arguments)
    shared_arguments |= {"reward_timeout": arguments.reward_timeout, "accelerator": processes, "limit": limit}
    source = SOURCES.get(getattr(task, "protocol", ""), arguments.task)  # a task of the user's has no protocol
    facts: dict[str, Any] = {"protocol_source": source, "versions": versions()}
    rows: list[dict[str, Any]] = []
    first_measured: list[Measured] = []  # of the first model, in the order of its plans
    for model in arguments.models:
        policy = open_policy(arguments, model, device=device)
        facts["dtype"] = dtype_of(policy)
        plans = make_plans(policy, task, arguments)
        if arguments.autoregressive:
            plans += autoregressive_plans(policy, task, arguments)
        measured: list[Measured] = []
        for quantization, scheme in schemes.items():
            diffusion = policy if scheme is None else quantized_copy(policy, scheme)
            causal = as_causal(diffusion) if arguments.autoregressive else None  # shares the weights
            for plan_settings, sampler in plans:
                decoded_policy = (
                    causal if causal is not None and plan_settings["decoding"] == "autoregressive" else diffusion
                )
                settings = {"quantization": quantization, **plan_settings}
                file = completions_file(arguments, decoded_policy, task, settings)
                title = f"{task.name}, {', '.join(map(str, [model, *settings.values()]))}"
                total = limit * arguments.samples
                with progress_bar(title, total, main=processes.is_main_process) as progress:
                    result = evaluate(
                        decoded_policy,
                        task,
                        sampler,
                        completions=file,
                        model=str(model),
                        quantization=quantization if scheme else None,
                        progress=progress,
                        **shared_arguments,
                    )
                measured.append((settings, result))
                row = {**result.summary, **result.majority(arguments.majority), **settings, **facts}
                row |= {"completions": file.name} if file else {}
                # Every model has the same plans in the same order. Empty for the first model.
                first_at_settings = first_measured[len(measured) - 1 :][:1]
                if arguments.autoregressive:
                    rows.append(row | difference_from_diffusion(result, settings, measured))
                else:
                    rows.append(row | difference_from_first(result, settings, first_at_settings, arguments.models[0]))
        first_measured = first_measured or measured  # later models are compared with the first
    if processes.is_main_process:
        show_results(rows, arguments)


def check_arguments(task: Task, arguments: argparse.Namespace) -> None:
    """Check the arguments, and create the folders of the results.

    Raises:
        ValueError: There is no model, or --majority or --autoregressive does not fit the other arguments or the task.
        OSError: A folder cannot be created.
    """
    if arguments.autoregressive and len(arguments.models) > 1:
        raise ValueError(f"--autoregressive compares two decodings of one MODEL, and {len(arguments.models)} are given")
    if arguments.autoregressive and task[0].blank is not None:
        raise ValueError("--autoregressive cannot fill in the blanks of this task; leave it out")
    largest_k = max(arguments.majority, default=0)
    if not arguments.models:
        raise ValueError("evaluate needs a MODEL: a checkpoint's or a run's folder, or a hub's id")
    if largest_k > arguments.samples or (largest_k and task.reward(task[0], "").answer is None):
        need = f"--samples {largest_k} or more, and a grader that says which answers are equal"
        raise ValueError(f"--majority {largest_k} needs {need}: gsm8k's, or math500's without math-verify")
    for name in ("output_dir", "csv", "plot"):
        if value := getattr(arguments, name):
            try:
                (Path(value) if name == "output_dir" else Path(value).parent).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"--{name} {value!r} cannot be written ({error.strerror}); give another") from None


def difference_from_first(
    result: Evaluation, settings: dict[str, Any], first: Sequence[Measured], against: str
) -> dict[str, Any]:
    """Return the differences from the first model at the same settings; {} for the first model itself.

    Args:
        result: Results of a model.
        settings: Settings of these results.
        first: Settings and results of the first model that may be compared.
        against: Name of the first model.
    """
    for first_settings, first_result in first:
        if first_settings == settings:
            return compared_with(against, result, first_result)
    return {}


def difference_from_diffusion(
    result: Evaluation, settings: dict[str, Any], measured: Sequence[Measured]
) -> dict[str, Any]:
    """Return how an autoregressive decoding differs from the same model's diffusion decoding; {} for the latter.

    The diffusion decoding is the first one in `measured` of the same length and quantization.
    """
    if settings["decoding"] == "diffusion":
        return {}
    names = ("quantization", "max_new_tokens")
    diffusion_result = next(
        other_result for other, other_result in measured if all(other[name] == settings[name] for name in names)
    )
    return compared_with("its diffusion decoding", result, diffusion_result)


def show_results(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.output_dir:
        write_json(Path(arguments.output_dir) / "results.json", rows)
    if arguments.json:
        print("\n".join(map(json.dumps, rows)))
    else:
        is_small = len(rows) <= 3 and len(arguments.models) == 1 and not arguments.autoregressive
        Console().print(results_table(rows) if is_small else sweep_table(rows))
        if arguments.output_dir:
            print(f"Completions and results.json: {escape_controls(str(arguments.output_dir))}")
    if arguments.csv:
        write_csv(Path(arguments.csv), rows)
    if arguments.plot:
        plot_curve(Path(arguments.plot), rows)


def read_schemes(arguments: argparse.Namespace) -> dict[str, Scheme | None]:
    """Return each quantization scheme of the weights by its text; None for "none"."""
    schemes = swept_methods(Scheme, "quantization", arguments) or [None]
    return {"none" if scheme is None else describe(scheme): scheme for scheme in schemes}


def dtype_of(policy: Policy) -> str:
    """Return the dtype of the loaded weights, whatever --dtype is."""
    return str(next(policy.module.parameters()).dtype).removeprefix("torch.")


def completions_file(
    arguments: argparse.Namespace, policy: Policy, task: Task, settings: dict[str, Any]
) -> Path | None:
    """Return the file of the completions; None without --output_dir.

    Its name contains a hash of everything that the completions depend on. The grading is not part of it.
    """
    if arguments.output_dir is None:
        return None
    facts = task_facts(task)
    provenance = {name: facts[name] for name in ("task", "version", "settings")} | settings
    provenance |= {"seed": arguments.seed, "dtype": dtype_of(policy), "weights": fingerprint(policy)}
    key = hashlib.sha256(json.dumps(provenance, sort_keys=True).encode()).hexdigest()[:8]
    steps = f"-{settings['diffusion_steps']}-steps" if settings.get("diffusion_steps") else ""
    return Path(arguments.output_dir) / f"completions-{settings['max_new_tokens']}-tokens{steps}-{key}.jsonl"


def make_task(arguments: argparse.Namespace) -> Task:
    """Return the task of --task, or of the run, with --split, --path and --set, graded by --protocol.

    The default protocol is strict, or sandbox for a task with reward_rule="sandbox". A task of the user's, given as
    MODULE:NAME of a function or class that makes it, grades by its own rules.
    """
    name = arguments.task
    settings: dict[str, Any] = {"split": "test"}
    if name is None:  # a run names its task
        name, settings = task_of(arguments.models[0] if arguments.models else "")
    is_own = ":" in name
    if name not in TASKS and not is_own:
        raise ValueError(f"task={name!r} is not one of {', '.join(TASKS)}, and no MODULE:NAME")
    make: Callable[..., Task] = import_function("task", name) if is_own else TASKS[name]
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
        raise ValueError(f"--task {name} makes a {type(task).__name__}, and no task: see dllm_rl.tasks.Task")
    fields: dict[str, Any] = dict(setting_paths(task)) if is_dataclass(task) else {}
    for text in arguments.set:
        option, equals, _ = text.partition("=")
        if not equals or option not in fields:
            raise ValueError(f"--set {text}: write FIELD=VALUE, where task {name!r} has {', '.join(fields) or 'none'}")
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

    Settings that are not passed are those of the run's evaluations, if the model is a run.
    """
    run_sampler = find_run_sampler(arguments)
    if policy.spec.attention == "encoder_decoder":
        return renoising_plans(policy, task, run_sampler, arguments)
    if arguments.samples > 1 and temperature_of(arguments, run_sampler) == 0:
        raise ValueError(
            f"--samples {arguments.samples} at --temperature 0 would all be equal; give a temperature above 0"
        )
    run_length = None if run_sampler is None else run_sampler.max_new_tokens
    lengths = arguments.max_new_tokens or [default_max_new_tokens(policy, task) if run_length is None else run_length]
    if policy.spec.attention != "causal":
        plans = diffusion_plans(run_sampler, lengths, arguments)
        decoding = {"decoding": "diffusion"} if arguments.autoregressive else {}
        return [(decoding | settings, sampler) for settings, sampler in plans]
    if arguments.autoregressive:
        raise ValueError(
            f"--autoregressive: {' '.join(arguments.models)} always decodes from left to right; leave it out"
        )
    # An ignored option would look as if it had been applied.
    for name in ("diffusion_steps", "block_size", "rank", "commit", "cache"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is for diffusion models; {' '.join(arguments.models)} is causal: leave it out")
    shared = {"temperature": temperature_of(arguments, run_sampler)} | filters_of(arguments)
    settings_of_plans = [{"max_new_tokens": length} | shared for length in lengths]
    return [(settings, with_settings(Autoregress, settings, run_sampler)) for settings in settings_of_plans]


def autoregressive_plans(policy: Policy, task: Task, arguments: argparse.Namespace) -> list[Plan]:
    """Return the plans for decoding a diffusion model from left to right, one per length.

    Temperature, top_k, top_p and suppress are those of its diffusion decoding.
    """
    run_sampler = find_run_sampler(arguments)
    names = [name for name in ("top_k", "top_p", "suppress") if hasattr(run_sampler, name)]
    shared = {name: getattr(run_sampler, name) for name in names} | filters_of(arguments)
    shared["temperature"] = temperature_of(arguments, run_sampler)
    run_length = None if run_sampler is None else run_sampler.max_new_tokens
    lengths = arguments.max_new_tokens or [run_length or default_max_new_tokens(policy, task)]
    settings_of_plans = [{"max_new_tokens": length} | shared for length in lengths]
    return [({"decoding": "autoregressive"} | settings, Autoregress(**settings)) for settings in settings_of_plans]


def find_run_sampler(arguments: argparse.Namespace) -> Sampler | None:
    """Return the sampler of the run's evaluations if the only model is a run's folder, else None."""
    return sampler_or_note(arguments.models[0]) if len(arguments.models) == 1 else None


def temperature_of(arguments: argparse.Namespace, run_sampler: Sampler | None) -> float:
    return getattr(run_sampler, "temperature", 0.0) if arguments.temperature is None else arguments.temperature


def filters_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return those of top_k, top_p and suppress that are passed; without them the run's apply."""
    return {name: value for name in ("top_k", "top_p", "suppress") if (value := getattr(arguments, name)) is not None}


def with_settings(sampler: type[Sampler], settings: dict[str, Any], run_sampler: Sampler | None) -> Sampler:
    """Return a sampler with these settings, and for all others those of the run's sampler."""
    return run_sampler.replace(**settings) if isinstance(run_sampler, sampler) else sampler(**settings)


def renoising_plans(
    policy: Policy, task: Task, run_sampler: Sampler | None, arguments: argparse.Namespace
) -> list[Plan]:
    """Return the plans of a model whose noise is random tokens, one per length and number of steps.

    The schedule of `Renoise` sets the temperatures.
    """
    for name in ("block_size", "rank", "commit", "cache", "top_k", "top_p", "suppress"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is not for {policy.spec.name!r}, whose sampler is Renoise; leave it out")
    if arguments.temperature:
        raise ValueError(f"--temperature {arguments.temperature}: Renoise has its own schedule; leave it out")
    canvas = policy.spec.block_size
    assert canvas is not None, "`check_spec` requires it"
    if isinstance(run_sampler, Renoise):
        default = run_sampler
    else:
        default = Renoise(max_new_tokens=max(1, -(-default_max_new_tokens(policy, task) // canvas)) * canvas)
    pairs = product(
        arguments.max_new_tokens or [default.max_new_tokens], arguments.diffusion_steps or [default.diffusion_steps]
    )
    settings_of_plans = [{"max_new_tokens": length, "diffusion_steps": num_steps} for length, num_steps in pairs]
    return [(settings, default.replace(**settings)) for settings in settings_of_plans]


def swept_methods(base: type[Method], option: str, arguments: argparse.Namespace) -> list[Method | None]:
    """Return the methods that an option names, one for each combination of the values of their fields.

    `--commit Threshold,Schedule --commit.tau 0.7,0.9` are Threshold(tau=0.7), Threshold(tau=0.9) and Schedule().
    """
    fields = {
        field: [read_value(each) for each in value.split(",")] if isinstance(value, str) else [value]
        for field, value in arguments.fields.get(option, {}).items()
    }
    methods: list[Method | None] = []
    for values in product(*fields.values()):
        given = {option: dict(zip(fields, values, strict=True))}
        methods += read_methods(base, option, getattr(arguments, option) or [], given)
    return [*dict.fromkeys(methods)]  # a class without the field is made once


def diffusion_plans(run_sampler: Sampler | None, lengths: Sequence[int], arguments: argparse.Namespace) -> list[Plan]:
    """Return the plans of `Unmask`: one per length, commit rule, rank, cache and number of steps.

    Without --rank, a passed commit rule has the rank that it requires.
    """
    run = run_sampler if isinstance(run_sampler, Unmask) else None
    block_size = run.block_size if run and arguments.block_size is None else arguments.block_size
    commits = swept_methods(Commit, "commit", arguments) or [run.commit if run else Schedule()]
    ranks = swept_methods(Rank, "rank", arguments) or [None]
    caches = swept_methods(Cache, "cache", arguments) or [run.cache if run else None]
    plans: list[Plan] = []
    for length, commit, rank, cache in product(lengths, commits, ranks, caches):
        assert commit is not None, "a commit rule is never none"
        required_rank = commit.required_rank if arguments.commit else None
        rank = rank or required_rank or (run.rank if run else MaxProb())
        settings: dict[str, Any] = {"max_new_tokens": length, "diffusion_steps": None, "block_size": block_size}
        settings |= {"temperature": temperature_of(arguments, run_sampler)} | filters_of(arguments)
        if commit.adaptive and arguments.diffusion_steps and not arguments.commit:
            steps = arguments.diffusion_steps[0]
            reason = f"the run's commit={commit} chooses its number of steps"
            raise ValueError(f"--diffusion_steps {steps}: {reason}; add --commit Schedule")
        for steps in dict.fromkeys(numbers_of_steps(commit, length, run, arguments)):
            if run is None or steps != run.diffusion_steps:
                # Raise here, before the first forward, instead of in the middle of a sweep.
                check_steps(steps, length, commit.count)
                if block_size and steps and length:
                    steps_per_block(steps, [block_size] * -(-length // block_size))
            settings = settings | {"diffusion_steps": steps}
            rules = {"rank": rank, "commit": commit, "cache": cache}
            names = {name: "none" if rule is None else describe(rule) for name, rule in rules.items()}
            plans.append((settings | names, with_settings(Unmask, settings | rules, run)))
    return plans


def numbers_of_steps(
    rule: Commit, length: int, run: Unmask | None, arguments: argparse.Namespace
) -> Sequence[int | None]:
    """Return the numbers of steps for one rule and length: the passed ones, else the run's, or the length.

    An adaptive rule chooses its number of steps, and gets the run's setting.
    """
    run_steps = run.diffusion_steps if run else None
    if rule.adaptive:
        return [run_steps]
    if arguments.diffusion_steps:
        return arguments.diffusion_steps
    if run is None:
        return [length or None]
    # If --max_new_tokens shortens the completion, it has at most one step per token.
    return [min(run_steps, length) if run_steps and length and arguments.max_new_tokens else run_steps]


@contextmanager
def progress_bar(description: str, total: int, *, main: bool) -> Iterator[Callable[[int], None]]:
    """Yield progress(done), which draws a bar on standard error from its first call on."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    text_column = TextColumn("{task.description}", markup=False)
    bar = Progress(text_column, *columns, console=Console(file=sys.stderr), disable=not main)
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
        steps = f", {row['diffusion_steps']} steps" if row.get("diffusion_steps") else ""
        table.add_column(f"{row['max_new_tokens']} tokens{steps}", justify="right")
    for name in (name for name in first_row if f"{name}_interval" in first_row):
        cells = [with_bounds(row[name], row[f"{name}_interval"], separator="  ") for row in rows]
        table.add_row(literal(name), *map(literal, cells))
    completions = first_row["n"] * first_row["samples"]
    table.add_row("tokens per completion", *(f"{row['tokens'] / completions:.1f}" for row in rows))
    for name in ("forwards_per_answer", "tokens_per_forward", "seconds"):
        table.add_row(name.replace("_", " "), *(f"{row[name]:.1f}" for row in rows))
    return table


def sweep_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one row per setting: the settings that differ, the headline metric, and the cost."""
    metric = headline(rows[0])
    against = next((row["against"] for row in rows if "against" in row), None)
    text = f"difference: {metric} minus that of {against}, problem by problem, with a 95 % interval"
    names = varying(rows)
    values_and_labels = [(row[metric], ", ".join(str(row[name]) for name in names if name in row)) for row in rows]
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
        cells = [with_bounds(row[metric], row[f"{metric}_interval"], separator=separator)]
        if against is not None:
            difference = row.get("difference", {}).get(metric)
            cells.append(with_bounds(difference[0], difference[1:], sign="+", separator="\n") if difference else "")
        cells.append(f"{row['forwards_per_answer']:.1f}{separator}x {row['tokens_per_forward']:.1f}")
        cells.append(f"{row['seconds']:.1f}")
        table.add_row(*(literal(str(row.get(name, ""))) for name in names), *map(literal, cells))
    return table


def reasons_for_null(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return why some of the numbers of results have no interval; [] if all have one."""
    return list(dict.fromkeys(row["why_null"] for row in rows if "why_null" in row))
