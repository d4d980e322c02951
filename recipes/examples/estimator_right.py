"""Is my estimator right? A mask and its complement with the weights (L + 1) / k, and with L / k by mistake.

python -m recipes.examples.estimator_right      prints what speaks against each claim
"""

from dataclasses import replace

from dllm_rl import Coupled, Trajectory
from dllm_rl.testing.enumeration import CLAIMS, estimator_table, speaks_against


class Wrong(Coupled):
    def draw_views(self, rollout, generator):
        views = super().draw_views(rollout, generator)
        length = rollout.completion_mask.sum(-1)[:, None]  # (B, 1)
        return replace(views, coefficients=views.coefficients * length / (length + 1))


right, wrong = Coupled(num_samples=2), Wrong(num_samples=2)
estimators = {
    "Coupled(num_samples=2)": right,
    "the same with L / k": wrong,
    "Trajectory()": Trajectory(),
}


if __name__ == "__main__":
    for name, estimator in estimators.items():
        print(name)
        rows = estimator_table(estimator)  # seconds
        for claim in CLAIMS:
            print(f"    {claim}:", "; ".join(speaks_against(rows, claim)) or "nothing speaks against it")
