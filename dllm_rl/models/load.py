"""Load policies and weights from folders, runs, adapters and hub ids."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from dllm_rl.manifest import Check, verify_if_present
from dllm_rl.models.base import (
    Policy,
)
from dllm_rl.models.checkpoint.adapters import load_adapter, read_adapter_config
from dllm_rl.models.checkpoint.loading import (
    LOAD_ADAPTER_HINT,
    adapter_folder,
    base_of_adapter,
    check_finite,
    checkpoint_folder,
    digest_of_checkpoint,
    load_module,
    name_in_errors,
    newest_checkpoint,
)
from dllm_rl.models.checkpoint.tensors import check_regular, mismatched_tensors, read_tensors
from dllm_rl.models.lora import has_adapted_or_low_bit
from dllm_rl.models.merge import merge_lora, merged_state_dict
from dllm_rl.models.policy import ModulePolicy, _stored_eval_sampler, make_policy

BASE_DTYPES = ("float32", "bfloat16", "float16", "float64")


def load_policy(
    path_or_id: str | Path,
    *,
    into: ModulePolicy | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    block_size: int | None = None,
    quantization: str | None = None,
    verify_checkpoint: Check = "full",
) -> ModulePolicy:
    """Open a model: what a run, `save_pretrained`, peft or the hub has. `complete` and the commands call it.

    Use `make_policy` for a module that you built yourself. If the folder has only adapters (written by a run or by
    peft), it opens their base model and merges the adapters into it. The policy of a run completes as the run's
    evaluations do (`complete`).

    Args:
        path_or_id: Folder of a model or of a checkpoint, a run's folder for its newest checkpoint, or an id on the
            Hugging Face Hub.
        into: Policy of a module of yours, or with a spec of yours, whose weights the checkpoint has. It gets the
            weights, keeps its own block size, and is returned. None (default): a stock transformers class.
        dtype: Dtype of the weights: float32, bfloat16 or float16. "auto" keeps the checkpoint's dtype. None (default):
            float32, or that of `into`.
        device: Device of the weights. None (default): cpu, or that of `into`.
        block_size: Block size of a block-causal model. None: the checkpoint's block size.
        quantization: "nf4" or "int8" quantizes the weights with bitsandbytes, and freezes all of them: only adapters
            (`lora` of a recipe) can then be trained. None: no quantization.
        verify_checkpoint: "full" compares every byte with the manifest, "quick" compares sizes and each file's first
            MiB.

    Returns:
        Policy that computes logits in fp32; set `policy.float32_head = False` to compute them in 16 bits if the weights
        have 16.

    Raises:
        ValueError: A file differs from the manifest, the architecture is unknown, tensors are missing or unexpected,
            weights are not finite, the mask id is outside the vocabulary, or the attention differs from the family's.
    """
    folder = checkpoint_folder(path_or_id)
    if into is not None:
        if block_size is not None or quantization is not None:
            raise ValueError("into is a policy that exists: leave out block_size and quantization")
        load_weights(into, folder, verify_checkpoint=verify_checkpoint)
        if dtype not in (None, "auto"):
            into.module.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        policy = into if device is None else into.to(device)
        policy.eval_sampler = _stored_eval_sampler(folder)
        return policy
    verify_if_present(folder, verify_checkpoint)
    dtype, device = torch.float32 if dtype is None else dtype, "cpu" if device is None else device
    options: dict[str, Any] = {"dtype": dtype, "block_size": block_size, "quantization": quantization, "device": device}
    if (adapter := adapter_folder(folder)) is not None:
        policy = _load_merged(adapter, folder, options, verify_checkpoint)
    else:
        module, tokenizer, spec = load_module(folder, **options)
        check_finite(module, path_or_id)
        if quantization is not None:
            module.requires_grad_(False)  # else embeddings, norms and head would be trained alone
        # A config value of a wrong type may raise an error only in the first forward, which make_policy runs.
        with name_in_errors(folder):
            policy = make_policy(module, tokenizer, spec)
            policy.library_spec = spec
    policy.eval_sampler = _stored_eval_sampler(folder)
    return policy


def _load_merged(adapter: Path, folder: Path, options: dict[str, Any], verify_checkpoint: Check) -> ModulePolicy:
    """Load the base model of saved adapters, and merge the adapters into it."""
    if options["quantization"] is not None:
        raise ValueError(
            f"quantization={options['quantization']!r} needs a base without adapters, and {folder} has adapters; merge "
            f"them with load_policy({str(folder)!r}).save_pretrained(NEW), and load NEW"
        )
    dtype = options["dtype"]
    read_adapter_config(adapter)  # raises ValueError for adapters that are not read, before the base is loaded
    with name_in_errors(adapter), safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        metadata = file.metadata() or {}
    # The base is loaded in the dtype in which the adapters were trained, and converted after the merge.
    base_dtype = metadata["dtype"] if metadata.get("dtype") in BASE_DTYPES else "auto"
    options = options | {"dtype": base_dtype, "quantization": metadata.get("quantization")}
    base = base_of_adapter(adapter)
    if verify_checkpoint == "full" and metadata.get("base_digest") not in (None, digest_of_checkpoint(base)):
        raise ValueError(
            f"{base}: its weights, config or tokenizer are not those on which the adapters of {adapter} were trained; "
            f"put those back, or {LOAD_ADAPTER_HINT}"
        )
    policy = load_policy(base, **options, verify_checkpoint=verify_checkpoint)
    load_adapter(policy, adapter)
    merge_lora(policy)
    if dtype != "auto":
        for parameter in policy.module.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return policy


@torch.no_grad()
def load_weights(policy: Policy, directory: str | Path, *, verify_checkpoint: Check = "full") -> Policy:
    """Load into a policy's module the weights that `save_pretrained` wrote: `load_policy(directory, into=policy)`.

    Args:
        policy: Policy whose module receives the tensors. It must have no adapters.
        directory: Folder that `save_pretrained` wrote, or a run's folder, for its newest checkpoint.
        verify_checkpoint: "full" or "quick" check of the manifest, as in `load_policy`.

    Returns:
        The policy.

    Raises:
        ValueError: The names or shapes of the tensors differ, the policy has adapters or low-bit layers, or a file
            differs from the manifest.
    """
    if has_adapted_or_low_bit(policy.module):
        raise ValueError("the policy has adapters or low-bit layers; load the weights first, then add_lora")
    directory = newest_checkpoint(Path(directory).expanduser())
    verify_if_present(directory, verify_checkpoint)
    check_regular(directory)
    module_tensors = merged_state_dict(policy.module)
    # transformers chooses under which of its names a tied tensor is saved; `module_tensors` has the first.
    names = {id(tensor): name for name, tensor in module_tensors.items()}
    tensors = dict(policy.module.named_parameters(remove_duplicate=False))
    state = {names.get(id(tensors.get(name)), name): value for name, value in read_tensors(directory).items()}
    if mismatched := mismatched_tensors(state, module_tensors):
        name = type(policy.module).__name__
        raise ValueError(
            f"{directory}: tensors {mismatched[:3]} do not fit {name}; build the module that they were saved from"
        )
    for name, tensor in module_tensors.items():
        tensor.copy_(state[name])
    return policy
