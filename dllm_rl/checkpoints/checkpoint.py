"""Write and read checkpoints, from which a run continues bit for bit. Writing is atomic, reading verifies."""

import errno
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from dllm_rl import manifest
from dllm_rl.checkpoints.optimizer_shards import PATTERN, AllGather, Part, load_parts, single_process_gather, write_part
from dllm_rl.checkpoints.state import NAME, TrainingState
from dllm_rl.distributed.sharding import part_like
from dllm_rl.distributed.stop import as_written
from dllm_rl.files import recover, remove, remove_whole, replacing, write_text
from dllm_rl.models.base import Module, Policy, is_finite
from dllm_rl.models.checkpoint.adapters import adapter_state, save_adapter
from dllm_rl.models.lora import layers_of
from dllm_rl.models.merge import lazy_merged_tensors
from dllm_rl.records import folders_beside
from dllm_rl.versions import versions

_RECIPE_SETTINGS = ("betas", "weight_decay", "lr_scale")  # of an optimizer's parameter groups
# Errors that torch's loader raises on a damaged file.
_DAMAGE_ERRORS = (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError)
_NAME = re.compile(r"step-(\d{6,})")


SavedOptimizer = torch.optim.Optimizer | Part


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Content of a checkpoint: a policy, an optimizer and the run's state after the same step.

    Args:
        policy: Policy to save.
        optimizer: Optimizer to save, or this process's part of a sharded one.
        state: State of the run. Its `best_step` names a checkpoint that `save` never deletes.
        base: Folder or id of the base model of the policy's adapters. None (default): unknown.
        base_digest: Digest of that model's files. None (default): unknown.
        merged: Whether to save full weights. False saves only the adapters, and `base` must be known. Default: True.
        processes: Number of processes of the run. Default: 1.
        files: Content of further files, by name in the folder. Default: none.
    """

    policy: Policy
    optimizer: SavedOptimizer
    state: TrainingState
    base: str | None = None
    base_digest: str | None = None
    merged: bool = True
    processes: int = 1
    files: Mapping[str, bytes] = field(default_factory=dict)


def save(
    directory: Path,
    checkpoint: Checkpoint,
    *,
    keep_last: int,
    reserve: int = 0,
    swap: AllGather = single_process_gather,
) -> Path:
    """Write a checkpoint, and delete the older ones.

    Args:
        directory: Folder of the run's checkpoints. The checkpoint is written to `directory`/step-NNNNNN, and
            `directory`/latest then contains this name.
        checkpoint: Content of the checkpoint.
        keep_last: Number of the newest checkpoints that are not deleted.
        reserve: Bytes of disk space that must stay free for later checkpoints. Default: 0.
        swap: All-gather between the processes that write parts of the optimizer. Default: for one process.

    Returns:
        The folder of the checkpoint.

    Raises:
        FloatingPointError: A weight or an optimizer state is not finite. Nothing is written.
        OSError: The disk is full, or the write failed.
    """
    state = checkpoint.state
    check_finite(f"step {state.step} was not saved", _trained(checkpoint.policy, checkpoint.optimizer))
    directory.mkdir(parents=True, exist_ok=True)
    recover_all(directory)
    folder = folder_of(directory, state.step)
    with _check_disk_space(folder, checkpoint, reserve):
        with replacing(folder) as partial:  # renamed to `folder` when it is complete and on disk
            _write(partial, checkpoint, swap)
        write_text(directory / "latest", folder.name + "\n")
    for step, old in list_checkpoints(directory)[:-keep_last]:  # last, so that a failed save deletes nothing
        if step != state.best_step:
            remove_whole(old)
    return folder


def _write(folder: Path, checkpoint: Checkpoint, swap: AllGather) -> None:
    """Write the files of a checkpoint into a new folder, together with the processes that call `save_part`."""
    policy = checkpoint.policy
    folder.mkdir()
    swap(str(folder))  # tells the other processes where to write
    if checkpoint.merged:
        policy.save_pretrained(folder)
    if policy.lora is not None:
        save_adapter(policy, folder / "adapter", base=checkpoint.base, base_digest=checkpoint.base_digest)
    optimizer, entries = checkpoint.optimizer, {}
    if isinstance(optimizer, Part):
        entries = write_part(folder, optimizer)
    else:
        try:
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        except RuntimeError as error:  # torch's error for a failed write
            raise OSError(errno.EIO, f"optimizer.pt: {error}") from error
    checkpoint.state.write(folder)
    for name, data in checkpoint.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    described: dict[str, Any] = {}
    for entries_of_process in swap(entries):
        described |= entries_of_process
    step = checkpoint.state.step
    manifest.write(folder, step=step, processes=checkpoint.processes, versions=versions(), known=described)


def save_part(step: int, part: Part | None, swap: AllGather) -> None:
    """Write this process's part of a checkpoint that the main process saves. A process of another replica has none."""
    if part is not None:
        check_finite(f"step {step} was not saved", part.tensors)
    folder, *_ = swap(None)
    swap({} if part is None else write_part(Path(folder), part))


def recover_all(directory: Path) -> None:
    """Clean up after a process that was killed while it wrote a checkpoint. Only the writing process may call it."""
    for path in [*directory.glob(".step-*"), *directory.glob(".latest.*")]:
        recover(directory / path.name[1:].rpartition(".")[0])
    for stale in directory.glob(".partial-*"):
        remove(stale)


@contextmanager
def _check_disk_space(folder: Path, checkpoint: Checkpoint, reserve: int) -> Iterator[None]:
    """Raise OSError, which reports the free space, if a checkpoint does not fit or the block fails to write it."""
    policy = checkpoint.policy
    moments = sum(moment.nbytes for moment in _moments(policy, checkpoint.optimizer).values())
    if isinstance(checkpoint.optimizer, Part):
        moments = max(checkpoint.optimizer.nbytes, moments)  # of the parts of all processes
    needed = moments + reserve + (1 << 20)
    needed += sum(map(len, checkpoint.files.values()))
    needed += weights_size(policy.module) if checkpoint.merged else 0
    if policy.lora is not None:
        needed += sum(tensor.nbytes for tensor in adapter_state(policy).values())
    older = list_checkpoints(folder.parent)
    needed += _non_tensor_size(older[-1][1]) if older else 0

    def fault(why: str, number: int | None = None) -> OSError:
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            remedy = f"{(needed - free) / 1e6:.1f} MB are missing. Make room, or lower saves.total_limit"
        else:
            remedy = "which is enough. Look for a quota or a limit on file sizes (ulimit -f), or correct what failed"
        return OSError(
            errno.ENOSPC if needed > free else number or errno.EIO,
            f"{folder} was not saved: {why}; it takes {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free, {remedy}",
        )

    if shutil.disk_usage(folder.parent).free < needed:
        raise fault("the disk is full")
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise fault(str(error), getattr(error, "errno", None)) from error


def weights_size(module: Module) -> int:
    """Return the bytes of a module's weights in a checkpoint, where adapters are merged and weights not quantized."""
    return sum(tensor.nbytes for tensor in lazy_merged_tensors(layers_of(module)).values())


def _non_tensor_size(folder: Path) -> int:
    """Return the bytes of a checkpoint's files that are not tensors, such as the tokenizer."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if path.suffix not in (".safetensors", ".pt"))


def _moments(policy: Policy, optimizer: SavedOptimizer) -> dict[str, Tensor]:
    """Return the optimizer's state of each trained weight, by the name "KIND of WEIGHT"."""
    if isinstance(optimizer, Part):
        return optimizer.tensors
    moments = {}
    for name, parameter in policy.module.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                moments[f"{kind} of {name}"] = value
    return moments


def _trained(policy: Policy, optimizer: SavedOptimizer) -> dict[str, Tensor]:
    """Return trained weights, buffers and `_moments` by name. Frozen weights were checked when they were loaded."""
    weights = {name: weight.detach() for name, weight in policy.module.named_parameters() if weight.requires_grad}
    return weights | dict(policy.module.named_buffers()) | _moments(policy, optimizer)


def check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise FloatingPointError, whose message begins with `what`, if a number is not finite."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # each process checks its rows
        if local.is_floating_point() and not is_finite(local):
            raise FloatingPointError(f"{what}: {name} is not finite; resume from an earlier checkpoint")


def folder_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:06d}"


def set_aside(directory: Path, resumed: Path) -> list[Path]:
    """Rename the checkpoints that a resumed run will not use, and return the new paths.

    These are all later checkpoints, and the folder's checkpoint of the same step if the run resumes from elsewhere.
    `list_checkpoints` skips the new names.
    """
    step = TrainingState.read(resumed).step
    moved = []
    for number, folder in reversed(list_checkpoints(directory)):
        if number > step or (number == step and folder.resolve() != resumed.resolve()):
            free = folder.with_name(f"{folder.name}.set-aside")
            number_of_name = 1
            while free.exists():
                number_of_name += 1
                free = folder.with_name(f"{folder.name}.set-aside-{number_of_name}")
            moved.append(folder.rename(free))
    if (directory / resumed.name).exists():  # else the resumed checkpoint is in another folder
        write_text(directory / "latest", resumed.name + "\n")
    return moved


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every complete checkpoint, oldest first."""
    checkpoints = []
    for path in directory.iterdir() if directory.is_dir() else ():
        if named := _NAME.fullmatch(path.name):
            checkpoints.append((int(named[1]), path))
    return sorted(checkpoints)


def locate(
    which: str,
    directory: Path,
    *,
    quick: bool = False,
    unread: str | None = None,
    compare: Callable[[TrainingState], None] = lambda state: None,
    say: Callable[[str], None] = lambda text: None,
) -> Path | None:
    """Find the checkpoint to resume from, and verify it.

    Args:
        which: Path of a checkpoint, or "latest" for the newest undamaged checkpoint in `directory`.
        directory: Folder of the run's checkpoints.
        quick: Whether to skip reading all bytes. Default: False.
        unread: As for `manifest.verify`.
        compare: Function that raises ValueError if a checkpoint's state is of another run. It is called before all
            bytes are read.
        say: Function that reports a skipped checkpoint.

    Returns:
        The checkpoint. None if `which` is "latest" and there is no checkpoint.

    Raises:
        ValueError: The path is not a checkpoint, `compare` raised, or every checkpoint is damaged.
    """
    if which != "latest":
        path = Path(which)
        if not is_checkpoint(path):
            problem = "is not a checkpoint folder (no state.json)" if path.exists() else "does not exist"
            beside = "" if path.exists() else folders_beside(path)
            raise ValueError(f"resume_from_checkpoint={which!r} {problem}; give a checkpoint, or 'latest'{beside}")
        check(path, quick=True)
        compare(TrainingState.read(path))
        if not quick:
            check(path, unread=unread)
        return path
    skipped = []
    for _, folder in reversed(list_checkpoints(directory)):
        for is_quick in (True,) if quick else (True, False):
            try:
                check(folder, quick=is_quick, unread=unread)
            except ValueError as error:
                say(f"skipped {error}")
                skipped.append(str(error))
                break
            if is_quick:
                compare(TrainingState.read(folder))
        else:
            return folder
    if skipped:
        why = f"no checkpoint is whole ({'; '.join(skipped)}); start again with {as_written(overwrite_output_dir=True)}"
        raise ValueError(f"resume_from_checkpoint='latest': {why}")
    return None


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder has a checkpoint's state or manifest. The checkpoint may be damaged."""
    return (path / NAME).is_file() or (path / manifest.NAME).is_file()


def check(folder: Path, *, quick: bool = False, unread: str | None = None) -> None:
    """Raise ValueError if a checkpoint is damaged, lacks a file, or has files of different steps."""
    content = manifest.read(folder)
    name = _NAME.fullmatch(folder.name)
    if name and int(name[1]) != content["step"]:  # a user has renamed the folder
        raise ValueError(f"{folder}: step is {content['step']} in {manifest.NAME}, but {int(name[1])} in its name")
    manifest.verify(folder, quick=quick, unread=unread)
    step = TrainingState.read(folder).step
    if step != content["step"]:
        raise ValueError(f"{folder}: step is {step} in state.json, but {content['step']} elsewhere")


def load_optimizer(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, *, may_be_empty: bool = False
) -> None:
    """Load the optimizer's state from a checkpoint. Raise ValueError if a file is damaged or a value is impossible.

    `may_be_empty`: replay alone trains the run, so that before the first right answer there are no moments.
    """
    if (source := next(folder.glob(PATTERN), None)) is not None:
        load_parts(folder, policy, optimizer)
    else:
        source = folder / "optimizer.pt"
        _load_whole(folder, optimizer)
    if isinstance(optimizer, torch.optim.AdamW) and (optimizer.state or not may_be_empty):
        for name, parameter in policy.module.named_parameters():
            if policy.weights_version and parameter.requires_grad and parameter not in optimizer.state:
                raise ValueError(
                    f"{folder}: {source.name} holds no moments of {name}, after {policy.weights_version} updates"
                )
    try:
        check_finite(f"{folder}: {source.name} is damaged", _trained(policy, optimizer))
    except FloatingPointError as error:
        raise ValueError(str(error)) from None


def _load_whole(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    path = folder / "optimizer.pt"
    # If the weights are sharded, each process reads only its part of the tensors from the memory-mapped file.
    is_sharded = any(isinstance(p, DTensor) for p in parameters)
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=is_sharded)
        for index, weight_state in state["state"].items():
            weight_state |= {kind: part_like(value, parameters[index]) for kind, value in weight_state.items()}
        # AdamW's param_groups have only settings, which a resumed run takes from its recipe. Other optimizers may keep
        # state there besides these settings.
        groups = optimizer.state_dict()["param_groups"]
        if not isinstance(optimizer, torch.optim.AdamW):
            for own, stored in zip(groups, state["param_groups"], strict=True):
                own |= {name: value for name, value in stored.items() if name not in _RECIPE_SETTINGS}
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    except FileNotFoundError:
        raise ValueError(f"{folder}: {path.name} is missing") from None
    except _DAMAGE_ERRORS as error:
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{folder}: {path.name} is damaged: {why}") from None
