"""A checkpoint's tensors: read them, convert them between the original layout and a stock class's, and write them."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dllm_rl.models.base import FamilySpec

State = dict[str, Tensor]

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ATTENTION = "model.layers.*.self_attn"
QKV = ("q_proj", "k_proj", "v_proj")
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MAX_FILE_SIZE = 5 * 10**9  # bytes of a file of weights; a save has one file at a time in memory
SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja", ".py")  # files of a checkpoint that the libraries open


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is computed when it is written, so that a save has at most one shard of tensors in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel() * self.dtype.itemsize


def check_regular(folder: Path) -> None:
    """Raise ValueError for a FIFO, a device or a directory in place of a file."""
    # Reading a FIFO might never end. is_file() follows links: the hub's cache consists of them.
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        if not path.is_file() and (path.suffix in SUFFIXES or not path.is_dir()):
            raise ValueError(f"{folder}: {path.name} is not a regular file; fetch the checkpoint again")


def read_tensors(directory: Path) -> State:
    """Return all tensors of a folder's safetensors files, memory-mapped. Raise ValueError if there are no files."""
    files = weight_files(directory)
    if not files:
        raise ValueError(f"{directory}: no {SINGLE_FILE} or {INDEX}; convert the checkpoint to safetensors")
    state: State = {}
    for file in files:
        state |= load_file(directory / file)
    return state


def weight_files(directory: Path) -> list[str]:
    """Return the names of a folder's safetensors files.

    Raise ValueError for an index that names a missing file or one outside the folder, or that leaves out a file with
    all weights.
    """
    index = directory / INDEX
    has_single_file = (directory / SINGLE_FILE).exists()
    if not index.exists():
        return [SINGLE_FILE] if has_single_file else []
    files = sorted(set(map(str, json.loads(index.read_text())["weight_map"].values())))
    if has_single_file and SINGLE_FILE not in files:  # transformers would read it, other tools the files of the index
        raise ValueError(
            f"{directory}: {SINGLE_FILE} and the files of {INDEX} are two sets of weights; delete the one that is not "
            "the model's"
        )
    for name in files:
        if name in ("", ".", "..") or Path(name).name != name or PureWindowsPath(name).name != name:
            raise ValueError(
                f"{directory}: {INDEX} names {name!r}, which is not a file of the folder; correct the index"
            )
        if not (directory / name).exists():
            raise ValueError(f"{directory}: {name} is listed in {INDEX} but missing; fetch the checkpoint again")
    return files


def shapes_and_dtypes(directory: Path, files: Sequence[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Return shapes and dtypes by name, from the headers of safetensors files. No tensor is read."""
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for name in files:
        (directory / name).open("rb").close()  # for an unreadable file, safetensors would report that it is missing
        with safe_open(directory / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a file is not a mapping)
                shapes[key] = file.get_slice(key).get_shape()
                dtypes[key] = file.get_slice(key).get_dtype()
    return shapes, dtypes


def write_tensors(state: Mapping[str, Tensor | LazyTensor], directory: Path, *, max_shard_size: int) -> None:
    """Write safetensors files of at most max_shard_size bytes (or one larger tensor), and an index for several files.

    The tensors of one file are computed, copied to the CPU and written before those of the next file.
    """
    shards: list[list[str]] = [[]]
    bytes_left = max_shard_size
    for name, tensor in state.items():
        if tensor.nbytes > bytes_left and shards[-1]:  # a tensor that is too large gets its own shard
            shards.append([])
            bytes_left = max_shard_size
        shards[-1].append(name)
        bytes_left -= tensor.nbytes
    remove_weights(directory)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else [SINGLE_FILE]
    for file, names in zip(files, shards, strict=True):
        tensors = {}
        for name in names:
            given = state[name]
            tensor = (given.make() if isinstance(given, LazyTensor) else given).detach().cpu()
            # safetensors writes complete storages, so that a part of one must be copied.
            fills_storage = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            tensors[name] = tensor if fills_storage else tensor.clone(memory_format=torch.contiguous_format)
        save_file(tensors, directory / file, {"format": "pt"})
    if len(files) > 1:
        weight_map: dict[str, str] = {}
        for file, names in zip(files, shards, strict=True):
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": sum(x.nbytes for x in state.values())}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def remove_weights(directory: Path) -> None:
    """Delete a folder's weights, because a later load would read them beside new ones of other file names."""
    for old in [*directory.glob("model*.safetensors"), *directory.glob(INDEX)]:
        old.unlink()


def mismatched_tensors(state: State, module_state: State) -> list[str]:
    """Return the names of tensors that are in only one of the two states, or that differ in shape or dtype.

    All floating-point dtypes count as equal, because a copy casts between them.
    """
    matching = []
    for name in state.keys() & module_state.keys():
        stored, target = state[name], module_state[name]
        has_same_kind = stored.dtype == target.dtype or {stored.dtype, target.dtype} <= {*FLOAT_DTYPES}
        if stored.shape == target.shape and has_same_kind:
            matching.append(name)
    return sorted((state.keys() | module_state.keys()).difference(matching))


def stock_to_original(spec: FamilySpec) -> tuple[tuple[str, str], ...]:
    """Return a family's pairs (stock class's name, original name), for `rename_tensor`."""
    return tuple((stock, original) for original, stock in spec.files.tensor_names)


def rename_tensor(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    """Rename a tensor by the first pair (from, to) that matches its name, or its name without the last part.

    If no pair matches, return the name unchanged. A `*` matches a number.
    """
    stem, _, leaf = name.rpartition(".")
    for source, target in pairs:
        pattern = re.escape(source).replace(r"\*", r"(\d+)")
        for candidate, suffix in ((name, ""), (stem, f".{leaf}")):
            match = re.fullmatch(pattern, candidate)
            if match:
                return target.replace("*", match[1]) + suffix if match.groups() else target + suffix
    return name


def to_stock(state: State, spec: FamilySpec, config: Any) -> State:
    """Rename original tensors to the stock class's names, and split fused query-key-value rows."""
    out = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        parent = spec.files.fused_qkv and rename_tensor(stem, ((spec.files.fused_qkv, ATTENTION),))
        if parent and parent != stem:
            heads = [config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads]
            rows = [number * config.head_dim for number in heads]
            for part, value in zip(QKV, tensor.split(rows), strict=True):
                out[f"{parent}.{part}.{leaf}"] = value.clone()  # a view would keep the fused tensor in memory
        else:
            out[rename_tensor(name, spec.files.tensor_names)] = tensor
    return out


def to_original(state: dict[str, LazyTensor], spec: FamilySpec, config: Any) -> dict[str, LazyTensor]:
    """Rename the stock class's tensors to the original names: the exact inverse of `to_stock`."""
    # Tied tensors are written once. If the checkpoint's tensors differ although its config ties them, write both.
    head, embedding = (state.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if config.tie_word_embeddings and head and embedding and torch.equal(head.make(), embedding.make()):
        state = {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}
    out = {}
    names = stock_to_original(spec)
    for name, tensor in split_experts(state).items():
        stem, _, leaf = name.rpartition(".")
        attention, _, projection = stem.rpartition(".")
        fused = spec.files.fused_qkv and rename_tensor(attention, ((ATTENTION, spec.files.fused_qkv),))
        if fused and fused != attention and projection in QKV:
            if projection == QKV[0]:  # one fused tensor replaces the three
                out[f"{fused}.{leaf}"] = _concatenate([state[f"{attention}.{p}.{leaf}"] for p in QKV])
        else:
            out[rename_tensor(name, names)] = tensor
    return out


def _concatenate(parts: list[LazyTensor]) -> LazyTensor:
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor((rows, *parts[0].shape[1:]), parts[0].dtype, lambda: torch.cat([part.make() for part in parts]))


def split_experts(state: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Split a stock class's stacked experts into one tensor per expert and projection, as checkpoints store them."""
    out = {}
    compute_stack = lru_cache(maxsize=1)(lambda name: state[name].make())  # computed once for all experts of a stack
    for name, tensor in state.items():
        is_gate_up = name.endswith(".mlp.experts.gate_up_proj")
        if not is_gate_up and not name.endswith(".mlp.experts.down_proj"):
            out[name] = tensor
            continue
        prefix = name.rpartition(".")[0]
        num_experts, rows, columns = tensor.shape
        projections = ("gate_proj", "up_proj") if is_gate_up else ("down_proj",)
        size = rows // len(projections)
        for expert in range(num_experts):
            for i, projection in enumerate(projections):
                make = partial(_expert_rows, compute_stack, name, expert, i * size, size)
                out[f"{prefix}.{expert}.{projection}.weight"] = LazyTensor((size, columns), tensor.dtype, make)
    return out


def _expert_rows(compute_stack: Callable[[str], Tensor], name: str, expert: int, first: int, count: int) -> Tensor:
    return compute_stack(name)[expert, first : first + count]
