"""The study of four-bit rollouts: its table and its sentences."""

from statistics import mean

from held import DOCS, STUDIES, stored
from recipes.studies import low_bits_gradients, low_bits_tuned
from recipes.studies.low_bits import COLUMNS, STUDY
from recipes.studies.low_bits_gradients import lost_reward, table
from recipes.studies.paired import by_arm, contrast_rows, holm, interval, markdown, paired, sign_flip, tables

PAGE = f"{STUDIES}/low_bits.md"
TUNED = stored("low_bits_tuned")
RUNS = low_bits_tuned.whole(by_arm(TUNED["runs"]))  # of the ten seeds
CLAIMS = {row["stated before the runs"]: row for row in contrast_rows(low_bits_tuned.STUDY, RUNS)}
COST, GAIN = CLAIMS["INT4 costs something"], CLAIMS["TIS is above no corrector"]
DIFFERENCE, P = "difference, 95 %", "Holm's p"


def apart(arm: str, against: str, column: str = "after") -> str:
    """The size of a paired difference with its interval."""
    return interval(paired(RUNS, arm, against, column)).removeprefix("-")


def level(arm: str, column: str = "after") -> str:
    return interval([run[column] for (name, _), run in RUNS.items() if name == arm])


def above(arm: str, against: str, column: str = "after") -> int:
    return sum(each > 0 for each in paired(RUNS, arm, against, column))


def rates_tuned_for_each_arm():
    assert len(TUNED["runs"]) == len(RUNS) == len(low_bits_tuned.STUDY.arms) * 10
    assert len({str(run["machine"]) for run in RUNS.values()}) == 1
    yield PAGE, low_bits_tuned.tables(TUNED).strip()
    yield PAGE, f"from {len(TUNED['tuning'])} trials on two other seeds"
    (before,) = {run["before"] for run in RUNS.values()}
    yield PAGE, f"Accuracy on 289 held-out sums, from {before:.3f} at the start"
    cost, gain = COST[DIFFERENCE], GAIN[DIFFERENCE]
    sampled = apart("int4, tis", "int4", "sampled")
    yield PAGE, f"of the {cost} that INT4 cost it brought back {gain} (claimed before the runs, ten seeds,"
    yield PAGE, f"Holm's p {COST[P]} and {GAIN[P]}). Sampled at temperature 1 no gain of it was seen ({sampled}), and"
    shown = [claim for claim, row in CLAIMS.items() if float(row[P]) < 0.05]
    assert len(shown) == 5 and "the aligned forward's INT4 weights are above those of no corrector" not in shown
    less = 10 - above("int4, tis", "unquantized")
    yield (
        PAGE,
        f"TIS ends {apart('int4, tis', 'unquantized')} below unquantized rollouts (not claimed; {less} of 10 seeds)",
    )
    ais, permuted = apart("int4, ais", "int4", "sampled"), apart("int4, tis", "int4, permuted tis", "sampled")
    yield (
        PAGE,
        f"at temperature 1 TIS is {sampled} above no corrector, AIS {ais} (not claimed); TIS is {permuted} above",
    )
    copies, rewards = (apart("int4, tis", "int4", column) for column in ("quantized", "reward"))
    fewer, poorer = (10 - above("int4, tis", "int4", column) for column in ("quantized", "reward"))
    yield (
        PAGE,
        f"those that sample end {copies} lower ({fewer} of 10 seeds), and its rollouts earn {rewards} less reward",
    )
    assert poorer == 10
    of_int4 = {arm: mean(run["int4 weights"] for (name, _), run in RUNS.items() if name == arm) for arm, _ in RUNS}
    assert max(of_int4, key=of_int4.get) == "int4, aligned"
    worst = min(run["after"] for (arm, _), run in RUNS.items() if arm == "FP8")
    yield PAGE, f"It does not: {apart('unquantized', 'FP8')}, with one seed at {worst:.2f}."
    yield PAGE, f"FP8 is {apart('FP8', 'int4')} above INT4 (not claimed)."
    yield (
        PAGE,
        f"RL with unquantized rollouts ends at {level('unquantized', 'int4 weights')}: no better than RL with INT4",
    )
    yield PAGE, f"rollouts and no corrector ({level('int4', 'int4 weights')})."
    yield (
        f"{DOCS}/method.md",
        f"INT4 rollouts cost {cost}, and `TIS` brought back {gain} (greedy; at temperature 1 {sampled};",
    )
    yield (
        f"{DOCS}/results-and-limits.md",
        f"INT4 cost {cost}, and TIS brought back {gain} (planned), [greedily]",
    )


def low_bits():
    kept = stored("low_bits_gradients")
    text = table(kept)
    yield PAGE, text.strip()
    rows = {line.split(" | ")[0].strip("| "): line.strip(" |").split(" | ") for line in text.splitlines()[2:]}
    cosine, gain = ({arm: cells[column] for arm, cells in rows.items()} for column in (2, 3))
    for arm in ("int4, tis", "int4, ais"):
        mean, half = map(float, gain[arm].split("±"))
        assert mean > half, "the claim holds"
    mean, half = map(float, gain["int4, permuted ais"].split("±"))
    assert mean <= half, "and does not of the control"
    yield PAGE, f"higher than without a corrector by {gain['int4, tis']} and {gain['int4, ais']}."
    yield PAGE, f"(`permuted ais`) the cosine rises by {gain['int4, permuted ais']}."
    aligned = f"is {cosine['int4, aligned']}, lower than without a corrector ({gain['int4, aligned']})."
    yield PAGE, f"whose cosine with the learner's {aligned}"
    yield PAGE, f"the INT4 copy's completions get {lost_reward(kept)} reward."
    assert max(abs(float(cosine[a].split("±")[0]) - b) for a, b in FIRST.items()) < 0.3


def gradients_of_further_cases():
    kept = {case: stored(f"low_bits_gradients_{case}") for case in low_bits_gradients.CASES[1:]}
    assert len({str(each["machine"]) for each in kept.values()}) == 1
    for rows in (low_bits_gradients.case_rows, low_bits_gradients.claim_rows):
        yield PAGE, markdown(rows(kept)).strip()
    assert {row["holds"] for row in low_bits_gradients.claim_rows(kept)} == {"no"}, "none of the nine is shown"
    rows = {
        case: {row.pop("arm"): row for row in low_bits_gradients.rows_of(*low_bits_gradients.matrices(each))}
        for case, each in kept.items()
    }
    tis = {case: low_bits_gradients.shown(each["int4, tis"]["gain"]) for case, each in rows.items()}
    told = "TIS's gains are {again} (`again`), {max_prob} (`max_prob`) and {after_rl_101} (`after_rl_101`)."
    yield PAGE, told.format(**tis)
    assert [case for case, each in rows.items() if each["int4, tis"]["gain"][0] < each["int4, tis"]["gain"][1]] == [
        "after_rl"
    ]
    none, mended = (low_bits_gradients.shown(rows["after_rl"][arm]["cosine"]) for arm in ("int4", "int4, tis"))
    yield PAGE, f"the cosine is {none} without a corrector, {mended} with TIS."
    (before,) = {each["eval_before"] for each in kept.values() if "eval_before" in each}
    after = [f"{kept[case]['eval_after']:.3f}" for case in ("after_rl", "after_rl_101")]
    yield PAGE, f"(seeds 100 and 101, accuracy {before:.3f} to {after[0]} and to {after[1]})"


def low_bits_training():
    results = {(run["arm"], run["seed"]): run for run in stored("low_bits")}
    yield PAGE, tables(STUDY, results, *COLUMNS).strip()
    ess = mean(run["ess"] for (arm, _), run in results.items() if arm == "int4")
    yield f"{DOCS}/method.md", f"`Int4WeightOnly` [{ess:.3f}](../recipes/studies/low_bits.md)"
    for other, words in (("int4", "without a corrector"), ("int4, permuted tis", "with its weights on other tokens")):
        gains = paired(results, "int4, tis", other)
        yield PAGE, f"{interval(gains)} above the end {words} ({sum(x > 0 for x in gains)} of {len(gains)} seeds)"
    alone = [sign_flip(paired(results, "int4, tis", other)) for other in ("int4", "int4, permuted tis")]
    yield PAGE, f"has p {alone[0]:.3f} (one seed is equal), over its permuted weights {alone[1]:.3f}."
    least = holm([sign_flip([1.0] * STUDY.seeds)] * len(STUDY.contrasts))[0]
    yield PAGE, f"The least Holm's p that six seeds and two claims can give is {least:.3f}"
    (before,) = {run["before"] for run in results.values()}
    yield PAGE, f"it starts at {before:.3f}."
    known = {run["arm"].split(" at ")[0]: f"{run['after']:.3f}" for run in stored("low_bits_first")}
    told = f"unquantized {known['unquantized']}, INT4 {known['int4']}, TIS {known['int4, tis']}"
    yield PAGE, f"of another seed at half the rate with half the prompts ({told}) and"
    copies = paired(results, "int4, tis", "int4", "quantized")
    yield PAGE, f"the quantized copy's accuracy changes by {interval(copies)}"


FIRST = {"int4": 0.30, "int4, tis": 1.04, "int4, ais": 1.02, "int4, permuted ais": 0.28, "int4, aligned": -0.04}
