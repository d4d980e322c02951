"""Script that math_verify.py starts with SECONDS and the file descriptors of connections as arguments.

It forks a worker for each connection, and sends "ready" on it. The worker replies to each JSON [request id, reference,
answer] with "ID VERDICT", where the verdict is 1 (equal) or 0. If it ends, "ended" is sent, and another is forked.
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
MAX_EARLY_ENDS = 100  # consecutive workers that end early, after which this process ends
# Pairs that are compared before forking: the first parse of each LaTeX construction is much slower than later ones.
WARM_UP = {
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
    connections = [Connection(int(number)) for number in sys.argv[2:]]
    logging.disable(logging.WARNING)
    latex2sympy2._Latex2Sympy.create_parser = two_stages(latex2sympy2._Latex2Sympy.create_parser)
    # Symbolic algebra may take any time and memory inside C calls, which no Python timeout stops. So the kernel limits
    # processor time and memory: it ends a worker that exceeds them, and another is forked in milliseconds.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for pair in WARM_UP.items():
        verify(*map(read, pair), timeout_seconds=None)
    gc.freeze()  # a collection in a worker would copy the pages that it shares with this process
    workers = {fork(connection, seconds): connection for connection in connections}
    for connection in connections:
        connection.send_bytes(b"ready")
    early_ends = 0
    while workers and early_ends < MAX_EARLY_ENDS:
        worker, status, used = os.wait4(-1, 0)
        connection = workers.pop(worker)
        if status != 0:  # 0: math_verify.py has closed the connection
            # A worker that computed for long had a hard pair; many short-lived workers indicate another fault.
            early_ends = early_ends + 1 if used.ru_utime + used.ru_stime < seconds / 2 else 0
            workers[fork(connection, seconds)] = connection
            connection.send_bytes(b"ended")


def fork(connection: Connection, seconds: float) -> int:
    """Fork a worker that serves a connection, and return its process id."""
    worker = os.fork()
    if worker == 0:
        serve(connection, seconds)
        os._exit(0)
    return worker


def serve(connection: Connection, seconds: float) -> None:
    """Compare pairs until the connection is closed. Parsing a reference and comparing an answer have a limit each."""
    while True:
        try:
            request_id, reference, answer = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        parsed_reference = read(reference)  # cached, because many completions share a reference
        signal.setitimer(signal.ITIMER_PROF, seconds)
        equal = verify(parsed_reference, read.__wrapped__(answer), timeout_seconds=None)  # the timer is the limit
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(b"%d %d" % (request_id, equal))


class RaiseAtFirstError(ErrorListener):
    """Listener that raises at the first syntax error, for another attempt with LL prediction."""

    def syntaxError(self, recognizer: Any, offendingSymbol: Any, line: int, column: int, msg: str, e: Any) -> None:
        raise ParseCancellationException(msg)


def two_stages(create_ll_parser: Callable) -> Callable:
    """Wrap create_parser, so that a parser uses ANTLR's SLL prediction, and LL prediction after a syntax error."""

    def create_parser(converter: Any, latex: str) -> Any:
        parser = create_ll_parser(converter, latex)
        # LL prediction takes nearly all the time of a comparison. SLL prediction takes a tenth of it, and returns LL's
        # tree or a syntax error (documentation of PredictionMode.SLL).
        parser._interp.predictionMode = PredictionMode.SLL
        parser.removeErrorListeners()
        parser.addErrorListener(RaiseAtFirstError())
        parse_with_sll = parser.math

        def math() -> Any:
            try:
                return parse_with_sll()
            except ParseCancellationException:
                return create_ll_parser(converter, latex).math()

        parser.math = math
        return parser

    return create_parser


@lru_cache(maxsize=1024)
def read(answer: str) -> list:
    """Parse an answer's LaTeX."""
    return parse(f"\\boxed{{{answer}}}", extraction_config=_CONFIG, parsing_timeout=None)


if __name__ == "__main__":
    main()
