"""Faults put into runs, by the count: `python -m tests.faults --count 1000 --damages 200 --seed 0`.

Kills, signals and full disks hit a run at a random file operation, Python call or byte; it is then resumed, sometimes
after a second fault, and must end with the weights and the numbers of a run that nothing hit. Damaged checkpoints must
be skipped by name. Prints a table; exits with 1 when anything was lost, and says what.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import torch

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "faults"), str(TESTS / "support"), str(TESTS.parent)]

from child import FULL, Fault, run  # noqa: E402
from damages import DAMAGES  # noqa: E402
from scenarios import PROCESSES, SCENARIOS, outcome, small_recipe  # noqa: E402

from dllm_rl.checkpoints import checkpoint  # noqa: E402

KINDS = {
    "kill at a file operation": ("file", [signal.SIGKILL]),
    "kill at a call": ("call", [signal.SIGKILL]),
    "kill in mid-write": ("write", [signal.SIGXFSZ]),
    "kill of the last process": ("call", [signal.SIGKILL]),
    "signal at a call": ("call", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]),
    "full disk": ("write", [FULL]),
}


class Suite:
    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.chance = root, Random(seed)
        self.table: dict[str, Counter[str]] = {}
        self.failures: list[str] = []
        self.expected: dict[str, tuple] = {}
        self.places: dict[str, dict[str, int]] = {}
        self.slowest = 0.0

    def measure(self, scenario: str) -> None:
        """The run that nothing hits: what it ends with, and how many places there are to hit."""
        directory = self.root / f"whole {scenario}"
        code, out = run(small_recipe(directory, scenario), processes=PROCESSES.get(scenario, 1), count=True)
        if code:
            raise RuntimeError(f"the run without a fault ended with {code}:\n{out}")
        self.expected[scenario] = outcome(directory)
        places = json.loads(next(line for line in reversed(out.splitlines()) if line.startswith("{")))
        files = [path for path in directory.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
        places["write"] = max(path.stat().st_size for path in files)
        self.places[scenario] = places
        print(f"{scenario}: {places}", flush=True)

    def hit(self, scenario: str, kind: str, number: int) -> None:
        """Put a fault in a fresh run, sometimes another in the resumed one, and let it end."""
        directory, processes = self.root / f"run {number}", PROCESSES.get(scenario, 1)
        where, signals = KINDS[kind]
        victim = processes - 1 if kind == "kill of the last process" else 0
        tally, said = self.table.setdefault(f"{scenario}: {kind}", Counter()), []
        for attempt in range(1 + (self.chance.random() < 0.3)):
            fault = Fault(where, 1 + self.chance.randrange(self.places[scenario][where]), self.chance.choice(signals))
            changes = {"resume_from_checkpoint": "latest"} if attempt else {}
            begin = time.perf_counter()
            recipe = small_recipe(directory, scenario, **changes)
            code, out = run(recipe, fault=fault, victim=victim, processes=processes)
            self.slowest = max(self.slowest, time.perf_counter() - begin)
            said.append(f"{fault} -> {code}")
            if fault.what == FULL and [*directory.rglob(".*.partial")]:
                self.failures.append(f"{scenario}, {kind}, {said}: left a .partial behind\n{out}")
            if kind == "signal at a call" and code not in (0, 128 + fault.what, -fault.what):
                self.failures.append(f"{scenario}, {kind}, {said}\n{out}")
        code, out = run(small_recipe(directory, scenario, resume_from_checkpoint="latest"), processes=processes)
        tally["injected"] += 1
        if code or outcome(directory) != self.expected[scenario]:
            self.failures.append(f"{scenario}, {kind}, {said}: ended with {code}, other weights or numbers\n{out}")
        else:
            tally["same weights and numbers"] += 1
            shutil.rmtree(directory)

    def damage(self, kind: str, number: int) -> None:
        """Damage the newest checkpoints of a finished run, and resume it from `latest`."""
        scenario, directory = "damages", self.root / f"damaged {number}"
        shutil.copytree(self.root / "whole of damages", directory)
        tally = self.table.setdefault(f"damage: {kind}", Counter())
        folders = [folder for _, folder in checkpoint.list_checkpoints(directory / "checkpoints")]
        newest = folders[-self.chance.choice((1, 1, 2)) :]
        done = {folder.name: DAMAGES[kind](folder, self.chance) for folder in reversed(newest)}
        changes = {"resume_from_checkpoint": "latest", "save_total_limit": 9}
        code, out = run(small_recipe(directory, "beta > 0", **changes))
        flat = out.replace("\n", "")
        tally["injected"] += 1
        named = all(f"skipped {directory}/checkpoints/{name}: " in flat for name in done)
        if not named or code or outcome(directory) != self.expected[scenario]:
            self.failures.append(f"damage {kind}, {done}: ended with {code}, named: {named}\n{out}")
        else:
            tally["skipped by name, same weights"] += 1
            shutil.rmtree(directory)

    def report(self) -> str:
        lines = ["| fault | injected | as it must be |", "| --- | --- | --- |"]
        for name, tally in self.table.items():
            lines.append(f"| {name} | {tally['injected']} | {tally.total() - tally['injected']} |")
        return "\n".join([*lines, "", f"slowest faulted run: {self.slowest:.1f} s"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50, help="kills, signals and full disks (default 50)")
    parser.add_argument("--damages", type=int, default=20, help="damaged checkpoints (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="default: all")
    parser.add_argument("--kind", action="append", choices=KINDS, help="default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    suite, scenarios = Suite(root, arguments.seed), arguments.scenario or list(SCENARIOS)
    kinds = arguments.kind or list(KINDS)
    for scenario in scenarios if arguments.count else ():
        suite.measure(scenario)
    for number in range(arguments.count):
        suite.hit(scenarios[number % len(scenarios)], kinds[number // len(scenarios) % len(kinds)], number)
    if arguments.damages:
        whole = root / "whole of damages"
        code, out = run(small_recipe(whole, "beta > 0", save_total_limit=9))
        if code:
            raise RuntimeError(out)
        suite.expected["damages"] = outcome(whole)
        for number in range(arguments.damages):
            suite.damage(list(DAMAGES)[number % len(DAMAGES)], number)
    print(suite.report())
    for failure in suite.failures:
        print(f"LOST: {failure}")
    if not suite.failures:
        shutil.rmtree(root)
    return int(bool(suite.failures))


if __name__ == "__main__":
    sys.exit(main())
