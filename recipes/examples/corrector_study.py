"""Does a corrector of yours learn more? 4x4 Sudoku in four denoising steps, rollouts near five levels per weight
(an ESS of about 0.6): there TIS ended above no corrector (recipes/studies/mismatch.md, "Length or conditioning?").

python -m recipes.examples.corrector_study tune     each arm's learning rate, on seeds and puzzles that the study lacks
python -m recipes.examples.corrector_study run      the missing runs, then the tables

A run takes about 40 seconds of one core: 30 trials and 60 runs. Copy the file, put your corrector in the place
of `damped`, and the rates that the trials chose into RATES.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from dllm_rl import AIS, TIS, FunctionCorrector, TokenWeights
from dllm_rl.algorithms.correctors import drop_nonfinite
from recipes.studies.controls import Shuffled
from recipes.studies.lengths import DIFFUSION, arms_of
from recipes.studies.paired import Contrast, Study, main, tune, which


def damped(stats, *, power):
    """w = min(rho, 2)^power, with rho = p_old / p_rollout: between no corrector (0) and TIS (1)."""
    log_mismatch, keep, metrics = drop_nonfinite(stats.log_mismatch, stats.mask)
    return TokenWeights(log_mismatch.exp().clamp(max=2.0) ** power, keep, metrics)


base, four = DIFFUSION.base, arms_of("4 steps")
none = four["4 steps: none"]
mine = FunctionCorrector(
    function=partial(damped, power=0.5)
)  # of functions that can be imported: runs are in other processes
ARMS = {
    "unquantized": four["4 steps: unquantized"],
    "none": none,
    "TIS": none | {"corrector": TIS()},
    "AIS": none | {"corrector": AIS()},
    "mine": none | {"corrector": mine},
    "mine, shuffled": none | {"corrector": Shuffled(corrector=mine)},  # these weights on other tokens: must be worse
}
RATES = dict.fromkeys(ARMS, 5e-4)  # what the trials chose

study = Study(
    name="corrector-study",
    base=base,
    arms={name: changes | {"learning_rate": RATES[name]} for name, changes in ARMS.items()},
    against={name: "none" for name in ARMS if name != "none"},
    metrics={"ESS": "rollout_corr/ess"},
    seeds=10,
    num_steps=60,
    contrasts=(  # the claims, written before the runs
        Contrast("quantized rollouts harm", arm="none", against="unquantized"),
        Contrast("mine ends above no corrector", arm="mine", against="none"),
        Contrast("mine ends above TIS", arm="mine", against="TIS"),
        Contrast("which token has which weight matters", arm="mine", against="mine, shuffled"),
    ),
)
trials = replace(
    study,
    base=replace(base, eval_task=base.validation_task),
    arms={
        f"{name} {rate:g}": changes | {"learning_rate": rate}
        for name, changes in ARMS.items()
        if name != "mine, shuffled"
        for rate in (2.5e-4, 5e-4)
    },
    against={},
    contrasts=(),
)

if __name__ == "__main__":
    if which(("run", "tune")) == "tune":
        tune(trials, Path("runs/corrector-study-tuning"))
    else:
        main(study, __doc__, stored=Path("corrector_study.json"))
