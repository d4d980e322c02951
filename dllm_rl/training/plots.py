"""Pictures of a run, from what it left in its folder."""

from pathlib import Path

from dllm_rl.files import replacing
from dllm_rl.training.lines import current_rows


def read_metrics(directory: Path) -> list[dict[str, float | int]]:
    """The rows of a run's metrics.jsonl, a step each; what a resume ran again counts once."""
    return current_rows(directory / "metrics.jsonl")


def plot(directory: Path) -> Path:
    """`directory`/training.png: reward, solve rate and mismatch against steps; a gap where a step lacks a number."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_metrics(directory)
    steps = [row["step"] for row in rows]
    solved: list[str] = [
        name for name in ("rewards/solve_rate/mean", "rewards/accuracy/mean") if any(name in row for row in rows)
    ]
    panels: list[tuple[str, list[str], str]] = [
        ("reward", ["reward"], "reward"),
        ("training problems solved", solved or ["parsed"], "share"),
        ("mismatch", ["rollout_corr/k3_kl"], "k3 KL, nats"),
        ("effective sample size", ["rollout_corr/rollout_is_eff_sample_size"], "share"),
    ]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.2), layout="constrained")
    for axis, (title, names, unit) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(steps, [_number(row.get(name)) for row in rows], linewidth=1.2)
        axis.set(title=title, xlabel="RL step", ylabel=unit)
        axis.grid(alpha=0.3)
    path = directory / "training.png"
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)
    return path


def _number(value: float | None) -> float:
    """NaN, a gap, for what is absent, or null because it was not finite."""
    return float("nan") if value is None else value
