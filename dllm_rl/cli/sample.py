"""`dllm-rl sample`: shows the steps of a completion in the terminal, or as JSON."""

import inspect
import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dllm_rl.device import device_name
from dllm_rl.members import describe
from dllm_rl.models.base import Policy
from dllm_rl.models.tokens import decode, encode, filled, written_tokens
from dllm_rl.rng import generator_for
from dllm_rl.samplers import sampler_for
from dllm_rl.samplers.autoregress import autoregress
from dllm_rl.samplers.renoise import renoise
from dllm_rl.screen import escape_controls
from dllm_rl.tasks.base import Problem
from dllm_rl.types import Prompts, Rollout


def show(
    policy: Policy,
    texts: Sequence[str | Problem],
    *,
    as_json: bool = False,
    live: bool | None = None,  # draw each step; None: only on a terminal and without JSON
    delay: float = 0.0,  # seconds per step of the live view
    seed: int = 0,
    group_size: int = 1,
    chat: bool = False,  # each text is a user's message, in the tokenizer's template
    blank: str | None = None,  # the text of a token to fill in; the completion is then the full text
    checkpoint: str | None = None,  # the policy's checkpoint, for the record
    **options: Any,  # for the sampler of the policy; None: the sampler's default
) -> None:
    """Complete texts. Completions or one JSON object go to standard output, and the speed goes to standard error."""
    if not texts:
        raise ValueError("no prompts: give them as arguments, or one a line on standard input")
    options = {name: value for name, value in options.items() if value is not None}
    problems = [as_problem(text, chat=chat, blank=blank) for text in texts]
    prompts = encode(policy, problems, group_size=group_size)
    sampler = sampler_for(policy)
    options = check_options(policy, options)
    prompt_texts = [shown_prompt(problem) for problem in problems for _ in range(group_size)]
    console = Console()
    live = console.is_terminal and not as_json if live is None else live
    began = time.perf_counter()  # after the prompts, whose encoding is not the model's work
    if live and sampler is not autoregress:
        rollout = drawn(console, policy, prompts, prompt_texts, delay=delay, seed=seed, **options)
    else:
        rollout = sampler(policy, prompts, generator_for(seed), **options)
    record = to_record(
        policy, rollout, prompt_texts, seconds=time.perf_counter() - began, whole=problems[0].blank is not None
    )
    dtype = str(next(policy.module.parameters()).dtype).removeprefix("torch.")
    device = f"{policy.device}, {device_name(policy.device)}"
    record |= {"checkpoint": checkpoint, "dtype": dtype, "device": device}
    record |= {"sampler": describe(partial(sampler, **options)), "seed": seed}
    record["date"] = datetime.now().astimezone().isoformat(" ", "seconds")
    if as_json:
        print(json.dumps(record))
    else:
        print_record(record)


def as_problem(text: str | Problem, *, chat: bool, blank: str | None) -> Problem:
    if isinstance(text, Problem):
        return text
    return Problem([{"role": "user", "content": text}] if chat else text, blank=blank)


def shown_prompt(problem: Problem) -> str:
    """Return the prompt's text; of a chat, the user's last message."""
    if isinstance(problem.prompt, str):
        return problem.prompt
    return next((turn["content"] for turn in reversed(problem.prompt) if turn["role"] == "user"), "")


def check_options(policy: Policy, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the policy's sampler.

    Raises:
        ValueError: An option belongs to other models.
    """
    if sampler_for(policy) is renoise:
        options = dict(options)
        if not options.get("temperature"):  # the command's default; renoise has a schedule instead
            options.pop("temperature", None)
        if extra := sorted(options.keys() - inspect.signature(renoise).parameters.keys()):
            raise ValueError(f"{extra[0]} is not for {policy.spec.name!r}, whose sampler is renoise; leave it out")
        return options
    extra = sorted(options.keys() - inspect.signature(autoregress).parameters.keys())
    if extra and sampler_for(policy) is autoregress:
        causal = type(policy.module).__name__
        raise ValueError(f"{extra[0]} is for diffusion models; {causal} is causal: leave it out")
    return dict(options)


def drawn(
    console: Console, policy: Policy, prompts: Prompts, texts: Sequence[str], *, delay: float, seed: int, **options: Any
) -> Rollout:
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as screen:

        def watch(rollout: Rollout) -> None:
            screen.update(render(policy, rollout, texts), refresh=True)
            time.sleep(delay)

        return sampler_for(policy)(policy, prompts, generator_for(seed), on_step=watch, **options)


def print_record(record: dict[str, Any]) -> None:
    """Print completions to standard output and the speed to standard error, so that a pipe gets only completions."""
    for row in record["rows"]:
        # A pipe or a file gets the model's text unchanged; a terminal would obey its escape sequences.
        print(escape_controls(row["completion"], keep="\n\t") if sys.stdout.isatty() else row["completion"])
    print(record["facts"], file=sys.stderr)


def to_record(
    policy: Policy, rollout: Rollout, prompts: Sequence[str], *, seconds: float | None = None, whole: bool = False
) -> dict:
    """Return a rollout as plain data, with each row's prompt, completion (with `whole` also the text around it) and
    tokens.
    """
    completions = filled(policy, rollout) if whole else decode(policy, rollout)
    made = zip(prompts, completions, written_tokens(policy, rollout), strict=True)
    rows = [{"prompt": prompt, "completion": completion, "tokens": tokens} for prompt, completion, tokens in made]
    count = int(rollout.completion_mask.sum())
    facts = f"{count} tokens, {rollout.forwards} forwards"
    speed = {}
    if seconds is not None:
        speed = {"seconds": seconds, "tokens_per_second": count / seconds}
        facts += f", {seconds:.2f} s, {count / seconds:.0f} tokens/s"
    return {"facts": facts, "num_tokens": count, "forwards": rollout.forwards, **speed, "rows": rows}


def render(policy: Policy, rollout: Rollout, prompts: Sequence[str], *, max_rows: int = 8) -> Group:
    """Draw the state of a rollout: prompts and masks dim, the tokens of the last step bright."""
    lines = []
    for row in to_record(policy, rollout, prompts)["rows"][:max_rows]:
        line = Text().append(escape_controls(row["prompt"]), style="dim")
        newest = max(token["step"] for token in row["tokens"])
        for token in row["tokens"]:
            fresh = token["step"] == newest == rollout.forwards - 1
            style = "dim" if token["step"] < 0 else "bold bright_yellow" if fresh else ""
            line.append("░" if token["step"] < 0 else escape_controls(token["text"]) or "∅", style=style)
        lines.append(line)
    hidden = len(rollout.tokens) - len(lines)  # a terminal has few lines
    left = 0 if policy.spec.mask_id is None else int((rollout.tokens == policy.spec.mask_id).sum())
    more = f", {hidden} more rows" if hidden else ""
    lines.append(Text(f"step {rollout.forwards}, {left} masked{more}", style="dim italic"))
    return Group(*lines)
