"""Tiny random checkpoints in the layouts that the families were published in, names written by hand."""

import json
from functools import cache
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 40, 32, 2, 4, 2, 8
PAD, MASK = 1, 39


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors whose scale keeps activations of order one; norms near 1, biases small."""
    generator, out = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            out[name] = 1 + 0.1 * noise if "norm" in name or name.endswith("ln_f.weight") else 0.3 * noise
        else:
            out[name] = noise * (0.5 if shape[0] == VOCAB else 1.5 / shape[1] ** 0.5)
    return out


def llada(*, tied: bool = False) -> tuple[dict, dict]:
    config = {
        "architectures": ["LLaDAModelLM"],
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
        "model_type": "llada",
        "block_type": "llama",
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "d_model": HIDDEN,
        "embedding_size": VOCAB,
        "eos_token_id": 2,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "mask_token_id": MASK,
        "max_sequence_length": 64,
        "mlp_hidden_size": 48,
        "mlp_ratio": 4,
        "multi_query_attention": None,
        "n_heads": HEADS,
        "n_kv_heads": KV_HEADS,
        "n_layers": LAYERS,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "weight_tying": tied,
    }
    shapes = {"model.transformer.wte.weight": (VOCAB, HIDDEN), "model.transformer.ln_f.weight": (HIDDEN,)}
    for n in range(LAYERS):
        block = f"model.transformer.blocks.{n}"
        shapes |= {
            f"{block}.attn_norm.weight": (HIDDEN,),
            f"{block}.ff_norm.weight": (HIDDEN,),
            f"{block}.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{block}.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{block}.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{block}.attn_out.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{block}.ff_proj.weight": (48, HIDDEN),
            f"{block}.up_proj.weight": (48, HIDDEN),
            f"{block}.ff_out.weight": (HIDDEN, 48),
        }
    if not tied:
        shapes["model.transformer.ff_out.weight"] = (VOCAB, HIDDEN)
    return config, weights(shapes)


def qwen(
    architecture: str, model_type: str, *, qk_norm: bool, qkv_bias: bool, experts: int = 0, **more
) -> tuple[dict, dict]:
    """The layout that Dream (biases), SDAR and LLaDA-MoE (query and key norms, experts) share with their ancestors."""
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": VOCAB,
        "eos_token_id": 2,
        "pad_token_id": 2,
    } | more
    head_dim = config.get("head_dim", HEAD_DIM)
    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.self_attn.q_proj.weight": (HEADS * head_dim, HIDDEN),
            f"{layer}.self_attn.k_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{layer}.self_attn.v_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{layer}.self_attn.o_proj.weight": (HIDDEN, HEADS * head_dim),
        }
        if qkv_bias:
            shapes |= {
                f"{layer}.self_attn.{x}_proj.bias": shapes[f"{layer}.self_attn.{x}_proj.weight"][:1] for x in "qkv"
            }
        if qk_norm:
            shapes |= {f"{layer}.self_attn.{x}_norm.weight": (head_dim,) for x in "qk"}
        shapes |= mlp(layer, experts, 24 if experts else 48)
    return config, weights(shapes)


def mlp(layer: str, experts: int, size: int) -> dict[str, tuple[int, ...]]:
    one = lambda prefix, size: {  # noqa: E731
        f"{prefix}.gate_proj.weight": (size, HIDDEN),
        f"{prefix}.up_proj.weight": (size, HIDDEN),
        f"{prefix}.down_proj.weight": (HIDDEN, size),
    }
    if not experts:
        return one(f"{layer}.mlp", size)
    shapes = {f"{layer}.mlp.gate.weight": (experts, HIDDEN)}
    for e in range(experts):
        shapes |= one(f"{layer}.mlp.experts.{e}", size)
    return shapes


def dream() -> tuple[dict, dict]:
    auto_map = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    more = {"auto_map": auto_map, "mask_token_id": MASK, "use_sliding_window": False, "sliding_window": None}
    return qwen("DreamModel", "Dream", qk_norm=False, qkv_bias=True, **more)


def illada() -> tuple[dict, dict]:
    """The head is tied, and stored as well."""
    auto_map = {"AutoConfig": "configuration_illada.ILLaDAConfig"}
    more = {"auto_map": auto_map, "tie_word_embeddings": True, "rope_theta": 500000.0, "layer_norm_eps": None}
    more |= {"attention_bias": False, "mlp_bias": False, "resid_pdrop": 0.0, "bos_token_id": 0, "pad_token_id": PAD}
    config, state = qwen("ILLaDAForCausalLM", "illada", qk_norm=False, qkv_bias=False, **more)
    return config | {"mask_token_id": MASK}, state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}


def sdar(*, experts: int = 0) -> tuple[dict, dict]:
    more = {
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
        "head_dim": 16,
        "mask_token_id": MASK,
        "block_size": 4,
    }
    if experts:
        more |= {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        more |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    name = "SDARMoeForCausalLM" if experts else "SDARForCausalLM"
    return qwen(name, "sdar_moe" if experts else "sdar", qk_norm=True, qkv_bias=False, experts=experts, **more)


def rnd1() -> tuple[dict, dict]:
    more = {
        "auto_map": {"AutoConfig": "configuration_rnd.RND1Config", "AutoModelForMaskedLM": "modeling_rnd.RND1LM"},
        "decoder_sparse_step": 1,
        "head_dim": 16,
        "is_causal": False,
        "mask_token_id": MASK,
        "mlp_only_layers": [],
        "moe_backend": "hf",
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "rope_scaling": False,
        "sliding_window": False,
        "use_sliding_window": False,
    }
    return qwen("RND1", "rnd1", qk_norm=True, qkv_bias=False, experts=8, **more)


def stable_diffcoder() -> tuple[dict, dict]:
    """A Llama under its own names; the published config has no mask id, which is the tokenizer's."""
    more = {
        "auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"},
        "attention_bias": False,
        "attention_dropout": 0.1,
        "layer_norm_eps": None,
        "mlp_bias": False,
        "resid_pdrop": 0.1,
        "rope_theta": 500000.0,
    }
    return qwen("StableDiffcoderForCausalLM", "llama", qk_norm=False, qkv_bias=False, **more)


def a2d(base: str, **more) -> tuple[dict, dict]:
    """Tiny-A2D: no mask id in the config, and the tied embedding is stored twice."""
    name = f"A2D{base}LMHeadModel"
    more |= {"auto_map": {"AutoModelForMaskedLM": f"modeling_{base.lower()}.{name}"}, "tie_word_embeddings": True}
    more |= {"head_dim": 16} if base == "Qwen3" else {}
    config, state = qwen(name, f"a2d-{base.lower()}", qk_norm=base == "Qwen3", qkv_bias=base == "Qwen2", **more)
    return config, state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}


def nemotron(paradigm: str = "bidirectional") -> tuple[dict, dict]:
    """Ministral 3's tensors below `encoder`; the heads together are wider than the model. Positions from 16 on are past
    the original length."""
    rope = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
    more = {"auto_map": {"AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig"}}
    more |= {"head_dim": 16, "rope_parameters": rope, "dlm_paradigm": paradigm, "block_size": 8, "mask_token_id": MASK}
    more |= {"attention_bias": False, "mlp_bias": False, "sliding_window": None, "pad_token_id": None}
    name = "NemotronLabsDiffusionModel"
    config, state = qwen(name, "nemotron_labs_diffusion", qk_norm=False, qkv_bias=False, **more)
    del config["rope_scaling"], config["rope_theta"]
    return config, {
        key.replace("model.", "encoder.").replace("lm_head", "diffusion_head"): x for key, x in state.items()
    }


def llada_moe(**more) -> tuple[dict, dict]:
    fields = {
        "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig"},
        "dense_intermediate_size": 48,
        "expert_intermediate_size": 24,
        "moe_layer_freq": [1] * LAYERS,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": None,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 1,
        "mask_token_id": MASK,
    }
    return qwen("LLaDAMoEModelLM", "llada", qk_norm=True, qkv_bias=False, experts=8, **(fields | more))


def llada2() -> tuple[dict, dict]:
    config = {
        "architectures": ["LLaDA2MoeModelLM"],
        "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"},
        "model_type": "llada2_moe",
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "num_attention_heads": HEADS,
        "num_experts": 8,
        "num_key_value_heads": KV_HEADS,
        "rope_theta": 600000,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_bias": False,
        "use_rmsnorm": True,
        "rms_norm_eps": 1e-6,
        "head_dim": 16,
        "num_shared_experts": 1,
        "use_qkv_bias": False,
        "vocab_size": VOCAB,
        "moe_router_enable_expert_bias": True,
        "routed_scaling_factor": 2.5,
        "n_group": 4,
        "topk_group": 2,
        "score_function": "sigmoid",
        "pad_token_id": 2,
        "eos_token_id": 2,
        "mask_token_id": MASK,
        "partial_rotary_factor": 0.5,
    }
    shapes = {
        "model.word_embeddings.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
            f"{layer}.attention.query_key_value.weight": ((HEADS + 2 * KV_HEADS) * 16, HIDDEN),
            f"{layer}.attention.query_layernorm.weight": (16,),
            f"{layer}.attention.key_layernorm.weight": (16,),
            f"{layer}.attention.dense.weight": (HIDDEN, HEADS * 16),
        }
        if n == 0:
            shapes |= mlp(layer, 0, 48)
        else:
            shapes |= mlp(layer, 8, 24) | {f"{layer}.mlp.gate.expert_bias": (8,)}
            shapes |= {k.replace("mlp.", "mlp.shared_experts."): v for k, v in mlp(layer, 0, 24).items()}
    return config, weights(shapes)


ORIGINAL = {
    "llada": llada,
    "llada_tied": lambda: llada(tied=True),
    "illada": illada,
    "llada_moe": llada_moe,
    "llada2": llada2,
    "dream": dream,
    "sdar": sdar,
    "sdar_moe": lambda: sdar(experts=8),
    "rnd1": rnd1,
    "stable_diffcoder": stable_diffcoder,
    "a2d_qwen2": lambda: a2d("Qwen2"),
    "a2d_qwen3": lambda: a2d("Qwen3"),
    "a2d_blocks": lambda: a2d("Qwen3", block_size=4),
    "nemotron": nemotron,
    "nemotron_ar": lambda: nemotron("autoregressive"),
}


def tokenizer(*, mask: bool = False) -> PreTrainedTokenizerFast:
    """<unk> 0, <pad> 1, <eos> 2, then letters; with a mask token only if asked: several families have none."""
    names = ["<unk>", "<pad>", "<eos>", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {token: i for i, token in enumerate(names)} | ({"<mask>": MASK} if mask else {})
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Fuse()
    special = {"mask_token": "<mask>"} if mask else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", **special)


def write(
    directory: Path, config: dict, state: dict, *, dtype: torch.dtype = torch.float32, mask: bool = False
) -> Path:
    """The folder as the authors would publish it. An expert bias stays fp32."""
    directory.mkdir(parents=True, exist_ok=True)
    cast = {name: x if name.endswith("expert_bias") else x.to(dtype) for name, x in state.items()}
    save_file({name: x.contiguous() for name, x in cast.items()}, directory / "model.safetensors", {"format": "pt"})
    config = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    own = "A2D" in config["architectures"][0] or "Diffcoder" in config["architectures"][0]  # the config has no mask id
    tokenizer(mask=mask or own).save_pretrained(directory)
    return directory


def published(directory: Path, family: str, **options) -> Path:
    """The family's tiny checkpoint, written to a folder."""
    return write(directory, *ORIGINAL[family](), **options)


@cache
def made(family: str) -> tuple[dict, dict]:
    """A tiny checkpoint of a class that transformers has, with the extra tensors that published ones carry."""
    same = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    same |= {
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "pad_token_id": PAD,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    cls, more = {
        "bert": (transformers.BertForMaskedLM, {}),
        "roberta": (transformers.RobertaForMaskedLM, {}),
        "esm2": (
            transformers.EsmForMaskedLM,
            {"mask_token_id": MASK, "position_embedding_type": "rotary", "token_dropout": True},
        ),
        "esm1b": (
            transformers.EsmForMaskedLM,
            {"mask_token_id": MASK, "emb_layer_norm_before": True, "token_dropout": True},
        ),
        "esm_plain": (transformers.EsmForMaskedLM, {"mask_token_id": MASK, "emb_layer_norm_before": True}),
        "modernbert": (
            transformers.ModernBertForMaskedLM,
            {"cls_token_id": 2, "sep_token_id": 2, "local_attention": 8},
        ),
        "llama": (transformers.LlamaForCausalLM, {"num_key_value_heads": KV_HEADS}),
        "qwen3": (transformers.Qwen3ForCausalLM, {"num_key_value_heads": KV_HEADS, "head_dim": 16}),
        "smollm2": (transformers.LlamaForCausalLM, {"num_key_value_heads": KV_HEADS, "tie_word_embeddings": True}),
    }[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = cls(cls.config_class(**same | more))
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    state = module.state_dict()
    if family == "bert":
        state |= {"bert.pooler.dense.weight": torch.ones(HIDDEN, HIDDEN), "cls.seq_relationship.bias": torch.ones(2)}
    if family == "smollm2":
        del state["lm_head.weight"]
    config = json.loads(module.config.to_json_string(use_diff=False)) | {"architectures": [cls.__name__]}
    return config, {k: v.clone() for k, v in state.items()}


def stock(directory: Path, family: str) -> Path:
    """The checkpoint of `made`, written to a folder."""
    config, state = made(family)
    return write(directory, config, state, mask=config["architectures"][0].endswith("MaskedLM"))


STOCK = ("bert", "roberta", "esm2", "esm1b", "esm_plain", "modernbert", "llama", "qwen3", "smollm2")


def checkpoint(directory: Path, family: str) -> Path:
    return stock(directory, family) if family in STOCK else published(directory, family)
