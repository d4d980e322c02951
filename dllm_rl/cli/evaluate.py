"""`dllm-rl evaluate`: evaluates every model at every setting and shows the results."""

import argparse
import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dllm_rl.cli.options import open_policy
from dllm_rl.cli.run_settings import sampler_or_note, task_of
from dllm_rl.config import CHOICES, override, paths
from dllm_rl.device import find_device
from dllm_rl.distributed.collectives import OneProcess, Processes, make_accelerator, num_launched
from dllm_rl.evaluation.budget import within_budget
from dllm_rl.evaluation.card import differences, flat, read_card
from dllm_rl.evaluation.completions import fingerprint
from dllm_rl.evaluation.evaluate import evaluate, task_facts
from dllm_rl.evaluation.results import Evaluation, best_of, headline, paired_differences
from dllm_rl.evaluation.sweep import plot_curve, varying, write_csv
from dllm_rl.files import write_json
from dllm_rl.members import plain
from dllm_rl.models.base import Policy
from dllm_rl.models.policy import as_causal
from dllm_rl.models.tokens import default_max_new_tokens
from dllm_rl.quantization.rollout_policy import quantized_copy
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.by_name import read_cache, read_commit, read_rank, required_rank, text_of
from dllm_rl.samplers.records import Commit, as_commit
from dllm_rl.samplers.renoise import renoise
from dllm_rl.samplers.rules import check_steps, steps_per_block
from dllm_rl.samplers.unmask import unmask
from dllm_rl.screen import NARROW, escape_controls, literal
from dllm_rl.tasks import Task
from dllm_rl.tasks.base import check_not_empty
from dllm_rl.tasks.protocols import PUBLISHED, SOURCES, TASKS, UnderProtocol, published, under_protocol
from dllm_rl.versions import versions

Plan = tuple[dict[str, Any], Callable]  # settings by name, and the sampler bound to them
Measured = tuple[dict[str, Any], Evaluation]  # settings by name, and their results
GENERATED = 500  # problems of a task that can generate any number


def evaluate_command(arguments: argparse.Namespace) -> None:
    task = make_task(arguments)
    check(task, arguments)  # before the first model is loaded
    schemes = read_schemes(arguments.quantization or ["none"])
    processes: Processes = OneProcess()
    device = find_device(arguments.device)
    if num_launched() > 1:
        processes = make_accelerator(device=device if arguments.device else None)
        device = processes.device
    fixed = {"seed": arguments.seed, "batch_size": arguments.batch_size, "samples": arguments.samples}
    limit = num_problems(task, arguments)
    fixed |= {"reward_timeout": arguments.reward_timeout, "accelerator": processes, "limit": limit}
    facts = {"protocol_source": SOURCES[task.protocol], "versions": versions()}
    found: list[dict[str, Any]] = []
    first: list[Measured] = []  # results of the first model, setting by setting
    for model in arguments.models:
        policy = open_policy(arguments, model, device=device)
        facts["dtype"] = dtype_of(policy)
        plans = plan(policy, task, arguments)
        if arguments.autoregressive:
            plans += autoregressive_plans(policy, task, arguments)
        measured: list[Measured] = []
        for name, scheme in schemes.items():
            diffusion = policy if scheme is None else quantized_copy(policy, scheme())
            causal = as_causal(diffusion) if arguments.autoregressive else None  # shares the weights
            for rules, sampler in plans:
                sampled = causal if causal is not None and rules["decoding"] == "autoregressive" else diffusion
                settings = {"quantization": name, **rules}
                file = completions_file(arguments, sampled, task, settings)
                title = f"{task.name}, {', '.join(map(str, [model, *settings.values()]))}"
                total = limit * arguments.samples
                own: dict[str, Any] = {"completions": file, "model": str(model), "quantization": scheme and name}
                with progress_bar(title, total, main=processes.is_main_process) as progress:
                    result = evaluate(sampled, task, sampler, progress=progress, **own, **fixed)
                measured.append((settings, result))
                row = {**result.summary, **result.majority(arguments.majority), **settings, **facts}
                row |= {"completions": file.name} if file else {}
                before = first[len(measured) - 1 :][:1]  # every model has the same plans, in the same order
                if arguments.autoregressive:
                    found.append(row | other_decoding(result, settings, measured))
                else:
                    found.append(row | compared(result, settings, before, arguments.models[0]))
        first = first or measured  # later models are compared with the first
    if processes.is_main_process:
        show(found, arguments)


def asked(arguments: argparse.Namespace) -> dict[str, tuple[Any, ...]]:
    """Return the settings of this command -> their values, under a card's names; lengths and steps only if they are
    passed.
    """
    task = make_task(arguments)
    run = run_sampler(arguments)
    commits, ranks, caches, _ = choices(arguments, run)
    ranks = [rank_of(commit, run) if rank is None else rank for rank, commit in product(ranks, commits)]
    lists = {"commit": list(map(plain, commits)), "rank": list(map(plain, ranks)), "cache": list(map(plain, caches))}
    lists |= {name: getattr(arguments, name) for name in ("max_new_tokens", "diffusion_steps")}
    lists["quantization"] = arguments.quantization or ["none"]
    options = vars(arguments) | {"temperature": temperature_of(arguments, run)}
    if arguments.block_size is None:
        options["block_size"] = settings_of(run).get("block_size")
    row = flat(options | task_facts(task) | {"n": num_problems(task, arguments)})
    found = {name: (value,) for name, value in json.loads(json.dumps(row)).items() if name not in lists}
    if arguments.dtype == "auto":  # the checkpoint decides, and no checkpoint is opened here
        del found["dtype"]
    return found | {name: tuple(values) for name, values in lists.items() if values}


def show_differences(arguments: argparse.Namespace) -> None:
    """Print the differences of a card from the paper of --protocol and, with --task, from this command."""
    ours = [asked(arguments)] if arguments.task else []
    paper = arguments.protocol in PUBLISHED or not ours
    lines: dict[tuple[str, ...], None] = {}  # the rows of a sweep have the same differences in most settings
    for row in read_card(Path(arguments.compare)):
        theirs = [published(arguments.protocol or "strict", row["task"], row["max_new_tokens"])] if paper else []
        lines |= dict.fromkeys(differences(row, theirs + ours))
    shown = Table("setting", "card", *["published"] * paper, *["this command"] * len(ours), **NARROW)
    for line in lines:
        shown.add_row(*map(literal, line))
    Console().print(shown if lines else "nothing differs")


def check(task: Task, arguments: argparse.Namespace) -> None:
    """Check that the results can be counted and written, and make their folders.

    Raises:
        ValueError: There is no model, or `--majority` cannot be counted.
        OSError: A folder cannot be written.
    """
    if arguments.autoregressive and len(arguments.models) > 1:
        raise ValueError(f"--autoregressive compares two decodings of one MODEL, and {len(arguments.models)} are given")
    if arguments.autoregressive and task[0].blank is not None:
        raise ValueError("--autoregressive cannot fill in the blanks of this task; leave it out")
    most = max(arguments.majority, default=0)
    if not arguments.models:
        raise ValueError("evaluate needs a MODEL: a checkpoint's or a run's folder, or a hub's id")
    if most > arguments.samples or (most and task.reward(task[0], "").answer is None):
        need = f"--samples {most} or more, and a grader that says which answers are equal"
        raise ValueError(f"--majority {most} needs {need}: gsm8k's, or math500's without math-verify")
    for name in ("output_dir", "csv", "plot"):
        if value := getattr(arguments, name):
            try:
                (Path(value) if name == "output_dir" else Path(value).parent).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"--{name} {value!r} cannot be written ({error.strerror}); give another") from None


def compared(result: Evaluation, settings: dict[str, Any], first: Sequence[Measured], against: str) -> dict[str, Any]:
    """Return the differences from the first model at the same settings; {} for the first model itself."""
    for known, before in first:
        if without_number(known) == without_number(settings):
            return {"against": against, "difference": paired_differences(result, before)}
    return {}


def other_decoding(result: Evaluation, settings: dict[str, Any], measured: Sequence[Measured]) -> dict[str, Any]:
    """Return the differences of the autoregressive decoding from the model's first diffusion decoding of the same
    length and quantization; {} for a diffusion decoding.
    """
    if settings["decoding"] == "diffusion":
        return {}
    same = ("quantization", "max_new_tokens")
    before = next(each for known, each in measured if all(known[name] == settings[name] for name in same))
    return {"against": "its diffusion decoding", "difference": paired_differences(result, before)}


def without_number(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with only the name of the commit rule: under a budget each model has a different number."""
    return settings | {"commit": str(settings.get("commit")).partition("=")[0]}


def show(found: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if arguments.output_dir:
        write_json(Path(arguments.output_dir) / "results.json", found)
    if arguments.json:
        print("\n".join(map(json.dumps, found)))
    else:
        is_small = len(found) <= 3 and len(arguments.models) == 1 and not arguments.autoregressive
        Console().print(table(found) if is_small else sweep_table(found))
        if arguments.output_dir:
            print(f"Completions and results.json: {escape_controls(str(arguments.output_dir))}")
    if arguments.csv:
        write_csv(Path(arguments.csv), found)
    if arguments.plot:
        plot_curve(Path(arguments.plot), found)


def read_schemes(names: Sequence[str]) -> dict[str, Callable[[], Any] | None]:
    """Return the weights' schemes by name; None for "none".

    Raises:
        ValueError: A name is unknown.
    """
    known = {"none": None, **CHOICES["rollout_quantization"]}
    for name in names:
        if name not in known:
            raise ValueError(f"quantization={name!r} is not one of {', '.join(sorted(known))}")
    return {name: known[name] for name in names}


def dtype_of(policy: Policy) -> str:
    """Return the dtype of the loaded weights, whatever --dtype is."""
    return str(next(policy.module.parameters()).dtype).removeprefix("torch.")


def completions_file(
    arguments: argparse.Namespace, policy: Policy, task: Task, settings: dict[str, Any]
) -> Path | None:
    """Return the file of the completions. Its name depends on everything that the completions depend on, not on the
    grading.
    """
    if arguments.output_dir is None:
        return None
    facts = task_facts(task)
    made_by = {name: facts[name] for name in ("task", "version", "settings")} | settings
    made_by |= {"seed": arguments.seed, "dtype": dtype_of(policy), "weights": fingerprint(policy)}
    key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:8]
    steps = f"-{settings['diffusion_steps']}-steps" if settings.get("diffusion_steps") else ""
    return Path(arguments.output_dir) / f"completions-{settings['max_new_tokens']}-tokens{steps}-{key}.jsonl"


def make_task(arguments: argparse.Namespace) -> UnderProtocol:
    """Return the named task with its split, file and settings, under its protocol (strict, or a setting's sandbox)."""
    name = arguments.task
    settings: dict[str, Any] = {"split": "test"}
    if name is None:  # a run names its task
        name, settings = task_of(arguments.models[0] if arguments.models else "")
    if name not in TASKS:
        raise ValueError(f"task={name!r} is not one of {', '.join(TASKS)}")
    if arguments.path and not hasattr(TASKS[name], "path"):
        raise ValueError(f"path={arguments.path!r}: task {name!r} makes its problems; leave it out")
    options = {option: value for option in ("split", "path") if (value := getattr(arguments, option))}
    task = TASKS[name](**settings | options)
    known = paths(task)
    texts = {}
    for text in arguments.set:
        option, equals, texts[option] = text.partition("=")
        if not equals or option not in known:
            raise ValueError(f"--set {text}: write FIELD=VALUE, where task {name!r} has {', '.join(known)}")
    task = override(task, texts)
    check_not_empty("task", task)
    by_setting = "sandbox" if getattr(task, "reward_rule", "") == "sandbox" else "strict"
    return under_protocol(task, arguments.protocol or by_setting)


def num_problems(task: Task, arguments: argparse.Namespace) -> int:
    """Return --limit, or all problems of a file or data set, or GENERATED."""
    inner = getattr(task, "task", task)  # under a protocol
    made_at_will = hasattr(inner, "seed") and getattr(inner, "path", None) is None
    limit = GENERATED if made_at_will and arguments.limit is None else arguments.limit
    return len(task) if limit is None else min(limit, len(task))


def plan(policy: Policy, task: Task, arguments: argparse.Namespace) -> list[Plan]:
    """Return (settings, sampler bound to them) for each combination of the settings that are lists.

    A run's sampler has the settings of the run's evaluations, except those that are passed.
    """
    run = run_sampler(arguments)
    if arguments.forwards and arguments.diffusion_steps:
        raise ValueError("--forwards and --diffusion_steps both say how many steps are taken; give one of them")
    if policy.spec.attention == "encoder_decoder":
        return renoising_plans(policy, task, run, arguments)
    if arguments.samples > 1 and temperature_of(arguments, run) == 0:
        raise ValueError(
            f"--samples {arguments.samples} at --temperature 0 would all be equal; give a temperature above 0"
        )
    run_length = settings_of(run).get("max_new_tokens")
    lengths = arguments.max_new_tokens or [default_max_new_tokens(policy, task) if run_length is None else run_length]
    if policy.spec.attention != "causal":
        more = {"decoding": "diffusion"} if arguments.autoregressive else {}
        return [(more | rules, sampler) for rules, sampler in plans_of(policy, task, run, lengths, arguments)]
    if arguments.autoregressive:
        raise ValueError(f"--autoregressive: {' '.join(arguments.models)} only decodes so; leave it out")
    # An ignored option would look as if it had been applied.
    for name in ("diffusion_steps", "forwards", "block_size", "rank", "commit", "cache"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is for diffusion models; {' '.join(arguments.models)} has a causal one")
    shared = {"temperature": temperature_of(arguments, run)} | filters_of(arguments)
    bounds = [{"max_new_tokens": length} | shared for length in lengths]
    return [(bound, bind(autoregress, bound, run)) for bound in bounds]


def autoregressive_plans(policy: Policy, task: Task, arguments: argparse.Namespace) -> list[Plan]:
    """Return the plans of a diffusion model's left-to-right decoding: each length, with the temperature and the filters
    of its diffusion decoding.
    """
    run = settings_of(run_sampler(arguments))
    names = [name for name in ("top_k", "top_p", "suppress") if name in run]
    shared = {name: run[name] for name in names} | filters_of(arguments)
    shared["temperature"] = temperature_of(arguments, run_sampler(arguments))
    lengths = arguments.max_new_tokens or [run.get("max_new_tokens") or default_max_new_tokens(policy, task)]
    bounds = [{"max_new_tokens": length} | shared for length in lengths]
    return [({"decoding": "autoregressive"} | bound, partial(autoregress, **bound)) for bound in bounds]


def run_sampler(arguments: argparse.Namespace) -> partial | None:
    """Return the sampler of the run's evaluations if one run's folder is passed."""
    return sampler_or_note(arguments.models[0]) if len(arguments.models) == 1 else None


def settings_of(run: partial | None) -> dict[str, Any]:
    """Return all settings of a run's sampler, also those that the run leaves at their defaults; {} without a run."""
    if run is None:
        return {}
    parameters = inspect.signature(run.func).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not each.empty} | run.keywords


def temperature_of(arguments: argparse.Namespace, run: partial | None) -> float:
    return settings_of(run).get("temperature", 0.0) if arguments.temperature is None else arguments.temperature


def filters_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return top_k and top_p if they are passed; else those of the run stay."""
    return {name: value for name in ("top_k", "top_p") if (value := getattr(arguments, name)) is not None}


def bind(sampler: Callable, settings: dict[str, Any], run: partial | None) -> partial:
    """Bind settings to a sampler, and the other settings of the run."""
    return partial(sampler, **(settings if run is None else run.keywords | settings))


def renoising_plans(policy: Policy, task: Task, run: partial | None, arguments: argparse.Namespace) -> list[Plan]:
    """Return the plans of a model whose noise is random tokens: lengths and steps. Its schedule sets temperatures."""
    for name in ("forwards", "block_size", "rank", "commit", "cache", "top_k", "top_p"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is not for {policy.spec.name!r}, whose sampler is renoise; leave it out")
    if arguments.temperature:
        raise ValueError(f"--temperature {arguments.temperature}: renoise has a schedule of its own; leave it out")
    canvas = policy.spec.block_size
    assert canvas is not None, "`check_spec` asks for it"
    defaults = settings_of(partial(renoise)) | settings_of(run)
    length = defaults.get("max_new_tokens") or max(1, -(-default_max_new_tokens(policy, task) // canvas)) * canvas
    steps = arguments.diffusion_steps or [defaults["diffusion_steps"]]
    pairs = product(arguments.max_new_tokens or [length], steps)
    bounds = [{"max_new_tokens": length, "diffusion_steps": count} for length, count in pairs]
    return [(bound, bind(renoise, bound, run)) for bound in bounds]


def choices(arguments: argparse.Namespace, run: partial | None) -> tuple[Sequence[Any], ...]:
    """Return the commit rules, ranks, caches and budgets: as text if they are passed or no run is, else the run's.

    A rank of None means the rank that `rank_of` returns, and a budget of None means no budget.
    """
    defaults = settings_of(run)
    commits = arguments.commit or [defaults.get("commit", "schedule")]
    caches = arguments.cache or [defaults.get("cache") or "none"]
    return commits, arguments.rank or [None], caches, arguments.forwards or [None]


def rank_of(commit: Any, run: partial | None) -> Any:
    """Return the rank if none is passed: the rank that a passed commit rule needs, else the run's, else max_prob."""
    needed = required_rank(commit) if isinstance(commit, str) else None
    return needed or settings_of(run).get("rank", "max_prob")


def plans_of(
    policy: Policy, task: Task, run: partial | None, lengths: Sequence[int], arguments: argparse.Namespace
) -> list[Plan]:
    run_settings = settings_of(run)
    block_size = run_settings.get("block_size") if arguments.block_size is None else arguments.block_size
    count = min(arguments.batch_size, num_problems(task, arguments)) if arguments.forwards else 0
    first = {i: task[i] for i in range(count)}  # problems for the search of a rule's number
    plans: list[Plan] = []
    for length, commit, rank, cache, forwards in product(lengths, *choices(arguments, run)):
        rank = rank_of(commit, run) if rank is None else rank
        rules: dict[str, Any] = {"rank": read_rank(rank) if isinstance(rank, str) else rank}
        rules["cache"] = None if cache == "none" else read_cache(cache) if isinstance(cache, str) else cache
        bound: dict[str, Any] = {"max_new_tokens": length, "diffusion_steps": None, "block_size": block_size}
        bound |= {"temperature": temperature_of(arguments, run)} | filters_of(arguments)
        if forwards is not None and (isinstance(commit, str) or as_commit(commit).adaptive):
            sampler = bind(unmask, bound | rules, run)
            text = commit if isinstance(commit, str) else text_of(commit)
            commit = within_budget(policy, first, sampler, text, forwards, seed=arguments.seed)
        rules["commit"] = read_commit(commit) if isinstance(commit, str) else commit
        rule = as_commit(rules["commit"])
        if rule.adaptive and arguments.diffusion_steps and not isinstance(commit, str):
            steps = arguments.diffusion_steps[0]
            why = f"the run's commit={text_of(commit)} chooses its number of steps"
            raise ValueError(f"--diffusion_steps {steps}: {why}; add --commit schedule")
        for steps in dict.fromkeys(numbers_of_steps(rule, length, forwards, run, arguments)):
            if run is None or steps != run_settings["diffusion_steps"]:
                # Before the first model runs, not in the middle of a sweep.
                check_steps(steps, length, rule.count)
                if block_size and steps and length:
                    steps_per_block(steps, [block_size] * -(-length // block_size))
            bound = bound | {"diffusion_steps": steps}
            names = {"rank": plain(rank), "commit": plain(commit), "cache": plain(cache)}
            plans.append((bound | names, bind(unmask, bound | rules, run)))
    return plans


def numbers_of_steps(
    rule: Commit, length: int, forwards: int | None, run: partial | None, arguments: argparse.Namespace
) -> Sequence[int | None]:
    """Return the numbers of steps of one rule and length: the passed ones, else the budget, the run's, or the length.

    An adaptive rule chooses its number of steps.
    """
    run_steps = settings_of(run).get("diffusion_steps")
    if rule.adaptive:
        return [run_steps]
    if arguments.diffusion_steps or forwards:
        return arguments.diffusion_steps or [forwards]
    if run is None:
        return [length or None]
    # A shorter completion takes fewer steps.
    return [min(run_steps, length) if run_steps and length and arguments.max_new_tokens else run_steps]


@contextmanager
def progress_bar(description: str, total: int, *, main: bool) -> Iterator[Callable[[int], None]]:
    """Yield progress(done), shown on standard error from its first call on; standard output has only the result."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    shown = TextColumn("{task.description}", markup=False)
    bar = Progress(shown, *columns, console=Console(file=sys.stderr), disable=not main)
    line = bar.add_task(escape_controls(description), total=total)

    def progress(done: int) -> None:
        bar.start()  # not before the first batch: errors are printed without a bar
        bar.update(line, completed=done)

    try:
        yield progress
    finally:
        if bar.live.is_started:
            bar.stop()


def heading(first: dict[str, Any], split: str = "") -> Any:
    title = f"{first['task']} (version {first['version']}), protocol {first['protocol']}{split}, seed {first['seed']}"
    return literal(f"{title}, {first['n']} problems x {first['samples']}", style="table.title")


def table(found: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one row per metric with 95 % intervals, and one column per length."""
    first = found[0]
    split = f", {first['split']} split" if first["split"] else ""
    shown = Table(title=heading(first, split), caption=literal(first["model"], style="table.caption"))
    shown.add_column("")
    for result in found:
        steps = f", {result['diffusion_steps']} steps" if result.get("diffusion_steps") else ""
        shown.add_column(f"{result['max_new_tokens']} tokens{steps}", justify="right")
    for name in (name for name in first if f"{name}_interval" in first):
        cells = ((result[name], *result[f"{name}_interval"]) for result in found)
        shown.add_row(literal(name), *(f"{mean:.3f}  [{low:.3f}, {high:.3f}]" for mean, low, high in cells))
    completions = first["n"] * first["samples"]
    shown.add_row("tokens per completion", *(f"{result['tokens'] / completions:.1f}" for result in found))
    for name in ("forwards_per_answer", "tokens_per_forward", "seconds"):
        shown.add_row(name.replace("_", " "), *(f"{result[name]:.1f}" for result in found))
    return shown


def sweep_table(found: Sequence[dict[str, Any]]) -> Table:
    """Return a table with one row per setting: the settings that differ, the headline metric, and the cost."""
    metric = headline(found[0])
    against = next((row["against"] for row in found if "against" in row), None)
    text = f"difference: {metric} minus that of {against}, problem by problem, with a 95 % interval"
    names = varying(found)
    looked_at = [(row[metric], ", ".join(str(row[name]) for name in names if name in row)) for row in found]
    said = [*[text] * bool(against), best_of(looked_at, metric), "forwards: per answer, x tokens per forward"]
    shown = Table(title=heading(found[0]), caption=literal(". ".join(said), style="table.caption"), **NARROW)
    for name in names:
        # The long name leaves no space for the others.
        shown.add_column(literal("steps" if name == "diffusion_steps" else name), overflow="fold")
    for name in (metric, *["difference"] * (against is not None), "forwards", "seconds"):
        shown.add_column(literal(name), justify="right", no_wrap=True)
    apart = "\n" if against else " "  # saves space for the names of models
    for row in found:
        low, high = row[f"{metric}_interval"]
        cells = [f"{row[metric]:.3f}{apart}[{low:.3f}, {high:.3f}]"]
        if against is not None:
            difference = row.get("difference", {}).get(metric)
            cells.append("{:+.3f}\n[{:+.3f}, {:+.3f}]".format(*difference) if difference else "")
        cells.append(f"{row['forwards_per_answer']:.1f}{apart}x {row['tokens_per_forward']:.1f}")
        cells.append(f"{row['seconds']:.1f}")
        shown.add_row(*(literal(str(row.get(name, ""))) for name in names), *cells)
    return shown
