"""python -m tests.mutations: run the list, or a part of it, and print the score."""

import argparse
import time
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from tests.mutations.record import Mutation
from tests.mutations.runner import ROOT, Outcome, applicable, run_all, score

OURS = {"__main__", "record", "runner", "server"}


def everything() -> list[Mutation]:
    """The lists of all files of this folder, by package."""
    names = sorted(module.name for module in iter_modules([str(Path(__file__).parent)]) if module.name not in OURS)
    return [m for name in names for m in import_module(f"tests.mutations.{name}").MUTATIONS]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--only", action="append", default=[], help="those whose file or text holds this")
    parser.add_argument("--list", action="store_true", help="print them, say which are not found, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once, each in a copy of its own")
    arguments = parser.parse_args()
    chosen = [m for m in everything() if not arguments.only or any(part in m.name for part in arguments.only)]
    if arguments.list:
        gone = [mutation for mutation in chosen if not applicable(mutation, ROOT)]
        for mutation in chosen:
            notes = ["NOT FOUND"] * (mutation in gone) + [mutation.equivalent] * bool(mutation.equivalent)
            print(mutation.name, f"[{' '.join(mutation.tests)}]", *(f"({note})" for note in notes))
        print(f"{len(chosen)} mutations, {len(gone)} not found")
        return 1 if gone else 0
    begin = time.monotonic()

    def report(outcome: Outcome) -> None:
        print(f"{time.monotonic() - begin:7.0f} s  {outcome.verdict:9}  {outcome.mutation.name}", flush=True)

    outcomes = run_all(chosen, jobs=arguments.jobs, report=report)
    for outcome in outcomes:
        if outcome.verdict != "killed":
            print(f"\n{outcome.verdict}: {outcome.mutation.name}\n  {outcome.mutation.equivalent or 'NOT EXPLAINED'}")
            if outcome.verdict == "broken":
                print(outcome.output[-2000:])
    print(f"\n{score(outcomes)}")
    unexplained = [o for o in outcomes if o.verdict != "killed" and not o.mutation.equivalent]
    return 1 if unexplained else 0


if __name__ == "__main__":
    raise SystemExit(main())
