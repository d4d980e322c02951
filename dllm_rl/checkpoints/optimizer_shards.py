"""A sharded optimiser's state: one safetensors file per process, which any number of processes can read.

torch's DCP is not used: it reads pickles, and its safetensors form checks neither dtypes nor gaps.
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
Swap = Callable[[Any], list[Any]]  # this process's value -> the values of all processes, in order


@dataclass(frozen=True)
class Part:
    number: int  # from 0
    count: int
    tensors: dict[str, Tensor] = field(default_factory=dict)  # by "KIND of NAME"; rows of the sharded ones
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)  # first row, and rows in all, of the sharded ones
    plain: dict[str, Any] = field(default_factory=dict)  # values that are no tensors
    nbytes: int = 0  # of all parts

    @property
    def name(self) -> str:
        return file_name(self.number, self.count)


def file_name(number: int, count: int) -> str:
    return f"optimizer-{number + 1:05d}-of-{count:05d}.safetensors"


def part_of(policy: Policy, optimizer: torch.optim.Optimizer, *, copy: bool = False) -> Part | None:
    """This process's part; None if the first replica writes it. copy: training may go on during the write."""
    named = [(name, p) for name, p in policy.module.named_parameters() if p.requires_grad]
    mesh = named[0][1].device_mesh
    *replica, number = mesh.get_coordinate()
    if any(replica):
        return None  # the first replica writes
    count = mesh.shape[-1]
    part = Part(number, count)
    nbytes = 0
    for name, parameter in named:
        for kind, value in optimizer.state.get(parameter, {}).items():
            key = f"{kind} of {name}"
            if isinstance(value, DTensor):
                part.rows[key] = (first_row(len(value), number, count), len(value))
                nbytes += value.nbytes
                part.tensors[key] = value.to_local().detach().to("cpu", copy=copy).contiguous()
            elif isinstance(value, Tensor) and value.dim():
                raise ValueError(f"optim: {key!r} is not shared out as its weight is; use adamw, or shard_size=1")
            elif number == 0 and isinstance(value, Tensor):  # the first file alone has what is not sharded
                part.tensors[key] = value.detach().to("cpu", copy=copy)
            elif number == 0:
                part.plain[key] = value
    return replace(part, nbytes=nbytes)


def first_row(length: int, number: int, count: int) -> int:
    """First row of part `number` of `count`, as FSDP2 (torch.chunk) shards `length` rows."""
    return min(length, number * -(-length // count))


def write_part(folder: Path, part: Part) -> dict[str, Any]:
    """Write a part to disk; returns its manifest entry. Raises OSError."""
    path = folder / part.name
    try:
        save_file(part.tensors, path, {"rows": json.dumps(part.rows), "plain": json.dumps(part.plain)})
        flush(path)
    except (OSError, SafetensorError) as error:
        raise OSError(errno.EIO, f"{path} was not saved: {error}") from error
    return {part.name: manifest.describe(path)}


def load_parts(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Load this process's rows from a folder's parts. Raises ValueError naming what does not fit or is missing."""
    parameters = dict(policy.module.named_parameters())
    order = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    places = {id(parameter): place for place, parameter in enumerate(order)}
    state: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        pieces, plain = _opened(folder, stack)
        for key in [*pieces, *plain]:
            kind, _, name = key.partition(" of ")
            if name not in parameters or id(parameters[name]) not in places:
                raise ValueError(f"{folder}: {key!r} in the optimiser's state is of no weight that is trained")
            parameter = parameters[name]
            value = _assembled(folder, key, pieces[key], parameter) if key in pieces else plain[key]
            state.setdefault(places[id(parameter)], {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@dataclass(frozen=True)
class _Piece:
    file: Any
    first: int
    total: int | None  # rows in all files; None: not sharded, and this file has all


def _opened(folder: Path, stack: ExitStack) -> tuple[dict[str, list[_Piece]], dict[str, Any]]:
    """The pieces of each tensor, and the values that are no tensors; reads headers only."""
    pieces: dict[str, list[_Piece]] = {}
    plain: dict[str, Any] = {}
    for path in _files(folder):
        try:
            file = stack.enter_context(safe_open(path, "pt"))
            header = file.metadata() or {}
            rows = json.loads(header["rows"])
            more = json.loads(header["plain"])
        except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
            raise ValueError(f"{folder}: {path.name} is damaged: {error}") from None
        names = set(file.keys())
        if not _says_rows(rows, names) or not _says_numbers(more):
            raise ValueError(f"{folder}: {path.name} is damaged: its header does not say which rows it holds")
        for key in sorted(names):
            first, total = rows.get(key, (0, None))
            pieces.setdefault(key, []).append(_Piece(file, first, total))
        plain |= more
    if twice := sorted(pieces.keys() & plain.keys()):
        raise ValueError(f"{folder}: {twice[0]!r} in the optimiser's state is a tensor and a number; save it again")
    return pieces, plain


def _says_rows(rows: Any, names: set[str]) -> bool:
    """Whether `rows` is {name: [first row, rows in all]} of tensors in the file."""
    if not isinstance(rows, dict) or not rows.keys() <= names:
        return False
    for pair in rows.values():
        if not isinstance(pair, list) or list(map(type, pair)) != [int, int] or min(pair) < 0:
            return False
    return True


def _says_numbers(plain: Any) -> bool:
    """Whether `plain` is of numbers or None, and no step is None."""
    if not isinstance(plain, dict):
        return False
    for key, value in plain.items():
        if value is None and not key.startswith("step of "):
            continue
        # JSON's integers may be beyond all floats; NaN and infinity fail, too.
        if not isinstance(value, int | float) or not abs(value) < 1e300:
            return False
    return True


def _files(folder: Path) -> list[Path]:
    """The files of all parts. Raises ValueError if one is missing, or is of another number of parts."""
    here = set(folder.glob(PATTERN))
    count = len(here)  # each name has the number of parts
    paths = [folder / file_name(number, count) for number in range(count)]
    if odd := sorted(here.difference(paths)):
        raise ValueError(f"{folder}: {odd[0].name} is not one of {count} parts, and {count} are there")
    return paths


def _assembled(folder: Path, key: str, pieces: list[_Piece], parameter: Tensor) -> Tensor:
    """This process's rows of a tensor, sharded as the parameter is."""
    where = f"{folder}: the optimiser's state {key!r}"
    spans = _spans(where, key, pieces, parameter)
    shape = parameter.shape
    if spans is None:  # a number, the same in all processes
        return pieces[0].file.get_tensor(key)
    if not isinstance(parameter, DTensor):
        return _joined(where, spans, 0, shape[0], parameter)
    mine = parameter.to_local()
    mesh = parameter.device_mesh
    place = mesh.get_coordinate()
    assert place is not None, "every process is in the mesh"
    first = first_row(shape[0], place[-1], mesh.shape[-1])
    value = _joined(where, spans, first, first + len(mine), parameter).to(mine.device)
    layout: dict[str, Any] = {"run_check": False, "shape": shape, "stride": parameter.stride()}
    return DTensor.from_local(value, mesh, parameter.placements, **layout)


Span = tuple[int, int, Any]  # first row, the one after the last, the slice of a file


def _spans(where: str, key: str, pieces: list[_Piece], parameter: Tensor) -> list[Span] | None:
    """The pieces in order; None for a number. Raises ValueError unless they are the parameter's rows, each once."""
    slices = [piece.file.get_slice(key) for piece in pieces]
    shape = list(parameter.shape)
    if len(pieces) == 1 and pieces[0].total is None and slices[0].get_shape() == []:
        return None
    spans: list[Span] = []
    end = 0
    # A part without rows comes before the part that begins where it ends.
    for piece, part in sorted(zip(pieces, slices, strict=True), key=lambda pair: (pair[0].first, pair[1].get_shape())):
        if not shape or piece.total != shape[0] or part.get_shape()[1:] != shape[1:]:
            raise ValueError(f"{where} is not of the weight's shape {tuple(shape)}")
        if piece.first != end:
            raise ValueError(f"{where} has a gap or an overlap at row {end}")
        spans.append((end, end := end + part.get_shape()[0], part))
    if end != shape[0]:
        raise ValueError(f"{where} ends at row {end} of {shape[0]}")
    return spans


def _joined(where: str, spans: list[Span], first: int, last: int, parameter: Tensor) -> Tensor:
    """Rows [first, last), maybe none. Raises ValueError on a dtype that is neither the weight's nor fp32."""
    found = [part[max(first, begin) - begin : max(0, min(last, end) - begin)] for begin, end, part in spans]
    held = [rows for rows in found if len(rows)] or found[:1]  # no rows at all still have a dtype
    kinds = {rows.dtype for rows in held}
    if len(kinds) > 1 or not kinds <= {parameter.dtype, torch.float32}:
        raise ValueError(f"{where} is of {', '.join(sorted(map(str, kinds)))}, not of the weight's {parameter.dtype}")
    return torch.cat(held)


class Elsewhere(Exception):
    """Carries the error of another process."""


def in_step(work: Callable[[Swap], Returned], gather: Swap) -> Returned:
    """Run `work`, which swaps values, in all processes; an error in one is raised in all, at their next swap."""

    def swap(value: Any, error: Exception | None = None) -> list[Any]:
        values = []
        for each, failure in gather((value, error)):
            if failure is not None and error is None:
                raise Elsewhere(failure)
            values.append(each)
        return values

    try:
        found = work(swap)
        swap(None)  # an error after the last swap of `work` is raised in all, too
    except Elsewhere as elsewhere:
        raise elsewhere.args[0] from None
    except (ValueError, OSError, ArithmeticError, RuntimeError) as error:
        swap(None, error)  # the others wait in their next swap
        raise
    return found


def alone(value: Any) -> list[Any]:
    """The swap of a process that writes on its own."""
    return [value]
