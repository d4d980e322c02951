"""The script that compares answers by math-verify: parsing in two stages, and workers that end."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from answer_pairs import EQUAL, UNEQUAL

from dllm_rl.tasks.math import math_verify

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


@pytest.mark.parametrize("num_workers", [2, 9, 1])
@pytest.mark.repeated(first_only=True)
def test_a_pair_at_which_a_worker_ends_is_tried_once_more(num_workers: int, monkeypatch, tmp_path) -> None:
    """Answers say what happens at their comparison; a file counts the attempts at each. What compares them is replaced,
    so that the import of its libraries, which takes a second, is left out."""
    libraries = ("atn.PredictionMode", "error.ErrorListener", "error.Errors")
    for name in (*(f"antlr4.{library}" for library in libraries), "latex2sympy2_extended", "math_verify"):
        monkeypatch.setitem(sys.modules, name, MagicMock(ErrorListener=object))
    spec = spec_from_file_location("worker", Path(math_verify.__file__).with_name("math_verify_worker.py"))
    verify_worker = module_from_spec(spec)
    spec.loader.exec_module(verify_worker)

    def read(answer: str) -> str:
        return answer

    def verify(reference: str, answer: str, timeout_seconds: None) -> bool:
        path = Path(tmp_path, answer)
        attempt = len(path.read_text()) if path.exists() else 0
        path.write_text("x" * (attempt + 1))
        if "always" in answer or ("once" in answer and attempt == 0):
            os._exit(1)
        return "equal" in answer

    read.__wrapped__ = read
    monkeypatch.setattr(verify_worker, "read", read)
    monkeypatch.setattr(verify_worker, "verify", verify)
    answers = ["equal 1", "other 1", "ends always 1", "ends always 2", "equal, ends once", "ends once", "equal 2"]
    verdicts = verify_worker.compare([("r", answer) for answer in answers], num_workers, 5.0)
    assert list(verdicts) == [2, 1, 3, 3, 2, 1, 2]
    attempts = {answer: len(Path(tmp_path, answer).read_text()) for answer in answers}
    assert attempts == {answer: 2 if "ends" in answer else 1 for answer in answers}
    assert verify_worker.compare([("r", "equal 3")], num_workers, 5.0) == bytes([verify_worker.EQUAL])
