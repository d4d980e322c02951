"""Does the ESS tell which runs are harmed? From the stored trials of three studies; nothing is run.

A trial is harmed if it ends more than 0.1 (solve rate, accuracy) below its twin: the run of the same seed at the same
learning rate without the lag (late_rollouts.json, late_pretrained.json), or without quantization (rates.json). AUC is
the probability that a harmed trial has the lower ESS of a harmed and an unharmed one; 0.5 tells nothing. Controls: what
is known before a run (lag times learning rate; or the format, then the learning rate), and the mean reward of the run's
rollouts, which every run prints, alone and less the twin's.

Only late_pretrained.json has the ESS of each step of trials that have a twin: there it is the mean of the first ten
steps, which could warn. The other two files have the mean over the whole run, which is known when the harm is done.

    python -m recipes.studies.ess        the table of ess.md, and ess.png
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from dllm_rl.files import read_json
from recipes.studies.paired import markdown

FOLDER = Path(__file__).parent
HARM, FIRST = 0.1, 10
FORMATS = ("FP8", "int4", "int3", "five levels")  # from fine to coarse
BOUNDS = {
    "none": ("none", "placebo"),
    "weights of tokens": ("tis", "ais", "decoupled", "tbpo", "icepop"),
    "two-sided clip": ("dual clip",),
}


@dataclass(frozen=True)
class Trial:
    """One run beside its twin.

    arm    what bounds the ratio under a lag; without a lag, the corrector.
    kind   the lag, or the format of the weights.
    ess    share, mean over steps.
    loss   the twin's end less this one's.
    known  a control: a higher value is a larger step, or a coarser format.
    reward a control: the mean over the run (formats: share of solved rollouts).
    twins  the same of the twin.
    """

    arm: str
    kind: str
    seed: int
    ess: float
    loss: float
    known: float
    reward: float
    twins: float

    @property
    def harmed(self) -> bool:
        return self.loss > HARM + 1e-9  # rates are multiples of 1/400 and 1/100


T = TypeVar("T", bound=Trial)


def auc(
    trials: Sequence[T], score: Callable[[T], float], same: Callable[[T], object] = lambda trial: None
) -> float | None:
    """The share of pairs of the same kind, one trial harmed and one not, in which the harmed one has the lower score;
    ties are half. None without such a pair."""
    pairs = [
        (score(one), score(other))
        for one, other in product(trials, trials)
        if one.harmed and not other.harmed and same(one) == same(other)
    ]
    return mean((one < other) + (one == other) / 2 for one, other in pairs) if pairs else None


def late_trials(runs: Iterable[Mapping[str, Any]], rates: Mapping[str, float]) -> list[Trial]:
    """Those of 4x4 Sudoku under a lag that have a twin. A run without a rate of its own has that of its arm."""
    found = []
    twins = {}
    for run in runs:
        arm = run["arm"].split(" at ")[0]
        rate = run.get("learning_rate", rates.get(arm))
        if arm == "lag 0":
            twins[rate, run["seed"]] = run
        elif rate is not None:
            found.append((arm, rate, run))
    return [
        Trial(
            arm=arm.split(", ")[1] if ", " in arm else "none",
            kind=arm.split(",")[0],
            seed=run["seed"],
            ess=run["ess"],
            loss=twins[rate, run["seed"]]["after"] - run["after"],
            known=int(arm[4]) * rate,
            reward=run["reward"],
            twins=twins[rate, run["seed"]]["reward"],
        )
        for arm, rate, run in found
        if (rate, run["seed"]) in twins
    ]


def pretrained_trials() -> list[Trial]:
    """Those of SmolLM2 under a lag of 4, all at one rate, with the ESS of their first steps."""
    runs = read_json(FOLDER / "late_pretrained.json")
    twins = {run["seed"]: run for run in runs if run["arm"] == "FP8"}
    return [
        Trial(
            arm=run["arm"].removeprefix("lag 4").removeprefix(", ") or "none",
            kind="lag 4",
            seed=run["seed"],
            ess=mean(run["ess of steps"][:FIRST]),
            loss=twins[run["seed"]]["after"] - run["after"],
            known=0.0,
            reward=run["reward"],
            twins=twins[run["seed"]]["reward"],
        )
        for run in runs
        if run["arm"].startswith("lag 4") and run["arm"] != "lag 4, slow"
    ]


def format_trials() -> list[Trial]:
    """Those of 4x4 Sudoku with quantized rollouts, no lag, on the seeds that rates were tuned on."""
    runs = [(*run["arm"].split(" at "), run) for run in read_json(FOLDER / "rates.json")["tuning"]]
    twins = {(rate, run["seed"]): run for arm, rate, run in runs if arm == "unquantized"}
    return [
        Trial(
            arm=arm.split(": ")[1],
            kind=arm.split(": ")[0],
            seed=run["seed"],
            ess=run["ESS"],
            loss=twins[rate, run["seed"]]["after"] - run["after"],
            known=FORMATS.index(arm.split(": ")[0]) + float(rate),
            reward=run["rollouts solved"],
            twins=twins[rate, run["seed"]]["rollouts solved"],
        )
        for arm, rate, run in runs
        if arm != "unquantized"
    ]


def groups() -> dict[str, list[Trial]]:
    """The trials of each row of the table."""
    stored = read_json(FOLDER / "late_rollouts.json")
    tuning, runs = (late_trials(stored[part], stored["rates"]) for part in ("tuning", "runs"))
    found = {"4x4 Sudoku, lags 1 to 8, all bounds": tuning}
    for bound, arms in BOUNDS.items():
        found[f"- bound: {bound}"] = [trial for trial in tuning if trial.arm in arms]
    for arm in ("tis", "ais"):
        setting = [trial for trial in runs if (trial.kind, trial.arm) == ("lag 4", arm)]
        found[f"- one setting, ten seeds: lag 4, {arm.upper()}"] = setting
    found["SmolLM2, a lag of 4, all bounds: first ten steps"] = pretrained_trials()
    formats = [trial for trial in format_trials() if trial.arm == "none"]
    found["4x4 Sudoku, formats, no corrector"] = formats
    for kind in ("int3", "five levels"):
        found[f"- one format: {kind}"] = [trial for trial in formats if trial.kind == kind]
    return found


SCORES: dict[str, Callable[[Trial], float]] = {
    "ESS": lambda trial: trial.ess,
    "known before": lambda trial: -trial.known,
    "reward": lambda trial: trial.reward,
    "reward less the twin's": lambda trial: trial.reward - trial.twins,
}


def auc_row(trials: Sequence[Trial]) -> dict[str, str]:
    """The AUC of each score; "-" where all trials have the same one."""
    shown = {}
    for name, score in SCORES.items():
        value = auc(trials, score) if len({score(trial) for trial in trials}) > 1 else None
        shown[name] = "-" if value is None else f"{value:.2f}"
    return shown


def rows() -> list[dict[str, str]]:
    return [
        {"trials": name, "number": str(len(trials)), "harmed": str(sum(trial.harmed for trial in trials))}
        | auc_row(trials)
        for name, trials in groups().items()
    ]


def picture(path: Path) -> None:
    """The ESS against the loss to the twin, a dot a trial: under lags by what bounds the ratio, and by format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = groups()
    lags = {bound: found[f"- bound: {bound}"] for bound in BOUNDS}
    formats = found["4x4 Sudoku, formats, no corrector"]
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained", sharey=True)
    panels = {
        "lags 1 to 8, by bound": lags,
        "no lag, by format": {kind: [trial for trial in formats if trial.kind == kind] for kind in FORMATS},
    }
    for axis, (title, kinds) in zip(axes, panels.items(), strict=True):
        for kind, trials in kinds.items():
            axis.plot([trial.ess for trial in trials], [trial.loss for trial in trials], ".", label=kind, alpha=0.7)
        axis.axhline(HARM, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=title, xlabel="ESS, mean over the run")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0].set_ylabel("loss to the twin (dotted: harmed)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page_tables() -> dict[str, str]:
    return {"trials": markdown(rows())}


if __name__ == "__main__":
    print(markdown(rows()))
    picture(Path(__file__).with_suffix(".png"))
