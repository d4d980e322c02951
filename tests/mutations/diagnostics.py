"""The doctor's attribution, its report, arithmetic that does not depend on the batch."""

from tests.mutations.record import mutations

MUTATIONS = [
    *mutations(
        "diagnostics/doctor.py",
        "diagnostics/test_doctor.py",
        ("steps = {name: before - after for", "steps = {name: after - before for"),
        (
            '("sampling parameters", score(policy, rollout, own_noise))',
            '("sampling parameters", score(policy, scored_as, own_noise))',
        ),
        (
            '("estimator noise", score(policy, rollout, noise))',
            '("estimator noise", score(policy, rollout, own_noise))',
        ),
        ('("precision", score(plain, rollout, noise))', '("precision", score(policy, rollout, noise))'),
        ("score(rounded, rollout, noise)", "score(fresh, rollout, noise)"),
        ("torch.where(mask, replay - rollout.logprobs, 0)", "torch.where(mask, replay - replay, 0)"),
        ("states[2][1] - padded", "states[2][1] - states[2][1]"),
        ("score(policy, rollout, noise, None) - score", "score(policy, rollout, noise, rollout.group_size) - score"),
        ("sampled = rollout.logprobs if likelihood.exact_for_sampler else states[-1][1]", "sampled = states[-1][1]"),
        ("key=lambda c: c.mean_abs, reverse=True)", "key=lambda c: c.mean_abs)"),
        ('keys = ("abs_log_ratio_mean", "abs_log_ratio_max"', 'keys = ("abs_log_ratio_max", "abs_log_ratio_mean"'),
        ("learner - sampled, mask)", "sampled - learner, mask)"),
        ("rounded.module.get_submodule(name).weight.copy_(dequantized_weight(layer))", "pass"),
        ("if self.worst < 1e-5", "if self.worst < 1e-1"),
        ("max(self.total.mean_abs, self.causes[0].mean_abs)", "self.total.mean_abs"),
        ("generator().manual_seed(seed + 1)".replace("generator", "Generator"), "Generator().manual_seed(seed)"),
        ("(learner - sampled).abs(), -1.0)", "(learner - sampled), -1.0)"),
        ("row, position = divmod(index, gap.shape[1])", "row, position = divmod(index, gap.shape[0])"),
        ("(a - b).norm() / a.norm().clamp(min=1e-12)", "(a - b).norm()"),
        ("setattr(plain.module.get_submodule(owner), kind, buffer.clone())", "pass"),
    ),
    *mutations(
        "diagnostics/report.py",
        "diagnostics/test_doctor.py",
        ("c.mean_abs >= report.worst / 100", "c.mean_abs <= report.worst / 100"),
        ('f"{c.max_abs:.2e}"', 'f"{c.mean_abs:.2e} "'),
        ("html.escape(cell)", "cell"),
    ),
    *mutations(
        "diagnostics/batch_invariance.py",
        "diagnostics/test_batch_invariance.py",
        ("for a, b in zip(*(x.split(1) for x in args), strict=True)", "for a, b in [args]"),
        ("(0, 0, 0, -len(rows) % self.tile)", "(0, 0, 0, 0)"),
        ("zip(query.split(1), key.split(1), value.split(1), masks, strict=True)", "[(query, key, value, attn_mask)]"),
        ("if func is F.linear", "if False"),
        ("        torch.set_float32_matmul_precision(precision)\n", ""),
        ("            os.environ.pop(WORKSPACE, None)", "            pass"),
        ("differs = mask & (old != sampled)", "differs = mask & ((old - sampled).abs() > 1e-6)"),
        ("differs.nonzero()[0])", "differs.nonzero()[-1])"),
        ("if name in theirs and not torch.equal", "if name in theirs and torch.equal"),
    ),
]
