"""The script that compares answers by math-verify: parsing in two stages."""

import pytest
from answer_pairs import EQUAL, UNEQUAL

# Of these, SLL prediction alone fails on the first four; the last are no expressions.
SPECIAL = {
    "x^2 - 1",
    "(x-2)(x+2)(x^2+4)",
    "\\frac{2}{3}x^3",
    "[\\pi^2/8, 5\\pi^2/4]",
    "x^{}",
    "((1)",
    "1 2 3",
    "\\frac{1}{}",
}


@pytest.mark.parametrize("create", ["plain", "two_stages"])
@pytest.mark.slow
def test_parsing_in_two_stages_gives_what_one_gives(create: str, monkeypatch) -> None:
    """SLL prediction first changes no result: neither where it succeeds nor where it must start again."""
    from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
    from math_verify.parser import extract_latex, parse_latex_cached

    from dllm_rl.tasks.math import math_verify_worker as verify_worker

    plain, runs = _Latex2Sympy.create_parser, []

    def counted(converter, text):
        runs.append(text)
        return plain(converter, text)

    def read(latex: str, create_parser) -> str:
        monkeypatch.setattr(_Latex2Sympy, "create_parser", create_parser)
        extract_latex.cache_clear()
        parse_latex_cached.cache_clear()
        return repr(verify_worker.read.__wrapped__(latex))

    again = 0
    for latex in {text for pair in EQUAL[::9] + UNEQUAL for text in pair} | SPECIAL:
        once = read(latex, plain)
        runs.clear()
        assert read(latex, counted if create == "plain" else verify_worker.two_stages(counted)) == once
        again += len(runs) == 2
    assert (again > 0) == (create == "two_stages")
