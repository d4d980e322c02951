"""State of a sharded optimizer: one safetensors file per process, which any number of processes can load.

torch.distributed.checkpoint (DCP) is not used: it reads pickles, which can run code.
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
    path = folder / file_name(part.number, part.count)
    try:
        save_file(part.tensors, path, {"rows": json.dumps(part.rows), "plain": json.dumps(part.plain)})
        flush(path)
    except (OSError, SafetensorError) as error:
        raise OSError(errno.EIO, f"{path} was not saved: {error}") from error
    return {path.name: manifest.describe(path)}


def load_parts(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Load this process's rows of the optimizer's state from the parts in a folder.

    Raises:
        ValueError: The parts do not fit the policy.
    """
    parameters = dict(policy.module.named_parameters())
    ordered = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameter_index = {id(parameter): place for place, parameter in enumerate(ordered)}
    state: dict[int, dict[str, Any]] = {}
    with ExitStack() as stack:
        plain_values: dict[str, Any] = {}
        files_of: dict[str, list[Any]] = {}  # the files with rows of a tensor, in the order of the rows
        for path in sorted(folder.glob(PATTERN)):
            file = stack.enter_context(safe_open(path, "pt"))
            plain_values |= json.loads(file.metadata()["plain"])
            for key in sorted(file.keys()):
                files_of.setdefault(key, []).append(file)
        for key in [*files_of, *plain_values]:
            kind, _, name = key.partition(" of ")
            if name not in parameters or id(parameters[name]) not in parameter_index:
                raise ValueError(f"{folder}: {key!r} in the optimizer's state belongs to no trained weight")
            parameter = parameters[name]
            value = _own_rows(folder, key, files_of[key], parameter) if key in files_of else plain_values[key]
            state.setdefault(parameter_index[id(parameter)], {})[kind] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _own_rows(folder: Path, key: str, files: list[Any], parameter: Tensor) -> Tensor:
    """Return this process's rows of a tensor, sharded like the parameter."""
    if not files[0].get_slice(key).get_shape():  # a number, the same in all processes
        return files[0].get_tensor(key)
    own, first = parameter, 0
    if isinstance(parameter, DTensor):
        own, mesh = parameter.to_local(), parameter.device_mesh
        first = first_row(len(parameter), mesh.get_local_rank(mesh.ndim - 1), mesh.shape[-1])
    pieces, begin = [], 0
    for file in files:
        rows = file.get_slice(key)
        end = begin + rows.get_shape()[0]
        pieces.append(rows[max(first, begin) - begin : max(0, min(first + len(own), end) - begin)])
        begin = end
    value = torch.cat(pieces)
    if begin != len(parameter) or value.shape != own.shape:
        raise ValueError(f"{folder}: {key!r} in the optimizer's state does not have the weight's shape")
    if not isinstance(parameter, DTensor):
        return value
    layout: dict[str, Any] = {"run_check": False, "shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(value.to(own.device), parameter.device_mesh, parameter.placements, **layout)


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
