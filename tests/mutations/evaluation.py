"""Intervals, pass@k, evaluation, stored completions, re-grading."""

from tests.mutations.record import mutations

EVALUATION = "evaluation/test_evaluation.py"

MUTATIONS = [
    *mutations(
        "evaluation/intervals.py",
        "evaluation/test_intervals.py",
        ("0.5 + _level(confidence) / 2", "_level(confidence)"),
        ("p + z * z / (2 * n)", "p"),
        ("z * z / (4 * n * n))", "z * z / (2 * n * n))"),
        ("scale = 1 + z * z / n", "scale = 1"),
        ("low = 0.0 if successes == 0 else", "low = 0.0 if successes <= 1 else"),
        ("ratio = lambda rows: numbers[rows].sum() / shares[rows].sum()", "ratio = lambda rows: numbers[rows].mean()"),
        ("- other[rows].sum() / others[rows].sum()", "- (other[rows] / others[rows]).mean()"),
        ("- other[rows].sum()", "- other[generator.integers(0, len(other), len(rows))].sum()"),
        ("[(1 - level) / 2, (1 + level) / 2]", "[1 - level, level]"),
        ("if n - correct < k", "if n - correct <= k"),
        ("range(n - correct + 1, n + 1)", "range(n - correct, n)"),
        ("none_right *= 1 - k / i", "none_right *= 1 - k / n"),
    ),
    *mutations(
        "evaluation/evaluate.py",
        EVALUATION,
        ('"evaluate", i, *([j] if j else [])).initial_seed()', '"evaluate", i).initial_seed()'),
        ('"evaluate", i, *([j] if j else [])).initial_seed()', '"evaluate", j).initial_seed()'),
        ("max(1, batch_size // samples)", "max(1, batch_size)"),
        (
            "accelerator.process_index * size, count, accelerator.num_processes * size",
            "accelerator.process_index, count, accelerator.num_processes * size",
        ),
        ("if key not in rows}", "}"),
        ("range(start, min(start + size, count))", "range(start, min(start + size, count - 1) or 1)"),
        ("rollout.forwards / len(keys)", "rollout.forwards"),
    ),
    *mutations(
        "evaluation/completions.py",
        EVALUATION,
        ('if row["evaluation"].get(name) != value', "if False"),
        ("changed = [name for name in now if now[name] != row.get(name)]", "changed = []"),
        ("        _drop_torn_line(part)\n", ""),
        ("        part.unlink()\n", "        pass\n"),
        ("flatten()[:1024]", "flatten()[:1]"),
        ("rows |= read(part)", "rows = read(part) | rows"),
    ),
    *mutations(
        "evaluation/results.py",
        EVALUATION,
        ("pass_at_k(samples, count, k)", "pass_at_k(samples, count, 1)"),
        ("before[0] + value, before[1] + weight", "before[0] + value, before[1] + 1"),
        ("sum(values) / sum(weights)", "sum(values) / len(values)"),
        ("value > 0 for value in values), len(values)", "value > 0 for value in values), round(sum(weights))"),
    ),
    *mutations(
        "evaluation/regrade.py",
        "evaluation/test_regrade.py",
        ('protocol: str = "strict"', 'protocol: str = "d1"'),
    ),
    *mutations(
        "evaluation/results.py",
        "evaluation/test_evaluation.py evaluation/test_regrade.py",
        (
            "return sum(values) / sum(weights)",
            "return sum(v / w for v, w in zip(values, weights, strict=True)) / len(values)",
        ),
        ("np.random.default_rng(0), weights=weights)", "np.random.default_rng(0))"),
        ("if pair[1]] or [(0.0, 1.0)]", "] or [(0.0, 1.0)]"),
        ("round(value) for value in found[right][0]", "1 for value in found[right][0]"),
        (
            "wilson(sum(value > 0 for value in values), len(values))",
            "wilson(sum(value > 0 for value in values), len(values) + 1)",
        ),
        ('if name not in ("reward", "cell_accuracy") and all(', "if all("),
    ),
    *mutations(
        "screen.py",
        "test_screen.py",
        ('("Cc", "Cf", "Cs", "Zl", "Zp")', '("Cc", "Cs", "Zl", "Zp")'),
        (
            "return Text(escape_controls(str(text)), style=style)",
            "return Text.from_markup(escape_controls(str(text)), style=style)",
        ),
    ),
]
