"""State of a sharded optimizer: one safetensors file per process, which any number of processes can load.

torch.distributed.checkpoint (DCP) is not used: it reads pickles, which can run code, and with its safetensors format it
checks neither dtypes nor whether rows are missing.
"""

import errno
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from dllm_rl import manifest
from dllm_rl.files import flush
from dllm_rl.models.base import Policy

PATTERN = "optimizer-*-of-*.safetensors"
Returned = TypeVar("Returned")
AllGather = Callable[[Any], list[Any]]  # all-gather: this process's value -> the values of all processes, in order


@dataclass(frozen=True)
class Part:
    """The optimizer state that one process writes.

    Args:
        number: Index of the part, from 0.
        count: Number of parts.
        tensors: Tensors by the name "KIND of WEIGHT", for example "exp_avg of lm_head.weight". Of a sharded tensor,
            only this part's rows are included.
        rows: (first row, number of rows in all parts) of each sharded tensor, by its name.
        plain: Values that are not tensors.
        nbytes: Size of the sharded tensors in all parts.
    """

    number: int
    count: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def name(self) -> str:
        return file_name(self.number, self.count)


def file_name(number: int, count: int) -> str:
    """Return the file name of part `number`, counted from 0."""
    return f"optimizer-{number + 1:05d}-of-{count:05d}.safetensors"


def part_of(policy: Policy, optimizer: torch.optim.Optimizer, *, copy: bool = False) -> Part | None:
    """Return the part that this process writes.

    Args:
        policy: Policy whose weights are sharded.
        optimizer: Optimizer of these weights.
        copy: Whether to copy the tensors, so that training can continue while the part is written. Default: False.

    Returns:
        The part; None if this process is not in the first replica (HSDP), which is the only replica that writes.
    """
    trained = [(name, p) for name, p in policy.module.named_parameters() if p.requires_grad]
    mesh = trained[0][1].device_mesh
    *replica, index = mesh.get_coordinate()
    if any(replica):
        return None
    num_shards = mesh.shape[-1]
    shard = Part(index, num_shards)
    nbytes = 0
    for name, parameter in trained:
        for kind, value in optimizer.state.get(parameter, {}).items():
            key = f"{kind} of {name}"
            if isinstance(value, DTensor):
                shard.rows[key] = (first_row(len(value), index, num_shards), len(value))
                nbytes += value.nbytes
                shard.tensors[key] = value.to_local().detach().to("cpu", copy=copy).contiguous()
            elif isinstance(value, Tensor) and value.dim():
                raise ValueError(f"optim: {key!r} is not sharded like its weight; use adamw, or shard_size=1")
            elif index == 0 and isinstance(value, Tensor):  # only the first part has tensors that are not sharded
                shard.tensors[key] = value.detach().to("cpu", copy=copy)
            elif index == 0:
                shard.plain[key] = value
    return replace(shard, nbytes=nbytes)


def first_row(length: int, number: int, count: int) -> int:
    """Return the first row of part `number` of `count`, as FSDP2 (torch.chunk) shards `length` rows."""
    return min(length, number * -(-length // count))


def write_part(folder: Path, part: Part) -> dict[str, Any]:
    """Write a part to disk; return its manifest entry. Raises OSError."""
    path = folder / part.name
    try:
        save_file(part.tensors, path, {"rows": json.dumps(part.rows), "plain": json.dumps(part.plain)})
        flush(path)
    except (OSError, SafetensorError) as error:
        raise OSError(errno.EIO, f"{path} was not saved: {error}") from error
    return {part.name: manifest.describe(path)}


def load_parts(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Load this process's rows of the optimizer's state from the parts in a folder.

    Raises:
        ValueError: A part is missing or damaged, or does not fit the policy.
    """
    parameters = dict(policy.module.named_parameters())
    ordered = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameter_index = {id(parameter): place for place, parameter in enumerate(ordered)}
    state: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        pieces, plain_values = _opened(folder, stack)
        for key in [*pieces, *plain_values]:
            kind, _, name = key.partition(" of ")
            if name not in parameters or id(parameters[name]) not in parameter_index:
                raise ValueError(f"{folder}: {key!r} in the optimizer's state belongs to no trained weight")
            parameter = parameters[name]
            value = _assembled(folder, key, pieces[key], parameter) if key in pieces else plain_values[key]
            state.setdefault(parameter_index[id(parameter)], {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@dataclass(frozen=True)
class _Piece:
    """A tensor's rows in one file."""

    file: Any
    first: int  # index of the first row
    total: int | None  # number of rows in all files; None: not sharded, so that this file has the full tensor


def _opened(folder: Path, stack: ExitStack) -> tuple[dict[str, list[_Piece]], dict[str, Any]]:
    """Return the pieces of each tensor, and the values that are not tensors. Reads only the files' headers."""
    pieces: dict[str, list[_Piece]] = {}
    plain_values: dict[str, Any] = {}
    for path in _files(folder):
        try:
            file = stack.enter_context(safe_open(path, "pt"))
            header = file.metadata() or {}
            row_spans = json.loads(header["rows"])
            file_values = json.loads(header["plain"])
        except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
            raise ValueError(f"{folder}: {path.name} is damaged: {error}") from None
        names = set(file.keys())
        if not _are_valid_rows(row_spans, names) or not _are_valid_numbers(file_values):
            raise ValueError(f"{folder}: {path.name} is damaged: rows or plain values in its header are not valid")
        for key in sorted(names):
            first, total = row_spans.get(key, (0, None))
            pieces.setdefault(key, []).append(_Piece(file, first, total))
        plain_values |= file_values
    if duplicates := sorted(pieces.keys() & plain_values.keys()):
        raise ValueError(
            f"{folder}: {duplicates[0]!r} in the optimizer's state is a tensor and a number; save it again"
        )
    return pieces, plain_values


def _are_valid_rows(rows: Any, names: set[str]) -> bool:
    """Return whether `rows` is {name: [first row, number of rows]}, of tensors in the file."""
    if not isinstance(rows, dict) or not rows.keys() <= names:
        return False
    for pair in rows.values():
        if not isinstance(pair, list) or list(map(type, pair)) != [int, int] or min(pair) < 0:
            return False
    return True


def _are_valid_numbers(plain: Any) -> bool:
    """Return whether `plain` has only numbers and None, and no step is None."""
    if not isinstance(plain, dict):
        return False
    for key, value in plain.items():
        if value is None and not key.startswith("step of "):
            continue
        # This also refuses NaN, infinity, and integers too large for a float.
        if not isinstance(value, int | float) or not abs(value) < 1e300:
            return False
    return True


def _files(folder: Path) -> list[Path]:
    """Return the files of all parts. Raises ValueError if one is missing or belongs to another number of parts."""
    existing = set(folder.glob(PATTERN))
    count = len(existing)  # each file name contains the number of parts
    paths = [folder / file_name(number, count) for number in range(count)]
    if unexpected := sorted(existing.difference(paths)):
        raise ValueError(f"{folder}: {unexpected[0].name} is not one of the {count} parts that the folder should have")
    return paths


def _assembled(folder: Path, key: str, pieces: list[_Piece], parameter: Tensor) -> Tensor:
    """Return this process's rows of a tensor, sharded like the parameter."""
    location = f"{folder}: the optimizer's state {key!r}"
    spans = _spans(location, key, pieces, parameter)
    shape = parameter.shape
    if spans is None:  # a number, the same in all processes
        return pieces[0].file.get_tensor(key)
    if not isinstance(parameter, DTensor):
        return _joined(location, spans, 0, shape[0], parameter)
    local_rows = parameter.to_local()
    mesh = parameter.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "every process is in the mesh"
    first = first_row(shape[0], coordinate[-1], mesh.shape[-1])
    value = _joined(location, spans, first, first + len(local_rows), parameter).to(local_rows.device)
    layout: dict[str, Any] = {"run_check": False, "shape": shape, "stride": parameter.stride()}
    return DTensor.from_local(value, mesh, parameter.placements, **layout)


Span = tuple[int, int, Any]  # first row, row after the last, and the slice of a file


def _spans(location: str, key: str, pieces: list[_Piece], parameter: Tensor) -> list[Span] | None:
    """Return the pieces in order; None for a number. Raises ValueError unless they have each row of
    the parameter once.
    """
    slices = [piece.file.get_slice(key) for piece in pieces]
    shape = list(parameter.shape)
    if len(pieces) == 1 and pieces[0].total is None and slices[0].get_shape() == []:
        return None
    spans: list[Span] = []
    end = 0
    # An empty piece has the same first row as the piece after it. Their shapes sort the empty piece first.
    for piece, file_slice in sorted(
        zip(pieces, slices, strict=True), key=lambda pair: (pair[0].first, pair[1].get_shape())
    ):
        if not shape or piece.total != shape[0] or file_slice.get_shape()[1:] != shape[1:]:
            raise ValueError(f"{location} does not have the weight's shape {tuple(shape)}")
        if piece.first != end:
            raise ValueError(f"{location} has a gap or an overlap at row {end}")
        spans.append((end, end := end + file_slice.get_shape()[0], file_slice))
    if end != shape[0]:
        raise ValueError(f"{location} ends at row {end} of {shape[0]}")
    return spans


def _joined(location: str, spans: list[Span], first: int, last: int, parameter: Tensor) -> Tensor:
    """Return rows [first, last), which may be none. Raises ValueError on a dtype other than the weight's or fp32."""
    slices = [
        file_slice[max(first, begin) - begin : max(0, min(last, end) - begin)] for begin, end, file_slice in spans
    ]
    nonempty = [rows for rows in slices if len(rows)] or slices[:1]  # an empty slice still has a dtype
    dtypes = {rows.dtype for rows in nonempty}
    if len(dtypes) > 1 or not dtypes <= {parameter.dtype, torch.float32}:
        raise ValueError(
            f"{location} is of {', '.join(sorted(map(str, dtypes)))}, not of the weight's {parameter.dtype}"
        )
    return torch.cat(nonempty)


class Elsewhere(Exception):
    """Raised in this process for an error of another process; its argument is that error."""


def run_in_lockstep(work: Callable[[AllGather], Returned], gather: AllGather) -> Returned:
    """Run a function in all processes, and raise an error of one process in all of them. Collective.

    Args:
        work: Function to run. It must do its all-gathers with the function that it receives. Through these, the other
            processes learn of an error, at their next all-gather.
        gather: All-gather of the processes.

    Returns:
        What `work` returns in this process.
    """

    def all_gather(value: Any, error: Exception | None = None) -> list[Any]:
        values = []
        for item, other_error in gather((value, error)):
            if other_error is not None and error is None:
                raise Elsewhere(other_error)
            values.append(item)
        return values

    try:
        result = work(all_gather)
        all_gather(None)  # raises here an error that another process had after the last all-gather of `work`
    except Elsewhere as elsewhere:
        raise elsewhere.args[0] from None
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        all_gather(None, error)  # the other processes wait in their next all-gather
        raise
    return result


def single_process_gather(value: Any) -> list[Any]:
    """All-gather of a single process."""
    return [value]
