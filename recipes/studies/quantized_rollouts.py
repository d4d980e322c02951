"""The tables of quantized_rollouts.md, which are parts of those of other studies; nothing runs here."""

from dllm_rl.files import read_json
from recipes.studies import ess, low_bits_gradients, low_bits_tuned, order_flips_controls
from recipes.studies.paired import arm_rows, by_arm, markdown

MODELS = {
    "fresh": "20 fresh ones",
    "after RL": "10 after RL in `MaxProb` order",
    "after RL, random": "10 after RL in random order",
    "Countdown": "10 of Countdown",
}
ROLLOUTS = (  # name, arm of low_bits_gradients.py, arm of low_bits_tuned.py
    ("unquantized", None, "unquantized"),
    ("FP8", None, "FP8"),
    ("INT4, no corrector", "int4", "int4"),
    ("TIS", "int4, tis", "int4, tis"),
    ("AIS", "int4, ais", "int4, ais"),
    ("permuted weights (AIS; TIS)", "int4, permuted ais", "int4, permuted tis"),
    ("aligned forward", "int4, aligned", "int4, aligned"),
    ("half the rate", None, "int4 at half the rate"),
)
TRIALS = {
    "lags, all bounds": "4x4 Sudoku, lags 1 to 8, all bounds",
    "lags, weights of tokens": "- bound: weights of tokens",
    "lags, no bound": "- bound: none",
    "lags, two-sided clip": "- bound: two-sided clip",
    "lag 4, TIS, ten seeds": "- one setting, ten seeds: lag 4, TIS",
    "formats, no lag": "4x4 Sudoku, formats, no corrector",
}


def order_table() -> str:
    claims = order_flips_controls.claim_rows(read_json(order_flips_controls.STORED))
    rows = []
    for name, less, twice in zip(MODELS.values(), claims[::2], claims[1::2], strict=True):
        row = {"models": name, "TIS: less in random order": less["found, 95 %"], "Holm's p of it": less["Holm's p"]}
        row["exact: less twice that without flips"] = twice["found, 95 %"]
        rows.append(row | {"Holm's p of that": twice["Holm's p"]})
    return markdown(rows)


def training_table() -> str:
    gradients = low_bits_gradients.matrices(read_json(low_bits_gradients.stored_path(low_bits_gradients.CASES[0])))
    cosines = {row["arm"]: low_bits_gradients.shown(row["cosine"]) for row in low_bits_gradients.rows_of(*gradients)}
    results = low_bits_tuned.whole(by_arm(read_json(low_bits_tuned.STORED)["runs"]))
    ends = {row["arm"]: row for row in arm_rows(low_bits_tuned.STUDY, results, ("after", "int4 weights"))}
    return markdown(
        [
            {"rollouts": name, "cosine": cosines.get(measured, "-"), "learner, from 0.433": ends[arm]["after"]}
            | {"INT4 weights": ends[arm]["int4 weights"]}
            for name, measured, arm in ROLLOUTS
        ]
    )


def ess_table() -> str:
    groups, rows = ess.groups(), []
    for name, of in TRIALS.items():
        scores = ess.auc_row(groups[of])
        row = {"trials": name, "harmed": f"{sum(trial.harmed for trial in groups[of])} of {len(groups[of])}"}
        rows.append(row | {score: scores[score] for score in ("ESS", "known before", "reward less the twin's")})
    return markdown(rows)


def page_tables() -> dict[str, str]:
    return {"order": order_table(), "training": training_table(), "ESS": ess_table()}
