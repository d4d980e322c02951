"""Applies mutations to copies of the tree, one at a time, and runs the tests that should notice."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from tests.mutations.record import Mutation
from tests.mutations.server import Server

ROOT = Path(__file__).parents[2]
TIMEOUT = 900.0  # seconds; a mutation that makes a loop endless is killed by it
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".hypothesis", "*.egg-info", "runs", "weights")
# pytest's exit codes: 2 is an interruption or a test file that cannot be collected, 3 to 5 are errors of its use.
VERDICTS = {0: "survived", 1: "killed"}


@dataclass(frozen=True)
class Outcome:
    """verdict  killed, survived, not found (the old text is gone, or stands there more than once, or a test is gone) or
    broken (the tests could not be run: the mutation is no valid code)."""

    mutation: Mutation
    verdict: str
    output: str = ""


def applicable(mutation: Mutation, tree: Path) -> bool:
    """Whether the old text stands in its file exactly once, and its tests are there."""
    path = tree / mutation.file
    once = path.is_file() and path.read_text(encoding="utf-8").count(mutation.old) == 1
    return once and all((tree / test.partition("::")[0]).exists() for test in mutation.tests)


def apply(mutation: Mutation, tree: Path) -> bool:
    """Write the mutation into the tree; False, and nothing is written, where it is not applicable."""
    if not applicable(mutation, tree):
        return False
    path = tree / mutation.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    return True


def run_one(mutation: Mutation, tree: Path, server: Server, timeout: float = TIMEOUT) -> Outcome:
    """Apply, test, and put the file back as it was."""
    path = tree / mutation.file
    before = path.read_bytes() if path.is_file() else None
    if not apply(mutation, tree):
        return Outcome(mutation, "not found")
    try:
        code, output = server.pytest(mutation.tests, timeout)
    finally:
        path.write_bytes(before)
    return Outcome(mutation, "killed" if code is None else VERDICTS.get(code, "broken"), output)


@contextmanager
def copies(root: Path, number: int) -> Iterator[list[Path]]:
    """So many copies of the tree; the real one is only read."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        trees = [Path(folder) / str(i) for i in range(number)]
        for tree in trees:
            shutil.copytree(root, tree, ignore=LEFT_OUT)
        yield trees


def environment_of(tree: Path) -> dict[str, str]:
    """Imports from the copy, and no compiled files: an edit within a second of the last one must be seen."""
    return os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}


def run_all(
    chosen: Sequence[Mutation],
    *,
    root: Path = ROOT,
    jobs: int = 1,
    timeout: float = TIMEOUT,
    report: Callable[[Outcome], None] = lambda outcome: None,
    environment: Callable[[Path], dict[str, str]] = environment_of,
) -> list[Outcome]:
    """Every mutation's outcome, in order. Raises RuntimeError when a test fails without any mutation."""
    with copies(root, jobs) as trees, ExitStack() as stack:
        free: Queue[tuple[Path, Server]] = Queue()
        for tree in trees:
            server = Server(tree, environment(tree))
            stack.callback(server.close)
            free.put((tree, server))
        wanted = sorted({test for mutation in chosen for test in mutation.tests})
        code, output = server.pytest(["--maxfail=0", *wanted], timeout * 4)
        if code != 0:
            raise RuntimeError(f"the tests fail without a mutation:\n{output[-4000:]}")

        def work(mutation: Mutation) -> Outcome:
            place = free.get()
            try:
                outcome = run_one(mutation, *place, timeout)
            finally:
                free.put(place)
            report(outcome)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(work, chosen))


def score(outcomes: Sequence[Outcome]) -> str:
    """The numbers of each verdict, and the share that was killed."""
    counts = dict.fromkeys(("killed", "survived", "not found", "broken"), 0)
    for outcome in outcomes:
        counts[outcome.verdict] += 1
    explained = sum(o.verdict == "survived" and bool(o.mutation.equivalent) for o in outcomes)
    share = 100 * counts["killed"] / max(len(outcomes), 1)
    numbers = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return f"{len(outcomes)} mutations: {numbers}; {share:.1f} % killed, {explained} survivors explained"
