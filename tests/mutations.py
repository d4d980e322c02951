"""Small changes that some test of the default suite must notice; `make mutations` makes each of them in turn.

    python tests/mutations.py [--from NUMBER] [--every N] [WORDS of a file's path ...]

tests/mutations.txt has a line with a file of dllm_rl and the tests that should fail. Below it are changes of that file,
one a line: "FUNCTION: OLD => NEW". FUNCTION is a qualified name (a method, a nested function, a class, or a constant),
which is looked for in the other modules once it has left the file. OLD stands there once, whatever the spaces and line
breaks, and NEW takes its place. The tests run in a copy of the working tree, in forks of one process that has torch
imported, so that a change takes seconds.
Exits with 1 unless all are noticed. A change that cannot be made any more is printed as stale: correct its line.
"""

import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
SECONDS = 400  # a mutation that never ends is noticed


class Mutation(NamedTuple):
    line: int  # in mutations.txt
    path: str  # in dllm_rl
    function: str
    old: str
    new: str
    tests: str

    def __str__(self) -> str:
        return f"{self.path} {self.function}: {self.old} => {self.new}".rstrip()


def mutations() -> list[Mutation]:
    """What mutations.txt holds."""
    found = []
    path = tests = ""
    for line, text in enumerate((ROOT / "tests" / "mutations.txt").read_text().splitlines(), start=1):
        change, is_change, new = text.partition(" =>")
        if is_change:
            function, _, old = change.partition(": ")
            found.append(Mutation(line, path, function, old, new.strip(), tests))
        else:
            path, _, tests = text.partition("  ")
    return found


def mutated(package: Path, mutation: Mutation) -> tuple[Path, str]:
    """The file that holds the function, and its text with the change; ValueError where it cannot be made."""
    file = package / mutation.path
    if not file.exists() or not scopes(file.read_text(), mutation.function):
        holders = [each for each in package.rglob("*.py") if scopes(each.read_text(), mutation.function)]
        if len(holders) != 1:
            raise ValueError(f"{mutation.path} has no {mutation.function}, and {len(holders)} other modules have one")
        (file,) = holders
    text = file.read_text()
    pattern = re.compile(whatever_the_spaces(mutation.old))
    inside = scopes(text, mutation.function)
    found = {each.span(): scope for scope in inside for each in pattern.finditer(text, *scope)}
    if len(found) != 1:
        raise ValueError(f"{mutation.old} stands {len(found)} times in {mutation.function} of {file.name}, not once")
    (((start, end), (first, last)),) = found.items()
    changed = text[:start] + mutation.new + text[end:]
    try:
        ast.parse(textwrap.dedent(changed[first : last + len(changed) - len(text)]))
    except SyntaxError as error:
        raise ValueError(f"{mutation.new} is no Python in the place of {mutation.old}: {error}") from error
    return file, changed


def scopes(text: str, function: str) -> list[tuple[int, int]]:
    """Where the text of what has this qualified name begins and ends."""
    return definitions(text).get(function, []) if function.rpartition(".")[2] in text else []


@cache
def definitions(text: str) -> dict[str, list[tuple[int, int]]]:
    """Where each definition and assignment of a module begins and ends, by qualified name."""
    begins = [0]
    for line in text.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    found = defaultdict(list)
    for node, name in named(ast.parse(text), ""):
        first = min([node, *getattr(node, "decorator_list", [])], key=lambda each: each.lineno)
        found[name].append((begins[first.lineno - 1], begins[node.end_lineno]))
    return found


def named(node: ast.AST, prefix: str) -> Iterator[tuple[ast.stmt, str]]:
    """Each definition and assignment in a node, with its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child, prefix + child.name
            yield from named(child, f"{prefix}{child.name}.")
            continue
        if isinstance(child, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in getattr(child, "targets", None) or [child.target]:
                if isinstance(target, ast.Name):
                    yield child, prefix + target.id
        yield from named(child, prefix)


def whatever_the_spaces(pattern: str) -> str:
    """A regular expression for a piece of code, however it is laid out."""
    parts = re.findall(r"\w+|[^\w\s]", pattern)
    code = r"\s*".join((r",?\s*" if part in ")]}" else "") + re.escape(part) for part in parts)
    return (r"\b" if parts[0].isidentifier() else "") + code + (r"\b" if parts[-1].isidentifier() else "")


def outcome(copy: Path, mutation: Mutation) -> str:
    """killed, survived, stale (the change cannot be made), or broken (the tests cannot run)."""
    try:
        file, text = mutated(copy / "dllm_rl", mutation)
    except ValueError:
        return "stale"
    before = file.read_text()
    write(file, text)
    try:
        return {0: "survived", 1: "killed", 2: "killed", 124: "killed"}.get(status(copy, mutation.tests), "broken")
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
    chosen = [each for each in enumerate(mutations()) if all(word in each[1].path for word in options.words)]
    counts = dict.fromkeys(("killed", "survived", "stale", "broken"), 0)
    with tempfile.TemporaryDirectory() as folder:
        copy = copied_tree(Path(folder))
        sys.path.insert(0, str(copy))
        passing: dict[str, bool] = {}
        for number, mutation in chosen[options.first :: options.every]:
            began = time.monotonic()
            found = outcome(copy, mutation)
            counts[found] += 1
            passing[mutation.tests] = passing.get(mutation.tests, False) or found == "survived"
            print(f"{number:3} {found:8} {time.monotonic() - began:4.0f} s  {mutation}", flush=True)
        for tests in (tests for tests, known in passing.items() if not known):
            if status(copy, tests):
                print(f"fails without a change, too: {tests}")
                counts["broken"] += 1
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return int(counts["killed"] < sum(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
