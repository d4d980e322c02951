"""The loop and its parts, the recipe, the records, files and processes."""

from tests.mutations.record import mutations

LOOP = "training/test_loop.py"
MEMORY = "training/test_constant_memory.py"
CHECKPOINT = "training/test_checkpoint.py"
GOLDEN = "training/test_golden.py"
NUMBERS = "training/test_loop_numbers.py"
STOPS = (
    "training/test_checkpoint.py::test_interrupt_saves_and_says_how_to_resume"
    " faults/test_faults.py::test_a_signal_saves_what_is_whole_and_the_resumed_run_is_the_same"
)

MUTATIONS = [
    *mutations(
        "training/learner.py",
        f"{NUMBERS} {GOLDEN} {MEMORY} {LOOP}",
        ('group["lr"] = learning_rate', 'group["lr"] = 1e-3'),
        ("logps.old - logps.rollout", "logps.rollout - logps.old"),
        ("        weights=weights,\n", "        weights=torch.ones_like(weights),\n"),
        ("int((keep | (completion & ~corrected)).sum())", "int(keep.sum())", NUMBERS),
        ("int((keep | (completion & ~corrected)).sum())", "int(completion.sum())", NUMBERS),
        ("~corrected)).sum()), len(keep)", "~corrected)).sum()), int(scored.any(-1).sum())"),
        (
            "mismatch_metrics(log_mismatch, completion, old=old",
            "mismatch_metrics(log_mismatch, scored, old=old",
            NUMBERS,
        ),
        ("corrected = scored & learned[:, None]", "corrected = scored", NUMBERS),
        (
            "1 - (keep.sum() / corrected.sum().clamp(min=1)).item()",
            "1 - (keep.sum() / corrected.numel()).item()",
            NUMBERS,
        ),
        ('"noise", step)', '"noise", 0)'),
        ("| bool(recipe.beta or recipe.entropy_coeff)", "| bool(recipe.entropy_coeff)", NUMBERS),
        (
            "| bool(recipe.beta or recipe.entropy_coeff)",
            "| bool(recipe.beta)",
            "training/test_loop_numbers.py training/test_loop.py",
        ),
        ("recipe.likelihood.with_advantages(noise, mine)", "recipe.likelihood.with_advantages(noise, -mine)"),
        ("max_grad_norm)\n        reduced", "max_grad_norm * 1e9)\n        reduced"),
        ("            torch.clear_autocast_cache()", "            pass"),
        ('if not math.isfinite(reduced["grad_norm"])', "if False"),
        ("    policy.version += 1\n", ""),
        ("if not 0 <= behind <= stale_steps", "if not behind <= stale_steps", "quantization/test_quantize.py"),
        ("if not 0 <= behind <= stale_steps", "if not 0 <= behind <= stale_steps + 1", "quantization/test_quantize.py"),
        ("        optimizer.zero_grad(set_to_none=True)\n", ""),
        ("scores = batch.old_scores\n        if iteration:", "scores = batch.old_scores\n        if iteration > 1:"),
        (
            "(vectors,) = torch.autograd.grad(logps, leaves, gradient)",
            "(vectors,) = torch.autograd.grad(logps.sum(), leaves)",
        ),
        ("        sampled = rollout.logprobs\n", "        sampled = old\n"),
        ("likelihood.logprobs(reference, rollout", "likelihood.logprobs(policy, rollout"),
        ("recipe.corrector.align_forward and rollout_policy is not policy", "False"),
        (
            "batch_invariant() if recipe.zero_mismatch else nullcontext()",
            "nullcontext()",
            "diagnostics/test_batch_invariance.py",
        ),
        ("    if recipe.zero_mismatch:\n", "    if False:\n", "diagnostics/test_batch_invariance.py"),
    ),
    *mutations(
        "training/rollouts.py",
        f"{GOLDEN} {LOOP}",
        (
            '(recipe.seed, "rollout", step, *([draw] if draw else []))',
            '(recipe.seed, "rollout", 0, *([draw] if draw else []))',
        ),
        ("recipe.seed, purpose, step)", "recipe.seed, purpose, 0)"),
        ("local(~informative(rewards), accelerator)", "local(informative(rewards), accelerator)"),
        ("(rewards,), draws = gather_on_host([mine], accelerator), draws + 1", "draws = draws + 1"),
        ("return (~informative(rewards)).double()", "return informative(rewards).double()"),
        (
            "if name in each] or [(0.0, 0.0)]",
            "if name in each] or [(1.0, 1.0)]",
            "training/test_rollout_batches.py",
        ),
        ("rewards.std(correction=0)", "rewards.std()"),
        ("* rewards.numel()", "* len(rewards)"),
    ),
    *mutations(
        "training/warmup.py",
        "training/test_warmup.py",
        ("weight = scored / t", "weight = scored.float()"),
        ("(uniforms < levels[:, None])", "(uniforms > levels[:, None])"),
        (".sum() / batch.completion_mask.sum()", ".sum() / scored.sum()"),
        ("return -(logps * weight)", "return (logps * weight)"),
        ("min(max_new_tokens, len(answer) + 1)", "max_new_tokens"),
        ("answer + [eos] * spare", "answer + [pad] * spare"),
        (
            "+ torch.rand(num_rows, generator=generator)) / num_rows",
            "+ torch.rand(num_rows, generator=generator) * num_rows) / num_rows",
        ),
        ("min_t + (1 - min_t) * strata", "strata"),
        ("min(1.0, (step + 1) / max(1, lr_warmup_steps))", "1.0"),
        ("found >= recipe.warmup_target", "found <= recipe.warmup_target"),
    ),
    *mutations(
        "training/checkpoint.py",
        f"{CHECKPOINT} training/test_old_checkpoint.py",
        ("found(directory)[:-keep]", "found(directory)[:keep]"),
        (
            "for _, folder in reversed(found(directory)):\n        try",
            "for _, folder in found(directory):\n        try",
            "training/test_checkpoint.py training/test_damaged_checkpoints.py",
        ),
        (
            "if number > step or (number",
            "if number >= step or (number",
            "training/test_nothing_lost.py training/test_checkpoint.py",
        ),
        ('if state.get("step") != expected:', "if False:", "training/test_damaged_checkpoints.py"),
        ('if held is None and "format" in state:', "if False:", "training/test_damaged_checkpoints.py"),
        (
            "if tensor.is_floating_point() and not tensor.isfinite().all():",
            "if False:",
            "training/test_damaged_checkpoints.py training/test_checkpoint.py",
        ),
        (
            "if trained and policy.version and isinstance(optimizer, torch.optim.AdamW):",
            "if False:",
            "training/test_damaged_checkpoints.py",
        ),
        ("if shutil.disk_usage(final.parent).free < needed:", "if False:", "training/test_nothing_lost.py"),
        (
            "for _, old in found(directory)[:-keep]",
            "for _, old in found(directory)[keep:]",
            "training/test_checkpoint.py",
        ),
        ("_NAME.fullmatch(p.name)", "_NAME.search(p.name)"),
        ('"rejected": "rejection"', '"rejected": "rejected"'),
        ("    optimizer.load_state_dict(", "    dict("),
    ),
    *mutations(
        "training/log.py",
        f"{CHECKPOINT} {LOOP}",
        (
            'if other["step"] < row["resume_from"]]',
            'if other["step"] <= row["resume_from"]]',
            "training/test_nothing_lost.py training/test_log.py training/test_checkpoint.py",
        ),
        (
            '"resume_from": start}',
            '"resume_from": start + 1}',
            "training/test_nothing_lost.py training/test_log.py training/test_checkpoint.py",
        ),
        (
            "self._step, self._done = {}, step + 1",
            "self._done = step + 1",
            "training/test_log.py training/test_loop.py",
        ),
        ("value if math.isfinite(value) else None for", "value for", "training/test_log.py"),
        ('["strong mismatch"] if ess < STRONG', '["strong mismatch"] if ess > STRONG', "training/test_health.py"),
        ("if max(moved, default=0.0) > BACKWARDS", "if min(moved, default=0.0) > BACKWARDS", "training/test_health.py"),
    ),
    *mutations(
        "training/run.py",
        f"{NUMBERS} {GOLDEN} {LOOP} {CHECKPOINT}",
        ("(step + 1) % recipe.eval_steps", "step % recipe.eval_steps"),
        ("recipe.model(seed=recipe.seed) if seeded else recipe.model()", "recipe.model()"),
        ("betas = (recipe.adam_beta1, recipe.adam_beta2)", "betas = (recipe.adam_beta2, recipe.adam_beta1)"),
        ("weight_decay=recipe.weight_decay)", "weight_decay=0.0)", f"{NUMBERS} {GOLDEN}"),
        ("reference = copied(policy)", "reference = policy"),
        (
            "evaluate_with(recipe, rollout_policy, recipe.eval_task, accelerator)",
            "evaluate_with(recipe, policy, recipe.eval_task, accelerator)",
        ),
        (
            "evaluate(policy, task, recipe.eval_sampler,",
            "evaluate(policy, task, recipe.sampler,",
            "training/test_loop_numbers.py training/test_loop.py",
        ),
        ("done % recipe.save_steps == 0 or done == recipe.num_steps", "done % recipe.save_steps == 0"),
        ("if signum or done % recipe.save_steps == 0", "if done % recipe.save_steps == 0", STOPS),
        ("if signum:\n        run.stop.leave", "if False:\n        run.stop.leave", STOPS),
        (
            "evaluate_with(recipe, run.policy, recipe.validation_task, run.accelerator)",
            "evaluate_with(recipe, run.policy, recipe.eval_task, run.accelerator)",
        ),
    ),
    *mutations(
        "training/dry_run.py",
        "recipes/test_recipes_real.py",
        ("prompt_tokens + recipe.max_new_tokens > limit", "recipe.max_new_tokens > limit"),
        ("int(weights * each) + (policy.parameters - weights) * size", "policy.parameters * size"),
    ),
    *mutations(
        "training/memory.py",
        "training/test_memory.py",
        ("NF4 = 9 / 16", "NF4 = 1", "recipes/test_recipes_real.py::test_what_is_held_is_counted_by_hand"),
        ("        self.now -= size\n", "        pass\n"),
        ('held["weights"] -= held["adapters"]', "pass"),
    ),
    *mutations(
        "training/dump.py",
        "training/test_failed_step.py",
        (
            'BEFORE_UPDATE = ("", "rollout", "reward", "waiting", "scoring")',
            'BEFORE_UPDATE = ("", "rollout", "reward", "waiting", "scoring", "update")',
        ),
        ('loop["run"].history["whole"] == loop["step"]', "True"),
    ),
    *mutations(
        "models/recompute.py",
        "models/test_recompute.py",
        (
            "        now = [layer.calls for layer in adapters]\n        _count(adapters, first)\n",
            "        now = [layer.calls for layer in adapters]\n",
        ),
    ),
    *mutations(
        "recipe.py",
        f"test_config.py {NUMBERS} {GOLDEN} {LOOP}",
        (
            "self.learning_rate * self.lr_schedule(step, self.schedule_steps)",
            "self.learning_rate",
            "training/test_loop_numbers.py training/test_loop.py",
        ),
        (
            "self.learning_rate * self.lr_schedule(step, self.schedule_steps)",
            "self.learning_rate * self.lr_schedule(0, self.schedule_steps)",
            "training/test_loop_numbers.py training/test_loop.py",
        ),
        (
            "return self.lr_schedule_steps or self.num_steps",
            "return self.num_steps",
            "training/test_nothing_lost.py training/test_loop_numbers.py",
        ),
        ("or size % self.num_generations", "", f"{LOOP}::TestRefusals"),
        ("entropy=self.entropy_coeff", "entropy=0.0"),
        ("            beta=self.beta,\n", "            beta=0.0,\n"),
    ),
    *mutations(
        "types.py",
        "test_types.py",
        ("width - len(row) :] = torch.tensor(row", "width - len(row) :] = torch.tensor(row[::-1]"),
        ("(0, columns) if right else (columns, 0)", "(0, columns)"),
        ("weight=self.weight * live[:, None]", "weight=self.weight"),
        ("mask & (self.weight != 0).any(0).any(-1, keepdim=True)", "mask & (self.weight != 0).any(0)"),
        ("forwards=self.forwards + by.forwards", "forwards=by.forwards"),
        (
            "Noise(self.masked[:, keep], self.weight[:, keep], share)",
            "Noise(self.masked[:, keep], self.weight[:, keep])",
        ),
        ("not 0 < self.top_p <= 1", "not 0 <= self.top_p <= 1"),
        ("else a.index_copy(0, rows, b)", "else a.index_copy(0, rows.flip(0), b)"),
    ),
    *mutations(
        "distributed.py",
        "training/test_two_processes.py",
        ('reduction="mean" if mean else "sum"', 'reduction="mean"'),
        ('total if name == "loss" else total / count', "total / count"),
        (
            "rows.chunk(accelerator.num_processes)[accelerator.process_index]",
            "rows.chunk(accelerator.num_processes)[0]",
        ),
        (
            "if accelerator.num_processes != launched():",
            "if False:",
            "training/test_two_processes.py::test_processes_that_accelerate_does_not_join_are_refused",
        ),
    ),
    *mutations(
        "files.py",
        "test_files.py",
        (
            "    except BaseException:\n        remove(partial)\n        raise",
            "    except BaseException:\n        raise",
        ),
    ),
    *mutations(
        "training/folder.py",
        "training/test_old_checkpoint.py training/test_nothing_lost.py training/test_checkpoint.py",
        ("before[name] != now[name]]", "False]"),
        (
            'before = {f.name: plain(f.default) for f in dataclasses.fields(Recipe)} | state["recipe"]',
            'before = state["recipe"]',
        ),
        ("if recipe.num_steps < step:", "if False:", "training/test_nothing_lost.py::TestSchedule"),
        (
            "if any(recipe.lr_schedule(i, then)",
            "if all(recipe.lr_schedule(i, then)",
            "training/test_nothing_lost.py::TestSchedule",
        ),
        (
            "if held and not recipe.overwrite_output_dir:",
            "if False:",
            "training/test_nothing_lost.py::test_after_a_run_the_signals_are_as_before",
        ),
        ('for path in checkpoint.set_aside(directory / "checkpoints", folder):', "for path in ():"),
    ),
    *mutations(
        "training/stop.py",
        f"training/test_nothing_lost.py {STOPS}",
        ("raise Stopped(128 + self.asked)", "raise SystemExit(128 + self.asked)"),
        ("again = self.asked == number == signal.SIGINT", "again = False"),
    ),
    *mutations(
        "training/manifest.py",
        "training/test_damaged_checkpoints.py training/test_checkpoint.py",
        ("own != _own_digest(found)", "False"),
        ('if found["format"] != FORMAT:', "if False:"),
        ("        if name not in here:\n", "        if False:\n"),
        ("if name not in files and name not in (NAME, *also)", "if False and name not in (NAME, *also)"),
        ('if size != entry["size"]:', "if False:"),
        ('None if digest(path) == entry["sha256"] else', "None if True else"),
        ('None if digest(path, limit=HEAD) == entry["head"] else', "None if True else"),
    ),
]
