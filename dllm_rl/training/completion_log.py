"""Completions of a step for people to read: a table on the screen, and rows of completions.jsonl."""

import json
from typing import Any

import torch
from einops import rearrange
from rich.table import Table

from dllm_rl.device import send
from dllm_rl.distributed.collectives import local
from dllm_rl.models.tokens import written_tokens
from dllm_rl.monitoring.log import finite
from dllm_rl.recipe import Recipe
from dllm_rl.screen import NARROW, literal
from dllm_rl.tasks.base import Problem, parts
from dllm_rl.training.balance import of_sampled_rows
from dllm_rl.training.context import StepContext
from dllm_rl.training.rollouts import Answer
from dllm_rl.training.samples import Samples
from dllm_rl.types import Logprobs, Rollout

PROMPTS = 4  # prompts of a step; each shows its completions of highest and lowest reward
CHARACTERS = 160  # characters of a text in the table, from its two ends


def log_completions(
    run: StepContext[Recipe],
    step: int,
    answers: list[Answer],  # of the rows that this process sampled, like `sampled`
    sampled: Rollout,
    learned: Samples,  # after load balancing, like `logps`
    logps: Logprobs,
) -> None:
    """Show and store the best and worst completions of the step's first prompts. Collective: every process must call
    it.

    A row of completions.jsonl: the problem's fields, and {"step", "prompt", "completion", "reward", "advantage",
        "mismatch": sum over scored tokens of log p_learner - log p_rollout, nats; null if the row is not scored,
        "parts": {"parsed": 1.0, ...}, "tokens": [{"id", "text", "step": that committed it, "probability"}, ...]}
    """
    log = run.log
    every = run.recipe.log_completions_steps
    if not every or (step % every and step + 1 < run.recipe.num_steps):
        return
    rollout = learned.rollout
    scored = logps.views.scored(rollout.completion_mask)
    apart = torch.where(scored, logps.old_logprobs - logps.rollout_logprobs, 0).double().sum(-1)
    nats = torch.where(scored.any(-1), apart, torch.nan)  # a row that is not scored has no mismatch
    mine = send(nats.device, local(rearrange(learned.advantages, "p g -> (p g)"), run.accelerator))[0]
    found = of_sampled_rows(torch.stack([nats, mine], dim=1), rollout, run.accelerator).tolist()
    if not log.main:  # the collective above needs all processes; only the main process does the rest
        return
    chosen = contrasts([float(answer.reward.value) for answer in answers], sampled.group_size)
    (rows,) = send(sampled.tokens.device, torch.tensor(chosen))
    made = []
    for i, tokens in zip(chosen, written_tokens(run.policy, sampled.rows(rows)), strict=True):
        answer = answers[i]
        mismatch, advantage = found[i]
        numbers = finite({"reward": float(answer.reward.value), "advantage": advantage, "mismatch": mismatch})
        texts = {"prompt": answer.problem.prompt, "completion": answer.completion}
        own = {"step": step, **texts, **numbers, "parts": parts(answer.reward), "tokens": tokens}
        made.append(stored_fields(answer.problem) | own)
    log.keep(made)
    log.show(table(f"completions of step {step + 1}: of {PROMPTS} prompts those of highest and lowest reward", made))


def stored_fields(problem: Problem) -> dict[str, Any]:
    # A data set's columns may have any type, such as dates and NaN: they become text and do not stop the run.
    return json.loads(json.dumps(dict(problem.fields), default=str, skipkeys=True), parse_constant=str)


def contrasts(rewards: list[float], group_size: int) -> list[int]:
    """Return the rows of highest and lowest reward of each of the first groups; one row if all rewards are equal."""
    chosen: dict[int, None] = {}
    for first in range(0, len(rewards), group_size)[:PROMPTS]:
        group = range(first, first + group_size)
        chosen |= dict.fromkeys((max(group, key=rewards.__getitem__), min(group, key=rewards.__getitem__)))
    return list(chosen)


def table(title: str, made: list[dict]) -> Table:
    """Return the rows for a terminal of at least 80 columns (A: advantage), markup and control characters escaped."""
    shown = Table(title=literal(title, style="table.title"), title_justify="left", **NARROW)
    for name in ("prompt", "completion", "reward"):  # no width: the longest column shrinks first
        shown.add_column(name, overflow="fold")
    for name in ("A", "mismatch,\nnats"):
        shown.add_column(name, justify="right", no_wrap=True)
    above = None
    for row in made:
        if row["prompt"] != above:
            shown.add_section()
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        reward = ", ".join(f"{name} {value:.3g}" for name, value in row["parts"].items())
        texts = ("" if row["prompt"] == above else prompt, row["completion"], f"{row['reward']:.3g}: {reward}")
        shown.add_row(*(literal(shortened(text)) for text in texts), signed(row["advantage"]), signed(row["mismatch"]))
        above = row["prompt"]
    return shown


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3g}"


def shortened(text: object) -> str:
    """Return a text unchanged, or its two ends if it is longer than CHARACTERS."""
    shown = str(text)
    half = CHARACTERS // 2
    return shown if len(shown) <= CHARACTERS else f"{shown[:half]} ... {shown[-half:]}"
