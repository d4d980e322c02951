"""Script that math_verify.py starts with SECONDS and the number of workers as arguments.

It reads a line of JSON, a list of [reference, answer], and writes the list of their verdicts: true, false or null.
"""

import gc
import json
import logging
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from antlr4.atn.PredictionMode import PredictionMode
from antlr4.error.ErrorListener import ErrorListener
from antlr4.error.Errors import ParseCancellationException
from latex2sympy2_extended import latex2sympy2
from math_verify import LatexExtractionConfig, parse, verify

MEMORY = 2 << 30  # bytes of address space
UNEQUAL, EQUAL, UNDECIDED = 1, 2, 3  # a verdict in shared memory; 0: there is none yet
# Pairs that are compared before forking: the first parse of each LaTeX construction is much slower than later ones.
WARM_UP = {
    "(-3, \\frac{\\pi}{2})": "\\left(-3, \\pi/2\\right)",
    "(x - 2)(x + 2)(x^2 + 4)": "x^4 - 16",
    "\\frac{3}{x-2} + \\frac{4}{x+1}": "\\frac{7x - 5}{(x-2)(x+1)}",
    "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}": "\\begin{pmatrix} 1 & 2 \\\\ 3 & 5 \\end{pmatrix}",
    "\\frac{\\sqrt{6} + \\sqrt{2}}{4}": "\\cos 15^\\circ",
    "\\log_2 8 + \\ln x": "3 + \\ln x",
    "4210_{5}": "4210_5",
    "\\cot x": "\\frac{\\cos x}{\\sin x}",
    "\\frac{1 - i\\sqrt{3}}{2}": "e^{-i\\pi/3}",
    "-\\frac{1}{2} \\le x \\le 3": "x\\in[-\\frac12,3]",
    "\\left[\\frac{\\pi^2}{8}, \\frac{5\\pi^2}{4}\\right]": "[\\pi^2/8, 5\\pi^2/4]",
    "\\frac{e^x - e^{-x}}{2}": "\\sinh x",
}
_CONFIG = [LatexExtractionConfig(boxed_match_priority=0)]


def main() -> None:
    seconds, num_workers = float(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is not a reply
    logging.disable(logging.WARNING)
    latex2sympy2._Latex2Sympy.create_parser = two_stages(latex2sympy2._Latex2Sympy.create_parser)
    # Symbolic algebra may take any time and memory inside C calls, which no Python timeout stops. So the kernel limits
    # processor time and memory: it ends a worker that exceeds them, and another is forked in milliseconds.
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for pair in WARM_UP.items():
        verify(*map(read, pair), timeout_seconds=None)
    gc.freeze()  # a collection in a worker would copy the pages that it shares with this process
    for line in sys.stdin:
        verdicts = compare(json.loads(line), num_workers, seconds)
        print(
            json.dumps([{UNEQUAL: False, EQUAL: True}.get(verdict) for verdict in verdicts]), file=replies, flush=True
        )


def compare(pairs: Sequence[tuple[str, str]], num_workers: int, seconds: float) -> bytes:
    """Return a verdict per (reference, answer), compared by workers with a share of the pairs each.

    A worker that ends is replaced. The pair at which it ended is tried once more.
    """
    verdicts = mmap.mmap(-1, len(pairs))  # shared with the workers
    places = range(len(pairs))
    all_shares = filter(None, (places[first::num_workers] for first in range(num_workers)))
    shares: dict[int, Sequence[int]] = {fork(pairs, share, verdicts, seconds): share for share in all_shares}
    tried_once: set[int] = set()
    while shares:
        worker, _ = os.wait()
        remaining = [place for place in shares.pop(worker) if not verdicts[place]]
        if remaining:  # the worker has ended at the first of them
            if remaining[0] in tried_once:
                verdicts[remaining[0]] = UNDECIDED
            tried_once.add(remaining[0])
            shares[fork(pairs, remaining, verdicts, seconds)] = remaining
    return verdicts[:]


def fork(pairs: Sequence[tuple[str, str]], share: Sequence[int], verdicts: mmap.mmap, seconds: float) -> int:
    """Fork a worker that compares the pairs of its share, and return its process id.

    Parsing a reference and comparing an answer have a time limit each.
    """
    worker = os.fork()
    if worker == 0:
        for place in share:
            if not verdicts[place]:
                reference, answer = pairs[place]
                signal.setitimer(signal.ITIMER_PROF, seconds)
                parsed_reference = read(reference)  # cached, because many completions share a reference
                signal.setitimer(signal.ITIMER_PROF, seconds)
                equal = verify(parsed_reference, read.__wrapped__(answer), timeout_seconds=None)  # the timer limits it
                verdicts[place] = EQUAL if equal else UNEQUAL
        os._exit(0)
    return worker


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
