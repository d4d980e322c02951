"""Pairs of LaTeX answers, equal and unequal."""

import json
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "equal_answers.jsonl"


EQUAL = [(row["reference"], row["answer"]) for row in map(json.loads, GOLDEN.open())]


UNEQUAL = [
    ("\\frac{1}{2}", "\\frac{1}{3}"),
    ("2\\sqrt{2}", "\\sqrt{6}"),
    ("x^2 - 1", "(x-1)(x+2)"),
    ("(1, 2)", "(2, 1)"),
    ("(3, \\infty)", "[3, \\infty)"),
    ("\\{1, 2\\}", "\\{1, 2, 3\\}"),
    ("1 \\pm \\sqrt{2}", "1 + \\sqrt{2}"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}"),
    ("\\sin 2x", "2 \\sin x"),
    ("\\frac{\\pi}{4}", "0.785"),
    ("x > 3", "x \\ge 3"),
    ("\\text{even}", "odd"),
]
