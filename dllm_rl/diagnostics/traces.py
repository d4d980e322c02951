"""Read and write traces: rollouts on disk, from this library or from an inference engine.

In memory a trace is a `Rollout`. On disk it is a `.jsonl` file with a line per completion: `format`
("dllm_rl_trace"), `version`, the fields of `TraceSettings`, and lists over the row's tokens, without padding: `tokens`,
`completion_mask` (0 or 1), `unmask_step`, and if they were recorded `logprobs` and `block_first_step`. Log-probs are in
nats, under the distribution that the token was sampled from; null (NaN in memory) means that the engine recorded none.
Experts, the support of a filter and the log-prob of an order are not stored.
"""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_rl.files import write_text
from dllm_rl.records import Record, make_record, option
from dllm_rl.screen import line_of
from dllm_rl.types.batch_record import BatchRecord
from dllm_rl.types.groups import group_numbers
from dllm_rl.types.rollouts import Order, Rollout, SamplingParams

FORMAT = {"format": "dllm_rl_trace", "version": 1}
MAX_INTEGER = 10**9  # limit on ids and steps, so that no sum overflows
# Values of `Order.probability` that are restored. The others need data that a trace lacks, and become "unknown".
RESTORED_STATUSES = ("deterministic", "independent")


class TraceSettings(Record):
    """The settings in a line of a trace. All lines have the same, except `group` and `forwards`.

    Args:
        weights_version: Version of the weights that sampled.
        forwards: Model calls that the row's batch took. 0: not known.
        temperature: Temperature of the sampling distribution.
        top_k: Its top-k filter.
        top_p: Its top-p filter.
        suppress: Token ids that were never sampled.
        rank: Name of the sampler's rank (`Order.rank_name`).
        order: Status of the order's probability (`Order.probability`).
        group: Number of the completion's group, whose lines are adjacent. None: the line is a group of its own.
    """

    weights_version: int = option(default=0, at_least=0)
    forwards: int = option(default=0, at_least=0)
    temperature: float = option(default=1.0, at_least=0)
    top_k: int | None = option(default=None, at_least=1)
    top_p: float | None = option(default=None, above=0, at_most=1)
    suppress: tuple[int, ...] = option(default=(), at_least=0)
    rank: str | None = None
    order: str = "unknown"
    group: int | None = option(default=None, at_least=0)


def write_trace(path: str | Path, rollout: Rollout) -> None:
    """Write a rollout as a trace, for `dllm-rl check-trace` or for another training library.

    Args:
        path: File to write, `.jsonl`.
        rollout: Rollout of a sampler that writes every position once.

    Raises:
        ValueError: The sampler rewrote tokens, which a trace cannot represent.
    """
    write_text(Path(path).expanduser(), "\n".join(map(json.dumps, trace_rows(rollout))) + "\n")


def trace_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """Return the rows of a trace's `.jsonl` file as JSON objects, for example to send them to a client.

    Raises:
        ValueError: The sampler rewrote tokens, which a trace cannot represent.
    """
    params, order = rollout.sampling_params, rollout.order
    if rollout.events is not None or rollout.renoised is not None:
        raise ValueError(
            "a trace holds one write per position, and this sampler rewrites tokens: use another commit rule"
        )
    if rollout.first_step is not None:
        raise ValueError("a trace holds one turn, and this rollout has several (first_step): write each turn")
    if params.support != "per_policy":
        raise ValueError(
            f"support={params.support!r} was set for training; write the rollout as the sampler returned it"
        )
    settings = FORMAT | {
        "weights_version": rollout.weights_version,
        "forwards": rollout.forwards,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "suppress": list(params.suppress),
        "rank": None if order is None else order.rank_name,
        "order": "unknown" if order is None else order.probability,
    }
    tensors = {
        "tokens": rollout.tokens,
        "completion_mask": rollout.completion_mask.int(),
        "unmask_step": rollout.unmask_step,
    }
    if has_logprobs(rollout):
        tensors["logprobs"] = rollout.logprobs
    if order is not None:
        tensors["block_first_step"] = order.block_first_step
    rows = []
    for row, mask in enumerate(rollout.attention_mask):
        lists = {name: tensor[row][mask].tolist() for name, tensor in tensors.items()}
        if "logprobs" in lists:
            lists["logprobs"] = [x if math.isfinite(x) else None for x in lists["logprobs"]]  # JSON has no NaN
        rows.append(settings | {"group": int(rollout.group[row])} | lists)
    return rows


def has_logprobs(rollout: Rollout) -> bool:
    """Return whether any token has a log-prob. A trace of an engine may have only NaN."""
    return not bool(rollout.logprobs[rollout.completion_mask].isnan().all())


def read_trace(path: str | Path) -> Rollout:
    """Read a trace, whose format the docstring of the module describes.

    Call it to check or to score rollouts from another process. Padding gets token id 0. Token ids are not compared with
    a vocabulary, because no policy is needed (`check_trace` compares them).

    Args:
        path: File to read, `.jsonl`.

    Returns:
        The rollout. Log-probs that the file lacks are NaN.

    Raises:
        ValueError: The file is not a trace, a field is missing or has the wrong type, or lines contradict each other.
            The message names file, line and field.
    """
    rows: list[Rollout] = []
    for number, line in enumerate(Path(path).expanduser().read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        settings, row = _read_line(line, where)
        if not rows:
            first_place, first_settings = where, settings
        for field in fields(settings):
            value = getattr(settings, field.name)
            if field.name not in ("group", "forwards") and value != getattr(first_settings, field.name):
                raise ValueError(f"{where}: {field.name}={value} differs from that of {first_place}; split the file")
        if rows and (row.order is None) != (rows[0].order is None):
            raise ValueError(f"{where}: block_first_step is in this line or in {first_place}; split the file")
        rows.append(row if settings.group is not None else replace(row, group=row.group - number))
    if not rows:
        raise ValueError(f"{path} has no rows; write it with write_trace")
    # All completions begin in the same column.
    prompt_lengths = [int((row.completion_mask.cumsum(-1) == 0).sum()) for row in rows]
    longest = max(prompt_lengths)
    rows = [row.padded(longest - length) for row, length in zip(rows, prompt_lengths, strict=True)]
    width = max(row.tokens.shape[1] for row in rows)
    rows = [row.padded(width - row.tokens.shape[1], right=True) for row in rows]
    rollout = BatchRecord.merge_records(rows, torch.cat)
    if not rollout.completion_mask.any():
        raise ValueError(f"{path}: completion_mask is empty; a trace needs the tokens that were sampled")
    # The number of forwards is that of a row's batch; a server may sample the rows of a file in several.
    return replace(rollout, group=group_numbers(rollout.group), forwards=max(row.forwards for row in rows))


def _read_line(line: bytes, where: str) -> tuple[TraceSettings, Rollout]:
    """Return the settings of a line, and its completion as a rollout of one row."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):  # not UTF-8 or not JSON, or brackets nested too deeply
        raise ValueError(f"{where} is not JSON; write it with write_trace") from None
    if not isinstance(values, dict) or {name: values.get(name) for name in FORMAT} != FORMAT:
        raise ValueError(f"{where}: format and version are not {FORMAT['format']!r} and {FORMAT['version']}")
    names = [field.name for field in fields(TraceSettings)]  # type: ignore[arg-type]
    try:
        settings = make_record(TraceSettings, {name: values[name] for name in names if name in values})
        tokens = _tensor(values, "tokens", 0)
        completion = _tensor(values, "completion_mask", 0, 1).bool()
        unmask_step = _tensor(values, "unmask_step", -MAX_INTEGER)
        logprobs = torch.where(completion, torch.nan, 0.0)
        if values.get("logprobs") is not None:
            logprobs = _tensor(values, "logprobs", -1e30, 1e30, torch.float32)
        order = None
        if values.get("block_first_step") is not None:
            probability = settings.order if settings.order in RESTORED_STATUSES else "unknown"
            order = Order(_tensor(values, "block_first_step", -MAX_INTEGER), settings.rank, probability=probability)
    except ValueError as error:
        raise ValueError(f"{where}: {line_of(error)}") from None
    row = Rollout(
        tokens=tokens,
        attention_mask=torch.ones_like(completion),
        completion_mask=completion,
        unmask_step=unmask_step,
        logprobs=logprobs,
        group=torch.tensor([settings.group or 0]),
        weights_version=settings.weights_version,
        sampling_params=SamplingParams(settings.temperature, settings.top_k, settings.top_p, settings.suppress),
        forwards=settings.forwards,
        order=order,
    )
    return settings, row


def _tensor(
    values: dict[str, Any], name: str, low: float, high: float = MAX_INTEGER, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Return a field as a tensor (1, T), with NaN for null if the numbers are floats.

    Raises:
        ValueError: It is not a list with a number between `low` and `high` for each token.
    """
    items, tokens = values.get(name), values.get("tokens")
    if not isinstance(items, list) or not isinstance(tokens, list) or len(items) != len(tokens):
        raise ValueError(f"{name}={items!r} must be a list with an entry for each token")
    kinds, kind = ((int, float), "a number") if dtype.is_floating_point else ((int,), "a whole number")
    for index, value in enumerate(items):
        is_missing = value is None and dtype.is_floating_point
        if not is_missing and (type(value) not in kinds or not low <= value <= high):  # NaN fails too
            raise ValueError(f"{name}[{index}]={value!r} must be {kind} in [{low:g}, {high:g}]")
    return torch.tensor([[math.nan if value is None else value for value in items]], dtype=dtype)
