"""Repeat single runs of a study: one arm of one seed, beside its stored result, without the rest of the study.

    python -m recipes.studies.repeat orders_trained                                     its arms, and minutes of a run
    python -m recipes.studies.repeat orders_trained --arms "random: int4, tis" --seeds 0 1

A run has the learning rate that the study chose, and starts from the model of its seed, which is made first. Nothing is
stored but below --output_dir, and a run that is there is not made again. A seed that the study does not have is run,
too, and has no stored result to stand beside.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import mean, median
from typing import Any

from dllm_rl.files import read_json
from recipes.studies import paired
from recipes.studies.late.late_rollouts import at_rates, run_late
from recipes.studies.paired import Results, Study, by_arm, markdown, result_path, run_missing, run_one

FOLDERS = {path.stem: path.parent.name for path in Path(__file__).parent.glob("*/*.py")}  # by study


@dataclass(frozen=True)
class Runs:
    """The runs of a study.

    arms     their names.
    stored   the finished runs of the study.
    run      makes those (arm, seed) that have left no result below a folder.
    path     of a result: folder, arm, seed.
    solved   the column of a run that is compared.
    seconds  the column of its time.
    """

    arms: Sequence[str]
    stored: Results
    run: Callable[[Path, Sequence[tuple[str, int]]], None]
    path: Callable[[Path, str, int], Path] = result_path
    solved: str = "after"
    seconds: str = "s"


def of_study(study: Study, stored: Sequence[dict[str, Any]], run: Callable[..., None] = run_one) -> Runs:
    """Runs of paired.py."""

    def missing(root: Path, pairs: Sequence[tuple[str, int]]) -> None:
        run_missing(study, root, pairs, num_steps=lambda _: study.num_steps, workers=1, run=run)

    return Runs(tuple(study.arms), by_arm(stored), missing)


def of_training_order(module: Any, stored: Sequence[dict[str, Any]]) -> Runs:
    """An arm is a task and an order."""
    results = module.by_key(stored)
    parts = {f"{name}: {order}": (name, order) for name in module.TASKS for order in module.ORDERS}

    def path(root: Path, arm: str, seed: int) -> Path:
        name, order = parts[arm]
        return result_path(root / name, order, seed)

    def missing(root: Path, pairs: Sequence[tuple[str, int]]) -> None:
        jobs = []
        for arm, seed in pairs:
            if not path(root, arm, seed).exists():
                name, order = parts[arm]
                rate = module.best_rate(results, name, order)
                job = partial(module.run_one, root / name, name, order, rate, seed, order)
                jobs.append((path(root, arm, seed).stem, job))
        paired.run_all(jobs, root, 1)

    kept = {(f"{name}: {key}", seed): run for (name, key, seed), run in results.items() if key in module.ORDERS}
    return Runs(tuple(parts), kept, missing, path, "full@0", "seconds")


def runs_of(name: str) -> Runs:
    """The runs of a study, each arm at the rate that the study chose."""
    module = import_module(f"recipes.studies.{FOLDERS[name]}.{name}")
    stored = read_json(module.STORED)
    return STUDIES[name](module, stored)


STUDIES: dict[str, Callable[[Any, Any], Runs]] = {
    "orders_trained": lambda module, stored: of_study(module.STUDY, stored, module.run_evaluated),
    "estimates_trained": lambda module, stored: of_study(module.begun(stored), stored, module.run_evaluated),
    "int4_orders": lambda module, stored: of_study(at_rates(module.STUDY, stored["rates"]), stored["runs"]),
    "int4_orders_controls": lambda module, stored: of_study(module.rated(), stored),
    "late_rollouts": lambda module, stored: of_study(at_rates(module.STUDY, stored["rates"]), stored["runs"], run_late),
    "several_updates": lambda module, stored: of_study(
        at_rates(module.STUDY, stored["rates"]), stored["runs"], run_late
    ),
    "low_bits": lambda module, stored: of_study(module.STUDY, stored, module.run_with_steps),
    "low_bits_tuned": lambda module, stored: of_study(
        module.rated(stored["rates"]), stored["runs"], module.run_evaluated
    ),
    "training_order": of_training_order,
}


def listed(runs: Runs) -> str:
    """By arm the seeds of the study, what they solve, and the time of one."""
    rows = []
    for arm in runs.arms:
        of_arm = {seed: run for (name, seed), run in sorted(runs.stored.items()) if name == arm}
        rows.append({"arm": arm, "stored seeds": f"{min(of_arm)} to {max(of_arm)}"})
        rows[-1]["solved, mean"] = f"{mean(run[runs.solved] for run in of_arm.values()):.3f}"
        rows[-1]["minutes, median"] = f"{median(run[runs.seconds] for run in of_arm.values()) / 60:.1f}"
    return markdown(rows)


def repeated(runs: Runs, root: Path, pairs: Sequence[tuple[str, int]]) -> str:
    """Run what is missing; by run what it solves, here and as it is stored, and its minutes."""
    runs.run(root, pairs)
    rows = []
    for arm, seed in pairs:
        if not (path := runs.path(root, arm, seed)).exists():
            raise SystemExit(f"seed {seed} of {arm!r} failed; see {root / 'logs'}")
        here, stored = read_json(path), runs.stored.get((arm, seed))
        rows.append({"arm": arm, "seed": str(seed), "solved": f"{here[runs.solved]:.3f}"})
        rows[-1]["solved, stored"] = f"{stored[runs.solved]:.3f}" if stored else "-"
        rows[-1]["minutes"] = f"{here[runs.seconds] / 60:.1f}"
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="what to run; without it the arms are listed")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the first one of the study")
    parser.add_argument("--output_dir", type=Path, help="default: runs/repeat/STUDY")
    options = parser.parse_args()
    runs = runs_of(options.study)
    if not options.arms:
        print(listed(runs))
        return
    if unknown := [arm for arm in options.arms if arm not in runs.arms]:
        parser.error(f"--arms: {options.study} has no arm {unknown[0]!r}, but {', '.join(map(repr, runs.arms))}")
    seeds = options.seeds or [min(seed for _, seed in runs.stored)]
    pairs = [(arm, seed) for seed in seeds for arm in options.arms]
    print(repeated(runs, options.output_dir or Path("runs/repeat") / options.study, pairs))


if __name__ == "__main__":
    main()
