"""The script that math_verify.py starts, with SECONDS and the file descriptors of lines.

A worker is forked for each line. It answers each JSON [number, reference, answer] by "NUMBER VERDICT", 1 or 0; a line
receives "ready" before the first answer.
"""

import gc
import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any

from antlr4.atn.PredictionMode import PredictionMode
from antlr4.error.ErrorListener import ErrorListener
from antlr4.error.Errors import ParseCancellationException
from latex2sympy2_extended import latex2sympy2
from math_verify import LatexExtractionConfig, parse, verify

MEMORY = 2 << 30  # bytes of address space
IDLE = 100  # consecutive workers that end early, after which the process ends
# The first parse of each construction costs many times the later ones.
WARM = {
    "(-3, \\frac{\\pi}{2})": "\\left(-3, \\pi/2\\right)",
    "(-\\infty, 2] \\cup [3, \\infty)": "x \\in (-\\infty,2]\\cup[3,\\infty)",
    "\\{1, -2, 3\\}": "x = -2, 1, 3",
    "1 \\pm \\sqrt{19}": "1 + \\sqrt{19}, 1 - \\sqrt{19}",
    "y = 2x + 3": "3 + 2x",
    "(x - 2)(x + 2)(x^2 + 4)": "x^4 - 16",
    "\\frac{3}{x-2} + \\frac{4}{x+1}": "\\frac{7x - 5}{(x-2)(x+1)}",
    "\\frac{m^2 - n^2}{m}": "m - \\frac{n^2}{m}",
    "\\begin{pmatrix} -1/3 \\\\ 2 \\end{pmatrix}": "\\begin{pmatrix} -\\frac13 \\\\ 2 \\end{pmatrix}",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}": "\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}",
    "\\sin x \\cos x": "\\frac{1}{2} \\sin 2x",
    "\\tan^2 x": "\\sec^2 x - 1",
    "\\frac{\\sqrt{6} + \\sqrt{2}}{4}": "\\cos 15^\\circ",
    "\\frac{1}{1 + \\sqrt[3]{2}}": "\\frac{1 - \\sqrt[3]{2} + \\sqrt[3]{4}}{3}",
    "6 - 5i": "-5i + 6",
    "e^{i \\pi}": "-1",
    "\\log_2 8 + \\ln x": "3 + \\ln x",
    "2^{100}": "4^{50}",
    "10,\\!080": "10080.5",
    "4210_{5}": "4210_5",
    "120^\\circ": "120 \\text{ degrees}",
    "\\text{Eve}": "Ada",
    "\\frac{n!}{2}": "3 \\times 4 \\div 5",
    "|x - 3| \\le 5": "-\\frac12 \\le x < 8",
    "\\left[\\frac{\\pi}{8}, 1\\right)": "[\\pi/8, 1)",
    "\\begin{pmatrix} 4/9 & 8 \\\\ 1/3 & 2\\end{pmatrix}": "\\begin{pmatrix} \\frac49 & 8\\\\1 & x\\end{pmatrix}",
    "\\left(-\\frac{1}{2}, \\frac{\\sqrt{3}}{2}, 0\\right)": "(-1/2,\\sqrt3/2,0)",
    "-\\frac{1}{3} < x \\le 4": "x\\in(-1/3,4]",
    "\\frac{a}{b} + \\frac{b}{a}": "\\frac{a^2+b^2}{ab}",
    "x^3 + y^3": "(x+y)(x^2-xy+y^2)",
    "\\cot x": "\\frac{\\cos x}{\\sin x}",
    "\\frac{1 - i\\sqrt{3}}{2}": "e^{-i\\pi/3}",
    "\\sqrt[4]{x^3}": "x^{3/4}",
    "x > 3": "(3, \\infty)",
    "\\begin{pmatrix} 4/9 & -8/9 & 1 \\end{pmatrix}": "\\begin{pmatrix} \\frac49 & -\\frac89 & 1 \\end{pmatrix}",
    "-\\frac{1}{2} \\le x \\le 3": "x\\in[-\\frac12,3]",
    "y = -\\frac{1}{2}x + 4": "x + 2y = 8",
    "\\left[\\frac{\\pi^2}{8}, \\frac{5\\pi^2}{4}\\right]": "[\\pi^2/8, 5\\pi^2/4]",
    "\\left(\\frac{3}{5}, -\\frac{8}{3}\\right)": "(0.6, -8/3)",
    "\\frac{-1 + i\\sqrt{3}}{2}": "e^{2\\pi i/3}",
    "\\frac{e^x - e^{-x}}{2}": "\\sinh x",
    "x \\ne 2": "x < 2",
    "4n^2 + 1": "1 + 4n(2n + 1)",
    "-\\frac{5}{2} < x < \\frac{7}{3}": "(-\\frac52, \\frac73)",
    "\\left(\\frac{\\sqrt{2}}{2}, -\\frac{\\sqrt{2}}{2}\\right)": "(1/\\sqrt2, -1/\\sqrt2)",
    "y = \\frac{3}{4}x - \\frac{5}{4}": "3x - 4y = 5",
}
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]


def main() -> None:
    seconds = float(sys.argv[1])
    lines = [Connection(int(number)) for number in sys.argv[2:]]
    logging.disable(logging.WARNING)
    latex2sympy2._Latex2Sympy.create_parser = two_stages(latex2sympy2._Latex2Sympy.create_parser)
    # Symbolic algebra can take any time and memory inside C calls that no Python timeout stops. So the kernel ends a
    # worker that exceeds its processor time or memory, and another is forked in milliseconds.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for pair in WARM.items():
        verify(*map(read, pair), timeout_seconds=None)
    gc.freeze()  # a collection in a worker would copy the pages that it shares with this process
    workers = {fork(line, seconds): line for line in lines}
    for line in lines:
        line.send_bytes(b"ready")
    idle = 0
    while workers and idle < IDLE:
        worker, status, used = os.wait4(-1, 0)
        line = workers.pop(worker)
        if status != 0:  # 0: the other end is closed
            # A worker that computed for long had a hard question; many short-lived workers indicate another fault.
            idle = idle + 1 if used.ru_utime + used.ru_stime < seconds / 2 else 0
            workers[fork(line, seconds)] = line
            line.send_bytes(b"ended")


def fork(line: Connection, seconds: float) -> int:
    """Fork a process that answers a line's questions, and return its id."""
    worker = os.fork()
    if worker == 0:
        serve(line, seconds)
        os._exit(0)
    return worker


def serve(line: Connection, seconds: float) -> None:
    """Answer questions; reading a reference and comparing an answer each have a time limit."""
    while True:
        try:
            number, reference, answer = json.loads(line.recv_bytes())
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        known = read(reference)  # cached: many completions have one reference
        signal.setitimer(signal.ITIMER_PROF, seconds)
        equal = verify(known, read.__wrapped__(answer), timeout_seconds=None)  # the timer is the limit
        signal.setitimer(signal.ITIMER_PROF, 0)
        line.send_bytes(b"%d %d" % (number, equal))


class StartAgain(ErrorListener):
    """Raises at the first syntax error."""

    def syntaxError(self, recognizer: Any, offendingSymbol: Any, line: int, column: int, msg: str, e: Any) -> None:
        raise ParseCancellationException(msg)


def two_stages(plain: Callable) -> Callable:
    """Wrap create_parser: SLL prediction first, and LL after a syntax error."""

    def create_parser(converter: Any, latex: str) -> Any:
        parser = plain(converter, latex)
        # LL prediction takes nearly all the time of a comparison. SLL prediction takes a tenth of it, and returns LL's
        # tree or a syntax error (documentation of PredictionMode.SLL).
        parser._interp.predictionMode = PredictionMode.SLL
        parser.removeErrorListeners()
        parser.addErrorListener(StartAgain())
        first = parser.math

        def math() -> Any:
            try:
                return first()
            except ParseCancellationException:
                return plain(converter, latex).math()

        parser.math = math
        return parser

    return create_parser


@lru_cache(maxsize=1024)
def read(answer: str) -> list:
    return parse(f"\\boxed{{{answer}}}", extraction_config=_CONFIG, parsing_timeout=None)


if __name__ == "__main__":
    main()
