"""The study of exact ratios; with MODULE.ESTIMATOR, --rank MODULE.RANK or --commit MODULE.RULE, a row of one's own.

python -m recipes.studies.exactness [--report]
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("recipes.studies.exactness.exactness", run_name="__main__", alter_sys=True)
