"""All parts of the study of likelihoods, methods and orders: run what is missing, store it, and print the tables.

python -m recipes.studies.likelihoods [--report]
"""

import runpy
import sys

from recipes.studies.likelihoods.league import LEAGUES

PARTS = (*(("league", name) for name in LEAGUES), ("estimators",), ("some_steps",), ("drawn_noise",))
PARTS += (("drawn_trained",), ("training_order",))

if __name__ == "__main__":
    given = sys.argv[1:]
    for name, *options in PARTS:
        print(f"\n{' '.join((name, *options))}\n", flush=True)
        sys.argv[1:] = [*options, *given]
        runpy.run_module(f"recipes.studies.likelihoods.{name}", run_name="__main__", alter_sys=True)
