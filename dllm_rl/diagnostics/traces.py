"""Read and write traces: rollouts on disk, from this library or from an inference engine.

In memory a trace is a `Rollout`. On disk it is a `.jsonl` file with a line per completion: its settings, and the fields
of TRACE_TENSORS as lists over the row's tokens, without padding.

The settings are `format` ("dllm_rl_trace"), `version`, `weights_version`, `forwards`, `temperature`, `top_k`, `top_p`,
`suppress`, `rank` and `order` (`Order.rank_name`, `Order.probability`). `group` is the number of the completion's
group, whose lines are adjacent; without it each line is a group. Log-probs are in nats, under
the distribution that the token was sampled from; null (NaN in memory) means that the engine recorded none. Experts, the
support of a filter and the log-prob of an order are not stored.

The file may instead have one response of an engine per line (ENGINE_FORMATS). What is known about each format,
and from where:

- sglang: a `/generate` response with `meta_info.step_maps`, merged with its request, whose `input_ids` are the prompt.
  Source: the thread of SGLang's PR 27943 and public copies of its code and test. Steps count from 1 within a block and
  increase only when a token is written. Blocks are aligned to the first token of the prompt. The thread does not
  mention log-probs, so it is not verified that `output_token_logprobs` are those at the step that wrote the token.
- nemo_rl: the same response with `meta_info.output_token_reveal_steps`. Source: the design note and the code of a
  public fork of NeMo-RL; a recorded response was not available. Steps count from 0 within a block, and blocks start at
  the first token of the response. If the engine has to write positions by force to complete a block, their step number
  is the maximum number of steps, so that there is a gap before it. `output_token_logprobs` are those at the step that
  wrote the token.
- vllm: the response of the completions endpoint to a request with `"logprobs": 0, "return_token_ids": true`. Source:
  the thread of vLLM's PR 48279 and a public copy of its sampler. With `selection_policy="leftmost"`, each step writes
  the leftmost ceil(m / s) masked positions of a canvas (here: a block), where m is the number of its masked positions,
  and s the number of its remaining steps, including the current one. A log-prob is computed at the step that wrote the
  token, from the logits divided by the temperature. Steps are not returned, so rollouts with `low_confidence` cannot be
  replayed. With `logprobs` above 0, the log-probs are those of the last denoising step. It is known only from
  a later copy of the sampler that top_k and top_p are applied before the temperature.

If an engine cuts a completion inside a block, it does not return the rest of the block, although the model saw it. The
replayed log-probs of that block then differ, so request complete blocks.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dllm_rl.files import write_text
from dllm_rl.types import Order, Rollout, SamplingParams, group_numbers

FORMAT, VERSION = "dllm_rl_trace", 1
MAX_BYTES = 2**28  # size of a file that is read
MAX_INTEGER = 2**31  # limit on ids and counts, so that no sum overflows
TRACE_TENSORS = {
    "tokens": torch.int64,
    "attention_mask": torch.bool,
    "completion_mask": torch.bool,
    "unmask_step": torch.int64,
    "logprobs": torch.float32,
    "block_first_step": torch.int64,
}
FILL = {"unmask_step": -1, "block_first_step": -1}  # values outside the completion; other fields have 0
# Values of `Order.probability` that are restored. The others need data that a trace lacks, and become "unknown".
RESTORED_STATUSES = ("deterministic", "independent")


class EngineFormat(NamedTuple):
    """Where a response has the fields of a trace.

    Attributes:
        prompt: Path of the prompt's token ids.
        tokens: Path of the completion's token ids.
        logprobs: Path of the completion's log-probs: numbers, or lists whose first item is the number.
        steps: Path of the steps, counted within a block. None: not returned; positions are written leftmost first.
        first_step: Number of a block's first step.
        has_gaps: Whether valid step numbers may have gaps.
        blocks_from_prompt: Whether the first block starts at the prompt's first token, not at the completion's.
    """

    prompt: str
    tokens: str
    logprobs: str
    steps: str | None
    first_step: int = 0
    has_gaps: bool = False
    blocks_from_prompt: bool = False


ENGINE_FORMATS = {
    "sglang": EngineFormat(
        prompt="input_ids",
        tokens="output_ids",
        logprobs="meta_info.output_token_logprobs",
        steps="meta_info.step_maps",
        first_step=1,
        blocks_from_prompt=True,
    ),
    "nemo_rl": EngineFormat(
        prompt="input_ids",
        tokens="output_ids",
        logprobs="meta_info.output_token_logprobs",
        steps="meta_info.output_token_reveal_steps",
        has_gaps=True,
    ),
    "vllm": EngineFormat(
        prompt="choices.0.prompt_token_ids",
        tokens="choices.0.token_ids",
        logprobs="choices.0.logprobs.token_logprobs",
        steps=None,
    ),
}


def write_trace(path: str | Path, rollout: Rollout) -> None:
    """Write a rollout as a trace, for `dllm-rl check-trace` or for another training library.

    Args:
        path: File to write, `.jsonl`.
        rollout: Rollout of a sampler that writes every position once.

    Raises:
        ValueError: The suffix is not supported, or the sampler rewrote tokens, which a trace cannot represent.
    """
    path = Path(path)
    _check_suffix(path)
    write_text(path, "\n".join(map(json.dumps, trace_rows(rollout))) + "\n")


def trace_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """Return the rows of a trace's `.jsonl` file as JSON objects, for example to send them to a client.

    Raises:
        ValueError: The sampler rewrote tokens, which a trace cannot represent.
    """
    settings, tensors = _settings_and_tensors(rollout)
    attended = tensors.pop("attention_mask")
    rows = []
    for row, mask in enumerate(attended):
        lists = {name: x[row][mask].tolist() for name, x in tensors.items()}
        lists["completion_mask"] = list(map(int, lists["completion_mask"]))
        if "logprobs" in lists:
            lists["logprobs"] = [x if math.isfinite(x) else None for x in lists["logprobs"]]  # JSON has no NaN
        rows.append(settings | {"group": int(rollout.group[row])} | lists)
    return rows


def _settings_and_tensors(rollout: Rollout) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Convert a rollout to a trace. Raise ValueError if a trace cannot represent it."""
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
    settings = {
        "format": FORMAT,
        "version": VERSION,
        "weights_version": rollout.weights_version,
        "forwards": rollout.forwards,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "suppress": list(params.suppress),
        "rank": None if order is None else order.rank_name,
        "order": "unknown" if order is None else order.probability,
    }
    tensors = {name: getattr(rollout, name) for name in TRACE_TENSORS if name != "block_first_step"}
    if order is not None:
        tensors["block_first_step"] = order.block_first_step
    if not has_logprobs(rollout):
        del tensors["logprobs"]
    tensors = {name: x.detach().to("cpu", TRACE_TENSORS[name]) for name, x in tensors.items()}
    return settings, tensors


def has_logprobs(rollout: Rollout) -> bool:
    """Return whether any token has a log-prob. A trace of an engine may have only NaN."""
    return not bool(rollout.logprobs[rollout.completion_mask].isnan().all())


def read_trace(
    path: str | Path,
    *,
    block_size: int | None = None,
    block_steps: int | None = None,
    sampling_params: SamplingParams | None = None,
) -> Rollout:
    """Read a trace of this library or of an engine. The docstring of the module describes the formats.

    Call it to check or to score rollouts from another process. Padding gets token id 0. Token ids are not compared with
    a vocabulary, because no policy is needed (`check_trace` compares them).

    Args:
        path: File to read, `.jsonl`.
        block_size: Positions per block of the engine. Needed only for responses of engines.
        block_steps: Steps per block, for vLLM responses. None (default): one per position.
        sampling_params: Temperature and filters of the sampling distribution. None (default): as recorded in the trace;
            for responses of engines, temperature 1 without filters.

    Returns:
        The rollout. Log-probs that the file lacks are NaN.

    Raises:
        ValueError: The file is not a trace, a field is missing or has the wrong type, or lines contradict each other.
            The message names file, line and field.
    """
    path = Path(path)
    check_file(path)
    for name, value in (("block_size", block_size), ("block_steps", block_steps)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rollout = _read_lines(path, block_size, block_steps)
    return rollout if sampling_params is None else replace(rollout, sampling_params=sampling_params)


def check_file(path: Path) -> None:
    """Raise ValueError unless the path is a regular file with a trace's suffix, and not too large to be read."""
    _check_suffix(path)
    if not path.is_file():  # reading a FIFO would wait
        raise ValueError(f"{path} is {'not a regular file' if path.exists() else 'missing'}; give a trace")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path} has {size} bytes, more than {MAX_BYTES}; split it into several files")


def _check_suffix(path: Path) -> None:
    if path.suffix != ".jsonl":
        raise ValueError(f"{path} must be a .jsonl file")


def _read_lines(path: Path, block_size: int | None, block_steps: int | None) -> Rollout:
    first: tuple[str, dict[str, Any]] | None = None
    forwards = 0
    rows: list[dict[str, list]] = []
    group: list[int] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parsed(line, where)
        settings = _settings(row, where) if "format" in row else _settings(_DEFAULT_HEADER, where)
        group_number = settings.pop("group")
        group.append(number if group_number is None else group_number)
        if first is None:
            first = where, settings
        # The number of forwards is that of a row's batch; a server may sample the rows of a file in several.
        forwards = max(forwards, settings["forwards"])
        for name, value in settings.items():
            if name != "forwards" and value != first[1][name]:
                raise ValueError(f"{where}: {name}={value} differs from that of {first[0]}; split the file")
        convert = _library_row if "format" in row else _engine_row
        lists = convert(row, where, block_size=block_size, block_steps=block_steps)
        if rows and (unlike := lists.keys() ^ rows[0].keys()):
            raise ValueError(f"{where}: {min(unlike)} is in this line or in {first[0]}, not in both; split the file")
        rows.append(lists)
    if first is None:
        raise ValueError(f"{path} has no rows; write it with write_trace")
    return _rollout(_stacked(rows), group, first[1] | {"forwards": forwards}, str(path))


def _stacked(rows: Sequence[Mapping[str, list]]) -> dict[str, Tensor]:
    """Stack rows of lists to tensors, padded on both sides so that all completions begin in the same column."""
    starts = [row["completion_mask"].index(1) if 1 in row["completion_mask"] else len(row["tokens"]) for row in rows]
    left = max(starts)
    width = max(left - start + len(row["tokens"]) for start, row in zip(starts, rows, strict=True))
    if len(rows) * width * 8 > MAX_BYTES:  # many short rows are padded to a long one
        raise ValueError(f"{len(rows)} rows of up to {width} tokens are too many for one trace; split the file")
    names = [*rows[0], "attention_mask"]
    tensors = {name: torch.full((len(rows), width), FILL.get(name, 0), dtype=TRACE_TENSORS[name]) for name in names}
    for index, (start, row) in enumerate(zip(starts, rows, strict=True)):
        columns = slice(left - start, left - start + len(row["tokens"]))
        for name, tensor in tensors.items():
            values = row[name] if name in row else [1] * len(row["tokens"])
            tensor[index, columns] = torch.tensor(values, dtype=TRACE_TENSORS[name])
    return tensors


def _rollout(tensors: Mapping[str, Tensor], group: Sequence[int], settings: Mapping[str, Any], where: str) -> Rollout:
    tokens, completion = tensors["tokens"], tensors["completion_mask"]
    if not tokens.numel():
        raise ValueError(f"{where}: no row has a token; a trace needs the tokens that were sampled")
    if not completion.any():
        raise ValueError(f"{where}: completion_mask is empty; a trace needs the tokens that were sampled")
    order = None
    if "block_first_step" in tensors:
        probability = settings["order"] if settings["order"] in RESTORED_STATUSES else "unknown"
        order = Order(tensors["block_first_step"], settings["rank"], probability=probability)
    return Rollout(
        tokens=tokens,
        attention_mask=tensors["attention_mask"],
        completion_mask=completion,
        unmask_step=tensors["unmask_step"],
        logprobs=tensors.get("logprobs", torch.where(completion, torch.nan, 0.0)),
        group=group_numbers(torch.tensor(group)),
        weights_version=settings["weights_version"],
        sampling_params=SamplingParams(
            settings["temperature"], settings["top_k"], settings["top_p"], tuple(settings["suppress"])
        ),
        forwards=settings["forwards"],
        order=order,
    )


def _library_row(row: Mapping[str, Any], where: str, **engine_options: int | None) -> dict[str, list]:
    lists = {"tokens": _list(row, "tokens", where, _is_count)}
    lists["completion_mask"] = _list(row, "completion_mask", where, lambda x: type(x) is int and x in (0, 1))
    lists["unmask_step"] = _list(row, "unmask_step", where, _is_integer)
    if row.get("logprobs") is not None:
        numbers = _list(row, "logprobs", where, lambda x: x is None or _is_number(x))
        lists["logprobs"] = [math.nan if x is None else x for x in numbers]
    if row.get("block_first_step") is not None:
        lists["block_first_step"] = _list(row, "block_first_step", where, _is_integer)
    for name, values in lists.items():
        if len(values) != (count := len(lists["tokens"])):
            raise ValueError(f"{where}: {name} has {len(values)} entries for {count} tokens; give one each")
    return lists


def _engine_row(
    row: Mapping[str, Any], where: str, *, block_size: int | None, block_steps: int | None
) -> dict[str, list]:
    names = [name for name, fields in ENGINE_FORMATS.items() if _at(row, fields.steps or fields.tokens) is not None]
    if not names:
        known = ", ".join(fields.steps or fields.tokens for fields in ENGINE_FORMATS.values())
        raise ValueError(f"{where}: neither 'format' nor one of {known} is there; is it a trace?")
    if block_size is None:
        raise ValueError(f"{where}: a response of {names[0]} does not say its blocks; give block_size (--block_size)")
    fields = ENGINE_FORMATS[names[0]]
    if isinstance(choices := row.get("choices"), list) and len(choices) != 1:
        raise ValueError(f"{where}: choices has {len(choices)} entries; write a line for each")
    prompt, tokens = (_list(row, name, where, _is_count) for name in (fields.prompt, fields.tokens))
    offset = len(prompt) % block_size if fields.blocks_from_prompt else 0
    block = [(offset + i) // block_size for i in range(len(tokens))]
    if fields.steps is None:
        leftmost = _leftmost_steps(block_size, block_size if block_steps is None else block_steps)
        steps_in_block = [leftmost[i % block_size] for i in range(len(tokens))]
    else:
        steps_in_block = [step - fields.first_step for step in _list(row, fields.steps, where, _is_integer)]
    lists: dict[str, list] = {"unmask_step": steps_in_block}
    if _at(row, fields.logprobs) is not None:
        entries = _list(row, fields.logprobs, where, lambda x: _is_number(x[0] if isinstance(x, list) and x else x))
        lists["logprobs"] = [float(x[0] if isinstance(x, list) else x) for x in entries]
    for name, values in lists.items():
        if len(values) != len(tokens):
            raise ValueError(f"{where}: {name} has {len(values)} entries for {len(tokens)} new tokens; give one each")
    lists["unmask_step"], lists["block_first_step"] = _steps_of_row(steps_in_block, block, has_gaps=fields.has_gaps)
    lists = {name: [FILL.get(name, 0)] * len(prompt) + values for name, values in lists.items()}
    mask = [0] * len(prompt) + [1] * len(tokens)
    return lists | {"tokens": prompt + tokens, "completion_mask": mask}


def _leftmost_steps(block_size: int, block_steps: int) -> list[int]:
    """Return the step of each position of a block, if each step writes the leftmost ceil(masked / steps left)."""
    steps: list[int] = []
    for step in range(block_steps):
        steps += [step] * -(-(block_size - len(steps)) // (block_steps - step))
    return steps


def _steps_of_row(
    steps_in_block: Sequence[int], block: Sequence[int], *, has_gaps: bool
) -> tuple[list[int], list[int]]:
    """Return each position's step, counted over all blocks, and the first step of its block.

    Args:
        steps_in_block: Step of each position, counted within its block; negative: none.
        block: Number of each position's block.
        has_gaps: Whether to renumber the steps of each block without gaps.
    """
    steps: list[int] = []
    firsts: list[int] = []
    first = 0
    for _, members in groupby(zip(block, steps_in_block, strict=True), key=lambda pair: pair[0]):
        local = [step for _, step in members]
        if has_gaps:
            ranks = {step: rank for rank, step in enumerate(sorted({step for step in local if step >= 0}))}
            local = [ranks.get(step, step) for step in local]
        steps += [first + step if step >= 0 else step for step in local]
        firsts += [first] * len(local)
        first += max(0, *(step + 1 for step in local))
    return steps, firsts


# Header for the response of an engine, which records no settings: all of them get their defaults.
_DEFAULT_HEADER = {"format": FORMAT, "version": VERSION}


def _settings(header: Any, where: str) -> dict[str, Any]:
    """Return a header's settings, with defaults for missing ones. Raise ValueError that names an invalid field."""
    if not isinstance(header, dict) or header.get("format") != FORMAT or header.get("version") != VERSION:
        raise ValueError(f"{where}: format and version are not {FORMAT!r} and {VERSION}; write it with write_trace")
    optional_text: Callable[[Any], bool] = lambda x: x is None or (isinstance(x, str) and len(x) < 100)  # noqa: E731
    fields: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
        "group": (None, lambda x: x is None or _is_count(x), "a whole number from 0 on"),
        "weights_version": (0, _is_count, "a whole number from 0 on"),
        "forwards": (0, _is_count, "a whole number from 0 on; 0 if it is not known"),
        "temperature": (1.0, lambda x: _is_number(x) and x >= 0, "a number from 0 on"),
        "top_k": (None, lambda x: x is None or (_is_count(x) and x > 0), "a whole number from 1 on, or null"),
        "top_p": (None, lambda x: x is None or (_is_number(x) and 0 < x <= 1), "a number in (0, 1], or null"),
        "suppress": ([], lambda x: isinstance(x, list) and all(map(_is_count, x)), "a list of token ids"),
        "rank": (None, optional_text, "a rank's name, or null"),
        "order": ("unknown", optional_text, "a status of Order.probability"),
    }
    settings = {}
    for name, (default, is_valid, kind) in fields.items():
        value = header.get(name, default)
        if not is_valid(value):
            raise ValueError(f"{where}: {name}={_quoted(value)} must be {kind}")
        settings[name] = value
    return settings


def _parsed(text: str | bytes, where: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # not UTF-8 or not JSON, or brackets nested too deeply
        raise ValueError(f"{where} is not JSON; write it with write_trace") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {_quoted(value)} and not a JSON object; write it with write_trace")
    return value


def _at(row: Any, path: str) -> Any:
    """Return the value at a path of names and list indices, for example "choices.0.token_ids"; None if missing."""
    for name in path.split("."):
        if isinstance(row, list):
            row = row[int(name)] if name.isdecimal() and int(name) < len(row) else None
        else:
            row = row.get(name) if isinstance(row, dict) else None
    return row


def _list(row: Mapping[str, Any], path: str, where: str, is_valid: Callable[[Any], bool]) -> list:
    """Return the list at a path. Raise ValueError if it is missing or has an invalid value."""
    values = _at(row, path)
    if not isinstance(values, list):
        raise ValueError(f"{where}: {path}={_quoted(values)} must be a list with an entry for each token")
    for index, value in enumerate(values):
        if not is_valid(value):
            raise ValueError(f"{where}: {path} has {_quoted(value)} at {index}, which is not a valid value")
    return values


def _is_integer(value: Any) -> bool:
    return type(value) is int and -MAX_INTEGER < value < MAX_INTEGER


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # False for NaN and infinity


def _quoted(value: Any) -> str:
    """Return a value as text of at most 40 characters, for an error message."""
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."
