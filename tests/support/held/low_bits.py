"""The study of four-bit rollouts: its table and its sentences."""

from statistics import mean

from held import DOCS, STUDIES, stored
from recipes.studies.low_bits import COLUMNS, STUDY
from recipes.studies.low_bits_gradients import lost_reward, table
from recipes.studies.paired import holm, interval, paired, sign_flip, tables

PAGE = f"{STUDIES}/low_bits.md"


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


def low_bits_training():
    results = {(run["arm"], run["seed"]): run for run in stored("low_bits")}
    yield PAGE, tables(STUDY, results, *COLUMNS).strip()
    ess = mean(run["ess"] for (arm, _), run in results.items() if arm == "int4")
    yield f"{DOCS}/method.md", f"`Int4WeightOnly` [{ess:.3f}](../recipes/studies/low_bits.md)"
    for other, words in (("int4", "without a corrector"), ("int4, permuted tis", "with its weights on other tokens")):
        apart = paired(results, "int4, tis", other)
        yield PAGE, f"{interval(apart)} above the end {words} ({sum(x > 0 for x in apart)} of {len(apart)} seeds)"
    alone = [sign_flip(paired(results, "int4, tis", other)) for other in ("int4", "int4, permuted tis")]
    yield PAGE, f"has p {alone[0]:.3f} (one seed is equal), over its permuted weights {alone[1]:.3f}."
    least = holm([sign_flip([1.0] * STUDY.seeds)] * len(STUDY.contrasts))[0]
    yield PAGE, f"The least Holm's p that six seeds and two claims can give is {least:.3f}"
    (before,) = {run["before"] for run in results.values()}
    yield PAGE, f"it starts at {before:.3f}."
    known = {run["arm"].split(" at ")[0]: f"{run['after']:.3f}" for run in stored("low_bits_first")}
    told = f"unquantized {known['unquantized']}, INT4 {known['int4']}, TIS {known['int4, tis']}"
    yield PAGE, f"of another seed at half the rate with half the prompts ({told}) and"
    told = f"({known['unquantized']}; {known['int4']}, {known['int4, tis']})"
    yield f"{STUDIES}/quantized_rollouts.md", f"(half the rate and prompts) the unquantized run ended below both {told}"
    copies = paired(results, "int4, tis", "int4", "quantized")
    yield PAGE, f"the quantized copy's accuracy changes by {interval(copies)}"


FIRST = {"int4": 0.30, "int4, tis": 1.04, "int4, ais": 1.02, "int4, permuted ais": 0.28, "int4, aligned": -0.04}
