"""The published families of checkpoints: a `FamilySpec` of each, and functions that convert their configs.

A function such as `llada` converts the fields of a checkpoint's config.json. It returns the stock class that computes
the same as the checkpoint's own code, and the config of this class.
"""

from dataclasses import replace
from typing import Any

import transformers
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dllm_rl.models.base import BERT_LINEARS, CheckpointFiles, FamilySpec, encode_esm, encode_roberta, mlm_head
from dllm_rl.models.checkpoint.rope import rope_parameters
from dllm_rl.models.denoiser import encode_denoiser, softcapped_head

# Field of a stock config that names the family of the checkpoint that it was converted from. transformers saves it, so
# that what other tools save (`Trainer`, `module.save_pretrained`) is opened with the family's attention and shift.
FAMILY_FIELD = "diffusion_family"
# Field of a saved config that names a policy's own FamilySpec, if opening the folder by name would take another one.
CUSTOM_SPEC_FIELD = "custom_spec"
CUSTOM_HINT = (  # how to open a folder whose policy only its author's code can make
    "name the function that makes its policy, --make_model MODULE:FUNCTION of dllm-rl, or use "
    "load_policy(folder, into=policy)"
)
# Fields that a checkpoint's config and the stock config have in common.
_SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
    *("tie_word_embeddings", "attention_bias", "attention_dropout", "initializer_range"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"),
    *("mlp_only_layers", "first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor"),
)


def _fields(raw: dict, **more: Any) -> dict:
    """Return the fields of a stock config: those in _SAME, token ids, rotary parameters, and `more`."""
    # None is passed on too, because the default ids of a stock class belong to another vocabulary.
    ids = {key: raw.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")}
    same = {key: raw[key] for key in _SAME if raw.get(key) is not None}
    return same | ids | {"rope_parameters": rope_parameters(raw), "is_causal": False, "use_cache": False} | more


def _refuse(raw: dict, **supported: Any) -> None:
    """Raise ValueError for a field whose value differs from the only one that the stock class supports."""
    for key, value in supported.items():
        if raw.get(key) not in (None, value):
            raise ValueError(
                f"{key}={raw[key]!r} is not supported for {raw['architectures'][0]}; only {key}={value!r} is"
            )


def llada(raw: dict) -> tuple[type, LlamaConfig]:
    """LLaDA-8B, LLaDA-1.5: a Llama with the field names of OLMo."""
    _refuse(raw, block_type="llama", layer_norm_type="rms", activation_type="silu", alibi=False, rope=True)
    _refuse(raw, include_bias=False, include_qkv_bias=False, bias_for_layer_norm=False, attention_layer_norm=False)
    _refuse(raw, input_emb_norm=False, scale_logits=False, multi_query_attention=False, block_group_size=1)
    fields = _fields(
        raw,
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw.get("mlp_hidden_size") or raw["mlp_ratio"] * raw["d_model"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
        head_dim=raw["d_model"] // raw["n_heads"],
        max_position_embeddings=raw["max_sequence_length"],
        tie_word_embeddings=raw.get("weight_tying", False),
        pad_token_id=None,  # the checkpoint's is also its eos id, whose embedding a stock class would not train
    )
    return LlamaForCausalLM, LlamaConfig(**fields)


def llada_moe(raw: dict) -> tuple[type, Qwen3MoeConfig]:
    """LLaDA-MoE-7B-A1B: a Qwen3-MoE that does not normalize the weights of the chosen experts."""
    if raw.get("moe_router_enable_expert_bias"):
        raise ValueError(
            "moe_router_enable_expert_bias=True adds the bias to the experts' weights, which is not supported; "
            "use a checkpoint without it"
        )
    _refuse(raw, moe_router_score_function="softmax", qk_layernorm=True, routed_scaling_factor=1)
    _refuse(raw, shared_expert_intermediate_size=0, partial_rotary_factor=1, clip_qkv=0, router_num_group=1)
    fields = _fields(
        raw,
        intermediate_size=raw.get("dense_intermediate_size") or raw["expert_intermediate_size"],
        moe_intermediate_size=raw["expert_intermediate_size"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        num_key_value_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        norm_topk_prob=bool(raw.get("norm_topk_prob")),
        mlp_only_layers=[i for i, sparse in enumerate(raw.get("moe_layer_freq") or []) if not sparse],
        decoder_sparse_step=1,
    )
    fields.pop("routed_scaling_factor", None)  # 1, or refused above; Qwen3-MoE has no such field
    return Qwen3MoeForCausalLM, Qwen3MoeConfig(**fields)


def llada2(raw: dict) -> tuple[type, Glm4MoeConfig]:
    """LLaDA2.0, LLaDA2.1: a GLM-4-MoE with a fused QKV weight. The expert bias only affects the choice of experts."""
    _refuse(raw, score_function="sigmoid", use_bias=False, norm_head=False, use_rmsnorm=True, use_sliding_window=False)
    fields = _fields(
        raw,
        n_routed_experts=raw["num_experts"],
        n_shared_experts=raw["num_shared_experts"],
        attention_bias=bool(raw.get("use_qkv_bias")),
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        norm_topk_prob=raw.get("norm_topk_prob", True),
        use_qk_norm=True,
    )
    fields.pop("num_experts")
    return Glm4MoeForCausalLM, Glm4MoeConfig(**fields)


def dream(raw: dict) -> tuple[type, Qwen2Config]:
    """Dream-7B, DiffuCoder: Qwen2 with a shifted head."""
    _refuse(raw, use_sliding_window=False)
    return Qwen2ForCausalLM, Qwen2Config(**_fields(raw))


def sdar(raw: dict) -> tuple[type, Qwen3Config | Qwen3MoeConfig]:
    """SDAR, TraDo, RND1: Qwen3, dense or with experts."""
    _refuse(raw, use_sliding_window=False)
    if raw.get("num_experts"):
        return Qwen3MoeForCausalLM, Qwen3MoeConfig(**_fields(raw))
    return Qwen3ForCausalLM, Qwen3Config(**_fields(raw))


def plain_llama(raw: dict) -> tuple[type, LlamaConfig]:
    """iLLaDA, Stable-DiffCoder: a Llama."""
    _refuse(raw, mlp_bias=False, layer_norm_eps=None)  # a number means LayerNorm
    return LlamaForCausalLM, LlamaConfig(**_fields(raw))


def a2d(raw: dict) -> tuple[type, Qwen2Config | Qwen3Config | Qwen3MoeConfig]:
    """Tiny-A2D: Qwen2.5-0.5B or Qwen3-0.6B, whose head is not shifted."""
    return sdar(raw) if "Qwen3" in raw["architectures"][0] else dream(raw)


def nemotron(raw: dict) -> tuple[type, transformers.Ministral3Config]:
    """Nemotron-Labs-Diffusion: a Ministral 3, causal if its `dlm_paradigm` is autoregressive."""
    _refuse(raw, attention_bias=False, mlp_bias=False, sliding_window=None)
    rope = {**raw["rope_parameters"]}
    beta = rope.pop("llama_4_scaling_beta")  # a field of this stock class only: it scales queries
    fields = _fields(raw | {"rope_parameters": rope}, is_causal=raw.get("dlm_paradigm") == "autoregressive")
    fields["rope_parameters"]["llama_4_scaling_beta"] = beta
    return transformers.Ministral3ForCausalLM, transformers.Ministral3Config(**fields)


# Names of a block's layers: (in the checkpoint, in the stock class).
_BLOCK = [("attn_norm", "input_layernorm"), ("ff_norm", "post_attention_layernorm"), ("attn_out", "self_attn.o_proj")]
_BLOCK += [("q_proj", "self_attn.q_proj"), ("k_proj", "self_attn.k_proj"), ("v_proj", "self_attn.v_proj")]
_BLOCK += [("ff_proj", "mlp.gate_proj"), ("up_proj", "mlp.up_proj"), ("ff_out", "mlp.down_proj")]

LLADA = FamilySpec(
    name="llada",
    attention="full",
    float32_rope=True,
    mask_id=126336,
    files=CheckpointFiles(
        architectures=("LLaDAModelLM", "LLaDAModel"),
        config_test=lambda raw: "num_experts" not in raw,
        stock_model=llada,
        mask_vocabulary=126464,
        mask_names=("<|mdm_mask|>", "[MDM_MASK]"),
        end_tokens=("<|eot_id|>",),
        tensor_names=(
            ("model.transformer.wte", "model.embed_tokens"),
            ("model.transformer.ln_f", "model.norm"),
            ("model.transformer.ff_out", "lm_head"),
            *((f"model.transformer.blocks.*.{a}", f"model.layers.*.{b}") for a, b in _BLOCK),
        ),
    ),
)
ILLADA = FamilySpec(
    name="illada",
    attention="full",
    mask_id=5,
    files=CheckpointFiles(
        architectures=("ILLaDAForCausalLM",),
        stock_model=plain_llama,
        mask_vocabulary=155136,
        mask_names=("<[MASK]>",),
    ),
)
LLADA_MOE = FamilySpec(
    name="llada_moe",
    attention="full",
    mask_id=156895,
    files=CheckpointFiles(
        architectures=("LLaDAMoEModelLM", "LLaDAMoEModel", "LLaDAModelLM"),
        config_test=lambda raw: "num_experts" in raw,
        stock_model=llada_moe,
        mask_vocabulary=157184,
        mask_names=("<|mask|>",),
        end_tokens=("<|role_end|>",),
    ),
)
LLADA2 = FamilySpec(
    name="llada2",
    attention="block_causal",
    block_size=32,
    mask_id=156895,
    files=CheckpointFiles(
        architectures=("LLaDA2MoeModelLM",),
        stock_model=llada2,
        mask_vocabulary=157184,
        mask_names=("<|mask|>",),
        end_tokens=("<|role_end|>",),
        fused_qkv="model.layers.*.attention.query_key_value",
        tensor_names=(
            ("model.word_embeddings", "model.embed_tokens"),
            ("model.layers.*.attention.query_layernorm", "model.layers.*.self_attn.q_norm"),
            ("model.layers.*.attention.key_layernorm", "model.layers.*.self_attn.k_norm"),
            ("model.layers.*.attention.dense", "model.layers.*.self_attn.o_proj"),
            ("model.layers.*.mlp.gate.expert_bias", "model.layers.*.mlp.gate.e_score_correction_bias"),
        ),
    ),
)
DREAM = FamilySpec(
    name="dream",
    attention="full",
    shift=True,
    mask_id=151666,
    files=CheckpointFiles(
        architectures=("DreamModel",),
        stock_model=dream,
        mask_vocabulary=152064,
        mask_names=("<|mask|>",),
        end_tokens=("<|im_end|>",),
    ),
)
SDAR = FamilySpec(
    name="sdar",
    attention="block_causal",
    block_size=4,
    mask_id=151669,
    files=CheckpointFiles(
        architectures=("SDARForCausalLM", "SDARMoeForCausalLM"),
        stock_model=sdar,
        mask_vocabulary=151936,
        mask_names=("<|MASK|>",),
        end_tokens=("<|im_end|>",),
    ),
)
RND1 = FamilySpec(
    name="rnd1",
    attention="full",
    shift=True,
    mask_id=151669,
    files=CheckpointFiles(
        architectures=("RND1", "RND1LM"),
        stock_model=sdar,
        mask_vocabulary=151936,
    ),
)
STABLE_DIFFCODER = FamilySpec(
    name="stable_diffcoder",
    attention="block_causal",
    block_size=4,
    mask_id=5,
    files=CheckpointFiles(
        architectures=("StableDiffcoderForCausalLM",),
        stock_model=plain_llama,
        mask_vocabulary=155136,
        mask_names=("<[MASK_TOKEN]>",),
    ),
)
A2D = FamilySpec(
    name="a2d",
    attention="full",
    files=CheckpointFiles(
        architectures=("A2DQwen2LMHeadModel", "A2DQwen3LMHeadModel"),
        stock_model=a2d,
        mask_names=("<|mask|>",),
        end_tokens=("<|im_end|>",),
    ),
)
# The published configs of bd3lm and mdlm are the same: only a block size distinguishes them.
A2D_BLOCKS = replace(
    A2D,
    name="a2d_blocks",
    attention="block_causal",
    files=replace(
        A2D.files,
        config_test=lambda raw: bool(raw.get("block_size")),
    ),
)
NEMOTRON_AR = FamilySpec(
    name="nemotron_ar",
    attention="causal",
    shift=True,
    files=CheckpointFiles(
        architectures=("NemotronLabsDiffusionModel",),
        config_test=lambda raw: raw.get("dlm_paradigm") == "autoregressive",
        stock_model=nemotron,
        tensor_names=(
            ("diffusion_head", "lm_head"),
            *((f"encoder.{name}", f"model.{name}") for name in ("embed_tokens", "norm")),
            *((f"encoder.layers.*.{name}", f"model.layers.*.{name}") for _, name in _BLOCK),
        ),
    ),
)
NEMOTRON = replace(
    NEMOTRON_AR,
    name="nemotron",
    attention="block_causal",
    block_size=32,
    causal_context=True,
    is_also_causal=True,
    shift=False,
    mask_id=100,
    files=replace(
        NEMOTRON_AR.files,
        config_test=lambda raw: raw.get("dlm_paradigm") != "autoregressive",
        mask_vocabulary=131072,
    ),
)
DIFFUSION_GEMMA = FamilySpec(
    name="diffusion_gemma",
    attention="encoder_decoder",
    encode=encode_denoiser,
    head=softcapped_head,
    files=CheckpointFiles(
        architectures=("DiffusionGemmaForBlockDiffusion",),
    ),
)
MASKED_LM = FamilySpec(
    name="masked_lm",
    attention="full",
    head=mlm_head,
    lora_targets=BERT_LINEARS,
    files=CheckpointFiles(
        architectures=("*ForMaskedLM",),
        ignored_tensors=(r".*\.pooler\..*", r"cls\.seq_relationship\..*", r".*\.position_ids"),
    ),
)
ROBERTA = replace(
    MASKED_LM,
    name="roberta",
    encode=encode_roberta,
    files=replace(
        MASKED_LM.files,
        architectures=("*RobertaForMaskedLM", "RobertaPreLayerNormForMaskedLM", "CamembertForMaskedLM"),
    ),
)
ESM = replace(
    MASKED_LM,
    name="esm",
    encode=encode_esm,
    files=replace(
        MASKED_LM.files,
        architectures=("EsmForMaskedLM",),
    ),
)
DIFFUSION_LM = FamilySpec(
    name="diffusion_lm",  # a stock causal class whose config says is_causal=False
    attention="full",
    files=CheckpointFiles(
        architectures=("*ForCausalLM", "*LMHeadModel"),
        config_test=lambda raw: raw.get("is_causal") is False,
    ),
)
SHIFTED_DIFFUSION_LM = replace(
    DIFFUSION_LM,
    name="shifted_diffusion_lm",
    shift=True,
    is_also_causal=True,
    files=replace(
        DIFFUSION_LM.files,
        config_test=lambda raw: raw.get("is_causal") is False and bool(raw.get("shifted_head")),
    ),
)
CAUSAL_LM = FamilySpec(
    name="causal_lm",
    attention="causal",
    shift=True,
    files=CheckpointFiles(
        architectures=("*ForCausalLM", "*LMHeadModel"),
    ),
)

# The first family that matches a config is used: specific families come first.
FAMILIES = [LLADA, ILLADA, LLADA_MOE, LLADA2, DREAM, SDAR, RND1, STABLE_DIFFCODER, A2D_BLOCKS, A2D]
FAMILIES += [NEMOTRON_AR, NEMOTRON, DIFFUSION_GEMMA]
FAMILIES += [ROBERTA, ESM, MASKED_LM, SHIFTED_DIFFUSION_LM, DIFFUSION_LM, CAUSAL_LM]


def register_family(spec: FamilySpec) -> None:
    """Add a family of checkpoints, which `load_policy` tries first. It replaces a family of the same name.

    Call it before `load_policy` for an architecture that the library does not know; use `make_policy` for a single
    module.

    Args:
        spec: FamilySpec with `files`, which name its `architectures`.

    Raises:
        ValueError: The spec names no `architectures`.
    """
    if not spec.files.architectures:
        raise ValueError(
            f"files.architectures=() of the family {spec.name!r}: name the class that its config.json names"
        )
    FAMILIES[:] = [spec, *(family for family in FAMILIES if family.name != spec.name)]


def stock_class(raw: dict) -> Any:
    """Return the transformers class that a config's `architectures` names, or None."""
    architecture = (raw.get("architectures") or [""])[0]
    kind = raw.get("model_type", "")
    if kind in transformers.CONFIG_MAPPING:
        masked = transformers.MODEL_FOR_MASKED_LM_MAPPING
        causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        for mapping in (masked, causal, transformers.MODEL_MAPPING):
            model_class: Any = mapping.get(transformers.CONFIG_MAPPING[kind], None)
            # The mapping of an Auto class may have another class than the checkpoint's.
            if getattr(model_class, "__name__", None) == architecture:
                return model_class
    return getattr(transformers, architecture, None)


def find_family(raw: dict) -> FamilySpec:
    """Return the family of a checkpoint's config fields. Raise ValueError for an unknown one, and for a custom spec."""
    if (name := raw.get(CUSTOM_SPEC_FIELD)) is not None:
        raise ValueError(
            f"{CUSTOM_SPEC_FIELD}={name!r} in config.json: the checkpoint was saved with a FamilySpec that only its "
            f"author's code has: {CUSTOM_HINT}"
        )
    if (name := raw.get(FAMILY_FIELD)) is not None:  # a copy in the stock class's layout
        for family in FAMILIES:
            if family.name == name:
                return replace(family, files=family.files.of_stock_class())
        raise ValueError(f"{FAMILY_FIELD}={name!r} is not a known family; pass its FamilySpec to register_family first")
    architecture = (raw.get("architectures") or [None])[0]
    for family in FAMILIES:
        # A checkpoint's custom class may also be called ...ForCausalLM.
        if family.files.match(raw) and (family.files.stock_model or stock_class(raw) is not None):
            return family
    if raw.get("model_type") == "diffusion_gemma":
        raise ValueError(
            f"model_type='diffusion_gemma' with architectures={architecture!r} is not a "
            f"DiffusionGemmaForBlockDiffusion that transformers {transformers.__version__} has; upgrade it (5.23 has "
            "the class), or correct config.json"
        )
    known = ", ".join(sorted({name.replace("*", "...") for family in FAMILIES for name in family.files.architectures}))
    code = " and its config asks for remote code (auto_map), which is never run" if raw.get("auto_map") else ""
    raise ValueError(
        f"architectures={architecture!r} is not known{code}; known are {known}; "
        "pass a FamilySpec to register_family, or wrap its module with make_policy: dllm-rl takes the function that "
        "does, --make_model MODULE:FUNCTION"
    )
