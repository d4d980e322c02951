"""Is my estimator right? A mask and its complement with the weights (L + 1) / k, and with L / k by mistake.

python -m recipes.examples.estimator_right      prints what speaks against each, and draws docs/estimator-right.png
"""

from dataclasses import replace
from pathlib import Path

from dllm_rl import Coupled, Trajectory
from recipes.studies.enumeration import CLAIMS, estimator_table, speaks_against


class Wrong(Coupled):
    def draw_views(self, rollout, generator):
        views = super().draw_views(rollout, generator)
        length = rollout.completion_mask.sum(-1)[:, None]  # (B, 1)
        return replace(views, coefficients=views.coefficients * length / (length + 1))


right, wrong = Coupled(num_samples=2), Wrong(num_samples=2)
estimators = {
    "Coupled(num_samples=2)": right,
    "the same with L / k": wrong,
    "Trajectory(num_sampled_steps=1)": Trajectory(num_sampled_steps=1),
}


def draw_picture(tables, path):
    """Draw how far the worst of 81 completions is from two references, for each estimator."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 2.4), layout="constrained")
    for place, (reference, color) in enumerate({"ELBO": "#1f77b4", "order taken": "#ff7f0e"}.items()):
        rows = [next(row for row in rows if row.reference == reference) for rows in tables.values()]
        heights = [0.36 * place - 0.18 + index for index in range(len(rows))]
        axis.barh(heights, [max(row.below, row.above) for row in rows], 0.34, color=color, label=reference)
    axis.axvline(4, color="black", linestyle="--", linewidth=1)
    axis.set(xscale="log", xlim=(1, None), xlabel="worst completion, standard errors (dashed: 4, the limit)")
    axis.set_yticks(range(len(tables)), tables)
    axis.invert_yaxis()
    axis.legend(title="compared with", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    tables = {name: estimator_table(estimator) for name, estimator in estimators.items()}  # seconds for each
    for name, rows in tables.items():
        print(name)
        for claim in CLAIMS:
            print(f"    {claim}:", "; ".join(speaks_against(rows, claim)) or "nothing speaks against it")
    draw_picture(tables, Path("docs/estimator-right.png"))
