"""Changes of one line that some test of the default suite must notice; `make mutations` makes each of them in turn.

    python tests/mutations.py [--from NUMBER] [--every N] [WORDS of a file's path ...]

tests/mutations.txt has a line with a file of dllm_rl and the tests that should fail. Below it are changes: "- " and the
text there, found once (\\n is a line break), and "+ " and the text in its place. The tests run in a copy of the working
tree, in forks of one process that has torch imported, so that a mutation takes seconds.
Exits with 1 unless all are noticed. A change whose text is not there any more is printed as stale: correct its entry.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 400  # a mutation that never ends is noticed


def mutations() -> list[tuple[str, str, str, str]]:
    """(file, its text, the text in its place, tests) of each change in mutations.txt."""
    found = []
    path = tests = old = ""
    for line in (ROOT / "tests" / "mutations.txt").read_text().splitlines():
        text = line[2:].replace("\\n", "\n").replace("\\\n", "\\n")
        if line.startswith("- "):
            old = text
        elif line.startswith("+ "):
            found.append((path, old, text, tests))
        else:
            path, _, tests = line.partition("  ")
    return found


def outcome(copy: Path, path: str, old: str, new: str, tests: str) -> str:
    """killed, survived, stale (the text is not there once), or broken (the tests cannot run)."""
    file = copy / "dllm_rl" / path
    before = file.read_text()
    if before.count(old) != 1:
        return "stale"
    write(file, before.replace(old, new))
    try:
        return {0: "survived", 1: "killed", 2: "killed", 124: "killed"}.get(status(copy, tests), "broken")
    finally:
        write(file, before)


def write(file: Path, text: str) -> None:
    """Replace a module's text, and forget its bytecode, which may be of the same second and size."""
    file.write_text(text)
    for cached in file.parent.glob(f"__pycache__/{file.stem}.*"):
        cached.unlink()


def status(copy: Path, tests: str) -> int:
    """pytest's status for the tests, in a fork of this process."""
    child = os.fork()
    if not child:
        run_tests(copy, tests)
    return ended(child)


def run_tests(copy: Path, tests: str) -> None:
    """In a forked process: run the tests, and end with pytest's status."""
    os.setsid()
    os.chdir(copy)
    log = os.open(copy / "mutation.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import pytest

    status = 70
    try:
        files = [f"tests/{name}" for name in tests.split()]
        status = int(pytest.main(["-n0", "-x", "-q", "-p", "no:cacheprovider", *files]))
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """The status of a process; one that does not end within SECONDS is ended."""
    limit = time.monotonic() + SECONDS
    while time.monotonic() < limit:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.killpg(child, 9)
    os.waitpid(child, 0)
    return 124


def copied_tree(folder: Path) -> Path:
    """The working tree's tracked files, which mutations and tests may change."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--from", type=int, default=0, dest="first")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    import torch  # once, for all forks
    import transformers.modeling_utils  # noqa: F401

    torch.set_num_threads(1)
    chosen = [each for each in enumerate(mutations()) if all(word in each[1][0] for word in options.words)]
    counts = dict.fromkeys(("killed", "survived", "stale", "broken"), 0)
    with tempfile.TemporaryDirectory() as folder:
        copy = copied_tree(Path(folder))
        sys.path.insert(0, str(copy))
        passing: dict[str, bool] = {}
        for number, (path, old, new, tests) in chosen[options.first :: options.every]:
            began = time.monotonic()
            found = outcome(copy, path, old, new, tests)
            counts[found] += 1
            passing[tests] = passing.get(tests, False) or found == "survived"
            print(f"{number:3} {found:8} {time.monotonic() - began:4.0f} s  {path}: {old!r} -> {new!r}", flush=True)
        for tests in (tests for tests, known in passing.items() if not known):
            if status(copy, tests):
                print(f"fails without a change, too: {tests}")
                counts["broken"] += 1
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return int(counts["killed"] < sum(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
