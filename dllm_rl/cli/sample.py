"""`dllm-rl sample`: complete prompts, and show the steps in the terminal, or as JSON."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dllm_rl.cli.options import open_policy, read_methods
from dllm_rl.cli.run_settings import form_of_prompts, problems_of, sampler_of
from dllm_rl.decoding.texts import written_tokens
from dllm_rl.device import device_name
from dllm_rl.evaluation.complete import complete_problems, completion_texts
from dllm_rl.models.base import Policy
from dllm_rl.records import Record, describe
from dllm_rl.samplers import Renoise, Sampler, Unmask
from dllm_rl.samplers.cache import Cache
from dllm_rl.samplers.rules import Commit, Rank
from dllm_rl.samplers.with_settings import sampler_with
from dllm_rl.screen import escape_controls
from dllm_rl.tasks.base import Problem, shown_prompt
from dllm_rl.types.rollouts import Rollout


def sample_command(arguments: argparse.Namespace) -> None:
    """Complete the prompts, and print the completions, or with --json one JSON object."""
    passed = passed_options(arguments)  # imports a rank of the user's, which the run's sampler may have
    run_sampler = sampler_of(arguments.model)
    texts: list[Any] = arguments.prompts or ([] if sys.stdin.isatty() else lines_of_input())
    texts = texts or problems_of(arguments.model, 4) or lines_of_input()
    run_chat, run_blank = form_of_prompts(arguments.model)
    chat, blank = arguments.chat or run_chat, run_blank if arguments.blank is None else arguments.blank
    problems = [to_problem(text, chat=chat, blank=blank) for text in texts]
    policy = open_policy(arguments)  # also sets arguments.checkpoint
    live = Console().is_terminal and not arguments.json if arguments.live is None else arguments.live
    record = sample_problems(
        policy,
        problems,
        sampler_with(policy, run_sampler, passed),
        num_generations=arguments.num_generations,
        seed=arguments.seed,
        seconds_per_step=arguments.delay if live else None,
    )
    if arguments.json:
        print(json.dumps(record | {"checkpoint": arguments.checkpoint}))
        return
    for row in record["rows"]:
        # A pipe or a file gets the model's text unchanged; a terminal would obey its escape sequences.
        print(escape_controls(row["completion"], keep="\n\t") if sys.stdout.isatty() else row["completion"])
    print(record["facts"], file=sys.stderr)


def lines_of_input() -> list[str]:
    """Read prompts from standard input, one per line."""
    try:
        sys.stdin.reconfigure(newline=None)  # type: ignore[union-attr]  # Python leaves \r\n as it is on Linux
        lines = [line.removesuffix("\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not {error.encoding} at byte {error.start}; convert the prompts") from None
    return [lines[0].removeprefix("\ufeff"), *lines[1:]] if lines else []  # a byte order mark


def sample_problems(
    policy: Policy,
    problems: Sequence[Problem],
    sampler: Sampler,
    *,
    num_generations: int = 1,
    seed: int = 0,
    seconds_per_step: float | None = None,
) -> dict[str, Any]:
    """Complete problems, and return the completions as plain data, with dtype, device, sampler, seed and date.

    Args:
        policy: Policy that completes the problems.
        problems: Problems. If a problem has a `blank`, every occurrence of that text in its prompt is filled in.
        sampler: Sampler for the policy.
        num_generations: Completions of each problem. Default: 1.
        seed: Seed of the sampler. Default: 0.
        seconds_per_step: Show each step on the terminal, and wait for this time. None (default): show nothing.

    Raises:
        ValueError: There are no problems, or the sampler is not for the policy or leaves blanks unfilled.
    """
    if not problems:
        raise ValueError("no prompts: give them as arguments, or one a line on standard input")
    texts = [shown_prompt(problem) for problem in problems for _ in range(num_generations)]
    if seconds_per_step is None or not isinstance(sampler, Unmask | Renoise):  # the others show no steps
        rollout, seconds = complete_problems(policy, problems, sampler, num_generations=num_generations, seed=seed)
    else:
        with Live(console=Console(), auto_refresh=False, vertical_overflow="visible") as screen:

            def show_step(rollout: Rollout) -> None:
                screen.update(render(policy, rollout, texts), refresh=True)
                time.sleep(seconds_per_step)

            rollout, seconds = complete_problems(
                policy, problems, sampler, num_generations=num_generations, seed=seed, on_step=show_step
            )
    record = to_record(policy, rollout, texts, seconds=seconds, has_blanks=problems[0].blank is not None)
    dtype = str(next(policy.module.parameters()).dtype).removeprefix("torch.")
    device = f"{policy.device}, {device_name(policy.device)}"
    date = datetime.now().astimezone().isoformat(" ", "seconds")
    return record | {"dtype": dtype, "device": device, "sampler": describe(sampler), "seed": seed, "date": date}


def passed_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the options of `add_sampler_options`; None for an option that was not passed, and a cache of
    "none".
    """
    names = ("max_new_tokens", "diffusion_steps", "block_size", "temperature", "top_k", "top_p", "suppress")
    passed = {name: getattr(arguments, name) for name in names}
    bases: dict[str, type[Record]] = {"rank": Rank, "commit": Commit, "cache": Cache}
    for name, base in bases.items():
        text = getattr(arguments, name)
        methods = read_methods(base, name, [] if text is None else [text], arguments.fields)
        passed[name] = methods[0] if methods else None
        if text == "none":
            if name != "cache":
                raise ValueError(f"--{name} none: a sampler has a {name}; leave it out for the default")
            passed[name] = text
    return passed


def to_problem(text: str | Problem, *, chat: bool, blank: str | None) -> Problem:
    """Convert a text to a `Problem`. A `Problem` is returned unchanged.

    With `chat` the text is a user's message. Each occurrence of `blank` in it marks one token to fill in.
    """
    if isinstance(text, Problem):
        return text
    return Problem([{"role": "user", "content": text}] if chat else text, blank=blank)


def to_record(
    policy: Policy, rollout: Rollout, prompts: Sequence[str], *, seconds: float | None = None, has_blanks: bool = False
) -> dict[str, Any]:
    """Return a rollout as plain data: prompt, completion and tokens of each row.

    With `has_blanks`, a completion is the full text with its blanks filled in.
    """
    completions = completion_texts(policy, rollout, has_blanks=has_blanks)
    columns = zip(prompts, completions, written_tokens(policy, rollout), strict=True)
    rows = [{"prompt": prompt, "completion": completion, "tokens": tokens} for prompt, completion, tokens in columns]
    num_tokens = int(rollout.completion_mask.sum())
    facts = f"{num_tokens} tokens, {rollout.forwards} forwards"
    speed = {}
    if seconds is not None:
        speed = {"seconds": seconds, "tokens_per_second": num_tokens / seconds}
        facts += f", {seconds:.2f} s, {num_tokens / seconds:.0f} tokens/s"
    return {"facts": facts, "num_tokens": num_tokens, "forwards": rollout.forwards, **speed, "rows": rows}


def render(policy: Policy, rollout: Rollout, prompts: Sequence[str], *, max_rows: int = 8) -> Group:
    """Render the state of a rollout: prompts and masks dim, the tokens of the last step bright."""
    lines = []
    for row in to_record(policy, rollout, prompts)["rows"][:max_rows]:
        line = Text().append(escape_controls(row["prompt"]), style="dim")
        last_step = max((token["step"] for token in row["tokens"]), default=-1)  # a later batch has no tokens yet
        for token in row["tokens"]:
            is_newest = token["step"] == last_step == rollout.forwards - 1
            style = "dim" if token["step"] < 0 else "bold bright_yellow" if is_newest else ""
            line.append("░" if token["step"] < 0 else escape_controls(token["text"]) or "∅", style=style)
        lines.append(line)
    num_hidden = len(rollout.tokens) - len(lines)  # a terminal has few lines
    num_masked = 0 if policy.spec.mask_id is None else int((rollout.tokens == policy.spec.mask_id).sum())
    more_rows = f", {num_hidden} more rows" if num_hidden else ""
    lines.append(Text(f"step {rollout.forwards}, {num_masked} masked{more_rows}", style="dim italic"))
    return Group(*lines)
