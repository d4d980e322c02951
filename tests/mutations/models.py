"""Families, loading, log-probs of the head, LoRA, tensors of checkpoints, positions and shifts."""

from tests.mutations.record import mutations

FAMILIES = "models/test_families.py"
REFERENCE = "models/test_families_reference.py"
PEFT = "models/test_peft.py"

MUTATIONS = [
    *mutations(
        "models/logprobs.py",
        "models/test_logprobs.py",
        ("logits / sampling_params.temperature", "logits * sampling_params.temperature"),
        (
            "if sampling_params.temperature not in (0, 1)",
            "if sampling_params.temperature < 1 and sampling_params.temperature",
        ),
        ("logits.topk(sampling_params.top_k, dim=-1)", "logits.topk(sampling_params.top_k + 1, dim=-1)"),
        ("logits < kth", "logits <= kth"),
        ("probs.cumsum(-1) - probs >= sampling_params.top_p", "probs.cumsum(-1) >= sampling_params.top_p"),
        ("probs = ordered.softmax(-1)", "probs = ordered.mul(sampling_params.temperature).softmax(-1)"),
        ("dropped = dropped.scatter(-1, keep[:, None], False)", "pass"),
        ("    logits = logits.float()\n", ""),
        ("mul_(-gradient[:, None])", "mul_(gradient[:, None])"),
        (
            "out.scatter_add_(-1, tokens[:, None], gradient[:, None])",
            "out.scatter_(-1, tokens[:, None], gradient[:, None])",
        ),
        ("entropy = -(logp.exp()", "entropy = (logp.exp()"),
        (
            "max(ROWS, elements // vocabulary // ROWS * ROWS)",
            "max(ROWS, elements // vocabulary)",
            "models/test_logprobs.py samplers/test_unmask.py",
        ),
        (".backward(v)", ".sum().backward()"),
        (
            "uniforms[:, None] * total, torch",
            "uniforms[:, None], torch",
            "models/test_logprobs.py samplers/test_unmask_distribution.py",
        ),
        ("torch.searchsorted(groups, point, right=True)", "torch.searchsorted(groups, point)"),
        (
            "point = point - torch.where(group > 0, groups.gather(-1, (group - 1).clamp(min=0)), 0.0)",
            "point = point + 0",
        ),
        (".masked_fill(members >= size, 0)", ""),
        (
            "count, missing = len(rows[0]), -len(rows[0]) % ROWS",
            "count, missing = len(rows[0]), 0",
            "models/test_logprobs.py samplers/test_unmask.py",
        ),
        ("logits = logits.index_fill(-1, suppressed, -torch.inf)", "pass"),
    ),
    *mutations(
        "models/families.py",
        REFERENCE,
        ('raw["rope_theta"]} |', "10000.0} |"),
        ('raw.get("embedding_size") or raw["vocab_size"]', 'raw["vocab_size"]', f"{REFERENCE} {FAMILIES}"),
        ('raw.get("n_kv_heads") or raw["n_heads"]', 'raw["n_heads"]', f"{REFERENCE} {FAMILIES}"),
        ("    float32_rope=True,\n", "", f"{REFERENCE} {FAMILIES}"),
        (
            '("ff_proj", "mlp.gate_proj"), ("up_proj", "mlp.up_proj")',
            '("up_proj", "mlp.gate_proj"), ("ff_proj", "mlp.up_proj")',
        ),
        ('norm_topk_prob=bool(raw.get("norm_topk_prob"))', "norm_topk_prob=True"),
        ('norm_topk_prob=raw.get("norm_topk_prob", True)', "norm_topk_prob=False"),
        ("not sparse]", "sparse]", FAMILIES),
        ('n_shared_experts=raw["num_shared_experts"]', "n_shared_experts=1", f"{REFERENCE} {FAMILIES}"),
        ('rope["partial_rotary_factor"] = raw["partial_rotary_factor"]', "pass"),
        (
            'moe_router_score_function="softmax"',
            'moe_router_score_function="sigmoid"',
            f"{REFERENCE} models/test_families_errors.py",
        ),
        (
            '    name="dream",\n    attention="full",\n    shift=True,',
            '    name="dream",\n    attention="full",\n    shift=False,',
            f"{REFERENCE} {FAMILIES}",
        ),
        ('end_tokens=("<|eot_id|>",)', "end_tokens=()", FAMILIES),
        ("if raw.get(key) not in (None, value)", "if raw.get(key) is None", "models/test_families_errors.py"),
        (
            'raw.get("intermediate") or 0' if False else 'raw.get("mlp_hidden_size") or raw["mlp_ratio"]',
            'raw["mlp_ratio"]',
            f"{REFERENCE} {FAMILIES}",
        ),
        (
            "ROBERTA, MASKED_LM, SHIFTED_DIFFUSION_LM, DIFFUSION_LM, CAUSAL_LM)",
            "MASKED_LM, ROBERTA, SHIFTED_DIFFUSION_LM, DIFFUSION_LM, CAUSAL_LM)",
            FAMILIES,
        ),
        (
            "MASKED_LM, SHIFTED_DIFFUSION_LM, DIFFUSION_LM, CAUSAL_LM)",
            "MASKED_LM, DIFFUSION_LM, SHIFTED_DIFFUSION_LM, CAUSAL_LM)",
            f"{FAMILIES} models/test_convert.py",
        ),
    ),
    *mutations(
        "models/lora.py",
        PEFT,
        (
            "(self.dropped(x.float()))) * (self.lora.alpha / self.lora.r)",
            "(self.dropped(x.float()))) * (self.lora.alpha)",
        ),
        (
            "added * (self.lora.alpha / self.lora.r)).to(weight.dtype)",
            "added * (self.lora.r / self.lora.alpha)).to(weight.dtype)",
        ),
        ("if not self.active:", "if False:"),
        ("Generator().manual_seed(self.seed + self.calls)", "Generator().manual_seed(self.seed)"),
        ("/ (1 - self.lora.dropout)", ""),
        ("or not torch.is_grad_enabled()", ""),
        (">= self.lora.dropout\n", "< self.lora.dropout\n"),
        ("bound = base_layer.in_features**-0.5", "bound = base_layer.out_features**-0.5"),
        ("* 2 - 1) * bound", ") * bound"),
        ("    module.requires_grad_(False)\n    generator", "    generator"),
        (
            "self.lora_B.weight.float() @ self.lora_A.weight.float()",
            "(self.lora_B.weight @ self.lora_A.weight).to(weight.dtype)",
            "",
            "the adapters are fp32 and the product's rounding to the weight's dtype before the sum changes bf16 only",
        ),
        (
            "            layer.active = was\n",
            "            layer.active = True\n",
            f"{PEFT} quantization/test_aligned.py",
        ),
        ("kept.SCB.float() / 127", "kept.SCB.float() / 128"),
        ('"lora_alpha": lora.alpha', '"lora_alpha": lora.r'),
        ("        layer.calls = int(metadata", "        _ = int(metadata"),
        (
            "return Lora(r=128, alpha=64.0, dropout=0.05)",
            "return Lora(r=128, alpha=128.0, dropout=0.05)",
            f"{PEFT} test_config.py",
        ),
    ),
    *mutations(
        "models/weights.py",
        FAMILIES,
        ("tensor.nbytes > room and shards[-1]", "tensor.nbytes > room * 100 and shards[-1]"),
        ("tensor.untyped_storage().nbytes() == tensor.nbytes", "True"),
        (
            'QKV = "model.layers.*.self_attn", ("q_proj", "k_proj", "v_proj")',
            'QKV = "model.layers.*.self_attn", ("k_proj", "q_proj", "v_proj")',
            f"{FAMILIES} {REFERENCE}",
        ),
        ("gate, up = both.chunk(2)", "up, gate = both.chunk(2)"),
        (
            "return config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads",
            "return config.num_key_value_heads, config.num_key_value_heads, config.num_attention_heads",
            f"{FAMILIES} {REFERENCE}",
        ),
        ('config.tie_word_embeddings and name == "lm_head.weight"', "False"),
        ("sum(x.nbytes for x in state.values())", "sum(x.numel() for x in state.values())"),
    ),
    *mutations(
        "models/base.py",
        f"{FAMILIES} {REFERENCE}",
        ("cumsum(-1) - 1).clamp(min=0)", "cumsum(-1)).clamp(min=0)"),
        (
            "positions + module.config.pad_token_id + 1",
            "positions + module.config.pad_token_id",
            f"{FAMILIES} models/test_policies.py",
        ),
        ("block[:, None, :] <= block[:, :, None]", "block[:, None, :] < block[:, :, None]"),
        ("attention_mask[:, None, :] & (block", "(block"),
    ),
    *mutations(
        "models/policy.py",
        f"{FAMILIES} models/test_policies.py",
        ("states.roll(1, dims=1)", "states.roll(-1, dims=1)"),
        ("torch.where(before[..., None], states.roll(1, dims=1), states)", "states.roll(1, dims=1)"),
        ("shifted(states, attention_mask) if self.spec.shift else states", "states"),
        ("!= moves and position", "!= moves and False", "models/test_families_errors.py"),
    ),
    *mutations(
        "models/loading.py",
        f"{FAMILIES} models/test_families_errors.py",
        (
            '(getattr(config, "mask_token_id", None), tokenizer.mask_token_id, family.mask_id)',
            '(family.mask_id, getattr(config, "mask_token_id", None), tokenizer.mask_token_id)',
        ),
        ("(also, config.eos_token_id)", "(config.eos_token_id,)", f"{FAMILIES}"),
        ("if tokenizer.mask_token_id not in (None, found)", "if False"),
        ('changes["max_length"] -= config.pad_token_id + 1', "pass", "models/test_policies.py"),
        ("i is not None and i < config.vocab_size", "i is not None", f"{FAMILIES}"),
    ),
    *mutations(
        "models/tokens.py",
        "evaluation/test_evaluation.py",
        ("if token in policy.spec.eos_ids), len(ids))", "if token == policy.spec.eos_ids[0]), len(ids))"),
        ("ids[:end]", "ids[: end + 1]"),
        ("if mine]", "if mine is not None]"),
        ("prompt[:-1] if opening else prompt", "prompt"),
    ),
    *mutations(
        "models/convert.py",
        "models/test_convert.py",
        ("table.weight[: min(old, mask_id)].mean(0)", "table.weight[: min(old, mask_id)].sum(0)"),
        ("False, True, mask_id\n", "False, False, mask_id\n"),
    ),
    *mutations(
        "models/tiny.py",
        "models/test_policies.py",
        ("max_length + 1,", "max_length,"),
    ),
]
