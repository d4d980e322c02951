"""A campaign of hostile completions against every grader: no exception, no code run, numbers in range, little time.

    python benchmarks/fuzz_graders.py --count 1000000 --seed 0 --output fuzz.json

Half of the completions are random strings of the pieces that parsers look for, a quarter are right answers with random
characters changed, a quarter are random Unicode; one in a thousand is a piece or two repeated to 100,000 characters.
The interpreter's audit hook counts every attempt to compile, execute, import, open or start anything while grading.
Time is the wall's. A grade that took over 50 ms is graded again, up to four times half a second apart, and its least
time counts: the machine's other business is not the grader's. `first_over_50_ms` counts the first times.

math-verify is bounded by a second of processor time a comparison, in processes of its own, and asked once more: its
grader gets the first --symbolic_count completions, once each.

Two halves on two cores: --tasks math500 --count 500000 with --seed 1 and --seed 2, and benchmarks/fuzz_graders.py
--merge A.json B.json --output fuzz.json.
"""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from time import perf_counter, sleep

from rich.progress import track

from dllm_rl.tasks.base import Reward
from dllm_rl.tasks.code.task import sandboxed
from dllm_rl.tasks.countdown.graders import countdown_d1_training
from dllm_rl.tasks.math.graders import gsm8k_d1_training, math500_math_verify
from dllm_rl.tasks.protocols import PROTOCOLS
from dllm_rl.tasks.sudoku.graders import sudoku_d1_training

FIELDS = {
    "sudoku": {"puzzle": "1234341200430021", "solution": "1234341221434321"},
    "countdown": {"numbers": [3, 4, 5], "target": 17},
    "gsm8k": {"answer": "42"},
    "math500": {"answer": "\\frac{1}{2}"},
    "code": {"prelude": "def f(a):\n", "entry_point": "f", "arguments": 1, "tests": "assert f(41) == 42"},
}
TRAINING = {"sudoku": [sudoku_d1_training], "countdown": [countdown_d1_training], "gsm8k": [gsm8k_d1_training]}
RIGHT = {
    "sudoku": ["1234341221434321", "<answer>\n1234\n3412\n2143\n4321\n</answer>", "<answer>```\n1234341221434321```"],
    "countdown": ["3*4+5", "<answer>5+4*3</answer>", "so \\boxed{3 \\times 4 + 5 = 17}", "(3*4)+5 = 17"],
    "gsm8k": ["\\boxed{42}", "<answer>42</answer>", "The answer is 42.", "#### 42", "<answer>40 + 2 = $42.00</answer>"],
    "math500": ["\\boxed{\\frac12}", "<answer>\\dfrac{1}{2}</answer>", "\\fbox{0.5}", "\\boxed{x = 1/2\\text{ cm}}"],
    "code": ["    return a + 1\n", "```python\nimport math\ndef f(a):\n    return math.ceil(a + 0.5)\n```"],
}
PIECES = [
    *["<answer>", "</answer>", "<reasoning>\n", "\n</reasoning>\n", "<|eot_id|>", "<|endoftext|>", "```", "\n", " "],
    *["\\boxed{", "\\fbox{", "\\boxed", "{", "}", "\\frac", "\\sqrt", "\\text{ ", "\\left(", "\\times", "\\div", "\\"],
    *["$", "=", "1234341221434321", "1234", "42", "3*4+5", "9**9**9", "9^{9^{9}}", "1/0", "((", "))", "-", "+", "*"],
    *[".", ",", "####", "%", "The answer is ", "1e999", "nan", "inf", "\u0663", "\uff11", "\u2003", "\u00d7", "\x00"],
    *["\ud800", "x", "_", "__import__('os').system('true')", "lambda: 0", "[].__class__", "0x1F", "1_0", "10" * 30],
]
SYMBOLIC = [
    *[
        "\\int_0^1 ",
        "\\sum_{n=1}^{10^9} ",
        "^{",
        "_{",
        "!",
        "\\pm",
        "\\le",
        "\\cup",
        "\\infty",
        "\\sin",
        "\\log",
        " dx",
    ],
    *["|", "\\begin{pmatrix}", "\\end{pmatrix}", "&", "\\\\", "\\pi", "10^{10^{8}}", "(", ")", "[", "]"],
    *["\\lim_{x \\to 0}", "y", "i"],
]
CODE = ["def f(a):\n", "    return ", "(" * 300, "lambda: " * 200, "eval(", "import os\n", "a.", '"""', "9" * 5000]
FORBIDDEN = ("exec", "compile", "import", "open", "os.", "subprocess.", "socket.", "ctypes.", "code.", "pickle.")


def completion(task: str, rng: Random) -> str:
    kind = rng.random()
    if kind < 0.001:
        piece = "".join(rng.choices(PIECES, k=rng.randint(1, 2)))
        return piece * (100_000 // len(piece)) + rng.choice(PIECES)
    pieces = PIECES + {"math500": SYMBOLIC, "code": CODE}.get(task, [])
    if kind < 0.5:
        return "".join(rng.choices(pieces, k=rng.randint(0, 24)))
    if kind < 0.75:
        characters = list(rng.choice(RIGHT[task]))
        for _ in range(rng.randint(0, 3)):
            characters[rng.randrange(len(characters))] = rng.choice(pieces)
        return "".join(characters)
    return "".join(
        chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x110000)))) for _ in range(rng.randint(0, 40))
    )


def campaign(task: str, graders: list, count: int, symbolic_count: int, seed: int, watch: Counter) -> list[dict]:
    """Each completion goes to every grader of the task, or the first ones to math-verify's."""
    rng = Random(f"{task}/{seed}")
    names = ["count", "exceptions", "events", "out_of_range", "parsed", "right", "undecided", "first_over_50_ms"]
    results = {grader: Counter(dict.fromkeys([*names, "bad_votes"], 0)) for grader in graders}
    slowest: dict = dict.fromkeys(graders, (0.0, ""))
    for grader in graders:  # so that every pattern is compiled and every child process started
        grader(FIELDS[task], "\\boxed{2x}")
    vote = {grader: grader(FIELDS[task], RIGHT[task][0]).answer for grader in graders}
    for place, text in enumerate(track([completion(task, rng) for _ in range(count)], description=task)):
        for grader in graders:
            symbolic = grader is math500_math_verify
            if symbolic and place >= symbolic_count:
                continue
            found = results[grader]
            found["count"] += 1
            watch.clear()
            watch["on"] = 1
            try:
                graded, spent, first = timed(grader, FIELDS[task], text, tries=1 if symbolic else 5)
            except Exception as error:  # the campaign's purpose is to count them
                found["exceptions"] += 1
                found[f"{type(error).__name__} on {text[:80]!r}"] += 1
                continue
            finally:
                watch["on"] = 0
            found["events"] += sum(number for name, number in watch.items() if name != "on")
            numbers = [graded.value, *graded.breakdown.values()]
            found["out_of_range"] += not all(math.isfinite(number) and 0 <= number <= 16 for number in numbers)
            found["parsed"] += graded.parsed
            found["right"] += graded.breakdown.get("accuracy", graded.breakdown.get("solve_rate", graded.value)) == 1
            # Right answers are one vote, and no wrong answer is in it.
            found["bad_votes"] += vote[grader] is not None and (graded.answer == vote[grader]) != (graded.value == 1)
            found["undecided"] += graded.breakdown.get("undecided", 0) == 1
            found["first_over_50_ms"] += first > 0.05
            slowest[grader] = max(slowest[grader], (spent, text[:60]))
    return [
        {"grader": grader.__name__, **found}
        | {"slowest_ms": round(slowest[grader][0] * 1e3, 2), "slowest_text": slowest[grader][1]}
        for grader, found in results.items()
    ]


def timed(grader: Callable, fields: dict, text: str, *, tries: int) -> tuple[Reward, float, float]:
    """The grade, the least seconds of up to so many tries, and those of the first."""
    spent = []
    while len(spent) < tries and (not spent or min(spent) > 0.05):
        if spent:
            sleep(0.5)
        start = perf_counter()
        graded = grader(fields, text)
        spent.append(perf_counter() - start)
    return graded, min(spent), spent[0]


def merged(parts: list[list[dict]]) -> list[dict]:
    """One row a grader: counts added, the slowest kept."""
    rows: dict[str, dict] = {}
    for row in (row for part in parts for row in part):
        known = rows.setdefault(row["grader"], row)
        if known is not row:
            worst = max(known, row, key=lambda one: one["slowest_ms"])
            total = {key: known.get(key, 0) + value for key, value in row.items() if isinstance(value, int)}
            rows[row["grader"]] = known | row | total | {key: worst[key] for key in ("slowest_ms", "slowest_text")}
    return list(rows.values())


def observe(watch: Counter, event: str, arguments: tuple) -> None:
    # Not `ast.parse`, which runs nothing: it has this name for its text, and an error looks for such a file.
    if watch["on"] and event.startswith(FORBIDDEN) and "<unknown>" not in arguments[:2]:
        watch[event] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="completions per grader")
    parser.add_argument("--symbolic_count", type=int, default=10_000, help="completions for math-verify's grader")
    parser.add_argument("--tasks", nargs="+", default=list(FIELDS), choices=list(FIELDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="add up results instead of a campaign")
    options = parser.parse_args()
    results = merged([json.loads(path.read_text()) for path in options.merge or []])
    watch: Counter = Counter()
    sys.addaudithook(partial(observe, watch))
    for task in [] if options.merge else options.tasks:
        graders = list(dict.fromkeys((*PROTOCOLS[task].values(), *TRAINING.get(task, []))))
        graders = [grader for grader in graders if grader is not sandboxed]  # tests/tasks/code/test_sandbox.py has it
        results += campaign(task, graders, options.count, options.symbolic_count, options.seed, watch)
    for result in results:
        print(" ".join(f"{name}={value!r}" for name, value in result.items()))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
