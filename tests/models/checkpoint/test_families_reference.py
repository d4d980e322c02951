"""Logits against implementations written from the published descriptions: einsum, on the original names."""

import math
from functools import partial

import pytest
import torch
from layouts import HEADS, KV_HEADS, MASK, ORIGINAL, write
from torch import einsum
from torch.nn.functional import silu

from dllm_rl import load_policy

LENGTH = 41


def norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def rotate(x, theta, fraction=1.0):
    """x (H, T, E): the first `fraction` of E in pairs (i, i + half), turned by position * theta^(-2i/size)."""
    size = int(x.shape[-1] * fraction)
    half = size // 2
    angle = torch.arange(x.shape[1])[:, None] / theta ** (torch.arange(half) * 2 / size)
    a, b, rest = x[..., :half], x[..., half:size], x[..., size:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=-1)


def yarn(x, rope):
    """As `rotate`, where waves longer than the original length are `factor` times slower, and shorter ones in part."""
    size, theta, original = x.shape[-1], rope["rope_theta"], rope["original_max_position_embeddings"]
    pairs = torch.arange(size // 2).double()

    def place(turns):  # of the pair that turns so often in the original length
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(place(rope["beta_fast"])), 0), min(math.ceil(place(rope["beta_slow"])), size - 1)
    slow = ((pairs - low) / (high - low)).clamp(0, 1)
    angle = torch.arange(x.shape[1])[:, None] * theta ** (-pairs * 2 / size) * (slow / rope["factor"] + 1 - slow)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def attend(q, k, v, allowed):
    """q (H, T, E), k and v (KV, T, E): query head h uses key head h // (H / KV)."""
    k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
    scores = einsum("hqe,hke->hqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~allowed, -math.inf)
    return einsum("hqk,hke->qhe", scores.softmax(-1), v).flatten(1)


def heads(x, weight, bias=0.0, size=8):
    return (einsum("td,od->to", x, weight) + bias).unflatten(1, (-1, size)).transpose(0, 1)


def swiglu(x, gate, up, down):
    return einsum("ti,di->td", silu(einsum("td,id->ti", x, gate)) * einsum("td,id->ti", x, up), down)


def reference_llada(config, w, tokens):
    x, everyone = w["model.transformer.wte.weight"][tokens], torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    for n in range(config["n_layers"]):
        block = {k.removeprefix(f"model.transformer.blocks.{n}."): v for k, v in w.items() if f".blocks.{n}." in k}
        h = norm(x, block["attn_norm.weight"], 1e-5)
        q, k, v = (heads(h, block[f"{name}_proj.weight"]) for name in "qkv")
        y = attend(rotate(q, 500000.0), rotate(k, 500000.0), v, everyone)
        x = x + einsum("to,do->td", y, block["attn_out.weight"])
        h = norm(x, block["ff_norm.weight"], 1e-5)
        x = x + swiglu(h, block["ff_proj.weight"], block["up_proj.weight"], block["ff_out.weight"])
    return einsum("td,vd->tv", norm(x, w["model.transformer.ln_f.weight"], 1e-5), w["model.transformer.ff_out.weight"])


def softmax_experts(x, layer, config):
    """The two likeliest experts, weighted by their probabilities as they are, or divided by their sum (RND1)."""
    out = torch.zeros_like(x)
    probs = einsum("td,ed->te", x, layer["mlp.gate.weight"]).softmax(-1)
    for t in range(len(x)):
        chosen = probs[t].topk(config["num_experts_per_tok"]).indices
        total = probs[t, chosen].sum() if config["norm_topk_prob"] else 1.0
        for e in chosen.tolist():
            expert = [layer[f"mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")]
            out[t] += probs[t, e] / total * swiglu(x[t : t + 1], *expert)[0]
    return out


def reference_qwen(config, w, tokens, *, shift=False, block_size=LENGTH):
    """Dream (biases, shifted), LLaDA-MoE (query and key norms, experts), RND1 (the same, shifted), iLLaDA (neither),
    Stable-DiffCoder (neither; blocks), SDAR (norms; blocks), Tiny-A2D (biases or norms; full or in blocks)."""
    x, block = w["model.embed_tokens.weight"][tokens], torch.arange(LENGTH) // block_size
    allowed, size = block[None, :] <= block[:, None], config.get("head_dim", 8)
    for n in range(config["num_hidden_layers"]):
        layer = {k.removeprefix(f"model.layers.{n}."): v for k, v in w.items() if f".layers.{n}." in k}
        h = norm(x, layer["input_layernorm.weight"], 1e-6)
        q, k, v = (
            heads(h, layer[f"self_attn.{a}_proj.weight"], layer.get(f"self_attn.{a}_proj.bias", 0), size) for a in "qkv"
        )
        if "self_attn.q_norm.weight" in layer:
            q, k = norm(q, layer["self_attn.q_norm.weight"], 1e-6), norm(k, layer["self_attn.k_norm.weight"], 1e-6)
        y = attend(rotate(q, config["rope_theta"]), rotate(k, config["rope_theta"]), v, allowed)
        x = x + einsum("to,do->td", y, layer["self_attn.o_proj.weight"])
        h = norm(x, layer["post_attention_layernorm.weight"], 1e-6)
        if "num_experts" in config:
            x = x + softmax_experts(h, layer, config)
        else:
            x = x + swiglu(h, *(layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    logits = einsum("td,vd->tv", norm(x, w["model.norm.weight"], 1e-6), w["lm_head.weight"])
    # The logits at i-1 predict position i; nothing comes before the first.
    return torch.cat([logits[:1], logits[:-1]]) if shift else logits


def sigmoid_experts(x, layer, config):
    """Grouped choice: the two best groups by the sum of their two best biased scores, in them the two best experts.

    The bias chooses only; the weights are the plain sigmoid scores, normalized and scaled by 2.5.
    """
    out = swiglu(x, *(layer[f"mlp.shared_experts.{name}_proj.weight"] for name in ("gate", "up", "down")))
    scores = einsum("td,ed->te", x, layer["mlp.gate.weight"]).sigmoid()
    for t in range(len(x)):
        biased = scores[t] + layer["mlp.gate.expert_bias"]
        groups = biased.unflatten(0, (config["n_group"], -1))
        best = groups.sort(descending=True).values[:, :2].sum(-1).topk(config["topk_group"]).indices
        open_ = (
            torch.zeros(config["n_group"], dtype=torch.bool)
            .index_fill(0, best, True)
            .repeat_interleave(groups.shape[1])
        )
        chosen = biased.masked_fill(~open_, -math.inf).topk(config["num_experts_per_tok"]).indices
        for e in chosen.tolist():
            expert = [layer[f"mlp.experts.{e}.{name}_proj.weight"] for name in ("gate", "up", "down")]
            out[t] += 2.5 * scores[t, e] / scores[t, chosen].sum() * swiglu(x[t : t + 1], *expert)[0]
    return out


def reference_llada2(config, w, tokens):
    x, block = w["model.word_embeddings.weight"][tokens], torch.arange(LENGTH) // 32
    allowed = block[None, :] <= block[:, None]
    for n in range(config["num_hidden_layers"]):
        layer = {k.removeprefix(f"model.layers.{n}."): v for k, v in w.items() if f".layers.{n}." in k}
        h = norm(x, layer["input_layernorm.weight"], 1e-6)
        rows = heads(h, layer["attention.query_key_value.weight"], size=16)
        q, k, v = rows[:HEADS], rows[HEADS : HEADS + KV_HEADS], rows[HEADS + KV_HEADS :]
        q, k = (
            norm(q, layer["attention.query_layernorm.weight"], 1e-6),
            norm(k, layer["attention.key_layernorm.weight"], 1e-6),
        )
        y = attend(rotate(q, 600000.0, 0.5), rotate(k, 600000.0, 0.5), v, allowed)
        x = x + einsum("to,do->td", y, layer["attention.dense.weight"])
        h = norm(x, layer["post_attention_layernorm.weight"], 1e-6)
        dense = [layer.get(f"mlp.{name}_proj.weight") for name in ("gate", "up", "down")]
        x = x + (swiglu(h, *dense) if n < config["first_k_dense_replace"] else sigmoid_experts(h, layer, config))
    return einsum("td,vd->tv", norm(x, w["model.norm.weight"], 1e-6), w["lm_head.weight"])


def reference_nemotron(config, w, tokens):
    """A block with a mask sees all of itself; its context is causal. Queries grow with the log of their position."""
    place, rope, causal = torch.arange(LENGTH), config["rope_parameters"], config["dlm_paradigm"] == "autoregressive"
    allowed = place[None, :] <= place[:, None]
    if not causal:
        for block in (tokens == MASK).nonzero()[:, 0] // config["block_size"]:
            inside = place // config["block_size"] == block
            allowed = allowed | (inside[None, :] & inside[:, None])
    growth = 1 + rope["llama_4_scaling_beta"] * (1 + place // rope["original_max_position_embeddings"]).double().log()
    x = w["encoder.embed_tokens.weight"][tokens]
    for n in range(config["num_hidden_layers"]):
        layer = {k.removeprefix(f"encoder.layers.{n}."): v for k, v in w.items() if f".layers.{n}." in k}
        h = norm(x, layer["input_layernorm.weight"], 1e-6)
        q, k, v = (heads(h, layer[f"self_attn.{a}_proj.weight"], size=16) for a in "qkv")
        y = attend(yarn(q, rope) * growth[:, None], yarn(k, rope), v, allowed)
        x = x + einsum("to,do->td", y, layer["self_attn.o_proj.weight"])
        h = norm(x, layer["post_attention_layernorm.weight"], 1e-6)
        x = x + swiglu(h, *(layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    logits = einsum("td,vd->tv", norm(x, w["encoder.norm.weight"], 1e-6), w["diffusion_head.weight"])
    return torch.cat([logits[:1], logits[:-1]]) if causal else logits


@pytest.mark.repeated(every=4)
@pytest.mark.parametrize(
    ("family", "reference"),
    [
        ("llada", reference_llada),
        ("dream", partial(reference_qwen, shift=True)),
        ("illada", reference_qwen),
        ("sdar", partial(reference_qwen, block_size=4)),
        ("llada_moe", reference_qwen),
        ("llada2", reference_llada2),
        ("nemotron", reference_nemotron),
        ("nemotron_ar", reference_nemotron),
        ("rnd1", partial(reference_qwen, shift=True)),
        ("stable_diffcoder", partial(reference_qwen, block_size=4)),
        ("a2d_qwen2", reference_qwen),
        ("a2d_qwen3", reference_qwen),
        ("a2d_blocks", partial(reference_qwen, block_size=4)),
    ],
)
def test_logits_equal_the_published_description(tmp_path, family, reference):
    config, state = ORIGINAL[family]()
    policy = load_policy(write(tmp_path, config, state))
    tokens = torch.randint(3, 38, (LENGTH,), generator=torch.Generator().manual_seed(3))
    tokens[[17, 21, 35]] = MASK
    expected = reference(config, {name: tensor.double() for name, tensor in state.items()}, tokens).float()
    got = policy.logits(tokens[None], torch.ones(1, LENGTH, dtype=torch.bool))[0]
    assert expected.std() > 0.5  # logits that all but vanish would agree with anything
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
