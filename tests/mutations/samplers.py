"""Ranks, commit rules, proposals, the unmasking loop and its canvas, caches, left-to-right sampling."""

from tests.mutations.record import mutations

RULES = "samplers/test_rules.py"
UNMASK, CACHES = "samplers/test_unmask.py", "samplers/test_unmask_cache.py"
DISTRIBUTION = "samplers/test_unmask_distribution.py"
# A case or two of the tests that have many, and all of the quick ones.
CASES = (
    "a_rank_reads_the_models_own_probabilities",
    "replay_gives_recorded_logprobs_bitwise[llama-max_prob]",
    "replay_gives_recorded_logprobs_bitwise[llama-factor]",
    "replay_gives_recorded_logprobs_bitwise[llama-greedy]",
    "equals_published_algorithm[llama-20-8]",
    "row_depends_on_itself_only[llama-confidence]",
    "row_depends_on_itself_only[llama-entropy]",
    "blocks_and_steps_that_do_not_divide",
    "group_shares_first_forward",
    "finished_rows_leave_the_batch",
    "state_only_rank_draws_only_where_it_commits",
    "suppressed_and_mask_tokens_are_never_drawn",
    "approximate_early_exit_keeps_the_tail_masked",
    "watch_sees_every_step",
    "errors_name_the_value_and_a_remedy",
)
LOOP = " ".join(f"{UNMASK}::test_{case}" for case in CASES)
EXITS = f"{CACHES}::test_early_exit_of_block_causal_models_is_exact"
BLOCKS = f"{EXITS} {CACHES}::test_blocks_count_from_the_prompt {CACHES}::test_block_cache_is_exact"
DRAWS = " ".join(
    f"{DISTRIBUTION}::test_tokens_and_order_follow_the_enumerated_distribution[{case}]"
    for case in ("confidence-1.0-3", "random-0.6-2")
)

MUTATIONS = [
    *mutations(
        "samplers/rules.py",
        RULES,
        ("[:, 0] - normalizer\n\n\ndef max_prob", "[:, 0]\n\n\ndef max_prob"),
        ("return logits.amax(-1) - normalizer", "return logits.mean(-1) - normalizer"),
        ("return first - second", "return first"),
        ("0.0, logp.exp() * logp).sum(-1)", "0.0, -logp.exp() * logp).sum(-1)"),
        ("    return -(-num_masked // steps_left)", "    return num_masked // steps_left"),
        ("masked.sum(-1) // steps_left)", "-(-masked.sum(-1) // steps_left))"),
        ("scores >= 1 - 1 / steps_left[:, None]", "scores >= 1 / steps_left[:, None]", f"{RULES} {DRAWS}"),
        ("scores >= log_tau) | _best(scores, masked, torch.ones_like(steps_left))", "scores >= log_tau)"),
        ("(scores >= log_tau)", "(scores > log_tau)"),
        ("if not 0 < tau <= 1", "if not 0 < tau < 1"),
        ("1 - f / (n + 1), n, 1)", "1 - f / n, n, 1)"),
        ("1 - f / (n + 1), n, 1).amax(-1)", "1 - f / (n + 1), n, 1).amin(-1)"),
        ("before <= gamma", "before < gamma"),
        ("entropies.cumsum(-1)[:, :-1], (1, 0)", "entropies.cumsum(-1)[:, 1:], (0, 1)"),
        ("descending=True, stable=True", "descending=False, stable=True"),
        ("places < count[:, None]", "places <= count[:, None]"),
        ("return masked & torch.zeros_like(masked)", "return torch.zeros_like(masked)"),
        ("each + (i < remainder)", "each + (i <= remainder)"),
        ("if num_steps < len(sizes)", "if num_steps <= len(sizes)"),
    ),
    *mutations(
        "samplers/propose.py",
        LOOP,
        ("in (0, 1) and not filtered", "in (0, 1)"),
        ("in (0, 1) and not filtered", "in (0, 1, 0.5) and not filtered", f"{LOOP} {DRAWS}"),
        ("normalizer.logaddexp(mask) if same", "normalizer if same"),
        ("        logits[:, mask_id] = mask\n", ""),
        (
            'offered = {"logits": logits, "tokens": tokens, "uniforms": v}',
            'offered = {"logits": logits, "tokens": tokens, "uniforms": u}',
            f"{LOOP} {DRAWS}",
        ),
        ("(sampling_params.suppress) - {policy.spec.mask_id}", "() - {policy.spec.mask_id}"),
        ("        logits[:, policy.spec.mask_id] = -torch.inf\n", ""),
        ("return tokens, best - normalizer, normalizer", "return tokens, best, normalizer"),
        ("[:, 0] - normalizer, normalizer", "[:, 0], normalizer"),
        ("log_().add_(peak[:, 0])", "log_()"),
        ("one(x.float(), *others)", "one(x, *others)", f"{LOOP} samplers/test_rules.py"),
    ),
    *mutations(
        "samplers/unmask.py",
        LOOP,
        ("(*suppress, spec.mask_id)", "suppress"),
        ('or (temperature == 0 and "logits" in needs)', ""),
        ("clock[r], c, stream=1)", "clock[r], c, stream=0)", f"{LOOP} {DRAWS}"),
        (
            "            draws = uniforms(seed[r], clock[r], c, stream=0)",
            "            draws = uniforms(seed[r], clock[r] * 0, c, stream=0)",
            f"{LOOP} {DRAWS}",
        ),
        (
            "uniforms(seed[r], clock[r], c, stream=0), sampling_params)",
            "uniforms(seed[r], clock[r], c * 0, stream=0), sampling_params)",
            f"{LOOP} {DRAWS}",
        ),
        ('block_causal" or approximate_early_exit', 'block_causal"'),
        ("alike = group if canvas.forwards == 0 else 1", "alike = group"),
        ("& (canvas.block[on_device] == blocks.to(device)[:, None])", ""),
        ("steps_left.to(device)) & masked", "steps_left.to(device))"),
        ("tokens, logprobs, clock[r])", "tokens, logprobs, clock[r] + 1)"),
        ("queue.drop(canvas.end(complete, spec.eos_ids))", "canvas.end(complete, spec.eos_ids)"),
        ("(columns[r, c] - first).clamp(min=0)", "(columns[r, c] - first + 1).clamp(max=hidden.shape[1] - 1)"),
        ("longest + max_new_tokens > limit", "longest + max_new_tokens >= limit"),
        ("prompts.attention_mask.sum(-1).max()), policy", "prompts.attention_mask.sum(-1).min()), policy"),
    ),
    *mutations(
        "samplers/canvas.py",
        f"{LOOP} {BLOCKS}",
        ("        self.unmask_step[rows, places] = steps", "        self.unmask_step[rows, places] = steps[:1]"),
        ("        self.logprobs[rows, places] = logprobs", "        self.logprobs[rows, places] = -logprobs"),
        ("eos) & ~self.masked[rows.to(eos.device)]).any(-1)", "eos[:1]) & ~self.masked[rows.to(eos.device)]).any(-1)"),
        ("eos) & ~self.masked[rows.to(eos.device)]).any(-1)", "eos) & ~self.masked[rows.to(eos.device)]).all(-1)"),
        ("torch.cat([mask, ~beyond], dim=1)", "torch.cat([mask, ~nowhere[:, :1].expand_as(beyond)], dim=1)"),
        ("torch.cat([nowhere, ~self.masked], dim=1)", "torch.cat([nowhere, ~beyond], dim=1)"),
        ("nowhere.long() - 1, self.unmask_step", "nowhere.long(), self.unmask_step"),
        ("self.completions().masked_fill(beyond, self.pad_id)", "self.completions()"),
        ('mask.sum(-1) if spec.attention == "block_causal" else', "mask.sum(-1) * 0 if spec.attention else"),
        ('pads_ended=spec.attention == "block_causal"', "pads_ended=True"),
        ("blocks == blocks[taking_part].min()", "blocks == blocks[taking_part].max()"),
        ("self.steps[rows, blocks] -= 1", "self.steps[rows, blocks] -= 0"),
        ("self.clock[rows] += 1", "self.clock += 1"),
        ("[rows, blocks] == 0]", "[rows, blocks] <= 1]"),
    ),
    *mutations(
        "samplers/cache.py",
        "samplers/test_unmask_cache.py",
        ("self.step % self.cache.refresh == 0", "self.step % self.cache.refresh == 1"),
        ("columns[0] - self.policy.spec.shift)", "columns[0])"),
        ('everything[:start] if self.cache.kind == "prefix" else', "everything[:start] if self.cache.kind else"),
        ("block[:, None, seen] <= block", "block[:, None, seen] < block"),
        ("everything[:start] if self.cache", "everything[:end] if self.cache"),
    ),
    *mutations(
        "samplers/autoregress.py",
        "samplers/test_autoregress.py",
        ("uniforms[:, step]", "uniforms[:, 0]"),
        ("- logits.logsumexp(-1)", ""),
        ("torch.isin(token, eos)", "(token == eos[0])"),
        ("chosen.append(alive)", "chosen.append(torch.ones_like(alive))"),
        ("positions[:, -1:] + 1", "positions[:, -1:]"),
        ("alive[:, None]], dim=1)", "alive[:, None] | True], dim=1)"),
        ("torch.where(alive, logp, 0.0)", "logp"),
        ("device=device) - start", "device=device)"),
        ("logits.argmax(-1) if temperature == 0", "logits.argmax(-1) if temperature < 0"),
    ),
    *mutations(
        "samplers/by_name.py",
        "cli/test_sample.py",
        ('"prefix": prefix_cache, "dual": dual_cache', '"prefix": dual_cache, "dual": prefix_cache'),
        ('value and name == "block"', "False"),
    ),
    *mutations(
        "rng.py",
        "test_rng.py",
        ("seeds + (2 * steps + stream + 1) * GAMMA", "seeds + (steps + stream + 1) * GAMMA"),
        ("state + (positions + 1) * GAMMA", "state"),
        ("& ((1 << (64 - bits)) - 1)", ""),
        ('"/".join(map(str, key))', '"/".join(map(str, key[:2]))'),
        ("(positions + 1) * GAMMA), 11)", "(positions + 1) * GAMMA), 12)"),
        ("(num_rows,), generator=generator)", "(1,), generator=generator).repeat(num_rows)"),
    ),
]
