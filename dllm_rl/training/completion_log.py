"""Log completions of a step for people to read: a table on the screen, and rows of completions.jsonl."""

import math
from itertools import accumulate

import torch
from rich.table import Table

from dllm_rl.decoding.texts import written_tokens
from dllm_rl.device import copy_to_device
from dllm_rl.distributed.collectives import collective
from dllm_rl.files import as_json
from dllm_rl.monitoring.log import finite
from dllm_rl.recipe import Recipe
from dllm_rl.screen import NARROW, literal
from dllm_rl.step.balance import to_sampling_order
from dllm_rl.step.collect import GradedCompletion
from dllm_rl.step.samples import Samples
from dllm_rl.tasks.base import completion_metrics
from dllm_rl.training.run import Run
from dllm_rl.types.groups import group_sizes
from dllm_rl.types.scoring import Logprobs

NUM_PROMPTS = 4  # prompts of a step that are shown, each with its completions of highest and lowest reward
MAX_CHARACTERS = 160  # of a text in the table; a longer text shows its beginning and its end


@collective
def log_completions(
    run: Run[Recipe],
    step: int,
    answers: list[GradedCompletion],  # of the rows that this process sampled, like `sampled`
    sampled: Samples,
    trained: Samples,  # after load balancing, like `logps`
    logps: Logprobs,
) -> None:
    """Show and store the best and the worst completions of the first prompts of a step.

    A row of completions.jsonl has the problem's fields, and {"step", "weights_version": of the weights that sampled,
        "prompt", "blank": the placeholder of infilling, if there is one, "completion", "reward", "advantage",
        "mismatch": sum over scored tokens of log p_learner - log p_rollout, nats; null if the row is not scored,
        "parts": {"parsed": 1.0, ...}, "tokens": [{"id", "text", "step": that committed it, "probability"}, ...]}
    """
    log = run.log
    rollout = trained.rollout
    is_scored = logps.views.scored(rollout.completion_mask)
    log_mismatch = torch.where(is_scored, logps.old_logprobs - logps.rollout_logprobs, 0).double().sum(-1)
    row_mismatch = torch.where(is_scored.any(-1), log_mismatch, torch.nan)  # a row that is not scored has no mismatch
    row_values = torch.stack([row_mismatch, trained.local(trained.advantages, run.accelerator)], dim=1)
    mismatch_and_advantage = to_sampling_order(row_values, trained, sampled, run.accelerator).tolist()
    if not log.main:  # the collective above needs all processes; only the main process does the rest
        return
    rewards = [math.nan if answer.reward.value is None else float(answer.reward.value) for answer in answers]
    selected = best_and_worst_rows(rewards, group_sizes(sampled.rollout.group[: len(rewards)]))
    (row_index,) = copy_to_device(sampled.rollout.tokens.device, torch.tensor(selected))
    rows_to_log = []
    for i, tokens in zip(selected, written_tokens(run.policy, sampled.rollout.rows(row_index)), strict=True):
        answer = answers[i]
        mismatch, advantage = mismatch_and_advantage[i]
        numbers = finite({"reward": rewards[i], "advantage": advantage, "mismatch": mismatch})
        blank = answer.problem.blank
        texts = {"prompt": answer.problem.prompt, "completion": answer.completion}
        step_fields = {
            "step": step,
            "weights_version": sampled.rollout.weights_version,
            **texts,
            **({} if blank is None else {"blank": blank}),
            **numbers,
            "parts": completion_metrics(answer.reward),
            "tokens": tokens,
        }
        rows_to_log.append(as_json(answer.problem.fields) | step_fields)
    log.keep(rows_to_log)
    title = f"completions of step {step + 1}: of {NUM_PROMPTS} prompts those of highest and lowest reward"
    log.console.print(table(title, rows_to_log))


def best_and_worst_rows(rewards: list[float], sizes: list[int]) -> list[int]:
    """Return the indices of the rows with the highest and the lowest reward in each of the first groups, whose sizes
    are given; one row if all rewards of the group are equal. A row whose reward is NaN is returned only if all are.
    """
    selected: dict[int, None] = {}
    ends = list(accumulate(sizes))
    for size, end in list(zip(sizes, ends, strict=True))[:NUM_PROMPTS]:
        rows = range(end - size, end)
        group = [row for row in rows if not math.isnan(rewards[row])] or rows[:1]
        selected |= dict.fromkeys((max(group, key=rewards.__getitem__), min(group, key=rewards.__getitem__)))
    return list(selected)


def table(title: str, rows: list[dict]) -> Table:
    """Lay out the rows for a terminal of at least 80 columns, with markup and control characters escaped. Column A is
    the advantage.
    """
    grid = Table(title=literal(title, style="table.title"), title_justify="left", **NARROW)
    for name in ("prompt", "completion", "reward"):  # no width: the longest column shrinks first
        grid.add_column(name, overflow="fold")
    for name in ("A", "mismatch,\nnats"):
        grid.add_column(name, justify="right", no_wrap=True)
    previous_prompt = None
    for row in rows:
        if row["prompt"] != previous_prompt:
            grid.add_section()
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        components = ", ".join(f"{name} {value:.3g}" for name, value in row["parts"].items())
        texts = (
            "" if row["prompt"] == previous_prompt else prompt,
            row["completion"],
            "no reward" if row["reward"] is None else f"{row['reward']:.3g}: {components}",
        )
        grid.add_row(
            *(literal(shorten(text)) for text in texts), format_signed(row["advantage"]), format_signed(row["mismatch"])
        )
        previous_prompt = row["prompt"]
    return grid


def format_signed(value: float | None) -> str:
    """Format a number with its sign; "-" for None."""
    return "-" if value is None else f"{value:+.3g}"


def shorten(text: object) -> str:
    """Return the text, or its beginning and its end if it is longer than MAX_CHARACTERS."""
    characters = str(text)
    half = MAX_CHARACTERS // 2
    if len(characters) <= MAX_CHARACTERS:
        return characters
    return f"{characters[:half]} ... {characters[-half:]}"
