"""The command line: overriding recipes, sample, evaluate, grade, doctor."""

from tests.mutations.record import mutations

COMMAND = "cli/test_evaluate_command.py"

MUTATIONS = [
    *mutations(
        "config.py",
        "test_config.py",
        ("if math.isfinite(value)", "if not math.isnan(value)"),
        ('return text == "true"', 'return text != "true"'),
        ('if optional and text == "none"', 'if text == "none" and not optional'),
        ("difflib.get_close_matches(text, names, n=1, cutoff=0)", "names[:1]"),
        ("raise SystemExit(2) from None", "raise SystemExit(1) from None"),
        ("if len(waiting) == len(pairs)", "if waiting"),
        ("**{**owner.keywords, keys[0]: value}", "**{keys[0]: value, **owner.keywords}"),
        ("_scalar(a) or k in given", "k in given"),
        ("_scalar(a) or k in given", "True"),
        ("sorted(needs.keys() - given.keys() - below.keys())", "sorted(needs.keys() - below.keys())"),
        ("if owner.made_by is None", "if False"),
        ("return _replace(owner.made_by, keys, value)()", "return _replace(owner.made_by, keys, value)"),
        ('key=lambda pair: pair[0].count(".")', "key=lambda pair: 0"),
        ("len(line) - len(text) > depth", "len(line) - len(text) >= depth"),
        ("place = int(keys[0]) - 1", "place = int(keys[0]) - 2"),
        ('name, equals, value = head[2:].partition("=")', 'name, equals, value = head[2:].rpartition("=")'),
        ("bound.keywords.get(p.name, p.default)", "p.default"),
        ('found.pop("model.seed", None)', "None"),
    ),
    *mutations(
        "cli/evaluate.py",
        COMMAND,
        ("min(len(task), GENERATED) if made_at_will", "len(task) if made_at_will"),
        ('arguments.protocol or "strict"', 'arguments.protocol or "d1"'),
        ('given["split"] or "test"', 'given["split"] or "train"'),
        ("arguments.samples > 1 and temperature == 0", "arguments.samples < 0"),
        ('[None] if "=" in commit else', ""),
        ("if each[0] == settings", ""),
        ('"seed": arguments.seed, "dtype": arguments.dtype, "weights": fingerprint(policy)', '"seed": arguments.seed'),
        ('("task", "version", "settings")} | settings', '("task", "version", "settings")}'),
        ('first["n"] * first["samples"]\n', 'first["n"]\n'),
    ),
    *mutations(
        "cli/main.py",
        f"{COMMAND} cli/test_sample.py",
        (
            'print(f"error: {escape_controls(str(error))}", file=sys.stderr)\n        return 2',
            'print(f"error: {escape_controls(str(error))}", file=sys.stderr)\n        return 1',
        ),
        ('print(f"error: {escape_controls(str(error))}"', 'print(f"error: {error}"'),
        ("if min(numbers) < 1", "if min(numbers) < 0"),
        ("arguments.prompts or [line", "[line"),
        ("        group_size=arguments.group_size,\n", "", "cli/test_sample.py"),
        ("        seed=arguments.seed,\n", "", "cli/test_sample.py"),
    ),
    *mutations(
        "cli/report.py",
        "cli/test_report.py",
        ("if len(set(map(str, line[1:]))) > 1]", "]"),
        ("DEFAULTS[n] != recipe[n]]", "DEFAULTS[n] == recipe[n]]"),
        ("steps[round(i * last / (STEPS - 1))]", "steps[i]"),
        ("return html.escape(escape_controls(str(text)))", "return escape_controls(str(text))"),
        ('escape_controls(token["text"], keep="\\n\\t")', 'token["text"]'),
    ),
    *mutations(
        "training/plots.py",
        "cli/test_report.py",
        ("if not math.isnan(x)]", "]"),
        ("values[max(0, i - width) : i + width + 1]", "values[max(0, i - width) : i + width]"),
    ),
    *mutations(
        "cli/sample.py",
        "cli/test_sample.py",
        ("[text for text in texts for _ in range(group_size)]", "[text for _ in range(group_size) for text in texts]"),
        ("count / seconds}", "rollout.forwards / seconds}"),
        ("== newest == rollout.forwards - 1", "== newest"),
    ),
]
