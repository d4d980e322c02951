"""The process in which math-verify compares two answers: one JSON pair a line in, 1 or 0 out.

Run as a script by math_check.py, never imported. Symbolic algebra on a model's text can take any time and memory, much
of it inside single C calls that no Python timeout reaches. So the kernel ends this process when one comparison has used
its processor time or memory, and the parent takes the silence for "not equal".
"""

import json
import resource
import signal
import sys

from math_verify import LatexExtractionConfig, parse, verify

MEMORY = 3 << 30  # bytes of address space


def main() -> None:
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    print("ready", flush=True)
    for line in sys.stdin:
        boxed = [f"\\boxed{{{answer}}}" for answer in json.loads(line)]
        signal.setitimer(signal.ITIMER_PROF, seconds)
        reference, answer = (parse(text, extraction_config=config, parsing_timeout=None) for text in boxed)
        equal = verify(reference, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(equal), flush=True)


if __name__ == "__main__":
    main()
