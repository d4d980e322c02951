"""Several updates per rollout, late rollouts: where TBPO's band and QaRL act. 4x4 Sudoku, FP8. Claims before the runs.

With one update per rollout the learner's ratio to its own old weights is 1, so TBPO's trust band never bounds anything
(late_rollouts.py has that case). Here each batch is used for four updates. 20 steps of 4 updates; with a lag of one
step a batch was sampled with weights that are 4 updates old at its first update and 7 at its last.

    none        no corrector: PPO's clip against the learner's own weights before the first update
    dual clip   ratios against the rollout itself, which PPO's clip then bounds, from both sides
    tbpo        TBPO with its published band of 4e-4, which is of responses of some thousand tokens
    wide tbpo   the same with a band a hundred times as wide, for 16 tokens
    wide qarl   this one with the learner's forward through the rollout's FP8 weights

Each arm's learning rate is tuned as late_rollouts.py describes, on two seeds that the study does not use. The claims,
on seeds 0 to 9, are the contrasts of `STUDY`. Known before the runs: ten steps of three arms on one seed, to time them
(TBPO's published band left 4 rows of 100 inside it where the advantage is negative), and the tuning of seed 100. An arm
without a lag, TIS, and QaRL with the published band were planned, tried on seed 100, and left out to save time.

    python -m recipes.studies.late.several_updates               tune, run, several_updates.json, the tables
    python -m recipes.studies.late.several_updates --report      run nothing
"""

from pathlib import Path
from typing import Any

from dllm_rl import TBPO, NoCorrection, PPOClip, QaRL
from dllm_rl.files import read_json
from dllm_rl.groups import Late
from recipes.studies.late import late_rollouts
from recipes.studies.paired import Contrast, Study, by_arm, contrast_values, counted, markdown, paired, verdict_rows

STORED = Path(__file__).with_suffix(".json")  # the tuning, the rates, and every run
WIDE = {"eps_high": 0.04, "neg_low": 0.03, "neg_high": 0.07}
LATE = {"late": Late(workers=1, max_staleness=1)}
ARMS: dict[str, dict[str, Any]] = {
    "none": LATE | {"corrector": NoCorrection()},
    "dual clip": LATE | {"corrector": NoCorrection(), "old_logprobs": "rollout", "loss": PPOClip(delta=1.2)},
    "tbpo": LATE | {"corrector": TBPO()},
    "wide tbpo": LATE | {"corrector": TBPO(**WIDE)},
    "wide qarl": LATE | {"corrector": QaRL(**WIDE)},
}
STUDY = Study(
    name="several-updates",
    base=late_rollouts.recipe.replace(**late_rollouts.QUIET, num_iterations=4),
    arms=ARMS,
    against={name: "none" for name in ARMS if name != "none"},
    metrics=late_rollouts.METRICS
    | {"above the band": "clip_ratio/high_mean", "below the band": "clip_ratio/low_mean", "ratio": "ratio/mean"},
    seeds=10,
    num_steps=20,
    contrasts=(
        Contrast("the dual clip is above no corrector", "dual clip", "none"),
        Contrast("TBPO with a wide band is above no corrector", "wide tbpo", "none"),
        Contrast("TBPO with a wide band is above TBPO with the digest's", "wide tbpo", "tbpo"),
        Contrast("an aligned forward adds to TBPO with a wide band", "wide qarl", "wide tbpo"),
        Contrast("the dual clip is above TBPO with a wide band", "dual clip", "wide tbpo"),
    ),
)


WORDS = {
    "none": "no correction",
    "dual clip": "dual clip",
    "tbpo": "TBPO",
    "wide tbpo": "TBPO, wide band",
    "wide qarl": "QaRL, wide band",
}
MEASURED = {  # column of the page: of a run
    "solved": "after",
    "mean ESS": "ess",
    "lowest ESS": "least ess",
    "cut, advantage below 0": "below the band",
    "cut, advantage above 0": "above the band",
}


def said(claim: str) -> str:
    claim = claim.replace("TBPO with the digest's", "TBPO with its own band").replace("an aligned", "the aligned")
    return late_rollouts.better(claim)


def page_tables() -> dict[str, str]:
    stored = read_json(STORED)
    results, tried, rows = by_arm(stored["runs"]), late_rollouts.rates_tried(stored), []
    for arm in ARMS:
        found = dict(zip(MEASURED, late_rollouts.measured(results, arm, *MEASURED.values()), strict=True))
        gain = counted(paired(results, arm, "none")) if arm != "none" else "-"
        row = {"correction": WORDS[arm], "learning rate": tried[arm], "solved": found.pop("solved"), "gain": gain}
        rows.append(
            row | {head: cell if head == "lowest ESS" else cell.partition("±")[0] for head, cell in found.items()}
        )
    claims = verdict_rows(contrast_values(STUDY, results), said)
    return {"arms": markdown(rows), "claims": markdown(claims)}


if __name__ == "__main__":
    late_rollouts.main(STUDY, STORED, __doc__)
