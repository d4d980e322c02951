"""A learner's weights as a GGUF file, which llama.cpp reads: Llama's and Qwen2's layouts, causal or not."""

from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dllm_rl import Policy
from dllm_rl.models.base import gather_if_sharded
from dllm_rl.models.merge import merged_tensors

Format = Literal["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_0", "Q4_0"]
# llama.cpp's name for a class: causal, or with full attention (LLaDA is an un-causaled Llama, Dream a Qwen2).
ARCHITECTURES = {"LlamaForCausalLM": ("llama", "llada"), "Qwen2ForCausalLM": ("qwen2", "dream")}


def write_gguf(policy: Policy, path: Path, *, format: Format) -> None:
    """Write the learner with its adapters merged. The blocks' matrices get the format; all else, as in a quantized
    copy, stays in fp32. Raises ValueError on a layout that llama.cpp's architectures do not compute, or rows that are
    no whole blocks of the format. Processes that share the learner call it together."""
    import gguf
    from gguf.quants import quantize

    module = policy.module
    name = architecture(policy)
    kinds = {kind.name: kind for kind in gguf.GGMLQuantizationType}
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, module.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    for key, value in fields(policy).items():
        getattr(writer, f"add_{key}")(value)
    for held, tensor in merged_tensors(module, persistent_only=True):
        if held == "lm_head.weight" and module.config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings
        found = names.get_name(held, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ValueError(f"{type(module).__name__} has {held}, for which {name!r} in llama.cpp has no place")
        array = as_rotated(found, gather_if_sharded(tensor.detach()).float().cpu(), module.config).numpy()
        kind = kinds[format if array.ndim == 2 and found.startswith("blk.") else "F32"]
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if array.shape[-1] % block:
            raise ValueError(
                f"format={format!r} has blocks of {block} weights, and {held} rows of {array.shape[-1]}; use another "
                f"format of {', '.join(get_args(Format))}"
            )
        writer.add_tensor(found, quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture(policy: Policy) -> str:
    """llama.cpp's name. Raises ValueError on a module that none of ARCHITECTURES computes."""
    kind = type(policy.module).__name__
    config = policy.module.config if kind in ARCHITECTURES else None
    if config is None or policy.spec.attention == "block_causal":
        raise ValueError(
            f"llama.cpp cannot roll out {kind} with {policy.spec.attention} attention here; it can "
            f"{' and '.join(ARCHITECTURES)}, causal or with full attention"
        )
    scaling = config.rope_parameters.get("rope_type", "default")
    if scaling != "default" or config.hidden_act != "silu":
        raise ValueError(f"rope_type={scaling!r} or hidden_act={config.hidden_act!r} is not written: default and silu")
    return ARCHITECTURES[kind][policy.spec.attention == "full"]


def fields(policy: Policy) -> dict[str, Any]:
    """The file's fields, by the names of GGUFWriter's methods."""
    config = policy.module.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    same = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "head_count": "num_attention_heads",
        "head_count_kv": "num_key_value_heads",
        "layer_norm_rms_eps": "rms_norm_eps",
    }
    return {name: getattr(config, field) for name, field in same.items()} | {
        **dict.fromkeys(("key_length", "value_length", "rope_dimension_count"), width),
        "rope_freq_base": config.rope_parameters["rope_theta"],
        "vocab_size": policy.vocab_size,
        "tokenizer_model": "none",  # tokens go in and out as ids
        "causal_attention": policy.spec.attention == "causal",
    }


def as_rotated(name: str, tensor: Tensor, config: Any) -> Tensor:
    """A query's or key's rows in the order that llama.cpp rotates: Llama's pairs lie next to each other there, and half
    a head apart in transformers. Qwen2's lie as they are."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None or config.model_type != "llama":
        return tensor
    return torch.stack(tensor.unflatten(0, (heads, 2, -1)).unbind(1), dim=2).reshape(tensor.shape)
