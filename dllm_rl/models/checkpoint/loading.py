"""Load a checkpoint's folder as a stock module, a tokenizer and a spec, and write it back in the same layout."""

import json
import math
import re
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from logging import ERROR, LogRecord, getLogger
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from dllm_rl.files import read_json
from dllm_rl.identity import digest_of_files, digest_of_value
from dllm_rl.models.base import (
    FamilySpec,
    Module,
    Policy,
    Tokenizer,
    encode_block_causal,
    encode_esm,
    encode_roberta,
    is_finite,
    mlm_head,
)
from dllm_rl.models.checkpoint.families import (
    CUSTOM_HINT,
    CUSTOM_SPEC_FIELD,
    FAMILY_FIELD,
    find_family,
    stock_class,
)
from dllm_rl.models.checkpoint.rope import rotate_in_float32
from dllm_rl.models.checkpoint.tensors import (
    FLOAT_DTYPES,
    MAX_FILE_SIZE,
    SUFFIXES,
    LazyTensor,
    check_regular,
    read_tensors,
    remove_weights,
    shapes_and_dtypes,
    to_original,
    to_stock,
    weight_files,
    write_tensors,
)
from dllm_rl.models.denoiser import share_layers
from dllm_rl.models.lora import has_adapted_or_low_bit
from dllm_rl.models.merge import lazy_merged_tensors, merged_copy, merged_state_dict
from dllm_rl.records import folders_beside
from dllm_rl.screen import escape_controls, without_middle

# Errors that transformers, safetensors and json raise for damaged files.
_DAMAGED = (
    *(SafetensorError, StrictDataclassError, UnpicklingError, json.JSONDecodeError, UnicodeDecodeError),
    *(RuntimeError, LookupError, ArithmeticError, TypeError, AttributeError, AssertionError),
)
ADAPTER_CONFIG = "adapter_config.json"
FLOAT_DTYPE_NAMES = ("F64", "F32", "F16", "BF16")  # of FLOAT_DTYPES, in a safetensors header
LOAD_ADAPTER_HINT = "open the base, and call dllm_rl.models.checkpoint.adapters.load_adapter with it and this folder"
_QUIET = ContextVar("_QUIET", default=False)  # whether this thread is in `quiet_progress`
MAX_COUNT = 1_000_000  # largest number of layers, heads, experts or labels in a config
# Files beside the weights that say what a checkpoint computes: its config, end tokens, tokenizer and chat template.
READ = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.json"),
)
# Fields of a config that choose an implementation of attention or experts.
IMPLEMENTATION_FIELDS = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
CONFIGS = Path(__file__).parents[1] / "configs"  # OWNER--NAME.json: the config.json of the hub's OWNER/NAME


def load_module(
    folder: Path,
    *,
    dtype: torch.dtype | str,
    block_size: int | None = None,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Module, PreTrainedTokenizerBase, FamilySpec]:
    """Load a checkpoint's module, tokenizer and spec.

    Raise ValueError for missing or unexpected tensors and damaged files.
    """
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    with name_in_errors(folder):
        raw = read_config(folder, block_size)
        family = find_family(raw)
        files = weight_files(folder)
        shapes, dtypes = shapes_and_dtypes(folder, files)
        if raw.get("quantization_config") is not None:
            raise ValueError(
                f"{folder}: config.json has a quantization_config; give the checkpoint in 16 or 32 bits, and quantize "
                "it with base_quantization or rollout_quantization"
            )
        if raw.get("transformers_weights") is not None:  # transformers would load this file, and the checks read others
            raise ValueError(
                f"{folder}: config.json names a file of weights, transformers_weights={raw['transformers_weights']!r}; "
                "delete the field, and give the file its usual name"
            )
        if files and (folder / ADAPTER_CONFIG).is_file():
            raise ValueError(
                f"{folder} has a model's weights ({files[0]}) and adapters ({ADAPTER_CONFIG}); give a folder with one "
                "of the two"
            )
        tokenizer = load_tokenizer(folder, stock=family.files.stock_model is None)
        options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
        num_stored = sum(map(prod, shapes.values()))
        if files:
            sizes = {name: p.numel() for name, p in build_empty(raw, folder).named_parameters()}
            # Checked before the module is allocated. The factor is 2 because a checkpoint may omit tied tensors.
            if (num_parameters := sum(sizes.values())) > 2 * num_stored:
                raise RuntimeError(
                    f"config.json describes {num_parameters:,} parameters, but the files have {num_stored:,} numbers"
                )
            check_dtypes(dtypes, sizes if family.files.stock_model is None else None, folder)
        if quantization is not None:
            if family.attention == "encoder_decoder":
                raise ValueError(
                    f"quantization={quantization!r} would separate the weights that encoder and decoder share; leave "
                    "it at None"
                )
            options["quantization_config"] = bitsandbytes_config(quantization, dtype, masked=family.head is mlm_head)
            options["device_map"] = {"": device}  # otherwise bitsandbytes would use the first GPU
        with quiet_progress():
            cls, config = class_and_config(raw, family)
            if family.files.stock_model is None:
                module, report = cls.from_pretrained(folder, config=config, **options)
            else:
                state = to_stock(read_tensors(folder), family, config)
                if dtype == "auto":  # some tensors may differ, such as an fp32 expert bias in a bf16 checkpoint
                    options["dtype"] = main_dtype(state)
                module, report = cls.from_pretrained(None, config=config, state_dict=state, **options)
                # transformers 5.24 keeps GLM-4's routers in fp32. A cast changes no result, because their products are
                # in fp32 anyway. FSDP needs, and the published files have, all weights of a layer in one dtype.
                for parameter in module.parameters():
                    if parameter.is_floating_point():  # not the integer codes of bitsandbytes
                        parameter.data = parameter.data.to(options["dtype"])
        check_report(report, family, folder)
        spec = family_spec(module.config, tokenizer, raw=raw, folder=folder, block_size=block_size)
        if family.files.stock_model is not None:  # `from_pretrained` did not read generation_config.json
            module.generation_config.eos_token_id = list(spec.eos_ids)
    return prepare_in_place(module if quantization else module.to(device), spec), tokenizer, spec


def build_empty(raw: dict, source: str | Path = "config.json") -> Module:
    """Build a stock module from config fields, on the meta device, where tensors have no storage.

    Error messages name `source`.
    """
    family = find_family(raw)
    with name_in_errors(source), torch.device("meta"):
        cls, config = class_and_config(raw, family)
        return prepare_in_place(cls(config), family)


def class_and_config(raw: dict, family: FamilySpec) -> tuple[Any, Any]:
    """Return a family's stock class, and its config from a checkpoint's fields."""
    if family.files.stock_model is not None:
        cls, config = family.files.stock_model(without_implementation_fields(raw))
        setattr(config, FAMILY_FIELD, family.name)
        if family.attention == "block_causal":
            config.block_size = raw.get("block_size") or family.block_size
        return cls, config
    cls = stock_class(raw)
    return cls, cls.config_class.from_dict(without_implementation_fields(raw))


def read_config(folder: Path, block_size: int | None = None) -> dict[str, Any]:
    """Return the fields of a checkpoint's config.json; for adapters, those of their base model's.

    A `block_size` replaces the file's, and is later saved.

    Raise ValueError if the folder has no config.json (the message says what the folder is instead) or a number in it is
    not possible.
    """
    if (adapter := adapter_folder(folder)) is not None:
        return read_config(base_of_adapter(adapter), block_size)
    path = folder / "config.json"
    try:
        raw = json.loads(path.read_bytes())
    except FileNotFoundError:
        if weight_files(folder):
            raise ValueError(
                f"{folder} has weights without a config.json, as saved from a custom module: {CUSTOM_HINT}"
            ) from None
        inside = sorted(file.parent for file in folder.glob("*/config.json"))
        given = f"one of those in it, such as {inside[-1]}" if inside else "a checkpoint's folder"
        raise ValueError(f"{folder} has no config.json: it is not a checkpoint; give {given}") from None
    except ValueError:  # neither UTF-8 nor JSON
        raise ValueError(f"{path} is damaged: it is not JSON; fetch the checkpoint again") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is damaged: it is not a JSON object; fetch the checkpoint again")
    check_numbers(raw, folder)
    return raw if block_size is None else raw | {"block_size": block_size}


def has_known_family(folder: Path) -> bool:
    """Return whether `load_policy` opens a folder with full weights.

    The folder of a custom module or spec needs `into`: of a class that is not in transformers, of a module without a
    config, or of a policy whose spec is not the family's.
    """
    if not (folder / "config.json").exists():
        return False
    raw = read_config(folder)
    try:
        find_family(raw)
    except ValueError:
        return False
    return True


def adapter_folder(folder: Path) -> Path | None:
    """Return the folder of the adapters, for a folder with only adapters (a run's checkpoint, or peft's).

    Return None for a folder that has weights or no adapters.
    """
    if weight_files(folder):
        return None
    if (folder / ADAPTER_CONFIG).is_file():  # some tools write the base's config.json beside it
        return folder
    is_of_run = not (folder / "config.json").exists() and (folder / "adapter" / ADAPTER_CONFIG).is_file()
    return folder / "adapter" if is_of_run else None


def base_of_adapter(adapter: Path) -> Path:
    """Return the folder of the base model that saved adapters name. Raise ValueError for no name or a missing base."""
    base = named_base(adapter)
    try:
        return checkpoint_folder(base)
    except ValueError:
        raise ValueError(
            f"{adapter} has only adapters, and their base {base!r} is missing; put it back, name another folder "
            f"or hub id in adapter_config.json, or {LOAD_ADAPTER_HINT}"
        ) from None


def named_base(adapter: Path) -> str:
    """Return the folder or hub id of the base model that saved adapters name. Raise ValueError for no name."""
    config = read_json(adapter / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise ValueError(f"{adapter}: base_model_name_or_path={base!r} names no base; {LOAD_ADAPTER_HINT}")
    if not base.startswith(".."):
        return base
    # The base of a run with a warm-up is in the run's folder: it is relative to the adapters, because the folder may
    # move. peft stores a path as it was given, relative to the working directory.
    found = {path.resolve(): str(path) for path in (adapter / base, Path(base)) if path.is_dir()}
    if len(found) > 1:
        raise ValueError(
            f"{adapter}: base_model_name_or_path={base!r} names {' and '.join(map(repr, found.values()))}, as seen "
            "from the adapters and from here; give it as an absolute path in adapter_config.json"
        )
    return next(iter(found.values()), base)


def digest_of_checkpoint(folder: Path) -> str:
    """Return the digest of all bytes of a checkpoint's weights, config and tokenizer, and of the base of adapters."""
    if (adapter := adapter_folder(folder)) is not None:
        own = digest_of_files(adapter, ["adapter_config.json", "adapter_model.safetensors"])
        return digest_of_value([own, digest_of_checkpoint(base_of_adapter(adapter))])
    return digest_of_files(folder, [*weight_files(folder), *(name for name in READ if (folder / name).is_file())])


def main_dtype(state: Mapping[str, torch.Tensor | LazyTensor]) -> torch.dtype:
    """Return the dtype of most elements, over all tensors."""
    counts = Counter[torch.dtype]()
    for tensor in state.values():
        counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0]


def check_numbers(fields: Any, folder: str | Path, name: str = "config.json") -> None:
    """Raise ValueError for a count above MAX_COUNT, and for a number that is NaN or infinite, at any depth."""
    if isinstance(fields, dict | list):
        for key, value in fields.items() if isinstance(fields, dict) else ((name, value) for value in fields):
            # A list may be a range without an upper end: the time_step_limit of Mamba is [0, Infinity].
            if not (isinstance(fields, list) and value == math.inf):
                check_numbers(value, folder, key)
    # transformers allocates this many labels, heads or experts before it compares the count with any tensor.
    elif isinstance(fields, int) and name.startswith(("num_", "n_")) and fields > MAX_COUNT:
        raise ValueError(f"{folder}: {name}={fields:.6g} is more than {MAX_COUNT}; correct config.json")
    elif isinstance(fields, float) and not math.isfinite(fields):
        raise ValueError(f"{folder}: {name}={fields} is not finite; correct config.json")


def without_implementation_fields(fields: Any) -> Any:
    """Return a config without the fields that choose an implementation, at any depth."""
    if isinstance(fields, dict):  # transformers would download a kernel that such a field names from the hub
        return {
            name: without_implementation_fields(value)
            for name, value in fields.items()
            if not IMPLEMENTATION_FIELDS.fullmatch(name)
        }
    return [without_implementation_fields(value) for value in fields] if isinstance(fields, list) else fields


def check_dtypes(dtypes: dict[str, str], parameters: Collection[str] | None, folder: Path) -> None:
    """Raise ValueError for a weight of a dtype that transformers would cast silently: integers, flags, complex, 8 bits.

    `parameters` are the names of the module's parameters. Other tensors, such as BERT's position ids, may have any
    dtype. None: all tensors are weights.
    """
    for name, dtype in dtypes.items():
        # One of the two names may have a prefix that the other lacks.
        is_weight = parameters is None or any(
            f".{parameter}".endswith(f".{name}") or name.endswith(f".{parameter}") for parameter in parameters
        )
        if dtype not in FLOAT_DTYPE_NAMES and is_weight:
            raise ValueError(
                f"{folder}: {name} has dtype {dtype}, but weights have {', '.join(FLOAT_DTYPE_NAMES)}; convert it"
            )


@torch.no_grad()
def check_finite(module: Module, folder: str | Path) -> None:
    """Raise ValueError for weights that are NaN or infinite."""
    for name, parameter in module.named_parameters():
        if parameter.dtype in FLOAT_DTYPES and not is_finite(parameter):
            raise ValueError(f"{folder}: {name} has NaN or infinite numbers; the checkpoint is damaged")


def prepare_in_place(module: Module, spec: FamilySpec) -> Module:
    """Apply the family's changes to a stock module, in place, and return it."""
    if spec.float32_rope:
        rotate_in_float32(module)
    if spec.attention == "encoder_decoder":
        share_layers(module)
    for layer in module.modules():
        # On a CPU, bitsandbytes would convert 4-bit weights to bf16 scales at the first forward without gradients. The
        # model that scores would then differ from the model that is trained.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return module


def check_report(report: dict, family: FamilySpec, folder: Path) -> None:
    """Raise ValueError if transformers reports a missing or unexpected tensor, or one of another shape."""
    ignored = re.compile("|".join(family.files.ignored_tensors) or r"(?!)")  # (?!) matches nothing
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(name for name in map(str, report[kind]) if not ignored.fullmatch(name))
        if names:
            raise ValueError(f"{folder}: {kind} {names[:5]}; the checkpoint is not a complete {family.name}")


def family_spec(
    config: Any,
    tokenizer: Tokenizer,
    *,
    raw: dict[str, Any],
    folder: Path | None = None,
    generation: Any = None,
    block_size: int | None = None,
) -> FamilySpec:
    """Return the family's spec with this checkpoint's ids and limits.

    Args:
        config: Config of the module.
        tokenizer: Tokenizer of the checkpoint.
        raw: Fields of config.json, or of the module's config.
        folder: Folder of the checkpoint. None: the module was not loaded from a folder.
        generation: Generation config of the module, if there is no `folder`.
        block_size: Block size that replaces the checkpoint's. None: the checkpoint's.

    Raises:
        ValueError: The mask id is missing or outside the vocabulary, or the block size does not apply to the family.
    """
    family = find_family(raw)
    config = config.get_text_config()  # for a model with images, the config of its text part
    generation_eos_ids = getattr(generation, "eos_token_id", None)
    if folder and (generation_file := folder / "generation_config.json").exists():
        generation_eos_ids = json.loads(generation_file.read_text()).get("eos_token_id")
    changes: dict[str, Any] = {"max_length": num_positions(config, family)}
    if family.attention == "encoder_decoder":
        changes |= {"vocab_size": config.vocab_size, "block_size": raw.get("canvas_length")}
    elif family.attention != "causal":
        changes["mask_id"] = find_mask_id(config, tokenizer, family)
    changes["eos_ids"] = find_eos_ids(config, tokenizer, family, generation_eos_ids, mask_id=changes.get("mask_id"))
    if family.attention == "block_causal":
        changes["block_size"] = block_size or raw.get("block_size") or family.block_size
        changes["encode"] = partial(encode_block_causal, spec=replace(family, **changes))
    elif block_size not in (None, changes.get("block_size")):
        raise ValueError(
            f"block_size={block_size} is for block-causal models, but {family.name} has {family.attention} attention; "
            "leave it out"
        )
    if family.files.stock_model:
        changes["files"] = replace(family.files, original_config=raw, folder=str(folder) if folder else None)
    return replace(family, **changes)


def num_positions(config: Any, family: FamilySpec) -> int | None:
    """Return the number of tokens that a row of a checkpoint's model may have; None if its config sets no limit.

    Raises:
        ValueError: The model counts positions from a padding token that is outside the vocabulary.
    """
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None or family.encode not in (encode_roberta, encode_esm):
        return positions
    if not 0 <= config.pad_token_id < config.vocab_size:
        raise ValueError(f"pad_token_id={config.pad_token_id} is outside the vocabulary; correct config.json")
    return positions - (config.pad_token_id + 1)  # they count positions from pad_token_id + 1


def find_mask_id(config: Any, tokenizer: Tokenizer, family: FamilySpec) -> int:
    """Return the mask id of the config, the tokenizer, the family's `mask_names` or the family, in this order.

    Raise ValueError if there is none, if the config and the tokenizer disagree, or if it is outside the vocabulary.
    """
    # If the tokenizer has two of the names, neither is used: which of them was trained as the mask is unknown.
    named_ids = set(map(tokenizer.get_vocab().get, family.files.mask_names)) - {None}
    named_id = named_ids.pop() if len(named_ids) == 1 else None
    # In a vocabulary of another size, the family's id is an ordinary token.
    family_id = family.mask_id if config.vocab_size == family.files.mask_vocabulary else None
    candidates = (getattr(config, "mask_token_id", None), tokenizer.mask_token_id, named_id, family_id)
    mask_id = next((token for token in candidates if token is not None), None)
    if mask_id is None:
        default = (
            f" (the {family.name} default {family.mask_id} belongs to a vocabulary of {family.files.mask_vocabulary})"
        )
        raise ValueError(
            f"mask_token_id is neither in the config nor in the tokenizer, for a vocabulary of {config.vocab_size} "
            f"tokens{'' if family.mask_id is None else default}; set mask_token_id in config.json, or "
            "tokenizer.mask_token"
        )
    if tokenizer.mask_token_id not in (None, mask_id):
        raise ValueError(
            f"mask_token_id={mask_id} in the config, but the tokenizer's mask token {tokenizer.mask_token!r} is "
            f"{tokenizer.mask_token_id}; correct one of them"
        )
    if not 0 <= mask_id < config.vocab_size:
        raise ValueError(
            f"mask_token_id={mask_id} is outside the vocabulary of {config.vocab_size} tokens; set it in config.json"
        )
    return mask_id


def find_eos_ids(
    config: Any,
    tokenizer: Tokenizer,
    family: FamilySpec,
    generation_eos_ids: Any = None,
    *,
    mask_id: int | None = None,
) -> tuple[int, ...]:
    """Return the ids that end a completion: the config's, the generation config's, the tokenizer's and the family's; of
    a masked language model without any, its separator, [SEP], or, without that, its first token, [CLS].
    """
    config_eos_ids = getattr(config, "eos_token_id", None)
    # A config without the id has its class's default, which in another vocabulary may be the mask: 2 of EsmConfig is
    # the mask of Nucleotide Transformer. transformers saves the default as if it had been given.
    if mask_id is not None and config_eos_ids == mask_id == getattr(type(config), "eos_token_id", None):
        config_eos_ids = None
    ids = [tokenizer.eos_token_id, *map(tokenizer.get_vocab().get, family.files.end_tokens)]
    for eos_ids in (generation_eos_ids, config_eos_ids):  # each an id, a list of ids or None
        ids = [*(eos_ids if isinstance(eos_ids, list | tuple) else [eos_ids]), *ids]
    if family.head is mlm_head and not any(token is not None for token in ids):
        separators = (getattr(tokenizer, name, None) for name in ("sep_token_id", "cls_token_id"))
        ids = [next((token for token in separators if token is not None), None)]
    return tuple(dict.fromkeys(token for token in ids if token is not None and token < config.vocab_size))


def load_tokenizer(folder: Path, *, stock: bool) -> PreTrainedTokenizerBase:
    """Load a stock tokenizer from the checkpoint's files, without running its code.

    With `stock`, the model's class is a stock class, and the tokenizer's class may be any class of transformers.
    """
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    if stock and "auto_map" not in config:  # auto_map names a class in the checkpoint's code
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if (folder / "tokenizer.json").exists():
        cls = transformers.PreTrainedTokenizerFast
    elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        cls = transformers.Qwen2Tokenizer
    else:
        raise ValueError(
            f"{folder}: tokenizer_class={config.get('tokenizer_class')!r} asks for remote code, which is never run; "
            "add a tokenizer.json, or vocab.json and merges.txt"
        )
    tokenizer = cls.from_pretrained(folder)
    for expected_id, token in config.get("added_tokens_decoder", {}).items():
        token_id = tokenizer.convert_tokens_to_ids(token["content"])
        if token_id != int(expected_id):
            raise ValueError(
                f"{folder}: token {token['content']!r} is {token_id}, not {expected_id}; add a tokenizer.json"
            )
    return tokenizer


def checkpoint_folder(path_or_id: str | Path) -> Path:
    """Return the folder itself, for a run's folder that of its newest checkpoint; or download a hub id (owner/name) and
    return its folder.
    """
    path = Path(path_or_id).expanduser()
    if str(path_or_id) and path.is_dir():
        path = newest_checkpoint(path)
        check_regular(path)
        return path
    check_hub_id(path_or_id)
    # Pickled weights are not downloaded: they run code when they are opened.
    return _download(str(path_or_id), [f"*{suffix}" for suffix in SUFFIXES])


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint of a run's folder, which `checkpoints/latest` names, and any other folder itself."""
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir() or (folder / "config.json").exists():
        return folder
    latest = checkpoints / "latest"
    name = latest.read_text(errors="replace").strip() if latest.is_file() else ""
    if not name.startswith("step-") or name != Path(name).name or not (checkpoints / name).is_dir():
        raise ValueError(f"{folder} is a run's folder without a checkpoint yet; give a checkpoint")
    return checkpoints / name


def load_config(path_or_id: str | Path) -> dict[str, Any]:
    """Read a model's config.json, without its weights. For adapters, read the config of their base model.

    Call it for facts that depend only on shapes. The package includes the config.json of some published models; for
    another hub id, only this file is fetched.

    Args:
        path_or_id: Folder, or hub id (owner/name).

    Raises:
        ValueError: The folder has no config.json, or the hub has none under this id.
    """
    text = str(Path(path_or_id).expanduser()) if str(path_or_id) else ""
    if text and Path(text).is_dir():
        folder = checkpoint_folder(text)
        adapter = adapter_folder(folder)
        return read_config(folder) if adapter is None else load_config(named_base(adapter))
    check_hub_id(text)
    packaged = CONFIGS / f"{text.replace('/', '--')}.json"
    if packaged.is_file():
        return json.loads(packaged.read_text())
    names = ("config.json", "adapter_config.json")
    cache_folder = _download(text, names)
    if not any((cache_folder / name).is_file() for name in names):
        raise ValueError(f"model={text!r}: its repository has no config.json; give a folder that has one")
    return load_config(cache_folder)


def _download(hub_id: str, names: Sequence[str]) -> Path:
    """Download the files of a hub repository that match the names, and return their folder in the cache.

    Raises:
        ValueError: The hub cannot be reached, or refuses.
    """
    try:
        # Not `hf_hub_download`, which tries for 23 s to reach a hub that is not there.
        return Path(snapshot_download(hub_id, allow_patterns=[*names]))
    except LocalEntryNotFoundError:
        is_cached = Path(constants.HF_HUB_CACHE, f"models--{hub_id.replace('/', '--')}").is_dir()
        missing = "is not complete in this machine's cache" if is_cached else "is not a folder, and not in the cache"
        raise ValueError(
            f"model={hub_id!r} {missing}, and the hub cannot be reached; give an existing folder (for a recipe: "
            f"--model FOLDER), or download the model elsewhere{folders_beside(hub_id)}"
        ) from None
    except HfHubHTTPError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model={hub_id!r} is not a folder, and the hub refuses it as an id ({reason}); give an existing folder"
            f"{folders_beside(hub_id)}"
        ) from None


def check_hub_id(path_or_id: str | Path) -> None:
    """Raise ValueError for a text that is neither a folder nor a hub id (owner/name)."""
    text = str(path_or_id)
    if Path(text).is_absolute() or text.count("/") != 1 or text.startswith("."):
        raise ValueError(
            f"model={text!r} is neither a folder nor a hub id (owner/name); give one of them{folders_beside(text)}"
        )


def save_module(
    module: Module, tokenizer: Tokenizer, spec: FamilySpec, directory: str | Path, *, stock: bool, custom: bool
) -> None:
    """Write the weights, with adapters merged, config and tokenizer in the checkpoint's layout or the class's.

    With `custom`, write the tensors under the module's names, as `load_weights` reads them, and the spec's name into
    config.json, so that `find_family` refuses it.
    """
    directory = Path(directory).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    with quiet_progress():
        if not hasattr(module, "save_pretrained"):
            write_tensors(merged_state_dict(module, device="cpu"), directory, max_shard_size=MAX_FILE_SIZE)
        elif stock or custom or spec.files.stock_model is None:
            merged = merged_copy(module, device="cpu") if has_adapted_or_low_bit(module) else module
            layout = {"save_original_format": False} if custom else {}
            remove_weights(directory)
            merged.save_pretrained(directory, max_shard_size=MAX_FILE_SIZE, **layout)
            if custom:
                config = directory / "config.json"
                fields = json.loads(config.read_text()) | {CUSTOM_SPEC_FIELD: spec.name}
                config.write_text(json.dumps(fields, indent=2) + "\n")
        else:
            assert spec.files.original_config is not None, "the spec is of a checkpoint, not of a family"
            state = lazy_merged_tensors(module)
            write_tensors(to_original(state, spec, module.config), directory, max_shard_size=MAX_FILE_SIZE)
            dtype = str(main_dtype(state)).removeprefix("torch.")
            keys = [key for key in ("dtype", "torch_dtype") if key in spec.files.original_config] or ["torch_dtype"]
            fields = spec.files.original_config | dict.fromkeys(keys, dtype)
            # The table may have been resized. LLaDA's is larger than its vocabulary if the config has both sizes.
            size_field = "embedding_size" if fields.get("embedding_size") else "vocab_size"
            fields[size_field] = module.config.vocab_size
            (directory / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
            source = Path(spec.files.folder or directory)
            if source.is_dir() and source.resolve() != directory.resolve():
                # Copy the checkpoint's code for other tools. This library never runs it.
                for file in [*source.glob("*.py"), *source.glob("generation_config.json")]:
                    shutil.copyfile(file, directory / file.name)
        tokenizer.save_pretrained(directory)


def bitsandbytes_config(
    quantization: str, dtype: torch.dtype | str, *, masked: bool
) -> transformers.BitsAndBytesConfig:
    """Return bitsandbytes' config of a frozen base in 4 ("nf4") or 8 ("int8") bits, without the heads."""
    # By default, only the output embedding is skipped, but not the other layers of a masked language model's head.
    skip = {"llm_int8_skip_modules": ["cls", "lm_head", "predictions", "head", "decoder"]} if masked else {}
    compute_dtype = torch.bfloat16 if dtype == "auto" else dtype
    if quantization == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype, **skip
        )
    if quantization == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, **skip)
    raise ValueError(f"quantization={quantization!r} is not known; use 'nf4', 'int8' or None")


@contextmanager
def name_in_errors(source: str | Path) -> Iterator[None]:
    """Turn other libraries' errors on damaged files or impossible configs into a ValueError that names `source`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, _DAMAGED) and type(error) is not Exception:  # tokenizers raises a bare Exception
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "ignore_mismatched_sizes" in reason:
            reason = "the shapes of tensors differ from config.json"
        raise ValueError(f"{source}: damaged, or not the model that its config.json describes: {reason}") from error


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Hide transformers' progress bars and load reports. `check_report` raises an error for what they would list."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    quiet = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(quiet)
        if bars:
            logging.enable_progress_bar()


def num_parameters(model: str | Policy) -> int:
    """Count a model's weights. For a folder or a hub's id, only config.json is read."""
    module = build_empty(load_config(model), model) if isinstance(model, str) else model.module
    return sum(parameter.numel() for parameter in module.parameters())


def _filter_message(record: LogRecord) -> bool:
    """Hide what is not an error in `quiet_progress`. Shorten other messages of transformers, and escape their control
    characters: they may quote an untrusted checkpoint.
    """
    if _QUIET.get() and record.levelno < ERROR:
        return False
    record.msg = escape_controls(without_middle(record.getMessage()), keep="\n\t")
    record.args = None  # already part of the message
    return True


for _handler in getLogger("transformers").handlers:
    _handler.addFilter(_filter_message)
