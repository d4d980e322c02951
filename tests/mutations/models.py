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
        ("            logits[..., token] = -torch.inf", "            pass"),
    ),
    *mutations(
        "models/families.py",
        REFERENCE,
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
            "ROBERTA, MASKED_LM, SHIFTED_DIFFUSION_LM, DIFFUSION_LM, CAUSAL_LM]",
            "MASKED_LM, ROBERTA, SHIFTED_DIFFUSION_LM, DIFFUSION_LM, CAUSAL_LM]",
            FAMILIES,
        ),
        (
            "MASKED_LM, SHIFTED_DIFFUSION_LM, DIFFUSION_LM, CAUSAL_LM]",
            "MASKED_LM, DIFFUSION_LM, SHIFTED_DIFFUSION_LM, CAUSAL_LM]",
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
        ("seed=self.seed, step=self.calls,", "seed=self.seed, step=0,"),
        ("        self.calls += 1\n", ""),
        ("/ (1 - self.lora.dropout)", ""),
        ("or not torch.is_grad_enabled()", ""),
        ("bound = base_layer.in_features**-0.5", "bound = base_layer.out_features**-0.5"),
        ("* 2 - 1) * bound", ") * bound"),
        ("    module.requires_grad_(False)\n", ""),
        (
            "self.lora_B.weight.float() @ self.lora_A.weight.float()",
            "(self.lora_B.weight @ self.lora_A.weight).to(weight.dtype)",
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
            "alpha: float = 64.0, dropout: float = 0.05",
            "alpha: float = 128.0, dropout: float = 0.05",
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
            '(getattr(config, "mask_token_id", None), tokenizer.mask_token_id, known, default)',
            '(default, getattr(config, "mask_token_id", None), tokenizer.mask_token_id, known)',
        ),
        (
            "default = family.mask_id if config.vocab_size == family.mask_vocabulary else None",
            "default = family.mask_id",
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
    *mutations(
        "models/rope.py",
        "models/test_rope.py models/test_families_reference.py",
        (
            'kind = found.setdefault("rope_type", given.get("type", "default"))',
            'kind = found.setdefault("rope_type", "default")',
        ),
        ("return beside | found", "return found | beside"),
        ('("rope_theta", "partial_rotary_factor") if', '("rope_theta",) if'),
        ("or not factor >= 1:", "or not factor >= 0:"),
        ("if kind not in SCALINGS:", "if False:"),
        ("for key in sorted(found.keys() - needed - optional - _COMMON):", "for key in ():"),
        ("states.new_empty(0).float()", "states.new_empty(0)", FAMILIES),
    ),
    *mutations(
        "models/policy.py",
        "models/test_outside.py testing/test_contract_policies.py",
        ("return self.spec.vocab_size or self.module.config.vocab_size", "return self.module.config.vocab_size"),
        ("if not spec.eos_ids:", "if False:"),
        ("if i is not None and not 0 <= i < size]", "if i is not None and not 0 <= i <= size]"),
    ),
    *mutations(
        "models/loading.py",
        "models/test_outside.py",
        ("max(counts, key=lambda dtype: counts[dtype])", "next(iter(counts))"),
        ("if name not in skip and id(tensor) not in seen:", "if name not in skip:"),
    ),
    *mutations(
        "models/weights.py",
        "models/test_outside.py models/test_peft.py",
        (" or state[n].shape != own[n].shape", ""),
    ),
]
