"""The `dllm-rl` command. Each subcommand reads its arguments here and calls one function elsewhere."""

import argparse
import pkgutil
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from dllm_rl.cli.options import add_model_options, open_policy, read_methods, split_fields
from dllm_rl.screen import escape_controls, line_of, printing_anything


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # The message quotes arguments. A file name that the shell expanded from * may contain terminal escapes.
        super().error(escape_controls(message))


@printing_anything()
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="dllm-rl", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_sample, add_serve, add_evaluate, add_compare, add_grade, add_lm_eval):
        add(commands)
    for add in (add_doctor, add_check_trace, add_verify, add_status, add_stop):
        add(commands)
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        # The harness has options of its own, which are passed on.
        words, fields = (words, {}) if words[:1] == ["lm-eval"] else split_fields(words)
    except ValueError as error:
        parser.error(str(error))
    arguments, rest = parser.parse_known_args(words)
    if rest and hasattr(arguments, "prompts") and not any(word.startswith("-") for word in rest):
        arguments.prompts = [*arguments.prompts, *rest]  # argparse takes no more positional arguments after an option
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.fields = fields
    try:
        check_fields(arguments)
        check_paths(arguments)
        # Most commands are imported here, so that help is fast. One that checks something returns its status.
        run = pkgutil.resolve_name(arguments.run) if isinstance(arguments.run, str) else arguments.run
        return run(arguments) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {line_of(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # 128 plus the signal's number, as in shells


def check_fields(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a field such as --commit.tau whose class was not named or is not an option."""
    for method, values in arguments.fields.items():
        if getattr(arguments, method, None) is None:
            has_option = hasattr(arguments, method)
            remedy = (
                f"needs --{method}, the class with this setting" if has_option else "is not an option of this command"
            )
            raise ValueError(f"--{method}.{min(values)} {remedy}")


def check_paths(arguments: argparse.Namespace) -> None:
    """Replace `~` in options that name files or folders, as in --output_dir=~/runs, which a shell leaves as it is.

    Raise ValueError if an option that names a file, folder or host is empty, as an unset shell variable is.
    """
    for name in ("model", "models", "path", "file", "output_dir", "output", "plot", "token_file", "name", "host"):
        value = getattr(arguments, name, None)
        if "" in (value if isinstance(value, list) else [value]):  # Path('') is the current folder
            raise ValueError(f"{name}='' is empty; give a file or folder, or leave the option out")
        if value is not None and name not in ("name", "host"):
            expanded = [type(each)(Path(each).expanduser()) if _in_home(each) else each for each in _as_list(value)]
            setattr(arguments, name, expanded if isinstance(value, list) else expanded[0])


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _in_home(value: Any) -> bool:
    return isinstance(value, str | Path) and str(value).startswith("~/")


def add_sample(commands: argparse._SubParsersAction) -> None:
    sub = commands.add_parser("sample", help="complete prompts with a checkpoint and show each step")
    add = sub.add_argument
    add("model", help="a checkpoint's or a run's folder, or a hub's id")
    prompts_help = "texts to complete; without any: lines of standard input, or at a terminal, problems of the run"
    add("prompts", nargs="*", metavar="PROMPT", help=prompts_help)
    add_sampler_options(sub)
    add("--chat", action="store_true", help="treat each prompt as a user's message, for an instruction-tuned model")
    add("--blank", metavar="TEXT", help="placeholder text: each of its occurrences in a prompt is one token to fill in")
    add("--num_generations", type=int, default=1, help="completions per prompt")
    add_model_options(sub)
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print a JSON object with every token, its step and probability")
    add("--no_live", dest="live", action="store_false", default=None, help="do not show the steps")
    add("--delay", type=float, default=0.0, help="seconds to show each step in the live display")
    sub.set_defaults(run="dllm_rl.cli.sample:sample_command")


def add_token_options(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("--block_size", type=int, help="positions open at once (default: all, or the model's blocks)")
    add("--temperature", type=float, help="0 is greedy (default: as the run's evaluations, or 0)")
    add("--top_k", type=int, help="sample only from the k likeliest tokens (default: the run's, or all)")
    top_p_help = "sample only from the likeliest tokens that hold this probability (default: the run's, or all)"
    add("--top_p", type=float, help=top_p_help)
    add("--suppress", type=_tokens, help="tokens that are never sampled, e.g. 0,<eos>, or none (default: the run's)")


def add_sampler_options(sub: argparse.ArgumentParser) -> None:
    add = sub.add_argument
    add("--max_new_tokens", type=int, help="tokens per completion (default: the run's, or 16)")
    add(
        "--diffusion_steps",
        type=int,
        help="unmasking steps (default: the run's, or one per token)",
    )
    add_token_options(sub)
    rank_help = "Confidence, MaxProb, Margin, Entropy, RandomOrder or PlackettLuce (default: chosen by --commit)"
    add("--rank", help=rank_help)
    commit_help = "Schedule (default), Threshold, SoftThreshold ...; its fields are options, as --commit.tau 0.9"
    add("--commit", help=commit_help)
    add("--cache", help="PrefixCache, DualCache or BlockCache; --cache.refresh 4 refreshes it every 4 steps")


def add_serve(commands: argparse._SubParsersAction) -> None:
    about = "answer completion requests over HTTP, in the format of OpenAI's API"
    sub = commands.add_parser("serve", help=about)
    add = sub.add_argument
    add("model", help="a checkpoint's or a run's folder, or a hub's id")
    add("--host", default="127.0.0.1", help="another address needs a token (default 127.0.0.1)")
    add("--port", type=_port, default=8000, help="0: any free port (default 8000)")
    add("--name", help="the model's name in requests (default: MODEL)")
    add("--token_file", help="file with the token that requests must send (default: the variable DLLM_RL_TOKEN)")
    updates_help = "let requests that send the token replace the weights, as HTTPEngine does"
    add("--allow_updates", action="store_true", help=updates_help)
    add("--quantization", default="none", help="format of the weights, e.g. Int8WeightOnly (default none)")
    add_sampler_options(sub)
    add("--max_batch_size", type=_positive_int, default=32, help="completions at a time (default 32)")
    exact_batches_help = "make a completion's bits independent of its batch, which is slower"
    add("--exact_batches", action="store_true", help=exact_batches_help)
    add("--max_tokens", type=_positive_int, default=1024, help="largest length of a completion (default 1024)")
    add("--max_waiting", type=_positive_int, default=1024, help="largest queue, in completions (default 1024)")
    add("--max_body_bytes", type=_positive_int, default=2**20, help="largest request body (default 1 MiB)")
    timeout_help = "seconds in the queue and in the sampler after which a request fails (default 300)"
    add("--timeout", type=_positive_seconds, default=300.0, help=timeout_help)
    client_timeout_help = "seconds in which a client must send the headers of a request, then its body (default 30)"
    add("--client_timeout", type=_positive_seconds, default=30.0, help=client_timeout_help)
    add_model_options(sub)
    add("--seed", type=int, default=0, help="seed of requests without one (default 0)")
    sub.set_defaults(run="dllm_rl.cli.serve:serve_command")


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    from dllm_rl.tasks.protocols import TASKS, protocol_names  # tasks import no torch, so that help is fast

    about = "complete a task's problems with checkpoints and grade the completions"
    more = "once per checkpoint and per combination of the settings that are lists; later checkpoints are compared with"
    sub = commands.add_parser("evaluate", help=about, description=f"{about}, {more} the first, problem by problem")
    add = sub.add_argument
    add("models", nargs="*", metavar="MODEL", help="a checkpoint's or a run's folder, or a hub's id")
    add("--task", help=f"{_join_names(TASKS)}, or MODULE:NAME of yours (default: the run's, with its settings)")
    names = _join_names(protocol_names(), default="strict")
    add("--protocol", help=f"how completions are graded: {names}")
    add("--split", choices=("train", "validation", "test"), help="default: the run's, else test")
    add("--path", help="a file or folder with the problems")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="set a field of the task")
    max_new_tokens_help = "tokens per completion, e.g. 128,256 (default: the run's, or the task's)"
    add("--max_new_tokens", "--lengths", type=_positive_ints, help=max_new_tokens_help)
    diffusion_steps_help = "unmasking steps, e.g. 1,2,4,8 (default: the run's, or one per token)"
    add("--diffusion_steps", type=_positive_ints, help=diffusion_steps_help)
    add("--quantization", type=_split_names, help="quantization schemes of the weights, e.g. none,Float8WeightOnly")
    rank_help = "e.g. Confidence,MaxProb (default: the one that --commit needs, or the run's)"
    add("--rank", type=_split_names, help=rank_help)
    add("--commit", type=_split_names, help="e.g. Schedule,Threshold, with --commit.tau 0.7,0.9")
    add("--cache", type=_split_names, help="e.g. none,DualCache, with --cache.refresh 4")
    add_token_options(sub)
    add("--samples", type=int, default=1, help="completions per problem, for pass@k")
    majority_help = "values of k for maj@k (the most frequent of k answers), e.g. 4,16"
    add("--majority", type=_positive_ints, default=[], help=majority_help)
    add("--limit", type=int, help="evaluate only the first LIMIT problems (default: all, or 500 generated ones)")
    add("--batch_size", type=int, default=32, help="completions at a time (default 32)")
    add_model_options(sub)
    reward_timeout_help = "seconds for grading one completion; if exceeded, exit with 124"
    add("--reward_timeout", type=_seconds_or_none, default=600.0, help=reward_timeout_help)
    add("--seed", type=int, default=0)
    add("--output_dir", help="store completions here; the same command continues an interrupted evaluation")
    add("--json", action="store_true", help="print one JSON object per setting instead of a table")
    sub.set_defaults(run="dllm_rl.cli.evaluate_run:evaluate_command")


def add_compare(commands: argparse._SubParsersAction) -> None:
    about = "say which of several runs is better on their held-out problems, and how sure that is"
    more = "Each run counts with its last held-out evaluation. Runs that differ in the seed alone are one arm"
    sub = commands.add_parser("compare", help=about, description=f"{about}. {more}")
    add = sub.add_argument
    runs_help = "the runs' folders; the first is what the others are compared with. NAME=RUN,RUN names an arm's runs"
    add("runs", nargs="+", metavar="RUN", help=runs_help)
    add("--metric", help="the metric that decides (default: accuracy, solve_rate or the reward)")
    add("--plot", metavar="FILE", default="compare.png", help="the picture (default compare.png)")
    add("--json", action="store_true", help="one JSON object instead of a table")
    sub.set_defaults(run="dllm_rl.cli.compare_runs:compare_command")


def _join_names(names: Iterable[str], default: str | None = None) -> str:
    """Join names for a help text, in the form "a (default), b or c"."""
    *others, last = (f"{name} (default)" if name == default else name for name in names)
    return f"{', '.join(others)} or {last}"


def _positive_ints(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers of at least 1, such as 4 or 1,2,4")
    return list(map(int, words))


def _positive_int(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def _port(text: str) -> int:
    if not text.strip().isdecimal() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} must be a port from 1 to 65535, or 0 for any free one")
    return int(text)


def _positive_seconds(text: str) -> float:
    if (seconds := _seconds_or_none(text)) is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be seconds above 0")
    return seconds


def _tokens(text: str) -> tuple[int | str, ...]:
    words = [] if text == "none" else [word.strip() for word in text.split(",")]
    if not all(words):
        raise argparse.ArgumentTypeError(f"{text!r} must be tokens, such as 0,<eos>, or none")
    return tuple(int(word) if word.isdecimal() else word for word in words)


def _split_names(text: str) -> list[str]:
    return text.split(",")


def _seconds_or_none(text: str) -> float | None:
    if text == "none":
        return None
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):  # NaN fails too
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} must be seconds above 0, or none for no limit")


def add_grade(commands: argparse._SubParsersAction) -> None:
    from dllm_rl.tasks.protocols import PROTOCOLS, protocol_names

    sub = commands.add_parser("grade", help="grade stored completions from any source")
    file_help = "a .jsonl file of `completion` and the task's fields or a `reference`; d1's .json; lm-eval's samples"
    add = sub.add_argument
    add("file", help=file_help)
    add("--task", help=f"{_join_names(PROTOCOLS)} (default: as in the results.json beside the file)")
    names = _join_names([*protocol_names(), "all"])
    protocol_help = f"{names}: a line for every protocol"
    add("--protocol", help=f"{protocol_help} (default: as in the results.json beside the file, else strict)")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    add(
        "--against",
        metavar="FILE",
        help="also print the difference from these completions of the same problems, with its paired 95 %% interval",
    )
    sub.set_defaults(run="dllm_rl.cli.grade:grade_command")


def add_lm_eval(commands: argparse._SubParsersAction) -> None:
    about = "lm-evaluation-harness with --model dllm_rl; its own options follow"
    # No argument begins with "\0", so argparse parses no option: all options are passed on to the harness.
    sub = commands.add_parser("lm-eval", help=about, add_help=False, prefix_chars="\0")
    sub.add_argument("options", nargs="*")
    sub.set_defaults(run="dllm_rl.cli.harness:harness_command")


def add_doctor(commands: argparse._SubParsersAction) -> None:
    about = "check whether the library works with a model; of a run, report where the mismatch of its rollouts is from"
    more = "With a run's folder, or with --task, the second is done. The report of the first has no texts and no paths"
    sub = commands.add_parser("doctor", help=about, description=f"{about}. {more}")
    add = sub.add_argument
    add("model", help="a checkpoint's or a run's folder, or a hub's id")
    quantization_help = "a scheme, or none (default: those that the device runs; with a task the run's, or"
    add("--quantization", help=f"{quantization_help} Float8WeightOnly)")
    add("--seed", type=int, default=0)
    add("--half_head", action="store_true", help="compute logits in --dtype (default: in fp32)")
    add_model_options(sub)
    add = sub.add_argument_group("of a model").add_argument
    add("--quick", action="store_true", help="leave the training step out")
    add("--sections", nargs="+", metavar="SECTION", help="text, sampler, quantized, batch, step, sync, resume")
    add("--output", metavar="FILE", help="file of the report (default report.json)")
    add = sub.add_argument_group("of a run, or with --task").add_argument
    add("--task", help="task whose prompts are sampled (default: the run's)")
    add("--num_prompts", type=int, help="number of prompts, with two completions each (default 32)")
    add("--max_new_tokens", type=int, help="tokens per completion (default: the run's, or the task's)")
    add(
        "--diffusion_steps",
        type=int,
        help="unmasking steps (default: the run's, or one per token)",
    )
    add("--temperature", type=float, help="default: the run's, or 1")
    add("--rank", help="default: the run's, or MaxProb, which is the default of grpo")
    add("--bound", type=float, help="exit with 1 if the mean |log-ratio| is above this, in nats")
    add("--json", action="store_true", help="one JSON object instead of tables")
    sub.set_defaults(run=doctor)


# Options of `doctor` that only a model has, or only a run or a task.
OF_MODEL = ("quick", "sections", "output")
OF_TASK = ("num_prompts", "max_new_tokens", "diffusion_steps", "temperature", "rank", "bound", "json")


def doctor(arguments: argparse.Namespace) -> int:
    """Check a model, and return 1 if something is wrong, else 0. Of a run, or with a task, print the causes of the
    mismatch, and return 1 if it is above --bound (mean |log-ratio|, nats), else 0.
    """
    has_task = arguments.task is not None or (Path(arguments.model) / "checkpoints").is_dir()
    for name in OF_MODEL if has_task else OF_TASK:
        if getattr(arguments, name) not in (None, False):
            place = "a run's folder has no such check" if has_task else "it is for a run's folder, or with --task"
            raise ValueError(f"--{name}: {place}; leave it out")
    if has_task:
        return report_mismatch(arguments)
    from dllm_rl.cli.check_model import check_model_command

    return check_model_command(arguments)


def report_mismatch(arguments: argparse.Namespace) -> int:
    """Print where the mismatch of a run's or a task's rollouts is from; return as `doctor` does."""
    from dllm_rl.cli.options import recipe_of
    from dllm_rl.cli.run_settings import problems_of, sampler_of, scheme_of, task_named
    from dllm_rl.decoding.prompts import encode
    from dllm_rl.decoding.tokens import default_max_new_tokens
    from dllm_rl.doctor.mismatch import diagnose, write_doctor
    from dllm_rl.quantization.schemes import Scheme
    from dllm_rl.samplers.rules import Rank
    from dllm_rl.samplers.with_settings import sampler_with
    from dllm_rl.tasks.protocols import TASKS

    num_prompts = 32 if arguments.num_prompts is None else arguments.num_prompts
    if num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts} must be at least 1")
    recipe = recipe_of(arguments.model)
    name = arguments.task
    if name is None:
        problems = problems_of(arguments.model, num_prompts)
    elif name in TASKS:
        task = TASKS[name](**task_named([arguments.model], name)[1])
        problems = [task[i] for i in range(min(num_prompts, len(task)))]
    else:
        raise ValueError(f"task={name!r} is not one of {', '.join(TASKS)}")
    if not problems:
        raise ValueError(f"{arguments.model}: neither its task nor its completions.jsonl has prompts; give --task")
    if recipe is not None and "rollout_quantization" in recipe and arguments.quantization is None:
        scheme = scheme_of(arguments.model)
    else:
        (scheme,) = read_methods(
            Scheme, "quantization", [arguments.quantization or "Float8WeightOnly"], arguments.fields
        )
    passed = {name: getattr(arguments, name) for name in ("max_new_tokens", "diffusion_steps", "temperature")}
    if arguments.rank is not None:
        (passed["rank"],) = read_methods(Rank, "rank", [arguments.rank], arguments.fields)
    run_sampler = sampler_of(arguments.model, "sampler")
    if run_sampler is None and passed["temperature"] is None:
        passed["temperature"] = 1.0
    policy = open_policy(arguments, half_head=arguments.half_head)
    if run_sampler is None and passed["max_new_tokens"] is None:
        passed["max_new_tokens"] = default_max_new_tokens(policy, problems)
    if policy.spec.attention == "encoder_decoder":
        raise ValueError(f"doctor needs a model that unmasks tokens; {policy.spec.name!r} has no mask token")
    if policy.spec.attention == "causal":
        passed = {name: value for name, value in passed.items() if name not in ("diffusion_steps", "rank")}
    sampler = sampler_with(policy, run_sampler, passed)
    prompts = encode(policy, problems, num_generations=2)
    report = diagnose(policy, scheme, prompts=prompts, sampler=sampler, seed=arguments.seed)
    write_doctor(report, as_json=arguments.json)
    return int(arguments.bound is not None and report.worst > arguments.bound)


def add_check_trace(commands: argparse._SubParsersAction) -> None:
    about = "replay an engine's rollouts; exit with 1 if steps are impossible or log-probs are not the model's"
    sub = commands.add_parser("check-trace", help=about)
    add = sub.add_argument
    add("file", help="a trace (.jsonl)")
    add("--model", required=True, help="a checkpoint's or a run's folder, with the weights that sampled")
    add("--temperature", type=float, help="default: as recorded")
    add("--top_k", type=int, help="default: as recorded")
    add("--top_p", type=float, help="default: as recorded")
    bound_help = "largest mean |difference of log-probs| to accept, in nats (default 0.02)"
    add("--bound", type=float, default=0.02, help=bound_help)
    add("--batch_size", type=int, default=32, help="completions at a time (default 32)")
    add_model_options(sub)
    add("--json", action="store_true", help="one JSON object instead of a table")
    sub.set_defaults(run="dllm_rl.cli.check_trace:check_trace_command")


def add_verify(commands: argparse._SubParsersAction) -> None:
    sub = commands.add_parser("verify", help="check that checkpoints are complete; exit with 1 if one is not")
    add = sub.add_argument
    add("path", help="a checkpoint folder, or the output_dir of a run for all of its checkpoints")
    add("--quick", action="store_true", help="of files over 1 MiB, check only the size and the first MiB")
    sub.set_defaults(run=verify)


def verify(arguments: argparse.Namespace) -> int:
    """Print one line per checkpoint (of a run: its reference model and all its checkpoints).

    Return 1 if one is damaged, else 0.
    """
    from dllm_rl import manifest
    from dllm_rl.checkpoints import checkpoint
    from dllm_rl.files import folder_size
    from dllm_rl.records import check_is_folder

    path = Path(arguments.path)
    check_is_folder(path, "a checkpoint, or the folder that a run writes")
    if checkpoint.is_checkpoint(path):
        folders = [path]
    else:
        reference = path / "reference"
        folders = [reference] if (reference / manifest.NAME).is_file() else []
        checkpoints = checkpoint.list_checkpoints(path / "checkpoints") or checkpoint.list_checkpoints(path)
        folders += [folder for _, folder in checkpoints]
    if not folders:
        raise ValueError(f"{path}: neither a checkpoint nor a run with checkpoints; give one of them")
    num_damaged = 0
    for folder in folders:
        # The reference has no state.json, because it belongs to no step.
        check = manifest.verify if folder.name == "reference" else checkpoint.check
        try:
            check(folder, quick=arguments.quick)
        except ValueError as error:
            num_damaged += 1  # continue, to print every damaged checkpoint
            print(f"damaged  {error}")
        else:
            print(f"whole    {folder} ({folder_size(folder) / 1e6:.1f} MB)")
    return int(num_damaged > 0)


def add_status(commands: argparse._SubParsersAction) -> None:
    about = "say whether a run goes on, its step, reward and health, and the time left"
    sub = commands.add_parser("status", help=about)
    sub.add_argument("path", help="the run's folder")
    sub.set_defaults(run="dllm_rl.cli.status:status_command")


def add_stop(commands: argparse._SubParsersAction) -> None:
    sub = commands.add_parser("stop", help="end a run after its current step, with a checkpoint")
    add = sub.add_argument
    add("path", help="the run's folder")
    add("--timeout", type=float, default=600.0, help="seconds to wait until the run has ended (default 600)")
    sub.set_defaults(run="dllm_rl.cli.stop_run:stop_command")
