"""Masks, estimators, scoring of a view, packed scoring."""

from tests.mutations.record import mutations

TOYS = "likelihoods/test_likelihoods.py"
CONTRACT = "likelihoods/test_contract_estimators.py"
MODELS = "likelihoods/test_likelihoods_models.py"
PACKED = "likelihoods/test_packed.py"
ORDER = "likelihoods/test_order.py"

MUTATIONS = [
    *mutations(
        "likelihoods/masks.py",
        TOYS,
        ("[:, None] + u) / num_samples", "[:, None] + u) / (num_samples + 1)"),
        ("(u * count).long()", "(u * count).round().long()"),
        ("minimum(count - 1).clamp(min=0)", "clamp(min=0)"),
        ("argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)", "argsort(dim=-1, stable=True)"),
        ("masked * inside.sum(-1, keepdim=True) / k.clamp(min=1)", "masked * inside.sum(-1, keepdim=True) / (k + 1)"),
        ("masked * inside.sum(-1, keepdim=True) / k.clamp(min=1)", "masked * inside.shape[-1] / k.clamp(min=1)"),
        (
            "torch.inf)) < k)\n    return masked, masked * inside",
            "torch.inf)) <= k)\n    return masked, masked * inside",
        ),
        ("(inside & (order >= k), size - k)", "(inside & (order >= k), k)"),
        ("(inside & (order >= k), size - k)", "(inside & (order > k), size - k)"),
        ("masked * (size + 1) / (2 * count", "masked * size / (2 * count"),
        ("choose(u_block, block.amax(-1, keepdim=True) + 1)", "choose(u_block, block.amax(-1, keepdim=True))"),
        ("k = 1 + choose(u_count,", "k = choose(u_count,"),
        ("masked | (completion & (block > chosen))", "masked"),
        ("weight * (block.amax(-1, keepdim=True) + 1)", "weight"),
        ("completion.long().cumsum(-1) - 1\n", "completion.long().cumsum(-1)\n"),
        ("(weight / samples).float()", "weight.float()"),
        ("hidden | rollout.completion_mask", "hidden"),
        ("left = noise.masked & (noise.weight == 0)", "left = noise.masked", ORDER),
        ("left &= rollout.open_step <= torch", "left &= rollout.open_step < torch", ORDER),
        ("weight=noise.weight + left, left=left", "weight=noise.weight, left=left", ORDER),
        (
            "if params.filters and params.support",
            "if params.support",
            ORDER,
            "without filters the support is always own",
        ),
        ("generator)) < prompt_mask", "generator)) > prompt_mask"),
        (
            "prompt = rollout.attention_mask & ~rollout.completion_mask",
            "prompt = ~rollout.completion_mask",
            f"{TOYS} {CONTRACT}",
        ),
        ("torch.cat([k, size + 1 - k])", "torch.cat([k, size - k])"),
        ("*(-key for key in keys)", "*keys"),
        ("k = 1 + choose(u / 2, size)", "k = 1 + choose(u, size)"),
        ("counts = 1 + choose(u, size)", "counts = choose(u, size + 1)"),
        ("choose(u, size + 1)]", "choose(u, size)]"),
        ("(point + 1) / 2", "(point + 1) / 3"),
        ("w / 2 * weight", "w * weight"),
        (
            "torch.where(segment < 0, -1, segment * num_segments // steps",
            "torch.where(segment < 0, -1, segment // num_segments // steps",
        ),
        ("amax(-1, keepdim=True) + 1\n        segment", "amax(-1, keepdim=True)\n        segment"),
        ("& (segment >= index)", "& (segment > index)"),
        ("(rollout.completion_mask & (segment == index)).float()", "masked.float()"),
        (
            "num_samples, stratified=False, device=completion.device",
            "num_samples, stratified=True, device=completion.device",
        ),
        ("segment = step - first", "segment = step", PACKED),
        ("(last - first + 1)", "(last - first)", PACKED),
        (
            "return [torch.Generator().manual_seed(int(seed)) for seed in row_seeds",
            "return [torch.Generator().manual_seed(7) for seed in row_seeds",
            f"{TOYS} {CONTRACT}",
        ),
    ),
    *mutations(
        "likelihoods/estimators.py",
        TOYS,
        ("(scores * noise.weight).sum(0)", "(scores * noise.weight).mean(0)"),
        ("(scores * noise.weight).sum(0)", "scores.sum(0)"),
        ("total = total + score * weight", "total = score * weight", ORDER),
        ("return rollout.order_logprobs + rollout.logprobs", "return rollout.logprobs", ORDER),
        ('if order == "law" and num_segments is None:', 'if order == "law":', ORDER),
        ("beta * scores + noise.weight.where(scored, 1).log()", "beta * scores"),
        ("beta * scores + noise.weight", "scores + noise.weight"),
        (".logsumexp(0) / beta)", ".logsumexp(0))"),
        ("scored = noise.weight > 0\n", "scored = noise.weight >= 0\n"),
        ("(advantages < 0).to(noise.weight)", "(advantages > 0).to(noise.weight)"),
        ("(advantages < 0).to(noise.weight)", "(advantages <= 0).to(noise.weight)"),
        ("mix * (advantages < 0)", "(1 - mix) * (advantages < 0)"),
        (
            "torch.lerp(lower, upper_bound(scores, noise, beta=beta), noise",
            "torch.lerp(upper_bound(scores, noise, beta=beta), lower, noise",
        ),
        (
            "exact_for_sampler = num_segments is None",
            "exact_for_sampler = True",
            f"{TOYS} {MODELS}",
        ),
        (
            'attention=("causal",))',
            'attention=("causal", "full"))',
            f"{TOYS} {MODELS} {CONTRACT}",
        ),
        ("prompt_mask: float = 0.15", "prompt_mask: float = 0.0", f"{TOYS} {MODELS}"),
        ("if not 0 <= prompt_mask < 1", "if not 0 < prompt_mask < 1"),
        ("and self.packed != policy.spec.block_size", "and False", PACKED),
        (
            'name="eubo", exact_for_sampler=False, combine',
            'name="eubo", exact_for_sampler=base.exact_for_sampler, combine',
            "",
            "no base that the bounds are for is exact for the sampler: all four have False there",
        ),
    ),
    *mutations(
        "likelihoods/scoring.py",
        f"{MODELS} {PACKED}",
        (
            "slice(bucket.start, width)",
            "slice(0, width)",
            "likelihoods/test_length_buckets.py",
        ),
        ("max(1, micro_batch_size // group)", "max(1, micro_batch_size)"),
        (
            '"(p g) -> p g", g=group).any(-1)',
            '"(p g) -> p g", g=group).all(-1)',
            f"{MODELS} training/test_constant_memory.py",
        ),
        (
            '(noise.weight != 0).any(0).any(-1), "(p g)',
            '(noise.weight != 0)[0].any(-1), "(p g)',
            f"{MODELS} training/test_constant_memory.py",
        ),
        (
            "rollout.sampling_params, at, view.kept)",
            "rollout.sampling_params, at.abs(), view.kept)",
            "training/test_loop_numbers.py",
        ),
        ("if mask_id is None else rollout.tokens.masked_fill(masked, mask_id)", "", f"{MODELS}"),
        (
            "(tokens == first(tokens)).all() & (attention_mask",
            "(attention_mask",
            f"{MODELS} {CONTRACT}",
        ),
        (" & (attention_mask == first(attention_mask)).all()", "", f"{MODELS} {CONTRACT}"),
        (
            "view.states, view.tokens, rollout.sampling_params, view.kept)",
            "view.states, view.tokens, type(rollout.sampling_params)(), view.kept)",
        ),
        (
            'if rollout.sampling_params.support == "rollout" else None',
            'if rollout.sampling_params.support == "own" else None',
            "samplers/test_support.py",
        ),
    ),
    *mutations(
        "likelihoods/packed.py",
        PACKED,
        ("block[:, None, :] < block[:, :, None]", "block[:, None, :] <= block[:, :, None]"),
        ("(before | (same & ~real))", "(before | same)"),
        (
            "(key & same & real)",
            "(key & same & real & ~before.transpose(1, 2)) & torch.eye(block.shape[1], dtype=torch.bool)",
        ),
        ("key & (before | same), to_noisy", "key & before, to_noisy"),
        ("positions[:, start:]], dim=1))", "positions[:, start:] + 1], dim=1))"),
        ("(block >= first)", "(block > first)"),
    ),
]
